"""The process in which the files of an Optimum export are parsed, changed and run: ``python -m txopt.exporter.optimum_child TASK``.

Writes graphs, weights and reference cases into a directory, and answers with what the manifest says of them. How it talks to
``optimum`` is child.py's affair.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from txopt.exporter.child import Progress, serve


def work(task: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """One export; where the task names no target, its reference cases alone."""
    from txopt.exporter import optimum_graphs, reference, weights
    from txopt.exporter.case_plan import plans
    from txopt.exporter.graph import count
    from txopt.exporter.lowering import LOWERINGS
    from txopt.exporter.optimum_folder import open_folder
    from txopt.exporter.originals import Originals
    from txopt.runtime import cases

    directory = Path(task["directory"])
    progress("load")
    folder = open_folder(Path(task["source"]))
    graphs = optimum_graphs.load(folder)
    originals = Originals(folder, optimum_graphs.past_shapes(folder))
    facts = originals.facts
    progress("record")
    cases.save(reference.record(originals), directory)
    found: dict[str, Any] = {
        "kind": facts.kind,
        "task": facts.task,
        "family": facts.family,
        "source_limit": facts.source_limit,
        "source_bounds": facts.source_bounds,
    }
    found["skipped"] = plans(facts)[1]
    if task["target"] is None:
        return found
    progress("trace")
    cache = optimum_graphs.split(graphs, facts, int(folder.config.hidden_size))
    progress("fuse")
    optimum_graphs.fuse(graphs)
    progress("lower")
    for model in graphs.models().values():
        LOWERINGS[task["target"]](model, "fp32")
    fusion = {
        name: {"patterns": graphs.reports[name], "nodes": count(model)} for name, model in graphs.models().items()
    }
    progress("write")
    weights.write(graphs.models(), directory)
    specs = {name: spec.to_json() for name, spec in graphs.specs().items()}
    made = {"graphs": specs, "cache": cache.to_json(), "fusion": fusion, "generation": dict(facts.generation)}
    return {**found, **made, "files": folder.hashes()}


if __name__ == "__main__":
    serve(sys.argv[1], work)
