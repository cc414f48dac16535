"""Triton's kernels run in its interpreter where there is no GPU. To be imported before triton, and what brings it in."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from triton.runtime import interpreter
    except ImportError:
        pass
    else:
        # Triton 3.6 holds a scalar as an array of one element, which NumPy 2.4 no longer takes for an index.
        patch_tensor = interpreter._patch_lang_tensor

        def patch_tensor_and_index(tensor, scope):
            patch_tensor(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        interpreter._patch_lang_tensor = patch_tensor_and_index
