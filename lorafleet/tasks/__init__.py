"""The tasks: what each one is, how a row of it becomes an example, and where its rows come from.

Reads from top to bottom: `values` (a column's value as a text), `task` (one task, and how a row is rendered), `catalogue`
(all of them), `files` (rows of a CSV or JSON file with their line numbers), `parquet` with `parquet_pages` and `bounds`
(those of a Parquet file, and how much of one is decoded), `corpus` (the rows of a split as examples, damaged rows counted),
`forms` (a row's text with and without what its task adds), `prompts` (which way of rendering this is).
"""

from lorafleet.tasks.catalogue import Catalogue, load_catalogue
from lorafleet.tasks.corpus import BadRow, Corpus, CorpusRows, TaskCorpus, joined, load_corpus
from lorafleet.tasks.forms import FORMS, formless, texts_in_forms, texts_to_embed
from lorafleet.tasks.prompts import prompt_version
from lorafleet.tasks.task import Example, Split, Task

__all__ = [
    "FORMS",
    "BadRow",
    "Catalogue",
    "Corpus",
    "CorpusRows",
    "Example",
    "Split",
    "Task",
    "TaskCorpus",
    "formless",
    "joined",
    "load_catalogue",
    "load_corpus",
    "prompt_version",
    "texts_in_forms",
    "texts_to_embed",
]
