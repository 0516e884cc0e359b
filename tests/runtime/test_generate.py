"""generate() gives the ids and scores of transformers' generate(), option by option, at next to no cost."""

import time
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.runtime.torch_decoder import VOCABULARY, TorchDecoder, tiny
from txopt.runtime.decoder import Floats, GenerationResult, Ids
from txopt.runtime.errors import InputError, TxoptError, UsageError
from txopt.runtime.generate import OpenDecoder, generate, tokens
from txopt.runtime.options import GenerationOptions

SCORE_TOLERANCE: dict[str, Any] = {
    "atol": 1e-4,
    "rtol": 1e-5,
}  # relative, for negative length penalties make large scores
STEP_BUDGET = 60e-6  # seconds of Python per greedy step at batch 1, the whole loop's
NEW: dict[str, Any] = {"max_new_tokens": 9}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Source:
    """Four rows of different lengths, padded on the side where the model expects it."""

    model: Any
    ids: torch.Tensor
    mask: torch.Tensor

    def open(self, copies: int) -> TorchDecoder:
        if not self.model.config.is_encoder_decoder:
            return TorchDecoder(self.model, {}, max_length=64)
        with torch.no_grad():
            memory = self.model.get_encoder()(input_ids=self.ids, attention_mask=self.mask).last_hidden_state
        memory, mask = memory.repeat_interleave(copies, 0), self.mask.repeat_interleave(copies, 0)
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=memory), "attention_mask": mask}
        return TorchDecoder(self.model, inputs, max_length=64)

    @property
    def prompt(self) -> Ids:
        if self.model.config.is_encoder_decoder:
            return np.full((len(self.ids), 1), self.model.generation_config.decoder_start_token_id)
        return self.ids.numpy()

    @property
    def prompt_mask(self) -> Ids | None:
        return None if self.model.config.is_encoder_decoder else self.mask.numpy()


@cache
def source(name: str) -> Source:
    model = tiny(name)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, VOCABULARY, (4, 7), generator=generator)
    mask = (torch.arange(7) < torch.tensor([[7], [4], [6], [2]])).long()
    if not model.config.is_encoder_decoder:
        mask = mask.flip(1)
    return Source(model, ids.masked_fill(mask == 0, model.config.pad_token_id), mask)


def ours(name: str, prompt: Ids | None = None, **options: Any) -> GenerationResult:
    given = source(name)
    merged = GenerationOptions.merge(given.model.generation_config.to_dict(), options)
    start = given.prompt if prompt is None else prompt
    return generate(given.open, start, merged, prompt_mask=given.prompt_mask, encoder_ids=given.ids.numpy())


def steps(name: str, options: dict[str, Any]) -> int:
    """How often the decoder runs."""
    given, decoders = source(name), list[TorchDecoder]()

    def remember(copies: int) -> TorchDecoder:
        decoders.append(given.open(copies))
        return decoders[-1]

    merged = GenerationOptions.merge(given.model.generation_config.to_dict(), options)
    generate(remember, given.prompt, merged, prompt_mask=given.prompt_mask)
    return sum(call != "reorder" for call in decoders[0].calls)


def theirs(name: str, **options: Any) -> Any:
    given = source(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths that do not fit together, of default lengths
        return given.model.generate(
            input_ids=given.ids,
            attention_mask=given.mask,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def assert_equal(name: str, options: dict[str, Any]) -> Ids:
    got, expected = ours(name, **options), theirs(name, **options)
    np.testing.assert_array_equal(got.sequences, expected.sequences.numpy())
    assert got.sequences.dtype == np.int64
    if options.get("num_beams", 1) == 1:
        assert got.scores is None
        assert got.beam_indices is None
    else:
        assert got.scores is not None
        assert got.scores.dtype == np.float32
        np.testing.assert_allclose(got.scores, expected.sequences_scores.numpy(), **SCORE_TOLERANCE)
        assert got.beam_indices is not None
        possible = got.scores > -1e8  # beams that nothing could fill are ties: PyTorch leaves open which one is named
        np.testing.assert_array_equal(got.beam_indices[possible], expected.beam_indices.numpy()[possible])
    return got.sequences


FREQUENT = {"t5": [27, 43, 42, 20], "bart": [18, 33, 21, 44], "gpt2": [34, 8, 28]}  # words that the models like to say
MODELS = ("t5", "bart", "gpt2")
BEAMS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3})

