"""Static products for TensorRT: the files of the artifact build in TensorRT-RTX, and are those that ONNX Runtime runs and proves."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.calibration.graphs import graph, node
from tests.exporter import rtx
from tests.exporter.models import hearing_a_second
from txopt.calibration.formats import FORMATS
from txopt.exporter import weights
from txopt.exporter.attempt import graphs_of
from txopt.exporter.lowering.static import lower_static
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

FAMILIES = ("g2p", "t5", "whisper")
ENCODERS = ("bert", "distilbert")  # alone
Make = Callable[[str, str], Artifact]


@pytest.fixture(scope="module")
def sources(
    g2p: Artifact,
    artifacts: Callable[[str], Artifact],
    checkpoints: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Callable[[], Artifact]]:
    """How to make the artifacts of FAMILIES and ENCODERS in float32."""

    def whisper() -> Artifact:
        folder = tmp_path_factory.mktemp("whisper")
        return export(hearing_a_second(checkpoints("whisper"), folder / "checkpoint"), folder / "artifact")

    others = {name: partial(artifacts, name) for name in ("t5", *ENCODERS)}
    return {"g2p": lambda: g2p, "whisper": whisper, **others}


@pytest.fixture(scope="module")
def quantized(sources: Mapping[str, Callable[[], Artifact]], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The artifact of a model (FAMILIES, ENCODERS) in a precision (FORMATS), each made once, on a few samples that are made up."""
    folder, made = tmp_path_factory.mktemp("tensorrt"), dict[tuple[str, str], Artifact]()
    opened = dict[str, Artifact]()

    def make(name: str, precision: str) -> Artifact:
        if (name, precision) not in made:
            source = opened.setdefault(name, opened.get(name) or sources[name]())
            out = folder / f"{name}-{precision}"
            made[name, precision] = quantize(
                source.path, out, precision=precision, scheme="static", target="tensorrt", limit=4
            )
        return made[name, precision]

    return make


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("name", [*FAMILIES, *ENCODERS])
def test_the_files_build_with_every_pair_and_nothing_dropped(
    quantized: Make, name: str, precision: str, tmp_path: Path
) -> None:
    artifact = quantized(name, precision)
    for graph_name, model in graphs_of(artifact).items():
        file = artifact.path / f"{graph_name}.onnx"
        if graph_name == "decoder":
            file = rtx.with_a_fixed_cache(file, tmp_path)
        nodes, layers = Counter(each.op_type for each in model.graph), rtx.build(file).layers
        assert layers["QUANTIZE"] == nodes["QuantizeLinear"] > 5
        assert layers["DEQUANTIZE"] == nodes["DequantizeLinear"] > 2 * 5
        assert layers["MATRIX_MULTIPLY"] == nodes["MatMul"]
        assert layers["ATTENTION_INPUT"] == nodes["Attention"] > 0
        assert layers["KV_CACHE_UPDATE"] == nodes["TensorScatter"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_files_serve_and_verify_on_onnx_runtime(quantized: Make, name: str) -> None:
    artifact = quantized(name, "int8")
    assert (artifact.manifest.precision, artifact.manifest.target) == ("int8", "tensorrt")
    assert verify(artifact.path).passed
    assert artifact.manifest.calibration is not None
    assert artifact.manifest.calibration["products"]["count"] > 10
    for model in graphs_of(artifact).values():
        assert {each.domain for each in model.graph} == {""}
        zeros = {
            each.inputs[2].const_value.numpy().tobytes() for each in model.graph if each.op_type == "QuantizeLinear"
        }  # type: ignore[union-attr]
        assert zeros == {b"\0"}


def test_fp8_is_measured_and_proved_in_emulation(quantized: Make) -> None:
    artifact = quantized("g2p", "fp8")
    found = artifact.manifest.calibration
    assert found is not None
    assert found["scheme"]["activations"] == "static fp8 (E4M3), one scale for each tensor"
    assert found["scheme"]["method"] == "absmax"
    assert found["products"]["count"] == 13 + 16
    assert found["products"]["largest_error"] <= 1e-5
    assert found["loss"]["agreement"]["forced_tokens"]["value"] > 90
    assert verify(artifact.path).passed
    assert Model(artifact).pipeline("text")("cat").strip()


def test_engines_keep_weights_in_8_bits(g2p: Artifact, quantized: Make) -> None:
    """And do not unfold them when they are built: of three bytes that every weight is smaller, most are gone from an engine."""
    before = rtx.build(g2p.path / "encoder.onnx").size
    for precision in FORMATS:
        artifact = quantized("g2p", precision)
        assert artifact.manifest.calibration is not None
        numbers = artifact.manifest.calibration["weights"]["encoder"]["numbers"]
        assert before - rtx.build(artifact.path / "encoder.onnx").size > 0.5 * 3 * numbers, precision


def test_the_unsigned_graph_of_the_cpu_is_refused(quantized: Make, tmp_path: Path) -> None:
    """Why there are two targets: to go when this fails."""
    model = ir.load(quantized("g2p", "int8").path / "encoder.onnx")
    lower_static(model)
    weights.write({"encoder": model}, tmp_path)
    with pytest.raises(rtx.Refused, match="Non-zero zero point is not supported"):
        rtx.build(tmp_path / "encoder.onnx")


def test_an_input_that_is_dropped_is_a_refusal(tmp_path: Path) -> None:
    """The lengths of Attention's keys: the parser goes on without them, with a warning."""
    width = 64
    model = graph(
        node("Attention", "q k v lengths", "y", q_num_heads=1, kv_num_heads=1),
        constants={},
        inputs={name: (TensorProto.FLOAT, ["B", "T", width]) for name in "qkv"}
        | {"lengths": (TensorProto.INT64, ["B"])},
    )
    attention = next(iter(model.graph))
    attention.resize_inputs(7)
    attention.replace_input_with(6, attention.inputs[3])
    attention.replace_input_with(3, None)
    ir.save(model, tmp_path / "attention.onnx")
    with pytest.raises(rtx.Refused, match=r"(?i)unused"):
        rtx.build(tmp_path / "attention.onnx")


def test_a_cache_in_8_bits_is_refused(tmp_path: Path) -> None:
    """docs/quantization.md says so, and is to change when this fails."""
    cache = {name: (TensorProto.INT8, ["B", 4, length, 64]) for name, length in (("past", rtx.CACHE), ("new", "Q"))}
    model = graph(
        node("TensorScatter", "past new at", "y", axis=2),
        constants={},
        inputs={**cache, "at": (TensorProto.INT64, ["B"])},
    )
    out = model.graph.outputs[0]
    out.type, out.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(["B", 4, rtx.CACHE, 64])
    ir.save(model, tmp_path / "cache.onnx")
    with pytest.raises(rtx.Refused, match="must have type Float, Half, or BFloat16"):
        rtx.build(tmp_path / "cache.onnx")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "fp8", "scheme": "static"}, "fp8 is for the tensorrt target"),
        ({"precision": "fp8"}, "precision: fp8 is for --scheme static --target tensorrt"),
        ({"target": "tensorrt", "scheme": "rows"}, "target: expected cpu, which alone rounds activations row by row"),
        ({"target": "cuda", "scheme": "static"}, "target: expected one of cpu, tensorrt"),
    ],
)
def test_what_a_target_does_not_have_is_refused(
    g2p: Artifact, tmp_path: Path, asked: Mapping[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(g2p.path, tmp_path / "out", **asked)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
