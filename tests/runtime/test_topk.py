"""The largest of a row come in one order: larger first, of equals the lower index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from txopt.runtime.topk import BLOCK, top


@given(st.integers(1, 4), st.integers(1, 40 * BLOCK), st.data())
def test_it_is_the_head_of_a_stable_sort(rows: int, width: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(width, 60)))
    distinct = data.draw(st.sampled_from([1, 2, 50, 10**6]))
    values = np.random.default_rng(width).integers(0, distinct, size=(rows, width)).astype(np.float32)
    values[values == 0] = -np.inf
    expected = np.argsort(-values, axis=1, kind="stable")[:, :k]
    found, indices = top(values, k)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(found, np.take_along_axis(values, expected, axis=1))


@pytest.mark.parametrize("width", [5, 9 * BLOCK + 3])
def test_rows_of_a_wider_buffer_need_no_copy(width: int) -> None:
    buffer = np.random.default_rng(0).normal(size=(3, 2, width)).astype(np.float32)
    np.testing.assert_array_equal(top(buffer[:, 0], 2)[1], np.argsort(-buffer[:, 0], axis=1)[:, :2])
