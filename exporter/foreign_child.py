"""The process in which foreign bytes are parsed, changed and run: ``python -m txopt.exporter.foreign_child TASK``.

How it talks to ``foreign`` is child.py's affair.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txopt.exporter.child import Progress, serve
from txopt.runtime.errors import TxoptError


def optimize(source: Path, directory: Path, progress: Progress) -> dict[str, Any]:
    """Writes model.onnx and weights.data into ``directory``, and proves them; gives the report."""
    from txopt.exporter import foreign_parity, onnx_file, weights
    from txopt.exporter.graph import count
    from txopt.exporter.lowering.ort import lower

    progress("read")
    proto = onnx_file.parse(source)
    onnx_file.check(proto, source)
    facts = {"opset": onnx_file.opset(proto), "nodes_before": len(proto.graph.node)}
    model, fusions = _fused(source, progress)
    progress("lower")
    lower(model, foreign_parity.precision(model))
    progress("write")
    weights.write({"model": model}, directory)
    progress("prove")
    parity = foreign_parity.prove(source, directory / "model.onnx", model)
    nodes = count(model)
    return {**facts, "nodes_after": sum(nodes.values()), "operators": nodes, "fusions": fusions, "parity": parity}


def inspect(source: Path, progress: Progress) -> dict[str, Any]:
    """What is in the file and what would fuse; where it could not be optimized, ``problem`` says why."""
    from txopt.exporter import onnx_file

    progress("read")
    proto = onnx_file.parse(source)
    document = onnx_file.describe(proto, source)
    try:
        onnx_file.check(proto, source)
        return {**document, "fusions": _fused(source, progress)[1], "problem": None}
    except TxoptError as err:
        return {**document, "fusions": None, "problem": str(err)}


def _fused(source: Path, progress: Progress) -> tuple[Any, dict[str, Any]]:
    from txopt.exporter import onnx_file
    from txopt.exporter.fusion import FOREIGN

    progress("convert")
    model = onnx_file.load(source)
    onnx_file.convert(model, source)
    progress("clean")
    onnx_file.clean(model)
    progress("fuse")
    reports = [fusion(model) for fusion in FOREIGN]
    return model, {report.operator: report.to_json() for report in reports}


def work(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One task: optimize where it names a directory, else inspect."""
    source, directory = Path(task["source"]), task["directory"]
    return optimize(source, Path(directory), progress) if directory else inspect(source, progress)


if __name__ == "__main__":
    serve(sys.argv[1], work)
