"""Artifacts, parity reports and foreign graphs as people read them: a JSON document and a few lines of text."""

import math
from collections.abc import Mapping
from typing import Any

from txopt.runtime.artifact import Artifact
from txopt.runtime.engines import engines_of
from txopt.runtime.errors import ArtifactError
from txopt.runtime.graphs import SOURCE_AXES
from txopt.runtime.parity import ParityReport, reference_of


def of_artifact(artifact: Artifact, shown: str | None = None) -> tuple[dict[str, Any], str]:
    """(document, text): sizes, operators, fusions, engines, parity; ``shown`` is the user's own name for its directory."""
    manifest = artifact.manifest
    sizes = {name: entry.size for name, entry in sorted(manifest.files.items())}
    total = sum(sizes.values())
    lines = [
        f"{shown or artifact.path}: {manifest.family} ({manifest.kind}, {manifest.task}), {manifest.precision} for {manifest.target}",
        f"  {total / 1e6:.1f} MB in {len(sizes)} files: "
        + ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items()),
    ]
    for name, fused in manifest.fusion.items():
        if not is_ours(fused):
            lines.append(f"  {name}: another writer's report of fusions, shown with --json")
            continue
        nodes = fused["nodes"]
        kept = ", ".join(f"{count} {operator}" for operator, count in nodes.items() if operator in _HEADLINES)
        lines.append(f"  {name}: {sum(nodes.values())} nodes, of them {kept}")
        for operator, report in fused["patterns"].items():
            if not report["fused"] and not report["refused"]:
                continue
            lines.append(f"    {operator}: {report['fused']} fused by pattern, {len(report['refused'])} refused")
            lines += [f"      {reason}" for reason in (*report["refused"], *_proof(report))]
    lines += _rounding(manifest.calibration)
    engines, engines_problem = _engines(artifact)
    lines += [line for one in engines or () for line in _engine_set(one, sizes)]
    if engines_problem is not None:
        lines.append("  engines that cannot be read: " + engines_problem.replace("\n", "\n    "))
    lines.append("  " + _parity_line(manifest.parity, reference_of(manifest)))
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
        "calibration": manifest.calibration,
        "engines": engines,
        "engines_problem": engines_problem,
        "parity": manifest.parity,
    }
    return document, "\n".join(lines)


def _engines(artifact: Artifact) -> tuple[list[dict[str, Any]] | None, str | None]:
    """The sets of engines.json; None, and why, where this version cannot read it, for the graphs run without."""
    try:
        return [one.to_json() for one in engines_of(artifact)], None
    except ArtifactError as err:
        return None, str(err)


def _engine_set(one: dict[str, Any], sizes: Mapping[str, int]) -> list[str]:
    version = f"{one['version']}{' and later' if one['any_version'] else ''}"
    hardware = f"{', '.join(one['capabilities'])}{' and later' if one['any_hardware'] else ''}"
    cache = "" if one["cache_length"] is None else f", cache of {one['cache_length']} places"
    lines = [f"  engines of {one['runtime']} {version} for {hardware}, in {one['precision']}{cache}"]
    for plan in one["plans"].values():
        lines.append(f"    {plan['file']}: {megabytes(sizes[plan['file']])}")
        lines += [f"      profile {_profile(profile)}" for profile in plan["profiles"]]
    return lines


def _rounding(found: Any) -> list[str]:
    """What a quantized artifact was measured to lose; another writer's "calibration" is left to --json."""
    try:
        scheme, loss, data = found["scheme"], found["loss"], found["data"]
        lost, metric = loss["loss"], loss["metric"]["name"]
        agreed = next(name for name in _AGREED if name in loss["agreement"])
        before, after = loss["baseline"]["figure"]["value"], loss["candidate"]["figure"]["value"]
        made_up = ", made up" if data["synthetic"] else ""
        limit = "" if loss["max_loss"] is None else f", allowed {loss['max_loss']:g}"
        return [
            f"  {of_scheme(scheme)}",
            *_islands(found.get("islands", {})),
            *(
                f"    {each['weight']} in {each['as']}: {each['divergence_nats']:.1e} nats alone"
                for each in found.get("finer", ())
            ),
            f"  {metric} {before:.2f} before, {after:.2f} after: lost {lost['value']:.2f} points "
            f"(95% interval {lost['low']:.2f} to {lost['high']:.2f}{limit}) on {loss['data']['samples']} samples{made_up}",
            f"  {loss['agreement'][agreed]['value']:.2f}% of {_AGREED[agreed]}",
        ]
    except (TypeError, KeyError, ValueError, StopIteration):
        return []


