"""What is stopped from outside cleans up after itself: Ctrl-C and SIGTERM, the command and the process that it started."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from txopt.runtime.termination import Terminated, terminable

SLOW = """
import time
def factory():
    print("ready", flush=True)
    time.sleep(60)
"""
CHILD = """
import os, tempfile, time
from pathlib import Path
from txopt.exporter.child import serve

def work(task, progress):
    with tempfile.TemporaryDirectory(prefix="child-", dir=task["source"]):
        Path(task["source"], "pid").write_text(str(os.getpid()))
        progress("fuse")
        time.sleep(60)

serve(__import__("sys").argv[1], work)
"""
PARENT = """
import sys
from pathlib import Path
from txopt.exporter.child import ask
from txopt.runtime.termination import Terminated, terminable

try:
    with terminable():
        ask("slow_child", Path(sys.argv[1]), {}, lambda stage: print(stage, flush=True))
except Terminated:
    sys.exit(143)
"""


def _hearing() -> None:
    """Shells start what runs in the background deaf to Ctrl-C, and so would be all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def started(folder: Path, *command: str) -> "subprocess.Popen[str]":
    """A process that has said its first line."""
    path = os.pathsep.join([str(folder), *sys.path])
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_hearing,
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("sent", "code", "said"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_a_command_that_is_stopped_leaves_nothing(tmp_path: Path, sent: signal.Signals, code: int, said: str) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    process = started(tmp_path, "-m", "txopt.cli", "export", "slow:factory", "deep/OUT", "--quiet")
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors == f"{said}; nothing was left half written\n"
    assert {path.name for path in tmp_path.iterdir()} <= {"slow.py", "__pycache__"}


def test_the_process_that_reads_a_file_is_stopped_too_and_cleans_up(tmp_path: Path) -> None:
    (tmp_path / "slow_child.py").write_text(CHILD)
    (tmp_path / "parent.py").write_text(PARENT)
    process = started(tmp_path, "parent.py", str(tmp_path))
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert list(tmp_path.glob("child-*")) == []


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    deaf = CHILD.replace("    with ", "    import signal\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    with ")
    (tmp_path / "slow_child.py").write_text(deaf)
    (tmp_path / "parent.py").write_text("from txopt.exporter import child\nchild.PATIENCE = 0.2\n" + PARENT)
    process = started(tmp_path, "parent.py", str(tmp_path))
    process.terminate()
    process.communicate(timeout=60)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_second_signal_does_not_interrupt_the_cleaning() -> None:
    cleaned = []

    def cleans_up() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned.append(True)

    with pytest.raises(Terminated), terminable():
        cleans_up()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_program_that_has_a_handler_of_its_own_keeps_it() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with terminable():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
