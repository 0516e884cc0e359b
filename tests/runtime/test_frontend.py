"""The manifest's front end: what any of its keys may not be is refused by name, when the manifest is read."""

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.artifacts import manifest, tensor
from tests.runtime.test_audio import FRONTEND as AUDIO
from txopt.runtime.errors import ArtifactError
from txopt.runtime.frontend import COMMON, KEYS, frontend_problems
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.manifest import Manifest

TEXT: dict[str, Any] = {
    "type": "text",
    "tokenizer": "tokenizer.json",
    "target_tokenizer": "tokenizer.json",
    "max_source_length": 64,
    "add_special_tokens": True,
    "pad_token_id": 0,
    "padding_side": "right",
    "clean_up_tokenization_spaces": False,
    "languages": {"en": 5, "de": 6},
    "source_template": ["source_language", "text", 1],
    "source_language": "en",
    "target_language": None,
    "language_marks": [">>", "<<"],
    "unknown_from": None,
    "unknown_prefix": "\x00",
    "unk_token_id": 3,
    "source_vocabulary": 32,
    "source_positions": None,
    "bounds": {"context_ids": {"vocabulary": 32, "positions": None}},
}
SPEECH: dict[str, Any] = AUDIO | {
    "dither": 0.0,
    "multilingual": True,
    "lang_to_id": {"<|en|>": 1},
    "task_to_id": {"transcribe": 2},
    "language_names": {"english": "en"},
    "no_timestamps_token_id": 3,
    "timestamp_begin": 4,
}
WAVEFORM: dict[str, Any] = {
    "type": "waveform",
    "sampling_rate": 16000,
    "padding_value": 0.0,
    "do_normalize": False,
    "least_samples": 400,
    "most_samples": None,
}
IMAGE: dict[str, Any] = {
    "type": "image",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_center_crop": True,
    "crop_size": {"height": 30, "width": 30},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": 0.5,
}
ARRAYS = {"type": "arrays", "tokenizer": "tokenizer.json"}
WHOLE = {"text": TEXT, "audio": SPEECH, "waveform": WAVEFORM, "image": IMAGE, "arrays": ARRAYS}
WRONG: tuple[tuple[str, str, Any, str], ...] = (
    ("text", "max_source_length", "64", "an integer of at least 1, or null, found '64'"),
    ("text", "max_source_length", 64.0, "an integer of at least 1, or null, found 64.0"),
    ("text", "max_source_length", True, "an integer of at least 1, or null, found True"),
    ("text", "max_source_length", 0, "an integer of at least 1, or null, found 0"),
    ("text", "max_source_length", 2, "at least 3, for a token beside the 2 that source_template puts around it, found 2"),
    ("text", "tokenizer", None, "a file name, found None"),
    ("text", "target_tokenizer", ["tokenizer.json"], "a file name, found a list of 1"),
    ("text", "add_special_tokens", None, "true or false, found None"),
    ("text", "add_special_tokens", "false", "true or false, found 'false'"),
    ("text", "clean_up_tokenization_spaces", 1, "true or false, found 1"),
    ("text", "pad_token_id", -1, "an integer of at least 0, or null, found -1"),
    ("text", "padding_side", "middle", "one of left, right, found 'middle'"),
    ("text", "padding_side", ["left"], "one of left, right, found a list of 1"),
    ("text", "languages", 5, "an object of token ids, integers of at least 0, found 5"),
    ("text", "languages", {"en": "5"}, "an object of token ids"),
    ("text", "source_template", "text", "a list of token ids and of the words"),
    ("text", "source_template", ["text", "text"], "once"),
    ("text", "source_template", [1, 2], "a list of token ids and of the words"),
    ("text", "source_template", ["text", "klingon"], "a list of token ids and of the words"),
    ("text", "source_template", ["text", -1], "a list of token ids and of the words"),
    ("text", "source_template", ["text", {}], "a list of token ids and of the words"),
    ("text", "source_language", 5, "text that is not empty, or null, found 5"),
    ("text", "language_marks", [">>"], "a list of two texts"),
    ("text", "language_marks", [">>", ""], "a list of two texts"),
    ("text", "unknown_from", 1.5, "an integer of at least 0, or null, found 1.5"),
    ("text", "unknown_prefix", 0, "text that is not empty, or null, found 0"),
    ("text", "unk_token_id", [3], "an integer of at least 0, or null, found a list of 1"),
    ("text", "timestamp_begin", "9", "an integer of at least 0, or null"),
    ("text", "source_vocabulary", 0, "an integer of at least 1, or null, found 0"),
    ("text", "source_positions", "512", "an integer of at least 1, or null, found '512'"),
    ("text", "bounds", {"context_ids": 32}, "an object of vocabulary and positions, integers of at least 1 or null"),
    ("text", "bounds", {"context_ids": {"vocabulary": 0}}, "an object of vocabulary and positions"),
    ("text", "bounds", {"context_ids": {"words": 3}}, "an object of vocabulary and positions"),
    ("text", "labels", ["a", "b"], "an object of names"),
    ("text", "labels", {"0": "a", "2": "b"}, '"0" and on without gaps'),
    ("text", "labels", {"0": 5}, "an object of names"),
    ("text", "scores", "sigmoidal", "one of softmax, sigmoid, none, found 'sigmoidal'"),
    ("audio", "feature_size", 0, "an integer from 1 to 4096, found 0"),
    ("audio", "sampling_rate", 10**12, "an integer from 1000 to 768000"),
    ("audio", "n_fft", 1, "an integer from 2 to 65536, found 1"),
    ("audio", "hop_length", 0, "an integer of at least 1, found 0"),
    ("audio", "hop_length", 10**9, "no more than the samples of chunk_length seconds, found 1000000000 and 480000"),
    ("audio", "chunk_length", "30", "seconds, a number above 0 and at most 600, found '30'"),
    ("audio", "chunk_length", 0, "a number above 0"),
    ("audio", "padding_value", None, "a number from"),
    ("audio", "dither", "0", "a number from"),
    ("audio", "multilingual", "yes", "true or false, found 'yes'"),
    ("audio", "lang_to_id", None, "an object of token ids"),
    ("audio", "task_to_id", {"transcribe": None}, "an object of token ids"),
    ("audio", "language_names", {"english": 1}, "an object of language codes"),
    ("audio", "no_timestamps_token_id", "3", "an integer of at least 0, or null"),
    ("waveform", "sampling_rate", 999, "an integer from 1000 to 768000, found 999"),
    ("waveform", "padding_value", "0", "a number from"),
    ("waveform", "do_normalize", 0, "true or false, found 0"),
    ("waveform", "least_samples", 0, "an integer of at least 1, or null, found 0"),
    ("waveform", "most_samples", 1.5, "an integer of at least 1, or null, found 1.5"),
    ("image", "do_resize", "true", "true or false"),
    ("image", "size", 32, "an object, or null, found 32"),
    ("image", "size", None, "what do_resize needs, found null"),
    ("image", "size", {"longest_edge": 3}, "height and width or shortest_edge, integers from 1 to 65536, found 'longest_"),
    ("image", "size", {"shortest_edge": "32"}, "integers from 1 to 65536, found 'shortest_edge': '32'"),
    ("image", "crop_size", {"height": 0, "width": 30}, "height and width, integers from 1 to 65536"),
    ("image", "resample", 6, "an integer from 0 to 5, found 6"),
    ("image", "rescale_factor", "1/255", "a number from"),
    ("image", "image_mean", [0.5, 0.5], "one for each of 3 channels, or null, found a list of 2"),
    ("image", "image_mean", [0.5, 0.5, None], "one for each of 3 channels"),
    ("image", "image_std", [0.5, 0, 0.5], "a number above 0"),
    ("arrays", "tokenizer", 5, "a file name, found 5"),
)  # fmt: skip


