"""TensorRT's runner on a fake of CUDA and TensorRT: the same ids as on the CPU, and limits that are told."""

from typing import Any

import numpy as np
import pytest

from tests.runtime.fake_cuda import FakeCuda
from tests.runtime.fake_tensorrt import FakeTensorRT
from tests.runtime.planned import IDS, MOST, SOURCE, Planned, open_both
from txopt.runtime.errors import InputError, LimitError, ParityError, TxoptError, UsageError
from txopt.runtime.model import load
from txopt.runtime.parity import replay
from txopt.runtime.parity import verify as proved
from txopt.runtime.row_decoder import RowDecoder
from txopt.runtime.running import Request, run

PROMPTS: dict[str, Any] = {"input_ids": IDS[:, ::-1].copy(), "attention_mask": (IDS[:, ::-1] != 0).astype(np.int64)}
SOUND: dict[str, Any] = {
    "input_features": np.sin(np.arange(2 * 80 * 100) ** 1.1).reshape(2, 80, 100).astype(np.float32)
}
SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 4, "num_return_sequences": 2, "no_repeat_ngram_size": 2},
    {"do_sample": True, "seed": 3, "num_return_sequences": 2},
    {"repetition_penalty": 1.5},
)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("search", SEARCHES, ids=str)
@pytest.mark.parametrize(
    ("name", "inputs"), [("g2p", SOURCE), ("t5", SOURCE), ("bart", SOURCE), ("gpt2", PROMPTS), ("whisper", SOUND)]
)
def test_generated_ids_are_those_of_the_cpu(name: str, inputs: Any, search: dict[str, Any], plans: Planned) -> None:
    cpu, gpu = open_both(plans(name))
    expected = cpu.generate(**inputs, max_new_tokens=12, **search)
    got = gpu.generate(**inputs, max_new_tokens=12, **search)
    np.testing.assert_array_equal(got.sequences, expected.sequences)
    if expected.scores is not None and got.scores is not None:
        np.testing.assert_allclose(got.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("runs", [2, 5])
def test_scores_that_are_no_numbers_are_told(
    search: dict[str, Any], runs: int, plans: Planned, library: FakeTensorRT
) -> None:
    """Also those that stay on the device."""
    library.overflows_after = runs
    with pytest.raises(TxoptError, match="hold NaN or infinity"):
        load(plans("g2p").path, device="tensorrt").generate(**SOURCE, max_new_tokens=12, eos_token_id=[1], **search)


@pytest.mark.usefixtures("library")
def test_the_command_line_runs_engines(plans: Planned) -> None:
    ((document, text),) = run(plans("g2p").path, Request(text="kitchen"), device="tensorrt")
    assert text == document["text"] == "K IH1 CH AH0 N"


@pytest.mark.usefixtures("library")
def test_encoders_alone_say_what_they_say_on_the_cpu(plans: Planned) -> None:
    cpu, gpu = open_both(plans("bert"))
    np.testing.assert_array_equal(gpu.classify(**SOURCE), cpu.classify(**SOURCE))
    with pytest.raises(UsageError, match="has no decoder"):
        gpu.decode(gpu.encode(**SOURCE))


@pytest.mark.usefixtures("library")
def test_streams_and_single_rows_are_those_of_the_cpu(plans: Planned) -> None:
    cpu, gpu = open_both(plans("g2p"))
    for row in IDS:
        source = row[row != 0][None]
        streams = [[int(token[0]) for token in model.stream(input_ids=source)] for model in (cpu, gpu)]
        assert streams[0] == streams[1]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["g2p", "gpt2"])
def test_parity_is_proved_on_the_device(name: str, plans: Planned) -> None:
    report = proved(plans(name, cache_length=80).path, device="tensorrt")
    assert report.passed
    assert report.largest_error < 1e-4
    assert not [note for note in report.skipped if "engines" in note]


@pytest.mark.usefixtures("library")
def test_cases_that_are_longer_than_the_engines_are_told_as_skipped(plans: Planned) -> None:
    report = proved(plans("t5", cache_length=60).path, device="tensorrt")
    (note,) = (note for note in report.skipped if "than these engines were built for" in note)
    assert note.startswith('case "past-the-first-bucket": more')
    assert "has 60 target positions, asked for" in note


@pytest.mark.usefixtures("library")
def test_engines_for_one_source_are_held_to_cases_of_one(plans: Planned) -> None:
    ranges = {"B": (1, 1, 1), "R": (1, 1, 4)}
    report = proved(plans("g2p", cache_length=80, ranges=ranges).path, device="tensorrt")
    assert report.passed
    assert "single/logits" in report.certificate()["errors"]
    assert [note for note in report.skipped if "no profile of this engine takes B=" in note]
    with pytest.raises(ParityError, match="no reference case fits what these engines were built for"):
        proved(plans("g2p", cache_length=80, ranges={"B": (8, 8, 8)}).path, device="tensorrt")


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engines_of_half_precision_are_held_to_its_tolerance(dtype: str, plans: Planned) -> None:
    from txopt.runtime.cases import load as cases

    artifact = plans("g2p", dtype=dtype, cache_length=80)
    report = replay(artifact, cases(artifact.path), device="tensorrt")
    assert (report.precision, report.tolerance) == {"float16": ("fp16", 2e-2), "bfloat16": ("bf16", 1e-1)}[dtype]
    assert report.passed
    assert report.largest_error > 1e-4  # what the caches lost


