"""What an in-place cache is worth: ``python -m txopt.benchmarks.in_place [--out FILE.json]``.

A decoder of 512 by 6 layers with cross-attention and random weights, as torch.onnx.export writes it: past keys and values in, longer
ones out. ONNX Runtime on the CPU runs STEPS steps of one token from three lengths of the past on, with IO binding throughout: the file
as it is and as ``txopt optimize`` fuses it, presents handed back as pasts, against ``txopt optimize --in-place-cache``, its buffers
bound as input and output. A buffer is as long as the steps need, or as the longest past needs it ("roomy"). In turn, fp32; the
last logits are compared before a time counts.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.benchmarks.foreign_models import quiet
from txopt.benchmarks.timing import in_turn, ratio

LAYERS, WIDTH, HEADS, INNER, VOCABULARY, SOURCE = 6, 512, 8, 2048, 8000, 64
PASTS, BATCHES, STEPS, REPEATS = (64, 256, 1024), (1, 8), 16, 7
TOLERANCE = 1e-4
OWN = [f"past_{kind}.{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
CROSS = [f"cross_{kind}.{layer}" for layer in range(LAYERS) for kind in ("key", "value")]
PRESENTS = [name.replace("past", "present") for name in OWN]

Array = NDArray[Any]


def write(file: Path) -> None:
    """The decoder as ``file``."""
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import gelu

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
            self.own, self.cross = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(n)) for n in (4, 2))
            self.inner, self.outer = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, x: Tensor, past: list[Tensor], cross: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            y = self.norms[0](x)
            q, k, v = (cut(project(y)) for project in self.own[:3])
            present = [torch.cat(pair, 2) for pair in zip(past, (k, v), strict=True)]
            x = x + self.own[3](attended(q, *present))
            x = x + self.cross[1](attended(cut(self.cross[0](self.norms[1](x))), *cross))
            return x + self.outer(gelu(self.inner(self.norms[2](x)))), present

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(max(PASTS) + STEPS, WIDTH)
            self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
            self.head = nn.Linear(WIDTH, VOCABULARY)

        def forward(self, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            first = given[0].shape[2]
            x, presents = self.words(ids) + self.places(torch.arange(first, first + 1)), []
            for number, layer in enumerate(self.layers):
                at = 2 * number
                x, present = layer(x, given[at : at + 2], given[2 * LAYERS + at : 2 * LAYERS + at + 2])
                presents += present
            return self.head(x), *presents

    def cut(x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        joined: Tensor = (scores.softmax(-1) @ v).transpose(1, 2).reshape(q.shape[0], -1, WIDTH)
        return joined

    torch.manual_seed(0)
    own, cross = (torch.zeros(2, HEADS, length, WIDTH // HEADS) for length in (6, SOURCE))
    arguments = (torch.ones(2, 1, dtype=torch.int64), *[own] * len(OWN), *[cross] * len(CROSS))
    axes = {"ids": {0: "batch"}, "logits": {0: "batch"}}
    axes |= {name: {0: "batch", 2: "past"} for name in OWN} | {name: {0: "batch", 2: "source"} for name in CROSS}
    axes |= {name: {0: "batch", 2: "present"} for name in PRESENTS}
    names: dict[str, Any] = {"input_names": ["ids", *OWN, *CROSS], "output_names": ["logits", *PRESENTS]}
    with quiet():
        torch.onnx.export(Decoder().eval(), arguments, file, dynamo=False, opset_version=17, dynamic_axes=axes, **names)


def growing(session: Any, given: Mapping[str, Array]) -> Array:
    """The last logits of STEPS steps whose presents are the next step's pasts."""
    import onnxruntime

    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
    for _ in range(STEPS):
        binding = session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *PRESENTS):
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        logits, *presents = binding.get_outputs()
        values |= dict(zip(OWN, presents, strict=True))
    result: Array = logits.numpy()
    return result


