"""Where the tasks of an index lie: learned from its rows once for each state of it, and kept beside its manifest."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorafleet.weighing import Places, learn_places, read_places, write_places

if TYPE_CHECKING:
    from lorafleet.retrieval import CorpusIndex, Manifest, Vectors, Version

FILE = "places.npz"
ROWS_AT_ONCE = 10_000


def places_of(index: "CorpusIndex", state: Path, last: Places | None = None) -> Places:
    """The places of the tasks of an index as it is now: the last ones while it is the same, or those kept, or new ones.

    Learning reads all rows: of some thousands it takes seconds.

    Args:
        state: the folder in which they are kept.

    Raises:
        IndexUnavailable, IndexMismatch: the index cannot be read, has no rows, or another encoder made it.
    """
    # Only who asks for places needs Chroma here.
    from lorafleet.retrieval.connection import Gone

    while True:
        index.check_filled()
        manifest, version = index.manifest(), index.current()
        if manifest is None or version is None or manifest.version != version.number:
            continue
        name = _name(manifest, version)
        if last is not None and last.index == name:
            return last
        kept = read_places(state / FILE, name)
        if kept is not None:
            return kept
        # A version that is deleted meanwhile has a successor.
        with suppress(Gone):
            places = learn_places(_rows(version), name)
            # Who may not write there learns them again after a restart.
            with suppress(OSError):
                write_places(state / FILE, places)
            return places


def _name(manifest: "Manifest", version: "Version") -> str:
    """What tells this state of the index from any other."""
    described = json.dumps([version.identity, asdict(manifest)], sort_keys=True)
    return sha256(described.encode()).hexdigest()[:32]


def _rows(version: "Version") -> "Iterator[tuple[Sequence[str], Vectors]]":
    """All rows; a text counts as often as there are rows with it."""
    from lorafleet.retrieval import copies_of

    for identifiers in version.identifiers():
        for stored in version.read(identifiers):
            copies = [copies_of(entry.identifier) for entry in stored.entries]
            spread = np.repeat(np.arange(len(copies)), copies)
            for first in range(0, len(spread), ROWS_AT_ONCE):
                places = spread[first : first + ROWS_AT_ONCE]
                yield [stored.entries[place].task for place in places], stored.vectors[places]
