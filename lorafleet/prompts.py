"""From text to token ids, the same way in training, scoring and generation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANCHOR = ":"


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_tokens: int) -> list[int]:
    """The token ids of a prompt, at most `max_tokens` of them; what is too long is cut in its middle.

    The prompt begins with the BOS token exactly once where the tokenizer adds one (Llama does, SmolLM2 does not),
    also where the text brings it along, and it never ends with an end token.
    """
    ids = _encode(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        ids = [bos, *ids]
    return cut_middle(ids, max_tokens)


def encode_answer(tokenizer: "PreTrainedTokenizerBase", answer: str) -> list[int]:
    """The token ids of " " + answer as they follow a prompt, without special tokens.

    They are read off behind an anchor, because SentencePiece tokenizers (Llama 2) put a blank of their own in front of
    a text that stands alone, and would give it two.
    """
    anchor = _encode(tokenizer, ANCHOR)
    ids = _encode(tokenizer, f"{ANCHOR} {answer}")
    if ids[: len(anchor)] == anchor:
        return ids[len(anchor) :]
    return _encode(tokenizer, f" {answer}")


def cut_middle(ids: list[int], max_tokens: int) -> list[int]:
    """`ids` without its middle, where it is longer than `max_tokens` (at least 1).

    The head holds the instruction, the tail the question and the cue: both stay.
    """
    if len(ids) <= max_tokens:
        return ids
    head = max_tokens // 2
    return ids[:head] + ids[len(ids) - (max_tokens - head) :]


def end_token(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> int:
    """The id of the token that ends an answer.

    The model's generation configuration says which tokens end its texts; the tokenizer's `eos_token` is one of them or
    is not believed: that of SmolLM2-Instruct's GGUF file is `<|im_start|>`, while model and chat template end with
    `<|im_end|>` (2). Llama 3 Instruct names several, and its tokenizer picks the end of a turn among them; for Llama 2
    both say `</s>` (2).

    Raises:
        ValueError: neither model nor tokenizer names an end token.
    """
    ends = _declared_ends(model)
    own = tokenizer.eos_token_id
    if isinstance(own, int) and (not ends or own in ends):
        return own
    if not ends:
        raise ValueError("neither the model's configuration nor its tokenizer names an end token")
    return ends[0]


def _declared_ends(model: "PreTrainedModel") -> list[int]:
    for config in (getattr(model, "generation_config", None), model.config):
        declared: Any = getattr(config, "eos_token_id", None)
        if declared is not None:
            return [declared] if isinstance(declared, int) else list(declared)
    return []


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
