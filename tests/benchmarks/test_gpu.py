"""What can be known of the GPU's benchmark without one: that its steps run, and what a decode step must read."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from txopt.benchmarks import gpu_models
from txopt.benchmarks.gpu_bytes import step_bytes
from txopt.exporter.pipeline import export
from txopt.exporter.profiles import Sizes
from txopt.runtime.artifact import Artifact


@pytest.mark.slow
def test_the_rehearsal_runs_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "txopt.benchmarks.gpu", "--rehearse"], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["not measured"] == []
    assert found["roads"]["TensorRT"] == "a rehearsal has no GPU"
    assert found["parity"]["T5"]["ONNX Runtime"]["largest_error"] <= 1e-4
    row = found["speed"]["T5 of toy size"]["batch 1"]["ONNX Runtime"]
    assert row["ids_as_eager"] == 1
    assert row["tokens_s"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", gpu_models.FAMILIES)
def test_every_family_that_a_gpu_is_asked_about_can_be_exported(name: str, tmp_path: Path) -> None:
    made = export(gpu_models.small(name), tmp_path / "out", target="tensorrt")
    assert made.manifest.parity["passed"]
    sizes = gpu_models.limits(made.manifest, 16) | {"cache-length": 64}  # the small models' own
    Sizes.of(
        made.manifest,
        batch=sizes["max-batch"],
        beams=sizes["max-beams"],
        source=sizes.get("max-source"),
        prompt=8,
        cache=sizes["cache-length"],
    )


def test_a_step_reads_weights_once_and_caches_by_row(artifacts: Callable[[str], Artifact]) -> None:
    """T5 of tests/exporter/models.py: a tied table is read as a head, position buckets are looked up alone."""
    artifact = artifacts("t5")
    cache = artifact.manifest.cache
    assert cache is not None
    row = 2 * cache.layers * cache.heads * cache.head_size * 4
    one, longer, two = (step_bytes(artifact, batch, source, 10) for batch, source in ((1, 16), (1, 17), (2, 16)))
    assert longer - one == row  # as many places of cross-attention as of self-attention, and the same heads
    assert two - one == row * (10 + 16)
    weights = artifact.manifest.files["weights.data"].size
    assert 0.3 * weights < one - row * (10 + 16) < weights
