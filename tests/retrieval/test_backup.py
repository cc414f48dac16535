"""The index as a file: what comes back is what went out, and what does not fit is refused before anything changes."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from lorafleet.cli import app
from lorafleet.errors import IndexMismatch, IndexUnavailable
from lorafleet.retrieval import Entry, indexing, open_for_writing, open_index, row_identifiers, server
from lorafleet.retrieval.backup import export_index, import_index
from lorafleet.tasks import prompt_version

TASKS = {"alpha": 1200, "beta": 30}


@pytest.fixture
def index(served, monkeypatch):
    monkeypatch.setattr("lorafleet.retrieval.building.SEARCH_SECONDS", 0)
    made = open_for_writing(served, prompt_version())
    made.drop()
    for task, count in TASKS.items():
        made.write(*rows(task, count))
    yield made
    made.drop()


def rows(task, count):
    texts = [f"{task} row {number}, “quoted”" for number in range(count)]
    draws = np.random.default_rng(len(task)).normal(size=(count, 384)).astype(np.float32)
    entries = [Entry(name, task, text) for name, text in zip(row_identifiers(task, texts), texts, strict=True)]
    return entries, draws / np.linalg.norm(draws, axis=1, keepdims=True)


def contents(index):
    version = index.current()
    found = version.read([one for page in version.identifiers() for one in page])
    return {
        entry.identifier: (entry.task, entry.text, vector.tobytes())
        for part in found
        for entry, vector in zip(part.entries, part.vectors, strict=True)
    }


def test_what_comes_back_is_what_went_out(index, served, tmp_path):
    before, file = contents(index), tmp_path / "index.parquet"
    seen = []
    export_index(index, file, seen.append)
    assert sum(seen) == 1230
    assert not list(tmp_path.glob(".*")), "nothing is left beside the file"

    index.delete_task("beta")
    index.write(*rows("gamma", 40))
    manifest = import_index(index, file)
    assert contents(index) == before
    assert manifest.rows == TASKS
    assert index.numbers() == [manifest.version]
    found = open_index(served, prompt_version()).query(rows("beta", 30)[1][:1], 1)
    assert found[0][0].task == "beta"


def test_an_import_that_was_stopped_goes_on(index, tmp_path):
    before, file = contents(index), tmp_path / "index.parquet"
    export_index(index, file)

    class Stopped(Exception):
        pass

    def stop(count):
        raise Stopped

    with pytest.raises(Stopped):
        import_index(index, file, stop)
    assert contents(index) == before, "what is searched has not changed"
    assert len(index.numbers()) == 2
    import_index(index, file)
    assert contents(index) == before
    assert len(index.numbers()) == 1


def test_a_file_that_does_not_fit_changes_nothing(index, served, tmp_path):
    before, file = contents(index), tmp_path / "index.parquet"
    export_index(index, file)
    with pytest.raises(IndexMismatch, match="prompt version"):
        import_index(open_for_writing(served, "other"), file)
    (tmp_path / "text.parquet").write_text("not a table")
    with pytest.raises(IndexMismatch, match=r"text\.parquet cannot be read"):
        import_index(index, tmp_path / "text.parquet")
    with pytest.raises(IndexMismatch, match="no file"):
        import_index(index, tmp_path / "nowhere.parquet")
    assert contents(index) == before


def test_from_one_server_to_another_by_the_command_line(index, served, tmp_path, index_settings):
    before, other = contents(index), index_settings()
    file = tmp_path / "index.parquet"

    def call(settings, *words):
        options = ["--state", str(settings.state), "--set", f"index.url={settings.index.url}"]
        return CliRunner().invoke(app, ["index", *words, str(file), *options], catch_exceptions=False)

    try:
        assert "1230 rows of 2 tasks" in call(served, "export").output
        with indexing(other.state), pytest.raises(IndexUnavailable, match="another run"):
            call(other, "import")
        assert "1230 rows of 2 tasks are searched now" in call(other, "import").output
        assert contents(open_index(other, prompt_version())) == before
        assert json.loads((other.state / "index.json").read_text())["url"] == other.index.url
    finally:
        server.stop(other)
