"""The process in which foreign bytes are parsed, changed and run: ``python -m txopt.exporter.foreign_child TASK``.

How it talks to ``foreign`` is child.py's affair.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txopt.exporter.child import Progress, serve
from txopt.runtime.errors import TxoptError


def optimize(
    source: Path, directory: Path, progress: Progress, *, prove: bool = False, in_place_cache: bool = False
) -> dict[str, Any]:
    """Writes model.onnx and weights.data into ``directory``, and proves them; gives the report.

    ``prove``: every fusion alone, too; where there are branches or loops that is done in any case. ``in_place_cache``: pasts that
    grow become buffers.
    """
    from txopt.exporter import foreign_original, foreign_parity, in_place, in_place_feeds, onnx_file, weights
    from txopt.exporter.bodies import paths
    from txopt.exporter.fusion import FOREIGN, fuse
    from txopt.exporter.graph import count
    from txopt.exporter.lowering.ort import lower

    progress("read")
    proto = onnx_file.parse(source)
    onnx_file.check(proto, source)
    facts: dict[str, Any] = {
        "opset": onnx_file.opset(proto),
        "nodes_before": sum(1 for _ in onnx_file.nodes(proto.graph)),
    }
    model = _prepared(source, progress)
    if in_place_cache:
        trials = in_place_feeds.sizes(in_place.pairs(model, source))
        original = foreign_original.ask(source, model, trials, in_place_feeds.SETS)
    else:
        original = foreign_original.ask(source, model)
    if original.renamed:
        model = _prepared(source, progress, original.renamed)
    progress("fuse")
    alone = prove or len(paths(model)) > 1  # a run of the file takes one branch of several
    reports = fuse(model, FOREIGN, [answer.feeds for answer in original.answers] if alone else None)
    fusions = {operator: report.to_json() for operator, report in reports.items()}
    refused = [reason for name in ("Attention", "Attention.groups") for reason in reports[name].refused]
    cache = in_place.rewrite(model, source, refused) if in_place_cache else None
    if cache is not None:
        original = in_place_feeds.in_buffers(original, cache)
    progress("lower")
    precision = foreign_parity.precision(model)
    lower(model, precision)
    progress("write")
    weights.write({"model": model}, directory)
    progress("prove")
    parity = foreign_parity.prove(original, directory / "model.onnx", precision)
    nodes = count(model)
    facts |= {"nodes_after": sum(nodes.values()), "operators": nodes, "fusions": fusions, "parity": parity}
    return facts | {"cache": None if cache is None else cache.to_json()}


def inspect(source: Path, progress: Progress) -> dict[str, Any]:
    """What is in the file and what would fuse, with the picture of both; where it could not be optimized, ``problem`` says why."""
    from txopt.exporter import description, onnx_file
    from txopt.exporter.fusion import FOREIGN, fuse

    progress("read")
    proto = onnx_file.parse(source)
    document, model = description.of_file(proto, source), None
    try:
        onnx_file.check(proto, source)
        model = _prepared(source, progress)
        progress("fuse")
        document |= {
            "fusions": {name: report.to_json() for name, report in fuse(model, FOREIGN).items()},
            "problem": None,
        }
    except TxoptError as err:
        document |= {"fusions": None, "problem": str(err)}
    return {"document": document, "picture": description.picture(proto, model)}


def look(files: dict[str, str], progress: Progress) -> dict[str, Any]:
    """The picture of graphs, by their names, as they are."""
    from txopt.exporter import description, onnx_file

    progress("read")
    return description.stored({name: onnx_file.parse(Path(file)) for name, file in files.items()})


def _prepared(source: Path, progress: Progress, renamed: Mapping[Any, str] | None = None) -> Any:
    """The file's graph as fusions want it; ``renamed``: axes whose names it has wrong."""
    import onnx_ir as ir

    from txopt.exporter import foreign_original, onnx_file
    from txopt.exporter.bodies import forget_lengths

    progress("convert")
    model = onnx_file.load(source)
    foreign_original.rename(model, renamed or {})
    for output in model.graph.outputs:  # whose axes people name as they like, and nobody checks
        if output.shape is not None and output not in model.graph.inputs:
            output.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in output.shape])
    forget_lengths(model)
    onnx_file.convert(model, source)
    progress("clean")
    onnx_file.clean(model)
    return model


def work(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One task by its name: "optimize", "inspect" or "look"."""
    source = Path(task["source"])
    if task["task"] == "optimize":
        options = {key: task[key] for key in ("prove", "in_place_cache")}
        return optimize(source, Path(task["directory"]), progress, **options)
    return inspect(source, progress) if task["task"] == "inspect" else look(task["files"], progress)


if __name__ == "__main__":
    serve(sys.argv[1], work)
