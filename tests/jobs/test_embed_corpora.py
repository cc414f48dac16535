import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from jobs.embed_corpora import embed_corpora, print_report
from lorafleet.config import Settings, load_settings
from lorafleet.errors import IndexMismatch
from lorafleet.retrieval import Encoder, open_index, read_manifest, server

DECLARATION = """
colours:
  family: test
  files: {train: colours.jsonl}
  instruction: Name the colour.
  text: "Thing: {thing}"
  options: [red, green]
  label: label
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Callable[..., Settings]]:
    """Settings with a state folder and a port of their own; the server that a job starts there is ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    state = tmp_path / "state"
    yield lambda **tasks: load_settings(state=state, index={"url": url, "write_batch": 40}, tasks=tasks)
    server.stop(load_settings(state=state))
    ray.shutdown()


def write_rows(path: Path, things: list[str], broken: bool = False) -> None:
    rows = [json.dumps({"thing": thing, "label": number % 2}) for number, thing in enumerate(things)]
    path.write_text("\n".join(rows + ['{"thing": "a lamp", "label": 7}'] * broken) + "\n")


@pytest.mark.integration
def test_run_twice_the_second_embeds_nothing_and_needs_no_ray(settings):
    chosen = settings(names=["wnli", "piqa", "copa"])
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")

    first = embed_corpora(chosen)
    ray.shutdown()
    second = embed_corpora(chosen)

    assert first.server_started
    assert first.written == first.rows == second.skipped
    assert min(first.rows.values()) >= 30
    assert set(second.written.values()) == set(second.deleted.values()) == {0}
    assert not ray.is_initialized()
    assert not second.server_started
    manifest = read_manifest(chosen.state / "index.json")
    assert manifest is not None
    assert manifest.rows == dict(sorted(first.rows.items()))

    index = open_index(chosen)
    (nearest,) = index.query(Encoder(chosen.models).encode(["How do I keep bread fresh?"], 1), 1000)
    assert len(nearest) == sum(first.rows.values())
    itself = index.query(Encoder(chosen.models).encode([nearest[7].text], 1), 1)[0][0]
    assert itself.text == nearest[7].text
    assert itself.similarity == pytest.approx(1, abs=1e-4)

    other_encoder = chosen.model_copy(update={"models": chosen.models.model_copy(update={"encoder": "someone/else"})})
    with pytest.raises(IndexMismatch, match="--rebuild"):
        embed_corpora(other_encoder)


@pytest.mark.integration
def test_changed_rows_are_written_and_gone_rows_deleted(settings, tmp_path, capsys):
    declarations = tmp_path / "tasks.yaml"
    declarations.write_text(DECLARATION)
    corpus = tmp_path / "colours.jsonl"
    things = [f"thing number {number}" for number in range(10)]
    chosen = settings(names=["colours", "wnli"], declarations=[declarations])
    ray.init("local", num_cpus=1, include_dashboard=False, logging_level="error")

    write_rows(corpus, [*things, things[0]], broken=True)
    first = embed_corpora(chosen)
    write_rows(corpus, ["another thing", *things[1:7]])
    second = embed_corpora(chosen)
    rebuilt = embed_corpora(settings(names=["colours"], declarations=[declarations]), rebuild=True)

    assert first.rows["colours"] == 11
    print_report(first, chosen)
    assert "colours.jsonl:12: label is '7', not one of 0, 1" in capsys.readouterr().err
    assert (second.written["colours"], second.skipped["colours"], second.deleted["colours"]) == (1, 6, 5)
    assert (second.written["wnli"], second.deleted["wnli"]) == (0, 0)
    assert rebuilt.written == rebuilt.rows == {"colours": 7}
    counts = open_index(chosen).counts()
    assert counts == {"colours": 7, "wnli": first.rows["wnli"]}
    assert read_manifest(chosen.state / "index.json").rows == counts
