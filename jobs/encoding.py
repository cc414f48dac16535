"""Parcels of rows to their vectors, by a pool of encoders: a pipeline of Ray Data that holds a few parcels at a time."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import ray
import ray.data
import transformers.utils.logging
from ray.data import ActorPoolStrategy, DataContext, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask
from ray.exceptions import RayError

from jobs.cluster import cause_in_one_line, cause_of, connect
from jobs.parcels import ROWS_PER_PARCEL, Reading, Row
from lorafleet.config import Index, Models
from lorafleet.errors import LoRAFleetError
from lorafleet.retrieval import Encoder, Entry

# Of rows that are read and not embedded, and of vectors that are not written yet.
STORE_BYTES = 128 * 2**20
STORE_BYTES_PER_ENCODER = 16 * 2**20
# A parcel and little more, so that encoders begin at once and end together.
BLOCK_BYTES = 32 * 2**10


@dataclass(frozen=True)
class Embedded:
    """Rows of a parcel with their vectors, float32 [entries, dimensions]."""

    entries: list[Entry]
    vectors: npt.NDArray[np.float32]


def embedded(reading: Reading, rows: int) -> Iterator[Embedded]:
    """Read parcels on this machine and embed them on the cluster; they come in any order.

    Rows that the next version has already are embedded with those of their parcel, for the last bits of these, and left out
    here: a row that is written twice can cost others their links in the graph, and they are never found again.

    Args:
        rows: how many there are, about; no more encoders are started than have something to do.

    Raises:
        TaskError: a corpus cannot be read any more.
        IndexUnavailable: Chroma was away for too long.
        ModelError: the encoder cannot be loaded.
        LoRAFleetError: an encoder failed.
    """
    models, index = reading.settings.models, reading.settings.index
    connect()
    encoders = _pool_size(index, ray.available_resources(), -(-rows // ROWS_PER_PARCEL))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    store = STORE_BYTES + encoders * STORE_BYTES_PER_ENCODER
    context.execution_options.resource_limits = context.execution_options.resource_limits.copy(object_store_memory=store)
    # Ray's own lines about a failure name its retry settings, and not the cause, which is raised.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    vectors = ray.data.read_datasource(_Parcels(reading), num_cpus=0, override_num_blocks=1).map_batches(
        _EncodeParcels,
        fn_constructor_args=(models.reserving(index.gpus_per_encoder), index.encode_batch),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=encoders, initial_size=encoders),
        num_cpus=1,
        num_gpus=index.gpus_per_encoder or None,
    )
    try:
        for block in vectors.iter_batches(batch_size=None, batch_format="pyarrow"):
            for parcel in block.to_pylist():
                yield _missing(parcel)
    except RayError as error:
        cause = cause_of(error)
        if isinstance(cause, LoRAFleetError):
            raise cause from None
        raise LoRAFleetError(
            f"an encoder failed: {cause_in_one_line(error)}", "Run again: it embeds what is missing"
        ) from error


class _Parcels(Datasource):
    """The parcels of a reading; a row of the data set is a parcel, so that nobody cuts it or joins it with others."""

    def __init__(self, reading: Reading) -> None:
        super().__init__()
        self._reading = reading

    @property
    def supports_distributed_reads(self) -> bool:
        """Ledger and files are on this machine: it is read here."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        """Nobody knows."""
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, **_: Any) -> list[ReadTask]:
        """One: reading is far quicker than embedding, and one reader keeps the parcels the same every time."""
        return [ReadTask(_blocks(self._reading), BlockMetadata(None, None, None, None))]


def _blocks(reading: Reading) -> Callable[[], Iterable[pyarrow.Table]]:
    return lambda: (_block(parcel) for parcel in reading.parcels())


def _block(parcel: list[Row]) -> pyarrow.Table:
    columns = {
        "identifiers": [[row.entry.identifier for row in parcel]],
        "tasks": [[row.entry.task for row in parcel]],
        "keys": [[row.entry.text for row in parcel]],
        "texts": [[row.texts for row in parcel]],
        "built": [[row.built for row in parcel]],
    }
    return pyarrow.table(columns)


def _missing(parcel: Mapping[str, Any]) -> Embedded:
    vectors = np.frombuffer(parcel["vectors"], dtype=np.float32).reshape(len(parcel["built"]), -1)
    entries = [Entry(*row) for row in zip(parcel["identifiers"], parcel["tasks"], parcel["keys"], strict=True)]
    places = [place for place, built in enumerate(parcel["built"]) if not built]
    return Embedded([entries[place] for place in places], vectors[places])


class _EncodeParcels:
    """An encoder in an actor of the pool."""

    def __init__(self, models: Models, batch: int) -> None:
        # A bar for every worker's weights would drown the job's own.
        transformers.utils.logging.disable_progress_bar()
        self._encoder = Encoder(models)
        self._batch = batch

    def __call__(self, block: pyarrow.Table) -> pyarrow.Table:
        vectors = [self._encoder.encode_rows(rows, self._batch).tobytes() for rows in block["texts"].to_pylist()]
        return block.append_column("vectors", pyarrow.array(vectors, pyarrow.binary()))


def _pool_size(index: Index, free: Mapping[str, float], parcels: int) -> int:
    """How many encoders there shall be.

    Without `index.encoders` one for every GPU share, or for every CPU, that nobody uses now. An encoder has one CPU, and Ray
    holds it to one thread: threads of one encoder wait for each other at every layer, encoders never do.
    """
    if index.encoders is not None:
        wanted = index.encoders
    elif index.gpus_per_encoder:
        wanted = int(free.get("GPU", 0) / index.gpus_per_encoder)
    else:
        wanted = int(free.get("CPU", 0))
    return max(1, min(wanted, parcels))
