"""Einsum as MatMul: every order of letters, what is no product of matrices, and that the numbers stay."""

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.exporter.plain_engine import run
from txopt.exporter.fusion import attention
from txopt.exporter.fusion.einsum import fuse
from txopt.exporter.graph import count

SIZES = {"b": 2, "g": 5, "h": 3, "q": 4, "k": 6, "d": 7, "n": 1}


def model(*nodes: str, **inputs: str) -> ir.Model:
    header = ", ".join(f"float[{','.join(str(SIZES[axis]) for axis in axes)}] {name}" for name, axes in inputs.items())
    axes = ",".join(f"y{i}" for i in range(len(nodes[-1].partition("->")[2].partition('"')[0])))
    text = f'<ir_version: 10, opset_import: ["" : 24]> g ({header}) => (float[{axes}] y) {{ {" ".join(nodes)} }}'
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(proto)


def product(equation: str) -> ir.Model:
    left, right = equation.partition("->")[0].split(",")
    return model(f'y = Einsum<equation="{equation}">(a, b)', a=left.replace(".", ""), b=right.replace(".", ""))


def feeds(graph: ir.Model) -> dict[str, np.ndarray]:
    source = np.random.default_rng(0)
    return {str(v.name): source.normal(size=[int(d) for d in v.shape]).astype(np.float32) for v in graph.graph.inputs}


EQUATIONS = [
    "qd,dk->qk",
    "bqd,bdk->bqk",
    "bhqd,bhdk->bhqk",
    "bqhd,bkhd->bhqk",
    "bhqk,bkhd->bqhd",
    "gbhqd,gbhkd->gbhqk",
    "bhgqd,bhkd->bhgqk",
    "bhgqk,bhkd->bqhgd",
    "bqhgd,bkhd->bhgqk",
    "bqd,dk->bqk",
    "bqd,kd->qkb",
    *(f"{''.join(order)},bkd->qkb" for order in itertools.permutations("bqd")),
]


@pytest.mark.parametrize("equation", EQUATIONS)
def test_a_product_of_matrices_becomes_one(equation: str) -> None:
    graph = product(equation)
    before = run(graph, feeds(graph))[0]
    report = fuse(graph)
    assert (report.operator, report.fused, report.refused) == ("Einsum", 1, [])
    assert set(count(graph)) <= {"MatMul", "Transpose", "Unsqueeze"}
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "equation",
    ["bqd,bqd->bq", "bqd,bdk->qk", "bhqd,bkhd->bqk", "qd,kd->kqd", "bqn,bkd->bqkd", "qd,bkd->bqk"],
    ids=["no column", "a sum over rows", "two sums", "no sum", "an outer product", "batches of the second alone"],
)
def test_anything_else_is_left_alone_and_named(equation: str) -> None:
    report = fuse(product(equation))
    assert (report.fused, report.refused) == (0, [f"y: {equation} is no product of matrices"])


def test_a_length_of_one_that_is_stretched_is_left_alone() -> None:
    graph = model('y = Einsum<equation="bqd,bkd->bqk">(a, b)', a="bqn", b="bkd")
    assert fuse(graph).refused == ["y: bqd,bkd->bqk broadcasts an axis of length 1"]


def test_an_attention_of_einsums_fuses() -> None:
    graph = model(
        's = Einsum<equation="bqhd,bkhd->bhqk">(q, k)',
        "p = Softmax<axis=-1>(s)",
        'y = Einsum<equation="bhqk,bkhd->bqhd">(p, v)',
        q="bqhd",
        k="bkhd",
        v="bkhd",
    )
    before = run(graph, feeds(graph))[0]
    assert fuse(graph).fused == 2
    assert attention.fuse(graph).fused == 1
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", ["bhgqd", "bqhgd"])
def test_groups_of_heads_by_einsum_fuse(order: str) -> None:
    graph = model(
        f's = Einsum<equation="{order},bkhd->bhgqk">(q, k)',
        "p = Softmax<axis=-1>(s)",
        f'y = Einsum<equation="bhgqk,bkhd->{order}">(p, v)',
        q=order,
        k="bkhd",
        v="bkhd",
    )
    before = run(graph, feeds(graph))[0]
    assert fuse(graph).fused == 2
    assert attention.fuse(graph).fused == 1
    np.testing.assert_allclose(run(graph, feeds(graph))[0], before, rtol=0, atol=1e-5)
