from collections.abc import Iterator

import httpx
import pytest
import ray
from ray import serve
from small_fleet import free_port

from jobs.embed_corpora import embed_corpora
from lorafleet.cli.service import RAY_ENVIRONMENT
from lorafleet.config import Settings, load_settings
from lorafleet.retrieval import server
from lorafleet.tasks import load_catalogue, load_corpus
from lorafleet.training import adapter_name, choose_backend, train_adapter
from serve.deploy import deploy

TASKS = ["copa", "sst2", "wnli"]


@pytest.fixture(scope="session")
def cluster() -> Iterator[int]:
    """A Ray cluster of this process, and the port on which Serve listens in it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            "local",
            num_cpus=4,
            include_dashboard=False,
            logging_level="error",
            # Ten times as often as usual: test_metrics.py waits for reports.
            _system_config={"metrics_report_interval_ms": 1000},
        )
        try:
            yield free_port()
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture(scope="session")
def fleet(cluster: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Settings]]:
    """The endpoint's URL, over a small real fleet: three tasks of the sample pack, adapters of rank 4 after two steps."""
    settings = load_settings(
        state=tmp_path_factory.mktemp("serve") / "state",
        models={"device": "cpu", "dtype": "float32"},
        index={"url": f"http://127.0.0.1:{free_port()}", "patience_seconds": 3},
        tasks={"names": TASKS},
        # Steps so large that two of them make adapters which answer differently.
        training={
            "rank": 4,
            "max_steps": 2,
            "batch": 2,
            "accumulation": 1,
            "max_tokens": 96,
            "warmup_steps": 0,
            "learning_rate": 0.003,
        },
        generation={"max_new_tokens": 64, "rows": 8},
        serving={"port": cluster, "request_timeout_seconds": 60},
    )
    try:
        embed_corpora(settings)
        train(settings)
        yield deploy(settings), settings
    finally:
        server.stop(settings)


def train(settings: Settings) -> None:
    """The adapters, in this process: the job that fans them out has tests of its own."""
    model, tokenizer = choose_backend(settings).load(settings)
    for task in load_catalogue(settings.tasks).trained:
        name = adapter_name(settings, task.name)
        corpus = load_corpus(task, "train", settings.tasks)
        train_adapter(model, tokenizer, corpus, settings, name, settings.adapters / name, lambda step, loss: None)


@pytest.fixture(scope="session")
def http(fleet: tuple[str, Settings]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet[0], timeout=120) as client:
        yield client