def of_ranges(document: dict[str, Any], shown: str) -> str:
    """A file of ranges (calibration/ranges.py) in lines, each tensor with a plot of its magnitudes."""
    key, tensors = document["key"], {_printable(name): found for name, found in document["tensors"].items()}
    width = min(60, max(map(len, tensors), default=0))
    settings = ", ".join(
        _printable(f"{name} {value}") for name, value in key["settings"].items() if not isinstance(value, dict)
    )
    return "\n".join(
        [
            f"{shown}: ranges of {len(tensors)} tensors, by {key['method']}",
            f"  made from graphs {key['graph'][:12]}…, data {key['data'][:12]}…, {settings}",
            *(f"  {name:{width}}  {_plotted(found)}" for name, found in tensors.items()),
        ]
    )


def _printable(text: str) -> str:
    """``text`` from a file, which must not steer a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _plotted(found: dict[str, Any]) -> str:
    bars = found["histogram"]["bars"]
    columns = [max(bars[start : start + 4]) for start in range(0, len(bars), 4)]
    top = math.log1p(max(columns, default=0)) or 1.0
    plot = "".join(_HEIGHTS[round(math.log1p(count) / top * (len(_HEIGHTS) - 1))] for count in columns)
    if isinstance(found["amax"], (list, tuple)):
        return f"{plot:16}  {len(found['amax'])} channels, clipped at up to {max(found['amax']):.4g}"
    return f"{plot:16}  {found['min']:.4g} to {found['max']:.4g}, clipped at {found['amax']:.4g}; {found['count']:,} values"


def of_scheme(scheme: Mapping[str, Any]) -> str:
    """How weights and activations are rounded, of a certificate's "scheme"."""
    if "format" in scheme:
        return f"weights: {scheme['format']}; activations: {scheme['activations']}"
    if "block" not in scheme:
        return f"{scheme['activations'].partition(',')[0]}: ranges of activations by {scheme['method']}"
    encoder = f"; in the encoder {_grid(scheme['encoder'])}" if "encoder" in scheme else ""
    return f"weights: {_grid(scheme)}, by {scheme['method']}{encoder}"


def _grid(scheme: Mapping[str, Any]) -> str:
    if scheme["block"] is None:
        return f"{scheme['bits']} bits, one scale for each output"
    kind = "symmetric" if scheme["symmetric"] else "with zero points"
    return f"{scheme['bits']} bits in blocks of {scheme['block']}, {kind}"


