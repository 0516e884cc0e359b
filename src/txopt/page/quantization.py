"""What the report of a quantization says, in the order it says it: numbers as texts, places on charts. It knows no HTML.

The document is the one of exporter/report.py: what could not be found out before a refusal is not in it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from txopt.page.chart import Scale, apart, bars, scale
from txopt.summary import megabytes, of_scheme

_MOST_LAYERS = 400
_MOST_OUTLIERS = 30
_MOST_RANGES = 60
_WIDTH, _HEIGHT = 520, 320  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 58, 18, 44
_LINE = 13  # of text
_BARS = (200, 56)  # of a histogram

# What an agreement is called where one stands for all, and what is to be said of it.
_HEADLINES = {
    "forced_tokens": ("same tokens", "under teacher forcing"),
    "same_labels": ("same labels", "as fp32 gives"),
    "same_neighbour": ("same neighbours", "the nearest of all samples"),
    "r_squared": ("r-squared", "with fp32's numbers"),
}
_AGREEMENTS = {
    "forced_tokens": "tokens chosen alike, fed the same ones",
    "free_prefix": "tokens alike up to the first difference",
    "free_sequences": "answers that are equal to the end",
    "same_labels": "labels chosen alike",
    "same_neighbour": "samples with the same nearest neighbour",
    "r_squared": "variance of fp32's numbers reproduced",
}


def content(document: Mapping[str, Any]) -> dict[str, Any]:
    """The page of one run of ``txopt quantize``, made or refused."""
    found, refused = document.get("loss"), document["refused"]
    points = [_point(number, each) for number, each in enumerate(document.get("points", ()), 1)]
    nats = document.get("sensitivities", {})
    layers = sorted(document.get("layers", []), key=_graph)
    return {
        "title": document["out"],
        "subtitle": f"{document['source']} in {document['precision']}{_scheme(document.get('scheme'))}",
        "verdict": {"passed": refused is None, "text": _verdict(found) if refused is None else "refused"},
        "problem": refused,
        "tiles": _tiles(document),
        "metric": None if found is None else _metric(found),
        "points": points,
        "has_speed": any(each["speed"] for each in points),
        "alike": _HEADLINES[_alike(document["points"][0])][0] if points else "",
        "charts": _charts(document, found) if len(points) > 1 else [],
        "limit": document["max_loss"],
        "finer": [
            {**each, "short": _short(each["weight"]), "nats": _number(each["divergence_nats"])}
            for each in document.get("finer", ())
        ],
        "layers": [_layer(each, nats, layers) for each in layers[:_MOST_LAYERS]],
        "layers_more": max(0, len(layers) - _MOST_LAYERS),
        "has_nats": bool(nats),
        "outliers": [_outlier(each) for each in document.get("outliers", [])[:_MOST_OUTLIERS]],
        "outliers_more": max(0, len(document.get("outliers", [])) - _MOST_OUTLIERS),
        **_ranges(document),
        "data": _data(document, found),
    }


def _scheme(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    return f": {of_scheme(found)}"


def _verdict(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "made"
    limit = "no limit was set" if found["max_loss"] is None else f"allowed {found['max_loss']:g}"
    return f"lost {_points(found['loss']['value'])}, {limit}"


def _tiles(document: Mapping[str, Any]) -> list[dict[str, str]]:
    points, found = document.get("points", ()), document.get("loss")
    shown = next((point for point in points if point["chosen"]), points[0] if points else None)
    if shown is None or found is None:
        return []
    share, alike = shown["weights_bytes"] / document["weights_before"], _alike(found["agreement"])
    tiles = [
        _tile(
            f"lost, {found['metric']['name']}", _points(found["loss"]["value"]), "points, " + _between(found["loss"])
        ),
        _tile("weights", megabytes(shown["weights_bytes"]), f"{share:.3f}x of {megabytes(document['weights_before'])}"),
        _tile(_HEADLINES[alike][0], _percent(found["agreement"][alike]["value"]), _HEADLINES[alike][1]),
    ]
    if shown["speed"] is not None:
        speed = shown["speed"]
        note = f"{speed['low']:.2f}x to {speed['high']:.2f}x, beside fp32 on this machine"
        tiles.append(_tile("speed", f"{speed['median']:.2f}x", note))
    return tiles


def _alike(found: Mapping[str, Any]) -> str:
    """The name of the agreement in ``found`` that stands for all."""
    return next(name for name in _HEADLINES if name in found)


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _metric(found: Mapping[str, Any]) -> dict[str, Any]:
    name, agreement = found["metric"]["name"], found["agreement"]
    rows = [
        (f"{name}, fp32", found["baseline"]["figure"], ""),
        (f"{name}, quantized", found["candidate"]["figure"], ""),
        ("lost, in points", found["loss"], ""),
        *((text, agreement[key], " %") for key, text in _AGREEMENTS.items() if key in agreement),
    ]
    lines = [
        {"what": what, "value": _points(each["value"]) + unit, "between": _between(each)} for what, each, unit in rows
    ]
    if (apart_by := agreement.get("divergence_nats")) is not None:
        between = f"{_number(apart_by['low'])} to {_number(apart_by['high'])}"
        lines.append({"what": "divergence, in nats", "value": _number(apart_by["value"]), "between": between})
    interval = found["interval"]
    return {
        "rows": lines,
        "samples": found["data"]["samples"],
        "changed": found["changed"],
        "references": found["data"]["references"] == "data",
        "interval": f"{100 * interval['confidence']:g} % intervals: {interval['method']}, {interval['resamples']} resamples",
        "signature": found["metric"]["signature"],
    }


def _point(number: int, point: Mapping[str, Any]) -> dict[str, Any]:
    speed = point["speed"]
    return {
        "number": number,
        "finer": len(point["finer"]),
        "size": megabytes(point["weights_bytes"]),
        "loss": _points(point["loss"]["value"]),
        "between": _between(point["loss"]),
        "agreed": _percent(point[_alike(point)]["value"]),
        "speed": "" if speed is None else f"{speed['median']:.2f}x ({speed['low']:.2f} to {speed['high']:.2f})",
        "passed": point["passed"],
        "chosen": point["chosen"],
        "front": point["front"],
    }


def _charts(document: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Loss over size, and over speed where that was measured; points whose loss is no number have no place."""
    points = [
        (number, point)
        for number, point in enumerate(document["points"], 1)
        if None not in (point["loss"]["value"], point["loss"]["low"], point["loss"]["high"])
    ]
    if not points:
        return []
    limit = document["max_loss"]
    losses = [each[key] for each in (point["loss"] for _, point in points) for key in ("value", "low", "high")]
    y = scale([0.0, *losses, *([] if limit is None else [limit])], _HEIGHT - _BOTTOM, _TOP)
    name = "points lost" if found is None else f"points of {found['metric']['name']} lost"
    sizes = [(number, point, (point["weights_bytes"] / 1e6,) * 3) for number, point in points]
    before = f"MB of weights (fp32: {document['weights_before'] / 1e6:.1f})"
    charts = [
        _chart(before, name, sizes, y, limit)
    ]  # fp32 itself is far to the right, and would leave the points no room
    speeds = [
        (number, point, (point["speed"]["median"], point["speed"]["low"], point["speed"]["high"]))
        for number, point in points
        if point["speed"] is not None
    ]
    if speeds:
        charts.append(_chart("times as fast as fp32", name, speeds, y, limit, mark=1.0))
    return charts


