"""Who fuses what: ``python -m txopt.benchmarks.fusion [--models BART,T5] [--out FILE.json]``.

Fourteen architectures, small and with random weights, by each road to a graph: txopt's own export, torch.onnx (dynamo), torch.onnx
(TorchScript) and the folders of Optimum that the tests keep (T5, BART, Marian, Whisper); beside them the files of tf2onnx that the
tests keep, of Keras and TensorFlow. In each file of a foreign road the attention blocks and norms that each tool fuses are counted;
txopt's answer counts only with its proof that the file still says the same. A road that cannot be gone says why.
"""

import argparse
import json
import lzma
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from txopt.benchmarks.foreign_models import EXPORTERS, NAMES, Model, Size, build, quiet, write
from txopt.benchmarks.fusers import TOOLS, attention, norms

SIZE = Size()
ROADS = {
    "txopt": "By `txopt export`:",
    "dynamo": "In files of `torch.onnx.export(dynamo=True)`:",
    "torchscript": "In files of `torch.onnx.export(dynamo=False)`:",
    "optimum": "In folders that Optimum exported (txopt the whole folder, the others its encoder and its decoder without past):",
    "tf2onnx": "In files of tf2onnx (`tests/data/make_tf2onnx_files.py` says what they are):",
}
FOLDERS = Path(__file__).resolve().parents[1] / "tests" / "data" / "optimum"
FILES = FOLDERS.parent / "tf2onnx"
OF_FILES = {  # attention blocks and norms
    "Keras encoder": ("encoder", 2, 4),
    "masked Keras encoder": ("masked", 2, 4),
    "Keras encoder-decoder": ("translator", 6, 10),
    "Keras 2 encoder": ("keras2", 2, 4),
    "TensorFlow BERT": ("bert", 2, 4),
}
MARKS = ("<!-- tables -->", "<!-- end of tables -->")
LIMIT = 300  # seconds for one tool and file

Cell = dict[str, Any]


def measure(names: list[str], optimum: Path, exporters: Sequence[str] = EXPORTERS) -> dict[str, Any]:
    """By architecture: what it has, and what was fused in each road's files; txopt's own is always gone."""
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in [name for name in names if name in OF_FILES]:
            table[name] = _file(name, work)
        for name in [name for name in names if name not in OF_FILES]:
            model = build(name, SIZE)
            roads: dict[str, Any] = {"txopt": {"txopt": _ours(model, work / name)}}
            for exporter in exporters:
                file = work / f"{name}.{exporter}.onnx"
                problem = _written(model, exporter, file)
                roads[exporter] = {tool: {"problem": problem} if problem else _asked(tool, file) for tool in TOOLS}
            if (archive := optimum / f"{name.lower()}.tar.xz").exists():
                roads["optimum"] = _folder(archive, work / f"{name}.optimum")
            counts = {"blocks": model.blocks, "own_blocks": model.own_blocks, "norms": model.norms}
            table[name] = {**counts, "roads": roads}
            sys.stderr.write(f"{name}: {json.dumps(roads)}\n")
    return table


def _ours(model: Model, work: Path) -> Cell:
    with quiet():
        model.module.model.save_pretrained(work / "checkpoint")
    return _exported(work / "checkpoint", work / "out")


def _exported(source: Path, out: Path) -> Cell:
    from txopt.exporter.pipeline import export
    from txopt.runtime.errors import TxoptError

    try:
        artifact = export(source, out)
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


def _asked(tool: str, file: Path, heads: int = SIZE.heads, width: int = SIZE.width) -> Cell:
    command = [sys.executable, "-m", "txopt.benchmarks.fusers", tool, str(file), str(heads), str(width)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"problem": f"not done in {LIMIT} s"}
    if done.returncode:
        return {"problem": _short(done.stderr.strip().rpartition("\n")[2])}
    found: Cell = json.loads(done.stdout)
    return found


def _file(name: str, work: Path) -> dict[str, Any]:
    """The row of a file of tf2onnx."""
    packed, blocks, norms = OF_FILES[name]
    file = work / f"{packed}.onnx"
    file.write_bytes(lzma.decompress((FILES / f"{packed}.onnx.xz").read_bytes()))
    return {"blocks": blocks, "norms": norms, "roads": {"tf2onnx": {tool: _asked(tool, file) for tool in TOOLS}}}