def _islands(islands: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Each island by its first node, and the first of its reasons."""
    lines = []
    for graph, mine in islands.items():
        for island in mine:
            first, count = island["reasons"][0], len(island["nodes"])
            size = f", up to {first['largest']:.3g}" if "largest" in first else ""
            lines.append(
                f"    {graph}: {count} node{'s' if count > 1 else ''} in float32 from {island['nodes'][0]} on: "
                f"{first['why']} of {first['tensor']}{size}"
            )
    return lines


def of_parity(report: ParityReport) -> str:
    """The report of a replay in lines."""
    lines = [_parity_line(report.certificate(), report.reference)]
    lines += [f"  {search}: {result}" for search, result in report.ids.items()]
    lines += [f"  near-tie: {tie}" for tie in report.near_ties]
    lines += [f"  {what} changes logits by at most {value:.1e}" for what, value in report.invariance.items()]
    lines += [f"  skipped: {reason}" for reason in report.skipped]
    return "\n".join(lines)


def of_planned(document: dict[str, Any]) -> str:
    """What ``engines.plan`` would build, in lines."""
    nobody = "the GPU at hand" if document["runtime"] == "tensorrt" else "GPUs yet to be named (--capability)"
    for_whom = ", ".join(document["capabilities"]) or nobody
    sizes = document["sizes"]
    lines = [
        f"{document['artifact']}: would be built in {document['precision']} with {document['runtime']} for {for_whom}",
        f"  at most {sizes['batch']} sources{_of_length(document)}{_of_decoder(document)}",
        *[f"  with {name.replace('_', '-')}" for name, given in document["options"].items() if given],
    ]
    for plan in document["plans"].values():
        lines.append(f"  {plan['file']}: {sum(plan['nodes'].values())} nodes")
        lines += [f"    profile {_profile(profile)}" for profile in plan["profiles"]]
        lines += [
            f"    {kind[:-1]} {item['name']}: {item['dtype']} {_shape(item['axes'])}"
            for kind in ("inputs", "outputs")
            for item in plan[kind]
        ]
    return "\n".join(lines)


def _of_length(document: dict[str, Any]) -> str:
    """How long sources may be, where that varies."""
    return f" of {document['sizes']['source']}" if _axes(document) & set(SOURCE_AXES) else ""


def _of_decoder(document: dict[str, Any]) -> str:
    """The sizes that only a decoder has, which alone takes new tokens (Q)."""
    sizes = document["sizes"]
    told = f", {sizes['beams']} beams, prompts of {sizes['prompt']}, {sizes['cache']} tokens in the cache"
    return told if "Q" in _axes(document) else ""


def _axes(document: dict[str, Any]) -> set[str]:
    return {axis for plan in document["plans"].values() for profile in plan["profiles"] for axis in profile["axes"]}


def of_engines(document: dict[str, Any]) -> str:
    """What ``engines.build`` made, in lines."""
    lines = [
        f"{document['path']}: engines in {document['precision']} of {document['runtime']} {document['version']} for "
        + ", ".join(document["capabilities"])
    ]
    for name, plan in document["plans"].items():
        build = document["builds"][name]
        layers = ", ".join(f"{build['layers'].get(kind, 0)} {kind}" for kind in _LAYERS)
        how = "kept from before" if build["kept"] else f"built in {build['seconds']:.1f} s"
        lines.append(f"  {plan['file']}: {megabytes(build['bytes'])}, {how}; of its layers {layers}")
        if build["attention_apart"]:
            lines.append(
                f"    {build['attention_apart']} attentions have no kernel of their own: products and a softmax"
            )
        lines += [f"    profile {_profile(profile)}" for profile in plan["profiles"]]
    return "\n".join(lines)


def _profile(profile: dict[str, Any]) -> str:
    ranges = (
        f"{axis} {lengths[0]}"
        if lengths[0] == lengths[2]
        else f"{axis} {lengths[0]} to {lengths[2]} (tuned for {lengths[1]})"
        for axis, lengths in profile["axes"].items()
    )
    return f"{profile['name']}: {', '.join(ranges)}"


def of_onnx(document: dict[str, Any]) -> str:
    """What ``foreign.inspect`` found, in lines."""
    weights = f", with {', '.join(document['external_data'])}" if document["external_data"] else ""
    lines = [
        f"{document['path']}: opset {document['opset']}, {document['nodes']} nodes, by {document['producer'] or 'nobody named'}",
        f"  {document['parameters']:,} parameters, {megabytes(document['bytes'])}{weights}",
    ]
    for kind in ("inputs", "outputs"):
        lines += [
            f"  {kind[:-1]} {value['name']}: {value['dtype']} {_shape(value['shape'])}" for value in document[kind]
        ]
    lines += _layers(document["layers"])
    lines.append("  operators: " + ", ".join(f"{count} {name}" for name, count in document["operators"].items()))
    if document["problem"] is not None:
        return "\n".join(
            [*lines, "  what would fuse cannot be told:", "    " + document["problem"].replace("\n", "\n    ")]
        )
    return "\n".join([*lines, *_fusions(document["fusions"], "would fuse")])


def of_optimized(document: dict[str, Any]) -> str:
    """An ``OptimizeReport`` in lines."""
    parity, sizes = document["parity"], document["files"]
    runs, refused = [_sizes(run["sizes"]) for run in parity["runs"]], [_sizes(sizes) for sizes in parity["not_run"]]
    more = [f"{len(runs) - 2} other sets of sizes"] if len(runs) > 2 else []
    where = " and ".join([*runs[:2], *more]) if any(runs) else "its fixed sizes"
    error, allowed = f"{parity['largest_error']:.1e}", f"{parity['tolerance']:.0e}"
    lines = [
        f"{document['path']}: {document['nodes_before']} nodes of opset {document['opset']} became {document['nodes_after']}",
        "  " + ", ".join(f"{name} {megabytes(size)}" for name, size in sizes.items()),
        *_fusions(document["fusions"], "fused"),
        *([] if document["cache"] is None else [_cache(document["cache"])]),
        f"  verified against {document['source']} at {where}: largest error {error} (allowed {allowed})",
        *([f"    no answer of the original at {'; '.join(refused)}"] if refused else []),
    ]
    return "\n".join(lines)


def _cache(cache: dict[str, Any]) -> str:
    buffers = [f"{past} as {present}" for past, present in cache["buffers"].items()]
    shown = ", ".join(buffers[:1]) + (f", and {len(buffers) - 1} more" if len(buffers) > 1 else "")
    count = f"{len(buffers)} buffer{'s' if len(buffers) > 1 else ''}"
    return f"  {count} of {cache['length']} places, written in place at {cache['position']}: {shown}"


def _layers(layers: list[dict[str, Any]]) -> list[str]:
    """Layers that hold the same, one line for a run of them; none where all of the graph is in no layer."""
    runs: list[list[dict[str, Any]]] = []
    for layer in layers:
        if runs and layer["name"] is not None and _follows(layer, runs[-1][-1]):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    lines = [] if [layer["name"] for layer in layers] == [None] else [_run(run) for run in runs]
    more = [f"  and {len(lines) - _MOST_RUNS} more such lines"] if len(lines) > _MOST_RUNS else []
    return lines[:_MOST_RUNS] + more


def _follows(layer: dict[str, Any], other: dict[str, Any]) -> bool:
    if other["name"] is None or any(layer[key] != other[key] for key in ("nodes", "parameters", "bytes")):
        return False
    (stack, _, number), (before, _, last) = layer["name"].rpartition("."), other["name"].rpartition(".")
    return stack == before and int(number) == int(last) + 1


def _run(run: list[dict[str, Any]]) -> str:
    first, last = run[0], run[-1]
    name = "in no layer" if first["name"] is None else first["name"]
    names, each = (f"{name} to {last['name'].rpartition('.')[2]}", " each") if len(run) > 1 else (name, "")
    return f"  {names}: {first['nodes']} nodes, {first['parameters']:,} parameters, {megabytes(first['bytes'])}{each}"


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name}={length}" for name, length in sizes.items())


def _fusions(fusions: dict[str, Any], verb: str) -> list[str]:
    lines = []
    for operator, report in fusions.items():
        if report["fused"] or report["refused"]:
            lines.append(f"  {operator}: {report['fused']} {verb}, {len(report['refused'])} refused")
            lines += [f"    {reason}" for reason in (*report["refused"], *_proof(report))]
    return lines if any(report["fused"] for report in fusions.values()) else ["  nothing to fuse", *lines]


def _proof(report: dict[str, Any]) -> list[str]:
    """What was proved of the fusions one by one, where they were."""
    proof = report.get("proof")
    if not proof or not report["fused"]:
        return []
    where = f" at {proof['at']}" if proof["at"] else ""
    held = f"{proof['held']} of {report['fused']} proved alone"
    return [
        held + (f": largest error {proof['largest_error']:.1e}{where}" if proof["held"] else ""),
        *proof["unproved"],
    ]


def _shape(shape: list[Any] | None) -> str:
    return f"[{','.join(map(str, shape))}]" if shape is not None else "of no known shape"


# What the agreement of a certificate is about, by its name.
_AGREED = {
    "forced_tokens": "tokens chosen alike under teacher forcing",
    "same_labels": "labels chosen alike",
    "same_neighbour": "samples with the same nearest neighbour",
    "r_squared": "the variance of fp32's numbers reproduced",
}
_MOST_RUNS = 40
_LAYERS = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "NORMALIZATION", "MATRIX_MULTIPLY")
_HEIGHTS = " ▁▂▃▄▅▆▇█"
_HEADLINES = (
    *("Attention", "TensorScatter", "RMSNormalization", "LayerNormalization", "MatMul", "Gemm"),
    *("com.microsoft::MatMulNBits", "com.microsoft::MatMulIntegerToFloat", "com.microsoft::GatherBlockQuantized"),
)


def is_ours(fused: Any) -> bool:
    """Whether a graph's entry of "fusion" is as ``export`` writes it: whoever wrote the artifact may say there what they like."""
    if not isinstance(fused, dict) or not all(isinstance(fused.get(key), dict) for key in ("nodes", "patterns")):
        return False
    counts, reports = fused["nodes"].values(), fused["patterns"].values()
    return all(isinstance(count, int) for count in counts) and all(
        isinstance(report, dict) and isinstance(report.get("fused"), int) and isinstance(report.get("refused"), list)
        for report in reports
    )


def is_certificate(found: Any) -> bool:
    """Whether "parity" holds what a line about it needs."""
    errors, tolerance = found.get("errors"), found.get("tolerance")
    numbers = isinstance(errors, dict) and all(isinstance(error, (int, float)) for error in errors.values())
    return numbers and isinstance(tolerance, (int, float)) and "passed" in found


def _parity_line(certificate: dict[str, Any], reference: str) -> str:
    if not is_certificate(certificate):
        return "no certificate of parity that can be read; txopt verify makes one"
    worst = max(certificate["errors"].values(), default=0.0)
    verdict = "verified" if certificate["passed"] else "NOT verified"
    count = len({name.partition("/")[0] for name in certificate["errors"]})
    return (
        f"{verdict} against {reference}: {count} cases, largest error {worst:.1e} "
        f"(allowed {certificate['tolerance']:.0e})"
    )


def megabytes(size: int) -> str:
    """``size`` bytes for people: "81.9 MB", "3.3 kB", "64 bytes"."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"
