"""Which base models the engine can compute: others would load, and answer wrongly without a word."""

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from lorafleet.errors import ModelError

LAYER_TYPES = ("full_attention", "sliding_attention")
SINKS = "sinks"
"""What transformers calls a parameter that takes a share of every softmax."""


def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model with layers that do not attend as `Manner` says, or that do not attend at all.

    Raises:
        ModelError: it has some.
    """
    text = model.config.get_text_config()
    foreign = sorted(set(getattr(text, "layer_types", None) or ()).difference(LAYER_TYPES))
    if any(name.rpartition(".")[2] == SINKS for name, _ in model.named_parameters()):
        foreign.append("attention with sinks")
    if foreign:
        raise ModelError(
            f"models.base is a {text.model_type} with layers of {', '.join(foreign)}",
            f"Choose a model that has {' and '.join(LAYER_TYPES)} alone",
        )


def hold_rotation(model: PreTrainedModel, longest: int) -> None:
    """Leave the rotation of positions as it is for short texts, where transformers adapts it to the longest text of a pass.

    A pass holds many texts, and what one of them is told must not depend on the others.

    Raises:
        ModelError: a sequence of that length would need another rotation.
    """
    rotations: list[Any] = [module for module in model.modules() if hasattr(module, "rope_type")]
    for rotation in rotations:
        config, parameters = rotation.config, rotation.config.rope_parameters
        if isinstance(rotation.rope_type, dict):
            by_layer = rotation.rope_type.items()
            rotation.rope_type = {layer: _held(own, config, parameters[layer], longest) for layer, own in by_layer}
        else:
            rotation.rope_type = _held(rotation.rope_type, config, parameters, longest)


def _held(rope_type: str, config: PretrainedConfig, parameters: Mapping[str, Any], longest: int) -> str:
    """The type under which transformers computes the same for short texts, and adapts nothing."""
    if rope_type == "longrope":
        short = int(parameters["original_max_position_embeddings"])
    elif rope_type == "dynamic":
        short = int(config.max_position_embeddings)
    else:
        return rope_type
    if longest > short:
        raise ModelError(
            f"generation.longest is {longest}, and models.base rotates positions otherwise behind {short} ({rope_type})",
            f"Lower generation.longest to {short}",
        )
    return "default"
