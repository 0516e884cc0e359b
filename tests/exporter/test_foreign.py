"""Foreign .onnx files: what is fused and proved, what is refused, and that nothing is left half written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from txopt.exporter import child, foreign, foreign_original, foreign_parity, onnx_file
from txopt.exporter.difference import difference
from txopt.runtime.errors import ArtifactError, ParityError, SourceError, TxoptError
from txopt.runtime.written import OPTIMIZED

LAYER_NORM = (
    "m = ReduceMean<axes = [-1]>(h) d = Sub(h, m) q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) e = Add(v, epsilon) "
    "r = Sqrt(e) n = Div(d, r) z = Mul(n, weight) y = Add(z, bias)"
)
NET = f"h = Gather(table, ids) {LAYER_NORM}"
PLAIN = "h = Gather(table, ids) y = Add(h, bias)"

CONSTANTS: dict[str, Any] = {
    "table": np.random.default_rng(1).normal(size=(11, 8)),
    "two": np.array(2.0),
    "epsilon": np.array(1e-12),
    "weight": np.linspace(0.5, 2, 8),
    "bias": np.linspace(-1, 1, 8),
}


def proto(
    nodes: str = NET, *, opset: int = 13, kind: str = "float", x: str = "int64[batch,length] ids"
) -> onnx.ModelProto:
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> net ({x}) => ({kind}[batch,length,8] y) {{ {nodes} }}'
    made = onnx.parser.parse_model(text)
    used = {name for node in made.graph.node for name in node.input}
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    for name in sorted(used & CONSTANTS.keys()):
        made.graph.initializer.append(numpy_helper.from_array(CONSTANTS[name].astype(dtype), name))
    return made


def saved(model: onnx.ModelProto, folder: Path, **options: Any) -> Path:
    file = folder / "in.onnx"
    onnx.save(model, file, **options)
    return file


def left(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_norm_is_fused_proved_and_written(tmp_path: Path) -> None:
    stages: list[str] = []
    report = foreign.optimize(saved(proto(), tmp_path), tmp_path / "out", progress=stages.append)
    assert tuple(stages) == foreign.STAGES
    assert report.fusions["LayerNormalization"] == {"fused": 1, "refused": []}
    assert (report.fused, report.opset, report.operators) == (1, 13, {"Gather": 1, "LayerNormalization": 1})
    assert report.parity["largest_error"] <= report.parity["tolerance"] == 1e-4
    sizes = [run["sizes"] for run in report.parity["runs"]]
    assert len(sizes) == 2
    assert all(sizes[0][axis] != sizes[1][axis] for axis in ("batch", "length"))
    assert left(tmp_path) == {"in.onnx", "out"}
    assert left(tmp_path / "out") == set(OPTIMIZED)
    written = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    assert [(entry.domain, entry.version) for entry in written.opset_import] == [("", 24)]
    (norm,) = [node for node in written.graph.node if node.op_type == "LayerNormalization"]
    (epsilon,) = [attribute.f for attribute in norm.attribute if attribute.name == "epsilon"]
    assert epsilon == pytest.approx(1e-12)  # and not zero


def test_nothing_to_fuse_is_said_and_written_all_the_same(tmp_path: Path) -> None:
    report = foreign.optimize(saved(proto(PLAIN), tmp_path), tmp_path / "out")
    assert report.fused == 0
    assert left(tmp_path / "out") == set(OPTIMIZED)


@pytest.mark.parametrize("opset", [11, 17, 21, 24])
def test_every_opset_of_the_range_is_converted(opset: int, tmp_path: Path) -> None:
    """A graph whose operators changed on the way: means with axes as attributes until 17, as inputs since."""
    nodes = (
        NET
        if opset < 18
        else NET.replace("ReduceMean<axes = [-1]>(h)", "ReduceMean(h, axes)").replace(
            "ReduceMean<axes = [-1]>(q)", "ReduceMean(q, axes)"
        )
    )
    model = proto(nodes, opset=opset)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "axes"))
    file = saved(model, tmp_path)
    onnx_file.check(onnx_file.parse(file), file)
    converted = onnx_file.load(file)
    onnx_file.convert(converted, file)
    onnx_file.clean(converted)
    assert converted.opset_imports == {"": 24}
    assert foreign_parity_of(file, converted, tmp_path)["largest_error"] < 1e-5


def test_a_number_in_the_form_of_a_shape_without_axes_is_a_number() -> None:
    """TensorRT's parser warns of the empty shape."""
    nodes = "n = Constant<value = int64[0] {}>() three = ConstantOfShape<value = float[1] {3}>(n) y = Mul(x, three)"
    model = ir.from_proto(proto(nodes))
    onnx_file.clean(model)
    assert [node.op_type for node in model.graph] == ["Mul"]
    assert [value.shape for value in model.graph.initializers.values()] == [()]


