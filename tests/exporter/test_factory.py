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
class Module(torch.nn.Module): pass
def a_class(): return Module
def a_state(): return torch.nn.Linear(1, 1).state_dict()
def with_tokenizer(): return torch.nn.Linear(1, 1), "tokenizer"
made = torch.nn.Linear(1, 1)
def missing(): return {}["weights"]
def silent(): raise KeyError
def deep(): return missing_attribute()
def missing_attribute(): return made.nothing
def loading(): return torch.load("nowhere.pt")
"""

# the module's text, the factory, and what must be said
WRONG: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "raises": (FACTORIES, "failing", ("failing() failed", "RuntimeError: weights.pt is not there", "line 4")),
    "needs arguments": (FACTORIES, "asking", ("without arguments", "asking needs path, width")),
    "returns nothing": (FACTORIES, "forgetful", ("return an nn.Module, got None", "has it a return?")),
    "returns the class": (FACTORIES, "a_class", ("got the class Module", "return Module(...)")),
    "returns the weights": (FACTORIES, "a_state", ("got a dict of tensors", "load_state_dict")),
    "returns a pair": (FACTORIES, "with_tokenizer", ("got a tuple", "return the module alone")),
    "is the module itself": (FACTORIES, "made", ("made is a module itself (Linear)", "def factory(): return made")),
    "lacks a key": (FACTORIES, "missing", ("KeyError: 'weights' (", ".py, line 15)")),
    "says nothing": (FACTORIES, "silent", ("failed: KeyError (", ".py, line 16)")),
    "fails further down": (FACTORIES, "deep", ("AttributeError: 'Linear' object has no attribute", ".py, line 18)")),
    "fails in torch": (FACTORIES, "loading", ("FileNotFoundError", ".py, line 19)")),
    "leaves": (FACTORIES, "leaving", ("leaving() failed", "SystemExit: 5")),
    "is another class": (FACTORIES, "NoModule", ("return an nn.Module, got a NoModule",)),
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
