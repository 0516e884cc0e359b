"""Who fuses what: ``python -m txopt.benchmarks.fusion [--models BART,T5] [--out FILE.json]``.

Fourteen architectures, small and with random weights, by each road to a graph: txopt's own export, torch.onnx (dynamo), torch.onnx
(TorchScript) and Optimum (``--optimum DIR``, which holds a folder of files for each name in lower case). In each file of a foreign
road the attention blocks and norms that each tool fuses are counted; txopt's answer counts only with its proof that the file still
says the same. A road that cannot be gone says why.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from txopt.benchmarks.foreign_models import EXPORTERS, NAMES, Model, Size, build, quiet, write
from txopt.benchmarks.fusers import TOOLS, attention, norms

SIZE = Size()
LIMIT = 300  # seconds for one tool and file

Cell = dict[str, Any]


def measure(names: list[str], optimum: Path | None) -> dict[str, Any]:
    """By architecture: what it has, and what was fused in each road's files."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in names:
            model = build(name, SIZE)
            roads: dict[str, Any] = {"txopt": {"txopt": _ours(model, work / name)}}
            for exporter in EXPORTERS:
                file = work / f"{name}.{exporter}.onnx"
                problem = _written(model, exporter, file)
                roads[exporter] = {tool: {"problem": problem} if problem else _asked(tool, file) for tool in TOOLS}
            if optimum is not None:
                roads["optimum"] = _folder(optimum / name.lower())
            table[name] = {"blocks": model.blocks, "norms": model.norms, "roads": roads}
            sys.stderr.write(f"{name}: {json.dumps(roads)}\n")
    return table


def _ours(model: Model, work: Path) -> Cell:
    from txopt.exporter.pipeline import export
    from txopt.runtime.errors import TxoptError

    with quiet():
        model.module.model.save_pretrained(work / "checkpoint")
    try:
        artifact = export(work / "checkpoint", work / "out")
    except TxoptError as err:
        return {"problem": _short(err)}
    total: Counter[str] = Counter()
    for graph in artifact.manifest.fusion.values():
        total.update(graph["nodes"])
    return {"attention": attention(total), "norms": norms(total), "nodes": total.total()}


def _written(model: Model, exporter: str, file: Path) -> str | None:
    """None, or why there is no file."""
    try:
        write(model, exporter, file)
    except Exception as err:  # torch raises a dozen kinds
        return _short(err.__cause__ or err)
    return None


def _asked(tool: str, file: Path) -> Cell:
    command = [sys.executable, "-m", "txopt.benchmarks.fusers", tool, str(file), str(SIZE.heads), str(SIZE.width)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done in {LIMIT} s"}
    if done.returncode:
        return {"problem": _short(done.stderr.strip().rpartition("\n")[2])}
    found: Cell = json.loads(done.stdout)
    return found


def _folder(folder: Path) -> dict[str, Cell]:
    """Sums over the files of one Optimum folder; what a block is counted for in several of them is counted several times."""
    files = sorted(folder.glob("*.onnx"))
    if not files:
        return {tool: {"problem": f"no folder {folder.name}"} for tool in TOOLS}
    answers = {tool: [_asked(tool, file) for file in files] for tool in TOOLS}
    sums = {}
    for tool, cells in answers.items():
        problems = [cell["problem"] for cell in cells if "problem" in cell]
        keys = ("attention", "norms", "nodes")
        sums[tool] = {"problem": problems[0]} if problems else {key: sum(cell[key] for cell in cells) for key in keys}
    return sums


def _short(reason: object) -> str:
    return " ".join(str(reason).split())[:160]


def page(table: dict[str, Any]) -> str:
    """The tables in Markdown: attention blocks, then norms, fused of those there are."""
    return "\n\n".join(
        _table(table, key, title) for key, title in (("attention", "Attention blocks"), ("norms", "Norms"))
    )


def _table(table: dict[str, Any], key: str, title: str) -> str:
    columns = [("txopt", "txopt")] + [(road, tool) for road in (*EXPORTERS, "optimum") for tool in TOOLS]
    columns = [(road, tool) for road, tool in columns if any(road in row["roads"] for row in table.values())]
    head = ["model", *(f"{road}: {tool}" if road != "txopt" else "txopt's own export" for road, tool in columns)]
    lines = [f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, row in table.items():
        whole = row["blocks"] if key == "attention" else row["norms"]
        cells = [row["roads"].get(road, {}).get(tool, {}) for road, tool in columns]
        said = [f"{cell[key]} of {whole}" if key in cell else "fails" if "problem" in cell else "" for cell in cells]
        lines.append("| " + " | ".join([name, *said]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(NAMES), help="some of them, by comma")
    parser.add_argument("--optimum", type=Path, help="a directory of folders that optimum-onnx made")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--from", dest="earlier", type=Path, help="print the page of an earlier JSON, measure nothing")
    arguments = parser.parse_args()
    table = (
        json.loads(arguments.earlier.read_text("utf-8"))
        if arguments.earlier
        else measure(arguments.models.split(","), arguments.optimum)
    )
    sys.stdout.write(page(table) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