def foreign_parity_of(file: Path, model: ir.Model, folder: Path) -> dict[str, Any]:
    ir.save(model, folder / "new.onnx")
    return foreign_parity.prove(foreign_original.ask(file, model), folder / "new.onnx", foreign_parity.precision(model))


def test_half_precision_has_its_own_tolerance(tmp_path: Path) -> None:
    file = saved(proto(PLAIN, kind="float16"), tmp_path)
    assert foreign.optimize(file, tmp_path / "out").parity["tolerance"] == 2e-2


def test_functions_are_inlined(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1]> net (float[N,4] x) => (float[N,4] y) { y = local.twice(x) } '
        '<domain: "local", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }'
    )
    assert foreign.optimize(saved(model, tmp_path), tmp_path / "out").operators == {"Add": 1}


def test_external_data_beside_the_file_is_read(tmp_path: Path) -> None:
    file = saved(proto(), tmp_path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert foreign.optimize(file, tmp_path / "out").fused == 1
    assert foreign.inspect(file)["external_data"] == ["weights.bin"]


def test_a_graph_in_ir_version_3_lists_its_weights_as_inputs(tmp_path: Path) -> None:
    model = proto(PLAIN, opset=11)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    foreign.optimize(saved(model, tmp_path), tmp_path / "out")
    assert [value.name for value in onnx.load(tmp_path / "out" / "model.onnx").graph.input] == ["ids"]


def with_external(location: str, length: int = 32) -> onnx.ModelProto:
    model = proto()
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name == "weight"]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return model


def shortened() -> onnx.ModelProto:
    model = proto()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    return model


def broken_graph() -> onnx.ModelProto:
    model = proto()
    model.graph.node[0].input[1] = "nobody"
    return model


# bytes or a model in in.onnx, and what the refusal must say
UNREADABLE: dict[str, tuple[Callable[[], bytes | onnx.ModelProto], tuple[str, ...]]] = {
    "an empty file": (lambda: b"", ("expected an ONNX file", "without a graph")),
    "text": (lambda: b"once upon a time\n" * 40, ("expected an ONNX file", "found bytes that are none")),
    "random bytes": (lambda: np.random.default_rng(0).bytes(5000), ("expected an ONNX file",)),
    "a truncated file": (
        lambda: proto().SerializeToString()[:-100],
        ("only the first of one", "copy or export it again"),
    ),
    "opset 10": (lambda: proto(PLAIN, opset=10), ("from 11 to 24, found opset 10",)),
    "an opset of the future": (lambda: proto(PLAIN, opset=99), ("from 11 to 24, found opset 99",)),
    "a custom operator": (
        lambda: proto("h = Gather(table, ids) y = com.microsoft.Gelu(h)"),
        ("operators of the ONNX standard alone, found 1 com.microsoft::Gelu", "before an engine's own optimizer"),
    ),
    "an operator there is not": (lambda: proto("h = Gather(table, ids) y = Frobnicate(h)"), ("found 1 Frobnicate",)),
    "external data that is missing": (
        lambda: with_external("gone.bin"),
        ("weight: expected its data in", "found no file"),
    ),
    "external data outside": (
        lambda: with_external("../secret.bin"),
        ("expected external data inside", "'../secret.bin'"),
    ),
    "external data anywhere": (
        lambda: with_external("/etc/passwd"),
        ("expected external data inside", "'/etc/passwd'"),
    ),
    "external data behind a link": (lambda: with_external("link.bin"), ("expected external data inside", "'link.bin'")),
    "external data that is short": (lambda: with_external("short.bin"), ("expected 32 bytes at 0", "of a file of 5")),
    "a weight that is short": (shortened, ("bytes, found", "the file is damaged")),
    "an input of nobody": (broken_graph, ("expected a valid ONNX graph",)),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_a_reason_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    make, said = UNREADABLE[what]
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(32))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "short.bin").write_bytes(bytes(5))
    made = make()
    (folder / "in.onnx").write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(SourceError) as raised:
        foreign.optimize(folder / "in.onnx", tmp_path / "out")
    assert all(part in str(raised.value) for part in ("in.onnx", *said)), raised.value
    assert raised.value.exit_code == 2
    assert left(tmp_path) == {"in", "secret.bin"}


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    model = with_external("gone.bin")
    model.opset_import[0].version = 99
    model.graph.node[-1].domain = "somebody.else"
    with pytest.raises(SourceError) as raised:
        foreign.optimize(saved(model, tmp_path), tmp_path / "out")
    assert all(part in str(raised.value) for part in ("opset 99", "gone.bin", "somebody.else::Add"))


