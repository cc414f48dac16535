"""Causal attention without a mask, as rows that are padded on the right allow it.

transformers would look through the positions of every batch for rows packed into one, for which the CPU has to wait for the
GPU; and a CUDA graph would get a mask written out, with which the fast kernels cannot work.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "lorafleet_causal"
WINDOWS = ("sliding_window", "attention_chunk_size")

# No mask is registered under the name, so none is made.
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


@contextmanager
def without_masks(model: PreTrainedModel, longest: int) -> Iterator[None]:
    """Let the model attend without masks, where it would do so by torch's attention, and sees all of `longest` tokens."""
    config = model.config
    before = config._attn_implementation
    windows = [getattr(config, name, None) or longest for name in WINDOWS]
    if before != "sdpa" or min(windows) < longest:
        yield
        return
    config._attn_implementation = CAUSAL
    try:
        yield
    finally:
        config._attn_implementation = before
