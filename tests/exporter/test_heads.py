"""Attention on three axes: where heads are cut for its sake alone it cuts them itself, and says the same."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.graph import count
from txopt.exporter.lowering.heads import join_heads

SIZES = {"B": 2, "L": 5, "S": 7}
SHAPES = {"x": ("B", "L", 12), "memory": ("B", "S", 12), "mask": ("B", 1, "L", "S"), "past": ("B", 2, "S", 6)}
CONSTANTS = {
    "counted": [0, 0, 2, 6],
    "open": [0, 0, -1, 6],
    "grouped": [0, 0, 1, 6],
    "packed": [0, 0, 6, 6],
    "uneven": [0, 0, 4, 6],
    "thrice": [2, 2, 2],
    "once": [2, 1, 1],
    "whole": [0, 0, 12],
    "rest": [0, 0, -1],
    "copied": [0, 0, 0],
    "minus": [-1],
    "two": [2],
    "six": [6],
    "rank": [0, 0, -1, 12],
}
WEIGHTS = {"narrow": (12, 6), "wide": (12, 36), "between": (12, 24)}


def cut(name: str, x: str) -> str:
    return f"{name}h = Reshape({x}, counted) {name} = Transpose<perm=[0,2,1,3]>({name}h)"


Q, K, V = cut("q", "x"), cut("k", "memory"), cut("v", "memory")
BACK = "t = Transpose<perm=[0,2,1,3]>(a) y = Reshape(t, whole)"
ATTENTION = "a = Attention<scale=0.3>(q, k, v)"
PLAIN = f"{Q} {K} {V} {ATTENTION} {BACK}"
SPLIT = (
    "w = MatMul(x, wide) c = Reshape(w, packed) h = Transpose<perm=[0,2,1,3]>(c) q, k, v = Split<axis=1>(h, thrice) "
    f"{ATTENTION} {BACK}"
)

MATCHES = {
    "counted": PLAIN,
    "heads left open": PLAIN.replace("counted", "open"),
    "a mask": PLAIN.replace("(q, k, v)", "(q, k, v, mask)"),
    "causal": PLAIN.replace("scale=0.3", "scale=0.3, is_causal=1"),
    "what is left": PLAIN.replace("whole", "rest"),
    "joined to four axes": PLAIN.replace("whole", "rank"),
    "one projection of three": SPLIT,
    "grouped heads": PLAIN.replace(
        f"{K} {V}", "m = MatMul(memory, narrow) " + f"{K} {V}".replace("memory, counted", "m, grouped")
    ),
    "one projection, grouped": SPLIT.replace("wide", "between").replace("packed", "uneven").replace("thrice", "once"),
    "lengths of another value": PLAIN.replace(
        K,
        "b = Shape<end=1>(x) s = Concat<axis=0>(b, minus, two, six) kh = Reshape(memory, s) k = Transpose<perm=[0,2,1,3]>(kh)",
    ),
    "lengths that are nobody's": PLAIN.replace(
        K,
        "b = ReduceMax<keepdims=1>(rows) s = Concat<axis=0>(b, minus, two, six) kh = Reshape(memory, s) "
        "k = Transpose<perm=[0,2,1,3]>(kh)",
    ),
    "values of lengths that are nobody's, projected behind": PLAIN.replace(
        V,
        "b = ReduceMax<keepdims=1>(rows) s = Concat<axis=0>(b, minus, two, six) vh = Reshape(memory, s) "
        "v = Transpose<perm=[0,2,1,3]>(vh)",
    ).replace("y = Reshape(t, whole)", "r = Reshape(t, rest) y = MatMul(r, narrow)"),
}
NEAR_MISSES = {
    "K as it is in its buffer": PLAIN.replace(K, "k = Identity(past)").replace(V, "v = Identity(past)"),
    "a cache": f"{Q} {K} {V} a, pk, pv = Attention<scale=0.3>(q, k, v, , past, past) {BACK}",
    "read by head": f"{Q} {K} {V} {ATTENTION} t = Transpose<perm=[0,2,1,3]>(a) o = Reshape(t, whole) m = ReduceMax<keepdims=0>(a) "
    "y = Add(o, m)",
    "not joined": f"{Q} {K} {V} {ATTENTION} y = Neg(a)",
    "another order": PLAIN.replace(BACK, "t = Transpose<perm=[0,2,3,1]>(a) y = Reshape(t, rest)"),
    "joined by copied heads": PLAIN.replace(
        BACK, "t = Transpose<perm=[0,2,1,3]>(a) y = Reshape<allowzero=0>(t, copied)"
    ).replace("counted", "grouped"),
    "queries in another order": PLAIN.replace(
        Q, "qh = Reshape(x, counted) qt = Transpose<perm=[0,2,1,3]>(qh) q = Neg(qt)"
    ),
}


def model(nodes: str) -> ir.Model:
    asked = [
        name
        for name in (*SHAPES, "rows")
        if name in nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    ]
    listed = ", ".join(
        "int64[1] rows" if name == "rows" else f"float[{','.join(map(str, SHAPES[name]))}] {name}" for name in asked
    )
    made = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> net ({listed}) => (float y) {{ {nodes} }}'
    )
    made.graph.output[0].type.tensor_type.ClearField("shape")
    used = {name for node in made.graph.node for name in node.input}
    random = np.random.default_rng(1)
    arrays = {name: np.array(shape) for name, shape in CONSTANTS.items()}
    arrays |= {name: random.normal(size=shape).astype(np.float32) for name, shape in WEIGHTS.items()}
    made.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[name], name) for name in arrays if name in used)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    drawn = {
        name: random.normal(size=[SIZES.get(str(length), length) for length in shape]).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    return {**drawn, "rows": np.array([2])}


@pytest.mark.parametrize("name", MATCHES)
def test_heads_are_cut_by_the_operator_and_it_says_the_same(name: str) -> None:
    before, after = model(MATCHES[name]), model(MATCHES[name])
    join_heads(after)
    (attention,) = [node for node in after.graph if node.op_type == "Attention"]
    heads = [attention.attributes[key].as_int() for key in ("q_num_heads", "kv_num_heads")]
    assert heads == [2, 1 if "grouped" in name else 2]
    assert "Transpose" not in count(after)
    assert count(after)["Reshape"] == (2 if "nobody" in name else 1)
    onnx.checker.check_model(ir.to_proto(after))
    np.testing.assert_allclose(run(after, feeds())[0], run(before, feeds())[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_keeps_its_heads(name: str) -> None:
    graph = model(NEAR_MISSES[name])
    untouched = count(graph)
    join_heads(graph)
    assert count(graph) == untouched
    assert not any("q_num_heads" in node.attributes for node in graph.graph)


def test_heads_in_wrong_places_are_beyond_the_tolerance() -> None:
    """The broken twin: one head of twice the size."""
    before, after = model(PLAIN), model(PLAIN)
    join_heads(after)
    (attention,) = [node for node in after.graph if node.op_type == "Attention"]
    attention.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", 1)
    attention.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 1)
    assert np.abs(run(after, feeds())[0] - run(before, feeds())[0]).max() > 1e-3


def test_a_transpose_that_reverses_all_axes_is_another_order() -> None:
    graph = ir.from_proto(
        onnx.parser.parse_model(
            '<ir_version: 10, opset_import: ["" : 24]> net (float[8,L,4,B] q) => (float[8,L,4,B] y) '
            "{ t = Transpose(q) a = Attention(t, t, t) y = Transpose(a) }"
        )
    )
    join_heads(graph)
    assert count(graph) == {"Attention": 1, "Transpose": 2}