@pytest.mark.parametrize("name", ["nothing", "folder"])
def test_what_is_no_file_is_told_before_anything_starts(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "decoder.onnx").write_bytes(b"")
    with pytest.raises(SourceError, match=r"found nothing there|name one of its files: decoder\.onnx"):
        foreign.optimize(tmp_path / name, tmp_path / "out")
    assert left(tmp_path) == {"folder"}


def test_a_crash_of_native_code_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho \'{"stage": "convert"}\'\nkill -SEGV $$\n')
    python.chmod(0o755)
    file = saved(proto(), tmp_path)
    monkeypatch.setattr(child.sys, "executable", str(python))
    with pytest.raises(SourceError, match=r"whose convert ended its process \(signal 11\)"):
        foreign.optimize(file, tmp_path / "out")
    assert left(tmp_path) == {"python", "in.onnx"}


def test_a_process_that_does_not_start_is_our_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = saved(proto(), tmp_path)
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    with pytest.raises(TxoptError, match="did not start") as raised:
        foreign.optimize(file, tmp_path / "out")
    assert raised.value.exit_code == 1


def test_a_graph_that_says_something_else_is_refused(tmp_path: Path) -> None:
    """The broken twin: one number of one weight."""
    file, twin = saved(proto(), tmp_path), proto()
    (bias,) = [tensor for tensor in twin.graph.initializer if tensor.name == "bias"]
    bias.CopyFrom(numpy_helper.from_array((CONSTANTS["bias"] + 0.01 * np.eye(8)[3]).astype(np.float32), "bias"))
    with pytest.raises(ParityError, match=r"y deviates by 0\.0") as raised:
        foreign_parity_of(file, ir.from_proto(onnx.shape_inference.infer_shapes(twin)), tmp_path)
    assert raised.value.exit_code == 3


def test_a_graph_that_answers_otherwise_every_time_leaves_nothing(tmp_path: Path) -> None:
    model = proto("h = Gather(table, ids) y = Dropout(h, ratio, training)")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "training"))
    with pytest.raises(ParityError, match="nothing was written"):
        foreign.optimize(saved(model, tmp_path), tmp_path / "out")
    assert left(tmp_path) == {"in.onnx"}


def test_an_operator_whose_newest_version_the_engine_does_not_know_is_refused(tmp_path: Path) -> None:
    model = proto("h = Gather(table, ids) n = RandomNormalLike(h) y = Add(h, n)")
    with pytest.raises(SourceError, match=r"knows in opset 24 too, found: .*RandomNormalLike"):
        foreign.optimize(saved(model, tmp_path), tmp_path / "out")


def test_a_graph_that_takes_no_random_input_cannot_be_proved(tmp_path: Path) -> None:
    model = proto("h = Gather(table, ids) s = Reshape(h, shape) y = Add(s, bias)")
    model.graph.initializer.append(numpy_helper.from_array(np.array([977, 3, 8]), "shape"))
    with pytest.raises(SourceError, match="expected a graph that runs on random inputs"):
        foreign.optimize(saved(model, tmp_path), tmp_path / "out")
    assert left(tmp_path) == {"in.onnx"}


def test_answers_without_a_finite_number_prove_nothing(tmp_path: Path) -> None:
    model = proto("h = Gather(table, ids) z = Sub(h, h) y = Div(z, z)")
    with pytest.raises(SourceError, match="y has no finite number"):
        foreign.optimize(saved(model, tmp_path), tmp_path / "out")