CONSTRAINTS: tuple[dict[str, Any], ...] = (
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"encoder_repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    {"encoder_no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 2},
    {"bad_words_ids": [[43], [13], [39, 34], [3, 32], [47, 47], [44, 17, 4], [1], [2]]},
    {"suppress_tokens": [37, 27, 42, 13, 46, 35]},
    {"suppress_tokens": [-1, 3, 99]},
    {"begin_suppress_tokens": [37, 32, 42, 15, 46, 35]},
    {"begin_suppress_tokens": [37, 32, 42, 15, 46, 35], "forced_bos_token_id": 9},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 6},
    {"forced_eos_token_id": [9, 6, 8], "suppress_tokens": [9, 8]},
    {"min_length": 9},
    {"min_new_tokens": 7},
    {"min_new_tokens": 3, "min_length": 12},
    {"min_new_tokens": 40},
    {"exponential_decay_length_penalty": (2, 1.4)},
    {"remove_invalid_values": True, "renormalize_logits": True},
    {"eos_token_id": 43},
    {"eos_token_id": [27, 18, 34, 8]},
    {"eos_token_id": [27, 18, 34], "pad_token_id": 3, "forced_eos_token_id": 18},
    {"eos_token_id": [token for token in range(2, VOCABULARY) if token % 5]},  # most continuations end
    {"forced_bos_token_id": 13, "bad_words_ids": [[13]], "begin_suppress_tokens": [13]},
    {"forced_eos_token_id": 13, "eos_token_id": 13, "min_length": 40},
    {"eos_token_id": -1},
    {"max_length": 9, "max_new_tokens": None},
    {"max_length": 40, "max_new_tokens": 3},
    {"max_new_tokens": 1},
    {"max_new_tokens": 1, "eos_token_id": 13, "forced_bos_token_id": 13},
)

SEARCHES: tuple[dict[str, Any], ...] = tuple(
    {"num_beams": beams, "early_stopping": early, "length_penalty": penalty, "num_return_sequences": returned}
    for beams, returned in ((2, 1), (3, 3), (4, 2))
    for early in (True, False, "never")
    for penalty in (-1.0, 0.0, 2.5)
)


def label(value: Any) -> str:
    return ",".join(f"{name}={entry}".replace(" ", "") for name, entry in value.items()) or "plain"


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=label)
@pytest.mark.parametrize("name", MODELS)
def test_constraints_give_transformers_ids_greedily_and_with_beams(name: str, constraint: dict[str, Any]) -> None:
    for beams in BEAMS:
        assert_equal(name, NEW | beams | constraint)


@pytest.mark.parametrize("search", SEARCHES, ids=label)
@pytest.mark.parametrize("name", MODELS)
def test_beams_stop_and_rank_as_transformers_do(name: str, search: dict[str, Any]) -> None:
    assert_equal(name, NEW | search)
    assert_equal(name, NEW | search | {"eos_token_id": FREQUENT[name], "max_new_tokens": 6})


@pytest.mark.parametrize("early", [True, False, "never"])
@pytest.mark.parametrize("name", MODELS)
def test_beams_take_as_many_steps_as_transformers_and_no_more(name: str, early: bool | str) -> None:
    seen = set()
    for penalty in (-2.0, 0.0, 1.0):
        options = {
            "num_beams": 3,
            "early_stopping": early,
            "length_penalty": penalty,
            "eos_token_id": list(range(3, VOCABULARY, 3)),
            "max_new_tokens": 16,
        }
        taken = steps(name, options)
        assert taken == len(theirs(name, **options).scores)
        seen.add(taken)
    assert min(seen) < 16, "a search that never stops early proves nothing"


