"""Quantized weights as ONNX Runtime's operators: equal to the rounded weights, stored once, as small as promised."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.calibration.graphs import INT8, SCHEMES, engine, operators, parsed, rounded
from tests.calibration.made import normal
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.quantize import is_weight, unfold
from txopt.calibration.recipe import SCHEMES as RECIPES
from txopt.exporter import weights
from txopt.exporter.lowering.blocks import lower_blocks
from txopt.exporter.lowering.ort import lower_for_cpu
from txopt.exporter.lowering.storage import store

Arrays = dict[str, NDArray[Any]]

# Text of a graph over x [B,Q,K] or ids [B,Q], its weights, the operators of its lowering.
LINEAR = "(float[B,Q,K] x) => (float[B,Q,N] y)"
GRAPHS: dict[str, tuple[str, Arrays, list[str]]] = {
    "linear": (f"{LINEAR} {{ y = MatMul(x, w) }}", {"w": normal(128, 70)}, ["MatMulNBits"]),
    "with bias": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, b) }}",
        {"w": normal(128, 70), "b": normal(70)},
        ["MatMulNBits"],
    ),
    "with the bias first": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(b, p) }}",
        {"w": normal(128, 70), "b": normal(70)},
        ["MatMulNBits"],
    ),
    "K no multiple of the block": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, b) }}",
        {"w": normal(100, 65), "b": normal(65)},
        ["MatMulNBits"],
    ),
    "K shorter than a block": (f"{LINEAR} {{ y = MatMul(x, w) }}", {"w": normal(24, 300)}, ["MatMulNBits"]),
    "a number added is no bias": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, b) }}",
        {"w": normal(128, 70), "b": normal(1)},
        ["Add", "MatMulNBits"],
    ),
    "rows that are added are no bias": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, b) }}",
        {"w": normal(128, 70), "b": normal(1, 1, 70)},
        ["Add", "MatMulNBits"],
    ),
    "a residual is no bias": (
        "(float[B,Q,K] x) => (float[B,Q,K] y) { p = MatMul(x, w)  y = Add(p, x) }",
        {"w": normal(128, 128)},
        ["Add", "MatMulNBits"],
    ),
    "a product that is read twice": (
        f"{LINEAR} {{ p = MatMul(x, w)  q = Add(p, b)  y = Mul(p, q) }}",
        {"w": normal(128, 70), "b": normal(70)},
        ["Add", "MatMulNBits", "Mul"],
    ),
    "a product that is an output": (
        "(float[B,Q,K] x) => (float[B,Q,N] p, float[B,Q,N] y) { p = MatMul(x, w)  y = Add(p, b) }",
        {"w": normal(128, 70), "b": normal(70)},
        ["Add", "MatMulNBits"],
    ),
    "a product and itself": (
        f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, p) }}",
        {"w": normal(128, 70)},
        ["Add", "MatMulNBits"],
    ),
    "one weight, two layers, one bias": (
        "(float[B,Q,K] x) => (float[B,Q,K] y) { p = MatMul(x, w)  q = Add(p, b)  y = MatMul(q, w) }",
        {"w": normal(128, 128) / 8, "b": normal(128)},
        ["MatMulNBits", "MatMulNBits"],
    ),
    "an untied head": (
        f"{LINEAR} {{ t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t) }}",
        {"w": normal(90, 128)},
        ["MatMulNBits"],
    ),
    "a tied head with bias": (
        "(int64[B,Q] ids) => (float[B,Q,N] y) { h = Gather(w, ids)  t = Transpose(w)  p = MatMul(h, t)  y = Add(b, p) }",
        {"w": normal(90, 128) / 8, "b": normal(90)},
        ["GatherBlockQuantized", "MatMulNBits"],
    ),
    "a tied head, a width that is no multiple of the block": (
        "(int64[B,Q] ids) => (float[B,Q,N] y) { h = Gather(w, ids)  t = Transpose(w)  y = MatMul(h, t) }",
        {"w": normal(90, 100) / 8},
        ["GatherBlockQuantized", "MatMulNBits", "Slice"],
    ),
    "a table": (
        "(int64[B,Q] ids) => (float[B,Q,M] y) { y = Gather<axis=0>(w, ids) }",
        {"w": normal(90, 128)},
        ["GatherBlockQuantized"],
    ),
    "a table, a width that is no multiple of the block": (
        "(int64[B,Q] ids) => (float[B,Q,M] y) { y = Gather(w, ids) }",
        {"w": normal(90, 70)},
        ["GatherBlockQuantized", "Slice"],
    ),
    "a table read by two inputs": (
        "(int64[B,Q] ids) => (float[B,Q,M] y) { a = Gather(w, ids)  n = Neg(a)  c = Gather(w, ids)  y = Mul(n, c) }",
        {"w": normal(90, 128)},
        ["GatherBlockQuantized", "GatherBlockQuantized", "Mul", "Neg"],
    ),
}


def feeds(model: ir.Model, what: str) -> Arrays:
    rows, columns = GRAPHS[what][1]["w"].shape
    ids = np.random.default_rng(1).integers(0, 90, (3, 5))
    ids[0, :2] = 0, 89  # the first row of a table and the last
    by_name: Arrays = {"ids": ids, "x": normal(3, 5, columns if "head" in what else rows, seed=1)}
    return {str(value.name): by_name[str(value.name)] for value in model.graph.inputs}


def exact(model: ir.Model) -> None:
    """Lets the engine leave activations in float32: slow, and only rounding apart from what the integers stand for."""
    for node in model.graph:
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)


def named(scheme: BlockScheme) -> str:
    return f"int{scheme.bits} {'symmetric' if scheme.symmetric else 'asymmetric'}"


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
@pytest.mark.parametrize("what", GRAPHS)
def test_a_lowered_graph_says_what_its_rounded_weights_say(what: str, scheme: BlockScheme) -> None:
    text, arrays, expected = GRAPHS[what]
    model = parsed(text, **arrays)
    given = feeds(model, what)
    before = engine(model, **given)
    assert rounded(model, scheme), "something was to be quantized"
    floats, lowered = model.clone(), model.clone()
    unfold(floats.graph)
    lower_blocks(lowered)
    exact(lowered)
    assert sorted(operators(lowered)) == expected
    assert not any(is_weight(node) for node in lowered.graph)
    for got, want, original in zip(engine(lowered, **given), engine(floats, **given), before, strict=True):
        assert got.shape == original.shape
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()), rtol=0)
        assert np.abs(got - original).max() > 1e-4, "the weights were rounded"


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
def test_integers_are_computed_with_unless_asked_not_to(scheme: BlockScheme) -> None:
    """accuracy_level 4 rounds activations too; codes that are wrong are wrong in both."""
    text, arrays, _ = GRAPHS["with bias"]
    model = parsed(text, **arrays)
    given = feeds(model, "with bias")
    rounded(model, scheme)
    floats = model.clone()
    unfold(floats.graph)
    (want,) = engine(floats, **given)
    lower_blocks(model)
    (quick,) = engine(model, **given)
    exact(model)
    (slow,) = engine(model, **given)
    assert 1e-3 < np.abs(quick - want).max() < 0.5
    np.testing.assert_allclose(slow, want, atol=1e-4, rtol=0)
    codes = next(value for name, value in model.graph.initializers.items() if name.endswith("/columns"))
    assert codes.const_value is not None
    turned = codes.const_value.numpy().copy()
    turned[0, 0, 0] ^= 8  # one bit of 35 thousand
    codes.const_value = ir.Tensor(turned, name=codes.name)
    (broken,) = engine(model, **given)
    assert np.abs(broken - want).max() > 0.01


STAYS = {
    "small": ("(float[B,Q,K] x) => (float[B,Q,N] y) { y = MatMul(x, w) }", normal(60, 60)),
    "positions": (
        "(int64[B,Q] ids) => (float[Q,K] y) { s = Shape<start=1>(ids)  n = Squeeze(s)  p = Range(zero, n, one)  y = Gather(w, p) }",
        normal(100, 64),
    ),
    "a convolution": ("(float[B,64,N] x) => (float[B,64,N] y) { y = Conv(x, w) }", normal(64, 64, 1)),
    "a table read by Add": (
        "(int64[B,Q] ids, float[90,64] x) => (float[B,Q,64] y, float[90,64] z) { y = Gather(w, ids)  z = Add(x, w) }",
        normal(90, 64),
    ),
    "a weight that is an output": (
        "(float[B,Q,64] x) => (float[B,Q,64] y, float[64,64] w) { y = MatMul(x, w) }",
        normal(64, 64),
    ),
    "a transposed weight that is an output": (
        "(float[B,Q,64] x) => (float[B,Q,64] y, float[64,64] t) { t = Transpose(w)  y = MatMul(x, t) }",
        normal(64, 64),
    ),
}


@pytest.mark.parametrize("what", STAYS)
def test_what_is_not_quantized_is_left_alone(what: str) -> None:
    text, weight = STAYS[what]
    numbers = {"zero": np.array(0), "one": np.array(1)} if what == "positions" else {}
    model = parsed(text, w=weight, **numbers)
    before = operators(model)
    assert rounded(model, INT8) == {}
    lower_for_cpu(model, "int8")
    assert operators(model) == before
    kept = model.graph.initializers["w"].const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), weight)


@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 20),
    scheme=st.sampled_from(SCHEMES),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_is_exact(rows: int, columns: int, scheme: BlockScheme, bias: bool, seed: int) -> None:
    """Widths are made large enough to count: rows * columns numbers or more."""
    columns += 4096 // rows
    text = f"{LINEAR} {{ p = MatMul(x, w)  y = Add(p, b) }}" if bias else f"{LINEAR} {{ y = MatMul(x, w) }}"
    extra = {"b": normal(columns, seed=seed + 1)} if bias else {}
    model = parsed(text, w=normal(rows, columns, seed=seed), **extra)
    assert len(rounded(model, scheme)) == 1
    floats = model.clone()
    unfold(floats.graph)
    lower_blocks(model)
    exact(model)
    x = {"x": normal(2, 3, rows, seed=seed + 2)}
    (got,), (want,) = engine(model, **x), engine(floats, **x)
    np.testing.assert_allclose(got, want, atol=1e-5 * max(1, np.abs(want).max()), rtol=0)


def test_constants_in_two_bytes_lose_nothing_and_outputs_keep_their_type() -> None:
    halves = np.round(normal(70) * 8) / 8
    model = parsed(
        "(float[B,70] x) => (float[B,70] y, float[70] halves) { p = Mul(x, narrow)  q = Add(p, wide)  y = Add(q, halves) }",
        narrow=halves,
        wide=normal(70),
        halves=halves,
    )
    given = {"x": normal(2, 70)}
    before = engine(model, **given)
    store(model.graph, ir.DataType.FLOAT16)
    types = {name: value.type.dtype.name for name, value in model.graph.initializers.items() if value.type}
    assert types == {"narrow": "FLOAT16", "wide": "FLOAT", "halves": "FLOAT"}
    for got, want in zip(engine(model, **given), before, strict=True):
        np.testing.assert_array_equal(got, want)


def shared() -> dict[str, ir.Model]:
    """An encoder and a decoder that look up one table, the decoder's head tied to it."""
    table = {"w": normal(300, 128) / 8}
    encoder = "(int64[B,Q] ids) => (float[B,Q,M] y) { y = Gather(w, ids) }"
    decoder = GRAPHS["a tied head with bias"][0].replace("p = MatMul(h, t)  y = Add(b, p)", "y = MatMul(h, t)")
    return {"encoder": parsed(encoder, **table), "decoder": parsed(decoder, **table)}


