"""The weights' file: every weight once, where engines can map it, and the same bytes from the same input."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.external_data_helper import ExternalDataInfo

from txopt.exporter import weights
from txopt.runtime.artifact import Artifact

Artifacts = Callable[[str], Artifact]
Make = Callable[[str], Path]


def model(**tensors: np.ndarray) -> ir.Model:
    """A graph that gives out its initializers; what it computes does not matter here."""
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in tensors.items()]
    for value in values:
        assert value.const_value is not None
        value.shape, value.type = value.const_value.shape, ir.TensorType(value.const_value.dtype)
    nodes = [ir.node("Identity", [value], name=f"{value.name}/Identity") for value in values]
    outputs = [node.outputs[0] for node in nodes]
    for value, output in zip(values, outputs, strict=True):
        output.name, output.shape, output.type = f"{value.name}_out", value.shape, value.type
    return ir.Model(
        ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 24}, name="g"), ir_version=10
    )


def places(path: Path) -> dict[str, tuple[int, int]]:
    """(offset, length) of every tensor of a graph that lies in the file."""
    graph = onnx.load(path, load_external_data=False).graph
    found = {}
    for tensor in graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            info = ExternalDataInfo(tensor)
            assert info.location == weights.FILE
            found[tensor.name] = int(info.offset or 0), int(info.length or 0)
    return found


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    sizes = {"odd": (65, 3), "large": (64, 32), "other": (64, 33)}
    return {name: generator.normal(size=size).astype(np.float32) for name, size in sizes.items()}


def test_equal_bytes_of_two_dtypes_are_two_tensors(tmp_path: Path) -> None:
    """TensorRT refuses weights that lie at one address and are of different counts."""
    graph = model(bias=np.zeros(256, np.float16), shape=np.zeros(64, np.int64), same=np.zeros((16, 16), np.float16))
    weights.write({"encoder": graph}, tmp_path)
    found = places(tmp_path / "encoder.onnx")
    assert found["bias"] == found["same"]
    assert found["bias"] != found["shape"]


def test_weights_are_shared_by_content_not_by_name(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    encoder = model(embedding=arrays["large"], own=arrays["other"])
    decoder = model(tied=arrays["large"].copy(), again=arrays["large"].copy(), mine=arrays["odd"])
    written = weights.write({"encoder": encoder, "decoder": decoder}, tmp_path)
    assert written == sum(array.nbytes for array in arrays.values())
    first, second = places(tmp_path / "encoder.onnx"), places(tmp_path / "decoder.onnx")
    assert first["embedding"] == second["tied"] == second["again"]
    assert len({first["embedding"], first["own"], second["mine"]}) == 3


def test_the_same_bytes_of_another_shape_share_them_too_and_of_another_type_do_not(tmp_path: Path) -> None:
    array = np.arange(1, 2049, dtype=np.int32)
    graph = model(a=array, b=array.reshape(64, 32).copy(), c=array.view(np.float32).copy())
    assert weights.write({"encoder": graph}, tmp_path) == 2 * array.nbytes
    loaded = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "encoder.onnx").graph.initializer}
    np.testing.assert_array_equal(loaded["b"], array.reshape(64, 32))
    assert loaded["c"].dtype == np.float32
    np.testing.assert_array_equal(loaded["c"].view(np.int32), array)


def test_offsets_are_aligned_and_nothing_overlaps(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    weights.write({"encoder": model(**arrays)}, tmp_path)
    found = places(tmp_path / "encoder.onnx")
    for name, (offset, length) in found.items():
        assert length == arrays[name].nbytes
        assert offset % (4096 if length >= 65536 else 64) == 0, f"{name} begins at {offset}"
    ends = sorted((offset, offset + length) for offset, length in found.values())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert (tmp_path / weights.FILE).stat().st_size == ends[-1][1]


def test_what_is_written_is_what_is_read(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    weights.write({"encoder": model(**arrays)}, tmp_path)
    for tensor in onnx.load(tmp_path / "encoder.onnx").graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), arrays[tensor.name])


def test_small_constants_stay_in_the_graph(tmp_path: Path) -> None:
    at = weights.INLINE_BYTES // 4
    graph = model(small=np.ones(at - 1, np.float32), large=np.ones(at, np.float32))
    weights.write({"encoder": graph}, tmp_path)
    assert list(places(tmp_path / "encoder.onnx")) == ["large"]


def test_a_real_artifact_keeps_one_copy_of_a_tied_embedding(artifacts: Artifacts) -> None:
    artifact = artifacts("t5")
    encoder, decoder = (places(artifact.file(f"{name}.onnx")) for name in ("encoder", "decoder"))
    table = 100 * 64 * 4
    tables = {place for place in (*encoder.values(), *decoder.values()) if place[1] == table}
    assert len(tables) == 1
    assert all(offset % 64 == 0 for offset, _ in (*encoder.values(), *decoder.values()))


def test_the_same_input_gives_the_same_bytes(artifacts: Artifacts, checkpoints: Make, tmp_path: Path) -> None:
    """Exported here and once more in a process of its own, whose hashes of strings are others."""
    first, again = artifacts("t5").path, tmp_path / "again"
    export = "import sys; from txopt.exporter.pipeline import export; export(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", export, str(checkpoints("t5")), str(again)], check=True, capture_output=True)
    assert sorted(file.name for file in first.iterdir()) == sorted(file.name for file in again.iterdir())
    for file in sorted(first.iterdir()):
        assert file.read_bytes() == (again / file.name).read_bytes(), file.name
