"""Work on foreign bytes in a process of its own, and the lines of JSON that the two processes speak.

``ask`` is the parent's side, ``serve`` the child's: a stage as it begins, then a result or an error. Native code that crashes on a
file takes the child along and nothing else. Neither side knows what the work is.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from txopt.runtime import errors
from txopt.runtime.errors import MissingDependencyError, SourceError, TxoptError
from txopt.runtime.termination import Terminated, terminable

_ERRORS = ("SourceError", "InputError", "UsageError", "ArtifactError", "ParityError", "MissingDependencyError")

# Until here everything that goes wrong is the file's doing; later it is ours.
READING = ("read", "convert", "clean", "load")

PATIENCE = 5.0  # seconds; a child may be deep in native code, where no signal reaches Python

Progress = Callable[[str], None]


def ask(module: str, source: Path, task: Mapping[str, Any], progress: Progress | None) -> dict[str, Any]:
    """What ``python -m module`` answers to ``task``, which is about ``source``; ``progress`` hears of its stages.

    Raises:
        SourceError: the work on ``source`` ended the child. Whatever error of txopt the child raised, again.
    """
    asked = json.dumps({"source": str(source), **task})
    command = [sys.executable, "-P", "-m", module, asked]
    stage, answer = "start", None
    with (
        tempfile.TemporaryFile() as noise,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=noise, encoding="utf-8"
        ) as child,
    ):
        assert child.stdout is not None, "asked for"
        try:
            for line in child.stdout:
                said = json.loads(line)
                if "stage" in said:
                    stage = said["stage"]
                    if progress is not None:
                        progress(stage)
                else:
                    answer = said
            child.wait()
        except BaseException:
            _stop(child)
            raise
        noise.seek(max(0, noise.seek(0, os.SEEK_END) - 2000))
        last = noise.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
    if answer is None:
        raise _death(source, stage, child.returncode, last)
    if "error" in answer:
        kind = getattr(errors, answer["error"]) if answer["error"] in _ERRORS else TxoptError
        raise kind(answer["message"])
    result: dict[str, Any] = answer["result"]
    return result


def _stop(child: subprocess.Popen[str]) -> None:
    """Ends ``child``, which may have folders of its own to remove."""
    child.terminate()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()


def _death(source: Path, stage: str, code: int, last: str) -> TxoptError:
    if stage == "start":
        return TxoptError(f"the process that was to read {source} did not start ({code}): {last}")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return SourceError(
        f"{source}: expected a graph that can be processed, found one whose {stage} ended its process ({how}): "
        "it is damaged, or larger than memory; export it again"
    )


def serve(task: str, work: Callable[[Mapping[str, Any], Progress], dict[str, Any]]) -> None:
    """Does ``work`` on the task of the command line and answers on standard output, whatever happens."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not speak for us
    _without_core_dumps()
    asked, stage = json.loads(task), "read"

    def progress(name: str) -> None:
        nonlocal stage
        stage = name
        print(json.dumps({"stage": name}), file=answers)

    try:
        with terminable():
            answer: dict[str, Any] = {"result": work(asked, progress)}
    except Terminated:
        os.kill(os.getpid(), signal.SIGTERM)  # that it ended so is seen from outside
        raise
    except TxoptError as err:
        answer = {"error": type(err).__name__, "message": str(err)}
    except ModuleNotFoundError as err:
        message = f'this command needs {err.name}: pip install "txopt[export]"'
        answer = {"error": MissingDependencyError.__name__, "message": message}
    except Exception as err:  # the libraries below raise whatever they like
        text, source = f"{type(err).__name__}: {err}"[:500], asked["source"]
        if stage in READING:
            message = f"{source}: expected an ONNX graph that can be read and converted, found one where {stage} fails ({text}); "
            answer = {"error": SourceError.__name__, "message": message + "export it again, with opset 17 or newer"}
        else:
            answer = {"error": TxoptError.__name__, "message": f"{source}: {stage} fails, a defect of txopt: {text}"}
    print(json.dumps(answer), file=answers)


def _without_core_dumps() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
