"""Seeded inputs for an artifact, read off its manifest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import load


def draw(artifact: Artifact, batch: int, length: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs by name: ``batch`` unpadded sources of ``length`` ids (no special ids), or float inputs of the model's fixed sizes."""
    generator, manifest = np.random.default_rng(seed), artifact.manifest
    special = {
        value for name, value in manifest.generation.items() if name.endswith("token_id") and isinstance(value, int)
    }
    # The ids of the reference cases: a manifest does not say how many a source has.
    known = [case.inputs["input_ids"].reshape(-1) for case in load(artifact.path) if "input_ids" in case.inputs]
    ordinary = np.setdiff1d(np.concatenate(known), sorted(special)) if known else np.zeros(1, np.int64)
    if manifest.kind == "decoder":
        ids = generator.choice(ordinary, (batch, length))
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    inputs: dict[str, NDArray[Any]] = {}
    for item in manifest.graphs["encoder"].inputs:
        shape = tuple(batch if axis == "B" else length if axis == "T" else int(axis) for axis in item.axes)
        if item.name == "attention_mask":
            inputs[item.name] = np.ones(shape, np.int64)
        elif item.dtype == "int64":
            inputs[item.name] = generator.choice(ordinary, shape)
        else:
            inputs[item.name] = generator.standard_normal(shape).astype(np.float32)
    return inputs