def _chart(
    x_label: str,
    y_label: str,
    points: Sequence[tuple[int, Mapping[str, Any], tuple[float, float, float]]],
    y: Scale,
    limit: float | None,
    *,
    mark: float | None = None,
) -> dict[str, Any]:
    """``points`` have where they are from left to right: a value, and the ends of its interval; ``mark`` is where fp32 is."""
    reached = [number for _, _, reach in points for number in reach] + ([] if mark is None else [mark])
    x = scale(reached, _LEFT, _WIDTH - _RIGHT)
    places = [(x.at(reach[0]), y.at(point["loss"]["value"])) for _, point, reach in points]
    return {
        "x_label": x_label,
        "y_label": y_label,
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "limit": None if limit is None else y.at(limit),
        "zero": y.at(0.0),
        "allowed": None if limit is None else min(y.at(limit), y.at(0.0) - _LINE),  # labels, one over the other
        "mark": None if mark is None else x.at(mark),
        "points": [
            {
                "number": number,
                "x": place[0],
                "y": place[1],
                "low": y.at(point["loss"]["low"]),
                "high": y.at(point["loss"]["high"]),
                "left": x.at(reach[1]),
                "right": x.at(reach[2]),
                "label": label,
                "kind": "chosen" if point["chosen"] else "passed" if point["passed"] else "failed",
            }
            for (number, point, reach), place, label in zip(points, places, apart(places), strict=True)
        ],
    }


