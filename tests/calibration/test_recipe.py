"""Recipes for TensorRT: symmetric, blocks that come out even, and nothing rounded but weights."""

import pytest

from tests.calibration.graphs import parsed
from tests.calibration.made import normal
from txopt.calibration.blocks import BlockScheme
from txopt.calibration.linears import Role
from txopt.calibration.recipe import COLUMNS, Recipe, recipe_of
from txopt.runtime.errors import UsageError

PRODUCTS = parsed(
    "(int64[B,Q] ids, float[B,Q,128] x, float[B,Q,100] z) => (float[B,Q,N] y, float[B,Q,M] u, float[B,Q,N] v) "
    "{ u = Gather(table, ids)  y = MatMul(x, even)  v = MatMul(z, odd) }",
    even=normal(128, 70),
    odd=normal(100, 70),
    table=normal(70, 100),
)


def scheme(recipe: Recipe, name: str) -> BlockScheme | None:
    return recipe.scheme_of(name, graph="decoder", role=Role.TABLE if name == "table" else Role.LINEAR)


def test_zero_points_are_the_cpus_alone() -> None:
    assert not Recipe.of("int4").scheme.symmetric
    for precision, expected in (("int8", COLUMNS), ("int4", BlockScheme(bits=4, block=64))):
        recipe = Recipe.of(precision, "tensorrt")
        assert recipe.scheme == expected
        assert recipe.scheme.symmetric
        assert not recipe.rounds_activations
    assert Recipe.of("int8").rounds_activations


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_blocks_are_as_long_as_one_says(precision: str, block: int) -> None:
    asked = recipe_of("weights", precision, "tensorrt", block=block)
    assert isinstance(asked, Recipe)
    assert asked.scheme == BlockScheme(bits={"int8": 8, "int4": 4}[precision], block=block)
    assert asked.form("w", graph="encoder", role=Role.LINEAR) == f"{asked.scheme.bits} bits in blocks of {block}"


def test_what_no_block_divides_has_whole_columns_of_8_bits() -> None:
    """TensorRT: "The quantization axis must divide into whole blocks"."""
    recipe = Recipe.of("int4", "tensorrt").fitted([PRODUCTS.graph])
    assert recipe.uneven == {"odd", "table"}
    assert scheme(recipe, "even") == BlockScheme(bits=4, block=64)
    assert scheme(recipe, "odd") == scheme(recipe, "table") == COLUMNS
    assert Recipe.of("int4").fitted([PRODUCTS.graph]) == Recipe.of("int4")
    assert Recipe.of("int8", "tensorrt").fitted([PRODUCTS.graph]).uneven == frozenset()


def test_finer_is_8_bits_for_4_and_float_for_8() -> None:
    four = Recipe.of("int4", "tensorrt").fitted([PRODUCTS.graph]).with_finer({"even", "odd"})
    assert (scheme(four, "even"), scheme(four, "odd")) == (COLUMNS, None)
    for block in (None, 64):
        eight = Recipe.of("int8", "tensorrt", block=block).with_finer({"even"})
        assert (scheme(eight, "even"), eight.form("even", graph="decoder", role=Role.LINEAR)) == (None, None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("weights", "int8", "cuda"), "target: expected one of cpu, tensorrt for weights of integers, got 'cuda'"),
        (("rows", "int8", "tensorrt"), "expected cpu, which alone rounds activations row by row, got 'tensorrt'"),
        (("mixed", "int8", "tensorrt"), "for tensorrt take the scheme weights or static"),
        (("weights", "fp8", "tensorrt"), "precision: fp8 is for --scheme static"),
    ],
)
def test_what_a_target_does_not_have_is_refused(asked: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(*asked)


def test_a_width_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="block: expected 16, 32, 64, 128 or 256 rows, got 48"):
        recipe_of("weights", "int4", "tensorrt", block=48)
