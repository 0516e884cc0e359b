"""Seeded inputs for an artifact, read off its manifest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import load
from txopt.runtime.graphs import GLOBAL_MASK, source_masks


def draw(artifact: Artifact, batch: int, length: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs by name: ``batch`` unpadded sources of ``length`` ids (no special ids) or features, or float inputs of fixed sizes.

    Of raw samples there are at least as many as a frame takes.
    """
    generator, manifest = np.random.default_rng(seed), artifact.manifest
    special = {
        value for name, value in manifest.generation.items() if name.endswith("token_id") and isinstance(value, int)
    }
    cases, masks = load(artifact.path), source_masks(manifest.graphs)

    def ids(name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """Those of the reference cases: a manifest does not say how many a source has."""
        known = [case.inputs[name].reshape(-1) for case in cases if name in case.inputs]
        ordinary = np.setdiff1d(np.concatenate(known), sorted(special)) if known else np.zeros(1, np.int64)
        return generator.choice(ordinary, shape)

    if manifest.kind == "decoder":
        prompt = ids("input_ids", (batch, length))
        return {"input_ids": prompt, "attention_mask": np.ones_like(prompt)}
    inputs: dict[str, NDArray[Any]] = {}
    lengths = {"B": batch, "N": max(length, manifest.frontend.get("least_samples") or 1)}
    for item in manifest.graphs["encoder"].inputs:
        shape = tuple(lengths.get(axis, length) if isinstance(axis, str) else axis for axis in item.axes)
        if item.name in masks:
            inputs[item.name] = np.ones(shape, np.int64)
        elif item.name == GLOBAL_MASK:
            inputs[item.name] = np.zeros(shape, np.int64)
        elif item.dtype == "int64":
            inputs[item.name] = ids(item.name, shape)
        else:
            inputs[item.name] = generator.standard_normal(shape).astype(np.float32)
    return inputs
