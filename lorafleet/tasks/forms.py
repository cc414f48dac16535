"""The forms of a row's text, from all that its task says to what people write: no instruction, and no names of fields."""

import re
import zlib
from collections.abc import Iterable
from functools import lru_cache
from string import Formatter
from typing import get_args

from lorafleet.config import Index, TextForm
from lorafleet.tasks.task import Example, Task

FORMS: tuple[TextForm, ...] = get_args(TextForm)
FIELD_NAME = re.compile(r"[^\n:]*: ?")


def text_in_form(task: Task, example: Example, form: TextForm) -> str:
    """A row's text in a form.

    Args:
        form: "instruction" is the key, "fields" the same without the instruction, "bare" without the fields' names too.
    """
    if form == "instruction":
        return example.key
    text = row_text(task, example)
    if form == "fields":
        return text
    # Stripped, as the rendered text is: a YAML block scalar ends in a newline.
    pattern, between = _template(task.text.strip())
    found = pattern.fullmatch(text)
    if found is None:
        return text
    return "".join(part for pair in zip(between, (*found.groups(), ""), strict=True) for part in pair).strip()


def texts_in_forms(task: Task, example: Example, forms: Iterable[TextForm]) -> tuple[str, ...]:
    """A row's text in each of some forms."""
    return tuple(text_in_form(task, example, form) for form in forms)


def texts_to_embed(task: Task, example: Example, index: Index) -> tuple[str, ...]:
    """The texts whose mean vector a row is found by: it in all forms of the index, or in one, which its key draws."""
    forms = index.forms
    if index.pooling == "drawn":
        forms = (forms[zlib.crc32(example.key.encode()) % len(forms)],)
    return texts_in_forms(task, example, forms)


def formless(text: str, index: Index) -> tuple[str, ...]:
    """The same for a text that is all there is of a row: as many texts as the other rows have."""
    return (text,) * (len(index.forms) if index.pooling == "mean" else 1)


def row_text(task: Task, example: Example) -> str:
    """A row's key without the instruction in front of it."""
    return example.key.removeprefix(task.instruction).strip()


@lru_cache(maxsize=1024)
def _template(text: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """What a task's rendered text looks like, the value of each column a group, and what stands between: names left out."""
    between = [""]
    for literal, field, _, _ in Formatter().parse(text):
        # A doubled brace ends a literal without a field behind it.
        between[-1] += literal
        if field is not None:
            between.append("")
    pattern = "(.*?)".join(re.escape(literal) for literal in between)
    return re.compile(pattern, re.DOTALL), tuple(FIELD_NAME.sub("", literal) for literal in between)