def test_the_least_sound_is_not_longer_than_the_longest() -> None:
    with pytest.raises(
        ArtifactError, match=r"frontend\.least_samples: expected no more than most_samples, 300, found 400"
    ):
        with_frontend(WAVEFORM | {"most_samples": 300})


def with_frontend(frontend: dict[str, Any]) -> Manifest:
    document = json.loads(json.dumps(manifest().to_json()))
    return Manifest.from_json(document | {"frontend": frontend})


@pytest.mark.parametrize("kind", WHOLE)
def test_what_fits_is_read(kind: str) -> None:
    assert with_frontend(WHOLE[kind]).frontend == WHOLE[kind]


@pytest.mark.parametrize("kind", ["text", "audio", "waveform", "image"])
def test_every_key_is_tried_above(kind: str) -> None:
    tried = {key for found, key, *_ in WRONG if found == kind} | ({"type"} if kind == "text" else set())
    alike = {"do_center_crop", "do_rescale", "do_normalize", "target_language"}  # as do_resize and source_language
    assert KEYS[kind].keys() - tried - alike == set()
    assert COMMON.keys() - {key for _, key, *_ in WRONG} == set()


@pytest.mark.parametrize(("kind", "key", "value", "message"), WRONG)
def test_a_wrong_key_is_refused_by_name(kind: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(ArtifactError) as error:
        with_frontend(WHOLE[kind] | {key: value})
    assert f"frontend.{key}: expected " in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("text", "tokenizer"),
        *(("audio", key) for key in ("feature_size", "sampling_rate", "n_fft", "hop_length", "chunk_length", "lang_to_id")),
        *(("image", key) for key in ("size", "crop_size", "rescale_factor", "image_mean", "image_std")),
    ],
)  # fmt: skip
def test_what_a_front_end_needs_must_be_there(kind: str, key: str) -> None:
    with pytest.raises(ArtifactError, match=rf"frontend\.{key}: expected .*, found no such key"):
        with_frontend({name: value for name, value in WHOLE[kind].items() if name != key})


