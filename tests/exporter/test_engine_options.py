"""Options of builds of engines: what their values may be, judged before any artifact is opened; no library is needed."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.runtime.artifacts import manifest, tensor
from txopt.exporter import engines
from txopt.exporter.engine import Switches
from txopt.exporter.engines import Options
from txopt.exporter.profiles import Sizes
from txopt.runtime.errors import MissingDependencyError, UsageError
from txopt.runtime.graphs import GraphSpec
from txopt.runtime.manifest import Manifest
from txopt.summary import of_planned


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"capabilities": "SM89"}, """capabilities: expected a list of names such as ("SM89",), got 'SM89'"""),
        (
            {"capabilities": ("SM89", 120)},
            """capabilities: expected a list of names such as ("SM89",), got ('SM89', 120)""",
        ),
        ({"capabilities": None}, """capabilities: expected a list of names such as ("SM89",), got None"""),
        ({"batch": "8"}, "batch: expected an integer, got '8'"),
        ({"source": True}, "source: expected an integer, got True"),
        ({"cache": "24", "prompt": 8.5}, "cache: expected an integer, got '24'"),
        ({"runtime": 3}, "runtime: expected one of tensorrt, tensorrt-rtx, got 3"),
        ({"runtime": ["tensorrt"]}, "runtime: expected one of tensorrt, tensorrt-rtx, got ['tensorrt']"),
        ({"switches": {"refit": True}}, "switches: expected Switches(...), got {'refit': True}"),
        ({"kept": 3}, "kept: expected a directory's path, got 3"),
    ],
)
def test_a_value_of_another_kind_is_a_usage_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Options(**wrong)


@pytest.mark.parametrize("name", ["any_version", "any_hardware", "weight_streaming", "refit"])
@pytest.mark.parametrize("value", ["yes", None, 2])
def test_switches_are_on_or_off(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{name}: expected True or False, got {value!r}")):
        Switches(**{name: value})


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        Options(runtime="cuda", capabilities="SM89", beams="4", prompt=[8], kept=b"here")  # type: ignore[arg-type]
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0].strip(" -") for line in lines[1:]] == [
        "runtime",
        "capabilities",
        "beams",
        "prompt",
        "kept",
    ]
    with pytest.raises(
        UsageError, match=r"refit: expected .*\n.*any_version|any_version: expected (?s:.*)refit: expected"
    ):
        Switches(any_version="no", refit="yes")  # type: ignore[arg-type]


def test_what_is_of_a_kind_is_taken_as_it() -> None:
    options = Options(capabilities=["SM89"], batch=np.int32(2), kept="here")  # type: ignore[arg-type]
    assert (options.capabilities, options.batch, options.kept) == (("SM89",), 2, Path("here"))
    assert type(options.batch) is int


def test_a_dry_run_without_the_library_knows_what_a_gpu_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> Any:
        raise MissingDependencyError("not installed")

    monkeypatch.setattr(engines, "Engine", missing)
    with pytest.raises(UsageError, match=r"capability: expected GPUs such as SM90, got '\.\./SM89'$"):
        engines.plan(tmp_path, Options(capabilities=("SM120", "../SM89")))


def of_an_encoder_alone() -> Manifest:
    whole = manifest()
    encoder = whole.graphs["encoder"]
    graph = replace(encoder, outputs=(tensor("logits", "float32", "B", 3),))
    return replace(whole, kind="encoder", graphs={"encoder": graph}, cache=None)


def of_a_fixed_source() -> Manifest:
    """As of Whisper, whose frames are always as many."""
    whole = manifest()

    def fixed(graph: GraphSpec) -> GraphSpec:
        inputs, outputs = (
            tuple(replace(item, axes=tuple(9 if axis == "T" else axis for axis in item.axes)) for item in items)
            for items in (graph.inputs, graph.outputs)
        )
        return replace(graph, inputs=inputs, outputs=outputs)

    return replace(whole, graphs={name: fixed(graph) for name, graph in whole.graphs.items()})


@pytest.mark.parametrize(
    ("of", "asked", "message"),
    [
        (
            of_an_encoder_alone,
            {"beams": 4},
            "--max-beams: leave it out, for this artifact's encoder has no rows of beams (R), got 4",
        ),
        (
            of_an_encoder_alone,
            {"prompt": 8},
            "--max-prompt: leave it out, for this artifact's encoder has no prompts (Q), got 8",
        ),
        (
            of_an_encoder_alone,
            {"cache": 24},
            "--cache-length: leave it out, for this artifact's encoder has no cache (S), got 24",
        ),
        (
            of_a_fixed_source,
            {"source": 16},
            "for this artifact's encoder and decoder have no sources whose length varies (T, U, W), got 16",
        ),
    ],
)
def test_a_size_that_no_graph_has_is_not_for_this_artifact(
    of: Callable[[], Manifest], asked: dict[str, int], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        Options(**asked).sizes(of())  # type: ignore[arg-type]
    assert Options(batch=2).sizes(of()).batch == 2


def test_sizes_that_no_graph_has_are_told_with_the_others() -> None:
    with pytest.raises(UsageError) as caught:
        Sizes.of(of_an_encoder_alone(), batch=0, beams=4, cache=24)
    assert re.findall(r"--[a-z-]+", str(caught.value)) == ["--max-batch", "--max-beams", "--cache-length"]


def test_a_dry_run_says_what_there_is_of_sizes() -> None:
    profile = {"name": "encode", "axes": {"B": [1, 8, 8], "T": [1, 64, 512]}}
    document = {
        "artifact": "out",
        "runtime": "tensorrt-rtx",
        "capabilities": ["SM89"],
        "precision": "fp32",
        "options": {"weight_streaming": True, "refit": False},
        "sizes": Sizes.of(of_an_encoder_alone()).to_json(),
        "plans": {"encoder": {"file": "e.plan", "inputs": [], "outputs": [], "profiles": [profile], "nodes": {}}},
    }
    assert of_planned(document).splitlines()[1:3] == ["  at most 8 sources of 512", "  with weight-streaming"]
    profile["axes"] |= {"R": [1, 32, 32], "Q": [1, 32, 64]}  # type: ignore[operator]
    assert (
        of_planned(document).splitlines()[1]
        == "  at most 8 sources of 512, 4 beams, prompts of 64, 512 tokens in the cache"
    )