@pytest.mark.parametrize("scheme", SCHEMES, ids=named)
def test_a_tied_table_is_stored_once(scheme: BlockScheme, tmp_path: Path) -> None:
    """Encoder Gather, decoder Gather and head read the same bytes of one file."""
    models = shared()
    for model in models.values():
        rounded(model, scheme)
        lower_blocks(model)
    size = weights.write(models, tmp_path)
    places: dict[str, set[int]] = {}
    for model in models.values():
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                places.setdefault(name.removeprefix("w/"), set()).add(value.const_value.offset or 0)
    assert places["rows"] == places["columns"]
    assert {len(found) for found in places.values()} == {1}
    assert places.keys() == {"rows", "columns", "steps", *(() if scheme.symmetric else ("offsets",))}
    grids = 300 * 128 // scheme.block
    zeros = 0 if scheme.symmetric else -(-128 // scheme.block * scheme.bits // 8) * 300
    assert size == 300 * 128 * scheme.bits // 8 + 4 * grids + zeros


def t5_small(scale: int = 8) -> dict[str, ir.Model]:
    """Encoder and decoder with the weights of a T5-small whose width is divided by ``scale``: 6 layers each, one tied table."""
    width, inner, vocabulary = 512 // scale, 2048 // scale, 32128 // scale
    table = normal(vocabulary, width)
    found = {}
    for seed, (name, attentions) in enumerate({"encoder": 1, "decoder": 2}.items()):
        arrays: Arrays = {"table": table, "bias": normal(32, 8)}
        lines, h = ["h = Gather(table, ids)"], "h"
        for layer in range(6):
            sizes = [(width, width)] * 4 * attentions + [(width, inner), (inner, width)]
            for part, size in enumerate(sizes):
                weight = f"w{layer}_{part}"
                arrays[weight] = normal(*size, seed=1000 * seed + 50 * layer + part)
                lines.append(f"y{layer}_{part} = MatMul({h}, {weight})")
                h = f"y{layer}_{part}"
            for norm in range(attentions + 1):
                arrays[f"n{layer}_{norm}"] = normal(width, seed=layer + norm)
                lines.append(f"s{layer}_{norm} = Mul({h}, n{layer}_{norm})")
                h = f"s{layer}_{norm}"
        lines += ["t = Transpose(table)", f"y = MatMul({h}, t)"] if name == "decoder" else [f"y = Neg({h})"]
        lines.append("z = Neg(bias)")
        found[name] = parsed(f"(int64[B,Q] ids) => (float[B,Q,N] y, float[32,8] z) {{ {'  '.join(lines)} }}", **arrays)
    return found


@pytest.mark.parametrize(("precision", "most"), [("int8", 0.27), ("int4", 0.17)])
def test_a_t5_small_is_as_small_as_promised(precision: str, most: float, tmp_path: Path) -> None:
    (tmp_path / "fp32").mkdir()
    before = weights.write(t5_small(), tmp_path / "fp32")
    models, scheme = t5_small(), RECIPES[precision]
    for model in models.values():
        rounded(model, scheme)
        lower_for_cpu(model, precision)
    (tmp_path / precision).mkdir()
    after = weights.write(models, tmp_path / precision)
    assert scheme.bits / 32 < after / before <= most
