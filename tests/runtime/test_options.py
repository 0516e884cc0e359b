"""Options are transformers' by name, default and meaning; whatever is wrong with them is said at once."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from transformers import GenerationConfig

from txopt.runtime.errors import UsageError
from txopt.runtime.options import NO_EFFECT, UNSUPPORTED, GenerationOptions

OWN = {"seed", "clip_length"}
NAMES = {field.name for field in dataclasses.fields(GenerationOptions)}


def test_every_option_of_transformers_has_its_place() -> None:
    """Supported, refused or without effect on ids; a new one of transformers' has to be put somewhere."""
    theirs = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert theirs - NAMES - set(UNSUPPORTED) - NO_EFFECT == set()
    assert theirs | {"bos_token_id", "pad_token_id", "decoder_start_token_id"} >= NAMES - OWN
    assert not NAMES & (set(UNSUPPORTED) | NO_EFFECT)


def test_defaults_are_transformers() -> None:
    theirs = {name: value for name, value in GenerationConfig._get_default_generation_params().items() if name in NAMES}
    theirs.pop("max_length")  # 20 new tokens, not a length of 20: see the test of generate()
    options = GenerationOptions()
    assert {name: getattr(options, name) for name in theirs} == theirs


def test_whole_generation_configs_can_be_given() -> None:
    assert GenerationOptions.merge(GenerationConfig(num_beams=3).to_dict(), {}).num_beams == 3
    GenerationOptions.merge(GenerationConfig._get_default_generation_params() | {"max_length": None}, {})


def test_an_override_beats_a_default_and_none_is_unset() -> None:
    options = GenerationOptions.merge(
        {"num_beams": 4, "length_penalty": 2.0, "max_length": 9, "eos_token_id": None},
        {"num_beams": 2, "length_penalty": None, "top_k": None},
    )
    assert (options.num_beams, options.length_penalty, options.max_length, options.top_k) == (2, 2.0, 9, 50)
    assert options.eos_ids == ()
    assert GenerationOptions.merge({}, {"num_return_sequences": None}).num_return_sequences == 1


@pytest.mark.parametrize(
    ("overrides", "clipped"),
    [({}, True), ({"max_length": 5}, False), ({"max_new_tokens": 5}, False), ({"top_k": 5}, True)],
)
def test_only_lengths_that_were_asked_for_are_insisted_on(overrides: dict[str, Any], clipped: bool) -> None:
    assert GenerationOptions.merge({"max_length": 7}, overrides).clip_length is clipped


def test_facts_of_a_front_end_among_the_defaults_are_left_alone() -> None:
    options = GenerationOptions.merge({"lang_to_id": {"<|en|>": 5}, "is_multilingual": True, "num_beams": 2}, {})
    assert options.num_beams == 2
    with pytest.raises(UsageError, match="lang_to_id is no generation option"):
        GenerationOptions.merge({}, {"lang_to_id": {}})


def test_values_are_normalised() -> None:
    given: dict[str, Any] = {
        "eos_token_id": np.int64(3),
        "forced_eos_token_id": np.array([3, 4]),
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1], [2, 3]],
        "temperature": 2,
        "num_beams": np.int32(2),
        "early_stopping": np.True_,
        "exponential_decay_length_penalty": [3, 1],
    }
    options = GenerationOptions(**given)
    assert options.eos_ids == (3,)
    assert options.forced_eos_ids == (3, 4)
    assert options.suppress_tokens == (1, 2)
    assert options.bad_words_ids == ((1,), (2, 3))
    assert options.exponential_decay_length_penalty == (3, 1.0)
    assert isinstance(options.temperature, float)
    assert type(options.num_beams) is int
    assert options.early_stopping is True
    hash(options)


