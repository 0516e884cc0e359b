"""Gemm written as MatMul and Add: the same numbers, flattened rows and places, and what is left alone."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import operators, parsed, reference
from tests.calibration.made import normal
from txopt.calibration.gemms import split
from txopt.calibration.linears import Role, reads

LARGE, TABLE, BIAS = normal(64, 80), normal(80, 64, seed=1), normal(80, seed=2)
ROWS = "float[M,64] x"
PLACES = "float[B,Q,64] x"
FLAT = "r = Reshape(x, rows)  g = Gemm(r, w, b)  s = Shape<start=0,end=2>(x)  t = Concat<axis=0>(s, n)"
CONSTANTS = {"w": LARGE, "b": BIAS, "rows": np.array([-1, 64]), "n": np.array([80])}


def places(text: str) -> ir.Model:
    """With the names of axes that an export has, which ONNX's inference does not find behind a Reshape."""
    model = parsed(f"({PLACES}) => (float[B,Q,80] y) {{ {text} }}", **CONSTANTS)
    names = {"r": ["M", 64], "g": ["M", 80], "h": ["B", "Q", 80], "k": ["B", "Q", 80], "y": ["B", "Q", 80]}
    for node in model.graph:
        for out in node.outputs:
            if out.name in names:
                out.shape = ir.Shape(names[out.name])
    return model


@pytest.mark.parametrize(
    ("text", "constants", "expected"),
    [
        ("y = Gemm(x, w, b)", {"w": LARGE, "b": BIAS}, ["MatMul", "Add"]),
        ("y = Gemm(x, w)", {"w": LARGE}, ["MatMul"]),
        ("y = Gemm<transB=1,alpha=1.0,beta=1.0>(x, w, b)", {"w": TABLE, "b": BIAS}, ["Transpose", "MatMul", "Add"]),
    ],
    ids=["with a bias", "without", "a weight [N,K]"],
)
def test_rows(text: str, constants: dict[str, np.ndarray], expected: list[str]) -> None:
    model, x = parsed(f"({ROWS}) => (float[M,80] y) {{ {text} }}", **constants), normal(5, 64, seed=3)
    before = reference(model, x=x)[0]
    split(model.graph)
    assert operators(model) == expected
    np.testing.assert_allclose(reference(model, x=x)[0], before, rtol=1e-5, atol=1e-5)
    role = Role.HEAD if "transB" in text else Role.LINEAR
    assert [(read.name, read.role, read.activations.name) for read in reads(model.graph)] == [("w", role, "x")]


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ("h = Reshape(g, t)  y = Relu(h)", ["MatMul", "Add", "Relu"]),
        ("h = Reshape(g, t)  k = Reshape(g, t)  y = Mul(h, k)", ["MatMul", "Add", "Mul"]),
    ],
    ids=["once", "cut by two"],
)
def test_rows_that_were_places_are_places_again(after: str, expected: list[str]) -> None:
    model, x = places(f"{FLAT}  {after}"), normal(2, 3, 64, seed=3)
    before = reference(model, x=x)[0]
    split(model.graph)
    assert [each for each in operators(model) if each not in ("Shape", "Concat")] == expected
    np.testing.assert_allclose(reference(model, x=x)[0], before, rtol=1e-5, atol=1e-5)
    assert reads(model.graph)[0].activations.name == "x"


@pytest.mark.parametrize(
    "after",
    [
        "y = Reshape(g, t)",  # an output of the graph keeps its node
        "h = Reshape(g, t)  z = Relu(g)  k = Reshape(z, t)  y = Mul(h, k)",  # rows are read, too
    ],
    ids=["an output", "read as rows"],
)
def test_rows_stay_where_something_else_wants_them(after: str) -> None:
    model, x = places(f"{FLAT}  {after}"), normal(2, 3, 64, seed=3)
    before = reference(model, x=x)[0]
    split(model.graph)
    assert operators(model).count("MatMul") == 1
    assert reads(model.graph)[0].activations.name == "r"
    np.testing.assert_allclose(reference(model, x=x)[0], before, rtol=1e-5, atol=1e-5)


def test_other_lengths_behind_than_before_are_rows() -> None:
    """A near miss: [B,Q] flattened, and cut into [Q,B]."""
    swapped = "s = Shape<start=0,end=1>(x)  u = Shape<start=1,end=2>(x)  t = Concat<axis=0>(u, s, n)"
    model = places(f"r = Reshape(x, rows)  g = Gemm(r, w, b)  {swapped}  z = Reshape(g, t)  y = Relu(z)")
    turned = next(out for node in model.graph for out in node.outputs if out.name == "z")
    turned.shape = ir.Shape(["Q", "B", 80])
    x = normal(2, 3, 64, seed=3)
    before = reference(model, x=x)[0]
    split(model.graph)
    assert reads(model.graph)[0].activations.name == "r"
    np.testing.assert_allclose(reference(model, x=x)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("header", "text", "constants"),
    [
        (ROWS, "y = Gemm<alpha=0.5>(x, w, b)", {"w": LARGE, "b": BIAS}),
        (ROWS, "y = Gemm<beta=2.0>(x, w, b)", {"w": LARGE, "b": BIAS}),
        ("float[64,M] x", "y = Gemm<transA=1>(x, w, b)", {"w": LARGE, "b": BIAS}),
        (f"{ROWS}, float[64,80] w", "y = Gemm(x, w, b)", {"b": BIAS}),
    ],
    ids=["alpha", "beta", "transposed", "a weight that is computed"],
)
def test_what_is_no_linear_layer_stays(header: str, text: str, constants: dict[str, np.ndarray]) -> None:
    model = parsed(f"({header}) => (float[M,80] y) {{ {text} }}", **constants)
    split(model.graph)
    assert operators(model) == ["Gemm"]