def test_greedy_steps_bring_one_integer_a_row_back(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    """Of the logits, only those of the first and the last step come to the host."""
    model = load(plans("g2p").path, device="tensorrt")
    decoder = model.decode(model.encode(**SOURCE))
    decoder.step(np.array([1, 1, 1]))
    decoder._logits.array[...] = np.nan
    chosen = decoder.advance(np.array([9, 9, 9]))
    assert np.isnan(decoder._logits.array).all()
    np.testing.assert_array_equal(chosen, decoder.scores().argmax(-1))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}], ids=str)
def test_without_an_engine_that_looks_for_tokens_the_host_does(search: dict[str, Any], plans: Planned) -> None:
    cpu, gpu = open_both(plans("g2p", found_too=False))
    expected = cpu.generate(**SOURCE, **search).sequences
    np.testing.assert_array_equal(gpu.generate(**SOURCE, **search).sequences, expected)


def test_beams_bring_the_likeliest_few_back(
    plans: Planned, library: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a row's scores come to the host once, or where more are wanted than the engine looks for, or processors see them."""
    model = load(plans("g2p").path, device="tensorrt")
    steps = list[int]()
    step = RowDecoder.step
    monkeypatch.setattr(RowDecoder, "step", lambda self, ids: steps.append(1) or step(self, ids))
    model.generate(**SOURCE, num_beams=MOST // 2)
    assert len(steps) == 1  # of the prefill
    for search in ({"num_beams": MOST // 2 + 1}, {"num_beams": 2, "repetition_penalty": 1.5}):
        steps.clear()
        model.generate(**SOURCE, **search)
        assert len(steps) > 2


def test_ranked_tokens_fall_and_equals_rise(plans: Planned, library: FakeTensorRT) -> None:
    """Whatever order the engine leaves equals in."""
    model = load(plans("g2p", computes=False).path, device="tensorrt")
    decoder = model.decode(model.encode(**SOURCE))
    decoder.step(np.array([1, 1, 1]))
    scores, ids = decoder.rank(np.array([9, 9, 9]))
    assert (scores == 0).all()
    decoder._chosen["top_ids"].array[:] = np.arange(MOST)[::-1]
    decoder._chosen["top_values"].array[:] = np.arange(MOST) // 2
    monkeyed = decoder._run
    decoder._run = lambda call, queries: None  # type: ignore[method-assign]
    scores, ids = decoder.rank(np.array([9, 9, 9]))
    decoder._run = monkeyed  # type: ignore[method-assign]
    np.testing.assert_array_equal(scores[0], np.arange(MOST)[::-1] // 2)
    np.testing.assert_array_equal(ids[0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ({"input_ids": np.full((9, 3), 5)}, {}, r"takes B=9 T=3: encode takes B 1 to 8, .*txopt engine --max-batch$"),
        ({"input_ids": np.full((1, 61), 5)}, {}, r"T=61: .* T 1 to 60; .* txopt engine --max-source$"),
        (SOURCE, {"num_beams": 11}, r"decoder\.plan: no profile .*R=33.*step takes .*R 1 to 32.*--max-beams$"),
    ],
)
@pytest.mark.usefixtures("library")
def test_lengths_beyond_the_profiles_name_them_and_the_option(
    inputs: Any, options: Any, message: str, plans: Planned
) -> None:
    with pytest.raises(LimitError, match=message):
        load(plans("g2p").path, device="tensorrt").generate(**inputs, **options)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("width", [16, 17, 40])
def test_longer_prompts_than_a_profile_takes_are_fed_in_parts(width: int, plans: Planned) -> None:
    said = []
    for model in open_both(plans("gpt2")):
        prompt = np.random.default_rng(7).integers(3, 50, (2, width))
        mask = np.arange(width) >= np.array([[0], [width - 3]])
        said.append(model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=5).sequences)
    np.testing.assert_array_equal(said[0], said[1])


@pytest.mark.usefixtures("library")
def test_an_engines_cache_bounds_what_is_generated(plans: Planned) -> None:
    model = load(plans("t5", cache_length=20).path, device="tensorrt")
    assert model.generate(**SOURCE, max_new_tokens=19).sequences.shape[1] <= 20
    with pytest.raises(LimitError, match=r"this model's engine \(txopt engine --cache-length.*\) has 20 positions"):
        model.generate(**SOURCE, max_new_tokens=20)


def test_another_devices_sources_are_refused(plans: Planned, library: FakeTensorRT) -> None:
    cpu, gpu = open_both(plans("g2p"))
    with pytest.raises(InputError, match="on its own device, got OrtValue"):
        gpu.decode(cpu.encode(**SOURCE))
    with pytest.raises(InputError, match="on its own device"):
        load(plans("g2p").path, device="tensorrt").decode(gpu.encode(**SOURCE))