def test_a_step_that_is_not_taken_needs_nothing() -> None:
    with_frontend({"type": "image", "do_resize": False, "size": {"longest_edge": 3}})
    with_frontend({"type": "audio", **{key: SPEECH[key] for key in SPEECH if "lang" not in key}, "multilingual": False})


def test_all_wrong_keys_are_named_at_once() -> None:
    with pytest.raises(ArtifactError) as error:
        with_frontend(TEXT | {"max_source_length": "64", "languages": 5, "add_special_tokens": None})
    assert all(key in str(error.value) for key in ("max_source_length", "languages", "add_special_tokens"))


@pytest.mark.parametrize("labels", [{"0": "bad"}, {"0": "bad", "1": "good", "2": "ugly"}])
def test_a_classifier_has_a_label_for_each_class(labels: dict[str, str]) -> None:
    graph = GraphSpec(
        file="encoder.onnx",
        inputs=(tensor("input_ids", "int64", "B", "T"),),
        outputs=(tensor("logits", "float32", "B", 2),),
    )
    whole = dataclasses.replace(manifest(), kind="encoder", task="text-classification", graphs={"encoder": graph})
    facts = whole.frontend | {"labels": labels}
    with pytest.raises(ArtifactError, match=f"one for each of the 2 classes of logits, found {len(labels)}"):
        dataclasses.replace(whole, cache=None, frontend=facts).to_json()
    facts["labels"] = {"0": "bad", "1": "good"}
    dataclasses.replace(whole, cache=None, frontend=facts).to_json()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(WHOLE)), st.sampled_from(sorted({*TEXT, *SPEECH, *IMAGE})), ANYTHING)
def test_any_json_is_judged(kind: str, key: str, value: object) -> None:
    assert all(problem.startswith("frontend.") for problem in frontend_problems(WHOLE[kind] | {key: value}))
