"""Fusions inside the bodies of If, Loop and Scan: what fuses and is proved there, what must not and why, and what may be believed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from tests.exporter.plain_engine import scale_attention
from txopt.exporter import foreign, foreign_child, foreign_original, foreign_parity
from txopt.exporter.bodies import forget_lengths, paths
from txopt.exporter.fusion import FOREIGN, attention, fuse, proof
from txopt.exporter.fusion.report import NOTHING, Report
from txopt.exporter.graph import count
from txopt.runtime.errors import ParityError

X = "float[B,2,Q,4] q, float[B,2,K,4] k, float[B,2,K,4] v, float[B,1,Q,K] bias, bool c"
KT = "kt = Transpose<perm=[0,1,3,2]>(k) "
S = KT + "s = MatMul(q, kt) m = Mul(s, half) a = Add(m, bias) "
ATTENTION = S + "p = Softmax<axis=-1>(a) y = MatMul(p, v)"
NORM = (
    "n1 = ReduceMean(q, last) n2 = Sub(q, n1) n3 = Mul(n2, n2) n4 = ReduceMean(n3, last) n5 = Add(n4, epsilon) n6 = Sqrt(n5) "
    "n7 = Div(n2, n6) n8 = Mul(n7, weight) y = Add(n8, shift) "
)
GELU = "g1 = Div(q, root) g2 = Erf(g1) g3 = Add(g2, one) g4 = Mul(q, g3) y = Mul(g4, half) "
EINSUM = """kt = Einsum<equation = "bhqd,bhkd->bhqk">(q, k) """ + ATTENTION.replace(
    S, "m = Mul(kt, half) a = Add(m, bias) "
)
LOGARITHM = "l1 = ReduceLogSumExp(q, last) y = Sub(q, l1)"
RANKED = "p = Softmax<axis = -1>(q) r = ArgMax<axis = -1>(p) f = Cast<to=1>(r) y = Mul(q, f)"
ROTATED = (
    "x1 = Slice(q, zero, middle, last) x2 = Slice(q, middle, end, last) x3 = Neg(x2) turned = Concat<axis = -1>(x3, x1) "
    "r1 = Mul(q, cos) r2 = Mul(turned, sin) y = Add(r1, r2)"
)
TABLES = "cos1 = Cos(angle) sin1 = Sin(angle) cos = Concat<axis = -1>(cos1, cos1) sin = Concat<axis = -1>(sin1, sin1) "
KEPT = "y = Identity(q)"

CONSTANTS: dict[str, Any] = {
    "half": np.float32(0.5),
    "one": np.float32(1),
    "two": np.float32(2),
    "root": np.float32(2**0.5),
    "epsilon": np.float32(1e-5),
    "last": np.array([-1]),
    "weight": np.linspace(0.5, 2, 4, dtype=np.float32),
    "shift": np.linspace(-1, 1, 4, dtype=np.float32),
    "zero": np.array([0]),
    "middle": np.array([2]),
    "end": np.array([4]),
    "table": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "far": np.array([[7]]),
    "three": np.array(3),
    "yes": np.array(True),
}


def proto(nodes: str, inputs: str = X, outputs: str = "float[B,2,Q,4] z") -> onnx.ModelProto:
    made = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 24]> net ({inputs}) => ({outputs}) {{ {nodes} }}'
    )
    text = nodes.replace(",", " ").replace("(", " ").replace(")", " ").split()
    for name in sorted(set(text) & CONSTANTS.keys()):
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(CONSTANTS[name]), name))
    return made


def branches(then: str, other: str = KEPT, condition: str = "c") -> str:
    def body(nodes: str, result: str) -> str:
        return f"{result} () => (float[B,2,Q,4] y) {{ {nodes} }}"

    return f"z = If ({condition}) <then_branch = {body(then, 't')}, else_branch = {body(other, 'e')}>"


def optimized(model: onnx.ModelProto, folder: Path, **options: Any) -> dict[str, Any]:
    """The report of a run through all stages, the proofs included."""
    onnx.save(model, folder / "in.onnx")
    (folder / "out").mkdir(exist_ok=True)
    found = foreign_child.optimize(folder / "in.onnx", folder / "out", lambda stage: None, **options)
    onnx.checker.check_model(folder / "out" / "model.onnx", full_check=True)
    return found


def loop(nodes: str, carried: str = "q") -> str:
    body = f"body (int64 i, bool going, float[B,2,Q,4] {carried}) => (bool on, float[B,2,Q,4] y) {{ on = Identity(going) {nodes} }}"
    return f"z = Loop (three, yes, first) <body = {body}>"


LOOP_X = X.replace("] q,", "] first,")
SCAN_X = "float[3,B,2,Q,4] qs, float[B,2,K,4] k, float[B,2,K,4] v, float[B,1,Q,K] bias, float[B,2,Q,4] start"
SCAN = (
    "last_state, z = Scan <num_scan_inputs = 1, body = step (float[B,2,Q,4] state, float[B,2,Q,4] q) => (float[B,2,Q,4] next, "
    f"float[B,2,Q,4] out) {{ {ATTENTION} next = Add(state, y) out = Identity(y) }}> (start, qs)"
)

# the graph, its inputs, what is fused, and the names that it is proved under
FUSED: dict[str, tuple[str, str, str, str]] = {
    "attention over keys, values and a mask from around": (
        branches(ATTENTION),
        X,
        "Attention",
        "If_0/then_branch/Softmax_4",
    ),
    "in the other branch": (branches(KEPT, ATTENTION), X, "Attention", "If_0/else_branch/Softmax_4"),
    "a norm whose weights are around": (branches(NORM), X, "LayerNormalization", "If_0/then_branch/ReduceMean_3"),
    "a GELU": (branches(GELU), X, "Gelu", "If_0/then_branch/Erf_1"),
    "K turned around the branch": (
        KT + branches(ATTENTION.removeprefix(KT)),
        X,
        "Attention",
        "If_1/then_branch/Softmax_3",
    ),
    "in a loop, queries carried": (loop(ATTENTION), LOOP_X, "Attention", "Loop_0/body/Softmax_5"),
    "in a scan, queries scanned": (SCAN, SCAN_X, "Attention", "Scan_0/body/Softmax_4"),
    "a product by Einsum": (branches(EINSUM), X, "Einsum", "If_0/then_branch/Einsum_0"),
    "a logarithm": (branches(LOGARITHM), X, "LogSoftmax", "If_0/then_branch/ReduceLogSumExp_0"),
    "a ranking": (branches(RANKED), X, "Ranking", "If_0/then_branch/ArgMax_1"),
    "a rotation by tables from around a loop": (
        TABLES + loop(ROTATED),
        LOOP_X + ", float[1,1,Q,2] angle",
        "RotaryEmbedding",
        "Loop_4/body/Concat_4",
    ),
    "a rotation with its tables": (
        branches(TABLES + ROTATED),
        X + ", float[1,1,Q,2] angle",
        "RotaryEmbedding",
        "If_0/then_branch/Concat_7",
    ),
    "in a branch of a branch": (
        branches(branches(ATTENTION).replace("z =", "y =")),
        X,
        "Attention",
        "If_0/then_branch/If_0/then_branch/Softmax_4",
    ),
    "in a branch in a loop": (
        loop(branches(ATTENTION).replace("z =", "y =")),
        LOOP_X,
        "Attention",
        "Loop_0/body/If_1/then_branch/Softmax_4",
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_body_is_fused_like_what_is_around_it(name: str, tmp_path: Path) -> None:
    nodes, inputs, operator, where = FUSED[name]
    outputs = "float[3,B,2,Q,4] z" if "Scan" in nodes else "float[B,2,Q,4] z"
    found = optimized(proto(nodes, inputs, outputs), tmp_path)
    report = found["fusions"][operator]
    assert (report["fused"], report["refused"], report["proof"]["unproved"]) == (1, [], [])
    assert report["proof"]["held"] == 1
    assert report["proof"]["at"] in (where, None)
    assert found["operators"].get(operator, 1) == 1
    if operator != "RotaryEmbedding":  # whose tables take a few nodes, around the loop
        assert found["nodes_after"] < found["nodes_before"]


def test_tables_of_a_rotation_are_made_around_the_loop(tmp_path: Path) -> None:
    optimized(proto(TABLES + loop(ROTATED), LOOP_X + ", float[1,1,Q,2] angle"), tmp_path)
    model = ir.load(tmp_path / "out" / "model.onnx")
    (body,) = [graph for graph, path in paths(model).items() if path]
    assert {node.op_type for node in body} <= {"RotaryEmbedding", "Identity", "Shape", "Concat", "Expand"}


def test_both_branches_are_fused_each_with_a_mask_of_its_own(tmp_path: Path) -> None:
    """Two blocks in each that are masked alike: what is joined in one branch is not there in the other."""
    hidden = ATTENTION.replace("a = Add(m, bias)", "f = Where(keep, m, low) a = Add(f, bias)").replace("y =", "w =")
    second = (
        " s2 = MatMul(w, kt) m2 = Mul(s2, half) f2 = Where(keep, m2, low) a2 = Add(f2, bias) p2 = Softmax<axis=-1>(a2) "
    )
    second += "y = MatMul(p2, v)"
    model = proto(branches(hidden + second, hidden + second), X + ", bool[B,1,1,K] keep")
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))
    found = optimized(model, tmp_path)
    assert (found["fusions"]["Attention"]["fused"], found["operators"]["Attention"]) == (4, 4)
    assert found["operators"]["Where"] == 2


def test_new_values_hide_nothing_around_the_body(tmp_path: Path) -> None:
    """Both products get a Transpose whose result has no name before."""
    around = 'e = Einsum<equation = "bhqd,bhkd->bhqk">(q, k) w = Relu(e) '
    inside = 'h = Einsum<equation = "bhqd,bhkd->bhqk">(q, v) y = MatMul(h, k)'
    found = optimized(proto(around + branches(inside), X, "float[B,2,Q,4] z, float[B,2,Q,K] w"), tmp_path)
    assert found["fusions"]["Einsum"]["fused"] == 2


def test_a_weight_that_is_turned_in_a_branch_is_stored_turned(tmp_path: Path) -> None:
    """As exporters write a linear layer."""
    model = proto(branches("wt = Transpose<perm=[1,0]>(square) y = MatMul(q, wt)"))
    model.graph.initializer.append(numpy_helper.from_array(np.eye(4, k=1, dtype=np.float32), "square"))
    assert "Transpose" not in optimized(model, tmp_path)["operators"]


def test_three_projections_of_a_branch_become_one_and_those_around_a_loop_stay(tmp_path: Path) -> None:
    def project(name: str) -> str:
        return (
            f"{name}1 = MatMul(x, w{name}) {name}2 = Reshape({name}1, cut) {name} = Transpose<perm=[0,2,1,3]>({name}2) "
        )

    projections = "".join(map(project, "qkv"))
    weights = {f"w{name}": np.random.default_rng(ord(name)).normal(size=(8, 8)).astype(np.float32) for name in "qkv"}
    inside = projections + ATTENTION
    around = project("k") + loop(project("q") + project("v") + ATTENTION, "old")
    for nodes, products in ((branches(inside, "y = Relu(first)"), 1), (around, 3)):
        model = proto(nodes, "float[B,Q,8] x, float[B,2,Q,4] first, float[B,1,Q,Q] bias, bool c")
        for name, weight in {**weights, "cut": np.array([0, 0, 2, 4])}.items():
            model.graph.initializer.append(numpy_helper.from_array(weight, name))
        found = optimized(model, tmp_path)
        assert (found["fusions"]["Attention"]["fused"], found["operators"]["MatMul"]) == (1, products)


# a graph with one block that must not fuse, and what the refusal says
REFUSED: dict[str, tuple[str, str]] = {
    "an intermediate that is read": (
        branches(ATTENTION.replace("y =", "w =") + " r = ReduceSum(p, last) y = Add(w, r)"),
        "If_0/then_branch/Softmax_4: p is read elsewhere too",
    ),
    "another axis": (branches(ATTENTION.replace("axis=-1", "axis=2")), "If_0/then_branch/Softmax_4: its axis is 2"),
    "scores from around": (
        S + branches("p = Softmax<axis=-1>(a) y = MatMul(p, v)"),
        "If_4/then_branch/Softmax_0: MatMul_1 is in another graph, around or inside a branch or loop",
    ),
    "probabilities from around": (
        S + "p = Softmax<axis=-1>(a) " + branches("y = MatMul(p, v)"),
        "Softmax_4: MatMul_0 is in another graph, around or inside a branch or loop",
    ),
    "a scale for each pair that is computed in the loop": (
        loop("f = Exp(bias) " + ATTENTION.replace("Mul(s, half)", "Mul(s, f)")),
        "Loop_0/body/Softmax_6: Mul_4 scales by what is no constant",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_near_miss_stays_and_says_in_which_body(name: str, tmp_path: Path) -> None:
    nodes, reason = REFUSED[name]
    found = optimized(proto(nodes, LOOP_X if "Loop" in nodes else X), tmp_path)
    report = found["fusions"]["Attention"]
    (refusal,) = report["refused"]
    assert report["fused"] == 0
    assert refusal.startswith(reason), refusal
    assert found["operators"]["Softmax"] == 1


def test_what_a_branch_gives_besides_is_no_intermediate(tmp_path: Path) -> None:
    """The probabilities are an output of the body."""
    then = f"t () => (float[B,2,Q,4] y, float[B,2,Q,K] p) {{ {ATTENTION} }}"
    other = "e () => (float[B,2,Q,4] y2, float[B,2,Q,K] p2) { y2 = Identity(q) p2 = Expand(bias, shape) }"
    nodes = f"shape = Shape(scores) z, w = If (c) <then_branch = {then}, else_branch = {other}>"
    found = optimized(proto(nodes, X + ", float[B,2,Q,K] scores", "float[B,2,Q,4] z, float[B,2,Q,K] w"), tmp_path)
    (refusal,) = found["fusions"]["Attention"]["refused"]
    assert refusal == "If_1/then_branch/Softmax_4: p is an output of the graph"


def test_a_norm_with_a_part_around_the_loop_stays(tmp_path: Path) -> None:
    around, inside = NORM.split("n3 =")
    nodes, inputs = around + loop(f"n3 ={inside}", "old"), X.replace("bool c", "float[B,2,Q,4] first")
    found = optimized(proto(nodes, inputs), tmp_path)
    report = found["fusions"]["LayerNormalization"]
    assert report["fused"] == 0
    (refusal,) = report["refused"]
    assert refusal == "Loop_2/body/ReduceMean_2: a part of it is in another graph, around or inside a branch or loop"


def test_a_gelu_that_begins_around_a_branch_stays(tmp_path: Path) -> None:
    around, inside = GELU.split("g3 =")
    found = optimized(proto(around + branches(f"g3 ={inside}")), tmp_path)
    assert (found["fusions"]["Gelu"]["fused"], found["operators"]["Erf"]) == (0, 1)


GROWS = (
    "long, z = Loop (three, yes, x, y) <body = body (int64 i, bool going, float[L] grown, float[L] sum) => (bool on, float[L] longer, "
    "float[L] total) { on = Identity(going) longer = Concat<axis=0>(grown, x) a = Shape(grown) b = Shape(x) d = Sub(a, b) "
    "f = Cast<to=1>(d) s = Add(sum, f) total = Add(s, x) }>"
)


def test_a_name_of_a_length_that_grows_in_a_loop_is_not_believed(tmp_path: Path) -> None:
    """Both have the name L; in the second turn they are not equal."""
    found = optimized(proto(GROWS, "float[L] x, float[L] y", "float[M] long, float[L] z"), tmp_path)
    assert found["operators"]["Shape"] == 2


def test_in_loops_names_of_lengths_are_forgotten_and_numbers_kept() -> None:
    model = ir.from_proto(proto(loop(ATTENTION), LOOP_X))
    forget_lengths(model)
    (body,) = [graph for graph, path in paths(model).items() if path]
    assert body.inputs[2].shape == ir.Shape([None, 2, None, 4])
    assert model.graph.inputs[0].shape == ir.Shape(["B", 2, "Q", 4])


FIXED = "float[2,2,3,4] q, float[2,2,5,4] k, float[2,2,5,4] v, float[2,1,3,5] bias"
ALWAYS = "n = ReduceSum(q) t = Mul(n, n) d = Add(t, one) u = Greater(d, half) "  # whatever the inputs are


def doubled(model: ir.Model, barred: Any = NOTHING) -> Report:
    """A fusion that makes a mistake inside of branches and nowhere else."""
    report = attention.fuse(model, barred)
    for graph, path in paths(model).items():
        if path:
            scale_attention(ir.Model(graph, ir_version=10), 2)
    return report


def test_a_fusion_that_is_wrong_in_a_branch_that_never_runs_is_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The file as a whole says the same: only the replay finds it, and it is done without being asked for."""
    monkeypatch.setattr(
        "txopt.exporter.fusion.FOREIGN", tuple(doubled if each is attention.fuse else each for each in FOREIGN)
    )
    found = optimized(proto(ALWAYS + branches(KEPT, ATTENTION, "u"), FIXED), tmp_path)
    (refusal,) = found["fusions"]["Attention"]["refused"]
    assert refusal.startswith("If_4/else_branch/Softmax_4: fused, but it does not hold: If_4/else_branch/y, error ")
    assert found["operators"]["Softmax"] == 1


