"""ONNX Runtime on a GPU without one: what is asked of the library, and what is said where it cannot do it.

The library is the real one, for the CPU; ``python -m txopt.benchmarks.cuda`` runs its real CUDA provider on a stand-in for CUDA.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.runtime.far import Far
from txopt.runtime import row_decoder
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends import captures, ort
from txopt.runtime.backends.captures import Captures
from txopt.runtime.backends.ort_session import CUDA
from txopt.runtime.errors import MissingDependencyError, TxoptError, UsageError
from txopt.runtime.model import load

TWENTY = {"max_new_tokens": 20, "min_new_tokens": 20}
SOURCE: dict[str, Any] = {"input_ids": np.array([[5, 6, 7, 2], [9, 2, 0, 0]])}


def number(options: Any) -> int:
    return int(options.get_run_config_entry("gpu_graph_id"))


class Releasing:
    """A session that lets graphs go."""

    def __init__(self) -> None:
        self.released: list[int] = []

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)


def test_a_graph_is_recorded_by_the_second_run_and_replayed_by_whoever_binds_the_same() -> None:
    graphs = Captures(Releasing())
    assert [number(graphs.options("a", again=again)) for again in (False, True, True)] == [-1, 1, 1]
    assert number(graphs.options("b", again=False)) == -1
    assert number(graphs.options("b", again=True)) == 2
    assert number(graphs.options("a", again=False)) == 1


def test_the_graph_used_longest_ago_goes() -> None:
    session = Releasing()
    graphs = Captures(session)
    for key in range(captures.MOST):
        graphs.options(key, again=True)
    graphs.options(0, again=True)
    assert session.released == []
    assert number(graphs.options("one more", again=True)) == captures.MOST + 1
    assert session.released == [2]
    assert number(graphs.options(1, again=False)) == -1


def test_where_no_graph_can_go_there_are_no_more() -> None:
    graphs = Captures(object())
    for key in range(captures.MOST):
        graphs.options(key, again=True)
    assert number(graphs.options("one more", again=True)) == -1
    assert number(graphs.options(0, again=True)) == 1


class Recording(Far):
    """Its decoder records graphs, which the CPU's provider leaves out."""

    def __init__(self, *arguments: Any, repeats: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._captures = Captures(Releasing()) if repeats else None


def test_steps_are_recorded_and_prompts_are_not(g2p: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_decoder, "FIRST_BUCKET", 8)
    expected = load(g2p.path, threads=1).generate(**SOURCE, **TWENTY).sequences
    runs: list[int | None] = []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def noted(session: Any, binding: Any, options: Any = None) -> None:
        runs.append(None if options is None else number(options))
        run(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", noted)
    monkeypatch.setattr(ort, "Runner", Recording)
    model = load(g2p.path, threads=1)
    got = model.generate(**SOURCE, **TWENTY).sequences
    np.testing.assert_array_equal(got, expected)
    # The encoder; then 8 steps, and where buffers grew, and lie elsewhere now, again.
    assert runs == [None, -1, *[1] * 7, -1, *[2] * 7, -1, *[3] * 3]

    runs.clear()
    model.generate(**SOURCE, decoder_input_ids=np.array([[1, 5, 6]] * 2), max_new_tokens=4, min_new_tokens=4)
    assert runs == [None, -1, -1, 4, 4]


def test_a_decoder_that_cannot_be_recorded_runs_without(
    g2p: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[Any] = []
    real = onnxruntime.InferenceSession

    class Session(real):  # type: ignore[misc, valid-type]
        def __init__(self, model: Any, options: Any, *, providers: Sequence[Any], **others: Any) -> None:
            asked.append((providers[0], others["disabled_optimizers"], others["enable_fallback"]))
            if "enable_cuda_graph" in providers[0][1]:
                raise RuntimeError("this session cannot use graph capture")
            super().__init__(model, options, providers=["CPUExecutionProvider"], **others)

        def get_providers(self) -> list[str]:
            return [CUDA, "CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(ort, "_gpu", lambda ordinal: None)
    with caplog.at_level(logging.WARNING, "txopt"):
        runner = ort.Runner(g2p.file("decoder.onnx"), device="cuda-graphs:1", repeats=True)
    assert runner._captures is None
    assert "decoder.onnx runs without CUDA graphs: this session cannot" in caplog.text
    options = [given for (_, given), _, _ in asked]
    assert options == [{"device_id": "1", "enable_cuda_graph": "1"}, {"device_id": "1"}]
    assert all("GatherToSliceFusion" in disabled and not fallback for _, disabled, fallback in asked)


def test_cuda_that_cannot_be_used_is_not_the_cpu(g2p: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the library finds no GPU, or not the libraries it needs, it opens a session on the CPU and says so on a log."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA])
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda *arguments, providers, **others: real(*arguments, providers=providers[1:], **others),
    )
    monkeypatch.setattr(ort, "_gpu", lambda ordinal: None)
    with pytest.raises(MissingDependencyError, match=r"finds no NVIDIA GPU that it could use.*nvidia-smi"):
        ort.Runner(g2p.file("decoder.onnx"), device="cuda")


def test_a_failing_graph_says_how_to_do_without(g2p: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "Runner", Recording)
    decoder = load(g2p.path, threads=1)
    encoded = decoder.encode(**SOURCE)
    rows = decoder.decode(encoded)
    rows.step(np.array([1, 1]))

    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(next(iter(rows._steps.values())), "_run", fails)
    with pytest.raises(TxoptError, match='stream is capturing; device="cuda" runs it without recording'):
        rows.step(np.array([1, 1]))


@pytest.mark.parametrize("device", ["cuda-graphs:x", "cuda-graph", "graphs"])
def test_a_device_that_is_none(device: str, g2p: Artifact) -> None:
    with pytest.raises(UsageError, match='"cuda", "cuda-graphs", "tensorrt"'):
        load(g2p.path, device=device)
