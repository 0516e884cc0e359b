"""Sampling: the distribution is transformers', the draws follow it, and a seed repeats them."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from tests.runtime.test_generate import Scripted, scripted
from tests.runtime.torch_decoder import VOCABULARY, tiny
from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.generate import generate
from txopt.runtime.options import GenerationOptions
from txopt.runtime.processors import Processors, Request, constraints
from txopt.runtime.sampling import draw, draw_several, log_softmax, softmax, warpers

ROWS, DRAWS = 6, 4000
# Chi-squared per degree of freedom stays below this with a probability of 1 - 1e-9 at 20 degrees and more.
SURPRISE = 4.0


def theirs(options: dict[str, Any], ids: Ids, scores: Floats, prompt_length: int, max_length: int) -> Floats:
    model = tiny("gpt2")
    config = GenerationConfig(**{"eos_token_id": 2, "max_length": max_length} | options)
    for name, value in config._get_default_generation_params().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    model._prepare_special_tokens(config, device="cpu")
    processors = model._get_logits_processor(
        config, input_ids_seq_length=prompt_length, encoder_input_ids=torch.tensor(ids[:2, :5]), device="cpu"
    )
    result: Floats = processors(torch.tensor(ids), torch.tensor(scores)).numpy()
    return result


def ours(options: dict[str, Any], ids: Ids, scores: Floats, prompt_length: int, max_length: int) -> Floats:
    merged = GenerationOptions.merge({"eos_token_id": 2}, options)
    request = Request(prompt_length=prompt_length, max_length=max_length, encoder_ids=ids[:2, :5])
    result = scores.copy()
    Processors(constraints(merged, request), warpers(merged))(ids, result)
    return result


WARPERS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 200},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"min_p": 0.0},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"typical_p": 0.2},
    {"typical_p": 0.9},
    {"epsilon_cutoff": 0.02},
    {"epsilon_cutoff": 0.9},
    {"eta_cutoff": 0.02},
    {"eta_cutoff": 0.5},
    {"renormalize_logits": True},
)


def label(value: Any) -> str:
    return ",".join(f"{name}={entry}".replace(" ", "") for name, entry in value.items())


def assert_same_distribution(options: dict[str, Any], width: int = VOCABULARY, length: int = 9) -> None:
    random = np.random.default_rng(3)
    scores = (3 * random.normal(size=(ROWS, width))).astype(np.float32)
    ids = random.integers(3, 8, size=(ROWS, length))  # few different ones, so that n-grams repeat
    got, expected = (side(options, ids, scores, min(4, length), 30) for side in (ours, theirs))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_allclose(got, expected, atol=1e-4)
    np.testing.assert_allclose(softmax(got), torch.tensor(expected).softmax(-1).numpy(), atol=1e-6)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("warper", WARPERS, ids=label)
def test_each_filter_leaves_transformers_distribution(warper: dict[str, Any], beams: int) -> None:
    for width in (VOCABULARY, 1000):  # beyond a block of topk.py, too
        assert_same_distribution({"do_sample": True, "num_beams": beams, **warper}, width)


def test_filters_and_constraints_combine_in_transformers_order() -> None:
    random = np.random.default_rng(11)
    for _ in range(60):
        chosen: dict[str, Any] = {"do_sample": True, "num_beams": int(random.integers(1, 3))}
        for index in random.choice(len(WARPERS), size=3, replace=False):
            chosen |= WARPERS[index]
        chosen |= {
            "repetition_penalty": float(random.uniform(0.5, 2)),
            "encoder_repetition_penalty": float(random.uniform(0.5, 2)),
            "no_repeat_ngram_size": int(random.integers(0, 4)),
            "encoder_no_repeat_ngram_size": int(random.integers(0, 3)),
            "suppress_tokens": random.integers(3, VOCABULARY, size=4).tolist(),
            "bad_words_ids": random.integers(3, VOCABULARY, size=(5, int(random.integers(1, 3)))).tolist(),
            "min_new_tokens": int(random.integers(0, 8)),
            "exponential_decay_length_penalty": (int(random.integers(0, 8)), 1.3),
        }
        assert_same_distribution(chosen, length=int(random.integers(1, 10)))


def test_filters_need_do_sample() -> None:
    assert warpers(GenerationOptions(temperature=0.1, top_k=3, top_p=0.2, min_p=0.3, typical_p=0.4)) == []


def test_top_p_removes_a_tail_of_exactly_its_size() -> None:
    options, scores = {"do_sample": True, "top_p": 0.5}, np.log(np.array([[4, 2, 1, 1]], np.float32))
    got, expected = (side(options, PROMPT[:1], scores, 1, 30) for side in (ours, theirs))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_array_equal(np.isfinite(got), [[True, False, False, False]])


class Fixed(np.random.Generator):
    """Gives one number for ever."""

    def __init__(self, number: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.number = number

    def random(self, size: Any = None, *args: Any, **kwargs: Any) -> Any:
        return np.full(size, self.number)


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (np.nextafter(1, 0), 3)])
def test_a_removed_token_is_not_drawn_at_the_edges_either(number: float, token: int) -> None:
    scores = np.array([[-np.inf, 0.1, 0.7, -0.4, -np.inf]], np.float32)
    assert draw(scores, Fixed(number), 1, GenerationOptions()).tolist() == [token]


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 24)).astype(np.float32)
    scores[0, [0, 5, 23]] = -np.inf
    generator = np.random.default_rng(1)
    drawn = draw(np.repeat(scores, DRAWS, axis=0), generator, 1, GenerationOptions())
    assert surprise(np.bincount(drawn, minlength=24), softmax(scores)[0]) < SURPRISE


def test_several_tokens_are_drawn_without_replacement_as_multinomial_draws_them() -> None:
    """The first as if alone, the second by what is left."""
    scores = np.array([[0.0, 1.0, -np.inf, 2.0, 0.5]], np.float32)
    drawn = draw_several(np.repeat(scores, DRAWS, axis=0), 2, np.random.default_rng(2))
    assert (drawn[:, 0] != drawn[:, 1]).all()
    p = softmax(scores)[0].astype(np.float64)
    pairs = p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(pairs, 0)
    assert surprise(np.bincount(drawn[:, 0] * 5 + drawn[:, 1], minlength=25), pairs.ravel()) < SURPRISE


def surprise(counts: Ids, probabilities: Any) -> float:
    possible = probabilities > 0
    assert not counts[~possible].any(), "drew what cannot be"
    expected = probabilities[possible] * counts.sum()
    return float(((counts[possible] - expected) ** 2 / expected).sum() / (possible.sum() - 1))


SCORES = np.random.default_rng(4).normal(size=(2, 40)).astype(np.float32)
PROMPT = np.zeros((2, 1), np.int64)


@pytest.mark.parametrize("beams", [1, 3])
def test_a_seed_repeats_a_call_and_another_does_not(beams: int) -> None:
    def sample(seed: int | None) -> bytes:
        options = GenerationOptions(do_sample=True, num_beams=beams, max_new_tokens=12, seed=seed)
        return generate(scripted(SCORES), PROMPT, options).sequences.tobytes()

    assert sample(1) == sample(1)
    assert len({sample(1), sample(2), sample(None), sample(None)}) == 4


def test_the_loop_draws_from_the_filtered_distribution() -> None:
    options = GenerationOptions(
        do_sample=True, top_k=5, temperature=0.7, max_new_tokens=1, num_return_sequences=DRAWS, seed=0
    )
    result = generate(scripted(SCORES), PROMPT, options)
    assert result.sequences.shape == (2 * DRAWS, 2)
    for row, drawn in enumerate(result.sequences[:, 1].reshape(2, DRAWS)):
        expected = theirs({"do_sample": True, "top_k": 5, "temperature": 0.7}, PROMPT, SCORES, 1, 2)
        probabilities = torch.tensor(expected).softmax(-1).numpy()[row]
        assert surprise(np.bincount(drawn, minlength=40), probabilities) < SURPRISE


def test_rows_of_one_source_differ() -> None:
    options = GenerationOptions(do_sample=True, max_new_tokens=8, num_return_sequences=4, seed=0)
    assert len(np.unique(generate(scripted(SCORES), PROMPT, options).sequences, axis=0)) == 8


def test_beam_sampling_scores_are_the_log_probabilities_of_what_it_drew() -> None:
    options = GenerationOptions(
        do_sample=True,
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=6,
        temperature=0.8,
        length_penalty=2.0,
        seed=5,
    )
    result = generate(scripted(SCORES), PROMPT, options)
    assert result.scores is not None
    assert (np.diff(result.scores.reshape(2, 3)) <= 0).all()
    for row, (sequence, score) in enumerate(zip(result.sequences, result.scores, strict=True)):
        given = theirs({"do_sample": True, "num_beams": 3, "temperature": 0.8}, PROMPT, log_softmax(SCORES), 1, 7)
        assert score == pytest.approx(given[row // 3, sequence[1:]].sum() / 6**2, rel=1e-5)


def test_beam_sampling_draws_by_probability() -> None:
    """One step, the best of three draws without replacement: its frequency is known."""
    scores = np.array([[0.0, 1.0, 2.0, -np.inf]], np.float32)
    prompt = np.zeros((DRAWS, 1), np.int64)
    options = GenerationOptions(do_sample=True, num_beams=2, max_new_tokens=1, top_k=0, seed=6)
    decoder = Scripted(np.repeat(scores, 2 * DRAWS, axis=0))
    drawn = generate(lambda copies: decoder, prompt, options).sequences[:, 1]
    p = softmax(scores)[0].astype(np.float64)
    # Only the first two draws may end a beam; token 0 is their best only if it cannot be: 1 is, where 2 is not drawn.
    one = p[0] * p[1] / (1 - p[0]) + p[1] * p[0] / (1 - p[1])
    assert surprise(np.bincount(drawn, minlength=4), np.array([0, one, 1 - one, 0])) < 12
