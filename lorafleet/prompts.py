"""From text to token ids, the same way in training, scoring and generation."""

from functools import partial
from typing import TYPE_CHECKING, Any

from lorafleet.long_texts import read_ends

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANCHOR = ":"


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_tokens: int) -> list[int]:
    """The token ids of a prompt, at most `max_tokens` of them; what is too long is cut in its middle.

    The prompt begins with the BOS token exactly once where the tokenizer adds one (Llama does, SmolLM2 does not),
    also where the text brings it along, and it never ends with an end token.
    """
    return cut_middle(encode_ends(tokenizer, prompt, max_tokens)[0], max_tokens)


def encode_ends(tokenizer: "PreTrainedTokenizerBase", prompt: str, max_tokens: int) -> tuple[list[int], bool]:
    """The token ids of a prompt as `encode_prompt` gives them before the cut.

    Returns:
        All of them and True; or, of a long prompt that has more than `max_tokens`, those that `cut_middle` keeps with some
        between them, and False. The middle of such a prompt is never tokenized.
    """
    ids, whole = read_ends(partial(_encode, tokenizer), prompt, max_tokens // 2, max_tokens - max_tokens // 2)
    bos = tokenizer.bos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [bos] and ids[:1] != [bos]:
        ids = [bos, *ids]
    return ids, whole


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
    """The id of the token that training writes at the end of an answer: one of `end_tokens`.

    It is the tokenizer's `eos_token` where that is one of the model's, else the first of those. Llama 3 Instruct names
    several ends, and its tokenizer picks the end of a turn among them; for Llama 2 both say `</s>` (2).

    Raises:
        ValueError: neither model nor tokenizer names an end token.
    """
    ends = _declared_ends(tokenizer, model)
    own = tokenizer.eos_token_id
    return own if isinstance(own, int) and own in ends else ends[0]


def end_tokens(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> frozenset[int]:
    """The ids of all tokens that end an answer, as for transformers' `generate`.

    The model's generation configuration names them, else its configuration, else the tokenizer. A tokenizer's `eos_token` is
    not added to those of a model: that of SmolLM2-Instruct's GGUF file is `<|im_start|>`, while model and chat template end
    with `<|im_end|>` (2).

    Raises:
        ValueError: neither model nor tokenizer names an end token.
    """
    return frozenset(_declared_ends(tokenizer, model))


def declared_stops(model: "PreTrainedModel") -> tuple[str, ...]:
    """The stop texts of the model's generation configuration."""
    declared: Any = getattr(getattr(model, "generation_config", None), "stop_strings", None) or ()
    return (declared,) if isinstance(declared, str) else tuple(declared)


def _declared_ends(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> list[int]:
    for source in (getattr(model, "generation_config", None), model.config, model.config.get_text_config(), tokenizer):
        declared: Any = getattr(source, "eos_token_id", None)
        ends = [declared] if isinstance(declared, int) else list(declared or ())
        if ends:
            return ends
    raise ValueError("neither the model's configuration nor its tokenizer names an end token")


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
