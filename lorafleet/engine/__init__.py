"""Generation and scoring on one model, every row of a batch with its own composition.

Reads from top to bottom: `requests` (what is asked and answered), `text` and `sampling` (tokens to text, logits to tokens),
`segments` (what a pass computes), `attention` and `cache` (the door to transformers' models, and what a cache offers),
`slotted_cache` and `paged_cache` (in plain torch, and for GPUs, with `paged_attention`), `fusing`, `graphs` and
`prompt_graphs` (fewer launches, for GPUs; `capture` makes the graphs), `runner` (one pass), `sequence` (a request on its
way), `loop` (who computes next), `engine` (the thread, and what others call). Knows tokens, caches and
compositions; knows nothing of tasks, of retrieval, or of who asks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
