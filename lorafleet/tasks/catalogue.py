"""All tasks: the built-in ones and those that the user declares."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from lorafleet.config import Tasks, parse_yaml
from lorafleet.errors import TaskError, closest, shown
from lorafleet.tasks.task import Task

BUILT_IN = Path(__file__).with_name("catalogue.yaml")


class Catalogue(Mapping[str, Task]):
    """The tasks by name, in the order of their declaration."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = {task.name: task for task in tasks}

    def __getitem__(self, name: str) -> Task:
        if name not in self._tasks:
            raise TaskError(f"no task named {name!r}", closest(name, self._tasks))
        return self._tasks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __len__(self) -> int:
        return len(self._tasks)

    def __contains__(self, name: object) -> bool:
        return name in self._tasks

    @property
    def trained(self) -> list[Task]:
        """The tasks that have an adapter."""
        return [task for task in self.values() if task.trained]


def load_catalogue(settings: Tasks) -> Catalogue:
    """The built-in tasks and those of `settings.declarations`, narrowed to `settings.names` where it is given.

    A user's task that has a built-in one's name replaces it.

    Raises:
        TaskError: a file cannot be read, a declaration is wrong, or a name is unknown.
    """
    tasks = {task.name: task for path in [BUILT_IN, *settings.declarations] for task in read_declarations(path)}
    everything = Catalogue(list(tasks.values()))
    if settings.names is None:
        return everything
    return Catalogue([everything[name] for name in settings.names])


def read_declarations(path: Path) -> list[Task]:
    """The tasks that a YAML file declares; its `files` are relative to it."""
    try:
        declared = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskError(f"cannot read the task file {path}: {error.strerror}") from None
    except ValueError as error:
        raise TaskError(f"{path} is not YAML: {error}") from None
    if not isinstance(declared, dict) or not all(isinstance(body, dict) for body in declared.values()):
        raise TaskError(f"{path} is not a mapping of task names to tasks")
    tasks = []
    for name, body in declared.items():
        try:
            task = Task.model_validate({"name": name, **body})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in (name, *first["loc"]))
            raise TaskError(f"{path}: {where} = {shown(first['input'])}: {first['msg']}") from None
        files = {split: path.parent / file for split, file in task.files.items()}
        tasks.append(task.model_copy(update={"files": files}))
    return tasks
