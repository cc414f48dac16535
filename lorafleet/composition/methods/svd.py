"""svd: the best approximation, of the adapters' own rank, of their weighted sum (PEFT's "svd")."""

from collections.abc import Mapping
from typing import cast

import torch

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.method import ChangedLayers, Layers, Method, Mixing, Prepared, Slot, of_one_shape

ALMOST_NOTHING = 1e-7
"""Of the largest singular value: what is smaller is rounding."""


class Svd(Method):
    """The one method that is not linear in the weights: every new composition is decomposed, layer by layer.

    What is kept of a layer has the largest rank that any layer of any of the adapters has, as in PEFT. The sum is never
    written out: it is the product of two thin matrices, B [outputs, ranks] and A [ranks, inputs], and its singular values
    are the roots of the eigenvalues of L^T (B^T B) L with L L^T = A A^T, a square of the summed ranks. Layers of one shape
    are decomposed together.
    """

    def parts(self, composition: Composition) -> dict[Slot, Mixing]:
        """One slot that belongs to no adapter alone."""
        names = tuple(sorted(composition.weights))
        weights = tuple(composition.weights[name] for name in names)
        return {Slot("", Prepared("svd", weights, names)): Mixing(direct=1.0)}

    def prepare(self, prepared: Prepared, layers: Layers) -> ChangedLayers:
        """U sqrt(S) and sqrt(S) V of the sum, the largest values first; the pool takes the first of them."""
        weights = dict(zip(prepared.members, cast(tuple[float, ...], prepared.settings), strict=True))
        found: ChangedLayers = {}
        for modules in of_one_shape(layers):
            halves = [_side_by_side(layers[module], weights) for module in modules]
            a, b = decompose(torch.stack([a for a, _ in halves]), torch.stack([b for _, b in halves]))
            found |= {
                module: {"": LowRank(a_root, b_root, 1.0)}
                for module, a_root, b_root in zip(modules, a.float(), b.float(), strict=True)
            }
        return found


def decompose(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sqrt(S) V and U sqrt(S) of the products b a, the largest values first.

    Args:
        a: float64 [products, ranks, inputs].
        b: float64 [products, outputs, ranks].
    """
    gram_a, gram_b = a @ a.mT, b.mT @ b
    root = _root(gram_a)
    squares, turned = torch.linalg.eigh(root.mT @ gram_b @ root)
    values = squares.flip(-1).clamp(min=0).sqrt()[:, None, :]
    spread = root @ turned.flip(-1)
    # U = b spread / S, and so S V = U^T b a.
    worth = torch.where(values > ALMOST_NOTHING * values[..., :1], 1 / values, 0)
    b_root = (b @ spread) * worth.sqrt()
    a_root = (worth.sqrt() * worth).mT * ((gram_b @ spread).mT @ a)
    return a_root, b_root


def _root(gram: torch.Tensor) -> torch.Tensor:
    """An L with L L^T = `gram`: a triangle, unless adapters share their A, or parts of it, and leave none."""
    triangle: torch.Tensor
    faults: torch.Tensor
    triangle, faults = torch.linalg.cholesky_ex(gram)
    if not faults.any():
        return triangle
    squares, directions = torch.linalg.eigh(gram)
    root: torch.Tensor = directions * squares.clamp(min=0).sqrt()[:, None, :]
    return root


def _side_by_side(layers: Mapping[str, LowRank], weights: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """A of all adapters one under the other, and B side by side, times weights and scales; float64."""
    a = torch.cat([layer.a.double() for layer in layers.values()])
    b = torch.cat([layer.b.double() * (weights[name] * layer.scale) for name, layer in layers.items()], dim=1)
    return a, b
