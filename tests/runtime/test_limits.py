"""Options as large as someone can type them: what they cost, and what is refused."""

from typing import Any

import numpy as np
import pytest

from tests.runtime.test_generate import RISING, Scripted, scripted
from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.errors import UsageError
from txopt.runtime.generate import generate, tokens
from txopt.runtime.options import GenerationOptions


@pytest.mark.parametrize("most", [10**12, 2**63 - 1])
@pytest.mark.parametrize("search", [{}, {"do_sample": True}, {"num_beams": 3}], ids=str)
def test_memory_is_taken_for_the_tokens_that_come_and_not_for_those_that_may(search: dict[str, Any], most: int) -> None:
    scores = np.zeros((1, 8), np.float32)
    scores[0, 3] = 50
    script = [scores] * 300 + [np.roll(scores, 4, axis=1)] * 2

    class UntilItEnds(Scripted):
        def step(self, ids: Ids) -> Floats:
            self.steps += 1
            return np.repeat(script[self.steps], len(self.scores), axis=0)

    def opened(copies: int) -> Scripted:
        return UntilItEnds(np.repeat(scores, copies, axis=0))

    options = GenerationOptions(max_new_tokens=most, eos_token_id=7, early_stopping=True, seed=1, **search)
    row = generate(opened, np.zeros((1, 2), np.int64), options).sequences[0].tolist()
    assert row == [0, 0, *[3] * 300, 7]
    if not search:
        streamed = [int(token[0]) for token in tokens(opened, np.zeros((1, 2), np.int64), options)]
        assert streamed == row[2:]


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("penalty", [1e6, -1e6, 200.0])
def test_a_length_penalty_beyond_float32_is_an_error_of_the_callers(penalty: float, early: bool | str) -> None:
    """transformers overflows where Python does, and below that gives every beam the same score."""
    options = GenerationOptions(num_beams=2, max_new_tokens=4, length_penalty=penalty, early_stopping=early)
    with pytest.raises(UsageError, match=r"length_penalty=.* in float32, so all beams would score the same"):
        generate(scripted(RISING), np.zeros((1, 1), np.int64), options)


def test_ids_of_another_vocabulary_cannot_be_penalised() -> None:
    options = GenerationOptions(max_new_tokens=2, encoder_repetition_penalty=2.0)
    with pytest.raises(
        UsageError, match=r"a source in the target's vocabulary of 8, got 8 in it; .* leave the option out"
    ):
        generate(scripted(RISING), np.zeros((1, 1), np.int64), options, encoder_ids=np.array([[3, 8]]))
