"""TensorRT's runner on a fake of CUDA and TensorRT: the same ids as on the CPU, nothing out of place, nothing left behind."""

import gc
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import process_time
from typing import Any

import numpy as np
import pytest

from tests.runtime.fake_cuda import FakeCuda, cudaError_t, installed
from tests.runtime.fake_tensorrt import Context, Engine, FakeTensorRT
from tests.runtime.planned import MOST, planned
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError, LimitError, ParityError, TxoptError, UsageError
from txopt.runtime.model import Model, load
from txopt.runtime.parity import replay
from txopt.runtime.parity import verify as proved
from txopt.runtime.row_decoder import RowDecoder
from txopt.runtime.running import Request, run

Planned = Callable[..., Artifact]
STEPS = 2000
STEP_BUDGET = 40e-6  # seconds


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    """What a test leaves undone on it fails the test."""
    fake = installed(monkeypatch, FakeCuda())
    yield fake
    gc.collect()
    assert fake.faults == []
    assert fake.left() == []


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, cuda: FakeCuda) -> FakeTensorRT:
    fake = FakeTensorRT(cuda)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    return fake


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory, g2p: Artifact, artifacts: Callable[[str], Artifact]) -> Planned:
    """Artifacts with engines, by the model's name and what is otherwise; each made once."""
    folder, made = tmp_path_factory.mktemp("planned"), dict[str, Artifact]()

    def make(name: str, **otherwise: Any) -> Artifact:
        key = f"{name}-{len(made)}" if otherwise else name
        if otherwise or name not in made:
            made[key] = planned(g2p if name == "g2p" else artifacts(name), folder / key, **otherwise)
        return made[key]

    return make


def open_both(artifact: Artifact) -> tuple[Model, Model]:
    return load(artifact.path, threads=1), load(artifact.path, device="tensorrt")


IDS = np.array([[5, 6, 7, 8, 2], [9, 10, 2, 0, 0], [4, 2, 0, 0, 0]])
SOURCE: dict[str, Any] = {"input_ids": IDS, "attention_mask": (IDS != 0).astype(np.int64)}
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