@pytest.mark.parametrize(("pad", "eos", "expected"), [(0, 5, 0), (None, [5, 6], 5), (None, None, None), (1, None, 1)])
def test_padding_is_the_first_end_of_sequence_unless_said(pad: Any, eos: Any, expected: int | None) -> None:
    assert GenerationOptions(pad_token_id=pad, eos_token_id=eos).padding == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams: expected an integer, at least 1, got 0"),
        ({"num_beams": 2.0}, "num_beams: expected an integer, at least 1, got 2.0"),
        ({"num_beams": True}, "num_beams: expected an integer, at least 1, got True"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an integer, at least 1"),
        ({"max_length": "9"}, "max_length: expected an integer"),
        ({"min_length": -1}, "min_length: expected an integer, at least 0"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or 'never', got 'always'"),
        ({"do_sample": "yes"}, "do_sample: expected True or False"),
        ({"temperature": -1}, "temperature: expected a number, at least 0"),
        ({"temperature": 0, "do_sample": True}, "temperature=0 cannot be sampled with"),
        ({"temperature": 1e-320, "do_sample": True}, "temperature=1e-320 cannot be sampled with: .*do_sample=False"),
        ({"temperature": 1e-31, "do_sample": True, "num_beams": 2}, "temperature=1e-31 cannot be sampled with"),
        ({"length_penalty": 10**400}, "length_penalty: expected a finite number"),
        (
            {"decoder_start_token_id": 2**63},
            "decoder_start_token_id: expected an integer, .*at most 9223372036854775807",
        ),
        ({"suppress_tokens": [-(2**63)]}, "suppress_tokens: expected a list of token ids"),
        ({"top_p": 1.1}, "top_p: expected a number from 0 to 1"),
        ({"top_p": float("nan")}, "top_p: expected a number from 0 to 1"),
        ({"top_k": -1}, "top_k: expected an integer, at least 0"),
        ({"typical_p": 0}, "typical_p: expected a number above 0"),
        ({"repetition_penalty": 0}, "repetition_penalty: expected a number above 0"),
        ({"length_penalty": "long"}, "length_penalty: expected a finite number"),
        ({"eos_token_id": "</s>"}, "eos_token_id: expected a token id or a list of them"),
        ({"forced_eos_token_id": -1}, "forced_eos_token_id: expected a token id or a list of them, each at least 0"),
        ({"suppress_tokens": 5}, "suppress_tokens: expected a list of token ids, got 5"),
        ({"bad_words_ids": [5]}, "bad_words_ids: expected a list of lists"),
        ({"bad_words_ids": [[]]}, "bad_words_ids: expected a list of lists"),
        ({"exponential_decay_length_penalty": 3}, "expected .start index, decay factor."),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "exponential_decay_length_penalty needs eos_token_id"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True or num_beams of at least 2"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 is more than num_beams=2"),
        ({"forced_bos_token_id": 4, "suppress_tokens": [3, 4]}, "forced_bos_token_id=.4. is also in suppress_tokens"),
        ({"seed": -1}, "seed: expected an integer, at least 0"),
        ({"num_beams": None}, "num_beams: expected an integer, at least 1, got None"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerationOptions(**options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_beam", 2, "num_beam is no generation option: did you mean num_beams"),
        ("max_tokens", 2, "did you mean .*max_new_tokens"),
        ("frobnicate", 2, "frobnicate is no generation option$"),
        ("guidance_scale", 1.5, "guidance_scale=1.5 is an option of transformers that txopt does not support"),
        ("num_beam_groups", 2, "does not support"),
        ("stop_strings", ["."], "does not support"),
    ],
)
def test_unknown_and_unsupported_options_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerationOptions.merge({}, {name: value})


def test_an_unsupported_default_is_refused_too_unless_it_does_nothing() -> None:
    with pytest.raises(UsageError, match="penalty_alpha"):
        GenerationOptions.merge({"penalty_alpha": 0.6}, {})
    GenerationOptions.merge({"penalty_alpha": 0, "num_beam_groups": 1, "guidance_scale": None, "use_cache": True}, {})
    GenerationOptions.merge({}, {"output_scores": True, "return_dict_in_generate": True})


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        GenerationOptions.merge({"diversity_penalty": 1.0}, {"num_beam": 2, "top_p": 7, "top_k": -3})
    for part in ("num_beam ", "diversity_penalty", "top_p", "top_k"):
        assert part in str(caught.value)
