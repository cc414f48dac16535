"""Settings: four sources in order, and one clear line for every fault."""

from pathlib import Path
from typing import get_args

import pytest

from lorafleet.composition import METHODS
from lorafleet.config import MethodName, Models, load_settings
from lorafleet.errors import SettingsError

CONFIGS = Path(__file__).parents[1] / "configs"


def test_later_sources_win(tmp_path, monkeypatch):
    file = tmp_path / "settings.yaml"
    file.write_text("training: {rank: 8, alpha: 4, epochs: 5}\n")
    assert load_settings(file).training.rank == 8
    monkeypatch.setenv("LORAFLEET_TRAINING__RANK", "16")
    assert load_settings(file).training.rank == 16
    settings = load_settings(file, ["training.rank=32", "tasks.names=[piqa, copa]"])
    assert (settings.training.rank, settings.training.alpha, settings.training.epochs) == (32, 4, 5)
    assert settings.tasks.names == ["piqa", "copa"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainig.rank=8", "unknown setting trainig = {'rank': 8}. Did you mean training?"),
        ("training.rnk=8", "unknown setting training.rnk = 8. Did you mean training.rank?"),
        ("training.rank=many", "bad value for training.rank: 'many'. Allowed: a valid integer"),
        ("training.rank=0", "bad value for training.rank: 0. Allowed: greater than or equal to 1"),
        ("composing.method=lienar", "bad value for composing.method: 'lienar'. Allowed: 'linear', 'cat'"),
        ("weighing.weigher=nucleas", "bad value for weighing.weigher: 'nucleas'. Allowed: 'nucleus', 'top_k', 'softmax'"),
        ("index.write_batch=6000", "bad value for index.write_batch: 6000. Allowed: less than or equal to 5461"),
        ("training.rank", "cannot read the override 'training.rank'. Write it as section.key=value"),
        ("tasks.names=[a", "cannot read the override 'tasks.names=[a': its value is not YAML. Quote what is meant as text"),
        ("models.base=@x", "cannot read the override 'models.base=@x': its value is not YAML. Quote what is meant as text"),
        ("index.token=2024-99-99", "cannot read the override 'index.token=2024-99-99': its value is not YAML"),
    ],
)
def test_a_fault_is_told_with_path_value_and_mend(override, said):
    with pytest.raises(SettingsError) as caught:
        load_settings(overrides=[override])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_faults_of_files(tmp_path):
    with pytest.raises(SettingsError, match="no settings file"):
        load_settings(tmp_path / "nowhere.yaml")
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(SettingsError, match=r"list\.yaml"):
        load_settings(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("training: {rank: [\n")
    with pytest.raises(SettingsError, match="not a YAML mapping"):
        load_settings(tmp_path / "broken.yaml")


@pytest.mark.parametrize("value", ["[" * 3000, "!!int ''", "!!bool ''", "!!timestamp then", "2024-99-99"])
def test_values_that_yaml_cannot_convert_are_settings_errors_everywhere(value, tmp_path):
    """PyYAML raises RecursionError, IndexError, KeyError, AttributeError and ValueError for these."""
    file = tmp_path / "settings.yaml"
    file.write_text(f"training: {{rank: {value}}}\n")
    with pytest.raises(SettingsError, match=r"settings\.yaml is not a YAML mapping of settings: \S"):
        load_settings(file)
    with pytest.raises(SettingsError, match=r"cannot read the override 'training\.rank=.*: its value is not YAML"):
        load_settings(overrides=[f"training.rank={value}"])


def test_sections_of_a_file_have_names(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("1: {rank: 8}\n")
    with pytest.raises(SettingsError, match=r"settings\.yaml is not a YAML mapping of settings\. Write section names"):
        load_settings(file)
    file.write_text("# nothing set\n")
    assert load_settings(file).training.rank == load_settings().training.rank


def test_an_environment_variable_that_is_not_json_is_named(monkeypatch):
    monkeypatch.setenv("LORAFLEET_TRAINING", "{rank")
    with pytest.raises(SettingsError, match=r'the settings cannot be read: .*"training"'):
        load_settings()


def test_the_methods_of_the_settings_are_those_there_are():
    assert set(get_args(MethodName)) == set(METHODS)


def test_the_shipped_settings_load_and_fleet_holds_the_papers_recipe():
    assert load_settings(CONFIGS / "laptop.yaml") == load_settings(), "the defaults are the laptop's"
    fleet = load_settings(CONFIGS / "fleet.yaml")
    recipe = fleet.training
    assert (recipe.rank, recipe.alpha, recipe.dropout, recipe.epochs, recipe.max_steps) == (64, 32, 0, 3, None)
    assert (recipe.batch, recipe.accumulation, recipe.learning_rate, recipe.warmup_steps, recipe.clip) == (
        4,
        4,
        5e-5,
        100,
        1.0,
    )
    assert (fleet.tasks.rows_per_task, fleet.index.write_batch, fleet.weighing.neighbours) == (2000, 4000, 100)


def test_a_process_that_reserves_no_gpu_computes_on_cpus():
    settings = load_settings(models={"device": "cuda"})
    assert settings.reserving(0).models == Models(device="cpu")
    assert settings.reserving(0.25) == settings