def test_steps_are_recorded_once_and_replayed(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    """The first step runs, the second is recorded; the next generate() of these lengths meets the same memory."""
    model = load(plans("g2p").path, device="tensorrt")
    first = model.generate(**SOURCE, max_new_tokens=12)
    assert cuda.calls.count("cudaGraphInstantiate") == 1
    steps, runs = cuda.calls.count("cudaGraphLaunch"), len(library.ran)
    cuda.calls.clear()
    again = model.generate(**SOURCE, max_new_tokens=12)
    assert cuda.calls.count("cudaGraphInstantiate") == 0
    assert cuda.calls.count("cudaGraphLaunch") == steps + 1
    assert len(library.ran) == 2 * runs
    np.testing.assert_array_equal(again.sequences, first.sequences)


def test_a_library_that_does_not_say_what_can_be_recorded_is_tried(
    plans: Planned, library: FakeTensorRT, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself; TensorRT-RTX compiles while it runs, and says."""
    monkeypatch.delattr(Context, "is_stream_capturable")
    cpu, gpu = open_both(plans("g2p"))
    np.testing.assert_array_equal(gpu.generate(**SOURCE).sequences, cpu.generate(**SOURCE).sequences)
    assert "cudaGraphLaunch" in cuda.calls


def test_a_context_without_memory_is_told(
    plans: Planned, library: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    monkeypatch.setattr(Engine, "create_execution_context", lambda self, strategy: None)
    with pytest.raises(TxoptError, match=r"encoder\.plan: there is no memory to run profile encode: the library gives"):
        model.encode(**SOURCE)


def test_calls_take_the_narrowest_profile(plans: Planned, library: FakeTensorRT) -> None:
    model = load(plans("gpt2").path, device="tensorrt")
    model.generate(**PROMPTS, max_new_tokens=4)
    assert library.ran == ["prefill", "step", "step", "step"]


@pytest.mark.usefixtures("library")
def test_threads_take_turns(plans: Planned) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    sources = [row[row != 0][None] for row in IDS] * 4
    expected = [model.generate(input_ids=source).sequences.tolist() for source in sources]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda source: model.generate(input_ids=source).sequences.tolist(), sources))
    finally:
        sys.setswitchinterval(interval)
    assert got == expected


def test_other_lengths_are_recorded_anew(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    cpu, gpu = open_both(plans("g2p"))
    for width in (5, 3, 5):
        source = {name: value[:, :width] for name, value in SOURCE.items()}
        cuda.calls.clear()
        np.testing.assert_array_equal(gpu.generate(**source).sequences, cpu.generate(**source).sequences)
        assert cuda.calls.count("cudaGraphInstantiate") == 1


def test_decoders_may_take_turns(plans: Planned, library: FakeTensorRT) -> None:
    """Each has its buffers; the context that they share is set up anew at every turn."""
    cpu, gpu = open_both(plans("g2p"))
    said = []
    for model in (cpu, gpu):
        encoded = model.encode(**SOURCE)
        decoders = [model.decode(encoded), model.decode(encoded)]
        chosen = [np.array([1, 1, 1]), np.array([9, 8, 7])]
        for _ in range(4):
            chosen = [decoder.step(ids).argmax(-1) for decoder, ids in zip(decoders, chosen, strict=True)]
        said.append(np.stack(chosen))
    np.testing.assert_array_equal(said[0], said[1])


def test_a_capture_that_is_refused_costs_only_time(
    plans: Planned, library: FakeTensorRT, cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.records = False
    cpu, gpu = open_both(plans("g2p"))
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(gpu.generate(**SOURCE).sequences, cpu.generate(**SOURCE).sequences)
    assert "cudaGraphLaunch" not in cuda.calls
    assert len([record for record in caplog.records if "not recorded as a CUDA graph" in record.message]) == 1


def test_a_context_that_still_compiles_is_recorded_later(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    library.compiling = 3
    cpu, gpu = open_both(plans("g2p"))
    np.testing.assert_array_equal(gpu.generate(**SOURCE).sequences, cpu.generate(**SOURCE).sequences)
    launches = cuda.calls.count("cudaGraphLaunch")
    assert 0 < launches < len(library.ran) - 4


def test_caches_that_an_engine_gives_elsewhere_are_copied_back(plans: Planned, library: FakeTensorRT) -> None:
    cpu, gpu = open_both(plans("g2p", aliases=False))
    for search in SEARCHES[:2]:
        expected = cpu.generate(**SOURCE, **search).sequences
        np.testing.assert_array_equal(gpu.generate(**SOURCE, **search).sequences, expected)


def test_beams_move_on_the_device(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    """A row of all layers is one copy; a ring of rows needs one more, and nothing comes to the host."""
    model = load(plans("g2p").path, device="tensorrt")
    decoder = model.decode(model.encode(input_ids=IDS[:1]), beams=4)
    decoder.prefill(np.array([[1, 9], [1, 10], [1, 11], [1, 12]]))
    before = {name: decoder.cached(name) for name in decoder.names}
    cuda.calls.clear()
    decoder.reorder(np.array([1, 2, 0, 0]))
    assert [call for call in cuda.calls if call != "cudaMalloc"] == ["cudaMemcpy3DAsync"] * 5
    for name, array in before.items():
        np.testing.assert_array_equal(decoder.cached(name), array[[1, 2, 0, 0]])


def test_what_the_encoder_gave_goes_to_the_decoder_where_it_lies(plans: Planned, library: FakeTensorRT) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    encoded = model.encode(**SOURCE)
    decoder = model.decode(encoded, beams=2)
    for name in (name for name in encoded.values if name.startswith("cross_")):
        assert decoder._fixed[name] is encoded.values[name]


def test_repeated_calls_take_no_more_memory(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    searches: tuple[dict[str, Any], ...] = ({}, {"num_beams": 3}, {"do_sample": True, "seed": 1})
    for search in searches:
        model.generate(**SOURCE, **search)
    gc.collect()
    held = len(cuda.left())
    cuda.calls.clear()
    for search in searches * 3:
        model.generate(**SOURCE, **search)
    assert len(cuda.left()) <= held
    assert "cudaMalloc" not in cuda.calls


def test_what_was_encoded_outlives_its_model(plans: Planned, library: FakeTensorRT) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    memory = model.encode(**SOURCE).values["memory"]
    expected = load(plans("g2p").path, threads=1).encode(**SOURCE).values["memory"].numpy()
    del model
    gc.collect()
    np.testing.assert_array_equal(memory.array(), expected)


def test_memory_that_the_gpu_does_not_have_is_told(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    encoded = model.encode(**SOURCE)
    cuda.room = sum(map(len, cuda.memory.values())) + 10_000
    with pytest.raises(UsageError, match=r"buffers for 3 rows .* take 1 GiB of memory"):
        model.decode(encoded).step(np.array([1, 1, 1]))
    cuda.room = 0
    with pytest.raises(
        UsageError, match=r"the GPU has no memory left for [\d,]+ bytes more \(cudaErrorMemoryAllocation"
    ):
        model.encode(input_ids=np.full((8, 50), 5))
    cuda.room = 1 << 40
    assert model.generate(**SOURCE).sequences.shape[0] == 3


def test_kept_memory_is_freed_before_any_is_refused(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    model.generate(**SOURCE, num_beams=8)
    cuda.room = sum(map(len, cuda.memory.values()))
    assert model.generate(input_ids=IDS[:1], num_beams=7).sequences.shape[0] == 1


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


def test_a_gpu_that_fails_is_said(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    model = load(plans("g2p").path, device="tensorrt")
    cuda.fails = cudaError_t.cudaErrorIllegalAddress
    with pytest.raises(TxoptError, match="the GPU failed: cudaErrorIllegalAddress"):
        model.generate(**SOURCE)
    cuda.fails = cudaError_t.cudaSuccess


def test_a_greedy_step_costs_the_host_little(plans: Planned, library: FakeTensorRT, cuda: FakeCuda) -> None:
    """The loop, the session and the runner; once a step is recorded, the fake does nothing but count, for its checks cost more.

    Engines that compute nothing say token 0 for ever. A step calls CUDA four times, which costs about 6 us more with the real package.
    """
    model = load(plans("t5", cache_length=STEPS + 2, computes=False).path, device="tensorrt")
    options: dict[str, Any] = {"max_new_tokens": STEPS, "eos_token_id": [7]}
    model.generate(input_ids=IDS[:1], **options)
    called = Counter[str]()
    for name in ("cudaSetDevice", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaMemcpy3DAsync"):
        setattr(cuda, name, lambda *_, name=name: called.update((name,)) or (cudaError_t.cudaSuccess,))
    spent = []
    for _ in range(5):
        called.clear()
        start = process_time()  # of this process alone, however busy the machine is
        assert model.generate(input_ids=IDS[:1], **options).sequences.shape == (1, STEPS + 1)
        spent.append((process_time() - start) / STEPS)
    assert {count // STEPS for count in called.values()} == {1}
    assert min(spent) < STEP_BUDGET
