import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorafleet.config import Settings, load_settings
from lorafleet.retrieval import server


@pytest.fixture
def index_settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings with an empty state folder and a free port; `index` settings win over these."""
    return lambda **index: _settings(tmp_path, **index)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A Chroma server with an empty folder, for the tests of one module."""
    settings = _settings(tmp_path_factory.mktemp("state"))
    server.start(settings)
    yield settings
    server.stop(settings)


def _settings(state: Path, **index: object) -> Settings:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return load_settings(state=state, index={"url": f"http://127.0.0.1:{port}", "patience_seconds": 30, **index})
