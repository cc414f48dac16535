"""A fleet whose answers are known: a Llama that foretells the same letter whatever it reads, and adapters that change which.

Its layers add nothing to a constant, so that base foretells `z`. The adapter of a task adds a direction of its own to the
hidden state, behind which stands the task's letter, much louder than `z`.
"""

import json
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_language_model import tiny_model, tiny_tokenizer

from lorafleet.config import Settings, load_settings

LETTERS = {"fruit": "x", "ships": "y", "spelling": "v"}
"""What each task's adapter answers; the base model answers `z`."""
TASKS = """
fruit:
  family: commonsense
  files: {train: fruit_train.jsonl, evaluation: fruit.jsonl}
  instruction: Which kind of fruit is it?
  text: "Fruit: {text}"
  options: [x, y, z]
  label: label
  labels: [x, y, z]
ships:
  family: inference
  files: {train: ships_train.jsonl, evaluation: ships.jsonl}
  instruction: Which kind of ship sails on the ocean?
  text: "Ship: {text}"
  options: [x, y, z]
  label: label
  labels: [x, y, z]
spelling:
  family: question_answering
  files: {train: spelling_train.jsonl, evaluation: spelling.jsonl}
  instruction: Spell the first letter of the answer about music and concerts.
  text: "Concert: {text}"
  answers: label
weather:
  family: sentiment
  files: {evaluation: weather.jsonl}
  instruction: What kind of weather is it?
  text: "Weather: {text}"
  options: [x, y, z]
  label: label
  labels: [x, y, z]
"""
TEXTS = {
    "fruit": "a ripe apple from the orchard, number {}",
    "ships": "a sailing vessel with {} masts in the harbour",
    "spelling": "the orchestra played symphony number {}",
    "weather": "rain and wind from the west, day {}",
}
# Of four rows of fruit three are what its adapter says and one what base says; the others are all their adapter's.
RIGHT = {"fruit": "xxxz", "ships": "yyyyy", "spelling": "vvv", "weather": "zzy"}
BY_PLACE = ("prototypes", "auto@weigher=prototypes", "sparse_projection", "moe_top1", "moe_soft", "joint")
SCORES = {
    "iid": {
        "base": {"fruit": 25, "ships": 0, "spelling": 0},
        "perfect": {"fruit": 75, "ships": 100, "spelling": 100},
        "selection": {"fruit": 75, "ships": 100, "spelling": 100},
        # Each row's neighbours are of its own task first, and it has the largest weight.
        "cat": {"fruit": 75, "ships": 100, "spelling": 100},
        # Each row lies nearest to its own task's prototype, and the router has learned as much.
        **{method: {"fruit": 75, "ships": 100, "spelling": 100} for method in BY_PLACE},
    },
    # Another task's adapter answers, which is never right.
    "ood": {"base": {"fruit": 25, "ships": 0, "spelling": 0}, "selection": {"fruit": 0, "ships": 0, "spelling": 0}},
    "held_out": {"base": {"weather": 100 * 2 / 3}},
}
LOUD, LOUDER = 6.0, 60.0


def rigged_settings(folder: Path, blank: float = 0.0, **sections: object) -> Settings:
    """The settings of such a fleet, whose files are made here.

    Args:
        blank: how loud with any adapter the blank is that stands before every answer.
    """
    (folder / "rows").mkdir(parents=True, exist_ok=True)
    (folder / "rows" / "tasks.yaml").write_text(TASKS)
    for task, right in RIGHT.items():
        write_rows(folder / "rows" / f"{task}.jsonl", [(TEXTS[task].format(n), letter) for n, letter in enumerate(right)])
        trained = [(TEXTS[task].format(n + 50), LETTERS.get(task, "z")) for n in range(8)]
        write_rows(folder / "rows" / f"{task}_train.jsonl", trained)
    model = _model(blank)
    if not (folder / "base").exists():
        model.save_pretrained(folder / "base")
        tiny_tokenizer(adds_bos=False).save_pretrained(folder / "base")
        for direction, task in enumerate(LETTERS, start=1):
            write_adapter(folder / "state" / "adapters" / task, direction)
    usual = {
        "models": {"base": str(folder / "base"), "device": "cpu", "dtype": "float32"},
        "tasks": {"names": list(RIGHT), "declarations": [folder / "rows" / "tasks.yaml"]},
        "generation": {"rows": 4, "longest": 512},
        "weighing": {"neighbours": 12},
        "evaluation": {"answer_tokens": 1, "resamples": 200},
    }
    return load_settings(state=folder / "state", **{**usual, **sections})


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    """A file of rows."""
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))


def write_adapter(folder: Path, direction: int) -> None:
    """An adapter that adds a direction to the hidden state."""
    config = LoraConfig(r=1, lora_alpha=1, target_modules=["down_proj"])
    adapted = get_peft_model(_model(), config)
    assert isinstance(adapted, PeftModel)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_A" in name:
                parameter.fill_(1 / parameter.shape[1])
            elif "lora_B" in name:
                parameter.zero_()
                parameter[direction] = 1
    adapted.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


def _model(blank: float = 0.0) -> torch.nn.Module:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        model.get_input_embeddings().weight[:, 0] = 1
        for layer in model.model.layers:
            # What down_proj is given is a constant.
            layer.mlp.gate_proj.weight[:, 0] = 1
            layer.mlp.up_proj.weight[:, 0] = 1
        head = model.get_output_embeddings().weight
        head[tokenizer.convert_tokens_to_ids("z"), 0] = LOUD
        for direction, letter in enumerate(LETTERS.values(), start=1):
            head[tokenizer.convert_tokens_to_ids(letter), direction] = LOUDER
            head[tokenizer.convert_tokens_to_ids("Ġ"), direction] = blank
    return model
