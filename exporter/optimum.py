"""The folder of an Optimum export (optimum-onnx) to a verified artifact: the door beside checkpoints and custom modules.

Owns the manifest and what reaches the disk. The .onnx files are never parsed here: ``optimum_child`` does everything that native code
could crash in, in a process of its own. The reference is what the files say themselves, run by ONNX Runtime: no PyTorch is asked.
"""

import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from txopt import __version__
from txopt.exporter.child import Progress, ask
from txopt.exporter.frontend import collect
from txopt.exporter.optimum_folder import open_folder
from txopt.runtime import cases as reference_cases
from txopt.runtime.cases import Case
from txopt.runtime.errors import UsageError
from txopt.runtime.graphs import CacheSpec, GraphSpec
from txopt.runtime.manifest import Manifest
from txopt.runtime.writer import ArtifactWriter

_CHILD = "txopt.exporter.optimum_child"
_VERSIONS = ("transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def draft(
    source: Path, writer: ArtifactWriter, *, target: str, precision: str, progress: Progress
) -> tuple[Manifest, list[str]]:
    """Writes graphs, weights, cases and tokenizer into the writer's directory; the manifest, and what could not be asked.

    Raises:
        SourceError: the folder is not whole, or its decoder cannot be given a cache. UsageError: another precision than fp32.
    """
    if precision != "fp32":
        raise UsageError(f"precision: an export of Optimum keeps the one it has, expected fp32, got {precision!r}")
    open_folder(source)  # what is wrong with it is said before a process starts
    task = {"directory": str(writer.directory), "target": target}
    made = ask(_CHILD, source, task, progress)
    problems: list[str] = []
    graphs = {name: GraphSpec.from_json(spec, name, problems) for name, spec in made["graphs"].items()}
    cache = CacheSpec.from_json(made["cache"], "cache", problems)
    assert not problems, f"our own child made them: {problems}"
    frontend = collect(source, made["task"], made["family"], writer.directory, source_limit=made["source_limit"])
    manifest = Manifest(
        kind=made["kind"],
        task=made["task"],
        family=made["family"],
        precision=precision,
        target=target,
        source={"name": source.name, "kind": "optimum", "files": made["files"]},
        versions={"txopt": __version__, **{name: version(name) for name in _VERSIONS}},
        graphs=graphs,
        cache=cache,
        generation=made["generation"],
        frontend=frontend | made["source_bounds"],
        fusion=made["fusion"],
        calibration=None,
        parity={},
    )
    return manifest, made["skipped"]


def record(source: Path) -> tuple[str, str, list[Case]]:
    """(kind, task, cases) of the files in ``source``, fresh.

    Raises:
        SourceError: the folder is not whole, or ONNX Runtime does not run its files.
    """
    open_folder(source)
    with tempfile.TemporaryDirectory(prefix="txopt-cases-") as folder:
        made: dict[str, Any] = ask(_CHILD, source, {"directory": folder, "target": None}, None)
        return made["kind"], made["task"], reference_cases.load(Path(folder))
