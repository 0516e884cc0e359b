"""Artifacts and parity reports as people read them: a JSON document and a few lines of text."""

from typing import Any

from txopt.runtime.artifact import Artifact
from txopt.runtime.parity import ParityReport


def of_artifact(artifact: Artifact) -> tuple[dict[str, Any], str]:
    """(document, text): sizes, operators, fusions, parity."""
    manifest = artifact.manifest
    sizes = {name: entry.size for name, entry in sorted(manifest.files.items())}
    total = sum(sizes.values())
    lines = [
        f"{artifact.path}: {manifest.family} ({manifest.kind}, {manifest.task}), {manifest.precision} for {manifest.target}",
        f"  {total / 1e6:.1f} MB in {len(sizes)} files: "
        + ", ".join(f"{name} {_size(size)}" for name, size in sizes.items()),
    ]
    for name, fused in manifest.fusion.items():
        nodes = fused["nodes"]
        kept = ", ".join(f"{count} {operator}" for operator, count in nodes.items() if operator in _HEADLINES)
        lines.append(f"  {name}: {sum(nodes.values())} nodes, of them {kept}")
        for operator, report in fused["patterns"].items():
            if not report["fused"] and not report["refused"]:
                continue
            lines.append(f"    {operator}: {report['fused']} fused by pattern, {len(report['refused'])} refused")
            lines += [f"      {reason}" for reason in report["refused"]]
    lines.append("  " + _parity_line(manifest.parity))
    document = {
        "path": str(artifact.path),
        "kind": manifest.kind,
        "task": manifest.task,
        "family": manifest.family,
        "precision": manifest.precision,
        "target": manifest.target,
        "files": sizes,
        "bytes": total,
        "fusion": manifest.fusion,
        "parity": manifest.parity,
    }
    return document, "\n".join(lines)


def of_parity(report: ParityReport) -> str:
    """The report of a replay in lines."""
    lines = [_parity_line(report.certificate())]
    lines += [f"  {search}: {result}" for search, result in report.ids.items()]
    lines += [f"  near-tie: {tie}" for tie in report.near_ties]
    lines += [f"  {what} changes logits by at most {value:.1e}" for what, value in report.invariance.items()]
    lines += [f"  skipped: {reason}" for reason in report.skipped]
    return "\n".join(lines)


_HEADLINES = ("Attention", "TensorScatter", "RMSNormalization", "LayerNormalization", "MatMul", "Gemm")


def _parity_line(certificate: dict[str, Any]) -> str:
    worst = max(certificate["errors"].values(), default=0.0)
    verdict = "verified" if certificate["passed"] else "NOT verified"
    count = len({name.partition("/")[0] for name in certificate["errors"]})
    return (
        f"{verdict} against PyTorch: {count} cases, largest error {worst:.1e} (allowed {certificate['tolerance']:.0e})"
    )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
