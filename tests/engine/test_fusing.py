"""Fused small operations give what the model's own give."""

import pytest
import torch
from engine.families import NEVER, build

from lorafleet.engine.fusing import fuse


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_a_fused_model_answers_as_before(family):
    model = build(family, eos_token_id=NEVER)
    tokens = torch.randint(3, 200, (1, 9), generator=torch.Generator().manual_seed(1))
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    before = [norm.forward for norm in norms]
    with torch.inference_mode():
        wanted = [model(tokens[:, :length]).logits for length in (9, 1, 5)]
        # The compiler's front end alone: what it takes apart is put together again, without a compiler for the machine.
        fuse(model, backend="eager")
        found = [model(tokens[:, :length]).logits for length in (9, 1, 5)]
    assert norms
    assert all(norm.forward != old for norm, old in zip(norms, before, strict=True))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
