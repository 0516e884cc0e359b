"""One operator of the standard against the nodes it stands for, on ONNX Runtime's CPU:
``python -m txopt.benchmarks.operators [--out FILE.json]``.

Which fusions pay is decided here. Each pair of graphs takes the same inputs in turn, opened with ONNX Runtime's own optimizations on;
their answers are compared before a time counts. Ratios above 1 speak for the second spelling, which a fusion makes of the first.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.benchmarks.timing import Timing, in_turn, ratio

Array = NDArray[Any]

REPEATS, SHORTEST = 15, 0.02  # rounds, and seconds that one round of one graph takes at least
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Pair:
    """Two spellings of one thing as ONNX text, between ``x`` and ``y``; other names are constants or further inputs."""

    name: str
    before: str
    after: str
    x: tuple[int, ...]
    inputs: dict[str, Array]
    constants: dict[str, Array]


def pairs() -> Iterator[Pair]:
    random = np.random.default_rng(0)
    for batch, tokens in ((1, 1), (8, 1), (1, 64), (8, 128)):
        at = f"batch {batch}, {tokens} tokens"
        yield from _rotations(random, at, (batch, 8, tokens, 64))
        yield _swish(at, (batch, tokens, 2048))
        yield _gated(random, at, (batch, tokens, 512), 1024)
        yield from _logarithms(at, (batch, tokens, 32128) if batch * tokens <= 64 else (batch, 16, 32128))
    for batch, groups, length in ((1, 8, 400), (1, 256, 400), (8, 8, 100)):
        yield _groups(random, (batch, 256, length), groups)


def _rotations(random: np.random.Generator, at: str, x: tuple[int, ...]) -> Iterator[Pair]:
    """Cosines and sines are given for the columns to the nodes, for the pairs to the operator, as they are made once."""
    half = x[3] // 2
    cos, sin = (random.normal(size=(x[0], x[2], half)).astype(np.float32) for _ in range(2))
    numbers = {"zero": 0, "one": 1, "two": 2, "half": half, "end": 2**62, "last": -1}
    constants: dict[str, Array] = {name: np.array([number]) for name, number in numbers.items()}
    sides = {
        "halves": "a = Slice(x, zero, half, last) b = Slice(x, half, end, last) n = Neg(b) r = Concat<axis=-1>(n, a) ",
        "neighbours": "a = Slice(x, zero, end, last, two) b = Slice(x, one, end, last, two) n = Neg(b) u = Unsqueeze(n, last) "
        "v = Unsqueeze(a, last) w = Concat<axis=-1>(u, v) s = Shape(x) r = Reshape(w, s) ",
    }
    for how, turned in sides.items():
        twice = [np.concatenate([f, f], -1) if how == "halves" else f.repeat(2, -1) for f in (cos, sin)]
        after = f"y = RotaryEmbedding<interleaved={int(how == 'neighbours')}>(x, c, d)"
        before = turned + "p = Mul(x, cc) q = Mul(r, dd) y = Add(p, q)"
        inputs = {"c": cos, "d": sin, "cc": twice[0][:, None], "dd": twice[1][:, None]}
        yield Pair(f"RotaryEmbedding of {how}, {at}", before, after, x, inputs, constants)


def _swish(at: str, x: tuple[int, ...]) -> Pair:
    return Pair(f"Swish, {at}", "s = Sigmoid(x) y = Mul(x, s)", "y = Swish(x)", x, {}, {})


def _gated(random: np.random.Generator, at: str, x: tuple[int, ...], width: int) -> Pair:
    """A gated feed-forward of T5-v1.1-small's sizes: gate and up as two products, and as one that is split."""
    gate, up = (random.normal(size=(x[2], width), scale=x[2] ** -0.5).astype(np.float32) for _ in range(2))
    constants = {"gate": gate, "up": up, "both": np.concatenate([gate, up], 1)}
    constants["down"] = random.normal(size=(width, x[2]), scale=width**-0.5).astype(np.float32)
    rest = 'h = Gelu<approximate="tanh">(g) m = Mul(h, u) y = MatMul(m, down)'
    one = "b = MatMul(x, both) g, u = Split<axis=-1,num_outputs=2>(b) "
    two = "g = MatMul(x, gate) u = MatMul(x, up) "
    return Pair(f"gate and up in one MatMul, {at}", two + rest, one + rest, x, {}, constants)


