"""How TensorRT's runner calls, on a fake of CUDA and TensorRT: recorded steps, turns, moving rows, memory, and what a step costs."""

import gc
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from time import process_time
from typing import Any

import numpy as np
import pytest

from tests.runtime.fake_cuda import FakeCuda, cudaError_t
from tests.runtime.fake_tensorrt import Context, Engine, FakeTensorRT
from tests.runtime.planned import IDS, SOURCE, Planned, open_both
from txopt.runtime.errors import TxoptError, UsageError
from txopt.runtime.model import load

STEPS = 2000
STEP_BUDGET = 40e-6  # seconds


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
    model.generate(input_ids=[[5, 6, 7]], max_new_tokens=4)
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
    for search in ({}, {"num_beams": 3}):
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
