"""K/V caches in int8 on ONNX Runtime's CPU: ``python -m txopt.benchmarks.caches [--threads N] [--out FILE.json]``.

Says which operators take such a cache at all, and times the attention of one decode step over each that does, against Attention over
the same numbers in float32. Numbers are multiples of the scale, so that rounding changes none and answers can be compared. Buffers
are in place: Attention and DequantizeLinear find the new token's K and V there, GroupQueryAttention puts them there itself.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from txopt.benchmarks.timing import in_turn, ratio

Array = NDArray[Any]

HEADS, SIZE, SCALE = 8, 64, 2.0**-5
LENGTHS = (
    (1, 64),
    (1, 448),
    (1, 1500),
    (8, 448),
)  # batch, places: a short answer, Whisper's decoder, its encoder, a batch
REPEATS, RUNS, TOLERANCE = 25, 10, 1e-4

_STEP = "(float[B,1,512] q, float[B,1,512] k, float[B,1,512] v, {t}[B,8,S,64] past_k, {t}[B,8,S,64] past_v, int32[B] last, int32 all"
_GROUPED = (
    "y, next_k, next_v = com.microsoft.GroupQueryAttention<num_heads=8, kv_num_heads=8{how}>"
    "(q, k, v, past_k, past_v, last, all{scales})"
)
_INT8 = ', kv_cache_bit_width=8, k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR"'
_JOIN = " t = Transpose<perm=[0,2,1,3]>(o) shape = Constant<value_ints=[0,0,-1]>() y = Reshape(t, shape)"
_BY_HEAD = "(float[B,8,1,64] x, {t}[B,8,S,64] keys, {t}[B,8,S,64] values{more}) => (float[B,1,512] y)"
_WRITTEN = ") => (float[B,1,512] y, {t}[B,8,S,64] next_k, {t}[B,8,S,64] next_v)"

# What a cache of int8 would ask of an engine, as ONNX text.
TAKEN = {
    "TensorScatter of int8": "(int8[B,8,S,64] past, int8[B,8,Q,64] new, int64[B] at) => (int8[B,8,S,64] y)"
    " { y = TensorScatter<axis=2>(past, new, at) }",
    "TensorScatter of float8e4m3fn": "(float8e4m3fn[B,8,S,64] past, float8e4m3fn[B,8,Q,64] new, int64[B] at)"
    " => (float8e4m3fn[B,8,S,64] y) { y = TensorScatter<axis=2>(past, new, at) }",
    "Attention with K and V of int8": "(float[B,8,Q,64] q, int8[B,8,S,64] k, int8[B,8,S,64] v) => (float[B,8,Q,64] y)"
    " { y = Attention(q, k, v) }",
}
# The attention of one step.
SPELLINGS = {
    "Attention, float32": _BY_HEAD.format(t="float", more="") + f" {{ o = Attention(x, keys, values){_JOIN} }}",
    "Attention, int8 dequantized whole": _BY_HEAD.format(t="int8", more=", float scale")
    + f" {{ k = DequantizeLinear(keys, scale) v = DequantizeLinear(values, scale) o = Attention(x, k, v){_JOIN} }}",
    "GroupQueryAttention, float32": (_STEP + _WRITTEN).format(t="float")
    + f" {{ {_GROUPED.format(how='', scales='')} }}",
    "GroupQueryAttention, int8": (_STEP + ", float[1] scale" + _WRITTEN).format(t="int8")
    + f" {{ {_GROUPED.format(how=_INT8, scales=', , , , , , scale, scale')} }}",
}


@dataclass(frozen=True)
class Step:
    """Buffers [B,H,S,D] in codes, the last of S places the new token's, and its query [B,H,1,D]."""

    query: Array
    keys: Array
    values: Array

    @classmethod
    def drawn(cls, batch: int, places: int) -> "Step":
        random = np.random.default_rng(0)
        keys, values = (random.integers(-127, 128, (batch, HEADS, places, SIZE)).astype(np.int8) for _ in range(2))
        return cls(random.normal(size=(batch, HEADS, 1, SIZE)).astype(np.float32), keys, values)

    def feeds(self, spelling: str) -> dict[str, Array]:
        """The inputs of one of SPELLINGS."""
        rounded = spelling.endswith(("int8", "whole"))
        scale = np.float32(SCALE)
        keys, values = (x if rounded else x * scale for x in (self.keys, self.values))
        if spelling.startswith("Attention"):
            return {"x": self.query, "keys": keys, "values": values} | ({"scale": np.array(scale)} if rounded else {})
        batch, _, places, _ = keys.shape
        q, k, v = (self._joined(x) for x in (self.query, self.keys[:, :, -1:] * scale, self.values[:, :, -1:] * scale))
        counts = {"last": np.full(batch, places - 1, np.int32), "all": np.array(places, np.int32)}
        found = {"q": q, "k": k, "v": v, "past_k": keys.copy(), "past_v": values.copy(), **counts}
        return found | ({"scale": np.array([scale])} if rounded else {})

    @staticmethod
    def _joined(x: Array) -> Array:
        return np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(len(x), 1, HEADS * SIZE)


def opened(text: str, threads: int) -> onnxruntime.InferenceSession:
    header = '<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1]> step '
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = onnx.parser.parse_model(header + text).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def taken() -> dict[str, str]:
    """For each of TAKEN "runs", or what the engine says against it."""
    found = {}
    for name, text in TAKEN.items():
        try:
            opened(text, 1)
        except Exception as err:  # the library raises a dozen kinds, without a common base
            found[name] = str(err).split(" : ", 2)[-1]
        else:
            found[name] = "runs"
    return found


def measure(batch: int, places: int, threads: int) -> dict[str, Any]:
    """Microseconds of each of SPELLINGS, how many times faster than the first, and bytes of the cache it reads.

    Raises:
        SystemExit: they do not say the same.
    """
    step, calls, answers, sizes = Step.drawn(batch, places), {}, {}, {}
    for name, text in SPELLINGS.items():
        feeds = step.feeds(name)
        calls[name], answers[name] = _bound(opened(text, threads), feeds)
        sizes[name] = sum(x.nbytes for key, x in feeds.items() if key in ("keys", "values", "past_k", "past_v"))
    first, *others = SPELLINGS
    for name in others:
        if not np.allclose(answers[name], answers[first], rtol=TOLERANCE, atol=TOLERANCE):
            raise SystemExit(f"{name} and {first}: the answers differ; their times would mean nothing")
    times = in_turn({name: partial(call, RUNS) for name, call in calls.items()}, repeats=REPEATS)
    return {
        name: {
            "us": round(timing.median / RUNS * 1e6, 1),
            "times_faster": ratio(timing, times[first]),
            "cache_bytes": sizes[name],
        }
        for name, timing in times.items()
    }


def _bound(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> tuple[Callable[[int], None], Array]:
    """A call that runs so many times, and the answer; what a graph gives back of the cache is written where it was read."""
    binding = session.io_binding()
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    binding.bind_output("y")
    for name in (output.name for output in session.get_outputs()[1:]):
        binding.bind_ortvalue_output(name, values[name.replace("next", "past")])

    def call(times: int) -> None:
        for _ in range(times):
            session.run_with_iobinding(binding)

    call(1)
    return call, binding.copy_outputs_to_cpu()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="engine threads")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    steps = {f"batch {b}, {s} places": measure(b, s, arguments.threads) for b, s in LENGTHS}
    document = {"taken": taken(), "threads": arguments.threads, "steps": steps}
    text = json.dumps(document, indent=2)
    sys.stdout.write(text + "\n")
    if arguments.out:
        arguments.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
