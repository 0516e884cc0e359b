"""What the page says, in the order it says it: numbers as texts, shares as percents. It knows no HTML, and bounds its lists."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from txopt.page.kinds import KINDS, kind_of
from txopt.runtime.errors import ArtifactError
from txopt.runtime.manifest import Manifest
from txopt.runtime.parity import reference_of
from txopt.summary import is_certificate, is_ours, megabytes

_MOST_NODES = 12  # named beside a reason
_MOST_REASONS = 20
_MOST_VALUES = 60
_MOST_BARS = 60
_LEAST_SHARE = 0.001  # of the bytes, for a bar of its own

_FUSED = "Before: the operators of the file. After: what txopt optimize makes of them, but for what an engine needs."
_UNKNOWN = "What fusing would make of it cannot be told."
_STORED = "An artifact holds its graphs as they are after fusing. What they were before is not kept; the counts of fusions are below."


def of_onnx(document: Mapping[str, Any], picture: Mapping[str, Any]) -> dict[str, Any]:
    """The page of a .onnx file: what ``foreign.picture`` found."""
    graph = _graph("", picture["graphs"][""])
    tiles = [
        _tile("size", megabytes(document["bytes"]), ", ".join(document["external_data"]) or "in one file"),
        _tile("parameters", f"{document['parameters']:,}", f"in {picture['weights']['all']:,} tensors"),
        _tile("operators", *_change(graph)),
        _tile("opset", str(document["opset"] or "none"), document["producer"] or "by nobody named"),
    ]
    return {
        "title": PurePath(document["path"]).name,
        "subtitle": f"{document['path']}: a .onnx file, and what fusing would make of it",
        "verdict": None,
        "tiles": tiles,
        "graphs": [graph],
        "legend": _legend([graph]),
        "note": _UNKNOWN if document["problem"] is not None else _FUSED,
        "problem": document["problem"],
        "fusions": [_fusions("", document["fusions"] or {})],
        "fused_word": "would fuse",
        **_sizes(picture),
        "surface": [_surface("", document["inputs"], document["outputs"])],
        "parity": None,
        "facts": [],
    }


def of_artifact(manifest: Manifest, path: str, picture: Mapping[str, Any]) -> dict[str, Any]:
    """The page of an artifact: its manifest, and what ``foreign.stored`` found in its graphs.

    Raises:
        ArtifactError: the manifest's reports of fusions and parity are another writer's, which no page is made for.
    """
    if not is_certificate(manifest.parity) or not all(map(is_ours, manifest.fusion.values())):
        raise ArtifactError(
            f'{path}: expected "fusion" and "parity" as txopt export writes them, found others; inspect it without --html'
        )
    sizes = {name: entry.size for name, entry in sorted(manifest.files.items())}
    names = [*picture["graphs"]]
    graphs = [_graph(name, picture["graphs"][name]) for name in names]
    parameters = sum(layer["parameters"] for layer in picture["layers"])
    count = sum(sum(row["nodes"] for row in graph["after"]) for graph in picture["graphs"].values())
    errors = manifest.parity["errors"]
    worst, tolerance = max(errors.values(), default=0.0), manifest.parity["tolerance"]
    return {
        "title": PurePath(path).name or path,
        "subtitle": f"{path}: {manifest.family} ({manifest.kind}, {manifest.task}), {manifest.precision} for {manifest.target}",
        "verdict": {
            "passed": bool(manifest.parity["passed"]),
            "text": f"verified against {reference_of(manifest)}" if manifest.parity["passed"] else "NOT verified",
        },
        "tiles": [
            _tile("size", megabytes(sum(sizes.values())), f"in {len(sizes)} files"),
            _tile("parameters", f"{parameters:,}", "each weight counted once"),
            _tile("operators", f"{count:,}", "in " + " and ".join(names)),
            _tile("largest error", f"{worst:.1e}", f"allowed {tolerance:.0e}"),
        ],
        "graphs": graphs,
        "legend": _legend(graphs),
        "note": _STORED,
        "problem": None,
        "fusions": [_fusions(name, manifest.fusion.get(name, {}).get("patterns", {})) for name in names],
        "fused_word": "fused",
        **_sizes(picture),
        "surface": [
            _surface(name, *([_tensor(tensor) for tensor in side] for side in (graph.inputs, graph.outputs)))
            for name, graph in ((name, manifest.graphs[name]) for name in names)
        ],
        "parity": _parity(manifest.parity),
        "facts": _facts(manifest, sizes),
    }


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _change(graph: Mapping[str, Any]) -> tuple[str, str]:
    before, after = graph["before"], graph["after"]
    if after is None:
        return f"{before['nodes']:,}", "as they are"
    return f"{before['nodes']:,} → {after['nodes']:,}", "before and after fusing"


def _graph(title: str, graph: Mapping[str, Any]) -> dict[str, Any]:
    """Rows that are there before or after side by side, and both sides in sum."""
    before, after = graph["before"], graph["after"]
    sides = {side: {row["layer"]: row for row in rows or ()} for side, rows in (("before", before), ("after", after))}
    return {
        "title": title,
        "rows": [
            {"layer": name, **{side: _cell(rows.get(name)) for side, rows in sides.items()}}
            for name in _merged([*sides["before"]], [*sides["after"]])
        ],
        "before": _side(before),
        "after": _side(after),
    }


def _merged(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """All names: ``first`` in its order, what only ``second`` has behind what is before it there."""
    merged = list(first)
    for index, name in enumerate(second):
        if name not in merged:
            merged.insert(merged.index(second[index - 1]) + 1 if index else 0, name)
    return merged


def _cell(row: Mapping[str, Any] | None) -> dict[str, Any]:
    if row is None:
        return {"nodes": 0, "blocks": [], "more": 0, "says": "nothing"}
    counts = Counter(operator for operator, _ in row["operators"])
    return {
        "nodes": row["nodes"],
        "blocks": [
            {"kind": kind_of(operator), "operator": operator, "name": name} for operator, name in row["operators"]
        ],
        "more": row["nodes"] - len(row["operators"]),
        "says": ", ".join(f"{count} {operator}" for operator, count in counts.most_common()),
    }


def _side(rows: Sequence[Mapping[str, Any]] | None) -> dict[str, Any] | None:
    """How much of one side is of which kind; of very long rows only what is shown is told apart."""
    if rows is None:
        return None
    counts = Counter(kind_of(operator) for row in rows for operator, _ in row["operators"])
    return {
        "nodes": sum(row["nodes"] for row in rows),
        "kinds": [
            {"kind": kind, "label": label, "nodes": counts[kind]} for kind, label in KINDS.items() if counts[kind]
        ],
    }


def _legend(graphs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    sides = [side for graph in graphs for side in (graph["before"], graph["after"]) if side]
    found = {kind["kind"] for side in sides for kind in side["kinds"]}
    return [{"kind": kind, "label": label} for kind, label in KINDS.items() if kind in found]


def _fusions(title: str, patterns: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {
            "operator": operator,
            "fused": report["fused"],
            "refused": len(report["refused"]),
            "reasons": _reasons(report["refused"]),
        }
        for operator, report in patterns.items()
    ]
    return {
        "title": title,
        "rows": sorted((row for row in rows if row["fused"] or row["refused"]), key=lambda row: -row["fused"]),
        "not_found": ", ".join(row["operator"] for row in rows if not row["fused"] and not row["refused"]),
    }


def _reasons(refused: Iterable[str]) -> list[dict[str, Any]]:
    """One entry a reason, with the nodes it was given for: "node: reason" is how fusions say it."""
    nodes: dict[str, list[str]] = {}
    for text in refused:
        node, _, reason = str(text).partition(": ")
        nodes.setdefault(reason or node, []).append(node)
    most = sorted(nodes.items(), key=lambda item: -len(item[1]))[:_MOST_REASONS]
    return [
        {"reason": reason, "nodes": len(names), "names": names[:_MOST_NODES], "more": max(0, len(names) - _MOST_NODES)}
        for reason, names in most
    ]


def _sizes(picture: Mapping[str, Any]) -> dict[str, Any]:
    layers = [(layer["name"] or "in no layer", layer["bytes"]) for layer in picture["layers"] if layer["bytes"]]
    total = sum(size for _, size in layers)
    parts = [(group["name"], group["bytes"]) for group in picture["weights"]["groups"]]
    groups = [(name, size) for name, size in parts if size > _LEAST_SHARE * total]
    rest = total - sum(size for _, size in groups)
    largest = picture["weights"]["largest"]
    return {
        "weights_total": megabytes(total),
        "layers": _bars(layers, total),
        "groups": _bars([*groups, *([("all others", rest)] if rest > 0 else [])], total),
        "largest": [
            {
                **weight,
                "shape": " × ".join(map(str, weight["shape"])) or "one number",
                "size": megabytes(weight["bytes"]),
            }
            for weight in largest
        ],
        "weights_count": picture["weights"]["all"],
    }


def _bars(sizes: Sequence[tuple[str, int]], total: int) -> list[dict[str, Any]]:
    shown = list(sizes[:_MOST_BARS])
    if len(sizes) > _MOST_BARS:
        shown.append((f"{len(sizes) - _MOST_BARS} more", sum(size for _, size in sizes[_MOST_BARS:])))
    longest = max((size for _, size in shown), default=1)
    return [
        {
            "label": label,
            "size": megabytes(size),
            "percent": round(100 * size / longest, 2),
            "share": f"{100 * size / total:.1f} %",
        }
        for label, size in shown
    ]


def _surface(title: str, inputs: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    rows = [
        {
            "kind": kind,
            "name": value["name"],
            "dtype": value["dtype"],
            "shape": "unknown" if value["shape"] is None else f"[{', '.join(map(str, value['shape']))}]",
        }
        for kind, values in (("input", inputs), ("output", outputs))
        for value in values
    ]
    return {"title": title, "rows": rows[:_MOST_VALUES], "more": max(0, len(rows) - _MOST_VALUES)}


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": tensor.axes}


def _parity(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """Errors as a table, a row for each tensor and a column for each case."""
    errors = {tuple(name.partition("/")[::2]): value for name, value in certificate["errors"].items()}
    cases, tensors = (list(dict.fromkeys(names)) for names in zip(*errors, strict=True)) if errors else ([], [])
    return {
        "tolerance": f"{certificate['tolerance']:.0e}",
        "cases": cases,
        "rows": [
            {"tensor": tensor, "errors": [_error(errors.get((case, tensor))) for case in cases]} for tensor in tensors
        ],
        "ids": dict(certificate.get("ids", {})),
        "skipped": list(certificate.get("skipped", ())),
    }


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _facts(manifest: Manifest, sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Tables of two columns: what is in the directory, where it came from, and what made it."""
    source = [(key, str(manifest.source[key])) for key in ("kind", "name") if key in manifest.source]
    return [
        {"title": "Files", "rows": [(name, megabytes(size)) for name, size in sizes.items()]},
        {"title": "Made from", "rows": source},
        {"title": "Made with", "rows": [(name, str(version)) for name, version in manifest.versions.items()]},
    ]
