"""The search: who gets a finer scheme, what is kept of an attempt, and which attempt is chosen."""

import json
from dataclasses import replace

import pytest

from txopt.calibration.bootstrap import Estimate
from txopt.calibration.linears import Role
from txopt.calibration.recipe import SCHEMES, Recipe, StaticRecipe
from txopt.calibration.search import Point, attempts, chosen, front
from txopt.calibration.sensitivity import Sensitivity
from txopt.calibration.speed import Speed

FOUND = [
    Sensitivity(graph="decoder", name=f"w{index}", role=Role.LINEAR, nats=1 / (index + 1), numbers=64)
    for index in range(32)
]


def point(size: int, loss: float, *, passed: bool = True, speed: tuple[float, float, float] | None = None) -> Point:
    return Point(
        bytes=size,
        loss=Estimate(value=loss, low=loss - 1, high=loss + 1),
        agreement=Estimate(value=99.0, low=98.0, high=100.0),
        finer=("w0",),
        passed=passed,
        speed=None if speed is None else Speed(low=speed[0], median=speed[1], high=speed[2]),
    )


def names(recipe: Recipe | StaticRecipe) -> list[str]:
    return [each.name for each in FOUND if each.name in recipe.finer]


def test_the_most_sensitive_come_first_and_twice_as_many_each_time() -> None:
    tried = [names(recipe) for recipe in attempts(Recipe.of("int4"), FOUND)]
    assert [len(each) for each in tried] == [2, 4, 8, 16, 32]
    assert tried[0] == ["w0", "w1"]


@pytest.mark.parametrize("recipe", [Recipe.of("int8"), StaticRecipe()])
def test_what_would_leave_all_in_float_is_no_attempt(recipe: Recipe | StaticRecipe) -> None:
    assert [len(names(each)) for each in attempts(recipe, FOUND)] == [2, 4, 8, 16]


def test_finer_is_int8_for_int4_and_float_for_the_rest() -> None:
    four, eight, static = (each.with_finer({"w0"}) for each in (Recipe.of("int4"), Recipe.of("int8"), StaticRecipe()))
    linear = {"graph": "decoder", "role": Role.LINEAR}
    assert four.scheme_of("w0", **linear) == replace(SCHEMES["int8"], block=32)
    assert four.form("w0", **linear) == "8 bits in blocks of 32"
    assert (eight.form("w0", **linear), static.form("w0", **linear)) == (None, None)
    assert all(each.form("w1", **linear) is not None for each in (four, eight, static))


def test_finer_in_the_encoder_is_blocks_for_columns_and_float_for_tables() -> None:
    mixed = Recipe.by_rows("int8", mixed=True).with_finer({"w0", "table"})
    assert mixed.form("w0", graph="encoder", role=Role.LINEAR) == "8 bits in blocks of 64"
    assert mixed.form("table", graph="encoder", role=Role.TABLE) is None


CHOICES = {
    "none holds": ([point(1, 3, passed=False), point(2, 2, passed=False)], None),
    "one holds": ([point(1, 3, passed=False), point(2, 2)], 1),
    "speeds that are not known decide nothing": ([point(1, 1), point(2, 0)], 0),
    "the smaller one where speeds are within noise": (
        [point(1, 1, speed=(1.0, 1.5, 2.0)), point(2, 0, speed=(1.9, 2.5, 3.0))],
        0,
    ),
    "a larger one that is faster by more than noise": (
        [point(1, 1, speed=(1.0, 1.5, 2.0)), point(2, 0, speed=(2.1, 2.5, 3.0))],
        1,
    ),
    "a fast one that does not hold is none": (
        [point(1, 3, passed=False, speed=(5.0, 6.0, 7.0)), point(2, 0, speed=(1.0, 1.1, 1.2))],
        1,
    ),
    "the last that beats what was chosen before": (
        [point(1, 1, speed=(1, 1, 1)), point(2, 1, speed=(2, 2, 2)), point(3, 1, speed=(1.5, 1.6, 1.7))],
        1,
    ),
}


@pytest.mark.parametrize("what", CHOICES)
def test_the_fastest_that_holds_is_chosen(what: str) -> None:
    points, expected = CHOICES[what]
    assert chosen(points) == expected


def test_the_choice_can_be_made_as_points_come() -> None:
    """The files of one attempt are kept, that of the point that is chosen by then."""
    points, _ = CHOICES["the last that beats what was chosen before"]
    assert [chosen(points[: count + 1]) for count in range(3)] == [0, 1, 1]


def test_a_point_in_front_is_beaten_by_none_in_all() -> None:
    points = [
        point(1, 3, speed=(1, 1, 1)),
        point(2, 2, speed=(2, 2, 2)),
        point(3, 2, speed=(2, 2, 2)),  # larger than the one before, and no better
        point(4, 2.5, speed=(3, 3, 3)),
    ]
    assert front(points) == [0, 1, 3]
    assert front([replace(each, speed=None) for each in points]) == [0, 1]


def test_a_certificate_has_no_timings() -> None:
    """Equal runs are equal bytes."""
    slow, fast = point(7, 0.25, speed=(1, 2, 3)), point(7, 0.25, speed=(4, 5, 6))
    assert json.dumps(slow.to_json()) == json.dumps(fast.to_json())
    assert slow.to_json() == {
        "weights_bytes": 7,
        "loss": {"value": 0.25, "low": -0.75, "high": 1.25},
        "forced_tokens": {"value": 99.0, "low": 98.0, "high": 100.0},
        "finer": ["w0"],
        "passed": True,
    }
