"""The tasks: what each one is, how a row of it becomes an example, and where its rows come from.

Reads from top to bottom: `task` (one task, and how a row is rendered), `catalogue` (all of them), `files` (rows of a CSV,
JSONL or Parquet file with their line numbers), `corpus` (the rows of a split as examples, damaged rows counted).
"""

from lorafleet.tasks.catalogue import Catalogue, load_catalogue
from lorafleet.tasks.corpus import BadRow, Corpus, load_corpus
from lorafleet.tasks.task import Example, Split, Task

__all__ = ["BadRow", "Catalogue", "Corpus", "Example", "Split", "Task", "load_catalogue", "load_corpus"]
