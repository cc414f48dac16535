"""One pass through the model: tokens in, logits out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from lorafleet.composition import ComposedModel, Lease, Run
from lorafleet.engine.attention import ATTENTION, Attention
from lorafleet.engine.cache import KeyValueCache
from lorafleet.engine.segments import Segment

if TYPE_CHECKING:
    from lorafleet.engine.graphs import DecodeGraphs
    from lorafleet.engine.prompt_graphs import PromptGraphs


class Runner:
    """Runs passes over packed tokens: one row, one sequence behind the other, nothing padded.

    Args:
        graphs, prompt_graphs: run the passes where there is a GPU for it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        composed: ComposedModel,
        cache: KeyValueCache[Any],
        graphs: "DecodeGraphs | None" = None,
        prompt_graphs: "PromptGraphs | None" = None,
    ) -> None:
        model.set_attn_implementation(ATTENTION)
        self._model, self._composed, self._cache = model, composed, cache
        self._graphs, self._prompt_graphs = graphs, prompt_graphs
        self._device = next(model.parameters()).device

    def prefill(self, segments: Sequence[Segment[Any]]) -> torch.Tensor:
        """Compute segments; the logits of all places that they want, float32 [wanted, vocabulary]."""
        if self._prompt_graphs is not None:
            logits = self._prompt_graphs.prefill(segments)
            if logits is not None:
                return logits
        tokens = [token for segment in segments for token in segment.tokens]
        positions = [place for segment in segments for place in segment.positions()]
        wanted, start = [], 0
        for segment in segments:
            wanted += [start + place for place in segment.wanted]
            start += len(segment.tokens)
        runs = [Run(segment.lease, len(segment.tokens)) for segment in segments]
        with self._composed.following(self._composed.plan(runs)):
            return self._forward(tokens, positions, wanted, self._cache.prefill(segments))

    def decode(
        self, tokens: Sequence[int], pasts: Sequence[int], rooms: Sequence[Any], leases: Sequence[Lease | None]
    ) -> torch.Tensor:
        """Compute one more token of each of some sequences; their logits, float32 [sequences, vocabulary].

        Args:
            pasts: how many tokens of each sequence are in the cache; the new one's place.
        """
        if self._graphs is not None:
            logits = self._graphs.decode(tokens, pasts, rooms, leases)
            if logits is not None:
                return logits
        with self._composed.following(self._composed.plan([Run(lease, 1) for lease in leases])):
            return self._forward(tokens, pasts, range(len(tokens)), self._cache.decode(rooms, pasts))

    def _forward(
        self, tokens: Sequence[int], positions: Sequence[int], wanted: Sequence[int], attention: Attention
    ) -> torch.Tensor:
        def row(values: Sequence[int]) -> torch.Tensor:
            # A piece in the middle of a prompt wants no logits at all.
            return torch.tensor(values, dtype=torch.int64, device=self._device)

        output = self._model(
            input_ids=row(tokens)[None],
            position_ids=row(positions)[None],
            use_cache=False,
            logits_to_keep=row(wanted),
            attention_pass=attention,
        )
        logits: torch.Tensor = output.logits
        return logits[0].float()
