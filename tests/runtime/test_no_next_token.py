"""Scores that hold no next token end generate() with the same reason, however the token was to be chosen."""

from typing import Any

import numpy as np
import pytest

from tests.runtime.test_generate import scripted
from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.errors import TxoptError, UsageError
from txopt.runtime.generate import generate
from txopt.runtime.options import GenerationOptions
from txopt.runtime.sampling import log_softmax, softmax

PROMPT = np.zeros((2, 1), np.int64)
WIDTHS = (8, 300, 2000)  # topk.py sorts, selects and skips blocks
SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"renormalize_logits": True},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"num_beams": 3},
    {"num_beams": 3, "renormalize_logits": True},
    {"num_beams": 3, "do_sample": True},
    {"num_beams": 3, "do_sample": True, "min_p": 0.1, "renormalize_logits": True},
)


def scores(width: int) -> Floats:
    return np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)


def label(value: Any) -> str:
    return ",".join(f"{name}={entry}" for name, entry in value.items()) or "greedy"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("search", SEARCHES, ids=label)
def test_nan_is_told_as_nan(search: dict[str, Any], width: int) -> None:
    for place in (slice(3, 4), slice(None)):
        broken = scores(width)
        broken[1, place] = np.nan
        with pytest.raises(TxoptError, match=r"scores after \d+ tokens hold NaN.*remove_invalid_values=True") as caught:
            generate(scripted(broken), PROMPT, GenerationOptions(max_new_tokens=3, seed=0, **search))
        assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "search", [search for search in SEARCHES if {"do_sample", "num_beams"} & set(search)], ids=label
)
def test_an_infinity_that_no_distribution_has_is_told_as_one(search: dict[str, Any]) -> None:
    broken = scores(300)
    broken[1, 3] = np.inf
    with pytest.raises(TxoptError, match="NaN or infinity"):
        generate(scripted(broken), PROMPT, GenerationOptions(max_new_tokens=3, seed=0, **search))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("search", SEARCHES, ids=label)
def test_removing_every_token_is_the_users_fault(search: dict[str, Any], width: int) -> None:
    options = GenerationOptions(max_new_tokens=3, suppress_tokens=range(width), **search)
    with pytest.raises(
        UsageError, match=r"no token is left to choose after 1 tokens: expected suppress_tokens to leave"
    ):
        generate(scripted(scores(width)), PROMPT, options)


@pytest.mark.parametrize("search", SEARCHES, ids=label)
def test_every_option_that_took_part_is_named(search: dict[str, Any]) -> None:
    """Each of them leaves something; the first token is still found, the second is not."""
    options = GenerationOptions(
        max_new_tokens=5,
        suppress_tokens=range(2, 8),
        no_repeat_ngram_size=1,
        eos_token_id=1,
        min_new_tokens=4,
        **search,
    )
    with pytest.raises(
        UsageError, match="expected suppress_tokens and no_repeat_ngram_size and min_new_tokens to leave"
    ):
        generate(scripted(scores(8)), np.full((2, 1), 5), options)


@pytest.mark.parametrize("search", SEARCHES, ids=label)
def test_what_no_option_removed_is_no_fault_of_the_users(search: dict[str, Any]) -> None:
    class Nothing:
        def active(self, length: int) -> bool:
            return True

        def __call__(self, ids: Ids, scores: Floats) -> None:
            scores[:] = -np.inf

    with pytest.raises(TxoptError, match="the model or a processor of your own") as caught:
        generate(scripted(scores(8)), PROMPT, GenerationOptions(max_new_tokens=3, **search), processors=[Nothing()])
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("beams", [1, 2])
def test_an_end_raised_beyond_float32_is_still_an_end(beams: int) -> None:
    options = GenerationOptions(
        max_new_tokens=8, eos_token_id=1, exponential_decay_length_penalty=(1, 1e30), num_beams=beams
    )
    sequences = generate(scripted(scores(8) - 9), PROMPT, options).sequences
    assert (sequences[:, -1] == 1).all()
    assert sequences.shape[1] < 9


class DryAfterTheEnd:
    """Leaves the second source nothing after its first token, an end; the first source goes on."""

    def active(self, length: int) -> bool:
        return length > 1

    def __call__(self, ids: Ids, scores: Floats) -> None:
        scores[len(scores) // 2 :] = -np.inf


@pytest.mark.parametrize("beams", [1, 2])
def test_a_source_that_has_ended_may_run_dry(beams: int) -> None:
    rows = np.stack([np.arange(8), np.arange(8)]).astype(np.float32)
    rows[0, 7] = -99
    options = GenerationOptions(max_new_tokens=4, eos_token_id=7, pad_token_id=0, num_beams=beams)
    sequences = generate(scripted(rows), PROMPT, options, processors=[DryAfterTheEnd()]).sequences
    assert sequences[0].tolist() == [0, 6, 6, 6, 6]
    assert sequences[1, :2].tolist() == [0, 7]


def test_removed_rows_have_no_probability_and_others_all_of_it() -> None:
    some = np.array([[1.0, -np.inf, 1.0], [-np.inf, -np.inf, -np.inf]], np.float32)
    np.testing.assert_array_equal(softmax(some), [[0.5, 0, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(log_softmax(some), np.array([[-np.log(2), -np.inf, -np.log(2)], [-np.inf] * 3]))


def test_removed_tokens_survive_remove_invalid_values_at_low_temperatures() -> None:
    """They become the least float32, which halving the temperature takes beyond float32."""
    options = GenerationOptions(
        do_sample=True, temperature=0.5, bad_words_ids=[[3]], remove_invalid_values=True, max_new_tokens=3, seed=0
    )
    assert 3 not in generate(scripted(scores(8)), PROMPT, options).sequences
