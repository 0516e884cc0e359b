"""Factors folded into norms and linear layers: no difference in float32, and nothing folded that would make one."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.calibration.graphs import engine, graph, linear, node, operators, rows
from tests.calibration.made import normal
from txopt.calibration.folding import fold, folds
from txopt.runtime.errors import InputError, UsageError

WIDTH = 64
FACTORS = np.exp(normal(WIDTH, seed=7)).astype(np.float32)


def constants(*names: str, width: int = WIDTH) -> dict[str, np.ndarray]:
    """Weights and biases of linear layers, and of a norm where it is asked for."""
    made = {}
    for seed, name in enumerate(names):
        shape = (width,) if name.startswith("norm") else (width, width)
        made[f"{name}.weight"] = normal(*shape, seed=seed) + (1 if name.startswith("norm") else 0)
        made[f"{name}.bias"] = normal(width, seed=seed + 50)
    return made


def normed(operator: str = "LayerNormalization", more: tuple = (), outputs: tuple[str, ...] = ("y",)) -> ir.Model:
    parts = "x norm.weight norm.bias" if operator == "LayerNormalization" else "x norm.weight"
    given = constants("norm", "left", "right")
    if operator != "LayerNormalization":
        del given["norm.bias"]
    return graph(
        node(operator, parts, "v", axis=-1),
        *linear("v", "left", "a"),
        *linear("v", "right", "b"),
        node("Add", "a b", "y"),
        *more,
        constants=given,
        inputs=rows(WIDTH),
        outputs=outputs,
    )


def chain(between: str | None = None) -> ir.Model:
    """Two linear layers, perhaps with an operator between them."""
    middle = (node(between, "u", "v"),) if between else ()
    return graph(
        *linear("x", "first", "u" if between else "v"),
        *middle,
        *linear("v", "second", "y"),
        constants=constants("first", "second"),
        inputs=rows(WIDTH),
    )


@pytest.mark.parametrize(
    "model",
    [normed(), normed("RMSNormalization"), chain(), chain("Relu")],
    ids=["LayerNormalization", "RMSNormalization", "linear", "linear and Relu"],
)
def test_factors_make_no_difference_and_no_node(model: ir.Model) -> None:
    x = normal(2, 3, WIDTH, seed=20)
    before, nodes = engine(model, x=x)[0], operators(model)
    first = model.graph.initializers["left.weight" if "left.weight" in model.graph.initializers else "second.weight"]
    old = first.const_value.numpy().copy()
    fold(model.graph, {"v": FACTORS})
    after = engine(model, x=x)[0]
    assert np.abs(after - before).max() <= 1e-5 * max(1, np.abs(before).max())
    assert operators(model) == nodes
    new = model.graph.initializers[first.name].const_value.numpy()
    assert np.allclose(new, FACTORS[:, None] * old, rtol=1e-6)


def test_the_value_itself_is_divided() -> None:
    model = normed()
    weight = model.graph.initializers["norm.weight"].const_value.numpy().copy()
    bias = model.graph.initializers["norm.bias"].const_value.numpy().copy()
    fold(model.graph, {"v": FACTORS})
    assert np.allclose(model.graph.initializers["norm.weight"].const_value.numpy(), weight / FACTORS, rtol=1e-6)
    assert np.allclose(model.graph.initializers["norm.bias"].const_value.numpy(), bias / FACTORS, rtol=1e-6)


def test_a_constant_that_others_read_keeps_its_numbers_for_them() -> None:
    """Equal norms of several layers are one tensor: every layer divides a copy of its own."""
    given = constants("norm", "left", "right")
    model = graph(
        node("LayerNormalization", "x norm.weight norm.bias", "v", axis=-1),
        *linear("v", "left", "u"),
        node("LayerNormalization", "u norm.weight norm.bias", "w", axis=-1),
        *linear("w", "right", "y"),
        constants=given,
        inputs=rows(WIDTH),
    )
    x = normal(2, 3, WIDTH, seed=20)
    before = engine(model, x=x)[0]
    fold(model.graph, {"v": FACTORS})
    assert np.abs(engine(model, x=x)[0] - before).max() <= 1e-5 * np.abs(before).max()
    assert np.array_equal(model.graph.initializers["norm.weight"].const_value.numpy(), given["norm.weight"])
    fold(model.graph, {"w": FACTORS})
    assert np.abs(engine(model, x=x)[0] - before).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (chain("Gelu"), "Gelu makes it"),
        (chain("Sigmoid"), "Sigmoid makes it"),
        (normed(more=(node("Neg", "v", "z"),), outputs=("y", "z")), "Neg reads it too"),
        (normed(outputs=("y", "v")), "an output of the graph"),
        (
            graph(*linear("v", "only", "y"), constants=constants("only"), inputs={"v": (1, ["B", "T", WIDTH])}),
            "an input of the graph",
        ),
        (
            graph(
                *linear("x", "first", "v"),
                *linear("v", "second", "u"),
                *linear("u", "second", "y"),
                constants=constants("first", "second"),
                inputs=rows(WIDTH),
            ),
            "second.weight is multiplied with something else too",
        ),
        (
            graph(
                *linear("x", "first", "u"),
                node("Add", "x u", "v"),
                *linear("v", "second", "y"),
                constants=constants("first", "second"),
                inputs=rows(WIDTH),
            ),
            "a sum makes it",
        ),
        (
            graph(
                *linear("x", "first", "u"),
                node("Relu", "u", "v"),
                *linear("v", "second", "w"),
                node("Add", "u w", "y"),
                constants=constants("first", "second"),
                inputs=rows(WIDTH),
            ),
            "read by others than its Relu",
        ),
        (
            graph(
                node("LayerNormalization", "x norm.weight norm.bias", "v", axis=-1),
                node("Transpose", "table", "head", perm=[1, 0]),
                node("MatMul", "v head", "y"),
                constants={**constants("norm"), "table": normal(80, WIDTH)},
                inputs=rows(WIDTH),
            ),
            r"table is a table \[V,M\]",
        ),
    ],
    ids=["Gelu", "Sigmoid", "another reader", "output", "input", "shared weight", "sum", "before Relu", "table"],
)
def test_what_would_need_a_node_or_change_a_result_is_refused(model: ir.Model, reason: str) -> None:
    assert "v" not in folds(model.graph)[0]
    with pytest.raises(UsageError, match=reason):
        fold(model.graph, {"v": FACTORS})


def test_a_value_that_nobody_multiplies_is_refused() -> None:
    with pytest.raises(UsageError, match="no product reads"):
        fold(chain().graph, {"nothing": FACTORS})


@pytest.mark.parametrize("factors", [FACTORS[:-1], -FACTORS, 0 * FACTORS, np.full(WIDTH, np.nan)])
def test_factors_are_positive_numbers_one_for_each_channel(factors: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected 64 positive factors"):
        fold(chain().graph, {"v": factors})
