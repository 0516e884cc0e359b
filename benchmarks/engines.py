"""What TensorRT-RTX builds here, without a GPU: ``python -m txopt.benchmarks.engines [--out FILE.json] [--page docs/tensorrt.md]``.

Every main family in every precision: the layers that were built, and the size of the plans. Then a model of T5-small's size in
float16: seconds for each plan, and its bytes beside those of the weights that its graph reads. Nothing is run: that takes a GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from txopt.benchmarks import foreign_models, main_road
from txopt.benchmarks.engine_graphs import PRECISIONS, graphs
from txopt.benchmarks.fusion import put
from txopt.exporter import engines, weights
from txopt.exporter.engine import Engine, Switches
from txopt.exporter.lowering import tensorrt
from txopt.exporter.pipeline import export
from txopt.exporter.profiles import Sizes, profiles_of
from txopt.runtime.artifact import Artifact

FAMILIES = ("T5", "BART", "Marian", "M2M100", "Whisper", "TrOCR")
SIZE = foreign_models.Size(layers=2, width=128, heads=2, vocabulary=200)  # heads of 64, as most models have
RUNTIME, CAPABILITY, LENGTH = "tensorrt-rtx", "SM89", 32
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_SHOWN = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "NORMALIZATION", "QUANTIZE", "DEQUANTIZE")


def family(name: str, work: Path) -> dict[str, Any]:
    """Rows of one family, by precision: both plans together."""
    source, model = work / name, foreign_models.build(name, SIZE).module.model
    for key, token in _TOKENS.items():  # TrOCR's two halves say them nowhere
        for config in (model.config, model.generation_config):
            setattr(config, key, token)
    model.save_pretrained(source)
    artifact = export(source, work / f"{name}-out")
    return {precision: built(artifact, precision, work) for precision in PRECISIONS}


def built(artifact: Artifact, precision: str, work: Path) -> dict[str, Any]:
    """What is built of the graphs of ``artifact`` in ``precision``."""
    builder = Engine(RUNTIME, [CAPABILITY], Switches())
    varies = any("T" in item.axes for item in artifact.manifest.graphs["encoder"].outputs)
    sizes = Sizes.of(artifact.manifest, batch=2, beams=2, source=16 if varies else None, prompt=8, cache=LENGTH)
    layers: Counter[str] = Counter()
    size = apart = 0
    for name, model in graphs(artifact, precision).items():
        lowered = tensorrt.lower(model, cache_length=LENGTH if name == "decoder" else None)
        with tempfile.TemporaryDirectory(dir=work) as folder:
            weights.write({name: lowered}, Path(folder))
            profiles = profiles_of(artifact.manifest.graphs[name], sizes, artifact.manifest, alone=False)
            made, _ = builder.build(Path(folder) / f"{name}.onnx", profiles, lambda done, total: None)
        layers.update(made.layers)
        size, apart = size + len(made.plan), apart + made.apart
    return {"layers": {kind: layers[kind] for kind in _SHOWN}, "attention_apart": apart, "bytes": size}


def t5_small(work: Path) -> dict[str, Any]:
    """A model of T5-small's size in float16, with the sizes that suit it: seconds and bytes of each plan."""
    artifact = export(main_road.build("t5-small", work / "t5-small"), work / "t5-small-out", precision="fp16")
    start = time.perf_counter()
    made = engines.build(artifact.path, work / "t5-small-engines", engines.Options(capabilities=(CAPABILITY,)))
    total = time.perf_counter() - start
    plans = {}
    for name, build in made.builds.items():
        read = {
            (tensor.offset, tensor.length)
            for value in ir.load(artifact.file(artifact.manifest.graphs[name].file)).graph.initializers.values()
            if isinstance(tensor := value.const_value, ir.ExternalTensor)
        }
        stored = sum(int(length or 0) for _, length in read)
        plans[name] = {
            "seconds": build["seconds"],
            "bytes": build["bytes"],
            "weights_bytes": stored,
            "over_weights": round(build["bytes"] / stored, 3),
        }
    return {"seconds": round(total, 1), "plans": plans}


def page(document: dict[str, Any]) -> str:
    """The tables, in Markdown."""
    lines = [
        f"Built with {RUNTIME} {document['version']} for {CAPABILITY} on a machine without a GPU; two layers, heads of 64. "
        "Nothing was run.",
        "",
        _row(("", *PRECISIONS)),
        _row(["---"] * (1 + len(PRECISIONS))),
    ]
    for name, rows in document["families"].items():
        lines.append(_row((name, *(_cell(rows[precision]) for precision in PRECISIONS))))
    small = document["t5_small"]
    lines += [
        "",
        "T5-small's size in fp16, default sizes:",
        "",
        _row(("plan", "built in", "bytes", "over its graph's weights")),
    ]
    lines.append(_row(["---"] * 4))
    for name, plan in small["plans"].items():
        lines.append(
            _row((name, f"{plan['seconds']:.1f} s", f"{plan['bytes'] / 1e6:.1f} MB", f"{plan['over_weights']:.2f}x"))
        )
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    layers = row["layers"]
    parts = [f"{layers['ATTENTION_INPUT']} attention"]
    if row["attention_apart"]:
        parts[0] += f" ({row['attention_apart']} apart)"
    parts.append(f"{layers['KV_CACHE_UPDATE']} cache")
    if layers["NORMALIZATION"]:
        parts.append(f"{layers['NORMALIZATION']} norm")
    if layers["DEQUANTIZE"]:
        parts.append(f"{layers['QUANTIZE']} Q, {layers['DEQUANTIZE']} DQ")
    return ", ".join(parts)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    parser.add_argument("--page", type=Path, help="put the tables between the marks of this Markdown file")
    parser.add_argument("--from", dest="earlier", type=Path, help="print the page of an earlier JSON, build nothing")
    arguments = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if arguments.earlier:
        document = json.loads(arguments.earlier.read_text("utf-8"))
    else:
        with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
            document = {"version": Engine(RUNTIME, [CAPABILITY], Switches()).version}
            document["families"] = {name: family(name, Path(folder)) for name in FAMILIES}
            document["t5_small"] = t5_small(Path(folder))
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    sys.stdout.write(page(document) + "\n")
    if arguments.page:
        put(page(document), arguments.page)


if __name__ == "__main__":
    main()
