"""SmoothQuant: what is hard to round in activations moves into the weights, which are rounded channel by channel.

Xiao et al. 2022, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv:2211.10438,
equation 4: channel k of an activation is divided by s[k] = max|x[k]|^alpha / max|W[k]|^(1 - alpha), and row k of the weights
multiplied by it. One scale for the whole activation then wastes fewer of its 255 steps on channels that are small. The paper takes
one alpha for a model; here each activation takes the one of 0, 0.1 .. 1 with the least squared error at the outputs of its products,
over a sample of its rows, or none where nothing is gained. How graphs are changed is folding.py's.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from txopt.calibration.channels import per_channel
from txopt.calibration.collect import Steps, collect
from txopt.calibration.evaluate import Said
from txopt.calibration.folding import folds
from txopt.calibration.observers import ChannelMagnitude, RowSample
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact

ALPHAS = tuple(step / 10 for step in range(11))
_LEAST = 1e-5  # of the largest magnitude: a channel that calibration never saw is not made large without limit

MOST = 16  # samples that are looked at: largest magnitudes of channels differ little between them
_ROWS = 256

Rows = NDArray[np.float32]


def observed(
    artifact: Artifact,
    models: Mapping[str, ir.Model],
    samples: Samples,
    *,
    said: Said | None = None,
    steps: Steps = Steps.LOOP,
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """The factors [K] of every activation that can be divided and gains by it, by graph and name.

    Args:
        artifact: in float32.
        models: its graphs.
        samples: what it is run on; the first MOST of them serve.
        said: what the artifact itself said to the samples, for those without a reference; None where all have one.
        steps: which positions of targets are seen.
    """
    foldable = {name: folds(model.graph)[0] for name, model in models.items()}
    seen = {
        name: {value: _Channels(value, one.products[0].size) for value, one in mine.items()}
        for name, mine in foldable.items()
    }
    few = samples.part(0, min(MOST, len(samples)))
    collect(artifact, few, seen, said=said, steps=steps)
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    for name, mine in foldable.items():
        chosen = {
            value: searched(np.concatenate(one.weights, axis=1), seen[name][value].rows.rows, seen[name][value].largest)
            for value, one in mine.items()
        }
        found[name] = {value: factors for value, factors in chosen.items() if factors is not None}
    return found


class _Channels:
    """The largest magnitude of every channel, and some rows."""

    def __init__(self, name: str, channels: int) -> None:
        self.name = name
        self.rows, self._magnitudes = RowSample(name, channels, size=_ROWS), ChannelMagnitude(name, channels)

    @property
    def largest(self) -> NDArray[np.float64]:
        """[K]."""
        return self._magnitudes.absmax

    def update(self, values: NDArray[Any]) -> None:
        self.rows.update(values)
        self._magnitudes.update(values)

    def merge(self, other: "_Channels") -> None:
        self.rows.merge(other.rows)
        self._magnitudes.merge(other._magnitudes)


def factors(weight: NDArray[Any], magnitudes: NDArray[Any], alpha: float) -> NDArray[np.float32]:
    """s [K], for ``weight`` [K,N] (weights of one input side by side) and the largest |x| of each of its inputs [K].

    A geometric mean of 1 makes no difference to rounding, and keeps numbers near where they were.
    """
    inputs, rows = (_floored(each) for each in (magnitudes, np.abs(weight).max(axis=1)))
    logs = alpha * np.log(inputs) - (1 - alpha) * np.log(rows)
    return np.exp(logs - logs.mean()).astype(np.float32)


def searched(weight: Rows, rows: Rows, magnitudes: NDArray[Any]) -> NDArray[np.float32] | None:
    """The factors of the best alpha, or None where none is better than leaving things as they are.

    Args:
        weight: [K,N].
        rows: [R,K] of its inputs, a sample.
        magnitudes: [K], the largest |x| of all inputs.
    """
    exact = rows.astype(np.float64) @ weight
    best, least = None, _error(weight, rows, magnitudes, np.ones(len(weight), np.float32), exact)
    for alpha in ALPHAS:
        chosen = factors(weight, magnitudes, alpha)
        error = _error(weight, rows, magnitudes, chosen, exact)
        if error < least:
            best, least = chosen, error
    return best


def _error(weight: Rows, rows: Rows, magnitudes: NDArray[Any], chosen: Rows, exact: NDArray[np.float64]) -> float:
    """The squared error of the product of static int8, activations clipped at their largest magnitude."""
    step = max(float((magnitudes / chosen).max()) / 127, float(np.finfo(np.float32).tiny))
    rounded = np.clip(np.rint(rows / chosen / step), -127, 127) * step
    got = rounded @ per_channel(weight * chosen[:, None]).dequantize()
    return float(np.square(got - exact).sum())


def _floored(magnitudes: NDArray[Any]) -> NDArray[np.float64]:
    wide = np.asarray(magnitudes, np.float64)
    largest = wide.max()
    return np.maximum(wide, _LEAST * largest) if largest > 0 else np.ones_like(wide)
