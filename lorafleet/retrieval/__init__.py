"""Which rows of the corpora are nearest to a query.

Reads from top to bottom: `encoder` (texts to unit vectors), `tuning` (one that tells tasks apart), `neighbour` (what a
search finds), `rows` (what is indexed, and what identifies it), `records` (the same as Chroma holds it), `server` (the
Chroma server of this machine), `connection` (the way to it), `version` (one collection of rows), `manifest` (what an index
was made from), `lock` (one process at a time), `index` (the version that is searched), `building` (the next one), `backup`
(all of it as a file), `exact` (the same search in memory, without Chroma). Only this room knows Chroma, and loads it when
it is asked for.
"""

from typing import TYPE_CHECKING, Any

from lorafleet.config import Settings
from lorafleet.retrieval.encoder import Encoder, Vectors
from lorafleet.retrieval.exact import ExactIndex
from lorafleet.retrieval.lock import indexing, one_at_a_time
from lorafleet.retrieval.manifest import Manifest, read_manifest, write_manifest
from lorafleet.retrieval.neighbour import Neighbour
from lorafleet.retrieval.rows import Entry, copies_of, row_identifiers, task_of, text_digest

if TYPE_CHECKING:
    from lorafleet.retrieval.building import NextVersion, sweep
    from lorafleet.retrieval.index import CorpusIndex, open_for_writing
    from lorafleet.retrieval.version import Version

__all__ = [
    "CorpusIndex",
    "Encoder",
    "Entry",
    "ExactIndex",
    "Manifest",
    "Neighbour",
    "NextVersion",
    "Vectors",
    "Version",
    "copies_of",
    "indexing",
    "one_at_a_time",
    "open_for_writing",
    "open_index",
    "read_manifest",
    "row_identifiers",
    "sweep",
    "task_of",
    "text_digest",
    "write_manifest",
]


def open_index(settings: Settings, prompts: str) -> "CorpusIndex":
    """The index in Chroma, to be searched; see `lorafleet.retrieval.index.open_index`."""
    from lorafleet.retrieval import index

    return index.open_index(settings, prompts)


def __getattr__(name: str) -> Any:
    """Load what needs Chroma when it is asked for: measuring with `ExactIndex` needs none."""
    if name in ("CorpusIndex", "open_for_writing"):
        from lorafleet.retrieval import index

        return getattr(index, name)
    if name in ("NextVersion", "sweep"):
        from lorafleet.retrieval import building

        return getattr(building, name)
    if name == "Version":
        from lorafleet.retrieval import version

        return version.Version
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
