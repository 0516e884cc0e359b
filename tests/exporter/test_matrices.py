"""Products of matrices in one form: batches that were joined come apart, keys times queries are turned, and the numbers stay."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import common as passes

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import attention
from txopt.exporter.fusion.matrices import fuse
from txopt.exporter.graph import count

SIZES = {"B": 3, "C": 3, "Q": 4, "K": 5, "N": 6}
INPUTS = {
    "q": "float[B,Q,2,8]",
    "k": "float[C,K,2,8]",
    "k_same": "float[B,K,2,8]",
    "q_one": "float[B,Q,1,8]",
    "k_one": "float[B,K,1,8]",
    "k_three": "float[B,K,3,8]",
    "v": "float[C,K,2,8]",
    "q3": "float[N,Q,8]",
    "k3": "float[N,K,8]",
    "bias": "float[B,2,Q,K]",
    "p": "float[B,2,Q,K]",
    "q_by_head": "float[B,2,Q,8]",
    "k_by_head": "float[B,2,K,8]",
    "v_by_head": "float[B,2,K,8]",
}
INTEGERS = {
    "zeros": [0],
    "ones": [1],
    "twos": [2],
    "threes": [3],
    "fours": [4],
    "left": [-1],
    "queries_of_one": [0, 1, -1, 1, 8],
    "keys_of_one": [0, 1, 1, -1, 8],
    "first": [0, 1],
    "joined": [-1, 4, 5],
    "otherwise": [2, -1, 4, 5],
}

# As tf2onnx writes einsum("bqhd,bkhd->bhqk") and ("bhqk,bkhd->bhqd"): both operands of five axes, then of three.
LEFT = (
    "qu = Unsqueeze(q, threes) qt = Transpose<perm=[0,2,1,3,4]>(qu) qs = Shape(qt) qn = Gather(qs, first) ql = Gather(qs, twos) "
    "qd = Gather(qs, fours) qp = ReduceProd<keepdims=1>(qn) qc = Concat<axis=0>(qp, left, qd) qj = Reshape(qt, qc) "
)
RIGHT = (
    "ku = Unsqueeze(k, ones) kt = Transpose<perm=[0,3,1,2,4]>(ku) ks = Shape(kt) kn = Gather(ks, first) kl = Gather(ks, threes) "
    "kd = Gather(ks, fours) kp = ReduceProd<keepdims=1>(kn) kc = Concat<axis=0>(kp, left, kd) kj = Reshape(kt, kc) "
    "kx = Transpose<perm=[0,2,1]>(kj) "
)
CUT = "n = Max(qn, kn) c = Concat<axis=0>(n, ql, kl, ones) r = Reshape(m, c) s = Squeeze(r, fours) "
SCORES = LEFT + RIGHT + "m = MatMul(qj, kx) " + CUT
PROBABILITIES = (
    "pu = Unsqueeze({0}, threes) ps = Shape(pu) pn = Gather(ps, first) pl = Gather(ps, twos) pd = Gather(ps, fours) "
    "pp = ReduceProd<keepdims=1>(pn) pc = Concat<axis=0>(pp, left, pd) pj = Reshape(pu, pc) "
)
VALUES = (
    "vu = Unsqueeze(v, twos) vt = Transpose<perm=[0,3,2,4,1]>(vu) vs = Shape(vt) vn = Gather(vs, first) vl = Gather(vs, threes) "
    "vd = Gather(vs, fours) vp = ReduceProd<keepdims=1>(vn) vc = Concat<axis=0>(vp, left, vd) vj = Reshape(vt, vc) "
    "vx = Transpose<perm=[0,2,1]>(vj) "
)
CONTEXT = "o = MatMul(pj, vx) on = Max(pn, vn) oc = Concat<axis=0>(on, pl, vl, ones) or = Reshape(o, oc) y = Squeeze(or, fours)"
SWAP = "Transpose<perm=[0,1,3,2]>"

# nodes, and what is left of them; one product each
TAKEN: dict[str, tuple[str, dict[str, int]]] = {
    "scores, as tf2onnx writes them": (SCORES + "y = Identity(s)", {"Identity": 1, "MatMul": 1, "Transpose": 2}),
    "context, as tf2onnx writes it": (
        PROBABILITIES.format("p") + VALUES + CONTEXT,
        {"MatMul": 1, "Transpose": 1},
    ),
    "scores of which both batches have one name": (
        SCORES.replace("(k, ones)", "(k_same, ones)") + "y = Identity(s)",
        {"Identity": 1, "MatMul": 1, "Transpose": 2},
    ),
    "scores of one head, which were transposed by Reshape": (
        SCORES.replace("(q, threes)", "(q_one, threes)")
        .replace("(k, ones)", "(k_one, ones)")
        .replace("Transpose<perm=[0,2,1,3,4]>(qu)", "Reshape(qu, queries_of_one)")
        .replace("Transpose<perm=[0,3,1,2,4]>(ku)", "Reshape(ku, keys_of_one)")
        + "y = Identity(s)",
        {"Identity": 1, "MatMul": 1, "Transpose": 2},
    ),
    "a result that is cut by numbers": (
        LEFT + RIGHT + "m = MatMul(qj, kx) b = Shape<end=1>(q) c = Concat<axis=0>(b, twos, ql, kl) y = Reshape(m, c)",
        {"MatMul": 1, "Transpose": 2},
    ),
    "keys times queries, turned": (
        f"qt = {SWAP}(q_by_head) m = MatMul(k_by_head, qt) y = {SWAP}(m)",
        {"MatMul": 1, "Transpose": 1},
    ),
    "keys times queries, joined, cut and turned": (
        LEFT
        + RIGHT.replace("kx = Transpose<perm=[0,2,1]>(kj) ", "")
        + "qx = Transpose<perm=[0,2,1]>(qj) m = MatMul(kj, qx) "
        f"n = Max(qn, kn) c = Concat<axis=0>(n, kl, ql, ones) r = Reshape(m, c) s = Squeeze(r, fours) y = {SWAP}(s)",
        {"MatMul": 1, "Transpose": 2},
    ),
}

# nodes, and the reason that must be given; none where it is nothing that this rule looks for
LEFT_ALONE: dict[str, tuple[str, str | None]] = {
    "a result that is cut otherwise": (
        LEFT + RIGHT + "m = MatMul(qj, kx) y = Reshape(m, otherwise)",
        "its result is not cut as its operands were joined",
    ),
    "a result that is read as it is, too": (
        SCORES + "a = ReduceMax(m) y = Add(s, a)",
        "or something else reads it as it is",
    ),
    "batches and heads that are both of unknown length": (
        SCORES.replace("(k, ones)", "(k_three, ones)") + "y = Identity(s)",
        "the batches that were joined do not show to be the same on both sides",
    ),
    "a result of three axes": (LEFT + RIGHT + "m = MatMul(qj, kx) y = Identity(m)", None),
    "operands of three axes": ("kx = Transpose<perm=[0,2,1]>(k3) y = MatMul(q3, kx)", None),
    "scores that are cut for a mask and joined again": (
        LEFT + RIGHT + "m = MatMul(qj, kx) n = Max(qn, kn) c = Concat<axis=0>(n, ql, kl) s = Reshape(m, c) "
        "a = Add(s, bias) j = Reshape(a, joined) e = Softmax<axis=-1>(j) " + VALUES + "y = MatMul(e, vx)",
        None,
    ),
    "a product that is not turned": (f"kt = {SWAP}(k_by_head) y = MatMul(q_by_head, kt)", None),
    "keys times queries, softmaxed over their rows": (
        f"qt = {SWAP}(q_by_head) m = MatMul(k_by_head, qt) e = Softmax<axis=2>(m) t = {SWAP}(e) y = MatMul(t, v_by_head)",
        None,
    ),
    "the same, of three axes, its axis counted from the end": (
        "qt = Transpose<perm=[0,2,1]>(q3) m = MatMul(k3, qt) e = Softmax<axis=-2>(m) t = Transpose<perm=[0,2,1]>(e) "
        "y = MatMul(t, k3)",
        None,
    ),
    "a softmax over the queries": (
        f"kt = {SWAP}(k_by_head) m = MatMul(q_by_head, kt) e = Softmax<axis=2>(m) y = MatMul(e, v_by_head)",
        None,
    ),
    "scores that are turned on their way to it": (
        f"kt = {SWAP}(k_by_head) m = MatMul(q_by_head, kt) t = {SWAP}(m) r = Identity(t) e = Softmax<axis=2>(r) o = {SWAP}(e) "
        "y = MatMul(o, v_by_head)",
        None,
    ),
}


def model(nodes: str) -> ir.Model:
    words = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    header = ", ".join(f"{kind} {name}" for name, kind in INPUTS.items() if name in words)
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> g ({header}) => (float y) {{ {nodes} }}'
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    for index, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type}_{index}"
    for name in sorted(words & INTEGERS.keys()):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(INTEGERS[name], np.int64), name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    passes.RemoveUnusedNodesPass()(graph)
    return graph


def feeds(graph: ir.Model) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    arrays = {}
    for value in graph.graph.inputs:
        axes = INPUTS[str(value.name)].partition("[")[2].rstrip("]").split(",")
        arrays[str(value.name)] = source.normal(size=[SIZES.get(axis) or int(axis) for axis in axes]).astype(np.float32)
    return arrays


@pytest.mark.parametrize("name", TAKEN)
def test_a_product_takes_one_form_and_says_the_same(name: str) -> None:
    nodes, left = TAKEN[name]
    before, graph = run(model(nodes), feeds(model(nodes)))[0], model(nodes)
    report = fuse(graph)
    assert (report.operator, report.fused, report.refused) == ("MatMul", 1, [])
    assert count(graph) == left
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_near_miss_is_left_alone(name: str) -> None:
    nodes, reason = LEFT_ALONE[name]
    graph = model(nodes)
    untouched = count(graph)
    report = fuse(graph)
    assert report.fused == 0
    assert len(report.refused) == (reason is not None)
    assert all(reason is not None and reason in refusal for refusal in report.refused)
    assert count(graph) == untouched


@pytest.mark.parametrize("single", ["q", "k"])
def test_joined_batches_broadcast_as_they_do_apart(single: str) -> None:
    """Of one head, a batch of one meets any batch."""
    of_one_head = {name: kind.replace(",2,8]", ",1,8]") for name, kind in INPUTS.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in of_one_head.items():
            patch.setitem(INPUTS, name, kind)
        graph = model(SCORES + "y = Identity(s)")
        given = feeds(graph)
        given[single] = given[single][:1]
        before = run(graph, given)[0]
        assert fuse(graph).fused == 1
    np.testing.assert_allclose(run(graph, given)[0], before, rtol=0, atol=1e-5)


def test_attention_fuses_behind_it() -> None:
    nodes = SCORES + "e = Softmax<axis=-1>(s) " + PROBABILITIES.format("e") + VALUES + CONTEXT
    before, graph = run(model(nodes), feeds(model(nodes)))[0], model(nodes)
    assert fuse(graph).fused == 2
    assert (attention.fuse(graph).fused, "Softmax" in count(graph)) == (1, False)
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)