def _folder(archive: Path, work: Path) -> dict[str, Cell]:
    """What txopt makes of a folder as a whole, and what the others fuse in its encoder and its decoder over a whole sequence."""
    with tarfile.open(archive) as packed:
        packed.extractall(work, filter="data")
    folder = next(path.parent for path in work.rglob("config.json"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    heads = config.get("num_heads") or config["encoder_attention_heads"]
    cells = {"txopt": _exported(folder, work / "out")}
    for tool in list(TOOLS)[1:]:
        answers = [
            _asked(tool, folder / f"{part}_model.onnx", heads, config["d_model"]) for part in ("encoder", "decoder")
        ]
        problems = [answer["problem"] for answer in answers if "problem" in answer]
        keys = ("attention", "norms", "nodes")
        cells[tool] = (
            {"problem": problems[0]} if problems else {key: sum(cell[key] for cell in answers) for key in keys}
        )
    return cells


def _short(reason: object) -> str:
    return " ".join(str(reason).split())[:160]


def page(table: dict[str, Any]) -> str:
    """The tables in Markdown: attention blocks, then norms, fused of those there are."""
    return "\n\n".join(
        _table(table, key, title) for key, title in (("attention", "Attention blocks"), ("norms", "Norms"))
    )


def _table(table: dict[str, Any], key: str, title: str) -> str:
    """One table a road: architectures down, tools across."""
    parts = [f"### {title}"]
    for road in ("txopt", *EXPORTERS, "optimum", "tf2onnx"):
        rows = {name: row for name, row in table.items() if road in row["roads"]}
        if not rows:
            continue
        tools = list(next(iter(rows.values()))["roads"][road])
        head = ["", *(tools if road != "txopt" else ["fused"])]
        lines = [ROADS[road], "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for name, row in rows.items():
            blocks = row.get("own_blocks" if road == "txopt" else "blocks", row["blocks"])
            whole = blocks if key == "attention" else row["norms"]
            cells = [row["roads"][road][tool] for tool in tools]
            said = [f"{cell[key]} of {whole}" if key in cell else "fails" for cell in cells]
            lines.append("| " + " | ".join([name, *said]) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def put(text: str, file: Path) -> None:
    """``text`` between the two marks in ``file``."""
    before, _, rest = file.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not end:
        raise SystemExit(f"{file}: expected the marks {MARKS[0]} and {MARKS[1]}")
    file.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", "utf-8")


def merged(file: Path, table: dict[str, Any]) -> dict[str, Any]:
    """``table`` over what ``file`` has of other architectures and roads, in the order of NAMES and OF_FILES."""
    earlier = json.loads(file.read_text("utf-8")) if file.exists() else {}
    whole = earlier | {
        name: row | {"roads": earlier.get(name, {}).get("roads", {}) | row["roads"]} for name, row in table.items()
    }
    return {name: whole[name] for name in (*NAMES, *OF_FILES) if name in whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join((*NAMES, *OF_FILES)), help="some of them, by comma")
    parser.add_argument(
        "--optimum", type=Path, default=FOLDERS, help="where NAME.tar.xz of folders by optimum-onnx lie"
    )
    parser.add_argument("--own", action="store_true", help="txopt's own export alone, not torch's exporters")
    parser.add_argument("--out", type=Path, help="also write the JSON there; what is there of others stays")
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this Markdown file")
    parser.add_argument("--from", dest="earlier", type=Path, help="print the page of an earlier JSON, measure nothing")
    arguments = parser.parse_args()
    table = (
        json.loads(arguments.earlier.read_text("utf-8"))
        if arguments.earlier
        else measure(arguments.models.split(","), arguments.optimum, () if arguments.own else EXPORTERS)
    )
    if arguments.out:
        table = merged(arguments.out, table)
        arguments.out.write_text(json.dumps(table, indent=2) + "\n", "utf-8")
    sys.stdout.write(page(table) + "\n")
    if arguments.page:
        put(page(table), arguments.page)


if __name__ == "__main__":
    main()
