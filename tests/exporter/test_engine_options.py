"""Options of builds of engines: what their values may be, judged before any artifact is opened; no library is needed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from txopt.exporter import engines
from txopt.exporter.engine import Switches
from txopt.exporter.engines import Options
from txopt.runtime.errors import MissingDependencyError, UsageError


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
