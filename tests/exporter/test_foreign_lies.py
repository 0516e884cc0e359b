"""What foreign files say of their axes and is not so: whatever a graph gave before, it gives after, for unequal lengths too."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter import foreign, onnx_file
from txopt.exporter.foreign_feeds import symbols
from txopt.exporter.fusion import lengths

# graph, and lengths that its names deny
LIES = {
    "batches of two inputs": (
        "(float[N,8] a, float[N,8] b) => (float[N,8] ya, float[1,8] y) <int64[1] zero = {0}> { ya = Relu(a) e = Exp(b) "
        "s = ReduceSum<keepdims=1>(e, zero) n = Shape<start=0,end=1>(e) f = Cast<to=1>(n) y = Div(s, f) }",
        {"a": (2, 8), "b": (4, 8)},
    ),
    "two axes of one input": (
        "(float[N,N,8] x) => (float[P,Q,8] r) <int64[1] width = {8}> { s = Shape<start=1,end=2>(x) b = Shape<start=0,end=1>(x) "
        "a = Relu(x) c = Concat<axis=0>(s, b, width) d = Reshape(a, c) r = Relu(d) }",
        {"x": (2, 3, 8)},
    ),
    "two axes of one input, and another's": (
        "(float[B,N,N,8] x, float[B,N,8] y) => (float[B,P,Q,8] r) <int64[1] left = {-1}, int64[1] zero = {0}, int64[1] width = {8}, "
        "int64[1] one = {1}> { s = Shape<start=2,end=3>(x) a = Relu(x) c = Concat<axis=0>(zero, s, left, width) d = Reshape(a, c) "
        "m = ReduceMean<axes=[1],keepdims=1>(y) u = Unsqueeze(m, one) r = Add(d, u) }",
        {"x": (2, 3, 5, 8), "y": (2, 4, 8)},
    ),
    "an output named like an input": (
        "(float[B,4,L,8] q, float[B,4,P,8] past, float[B,4,L,8] k, float[B,4,L,1] mask) => "
        "(float[B,4,L,8] r, float[B,4,P,8] present) { present = Concat<axis=2>(past, k) t = Transpose<perm=[0,1,3,2]>(present) "
        "s = MatMul(q, t) m = Add(s, mask) p = Softmax<axis=-1>(m) o = MatMul(p, present) r = Relu(o) }",
        {"q": (2, 4, 3, 8), "past": (2, 4, 5, 8), "k": (2, 4, 3, 8), "mask": (2, 4, 3, 1)},
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_name_that_is_not_kept_changes_nothing(name: str, tmp_path: Path) -> None:
    text, shapes = LIES[name]
    made = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> net {text}')
    onnx.save(made, tmp_path / "in.onnx")
    foreign.optimize(tmp_path / "in.onnx", tmp_path / "out")
    random = np.random.default_rng(0)
    feeds = {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
    before, after = ir.from_proto(made), ir.load(tmp_path / "out" / "model.onnx")
    for value in (*before.graph.inputs, *before.graph.outputs):
        value.shape = ir.Shape([None] * len(value.shape or ()))  # ONNX Runtime reuses buffers by their names
    for expected, found in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("past + 1", ["past"]),
        ("a+b", ["a", "b"]),
        ("a - b", ["a", "b"]),
        ("batch-size", ["batch-size"]),
        ("None", ["None"]),
        ("1.5", ["1.5"]),
        ("(17*s21)//s35", ["(17*s21)//s35"]),
    ],
)
def test_a_length_is_a_sum_or_one_name(name: str, expected: list[str]) -> None:
    assert symbols(name) == expected


def test_a_table_is_no_shape(tmp_path: Path) -> None:
    """A mask of -inf, cut to its length: nothing may read it as lengths."""
    mask = np.triu(np.full((77, 77), -np.inf, np.float32), 1)
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[B,L,L] x) => (float[B,L,L] y) <int64[1] zero = {0}, int64[1] one = {1}> '
        "{ s = Shape<start=1,end=2>(x) a = Slice(mask, zero, s, zero) b = Slice(a, zero, s, one) y = Add(x, b) }"
    )
    made.graph.initializer.append(onnx.numpy_helper.from_array(mask, "mask"))
    onnx.save(made, tmp_path / "in.onnx")
    assert foreign.optimize(tmp_path / "in.onnx", tmp_path / "out").parity["largest_error"] == 0


def test_long_chains_of_concatenations_end() -> None:
    nodes = " ".join(f"r{i} = Relu(x{i}) x{i + 1} = Concat<axis=1>(x{i}, r{i})" for i in range(40))
    model = ir.from_proto(
        onnx.parser.parse_model(
            f'<ir_version: 10, opset_import: ["" : 24]> net (float[B,1,1] x0) => (float[B,K] y) <int64[1] two = {{2}}> '
            f"{{ {nodes} z = Squeeze(x40, two) y = Relu(z) }}"
        )
    )
    assert lengths.fuse(model).refused == []


def test_an_identity_that_a_branch_gives_back_stays(tmp_path: Path) -> None:
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[B,L] x, bool c) => (float[P,Q] y) { r = Relu(x) '
        "y = If(c)<then_branch = t () => (float[T,U] a) { a = Relu(r) }, else_branch = e () => (float[V,W] b) { b = Identity(r) }> }"
    )
    onnx.save(made, tmp_path / "in.onnx")
    model = onnx_file.load(tmp_path / "in.onnx")
    onnx_file.clean(model)
    assert foreign.optimize(tmp_path / "in.onnx", tmp_path / "out").operators["If"] == 1