def _layer(layer: Mapping[str, Any], nats: Mapping[str, float], every: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    largest = max((each["output"] or 0.0 for each in every), default=0.0) or 1.0
    output, apart_by = layer["output"], nats.get(f"{layer['graph']}:{layer['name']}")
    return {
        "graph": layer["graph"],
        "name": layer["name"],
        "short": _short(layer["name"]),
        "shape": f"{layer['rows']} × {layer['columns']}",
        "form": layer["form"] or "float32",
        "weight": _share(layer["weight"]),
        "output": "" if output is None else _share(output),
        "percent": 0.0 if output is None else round(100 * output / largest, 2),
        "nats": "" if apart_by is None else _number(apart_by),
    }


def _outlier(each: Mapping[str, Any]) -> dict[str, Any]:
    numbers = {key: _number(each[key]) for key in ("largest", "tail")}
    return {**each, **numbers, "short": _short(each["name"]), "times": f"{each['times']:.1f}"}


def _ranges(document: Mapping[str, Any]) -> dict[str, Any]:
    """The farthest reaching ones, in the order of the graphs."""
    every = sorted(document.get("ranges", []), key=_graph)
    shown = sorted(range(len(every)), key=lambda index: (-every[index]["times"], index))[:_MOST_RANGES]
    return {
        "ranges": [_histogram(every[index]) for index in sorted(shown)],
        "ranges_more": len(every) - len(shown),
        "observed": document.get("observed", 0),
        "clipped": any(each["clipped"] for each in every),
        "histogram": _BARS,
    }


def _histogram(one: Mapping[str, Any]) -> dict[str, Any]:
    histogram, low, high = one["histogram"], one["min"], one["max"]
    largest = max(-low, high)
    reach = len(histogram["bars"]) * histogram["bar_width"] or 1.0
    return {
        "graph": one["graph"],
        "name": one["name"],
        "path": bars(histogram["bars"], *_BARS),
        "clip": round(_BARS[0] * one["amax"] / reach, 1) if one["clipped"] else None,
        "between": f"{_number(low)} to {_number(high)}",
        "amax": f"clipped at {_number(one['amax'])}" if one["clipped"] and one["amax"] < largest else "",
        "largest": _number(largest),
    }


def _data(document: Mapping[str, Any], found: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Tables of two columns: what was fitted to, what was measured on, and what was compared."""
    tables = [
        {"title": title, "rows": _samples(document[key]), "notices": document[key]["notices"]}
        for key, title in (("calibrated", "Calibrated on"), ("measured", "Measured on"))
        if key in document
    ]
    if found is not None:
        rows = [(name, found[name]["sha256"]) for name in ("baseline", "candidate")]
        tables.append({"title": "Artifacts compared, by SHA-256", "rows": rows, "notices": []})
    return tables


def _samples(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    seconds = [] if data["seconds"] is None else [("seconds of sound", f"{data['seconds']:,.1f}")]
    return [
        ("samples", f"{data['samples']:,} of {data['found']:,}" + (", made up" if data["synthetic"] else "")),
        ("with a reference", f"{data['references']:,}"),
        *seconds,
        ("tokens of references", f"{data['label_tokens']:,}"),
        ("SHA-256", data["sha256"]),
    ]


def _graph(each: Mapping[str, Any]) -> bool:
    """To sort by: an encoder comes first, and what is equal stays in its order."""
    return bool(each["graph"] != "encoder")


def _short(name: str) -> str:
    """A name; of weights that were packed into one, "a.query.w|a.key.w", what they share once: "a.(query|key).w"."""
    parts = [each.split(".") for each in name.split("|")]
    if len(parts) == 1:
        return name
    head, tail = _shared(parts), _shared([part[::-1] for part in parts])
    middle = "|".join(".".join(part[head : len(part) - tail]) for part in parts)
    if not head + tail or any(head + tail >= len(part) for part in parts):
        return name
    return ".".join([*parts[0][:head], f"({middle})", *(parts[0][-tail:] if tail else ())])


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many of their first words are equal."""
    return next(
        (index for index, words in enumerate(zip(*parts, strict=False)) if len(set(words)) > 1), min(map(len, parts))
    )


def _points(number: float | None) -> str:
    return "not a number" if number is None else f"{number:.2f}"


def _percent(number: float | None) -> str:
    return "not a number" if number is None else f"{number:.2f} %"


def _between(estimate: Mapping[str, float | None]) -> str:
    return f"{_points(estimate['low'])} to {_points(estimate['high'])}"


def _share(number: float) -> str:
    return f"{100 * number:.2f} %"


def _number(number: float | None) -> str:
    """Three digits, and no exponent where it can be read without."""
    if number is None:
        return "not a number"
    text = f"{number:.3g}"
    return f"{number:.0f}" if "e" in text and 1 <= abs(number) < 1e7 else text
