"""What the index was made from.

It lies in Chroma, where it names the version that is searched, with a copy in the state folder.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorafleet.errors import IndexMismatch
from lorafleet.storage import read_json, write_json

FILE = "index.json"
REBUILD = "Embed again with: lorafleet embed --rebuild"


@dataclass(frozen=True)
class Manifest:
    """An index that is whole, and who can search it.

    Attributes:
        encoder: the setting that names the encoder.
        revision: its revision, where one is set.
        fingerprint: of the encoder's weights.
        prompts: the version of the prompts that the keys were rendered by.
        url: the server that holds the rows.
        collection: the index's name there.
        version: the number of the version that is searched.
        changes: how often rows came to that version or went from it since it is searched, with adapters.
        rows: how many rows each task has.
        corpora: each corpus's fingerprint. A task that has rows and no corpus came in with an adapter.
    """

    encoder: str
    revision: str | None
    fingerprint: str
    prompts: str
    url: str
    collection: str
    version: int
    changes: int = 0
    rows: Mapping[str, int] = field(default_factory=dict)
    corpora: Mapping[str, str] = field(default_factory=dict)

    @property
    def added(self) -> dict[str, int]:
        """The tasks whose rows came in with an adapter while the endpoint was running, and how many."""
        return {task: count for task, count in self.rows.items() if task not in self.corpora}

    def check(self, fingerprint: str, prompts: str) -> None:
        """Refuse an index that another encoder made, or other prompts.

        Raises:
            IndexMismatch: it is so.
        """
        for name, found, wanted in (("encoder", self.fingerprint, fingerprint), ("prompt version", self.prompts, prompts)):
            if found != wanted:
                raise IndexMismatch(f"the index {self.collection!r} at {self.url} has {name} {found}, not {wanted}", REBUILD)


def manifest_of(data: Mapping[str, Any]) -> Manifest | None:
    """The manifest of what `asdict` makes of one; None where it is of another version of LoRAFleet."""
    return Manifest(**data) if set(data) == {one.name for one in fields(Manifest)} else None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it in one step."""
    write_json(path, asdict(manifest))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file; None where there is none, or one of another version of LoRAFleet."""
    data = read_json(path)
    return None if data is None else manifest_of(data)
