"""Which way of rendering keys this is: an index that was made by another one is searched for texts that it does not hold."""

import hashlib
from functools import cache

from lorafleet.tasks.task import Task

PROBE = Task(
    name="probe",
    family="probe",
    splits={"train": "train"},
    hub="nowhere/probe",
    instruction="What is it?",
    text="{kind}: {thing}\nPlace: {place[name]}\n",
    words={"kind": {"1": "Animal"}},
    answers="thing",
)
ROW = {"kind": 1, "thing": "  an old\tfox ", "place": {"name": "wood"}}


@cache
def prompt_version() -> str:
    """A digest of the key of a probe row: it changes by itself when `Task.render` makes other keys of the same columns.

    What a single task says (its instruction, its text) is no part of it: that is in the keys, and so in their identifiers.
    """
    return hashlib.sha256(PROBE.render(ROW).key.encode()).hexdigest()[:12]
