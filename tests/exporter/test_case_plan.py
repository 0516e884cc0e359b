"""Which reference cases a model is asked for: all its positions where they are few, the grown buffer where they are not."""

import pytest

from txopt.exporter.case_plan import PADDED, PAST_THE_BUCKET, SINGLE, plans
from txopt.exporter.source import Facts


def facts(kind: str, limit: int | None, source_limit: int | None = None) -> Facts:
    return Facts(
        kind=kind,
        family="any",
        task="translation",
        generation={},
        inputs=(),
        vocabulary=50,
        source_vocabulary=50,
        limit=limit,
        source_limit=source_limit,
    )


@pytest.mark.parametrize("limit", [None, 69, 512])
def test_a_model_with_room_outgrows_its_first_buffer(limit: int | None) -> None:
    assert plans(facts("encoder-decoder", limit)) == ([SINGLE, PADDED, PAST_THE_BUCKET], [])


@pytest.mark.parametrize("limit", range(2, 69))
@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_a_model_with_few_positions_is_led_to_the_last_of_them(kind: str, limit: int) -> None:
    chosen, skipped = plans(facts(kind, limit))
    last = chosen[-1]
    assert last.name == "to-the-last-position"
    assert sum(last.schedule) + (max(last.rows) if kind == "decoder" else 0) == limit
    for plan in chosen:
        assert all(queries > 0 for queries in plan.schedule)
        assert sum(plan.schedule) + (max(plan.rows) if kind == "decoder" else 0) <= limit
    assert f"the model has {limit} target positions" in skipped[0]


def test_sources_fit_their_positions() -> None:
    chosen, _ = plans(facts("encoder-decoder", None, source_limit=4))
    assert [plan.rows for plan in chosen] == [(4,), (4, 4, 4), (3,)]


def test_an_encoder_has_no_calls_of_a_decoder() -> None:
    chosen, skipped = plans(facts("encoder", None))
    assert [plan.schedule for plan in chosen] == [(), ()]
    assert skipped == ["no decoder: nothing is generated"]