@pytest.mark.parametrize("name", MODELS)
def test_the_cases_are_worth_comparing(name: str) -> None:
    """Rows differ, say different words and end at different lengths: otherwise equal ids would prove little."""
    for beams in BEAMS:
        new = ours(name, **NEW, **beams).sequences[:, source(name).prompt.shape[1] :]
        assert len(np.unique(new, axis=0)) >= 3
        assert len(np.unique(new)) >= 10
        new = ours(name, **NEW, **beams, eos_token_id=FREQUENT[name]).sequences[:, source(name).prompt.shape[1] :]
        ended = np.isin(new, FREQUENT[name])
        assert len(set(np.where(ended.any(axis=1), ended.argmax(axis=1), -1))) >= 2


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("beams", BEAMS, ids=label)
def test_a_decoder_prompt_of_several_tokens_is_continued(name: str, beams: dict[str, Any]) -> None:
    given = source(name)
    prompt = np.concatenate([given.prompt, [[9, 5], [6, 33], [21, 7], [8, 8]]], axis=1)
    options = {**NEW, **beams, "forced_bos_token_id": 4, "begin_suppress_tokens": [47, 37, 13], "min_length": 8}
    expected = theirs(name, decoder_input_ids=torch.tensor(prompt), **options).sequences
    np.testing.assert_array_equal(ours(name, prompt, **options).sequences, expected.numpy())


@pytest.mark.parametrize("name", MODELS)
def test_random_combinations_of_options_agree(name: str) -> None:
    random = np.random.default_rng(7)
    for _ in range(15):
        options: dict[str, Any] = dict(NEW)
        for constraint in random.choice(len(CONSTRAINTS), size=2, replace=False):
            options |= CONSTRAINTS[constraint]
        options |= SEARCHES[random.integers(len(SEARCHES))] if random.random() < 0.8 else {}
        assert_equal(name, options)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", BEAMS, ids=label)
def test_without_a_length_20_tokens_are_made(name: str, beams: dict[str, Any]) -> None:
    sequences = assert_equal(name, {**beams, "eos_token_id": -1})
    assert sequences.shape[1] == source(name).prompt.shape[1] + 20


@pytest.mark.parametrize("name", MODELS)
def test_streaming_gives_every_token_as_it_is_chosen(name: str) -> None:
    given = source(name)
    options = GenerationOptions.merge(given.model.generation_config.to_dict(), NEW)
    seen: list[Ids] = []
    result = generate(given.open, given.prompt, options, prompt_mask=given.prompt_mask, stream=seen.append)
    new = result.sequences[:, given.prompt.shape[1] :]
    np.testing.assert_array_equal(np.stack(seen, axis=1), new)

    decoder = given.open(1)
    stream = tokens(lambda copies: decoder, given.prompt, options, prompt_mask=given.prompt_mask)
    np.testing.assert_array_equal(next(stream), new[:, 0])
    assert decoder.calls == ["prefill"], "the first token must not wait for the second"
    np.testing.assert_array_equal(np.stack(list(stream), axis=1), new[:, 1:])


def test_beams_cannot_be_streamed() -> None:
    options = GenerationOptions(num_beams=2, max_new_tokens=3)
    with pytest.raises(UsageError, match="num_beams=2 cannot be streamed"):
        tokens(source("t5").open, source("t5").prompt, options)
    with pytest.raises(UsageError, match="num_beams=2 cannot be streamed"):
        generate(source("t5").open, source("t5").prompt, options, stream=print)


class Scripted:
    """Gives the same scores at every step; ``max_length`` as told."""

    def __init__(self, scores: Floats, max_length: int | None = None) -> None:
        self.scores, self.max_length, self.steps = scores, max_length, 0

    def prefill(self, ids: Ids, mask: Ids | None) -> Floats:
        return self.scores.copy()  # the caller's to write to

    def step(self, ids: Ids) -> Floats:
        self.steps += 1
        return self.scores.copy()

    def reorder(self, rows: Ids) -> None:
        pass


def scripted(scores: Floats, max_length: int | None = None) -> OpenDecoder:
    return lambda copies: Scripted(np.repeat(scores, copies, axis=0), max_length)


RISING = np.arange(8, dtype=np.float32)[None]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_length_beyond_the_model_is_refused_if_asked_for_and_else_clipped(beams: int) -> None:
    decoder, prompt = scripted(RISING, max_length=10), np.zeros((1, 4), np.int64)
    beam: dict[str, Any] = {"num_beams": beams}
    for asked in ({"max_new_tokens": 7}, {"max_length": 11}):
        with pytest.raises(UsageError, match=r"10 positions.*max_new_tokens=6 at most"):
            generate(decoder, prompt, GenerationOptions.merge(beam, asked))
    for options in (
        GenerationOptions(**beam),
        GenerationOptions.merge({"max_length": 99}, beam),
        GenerationOptions.merge({"max_new_tokens": 99}, beam),
        GenerationOptions.merge({"max_new_tokens": 99}, beam | {"max_new_tokens": 6}),
    ):
        assert generate(decoder, prompt, options).sequences.shape[1] == 10
    assert generate(scripted(RISING), prompt, GenerationOptions(max_new_tokens=7, **beam)).sequences.shape[1] == 11


