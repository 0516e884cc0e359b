"""Weights of 4 and 8 bits for TensorRT: the files of the artifact build in TensorRT-RTX, and are those that ONNX Runtime proves."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import parsed, rounded
from tests.calibration.made import normal
from tests.exporter import rtx
from tests.exporter.models import hearing_a_second
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.quantize import found
from txopt.calibration.weights import Method
from txopt.exporter.attempt import graphs_of
from txopt.exporter.lowering.tied import turn_tables
from txopt.exporter.pipeline import export
from txopt.exporter.quantize import quantize
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

pytestmark = [pytest.mark.slow, pytest.mark.tensorrt]

FAMILIES = ("g2p", "t5", "whisper")
PRECISIONS = ("int8", "int4")
Make = Callable[..., Artifact]


@pytest.fixture(scope="module")
def quantized(
    g2p: Artifact,
    artifacts: Callable[[str], Artifact],
    checkpoints: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Make:
    """The artifact of a model (FAMILIES) in a precision, with further options, each made once, on a few samples that are made up."""
    folder = tmp_path_factory.mktemp("tensorrt")
    sources: dict[str, Artifact] = {"g2p": g2p}
    made: dict[str, Artifact] = {}

    def source(name: str) -> Artifact:
        if name not in sources and name == "whisper":
            sources[name] = export(hearing_a_second(checkpoints(name), folder / "checkpoint"), folder / name)
        return sources.setdefault(name, sources.get(name) or artifacts(name))

    def make(name: str, precision: str, **options: Any) -> Artifact:
        key = "-".join([name, precision, *map(str, options.values())])
        if key not in made:
            asked = {"target": "tensorrt", "limit": 4, **options}
            made[key] = quantize(source(name).path, folder / key, precision=precision, **asked)
        return made[key]

    return make


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_files_build_with_every_block_and_nothing_dropped(
    quantized: Make, name: str, precision: str, tmp_path: Path
) -> None:
    artifact = quantized(name, precision, method="rtn")
    for graph_name, model in graphs_of(artifact).items():
        file = artifact.path / f"{graph_name}.onnx"
        if graph_name == "decoder":
            file = rtx.with_a_fixed_cache(file, tmp_path)
        nodes, layers = Counter(each.op_type for each in model.graph), rtx.build(file).layers
        assert layers["DEQUANTIZE"] == nodes["DequantizeLinear"] == len(found(model.graph)) > 5
        assert layers["QUANTIZE"] == 0
        assert layers["MATRIX_MULTIPLY"] == nodes["MatMul"]
        assert layers["ATTENTION_INPUT"] == nodes["Attention"] > 0
        assert layers["KV_CACHE_UPDATE"] == nodes["TensorScatter"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_files_serve_and_verify_on_onnx_runtime(quantized: Make, name: str, precision: str) -> None:
    artifact = quantized(name, precision, method="rtn")
    assert (artifact.manifest.precision, artifact.manifest.target) == (precision, "tensorrt")
    assert verify(artifact.path).passed
    certificate = artifact.manifest.calibration
    assert certificate is not None
    assert certificate["scheme"]["activations"] == "float32"
    assert certificate["scheme"]["symmetric"]
    assert certificate["products"]["count"] > 10
    assert certificate["products"]["largest_error"] < certificate["products"]["tolerance"]
    assert certificate["graphs"]["largest_error"] < certificate["graphs"]["tolerance"] == 1e-4
    bits = {"int8": {8}, "int4": {4}}[precision]
    for model in graphs_of(artifact).values():
        assert {each.domain for each in model.graph} == {""}
        assert {blocks.scheme.bits for blocks in found(model.graph).values()} == bits
        assert all(blocks.zeros is None for blocks in found(model.graph).values())


def test_an_artifact_of_4_bits_says_words(quantized: Make) -> None:
    said = Model(quantized("g2p", "int4", method="rtn")).pipeline("text")("cat")
    assert said.split()[0] == "K"


@pytest.mark.parametrize("method", Method)
def test_every_method_finds_codes_for_symmetric_blocks(quantized: Make, method: Method) -> None:
    artifact = quantized("g2p", "int4", method=str(method))
    certificate = artifact.manifest.calibration
    assert certificate is not None
    assert certificate["scheme"] == {
        "bits": 4,
        "block": 64,
        "symmetric": True,
        "method": str(method),
        "activations": "float32",
    }
    assert certificate["loss"]["agreement"]["forced_tokens"]["value"] > 80


def test_room_below_the_limit_of_size_is_filled_with_columns_of_8_bits(quantized: Make, g2p: Artifact) -> None:
    """The default of int4: decision 43."""
    artifact = quantized("g2p", "int4")
    before, after = (each.manifest.files["weights.data"].size for each in (g2p, artifact))
    assert after <= 0.17 * before
    certificate = artifact.manifest.calibration
    assert certificate is not None
    assert {each["as"] for each in certificate["finer"]} == {"8 bits, one scale for each output"}
    schemes = {blocks.scheme for model in graphs_of(artifact).values() for blocks in found(model.graph).values()}
    assert schemes == {BlockScheme(bits=4, block=64), BlockScheme(bits=8, block=None)}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("block", [32, 64, 128])
def test_blocks_of_other_lengths_build_too(quantized: Make, precision: str, block: int) -> None:
    artifact = quantized("g2p", precision, method="rtn", block=block)
    layers = rtx.build(artifact.path / "encoder.onnx").layers
    assert layers["DEQUANTIZE"] == len(found(graphs_of(artifact)["encoder"].graph))


def test_what_no_block_divides_is_told_and_builds(artifacts: Callable[[str], Artifact], tmp_path: Path) -> None:
    """Widths of 48 and 120."""
    artifact = quantize(
        artifacts("t5-uneven").path, tmp_path / "out", precision="int4", target="tensorrt", method="rtn", limit=4
    )
    certificate = artifact.manifest.calibration
    assert certificate is not None
    uneven = set(certificate["scheme"]["uneven"])
    models = graphs_of(artifact)
    for model in models.values():
        for node, blocks in found(model.graph).items():
            name = str(node.outputs[0].name).partition("/rounded")[0].removesuffix("/turned")
            assert (blocks.scheme.bits == 8) == (name in uneven) == (blocks.codes.shape[0] % 64 > 0)
    assert uneven
    for name in models:
        file = artifact.path / f"{name}.onnx"
        rtx.build(rtx.with_a_fixed_cache(file, tmp_path) if name == "decoder" else file)


def test_engines_keep_weights_in_4_and_8_bits(g2p: Artifact, quantized: Make) -> None:
    """And do not unfold them when they are built."""
    before = rtx.build(g2p.path / "encoder.onnx").size
    saved = {}
    for precision in PRECISIONS:
        artifact = quantized("g2p", precision, method="rtn")
        assert artifact.manifest.calibration is not None
        numbers = artifact.manifest.calibration["weights"]["encoder"]["numbers"]
        saved[precision] = (before - rtx.build(artifact.path / "encoder.onnx").size) / numbers
    assert saved["int8"] > 0.5 * 3
    assert saved["int4"] > 0.5 * 3.5


WIDTH, TOKENS = 512, 4096
TIED = (
    f"(int64[B,Q] ids, float[B,Q,{WIDTH}] x) => (float[B,Q,{WIDTH}] e, float[B,Q,{TOKENS}] y) "
    "{ e = Gather(w, ids)  t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }"
)
# A number's bytes: its code and its share of a scale. Kernels are a tenth at this size.
BYTES = {"int8": (BlockScheme(bits=8, block=None), 1.0), "int4": (BlockScheme(bits=4, block=64), 0.5 + 4 / 64)}


def tied(scheme: BlockScheme) -> ir.Model:
    model = parsed(TIED, w=normal(TOKENS, WIDTH))
    rounded(model, scheme)
    return model


def engine_bytes(model: ir.Model, folder: Path) -> float:
    """Of an engine, for each number of its table."""
    ir.save(model, folder / "tied.onnx")
    return rtx.build(folder / "tied.onnx").size / (TOKENS * WIDTH)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_holds_a_tied_table_once(precision: str, tmp_path: Path) -> None:
    scheme, each = BYTES[precision]
    model = tied(scheme)
    turn_tables([model])
    assert each < engine_bytes(model, tmp_path) < 1.5 * each


def test_an_engine_would_hold_a_table_of_8_bits_twice(tmp_path: Path) -> None:
    """Why tables of 8 bits are turned: to go when this fails."""
    scheme, each = BYTES["int8"]
    assert engine_bytes(tied(scheme), tmp_path) > 2 * each


@pytest.mark.parametrize(("rows", "refused"), [(130, True), (100, False)])
def test_a_block_that_is_shorter_than_the_others_is_not_understood(rows: int, refused: bool, tmp_path: Path) -> None:
    """Why uneven weights have whole columns: to go when this fails.

    100 rows in blocks of 64 have two scales a column, which it cannot but take for blocks of 50: it does not look at block_size.
    """
    model = parsed(f"(float[B,Q,{rows}] x) => (float[B,Q,N] y) {{ y = MatMul(x, w) }}", w=normal(rows, 64))
    rounded(model, BlockScheme(bits=4, block=64))
    ir.save(model, tmp_path / "uneven.onnx")
    if refused:
        with pytest.raises(rtx.Refused, match="must divide into whole blocks"):
            rtx.build(tmp_path / "uneven.onnx")
    else:
        assert rtx.build(tmp_path / "uneven.onnx").layers["DEQUANTIZE"] == 1


def test_zero_points_are_refused(tmp_path: Path) -> None:
    """Why grids are symmetric: to go when this fails."""
    model = parsed("(float[B,Q,128] x) => (float[B,Q,N] y) { y = MatMul(x, w) }", w=normal(128, 64) + np.float32(1))
    rounded(model, BlockScheme(bits=8, block=64, symmetric=False))
    ir.save(model, tmp_path / "asymmetric.onnx")
    with pytest.raises(rtx.Refused, match=r"(?i)zero point|type"):
        rtx.build(tmp_path / "asymmetric.onnx")
