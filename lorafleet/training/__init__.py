"""One adapter from its examples. Never imports Ray; jobs/train_adapters.py fans it out.

Reads from top to bottom: `adapter` (train_adapter), `backends` and `quantization` (who puts LoRA layers into which base),
`optimisation` (the steps), `ranks` (several processes for one adapter), `weights`, `passes` and `graphs` (gradients, and
how they are computed), `attention`, `loss`, `rows` (examples as token ids, batches), `checkpoints` and `randomness` (what a
killed run goes on from), `tracking` (who is told), `cards` (what is known about an adapter, and whether it is still
current). Before the work: `checks`, `figures` and `speed`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
