"""Which weights can be quantized, by who reads them."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import parsed
from tests.calibration.made import normal
from txopt.calibration.linears import LEAST_SIZE, Role, reads

LARGE = normal(64, 64)
TABLE = normal(100, 64)
X = "float[B,Q,64] x"
IDS = "int64[B,Q] ids"

COUNT = {
    "a linear layer": (f"({X}) => (float[B,Q,64] y) {{ y = MatMul(x, w) }}", {"w": LARGE}, [("w", Role.LINEAR)]),
    "a weight of two layers": (
        f"({X}) => (float[B,Q,64] y) {{ h = MatMul(x, w)  y = MatMul(h, w) }}",
        {"w": LARGE},
        [("w", Role.LINEAR)] * 2,
    ),
    "a table": (f"({IDS}) => (float[B,Q,64] y) {{ y = Gather(w, ids) }}", {"w": TABLE}, [("w", Role.TABLE)]),
    "a head tied to a table": (
        f"({IDS}) => (float[B,Q,100] y) {{ h = Gather(w, ids)  t = Transpose<perm=[1,0]>(w)  y = MatMul(h, t) }}",
        {"w": TABLE},
        [("w", Role.TABLE), ("w", Role.HEAD)],
    ),
    "a head of its own": (
        f"({X}) => (float[B,Q,100] y) {{ t = Transpose(w)  y = MatMul(x, t) }}",
        {"w": TABLE},
        [("w", Role.HEAD)],
    ),
    "in the order of the nodes, not of the weights": (
        f"({X}) => (float[B,Q,64] y) {{ h = MatMul(x, b)  y = MatMul(h, a) }}",
        {"a": LARGE, "b": LARGE},
        [("b", Role.LINEAR), ("a", Role.LINEAR)],
    ),
}

STAY = {
    "small": (f"({X}) => (float[B,Q,63] y) {{ y = MatMul(x, w) }}", LARGE[:, :63]),
    "positions, picked by a length": (
        "(int64[B,Q] ids) => (float[Q,64] y) {"
        " s = Shape(ids)  n = Gather(s, one)  p = Range(zero, n, one)  y = Gather(w, p) }",
        TABLE,
    ),
    "columns of a table": (f"({IDS}) => (float[100,B,Q] y) {{ y = Gather<axis=1>(w, ids) }}", TABLE),
    "read by Add": (f"({IDS}, float[100,64] z) => (float[100,64] s) {{ y = Gather(w, ids)  s = Add(z, w) }}", TABLE),
    "an output of the graph": (f"({X}) => (float[B,Q,64] y, float[64,64] w) {{ y = MatMul(x, w) }}", LARGE),
    "an output when transposed": (
        f"({X}) => (float[B,Q,100] y, float[64,100] t) {{ t = Transpose(w)  y = MatMul(x, t) }}",
        TABLE,
    ),
    "not transposed by its Transpose": (
        f"({X}) => (float[B,Q,64] y) {{ t = Transpose<perm=[0,1]>(w)  y = MatMul(x, t) }}",
        LARGE,
    ),
    "a first operand": ("(float[64,Q] x) => (float[64,Q] y) { y = MatMul(w, x) }", LARGE),
    "both operands": ("(float[64,64] x) => (float[64,64] y) { h = MatMul(w, w)  y = Add(h, x) }", LARGE),
    "a table and a linear layer": (
        f"({IDS}) => (float[B,Q,64] y) {{ h = Gather(w, ids)  y = MatMul(h, w) }}",
        normal(64, 64),
    ),
    "transposed for someone else too": (
        f"({X}) => (float[B,Q,100] y, float[64,100] z) {{ t = Transpose(w)  y = MatMul(x, t)  z = Neg(t) }}",
        TABLE,
    ),
    "a convolution": ("(float[B,64,N] x) => (float[B,64,N] y) { y = Conv(x, w) }", normal(64, 64, 1)),
    "of float16": (
        "(float16[B,Q,64] x) => (float16[B,Q,64] y) { y = MatMul(x, w) }",
        LARGE.astype(np.float16),
    ),
    "read by nobody": (f"({X}) => (float[B,Q,64] y) {{ y = Neg(x) }}", LARGE),
}


@pytest.mark.parametrize("what", COUNT)
def test_products_and_tables_count(what: str) -> None:
    text, weights, expected = COUNT[what]
    found = reads(parsed(text, **weights).graph)
    assert [(read.name, read.role) for read in found] == expected


@pytest.mark.parametrize("what", STAY)
def test_everything_else_stays(what: str) -> None:
    text, weight = STAY[what]
    numbers = {"one": np.array(1), "zero": np.array(0)} if "Range" in text else {}
    assert reads(parsed(text, w=weight, **numbers).graph) == []


def test_the_least_size_counts_numbers() -> None:
    text = "(float[B,Q,16] x) => (float[B,Q,N] y) { y = MatMul(x, w) }"
    columns = LEAST_SIZE // 16
    assert [len(reads(parsed(text, w=normal(16, n)).graph)) for n in (columns - 1, columns)] == [0, 1]


def test_products_say_what_the_weight_is_multiplied_with() -> None:
    """Calibration exposes these values; a table is multiplied with nothing."""
    text, weights, _ = COUNT["a head tied to a table"]
    table, head = reads(parsed(text, **weights).graph)
    assert table.activations is None
    assert isinstance(head.activations, ir.Value)
    assert head.activations.name == "h"
