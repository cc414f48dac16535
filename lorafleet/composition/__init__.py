"""A different weighted composition of adapters for every row of a batch, without merging anything.

Reads from top to bottom: `adapter` (one LoRA adapter, read from PEFT's `files`), `composition` (what a request asks for),
`methods` (what each method makes of adapters and weights), `groups` (the layers that share an input), `pages` (the prepared
adapters on the device), `preparing` (writes forms of adapters into pages), `pool` (the adapters there are, and who holds
which pages), `plan` and `products` (what the rows of a pass take, in plain torch), `blocks`, `tables` and `kernels` (the
same for GPUs), `layer` (how a plan changes a model). Nothing here knows where weights come from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
