"""The wire format: OpenAI's completions, chat completions and models, and LoRAFleet's additions."""
