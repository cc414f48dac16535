"""Texts to unit vectors, by a sentence encoder."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from lorafleet.config import Models
from lorafleet.errors import ModelError
from lorafleet.long_texts import beginning
from lorafleet.models import fingerprint, load_encoder, pick_device, pick_encoder_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Vectors = npt.NDArray[np.float32]


class Encoder:
    """A sentence encoder in memory.

    Attributes:
        fingerprint: what identifies its weights; an index is only good for the encoder that made it.
        dimensions: the length of its vectors.
        device, dtype: where it computes, and in which number format.
    """

    def __init__(self, settings: Models) -> None:
        """Load it.

        Raises:
            ModelError: the encoder is not there, or cannot be loaded.
        """
        from lorafleet.packing import pack_linears

        self.device = pick_device(settings.device)
        self.dtype = pick_encoder_dtype(settings.encoder_dtype, self.device)
        self._name = settings.encoder
        self.fingerprint = fingerprint(settings.encoder, settings.encoder_revision)
        self._model = load_encoder(settings).to(self.dtype)
        # A short question takes less than half the time so, and batches of rows two thirds.
        pack_linears(self._model)
        self._model.eval()
        self._prompt = self._model.prompts.get(self._model.default_prompt_name or "")
        self._longest = int(self._model.max_seq_length or 0)
        # A copy: to count tokens would unset the truncation of the model's own tokenizer.
        self._tokenizer = cast("PreTrainedTokenizerBase", deepcopy(self._model.tokenizer))
        self.dimensions = int(self._model.get_embedding_dimension() or 0)

    def warm_up(self) -> None:
        """Embed a text of every length that oneDNN compiles products for: those who ask first would wait."""
        from lorafleet.packing import padded_rows

        for tokens in sorted({padded_rows(count) for count in range(1, self._longest + 1)}):
            # Two tokens stand around every text.
            self.encode(["a " * (tokens - 2)], 1)

    def encode(self, texts: Sequence[str], batch: int) -> Vectors:
        """Embed texts, as many at once as `batch` says, texts of like length together.

        Returns:
            float32 [texts, dimensions], every row of length 1, so that a dot product is the cosine.

        Raises:
            ModelError: (`encode_rows`, too) a vector is 0, infinite or no number.
        """
        import torch
        from sentence_transformers.util import batch_to_device

        vectors = np.empty((len(texts), self.dimensions), dtype=np.float32)
        longest_first = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        for first in range(0, len(texts), batch):
            places = longest_first[first : first + batch]
            # The library's own `encode` looks through the whole model before every text: 3 ms of 11 for a short question.
            features = self._model.preprocess([self._needed(texts[place]) for place in places], prompt=self._prompt)
            with torch.inference_mode():
                found = self._model(batch_to_device(features, self._model.device))["sentence_embedding"]
            vectors[places] = found[:, : self.dimensions].float().cpu().numpy()
        # Of float32, whatever the encoder computes in: lengths that are rounded would be part of every cosine.
        return self._unit(vectors)

    def encode_rows(self, rows: Sequence[Sequence[str]], batch: int) -> Vectors:
        """Embed rows of which each has one text or several: a row's vector is the mean of its texts'.

        Args:
            rows: the texts of each row, as many of one as of another.

        Returns:
            float32 [rows, dimensions], every row of length 1.
        """
        vectors = self.encode(list(chain.from_iterable(rows)), batch)
        if len(vectors) == len(rows):
            return vectors
        means: Vectors = vectors.reshape(len(rows), -1, self.dimensions).mean(axis=1)
        return self._unit(means)

    def _unit(self, vectors: Vectors) -> Vectors:
        """Scale vectors to length 1, or refuse those that have no direction: each would spoil the index for others."""
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        without = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
        if len(without):
            # The text itself stays out of the message: it may be a client's, and messages are logged.
            raise ModelError(
                f"the encoder {self._name} gives no vector for {len(without)} of {len(vectors)} texts: that of the text of "
                f"index {without[0]} has length {lengths[without[0], 0]:g}",
                "Set models.encoder_dtype=float32, or another models.encoder",
            )
        scaled: Vectors = vectors / lengths
        return scaled

    def _needed(self, text: str) -> str:
        """The beginning of a text, as much as the encoder reads before it truncates."""
        if not self._longest or self._tokenizer.truncation_side != "right":
            return text
        return beginning(self._token_ids, text, self._longest)

    def _token_ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
        return ids
