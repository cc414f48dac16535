"""Texts to unit vectors, by a sentence encoder."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lorafleet.config import Models
from lorafleet.models import fingerprint, load_encoder

Vectors = npt.NDArray[np.float32]


class Encoder:
    """A sentence encoder in memory.

    Attributes:
        fingerprint: what identifies its weights; an index is only good for the encoder that made it.
        dimensions: the length of its vectors.

    """

    def __init__(self, settings: Models) -> None:
        """Load it.

        Raises:
            ModelError: the encoder is not there, or cannot be loaded.
        """
        from lorafleet.packing import pack_linears

        self.fingerprint = fingerprint(settings.encoder, settings.encoder_revision)
        self._model = load_encoder(settings)
        # A short question takes less than half the time so, and batches of rows two thirds.
        pack_linears(self._model)
        self.dimensions = int(self._model.get_embedding_dimension() or 0)

    def encode(self, texts: Sequence[str], batch: int) -> Vectors:
        """Embed texts, as many at once as `batch` says, texts of like length together.

        Returns:
            float32 [texts, dimensions], every row of length 1, so that a dot product is the cosine.
        """
        if not texts:
            return np.empty((0, self.dimensions), dtype=np.float32)
        vectors = self._model.encode(list(texts), batch_size=batch, normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)
