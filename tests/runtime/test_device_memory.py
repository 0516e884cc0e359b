"""Memory of a device: what is kept and given again, and in which order rows move."""

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.fake_cuda import FakeCuda
from txopt.runtime.backends.cuda import Device
from txopt.runtime.backends.moves import SPARE, moves
from txopt.runtime.backends.pool import Pool, rounded
from txopt.runtime.backends.tensors import ALIGNMENT, Buffers, uploaded


@given(st.lists(st.integers(0, 7), min_size=8, max_size=8))
def test_rows_move_as_if_at_once(sources: list[int]) -> None:
    rows = list(range(8))
    held = {row: row for row in [*rows, SPARE]}
    copies = list(moves(rows, sources))
    for to, source in copies:
        held[to] = held[source]
    assert [held[row] for row in rows] == sources
    changed = sum(row != source for row, source in zip(rows, sources, strict=True))
    assert len(copies) <= changed + changed // 2  # one more for each ring, and a ring has two rows
    assert len({row for row, _ in copies if row != SPARE}) == changed


class Bookkeeper:
    """Memory whose addresses fall, so that none but the order of making says which block is the first."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}
        self.room = 1_200_000

    def allocate(self, size: int) -> int:
        if sum(self.live.values()) + size > self.room:
            raise MemoryError
        address = 1 << 30 if not self.live else min(self.live) - (1 << 21)
        self.live[address] = size
        return address

    def free(self, address: int) -> None:
        del self.live[address]


def test_who_asks_again_gets_the_same_blocks() -> None:
    books = Bookkeeper()
    pool = Pool(books.allocate, books.free)
    addresses = []
    for _ in range(3):
        blocks = [pool.take(size) for size in (1000, 1000, 700, 5000)]
        addresses.append([block.address for block in blocks])
        del blocks
    assert addresses[0] == addresses[1] == addresses[2]
    assert len(books.live) == 4
    del pool
    gc.collect()
    assert books.live == {}


def test_what_is_kept_is_freed_before_memory_is_refused() -> None:
    books = Bookkeeper()
    pool = Pool(books.allocate, books.free)
    held = pool.take(400_000)
    pool.take(500_000)
    assert len(books.live) == 2
    other = pool.take(600_000)
    assert sorted(books.live.values()) == sorted([held.size, other.size])
    with pytest.raises(MemoryError):
        pool.take(300_000)


@given(st.integers(1, 1 << 40))
def test_blocks_waste_little(size: int) -> None:
    assert size <= rounded(size) <= max(512, size * 9 // 8 + 512)
    assert rounded(size) % 512 == 0


@pytest.mark.parametrize(("dtype", "width", "length"), [("float32", 64, 16), ("float16", 6, 5), ("bfloat16", 3, 7)])
def test_buffers_move_and_grow_where_they_lie(dtype: str, width: int, length: int) -> None:
    """Also where the size of a head fits no alignment."""
    cuda = FakeCuda()
    device = Device(cuda, 0)
    buffers = Buffers(device, ["a", "b", "c"], (3, 2, length, width), dtype)
    assert all(tensor.address % ALIGNMENT == 0 for tensor in buffers.values.values())
    assert not any(buffers.array(name, length).any() for name in "abc")
    wanted = {}
    for place, (name, tensor) in enumerate(buffers.values.items()):
        numbers = np.arange(3 * 2 * length * width, dtype=np.float32).reshape(3, 2, length, width) % 100 + place
        stored = (numbers.view(np.uint32) >> 16).astype(np.uint16) if dtype == "bfloat16" else numbers.astype(dtype)
        device.upload(tensor.address, stored.ctypes.data, stored.nbytes)
        wanted[name] = numbers
    buffers.copy_rows(np.array([0, 1, 2]), np.array([1, 0, 0]), 3)
    for name, numbers in wanted.items():
        moved = numbers.copy()
        moved[:, :, :3] = numbers[[1, 0, 0], :, :3]
        np.testing.assert_array_equal(buffers.array(name, length), moved)
    buffers.grow(length + 4, 3)
    for name, numbers in wanted.items():
        assert buffers.values[name].shape == (3, 2, length + 4, width)
        np.testing.assert_array_equal(buffers.array(name, 3), numbers[[1, 0, 0], :, :3])
        assert not buffers.array(name, length + 4)[:, :, 3:].any()
    del tensor, buffers, device
    gc.collect()
    assert cuda.left() == []
    assert cuda.faults == []


def test_arrays_come_back_as_they_went() -> None:
    device = Device(FakeCuda(), 0)
    for array in (np.arange(6).reshape(2, 3).T, np.float16([1.5, -2]), np.array([[True, False]])):
        np.testing.assert_array_equal(uploaded(device, array).array(), array)
    np.testing.assert_array_equal(uploaded(device, np.array([0x3F80, 0xC000], np.uint16)).array(), [1, -2])
