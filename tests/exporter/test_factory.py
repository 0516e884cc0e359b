"""``package.module:factory``: what a stranger's function does wrong is told in a sentence, never as a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError

FACTORIES = """
import torch

def failing(): raise RuntimeError("weights.pt is not there")
def asking(path, *, width): return torch.nn.Linear(1, width)
def forgetful(): torch.nn.Linear(1, 1)
def leaving(): raise SystemExit(5)
def half(): return torch.nn.Linear(1, 1)
class NoModule: pass
"""

# the module's text, the factory, and what must be said
WRONG: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "raises": (FACTORIES, "failing", ("failing() failed", "RuntimeError: weights.pt is not there", "line 4")),
    "needs arguments": (FACTORIES, "asking", ("without arguments", "asking needs path, width")),
    "returns nothing": (FACTORIES, "forgetful", ("return an nn.Module, got NoneType", "return the module")),
    "leaves": (FACTORIES, "leaving", ("leaving() failed", "SystemExit: 5")),
    "is another class": (FACTORIES, "NoModule", ("return an nn.Module, got NoModule",)),
    "makes a module of another kind": (FACTORIES, "half", ("no method encode()", "no special_ids")),
    "is written wrong": ("def factory(:", "factory", ("cannot import", "SyntaxError")),
    "imports what is not there": (
        "import no_such_thing",
        "factory",
        ("cannot import", "No module named 'no_such_thing'"),
    ),
    "fails on import": ("1 / 0", "factory", ("cannot import", "ZeroDivisionError", "line 1")),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_factory_that_does_wrong_is_told(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, factory, said = WRONG[what]
    name = f"stranger_{list(WRONG).index(what)}"
    (tmp_path / f"{name}.py").write_text(text, "utf-8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    with pytest.raises(SourceError) as caught:
        export(f"{name}:{factory}", tmp_path / "out")
    missing = [part for part in said if part not in str(caught.value)]
    assert not missing, str(caught.value)
    assert not (tmp_path / "out").exists()
    assert sys.path == path


def test_the_command_line_says_it_and_exits_with_2(tmp_path: Path) -> None:
    (tmp_path / "stranger.py").write_text(FACTORIES, "utf-8")
    command = [str(Path(sys.executable).with_name("txopt")), "export", "stranger:failing", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "weights.pt is not there" in done.stderr
    assert "Traceback" not in done.stderr
