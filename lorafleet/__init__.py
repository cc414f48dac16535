"""LoRAFleet: train a fleet of LoRA adapters, index what each was trained on, and compose them for every request."""

import lazy_loader

from lorafleet.home import stand_in_for_home

stand_in_for_home()

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
