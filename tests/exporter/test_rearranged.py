"""What a value is of another one by Transpose, Reshape, Squeeze and Unsqueeze: how far it is followed, and that it is so."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.origins import Origins
from txopt.exporter.rearranged import Axes, rearranged

CONSTANTS = {
    "zeros": [0],
    "ones": [1],
    "twos": [2],
    "left": [-1],
    "first": [0, 1],
    "rows": [-1, 16],
    "copied": [0, 0, -1],
    "by_numbers": [0, -1, 4, 4],
}
SHAPE = "s = Shape(x) "
TURNED = "t = Transpose<perm=[0,2,1,3]>(x) z = Shape(t) n = Gather(z, first) "
JOINED = TURNED + "p = ReduceProd<keepdims=1>(n) "

# nodes that make y of x [B,T,2,8], what it is of which value
FOLLOWED: dict[str, tuple[str, str, Axes]] = {
    "transposed twice": (
        "t = Transpose<perm=[0,2,1,3]>(x) y = Transpose<perm=[0,1,3,2]>(t)",
        "x",
        ((0,), (2,), (3,), (1,)),
    ),
    "transposed without an order": ("y = Transpose(x)", "x", ((3,), (2,), (1,), (0,))),
    "with ones in between": ("u = Unsqueeze(x, ones) y = Unsqueeze(u, left)", "x", ((0,), (), (1,), (2,), (3,), ())),
    "without them again": ("u = Unsqueeze(x, ones) y = Squeeze(u, ones)", "x", ((0,), (1,), (2,), (3,))),
    "the last axes joined": ("y = Reshape(x, copied)", "x", ((0,), (1,), (2, 3))),
    "batches and heads joined, by their product": (
        JOINED + "d = Shape<start=3>(t) e = Concat<axis=0>(p, left, d) y = Reshape(t, e)",
        "x",
        ((0, 2), (1,), (3,)),
    ),
    "batches and heads joined, by a product of two": (
        TURNED
        + "b = Shape<end=1>(x) p = Mul(b, twos) d = Shape<start=3>(t) e = Concat<axis=0>(p, left, d) y = Reshape(t, e)",
        "x",
        ((0, 2), (1,), (3,)),
    ),
    "joined and cut again": (
        JOINED + "d = Shape<start=3>(t) e = Concat<axis=0>(p, left, d) j = Reshape(t, e) y = Reshape(j, z)",
        "x",
        ((0,), (2,), (1,), (3,)),
    ),
    "cut by the larger of two": (
        JOINED + "d = Shape<start=3>(t) e = Concat<axis=0>(p, left, d) j = Reshape(t, e) "
        "o = Shape<end=2>(x) g = Concat<axis=0>(ones, twos) h = Max(g, n) m = Shape<start=2>(t) a = Concat<axis=0>(h, m, ones) "
        "y = Reshape(j, a)",
        "x",
        ((0,), (2,), (1,), (3,), ()),
    ),
    "an axis cut": ("y = Reshape(x, by_numbers)", "y", ((0,), (1,), (2,), (3,))),
    "behind an axis cut": (
        "c = Reshape(x, by_numbers) y = Transpose<perm=[0,2,1,3]>(c)",
        "c",
        ((0,), (2,), (1,), (3,)),
    ),
    "axes that were joined in another order": (
        SHAPE + "t = Transpose<perm=[0,2,1,3]>(x) c = Reshape(t, s) y = Transpose<perm=[1,0,2,3]>(c)",
        "c",
        ((1,), (0,), (2,), (3,)),
    ),
    "the larger of two beside what is left": (
        TURNED + "g = Concat<axis=0>(ones, twos) h = Max(g, n) e = Concat<axis=0>(h, left) y = Reshape(t, e)",
        "y",
        ((0,), (1,), (2,)),
    ),
    "cut by the larger of two, of which the one is meant": (
        TURNED
        + "b = Shape<end=1>(x) h = Max(b, ones) d = Shape<start=1>(x) e = Concat<axis=0>(h, d, ones) y = Reshape(x, e)",
        "x",
        ((0,), (1,), (2,), (3,), ()),
    ),
    "the first axes left, the last ones joined": ("y = Reshape(x, rows)", "x", ((0, 1), (2, 3))),
}


def model(nodes: str) -> ir.Model:
    text = f'<ir_version: 10, opset_import: ["" : 24]> g (float[B,T,2,8] x) => (float y) {{ {nodes} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    used = {name for node in proto.graph.node for name in node.input}
    for name, numbers in CONSTANTS.items():
        if name in used:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(numbers, np.int64), name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_value_is_followed_through_what_only_rearranges(name: str) -> None:
    nodes, source, axes = FOLLOWED[name]
    graph = model(nodes)
    found = rearranged(graph.graph.outputs[0], Origins())
    assert (found.source.name, found.axes) == (source, axes)
    x = np.arange(3 * 5 * 2 * 8, dtype=np.float32).reshape(3, 5, 2, 8)
    if source == "x":
        order = [axis for group in axes for axis in group]
        lengths = [int(np.prod([x.shape[axis] for axis in group])) for group in axes]
        np.testing.assert_array_equal(run(graph, {"x": x})[0], x.transpose(order).reshape(lengths))


def test_a_value_of_unknown_rank_is_itself() -> None:
    graph = model("y = Reshape(x, copied)")
    value = graph.graph[0].outputs[0]
    value.shape = None
    graph.graph[0].replace_input_with(1, ir.Value(name="somewhere"))
    assert rearranged(value, Origins()).axes == ()
