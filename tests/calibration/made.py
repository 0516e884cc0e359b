"""Weights, inputs and schemes that tests share."""

import itertools

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from txopt.calibration.blocks import BlockScheme

SCHEMES = [
    BlockScheme(bits=bits, block=block, symmetric=symmetric)
    for bits, block, symmetric in itertools.product((4, 8), (16, 32, 64, 128), (True, False))
]
"""Every kind of scheme, for hypothesis to choose from."""


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def correlated(count: int, width: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows [count,width] like those a Transformer's layer reads: few directions carry most, some inputs are far larger than others."""
    random = np.random.default_rng(seed)
    directions = random.standard_normal((max(width // 4, 1), width)) * np.exp(random.standard_normal(width))
    rows = random.standard_normal((count, len(directions))) @ directions + 0.3 * random.standard_normal((count, width))
    return rows.astype(np.float32)


def matrices(rows: int = 70, columns: int = 4) -> st.SearchStrategy[NDArray[np.float32]]:
    """Weights [1..rows,1..columns] of any finite values that leave room for a sum of squares, denormals among them."""
    shapes = st.tuples(st.integers(1, rows), st.integers(1, columns))
    values = (
        st.floats(-(2.0**60), 2.0**60, width=32)
        | st.floats(-1, 1, width=32)
        | st.floats(-(2.0**-130), 2.0**-130, width=32)
    )
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=values))
