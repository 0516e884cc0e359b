"""What is refused before TensorRT sees a plan, in which order, and which of several engines is taken."""

import gc
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.fake_cuda import FakeCuda, cudaError_t, installed
from tests.runtime.fake_tensorrt import FakeTensorRT
from tests.runtime.planned import VERSION, planned, with_sets
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.fitting import contract_problems, fitting
from txopt.runtime.engines import EngineSet, engines_of
from txopt.runtime.errors import ArtifactError, MissingDependencyError, StaleError, TxoptError, UsageError
from txopt.runtime.model import load


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator["Machine"]:
    made = Machine(monkeypatch)
    yield made
    gc.collect()
    assert made.cuda.left() == []


class Machine:
    """A fake one, with everything that is needed; each method takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.cuda = installed(monkeypatch, FakeCuda())
        self.library = FakeTensorRT(self.cuda)
        self.without_library()
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", self.library)

    def without_library(self) -> None:
        for name in ("tensorrt", "tensorrt_bindings", "tensorrt_rtx", "tensorrt_rtx_bindings"):
            self._monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed

    def without_bindings(self) -> None:
        for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
            self._monkeypatch.setitem(sys.modules, name, None)

    def without_driver(self) -> None:
        self.cuda.broken = cudaError_t.cudaErrorInsufficientDriver

    def without_gpu(self) -> None:
        self.cuda.capabilities = ()

    def with_another_gpu(self) -> None:
        self.cuda.capabilities = ((12, 0),)

    def with_another_version(self) -> None:
        self.library.__version__ = "1.8.0"


@pytest.fixture(scope="module")
def artifact(g2p: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return planned(g2p, tmp_path_factory.mktemp("planned") / "artifact")


REFUSALS: tuple[tuple[str, type[TxoptError], str], ...] = (
    ("without_library", MissingDependencyError, r"tensorrt-rtx: pip install tensorrt-rtx-cu13 \("),
    ("without_bindings", MissingDependencyError, r"needs cuda-bindings, which .*pip install cuda-bindings"),
    ("without_driver", UsageError, r"an NVIDIA GPU and its driver, found none \(cudaErrorInsufficientDriver: what"),
    ("without_gpu", UsageError, r"found none \(CUDA finds no GPU\)"),
    (
        "with_another_gpu",
        UsageError,
        r"for this GPU \(SM120\) and tensorrt-rtx; build one: txopt engine ARTIFACT --capability SM120. "
        rf"It has engines for:\n  - tensorrt-rtx {VERSION}, SM89, fp32",
    ),
    (
        "with_another_version",
        StaleError,
        rf"another version than what is installed \(tensorrt-rtx 1\.8\.0\); build them again .*\n  - tensorrt-rtx {VERSION}",
    ),
)


@pytest.mark.parametrize(("lack", "error", "message"), REFUSALS, ids=[lack for lack, *_ in REFUSALS])
def test_a_lack_is_told_before_a_plan_is_seen(
    lack: str, error: type[TxoptError], message: str, machine: Machine, artifact: Artifact
) -> None:
    getattr(machine, lack)()
    with pytest.raises(error, match=message) as caught:
        load(artifact.path, device="tensorrt")
    assert caught.type is error
    assert machine.library.seen == []


@pytest.mark.parametrize("first", range(len(REFUSALS)))
def test_of_several_lacks_the_first_is_told(first: int, machine: Machine, artifact: Artifact) -> None:
    for lack, *_ in REFUSALS[first:]:
        if not (lack == "with_another_gpu" and first < 4):  # which would be a GPU
            getattr(machine, lack)()
    _, error, message = REFUSALS[first]
    with pytest.raises(error, match=message if first < 5 else "version|no engine"):
        load(artifact.path, device="tensorrt")
    assert machine.library.seen == []


def test_an_artifact_without_engines_says_how_to_build_them(machine: Machine, g2p: Artifact) -> None:
    machine.without_library()
    machine.without_driver()
    with pytest.raises(UsageError, match=f"txopt engine {re.escape(str(g2p.path))} --capability SM89, where"):
        load(g2p.path, device="tensorrt")


def test_a_gpu_that_is_not_there_is_told(machine: Machine, artifact: Artifact) -> None:
    with pytest.raises(UsageError, match=r'"tensorrt:1": expected a GPU from 0 to 0, found 1'):
        load(artifact.path, device="tensorrt:1")
    machine.cuda.capabilities = ((12, 0), (8, 9))
    assert load(artifact.path, device="tensorrt:1").generate(input_ids=[[5, 2]]).sequences.shape[0] == 1


def test_the_bindings_alone_are_enough(machine: Machine, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.without_library()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", machine.library)
    assert load(artifact.path, device="tensorrt").manifest.kind == "encoder-decoder"


def test_a_plan_that_the_library_cannot_read_is_told_with_its_words(
    machine: Machine, artifact: Artifact, tmp_path: Path
) -> None:
    sets = engines_of(artifact)
    broken = with_sets(artifact, tmp_path / "out", sets, {"engines/encoder.plan": b"\0", "engines/decoder.plan": b"\0"})
    with pytest.raises(ArtifactError, match=r"decoder\.plan: the library cannot open .*: magic tag does not match$"):
        load(broken.path, device="tensorrt")


def test_only_listed_plans_are_seen(machine: Machine, artifact: Artifact) -> None:
    load(artifact.path, device="tensorrt")
    assert machine.library.seen == [
        (artifact.path / f"engines/{name}.plan").read_bytes() for name in sorted(artifact.manifest.graphs)
    ]


def test_engines_that_are_not_what_they_are_described_as_are_refused(
    machine: Machine, artifact: Artifact, tmp_path: Path
) -> None:
    """The encoder's plan in the decoder's place, each intact."""
    (one,) = engines_of(artifact)
    files = {name: (artifact.path / plan.file).read_bytes() for name, plan in one.plans.items()}
    swapped = with_sets(
        artifact,
        tmp_path / "out",
        (one,),
        {"engines/encoder.plan": files["decoder"], "engines/decoder.plan": files["encoder"]},
    )
    with pytest.raises(ArtifactError, match=r"expected the 2 profiles that engines/engines.json lists, found 1"):
        load(swapped.path, device="tensorrt")


def test_engines_that_want_tensors_on_the_host_are_refused(machine: Machine, artifact: Artifact) -> None:
    machine.library.on_host = {"position"}
    with pytest.raises(ArtifactError, match=r"decoder\.plan: expected all tensors on the device, found .*: position$"):
        load(artifact.path, device="tensorrt")


def test_engines_of_other_graphs_are_refused(machine: Machine, artifact: Artifact, tmp_path: Path) -> None:
    (one,) = engines_of(artifact)
    decoder = one.plans["decoder"]
    without = replace(one, plans={**one.plans, "decoder": replace(decoder, inputs=decoder.inputs[1:])})
    broken = with_sets(artifact, tmp_path / "out", (without,), {})
    with pytest.raises(ArtifactError, match=r"decoder\.inputs: expected input_ids int64 \[R,Q\], found none"):
        load(broken.path, device="tensorrt")
    assert machine.library.seen == []


# The choice


def one_of(artifact: Artifact, **facts: Any) -> EngineSet:
    return replace(engines_of(artifact)[0], **facts)


def test_what_was_built_for_exactly_this_comes_first(artifact: Artifact) -> None:
    later = one_of(artifact, capabilities=("SM80",), any_hardware=True)
    lasting = one_of(artifact, version="1.6.0", any_version=True)
    exact = one_of(artifact)
    installed_here = {"tensorrt-rtx": VERSION}
    assert fitting((later, lasting, exact), installed_here, "SM89") is exact
    assert fitting((later, lasting), installed_here, "SM89") is lasting
    assert fitting((later,), installed_here, "SM89") is later
    assert fitting((later,), installed_here, "SM120") is later
    assert fitting((exact, replace(exact, runtime="tensorrt")), {"tensorrt": VERSION}, "SM89").runtime == "tensorrt"
    with pytest.raises(StaleError, match=r"tensorrt-rtx 1\.6\.0 and later, SM89"):
        fitting((lasting,), {"tensorrt-rtx": "1.5.10"}, "SM89")
    for capability in ("SM75", "SM70"):
        with pytest.raises(UsageError, match=r"SM80 and later"):
            fitting((later,), installed_here, capability)


def test_the_contract_of_plans(artifact: Artifact) -> None:
    graph, (one,) = artifact.manifest.graphs["decoder"], engines_of(artifact)
    plan = one.plans["decoder"]

    def told(**changes: Any) -> list[str]:
        return list(contract_problems("decoder", graph, replace(plan, **changes), one.cache_length))

    def changed(kind: str, name: str, **facts: Any) -> dict[str, Any]:
        return {kind: tuple(replace(item, **facts) if item.name == name else item for item in getattr(plan, kind))}

    assert told() == []
    assert told(**changed("inputs", "self_key.0", dtype="float16")) == []
    assert told(outputs=plan.outputs[:-4]) == []
    assert told(outputs=plan.outputs[:-3]) == []
    assert told(inputs=(*plan.inputs, replace(plan.inputs[0], name="more")))[0].endswith(
        "unknown input more int64 [R,Q]"
    )
    for change in (
        changed("outputs", "logits", dtype="float16"),
        changed("outputs", "next", dtype="float32"),
        changed("outputs", "next", axes=("R", 1)),
        changed("outputs", "top_ids", axes=("R", 3)),
        changed("outputs", "log_sum", axes=("R", "Q")),
        {"outputs": plan.outputs[:-1]},
        changed("inputs", "input_ids", dtype="bool"),
        changed("inputs", "self_key.0", axes=("R", 3, 32, 64)),
        {"outputs": plan.outputs[1:]},
    ):
        assert len(told(**change)) == 1