class InPlace:
    """Buffers of one length, filled with ``given`` once: steps overwrite what the round before wrote."""

    def __init__(self, session: Any, given: Mapping[str, Array], places: int) -> None:
        import onnxruntime

        arrays = {name: _longer(array, places) if name in OWN else array for name, array in given.items()}
        self.position = arrays["cache_position"] = np.zeros(1, np.int64)
        self.logits = np.empty((len(given["ids"]), 1, VOCABULARY), np.float32)
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self.session, self.binding, self.arrays = session, session.io_binding(), arrays
        for name, value in values.items():
            self.binding.bind_ortvalue_input(name, value)
        self.binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(self.logits))
        for past, present in zip(OWN, PRESENTS, strict=True):
            self.binding.bind_ortvalue_output(present, values[past])

    def run(self, past: int) -> Array:
        """The last logits of STEPS steps."""
        for step in range(STEPS):
            self.position[0] = past + step
            self.session.run_with_iobinding(self.binding)
        return self.logits


def _longer(array: Array, places: int) -> Array:
    buffer = np.zeros((*array.shape[:2], places, array.shape[3]), array.dtype)
    buffer[:, :, : array.shape[2]] = array
    return buffer


def measure(work: Path) -> dict[str, Any]:
    from txopt.exporter.foreign import optimize

    file = work / "in.onnx"
    write(file)
    reports = {
        "fused": optimize(file, work / "fused"),
        "in place": optimize(file, work / "turned", in_place_cache=True),
    }
    opened = {name: _open(report.path / "model.onnx") for name, report in reports.items()}
    opened["as it is"] = _open(file)
    results = {}
    for batch in BATCHES:
        for past in PASTS:
            given = _given(batch, past)
            calls: dict[str, Callable[[], Array]] = {
                name: partial(growing, opened[name], given) for name in ("as it is", "fused")
            }
            calls["in place"] = partial(InPlace(opened["in place"], given, past + STEPS).run, past)
            if past < max(PASTS):
                calls["in place, roomy"] = partial(InPlace(opened["in place"], given, max(PASTS) + STEPS).run, past)
            results[f"batch {batch}, past {past}"] = _timed(calls)
    nodes = {
        "as it is": reports["fused"].nodes_before,
        **{name: report.nodes_after for name, report in reports.items()},
    }
    return {"cores": os.cpu_count(), "nodes": nodes, "steps": results}


def _given(batch: int, past: int) -> dict[str, Array]:
    random = np.random.default_rng(past)
    shapes = {**dict.fromkeys(OWN, past), **dict.fromkeys(CROSS, SOURCE)}
    given = {
        name: random.normal(size=(batch, HEADS, length, WIDTH // HEADS)).astype(np.float32)
        for name, length in shapes.items()
    }
    return {"ids": random.integers(0, VOCABULARY, (batch, 1)), **given}


def _timed(calls: Mapping[str, Callable[[], Array]]) -> dict[str, Any]:
    """Milliseconds of all STEPS, and how many times faster each way in place is than each that grows."""
    logits = {name: call().copy() for name, call in calls.items()}
    for name, found in logits.items():
        error = float(np.abs(found - logits["as it is"]).max() / max(1.0, np.abs(logits["as it is"]).max()))
        if not error <= TOLERANCE:
            raise SystemExit(f"{name}: logits differ by {error:.1e}; a time would mean nothing")
    times = in_turn(calls, repeats=REPEATS)
    ways = [name for name in calls if name.startswith("in place")]
    ratios = {
        f"{ours} to {theirs}": ratio(times[ours], times[theirs]) for ours in ways for theirs in ("as it is", "fused")
    }
    return {**{name: value.to_json() for name, value in times.items()}, "ratios": ratios}


def _open(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # sessions in turn; none spins beside another
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def table(results: Mapping[str, Any]) -> str:
    """A step in milliseconds, medians, and ratios with the least and the most of the rounds."""
    lines = [
        "| one token | as it is | fused | in place | times faster than as it is | than fused | roomy buffer | than as it is |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for where, found in results["steps"].items():
        step = {name: f"{value['median_ms'] / STEPS:.2f}" for name, value in found.items() if name != "ratios"}
        speed = {name: "{median} ({least} to {most})".format(**value) for name, value in found["ratios"].items()}
        cells = [where, *(step[name] for name in ("as it is", "fused", "in place"))]
        cells += [speed["in place to as it is"], speed["in place to fused"]]
        cells += [step.get("in place, roomy", "the same"), speed.get("in place, roomy to as it is", "the same")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder))
    sys.stdout.write(table(results) + "\n")
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
