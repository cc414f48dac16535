"""Records of Chroma: one vector, and the rows of all tasks that have it.

Equal vectors link to each other alone in an HNSW graph once they are more than a node's links, and what is written after
them cannot be reached. So a text is one record, whose identifier is the text's digest. Its metadata counts the rows of each
task: of one task (`task`, `copies`), or of several (`task` is empty, `tasks`, `rows`). Their texts, which only some answers
need, stand in its URI, which Chroma returns apart.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Record:
    """The rows of a record.

    Attributes:
        copies: the number of rows of each task.
        texts: each task's text as people see it; empty where the texts were not read.
    """

    copies: Mapping[str, int]
    texts: Mapping[str, str]

    @classmethod
    def read(cls, metadata: Mapping[str, Any], uri: str | None = None) -> "Record":
        """The record with these fields of Chroma's."""
        copies = {metadata["task"]: int(metadata["copies"])} if metadata["task"] else json.loads(metadata["rows"])
        by_text: dict[str, list[str]] = json.loads(uri) if uri else {}
        return cls(copies, {task: text for text, tasks in by_text.items() for task in tasks})

    @property
    def uri(self) -> str:
        """Each text with its tasks; most tasks of a record have the same text."""
        by_text: dict[str, list[str]] = {}
        for task, text in sorted(self.texts.items()):
            by_text.setdefault(text, []).append(task)
        return json.dumps(by_text)

    @property
    def metadata(self) -> dict[str, Any]:
        """The rows for Chroma, which removes what is None."""
        if len(self.copies) == 1:
            ((task, copies),) = self.copies.items()
            return {"task": task, "copies": copies, "tasks": None, "rows": None}
        rows = json.dumps(dict(sorted(self.copies.items())))
        return {"task": "", "copies": None, "tasks": sorted(self.copies), "rows": rows}

    def having(self, other: "Record") -> "Record":
        """With the rows of another one; of a task that both have, the other's."""
        return Record({**self.copies, **other.copies}, {**self.texts, **other.texts})

    def without(self, tasks: Iterable[str]) -> "Record":
        """Without the rows of these tasks."""
        gone = set(tasks)
        return Record(
            {task: count for task, count in self.copies.items() if task not in gone},
            {task: text for task, text in self.texts.items() if task not in gone},
        )


def having_rows(tasks: Sequence[str]) -> dict[str, Any]:
    """The filter of Chroma for records with a row of one of these tasks."""
    return {"$or": [{"task": {"$in": list(tasks)}}, *({"tasks": {"$contains": task}} for task in tasks)]}


def not_only_of(task: str) -> dict[str, Any]:
    """The filter of Chroma for records with a row of another task."""
    return {"task": {"$ne": task}}
