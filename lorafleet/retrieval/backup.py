"""The index as one Parquet file: a backup, or the way to another Chroma server.

A row of the file is a text of a task: identifier (which counts the rows with that text), task, text, and its vector bit for
bit. The manifest stands in the file's metadata.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from lorafleet.errors import IndexMismatch
from lorafleet.retrieval.building import NextVersion
from lorafleet.retrieval.index import SCHEMA, CorpusIndex
from lorafleet.retrieval.manifest import Manifest, manifest_of
from lorafleet.retrieval.rows import Entry, copies_of
from lorafleet.retrieval.version import StoredRows
from lorafleet.storage import file_in_one_step

METADATA = b"lorafleet-index"
ROWS_AT_ONCE = 1000
Note = Callable[[int], None]


def export_index(index: CorpusIndex, path: Path, note: Note | None = None) -> Manifest:
    """Write the version that is searched into a file in one step; whoever changes the index waits meanwhile.

    Args:
        note: is called with how many rows have been written since the last time.

    Raises:
        IndexMismatch: there is no index, or another encoder or other prompts made it.
        OSError: the file cannot be written.
    """
    with file_in_one_step(path) as file, index.changing():
        index.check_filled()
        manifest, version = index.manifest(), index.current()
        assert manifest is not None and version is not None
        writer = None
        for identifiers in version.identifiers():
            for rows in version.read(identifiers):
                table = _table(rows, manifest)
                writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema, compression="zstd")
                writer.write_table(table)
                if note is not None:
                    note(sum(copies_of(entry.identifier) for entry in rows.entries))
        assert writer is not None
        writer.close()
    return manifest


def import_index(index: CorpusIndex, path: Path, note: Note | None = None) -> Manifest:
    """Let the rows of a file be the index, in the place of what is searched now, in one step at the end.

    Run again after it was stopped, it goes on where it was.

    Args:
        note: is called with how many rows are there since the last time.

    Raises:
        IndexMismatch: the file is no index, or another encoder or other prompts made it.
    """
    wanted = described(path)
    wanted.check(index.encoder, index.prompts)
    with index.changing():
        searched = index.manifest()
        following = NextVersion(index, searched.version if searched else 0, rebuild=True)
        there = {one for page in following.version.identifiers() for one in page}
        strangers = set(there)
        for rows in _rows(path):
            strangers -= {entry.identifier for entry in rows.entries}
            missing = [place for place, entry in enumerate(rows.entries) if entry.identifier not in there]
            following.write([rows.entries[place] for place in missing], rows.vectors[missing])
            if note is not None:
                note(sum(copies_of(entry.identifier) for entry in rows.entries))
        following.version.delete(strangers)
        plan = index.plan(following.version.number)
        manifest = replace(plan, rows=wanted.rows, corpora=wanted.corpora)
        following.switch(manifest)
    following.delete_others()
    return manifest


def described(path: Path) -> Manifest:
    """The manifest of the index in a file.

    Raises:
        IndexMismatch: it is no file that `export_index` wrote, or was written by another version of LoRAFleet.
    """
    mend = "Give a file that `lorafleet index export` has written"
    try:
        kept = (pyarrow.parquet.read_schema(path).metadata or {}).get(METADATA)
    except FileNotFoundError:
        raise IndexMismatch(f"there is no file {path}", mend) from None
    except (OSError, pyarrow.ArrowException) as error:
        raise IndexMismatch(f"{path} cannot be read: {' '.join(str(error).split())}", mend) from None
    data = json.loads(kept) if kept else {}
    manifest = manifest_of(data.get("manifest", {})) if data.get("schema") == SCHEMA else None
    if manifest is None:
        raise IndexMismatch(f"{path} holds no index of this version of LoRAFleet", mend)
    return manifest


def _table(rows: StoredRows, manifest: Manifest) -> pyarrow.Table:
    dimensions = rows.vectors.shape[1]
    columns = {
        "identifier": pyarrow.array([entry.identifier for entry in rows.entries], pyarrow.string()),
        "task": pyarrow.array([entry.task for entry in rows.entries], pyarrow.string()),
        "text": pyarrow.array([entry.text for entry in rows.entries], pyarrow.string()),
        "vector": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.vectors.reshape(-1)), dimensions),
    }
    kept = json.dumps({"schema": SCHEMA, "manifest": asdict(manifest)})
    return pyarrow.table(columns).replace_schema_metadata({METADATA: kept})


def _rows(path: Path) -> Iterator[StoredRows]:
    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            columns = (batch.column(name).to_pylist() for name in ("identifier", "task", "text"))
            entries = [Entry(*row) for row in zip(*columns, strict=True)]
            vectors = batch.column("vector").flatten().to_numpy().reshape(len(entries), -1)
            yield StoredRows(entries, np.asarray(vectors, dtype=np.float32))
