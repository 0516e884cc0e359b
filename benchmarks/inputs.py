"""Seeded inputs for an artifact, read off its manifest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.manifest import Manifest


def draw(manifest: Manifest, batch: int, length: int, *, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Inputs by name: ``batch`` unpadded sources of ``length`` ids (no special ids), or float inputs of the model's fixed sizes."""
    generator = np.random.default_rng(seed)
    special = {
        value for name, value in manifest.generation.items() if name.endswith("token_id") and isinstance(value, int)
    }
    ordinary = np.setdiff1d(np.arange(3, 1000), sorted(special))
    if manifest.kind == "decoder":
        ids = generator.choice(ordinary[ordinary < manifest.graphs["decoder"].outputs[0].axes[-1]], (batch, length))
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
