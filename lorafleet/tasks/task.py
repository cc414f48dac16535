"""One task, and how a row of it becomes an example."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorafleet.config import TASK_NAME
from lorafleet.errors import shown
from lorafleet.tasks.values import BadRowError, as_text, is_list, is_missing, named, scalar

Declared = Literal["train", "evaluation"]
Split = Literal["train", "validation", "evaluation"]
"""Validation rows are those of the declared training split that are kept from training."""
Scoring = Literal["sum", "token", "byte"]


@dataclass(frozen=True)
class Example:
    """A row, rendered once: what is embedded, what the model is given, and what it should answer.

    Attributes:
        task: the task's name.
        key: instruction and text, without cue and answer; this is what the index embeds.
        prompt: the key and the cue; the answer follows after one space.
        answers: the accepted answers, the one that is trained on first.
        options: what there is to choose from; empty for a free-text question.
    """

    task: str
    key: str
    prompt: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The answer that is trained on."""
        return self.answers[0]


class _Declaration(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class OptionColumns(_Declaration):
    """One option a column."""

    columns: list[str] = Field(min_length=2)


class OptionList(_Declaration):
    """All options in one column that holds a list; `column.key` reaches into a mapping."""

    list: str


class Task(_Declaration):
    """A task as the catalogue declares it (catalogue.yaml explains the keys)."""

    name: str = Field(pattern=TASK_NAME)
    family: str = Field(min_length=1)
    hub: str | None = None
    config: str | None = None
    splits: dict[Declared, str] = {}
    files: dict[Declared, Path] = {}
    instruction: str = Field(min_length=1)
    text: str = Field(min_length=1)
    words: dict[str, dict[str, str]] = {}
    cue: str = "Answer:"
    options: list[str] | OptionColumns | OptionList | None = None
    label: str | None = None
    labels: list[str | int] | None = None
    answers: str | None = None
    scoring: Scoring = "sum"

    @field_validator("text")
    @classmethod
    def _is_template(cls, text: str) -> str:
        """Refused here, and not at the first row that is rendered."""
        try:
            columns = list(_columns(text))
        except ValueError as error:
            raise ValueError(f"{error}; a brace that is meant as text is written twice") from None
        if any(not column or column.isdigit() for column in columns):
            raise ValueError("a field names no column; a brace that is meant as text is written twice")
        return text

    @model_validator(mode="after")
    def _consistent(self) -> "Task":
        if (self.hub is None) == (not self.files):
            raise ValueError("give either hub (with splits) or files")
        if not (self.splits if self.hub else self.files):
            raise ValueError("name at least one split in splits")
        if self.answers is None and (self.options is None or self.label is None):
            raise ValueError("give options and label, or answers")
        if self.answers is not None and (self.options is not None or self.label is not None):
            raise ValueError("a task has answers or options, not both")
        if isinstance(self.options, list) and len(self.options) < 2:
            raise ValueError("options needs at least two words")
        if self.labels is not None and isinstance(self.options, list) and len(self.labels) != len(self.options):
            raise ValueError(f"labels has {len(self.labels)} values for {len(self.options)} options")
        return self

    @property
    def trained(self) -> bool:
        """Whether an adapter is trained on this task."""
        return "train" in (self.splits if self.hub else self.files)

    @property
    def columns(self) -> frozenset[str]:
        """The columns of a row that are read; others may hold anything."""
        paths = [*self.words, self.label, self.answers]
        if isinstance(self.options, OptionColumns):
            paths += self.options.columns
        elif isinstance(self.options, OptionList):
            paths.append(self.options.list)
        return frozenset([*_columns(self.text), *(path.split(".")[0] for path in paths if path is not None)])

    def render(self, row: Mapping[str, Any]) -> Example:
        """The example of a row.

        Raises:
            BadRowError: a column is missing or does not fit, a text is empty, or the label is out of range.
        """
        fields = dict(row)
        for column, words in self.words.items():
            fields[column] = words[named(_reach(row, column), column, words)]
        try:
            text = _Template().vformat(self.text, (), fields).strip()
        except BadRowError:
            raise
        except (AttributeError, ValueError) as error:
            raise BadRowError(f"text cannot be filled in: {error}") from None
        key = f"{self.instruction}\n{text}"
        prompt = f"{key}\n{self.cue}" if self.cue else key
        if self.answers is not None:
            example = Example(self.name, key, prompt, self._accepted(row))
        else:
            options = self._options(row)
            example = Example(self.name, key, prompt, (options[self._right(row, options)],), options)
        try:
            "".join((prompt, *example.answers, *example.options)).encode()
        except UnicodeEncodeError:
            raise BadRowError("a text holds half of a surrogate pair, which is no character") from None
        return example

    def _accepted(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        assert self.answers is not None
        found = _reach(row, self.answers)
        if isinstance(found, Mapping):
            raise BadRowError(f"{self.answers} is {shown(found)}, neither an answer nor a list of them")
        accepted = tuple(dict.fromkeys(_texts(found if is_list(found) else [found], self.answers)))
        if not any(accepted):
            raise BadRowError(f"{self.answers} holds no answer")
        return tuple(answer for answer in accepted if answer)

    def _options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if isinstance(self.options, list):
            return tuple(self.options)
        if isinstance(self.options, OptionColumns):
            options = tuple(text for name in self.options.columns for text in _texts([_reach(row, name)], name))
        else:
            assert self.options is not None
            values = _reach(row, self.options.list)
            if not is_list(values):
                raise BadRowError(f"{self.options.list} is {shown(values)}, not a list")
            options = tuple(_texts(values, self.options.list))
        if len(options) < 2 or not all(options):
            raise BadRowError("an option is empty")
        return options

    def _right(self, row: Mapping[str, Any], options: Sequence[str]) -> int:
        assert self.label is not None
        labels = [str(label) for label in self.labels or range(len(options))][: len(options)]
        return labels.index(named(_reach(row, self.label), self.label, labels))


class _Template(Formatter):
    """Fills in a row's columns: a missing or empty one is a fault, not an empty string."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        try:
            value, column = super().get_field(field_name, args, kwargs)
        except (KeyError, IndexError, TypeError):
            raise BadRowError(f"column {field_name} is missing") from None
        return scalar(value, field_name), column


def _columns(template: str) -> Iterator[str]:
    """The columns that a template's fields begin with."""
    for _, field, spec, _ in Formatter().parse(template):
        if field is not None:
            yield re.split(r"[.\[]", field, maxsplit=1)[0]
            yield from _columns(spec or "")


def _texts(values: Iterable[Any], column: str) -> Iterator[str]:
    """Values as texts; an empty text for one that is missing or empty."""
    for value in values:
        empty = is_missing(value) or (isinstance(value, str | bytes) and not value.strip())
        yield "" if empty else as_text(value, column)


def _reach(row: Mapping[str, Any], column: str) -> Any:
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or is_missing(value.get(key)):
            raise BadRowError(f"column {column} is missing")
        value = value[key]
    return value
