"""The process in which foreign bytes are parsed, changed and run: ``python -m txopt.exporter.foreign_child TASK``.

Talks to ``foreign`` in lines of JSON: a stage as it begins, then a result or an error. Native code that crashes takes this process
along and no other.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from txopt.runtime.errors import MissingDependencyError, SourceError, TxoptError

# Until here everything that goes wrong is the file's doing; later it is ours.
_READING = ("read", "convert", "clean")

Progress = Callable[[str], None]


def optimize(source: Path, directory: Path, progress: Progress, *, prove: bool = False) -> dict[str, Any]:
    """Writes model.onnx and weights.data into ``directory``, and proves them; gives the report. ``prove``: every fusion alone, too."""
    from txopt.exporter import foreign_parity, onnx_file, weights
    from txopt.exporter.graph import count
    from txopt.exporter.lowering.ort import lower

    progress("read")
    proto = onnx_file.parse(source)
    onnx_file.check(proto, source)
    facts = {"opset": onnx_file.opset(proto), "nodes_before": len(proto.graph.node)}
    model, fusions = _fused(source, proto, progress, prove=prove)
    progress("lower")
    lower(model, foreign_parity.precision(model))
    progress("write")
    weights.write({"model": model}, directory)
    progress("prove")
    parity = foreign_parity.prove(source, directory / "model.onnx", model)
    nodes = count(model)
    return {**facts, "nodes_after": sum(nodes.values()), "operators": nodes, "fusions": fusions, "parity": parity}


def inspect(source: Path, progress: Progress) -> dict[str, Any]:
    """What is in the file and what would fuse, with the picture of both; where it could not be optimized, ``problem`` says why."""
    from txopt.exporter import description, onnx_file

    progress("read")
    proto = onnx_file.parse(source)
    document, model = description.of_file(proto, source), None
    try:
        onnx_file.check(proto, source)
        model, fusions = _fused(source, proto, progress)
        document |= {"fusions": fusions, "problem": None}
    except TxoptError as err:
        document |= {"fusions": None, "problem": str(err)}
    return {"document": document, "picture": description.picture(proto, model)}


def look(files: dict[str, str], progress: Progress) -> dict[str, Any]:
    """The picture of graphs, by their names, as they are."""
    from txopt.exporter import description, onnx_file

    progress("read")
    return description.stored({name: onnx_file.parse(Path(file)) for name, file in files.items()})


def _fused(source: Path, proto: Any, progress: Progress, *, prove: bool = False) -> tuple[Any, dict[str, Any]]:
    from txopt.exporter import foreign_parity, onnx_file
    from txopt.exporter.fusion import FOREIGN, fuse

    progress("convert")
    model = onnx_file.convert(source, proto)
    progress("clean")
    onnx_file.clean(model)
    progress("fuse")
    reports = fuse(model, FOREIGN, foreign_parity.feeds(source, model) if prove else None)
    return model, {operator: report.to_json() for operator, report in reports.items()}


def _result(asked: dict[str, Any], source: Path, progress: Progress) -> dict[str, Any]:
    if asked["task"] == "optimize":
        return optimize(source, Path(asked["directory"]), progress, prove=asked["prove"])
    return inspect(source, progress) if asked["task"] == "inspect" else look(asked["files"], progress)


def main(task: str) -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever else prints does not speak for us
    _without_core_dumps()
    asked, stage = json.loads(task), "read"

    def progress(name: str) -> None:
        nonlocal stage
        stage = name
        print(json.dumps({"stage": name}), file=answers)

    source = Path(asked["source"])
    try:
        answer: dict[str, Any] = {"result": _result(asked, source, progress)}
    except TxoptError as err:
        answer = {"error": type(err).__name__, "message": str(err)}
    except ModuleNotFoundError as err:
        message = f'this command needs {err.name}: pip install "txopt[export]"'
        answer = {"error": MissingDependencyError.__name__, "message": message}
    except Exception as err:  # the libraries below raise whatever they like
        text = f"{type(err).__name__}: {err}"[:500]
        if stage in _READING:
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


if __name__ == "__main__":
    main(sys.argv[1])