ERRORS: dict[str, tuple[Any, Any, float]] = {
    "equal": ([1.0, 2.0], [1.0, 2.0], 0.0),
    "relative to numbers above one": ([100.0, 1.0], [101.0, 1.0], 0.01),
    "absolute below": ([0.5], [0.25], 0.25),
    "infinite in both": ([np.inf, 1.0], [np.inf, 1.0], 0.0),
    "nothing in both": ([np.nan, 1.0], [np.nan, 1.0], 0.0),
    "nothing in one": ([1.0], [np.nan], np.inf),
    "another infinity": ([np.inf], [-np.inf], np.inf),
    "another shape": ([1.0], [1.0, 1.0], np.inf),
    "another integer": ([1], [2], np.inf),
    "another type": ([1], [1.0], np.inf),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_counts_as_an_error(name: str) -> None:
    expected, found, error = ERRORS[name]
    assert difference(np.array(expected), np.array(found)) == pytest.approx(error)


def test_lengths_that_are_sums_follow_their_names(tmp_path: Path) -> None:
    x = "float[batch,past] cache, float[batch,total] mask"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net ({x}) => (float[batch,total] y) '
        "{ o = Slice(mask, zero, one, one) c = Concat<axis = 1>(cache, o) y = Add(c, mask) }"
    )
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + 1"
    for name, number in (("zero", 0), ("one", 1)):
        model.graph.initializer.append(numpy_helper.from_array(np.array([number]), name))
    model.graph.node[0].input[1:] = ["zero", "one", "one"]
    assert len(foreign.optimize(saved(model, tmp_path), tmp_path / "out").parity["runs"]) == 2


def test_what_was_written_before_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file, out = saved(proto(PLAIN), tmp_path), tmp_path / "out"
    foreign.optimize(file, out)
    before = {name: (out / name).read_bytes() for name in OPTIMIZED}
    with pytest.raises(ArtifactError, match="--overwrite"):
        foreign.optimize(file, out)
    assert {name: (out / name).read_bytes() for name in OPTIMIZED} == before
    assert foreign.optimize(saved(proto(), tmp_path), out, overwrite=True).fused == 1
    assert {name: (out / name).read_bytes() for name in OPTIMIZED} != before
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="did not write"):
        foreign.optimize(file, out, overwrite=True)
    assert left(tmp_path) == {"in.onnx", "out"}


def test_a_model_of_somebody_else_is_never_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    onnx.save(proto(), out / "model.onnx")
    (out / "weights.data").write_bytes(b"")
    with pytest.raises(ArtifactError, match="did not write"):
        foreign.optimize(saved(proto(), tmp_path), out, overwrite=True)


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    file = saved(proto(), tmp_path)
    for name in ("one", "two"):
        foreign.optimize(file, tmp_path / name)
    for name in OPTIMIZED:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_inspect_says_what_would_fuse_and_what_not_and_writes_nothing(tmp_path: Path) -> None:
    model = proto()
    for index, node in enumerate(model.graph.node):
        node.name = f"/encoder/layer.{index % 2}/{node.op_type}"
    document = foreign.inspect(saved(model, tmp_path))
    assert document["fusions"]["LayerNormalization"]["fused"] == 1
    assert document["layers"] == [
        {"name": "encoder.0", "nodes": 5, "parameters": 88 + 8, "bytes": 4 * (88 + 8)},
        {"name": "encoder.1", "nodes": 5, "parameters": 8 + 2, "bytes": 4 * (8 + 2)},
    ]
    assert document["inputs"] == [{"name": "ids", "dtype": "int64", "shape": ["batch", "length"]}]
    assert (document["opset"], document["nodes"], document["problem"]) == (13, 10, None)
    assert document["bytes"] == (tmp_path / "in.onnx").stat().st_size
    assert left(tmp_path) == {"in.onnx"}


def test_inspect_shows_what_optimize_refuses(tmp_path: Path) -> None:
    document = foreign.inspect(saved(proto("h = Gather(table, ids) y = com.microsoft.Gelu(h)"), tmp_path))
    assert document["operators"] == {"Gather": 1, "com.microsoft::Gelu": 1}
    assert document["fusions"] is None
    assert "com.microsoft::Gelu" in document["problem"]


def test_the_calling_process_loads_no_parser() -> None:
    code = "import sys, txopt.exporter.foreign; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "torch"}.isdisjoint(done.stdout.split())