def test_what_cannot_be_replayed_in_a_branch_is_left_out(tmp_path: Path) -> None:
    """No kernel runs this branch: it looks up what its table does not have. It is never taken."""
    lost = "h = Gather(table, far) " + ATTENTION.replace("MatMul(q, kt)", "MatMul(qh, kt)").replace(
        "s =", "qh = Add(q, h) s ="
    )
    found = optimized(proto(ALWAYS + branches(KEPT, lost, "u"), FIXED), tmp_path)
    (refusal,) = found["fusions"]["Attention"]["refused"]
    assert refusal.startswith(
        "If_4/else_branch/Softmax_6: left as it is in a branch or loop: not proved: no kernel runs it"
    )


def test_both_branches_are_run_where_an_input_chooses(tmp_path: Path) -> None:
    """The file's own proof finds what is wrong in either."""
    for chosen, other in ((KEPT, GELU), (GELU, KEPT)):
        original, twin = proto(branches(chosen, other)), proto(branches(chosen, other).replace("one)", "two)"))
        onnx.save(original, tmp_path / "in.onnx")
        onnx.save(twin, tmp_path / "twin.onnx")
        asked = foreign_original.ask(tmp_path / "in.onnx", ir.from_proto(original))
        with pytest.raises(ParityError):
            foreign_parity.prove(asked, tmp_path / "twin.onnx", "fp32")


def test_inspect_counts_what_is_in_bodies(tmp_path: Path) -> None:
    onnx.save(proto(branches(ATTENTION, ATTENTION)), tmp_path / "in.onnx")
    document = foreign.inspect(tmp_path / "in.onnx")
    assert document["fusions"]["Attention"] == {"fused": 2, "refused": []}
    assert (document["nodes"], document["operators"]["Softmax"]) == (13, 2)


@pytest.mark.parametrize("given", [[], None])
def test_without_feeds_bodies_are_fused_or_left_as_proving_asks(given: Sequence[Any] | None) -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto(branches(ATTENTION))))
    report = fuse(model, [attention.fuse], given)["Attention"]
    assert (report.fused, count(model).get("Attention", 0)) == ((0, 0) if given is not None else (1, 1))
    assert proof.prove(attention.fuse, model, []).fused == 0
