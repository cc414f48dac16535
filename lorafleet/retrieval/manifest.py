"""What the index was made from: a file in the state folder, written when the index is whole."""

from dataclasses import asdict, dataclass
from pathlib import Path

from lorafleet.storage import read_json, write_json


@dataclass(frozen=True)
class Manifest:
    """The last run that made the index whole.

    Attributes:
        encoder: the setting that names the encoder.
        fingerprint: of the encoder's weights.
        url: the server that holds the rows.
        collection: the collection there.
        rows: how many each task has.
        corpora: each task's corpus fingerprint.
    """

    encoder: str
    fingerprint: str
    url: str
    collection: str
    rows: dict[str, int]
    corpora: dict[str, str]


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it in one step."""
    write_json(path, asdict(manifest))


def read_manifest(path: Path) -> Manifest | None:
    """The manifest; None where there is none."""
    data = read_json(path)
    return None if data is None else Manifest(**data)
