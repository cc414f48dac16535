"""The next version of the index: filled beside the one that is searched, then searched in its place."""

import time
from collections.abc import Iterator, Sequence

from lorafleet.retrieval.encoder import Vectors
from lorafleet.retrieval.index import SCHEMA, CorpusIndex
from lorafleet.retrieval.manifest import Manifest
from lorafleet.retrieval.rows import Entry
from lorafleet.retrieval.version import Version

# Every search asks which version it is to take, so only one that has begun can still be in the old one.
SEARCH_SECONDS = 1.0


class NextVersion:
    """A version that nobody searches yet. What was written into it outlives the process: the next run takes it up.

    Args:
        index: the index that it will be the next version of.
        rebuild: whether no vector of another version comes into it; one that is taken up must have been begun so, too.

    Attributes:
        version: the rows in it.
        taken_up: whether a run before has begun it.
    """

    def __init__(self, index: CorpusIndex, searched: int, rebuild: bool) -> None:
        """Take up what a run before has left unfinished, or begin anew; what does not fit is deleted."""
        self._index, self._searched = index, searched
        self.taken_up = False
        found: Version | None = None
        numbers = index.numbers()
        for number in reversed(numbers):
            version = index.version(number) if number > searched else None
            if found is None and version is not None and self._fits(version, rebuild):
                found = version
            elif number != searched:
                index.delete_version(number)
        self.taken_up = found is not None
        self.version = found or index.create(max([searched, *numbers]) + 1, rebuild)

    def copy(self, identifiers: Sequence[str], source: Version) -> Iterator[int]:
        """Copy rows from another version, bit for bit; yields how many have come since the last time."""
        for rows in source.read(identifiers):
            self.version.write(rows.entries, rows.vectors)
            yield len(rows.entries)

    def write(self, entries: Sequence[Entry], embeddings: Vectors) -> None:
        """As `Version.write`."""
        self.version.write(entries, embeddings)

    def switch(self, manifest: Manifest) -> None:
        """Let it be searched; `CorpusIndex.changing` must be held.

        Args:
            manifest: what it was made from.
        """
        self.version.wake()
        self._index.publish(manifest)

    def delete_others(self) -> None:
        """Delete the version that was searched until now, after those who have just asked it have their answers."""
        time.sleep(SEARCH_SECONDS)
        sweep(self._index, self.version.number)

    def _fits(self, version: Version, rebuild: bool) -> bool:
        described = version.described
        wanted = {"schema": SCHEMA, "encoder": self._index.encoder, "prompts": self._index.prompts}
        same = all(described.get(name) == value for name, value in wanted.items())
        return same and version.graph_fits and (bool(described.get("rebuild")) or not rebuild)


def sweep(index: CorpusIndex, searched: int) -> None:
    """Delete every version but the one that is searched."""
    for number in index.numbers():
        if number != searched:
            index.delete_version(number)
