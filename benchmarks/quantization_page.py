"""The tables of docs/quantization.md, from the JSON that benchmarks/quantization.py writes, and nothing but what that says."""

from collections.abc import Iterable, Sequence
from typing import Any

from txopt.benchmarks.machine import described
from txopt.benchmarks.quantization_loss import VARIANTS

Document = dict[str, Any]

_ORDER = {variant.name: place for place, variant in enumerate(VARIANTS)}


def page(document: Document) -> str:
    """One section for every part that was measured."""
    sections = [_losses(document), _speed(document), _invariance(document), _cost(document)]
    return "\n\n".join(section for section in sections if section)


def _losses(document: Document) -> str:
    parts = []
    for model, found in document.get("loss", {}).items():
        rows = dict(sorted(found.get("rows", {}).items(), key=lambda row: _ORDER.get(row[0], len(_ORDER))))
        measured = [row for row in rows.values() if "problem" not in row]
        before = f"; fp32: {_interval(measured[0]['baseline']['figure'])}" if measured else ""
        head = ("", found["metric"], "lost", "may lose", "same tokens, forced", "free", "weights", "artifact")
        lines = [_loss(name, row, found["allowed"]) for name, row in rows.items()]
        parts.append(f"### {model}: what is lost\n\n{_data(found['data'])}{before}.\n\n{_table(head, lines)}")
        if problems := [f"- {name}: {row['problem']}" for name, row in rows.items() if "problem" in row]:
            parts.append("\n".join(problems))
    return "\n\n".join(parts)


def _loss(name: str, row: Document, allowed: dict[str, float]) -> list[str]:
    may = f"{allowed[name.split()[0]]:g}"
    if "problem" in row:
        return [name, "-", "not measured", may, "-", "-", "-", "-"]
    shares = [f"{row['agreement'][key]['value']:.2f} %" for key in ("forced_tokens", "free_prefix")]
    size = [f"{row['size'][key]:.3f}x" for key in ("weights", "artifact")]
    return [name, f"{row['candidate']['figure']['value']:.2f}", _interval(row["loss"]), may, *shares, *size]


def _data(facts: Document) -> str:
    seconds = facts.get("test_seconds")
    made = f", {seconds:g} s" if seconds is not None else ""
    spoken = ""
    if "espeak" in facts:
        others = facts["espeak"] or "nobody (`apt install espeak-ng`)"
        spoken = f", {facts['recorded_clips']} of them recorded, the others spoken by {others}"
    return f"{facts['samples']} {facts['what']}{made}{spoken}"


def _speed(document: Document) -> str:
    rows = [
        [model, scheme, *_ratios(row), *(f"{row['size'][key]:.3f}x" for key in ("weights", "artifact"))]
        for model, schemes in document.get("speed", {}).items()
        for scheme, row in schemes.items()
    ]
    if not rows:
        return ""
    head = ("", "", "batch 1", "batch 8", "weights", "artifact")
    where = f"On {described(document['machine'])}.\n\n" if "machine" in document else ""
    return f"### How much faster than fp32\n\n{where}{_table(head, rows)}"


def _ratios(row: Document) -> Iterable[str]:
    for batch in ("batch 1", "batch 8"):
        found = row[batch]["ratio"]
        yield f"{found['median']:.2f}x ({found['least']:.2f} to {found['most']:.2f})"


def _invariance(document: Document) -> str:
    found = document.get("invariance", {})
    if not found:
        return ""
    schemes = list(dict.fromkeys(scheme for row in found.values() for scheme in row))
    rows = [
        [model, *(f"{row[scheme]:.1e}" if scheme in row else "-" for scheme in schemes)] for model, row in found.items()
    ]
    return f"### How far a batch moves logits\n\n{_table(('', *schemes), rows)}"


def _cost(document: Document) -> str:
    parts = []
    if rows := document.get("cost", {}).get("rows"):
        most = rows.get("fp32", {}).get("peak_mb")
        lines = [
            [name, "fails", "-", "-"]
            if "problem" in row
            else [name, f"{row['seconds']:g}", f"{row['peak_mb']:g}", f"{row['peak_mb'] / most:.2f}x" if most else "-"]
            for name, row in rows.items()
        ]
        heard = f"{document['cost']['data']['calibration_seconds']:g} s of speech"
        head = ("", "seconds", "peak MiB", "of fp32's")
        parts.append(f"### What quantizing Whisper tiny.en costs, with {heard}\n\n{_table(head, lines)}")
    for model, rows in document.get("seconds", {}).items():
        stages = list(dict.fromkeys(stage for row in rows.values() for stage in row))
        lines = [[name, *(f"{row.get(stage, 0):g}" for stage in stages)] for name, row in rows.items()]
        parts.append(f"### {model}: seconds of quantizing\n\n{_table(('', *stages), lines)}")
    return "\n\n".join(parts)


def _interval(value: dict[str, float | None]) -> str:
    """Of an estimate; a certificate has null for what is no number."""
    shown = {key: "?" if number is None else f"{number:.2f}" for key, number in value.items()}
    return f"{shown['value']} ({shown['low']} to {shown['high']})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines])
