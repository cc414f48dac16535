"""What of a row is embedded when its neighbours are looked for: people write neither instructions nor field names."""

import re
from functools import lru_cache
from string import Formatter
from typing import Literal, get_args

from lorafleet.tasks import Example, Task

QueryForm = Literal["instruction", "fields", "bare"]
FIELD_NAME = re.compile(r"[^\n:]*: ?")
FORMS: tuple[QueryForm, ...] = get_args(QueryForm)


def query_text(task: Task, example: Example, form: QueryForm) -> str:
    """A row as a query.

    Args:
        form: "instruction" is the key as it stands in the index; "fields" the same without the instruction; "bare" without
            the names of the fields too.
    """
    if form == "instruction":
        return example.key
    text = row_text(task, example)
    if form == "fields":
        return text
    pattern, between = _template(task.text)
    found = pattern.fullmatch(text)
    if found is None:
        return text
    return "".join(part for pair in zip(between, (*found.groups(), ""), strict=True) for part in pair).strip()


def row_text(task: Task, example: Example) -> str:
    """A row's key without the instruction in front of it."""
    return example.key.removeprefix(task.instruction).strip()


@lru_cache(maxsize=1024)
def _template(text: str) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """What a task's rendered text looks like, the value of each column a group, and what stands between: names left out."""
    parts = [(literal, field is not None) for literal, field, _, _ in Formatter().parse(text)]
    if parts[-1][1]:
        parts.append(("", False))
    pattern = "".join(re.escape(literal) + ("(.*?)" if is_field else "") for literal, is_field in parts)
    return re.compile(pattern, re.DOTALL), tuple(FIELD_NAME.sub("", literal) for literal, _ in parts)