def _logarithms(at: str, x: tuple[int, ...]) -> Iterator[Pair]:
    after, at = "y = LogSoftmax<axis=-1>(x)", f"{x[0]} x {x[1]} rows of {x[2]}"
    yield Pair(f"LogSoftmax of Log(Softmax), {at}", "s = Softmax<axis=-1>(x) y = Log(s)", after, x, {}, {})
    less = "l = ReduceLogSumExp(x, last) y = Sub(x, l)"
    yield Pair(f"LogSoftmax of x - ReduceLogSumExp, {at}", less, after, x, {}, {"last": np.array([-1])})


def _groups(random: np.random.Generator, x: tuple[int, ...], groups: int) -> Pair:
    """As torch's old exporter writes a group norm: as the norm of instances over a reshape."""
    weight, bias = (random.normal(size=x[1]).astype(np.float32) for _ in range(2))
    constants: dict[str, Array] = {"w": weight, "b": bias, "ww": weight[:, None], "bb": bias[:, None]}
    constants |= {"cut": np.array([0, groups, -1]), "ones": np.ones(groups, np.float32)}
    constants["zeros"] = np.zeros(groups, np.float32)
    before = (
        "r = Reshape(x, cut) i = InstanceNormalization<epsilon=1e-5>(r, ones, zeros) s = Shape(x) q = Reshape(i, s) "
        "m = Mul(q, ww) y = Add(m, bb)"
    )
    after = f"y = GroupNormalization<num_groups={groups},epsilon=1e-5>(x, w, b)"
    return Pair(f"GroupNormalization, batch {x[0]}, {groups} groups, {x[2]} long", before, after, x, {}, constants)


def measure(pair: Pair) -> dict[str, Any]:
    """Both times, and how many times faster the second spelling is.

    Raises:
        SystemExit: they do not say the same.
    """
    x = np.random.default_rng(1).normal(size=pair.x).astype(np.float32)
    calls = {name: _call(nodes, pair, x) for name, nodes in (("before", pair.before), ("after", pair.after))}
    expected, found = calls["before"](1), calls["after"](1)
    if not np.allclose(expected, found, rtol=TOLERANCE, atol=TOLERANCE):
        raise SystemExit(f"{pair.name}: the answers differ; their times would mean nothing")
    once = in_turn({name: partial(call, 10) for name, call in calls.items()}, repeats=5)
    runs = max(1, int(10 * SHORTEST / min(timing.median for timing in once.values())))
    times = in_turn({name: partial(call, runs) for name, call in calls.items()}, repeats=REPEATS)
    medians = {f"{name}_us": round(timing.median / runs * 1e6, 1) for name, timing in times.items()}
    return {**medians, "ratio": _ratio(times)}


def _ratio(times: dict[str, Timing]) -> dict[str, float]:
    return ratio(times["after"], times["before"])


def _call(nodes: str, pair: Pair, x: Array) -> Callable[[int], Array]:
    """Runs a graph so many times; gives its answer."""
    import onnx
    import onnxruntime

    used = set(nodes.replace("(", " ").replace(")", " ").replace(",", " ").split())
    inputs = {"x": x} | {name: array for name, array in pair.inputs.items() if name in used}
    heading = ", ".join(
        f"float[{','.join(f'{name}{i}' for i in range(array.ndim))}] {name}" for name, array in inputs.items()
    )
    axes = ",".join(f"x{i}" for i in range(x.ndim))
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 24]> pair ({heading}) => (float[{axes}] y) {{ {nodes} }}'
    )
    for name in sorted(used & pair.constants.keys()):
        model.graph.initializer.append(onnx.numpy_helper.from_array(pair.constants[name], name))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the other's idle threads would take its turn
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def call(times: int) -> Array:
        for _ in range(times - 1):
            session.run(None, inputs)
        answer: Array = session.run(None, inputs)[0]
        return answer

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    text = json.dumps({pair.name: measure(pair) for pair in pairs()}, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
