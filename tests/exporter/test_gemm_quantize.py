"""GPT-2, whose linear layers arrive as Gemm: quantized whole, in every scheme."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from txopt.exporter.attempt import graphs_of
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.parity import verify

pytestmark = pytest.mark.slow

LINEAR = 2 * 4  # two layers: Q, K and V together, the output, and two of the feed-forward
HEAD, TABLE = 1, 1

SCHEMES: dict[str, Mapping[str, str]] = {
    "int8": {"precision": "int8"},
    "int4 by GPTQ": {"precision": "int4"},
    "static int8": {"precision": "int8", "scheme": "static"},
    "static fp8": {"precision": "fp8", "scheme": "static", "target": "tensorrt"},
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_linear_layer_has_codes(scheme: str, artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    source = artifacts("gpt2")
    assert Counter(source.manifest.fusion["decoder"]["nodes"])["Gemm"] == LINEAR
    prompts = [{"input_ids": np.arange(3 + row, 9 + row)} for row in range(4)]
    made = quantize(source.path, tmp_path / "out", calibration=prompts, limit=4, **SCHEMES[scheme])
    assert made.manifest.calibration is not None
    assert made.manifest.calibration["products"]["count"] == LINEAR + HEAD + ("static" not in scheme) * TABLE
    assert made.manifest.calibration["weights"]["decoder"]["rounded"] == LINEAR + 1  # the head is tied to the table
    counted = Counter(node.op_type for node in graphs_of(made)["decoder"].graph)
    assert counted["Gemm"] == 0
    if "static" in scheme:
        assert counted["QuantizeLinear"] == LINEAR + HEAD
    else:
        assert counted["MatMulNBits"] == LINEAR + HEAD
        assert counted["MatMul"] == 0
    assert verify(made.path).passed
    assert verify(made.path).invariance == {}  # a decoder alone has no batches of sources