def test_the_last_token_is_not_fed() -> None:
    decoder = Scripted(RISING)
    generate(lambda copies: decoder, np.zeros((1, 1), np.int64), GenerationOptions(max_new_tokens=5))
    assert decoder.steps == 4


@pytest.mark.parametrize(
    ("prompt", "mask", "message"),
    [
        (np.zeros(3, np.int64), None, r"expected int64 \[B,P\]"),
        (np.zeros((2, 0), np.int64), None, r"expected int64 \[B,P\]"),
        (np.zeros((2, 3), np.float32), None, r"got float32 \[2, 3\]"),
        (np.zeros((2, 3), np.int64), np.ones((2, 2)), r"the prompt's shape \[2, 3\], got \[2, 2\]"),
        (np.zeros((2, 3), np.int64), np.array([[1, 1, 1], [1, 1, 0]]), "pad on the left"),
        (np.zeros((2, 3), np.int64), np.array([[1, 1, 1], [1, 0, 1]]), "pad on the left"),
        (np.zeros((1, 10), np.int64), None, "10 tokens and this model at most 10 positions"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompt: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(scripted(RISING, 10), prompt, GenerationOptions(), prompt_mask=mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 3}, "max_length=3 leaves no room after a prompt of 3"),
        ({"bad_words_ids": [[8]]}, "bad_words_ids: expected ids below the vocabulary's 8, got 8"),
        ({"forced_eos_token_id": 8, "max_new_tokens": 1}, "forced_eos_token_id: expected an id below"),
    ],
)
def test_options_that_do_not_fit_the_model_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        generate(scripted(RISING), np.zeros((1, 3), np.int64), GenerationOptions(**options))


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"num_beams": 2, "do_sample": True}])
def test_nan_is_an_error_rather_than_a_token(options: dict[str, Any]) -> None:
    scores = RISING.copy()
    scores[0, 3] = np.nan
    with pytest.raises(TxoptError, match="NaN"):
        generate(scripted(scores), np.zeros((1, 1), np.int64), GenerationOptions(max_new_tokens=3, **options))


def test_of_equal_scores_the_lowest_beam_and_id_win() -> None:
    flat = np.zeros((1, 300), np.float32)
    prompt = np.zeros((1, 1), np.int64)
    options = GenerationOptions(num_beams=3, num_return_sequences=3, max_new_tokens=2)
    result = generate(scripted(flat), prompt, options)
    np.testing.assert_array_equal(result.sequences, [[0, 0, 0], [0, 0, 1], [0, 0, 2]])
    np.testing.assert_array_equal(generate(scripted(flat), prompt, GenerationOptions(max_new_tokens=2)).sequences, 0)


def test_processors_of_the_callers_own_are_applied() -> None:
    class OnlyEven:
        def active(self, length: int) -> bool:
            return length % 2 == 1

        def __call__(self, ids: Ids, scores: Floats) -> None:
            assert ids.shape[1] % 2 == 1
            scores[:, 1::2] = -np.inf

    options = GenerationOptions(max_new_tokens=4)
    prompt = np.zeros((1, 1), np.int64)
    result = generate(scripted(RISING), prompt, options, processors=[OnlyEven()])
    np.testing.assert_array_equal(result.sequences, [[0, 6, 7, 6, 7]])


def test_a_greedy_step_costs_little_python() -> None:
    """Everything but the decoder; generous, since machines are shared."""
    steps, scores = 2000, np.random.default_rng(0).normal(size=(1, 1000)).astype(np.float32)
    scores[0, 1] = -9
    options = GenerationOptions(max_new_tokens=steps, eos_token_id=1)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate(scripted(scores), np.zeros((1, 1), np.int64), options)
        times.append(time.perf_counter() - start)
    assert min(times) / steps < STEP_BUDGET
