"""The Kubernetes manifests that are shipped, and the schemas that they are held against."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from deployment.closed import closed, faults

FOLDER = Path(__file__).parents[2] / "kubernetes"
KUBERNETES = "1.33"
"""The oldest that is promised to work."""


def manifests() -> list[tuple[str, dict[str, Any]]]:
    """Every object, with the file that it is in; without what is kustomize's own."""
    return [
        (str(path.relative_to(FOLDER)), document)
        for path in sorted(FOLDER.rglob("*.yaml"))
        if path.name != "kustomization.yaml"
        for document in yaml.safe_load_all(path.read_text())
    ]


def kind_faults(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object, unknown fields among it."""
    if document["apiVersion"].startswith("ray.io/"):
        # The definition leaves an object's metadata to Kubernetes.
        metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
        return [*faults(document, ray_schema(document["kind"])), *kind_faults(metadata)]
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


@cache
def ray_schema(kind: str) -> Any:
    """KubeRay's own schema of a kind, made strict."""
    folder = Path(os.environ.get("SCHEMAS_ROOT") or "nowhere")
    if not folder.is_dir():
        pytest.skip("SCHEMAS_ROOT names no folder with KubeRay's definitions")
    definition = yaml.load(
        (folder / f"ray.io_{kind.lower()}s.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"])


def pod_specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod of every manifest, with a name for people."""

    def walk(name: str, value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(value, dict):
            if "containers" in value:
                yield name, value
            for key, inner in value.items():
                yield from walk(f"{name}.{key}", inner)
        elif isinstance(value, list):
            for number, inner in enumerate(value):
                yield from walk(f"{name}.{number}", inner)

    for file, document in manifests():
        yield from walk(file, document)
