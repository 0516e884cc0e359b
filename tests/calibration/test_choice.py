"""The draw: the same sources whatever their order, spread over lengths, no more than asked for."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from txopt.calibration.choice import Candidate, Pool, place, spread

SOURCES = {f"source {number}": float(number * number) for number in range(200)}


def pool(names: list[str], most: int | None, seed: int = 0) -> Pool[str]:
    drawn: Pool[str] = Pool(most)
    for name in names:
        drawn.add(Candidate(place=place(seed, name.encode()), length=SOURCES[name], item=name))
    return drawn


def chosen(names: list[str], limit: int, total: float | None = None, seed: int = 0) -> list[str]:
    return [candidate.item for candidate in spread(pool(names, 8 * limit, seed).candidates(), limit, total)]


@given(st.randoms(use_true_random=False))
def test_neither_order_nor_repetition_changes_the_draw(shuffle: random.Random) -> None:
    names = [*SOURCES, *list(SOURCES)[:20]]
    shuffle.shuffle(names)
    assert chosen(names, 12) == chosen(list(SOURCES), 12)


def test_another_seed_draws_others() -> None:
    assert chosen(list(SOURCES), 12, seed=1) != chosen(list(SOURCES), 12)


def test_a_larger_data_set_keeps_what_comes_first_in_the_draw() -> None:
    half = [name for number, name in enumerate(SOURCES) if number % 2]
    first = {candidate.item for candidate in pool(list(SOURCES), 40).candidates()}
    assert first & set(half) <= {candidate.item for candidate in pool(half, 40).candidates()}


def test_every_stretch_of_lengths_gives_one() -> None:
    every = spread(pool(list(SOURCES), None).candidates(), 10, None)
    numbers = sorted(int(candidate.item.split()[1]) for candidate in every)
    assert [number // 20 for number in numbers] == list(range(10))


def test_a_pool_keeps_what_comes_first_and_counts_the_rest() -> None:
    drawn = pool([*SOURCES, *SOURCES], 16)
    assert (drawn.found, drawn.duplicates, len(drawn.candidates())) == (400, 200, 16)
    places = [candidate.place for candidate in drawn.candidates()]
    assert places == sorted(place(0, name.encode()) for name in SOURCES)[:16]


@pytest.mark.parametrize("total", [1.0, 900.0, 50_000.0, 1e9])
def test_lengths_sum_to_no_more_than_asked_for(total: float) -> None:
    names = chosen(list(SOURCES), 50, total)
    lengths = [SOURCES[name] for name in names]
    assert sum(lengths) <= total or len(lengths) == 1
    assert len(lengths) == 50 if total == 1e9 else len(lengths) < 50
    if total == 50_000.0:
        assert sum(lengths) > total / 2


def test_fewer_than_asked_for_are_all() -> None:
    assert set(chosen(["source 1", "source 2"], 5)) == {"source 1", "source 2"}
    assert chosen([], 5) == chosen([], 5, 1.0) == []
