"""svd: the best approximation, of the adapters' own rank, of their weighted sum (PEFT's "svd")."""

from collections.abc import Mapping

import torch

from lorafleet.composition.adapter import LowRank
from lorafleet.composition.composition import Composition
from lorafleet.composition.methods.method import Method, Mixing, Prepared, Slot


class Svd(Method):
    """The one method that is not linear in the weights: every new composition is decomposed, layer by layer.

    What is kept of a layer has the largest rank that any layer of any of the adapters has, as in PEFT. The sum is never
    written out: it is the product of two thin matrices, [outputs, ranks] and [ranks, inputs], and their QR decompositions
    leave at most a square of the summed ranks to decompose.
    """

    def parts(self, composition: Composition) -> dict[Slot, Mixing]:
        """One slot that belongs to no adapter alone."""
        names = tuple(sorted(composition.weights))
        weights = tuple(composition.weights[name] for name in names)
        return {Slot("", Prepared("svd", weights, names)): Mixing(direct=1.0)}

    def prepare(self, prepared: Prepared, module: str, layers: Mapping[str, LowRank]) -> dict[str, LowRank]:
        """U sqrt(S) and sqrt(S) V of the sum, the largest values first; the pages take the first of them."""
        weights = dict(zip(prepared.members, prepared.settings, strict=True))
        b = torch.cat([layer.b.double() * (weights[name] * layer.scale) for name, layer in layers.items()], dim=1)  # type: ignore[operator]
        a = torch.cat([layer.a.double() for layer in layers.values()])
        b_basis, b_rest = torch.linalg.qr(b)
        a_basis, a_rest = torch.linalg.qr(a.T)
        left, values, right = torch.linalg.svd(b_rest @ a_rest.T, full_matrices=False)
        root = values.sqrt()
        return {"": LowRank(root[:, None] * (right @ a_basis.T), (b_basis @ left) * root, 1.0)}
