"""The command on kept predictions: tables, data and report, without a model."""

import json

import pytest
import yaml
from evaluation.rigged import rigged_settings
from typer.testing import CliRunner

from lorafleet.cli import app
from lorafleet.errors import SettingsError


def evaluate(*arguments: str):
    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_tables_from_kept_predictions(measured):
    done = evaluate("--from", str(measured), "--setting", "ood", "--methods", "base,cat")
    assert done.exit_code == 0
    (mean,) = [line.split() for line in done.stdout.splitlines() if line.startswith("mean")]
    assert mean == ["mean", "12", "8.3", "0.0"] and "Own adapter masked" in done.stdout
    every = evaluate("--from", str(measured), "--setting", "all", "--methods", "base,perfect").stdout
    (base,) = [line.split() for line in every.splitlines() if line.startswith("base ")]
    assert base[:10] == ["base", *["8.3", "0-25", "9.1", "%"] * 2, "66.7"] and base[-1] == "-"
    data = json.loads(evaluate("--from", str(measured), "--setting", "all", "--json").stdout)
    assert set(data["settings"]) == {"iid", "ood", "held_out"}
    assert data["settings"]["iid"]["methods"]["perfect"]["tasks"]["fruit"]["score"] == 75
    one = json.loads(evaluate("--from", str(measured), "--tasks", "fruit,ships", "--json").stdout)
    assert set(one["methods"]["base"]["tasks"]) == {"fruit", "ships"}


def test_the_report_is_written_beside_the_predictions(measured):
    (measured / "report.md").unlink(missing_ok=True)
    done = evaluate("--from", str(measured), "--report", "--methods", "base")
    assert done.exit_code == 0
    assert "| perfect |" in (measured / "report.md").read_text(), "the page shows everything that is kept"


def test_settings_are_compared_on_rows_that_are_kept_from_training(tmp_path):
    own = rigged_settings(tmp_path)
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(own.model_dump(mode="json")))
    asked = ["--config", str(file), "--methods", "perfect,auto,auto@weigher=top_k@k=1", "--setting", "all"]
    none = evaluate(*asked, "--split", "validation")
    assert "no task has validation rows. Set tasks.validation_share" in str(none.exception)
    done = evaluate(*asked, "--split", "validation", "--set", "tasks.validation_share=0.25")
    assert done.exit_code == 0, done.exception
    (one,) = [line.split() for line in done.stdout.splitlines() if line.startswith("auto@weigher=top_k@k=1 ")]
    assert one[1:5] == ["100.0", "100-100", "100.0", "%"] and one[5:7] == ["0.0", "0-0"]
    again = evaluate("--from", str(own.state / "evaluation" / "validation"), "--json")
    assert json.loads(again.stdout)["methods"]["perfect"]["tasks"]["ships"]["rows"] == 2


def test_bad_input_is_named(measured, settings):
    for arguments, message in (
        (("--from", str(measured), "--setting", "odd"), "--setting is 'odd'. Allowed: iid, ood, held_out, all"),
        (("--split", "odd"), "--split is 'odd'. Allowed: evaluation, validation, train"),
        (("--from", str(measured / "nowhere")), "no predictions in .*nowhere"),
        (("--share", "5/4", "--state", str(settings.state), "--methods", "base", "--tasks", "imdb"), "--share is '5/4'"),
    ):
        done = evaluate(*arguments)
        assert isinstance(done.exception, SettingsError)
        with pytest.raises(SettingsError, match=message):
            raise done.exception
