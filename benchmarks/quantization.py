"""What quantization loses and gains: ``python -m txopt.benchmarks.quantization [--models g2p,whisper] [--out FILE.json]``.

Parts, each by itself with --parts:

    loss         points of the task's metric against fp32, with interval, token agreement, size; g2p and Whisper tiny.en
    speed        generate() of the quantized artifact against the fp32 one, in turn; T5-small's and Marian's sizes, random weights
    invariance   how far a row's logits move when it is batched with others; expected 0
    cost         seconds and peak memory of quantizing Whisper tiny.en with five minutes of speech, against running it in fp32;
                 of int8, static int8 and int4 by their default methods

Losses, sizes and invariance do not depend on what else the machine does; speed and cost do. docs/quantization.md has the tables.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from txopt.benchmarks import quantization_cost, quantization_loss, quantization_speed
from txopt.benchmarks.fusion import put
from txopt.benchmarks.quantization_invariance import moved
from txopt.benchmarks.quantization_loss import SUBJECTS, VARIANTS, Variant
from txopt.benchmarks.quantization_page import page
from txopt.runtime.errors import MissingDependencyError
from txopt.runtime.model import Model, load

SPEECH = Path(__file__).resolve().parents[1] / "tests" / "data" / "speech"
PARTS = ("loss", "speed", "invariance", "cost")


def measure(arguments: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """Pieces of the document, each as soon as it is known: a whole run takes long, and what is measured should not be lost."""
    variants = [
        variant
        for variant in VARIANTS
        if variant.scheme in arguments.schemes
        and variant.method in arguments.methods
        and variant.name in arguments.rows
    ]
    if "loss" in arguments.parts:
        for name in arguments.models:
            yield from _losses(name, variants, work, arguments)
    if "speed" in arguments.parts or "invariance" in arguments.parts:
        yield from quantization_speed.measure(arguments.schemes, arguments.parts, work, _note)
    if "cost" in arguments.parts:
        try:
            yield from quantization_cost.measure(variants, arguments.speech, work, _note)
        except MissingDependencyError as err:
            _note(f"cost is left out: {err}")


def _losses(name: str, variants: list[Variant], work: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    _note(name)
    try:
        subject = SUBJECTS[name](work, arguments.speech, arguments.limit)
    except MissingDependencyError as err:
        _note(f"{name} is left out: {err}")
        return
    facts = {"data": dict(subject.facts), "metric": subject.metric, "allowed": dict(subject.allowed)}
    yield {"loss": {name: facts}}
    (work / f"{name}-quantized").mkdir()
    baseline = Model(subject.artifact)
    for variant, row in quantization_loss.measure(subject, variants, work / f"{name}-quantized", _note):
        seconds = row.pop("seconds", None)
        yield {"loss": {name: {"rows": {variant: row}}}}
        if "invariance" in arguments.parts and "problem" not in row:
            candidate = load(quantization_loss.place(work / f"{name}-quantized", variant))
            yield {"invariance": {name: {"fp32": moved(baseline), variant: moved(candidate)}}}
        if seconds and "cost" in arguments.parts:  # a number of this machine at this hour; the rest is none
            yield {"seconds": {name: {variant: seconds}}}


def merged(earlier: Any, later: Any) -> Any:
    """``later`` over ``earlier``, mapping by mapping; rows measured on other data than these are left out."""
    if not isinstance(earlier, dict) or not isinstance(later, dict):
        return later
    if "problem" in earlier or "problem" in later:  # one row, measured anew
        return later
    if "data" in later and "rows" in earlier and earlier.get("data") != later["data"]:
        return later
    return {**earlier, **{name: merged(earlier.get(name), value) for name, value in later.items()}}


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parsed() -> argparse.Namespace:
    def some(known: tuple[str, ...]) -> dict[str, Any]:
        def split(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [name for name in names if name not in known]:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}; found {', '.join(unknown)}")
            return names

        return {"type": split, "default": list(known), "help": f"some of {', '.join(known)}, by comma"}

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", **some(PARTS))
    parser.add_argument("--models", **some(tuple(SUBJECTS)))
    parser.add_argument("--schemes", **some(tuple(dict.fromkeys(variant.scheme for variant in VARIANTS))))
    parser.add_argument("--methods", **some(tuple(dict.fromkeys(variant.method for variant in VARIANTS))))
    parser.add_argument("--rows", **some(tuple(variant.name for variant in VARIANTS)))
    parser.add_argument(
        "--speech",
        type=Path,
        action="append",
        metavar="DIR",
        help="recorded clips and their references.tsv, instead of tests/data/speech",
    )
    parser.add_argument("--limit", type=int, help="most words, and most sentences: for a first look")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the JSON there; what is there of others stays"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put the tables between the marks of this Markdown file"
    )
    parser.add_argument(
        "--from", dest="earlier", type=Path, metavar="FILE", help="print the tables of an earlier JSON, measure nothing"
    )
    arguments = parser.parse_args()
    arguments.speech = arguments.speech or [SPEECH]
    return arguments


def main() -> None:
    arguments = _parsed()
    logging.disable(logging.WARNING)  # the loss gate's, of the few samples that quantizing looks at by itself
    source = arguments.earlier or arguments.out
    document = json.loads(source.read_text("utf-8")) if source and source.exists() else {}
    if not arguments.earlier:
        with tempfile.TemporaryDirectory(prefix="txopt-") as folder:
            for piece in measure(arguments, Path(folder)):
                document = merged(document, piece)
                if arguments.out:
                    arguments.out.write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    sys.stdout.write(page(document) + "\n")
    if arguments.page:
        put(page(document), arguments.page)


if __name__ == "__main__":
    main()
