"""LoRAFleet: train a fleet of LoRA adapters, index what each was trained on, and compose them for every request."""
