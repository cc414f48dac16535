"""JSON schemas made strict: what they do not name is a fault."""

from collections.abc import Mapping
from typing import Any

import jsonschema

OPEN = ("x-kubernetes-preserve-unknown-fields", "x-kubernetes-embedded-resource")


def closed(schema: Any) -> Any:
    """The same schema, refusing every field that it does not know wherever it names some."""
    if isinstance(schema, list):
        branches = [closed(part) for part in schema]
        # "A model, or any mapping" is the model.
        has_model = any(isinstance(branch, Mapping) and "$ref" in branch for branch in branches)
        return [
            branch for branch in branches if not (has_model and branch == {"additionalProperties": True, "type": "object"})
        ]
    if not isinstance(schema, Mapping):
        return schema
    inner = {key: closed(part) for key, part in schema.items()}
    names_some = isinstance(schema.get("properties"), Mapping) and "type" in schema
    if names_some and not any(schema.get(mark) for mark in OPEN):
        inner["additionalProperties"] = False
    return inner


def faults(document: Any, schema: Any) -> list[str]:
    """What is wrong with a document, as `path: message`."""
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(document)]
