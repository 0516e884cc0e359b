"""Tensors on a GPU: as they are, with a side on the host, and as buffers whose rows move.

Owns dtypes, layouts and who holds which memory. It knows no engine and no graph. Axes: R rows, H heads, S self-cache length, D head
size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm, prod

import numpy as np

from txopt.runtime.arrays import Array
from txopt.runtime.backends.cuda import Device, Layout
from txopt.runtime.backends.moves import SPARE, moves
from txopt.runtime.backends.pool import Block
from txopt.runtime.decoder import Ids

ALIGNMENT = 256  # bytes; what TensorRT asks of addresses
STORED: dict[str, type[np.generic]] = {  # numpy has no bfloat16: its bits
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "int32": np.int32,
    "bool": np.bool_,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Tensor:
    """Numbers at an ``address`` of a device, in memory that this keeps."""

    device: Device
    block: Block
    address: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return size_of(self.shape, self.dtype)

    def array(self) -> Array:
        """A copy on the host; bfloat16 as float32."""
        stored: Array = np.empty(self.shape, STORED[self.dtype])
        with self.device as device:
            device.download(stored.ctypes.data, self.address, self.size)
            device.wait()
        if self.dtype != "bfloat16":
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)


def size_of(shape: Sequence[int], dtype: str) -> int:
    """Bytes."""
    return prod(shape) * np.dtype(STORED[dtype]).itemsize


def empty(device: Device, kinds: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
    """Tensors of any content, by name, in one block; ``kinds``: dtype and shape of each.

    Errors:
        MemoryError: the device has no more.
    """
    offsets, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        offsets[name] = end
        end += -(-size_of(shape, dtype) // ALIGNMENT) * ALIGNMENT
    block = device.memory.take(end)
    return {
        name: Tensor(device=device, block=block, address=block.address + offsets[name], dtype=dtype, shape=shape)
        for name, (dtype, shape) in kinds.items()
    }


def uploaded(device: Device, array: Array) -> Tensor:
    """The numbers of ``array``; uint16 stands for bfloat16."""
    dtype = "bfloat16" if array.dtype == np.uint16 else array.dtype.name
    array = np.ascontiguousarray(array)
    with device:
        tensor = empty(device, {"": (dtype, array.shape)})[""]
        device.upload(tensor.address, array.ctypes.data, array.nbytes)
    return tensor


class Staged:
    """See runner.Staged: ``array`` is pinned, and ``value`` its place on the device."""

    def __init__(self, device: Device, array: Array) -> None:
        self._device = device
        self.array = device.pinned(array.shape, array.dtype)
        self.array[...] = array
        self.value = empty(device, {"": (array.dtype.name, array.shape)})[""]
        self.host, self._size = self.array.ctypes.data, array.nbytes

    def upload(self) -> None:
        self._device.upload(self.value.address, self.host, self._size)

    def download(self) -> None:
        self._device.download(self.host, self.value.address, self._size)

    def read(self) -> Array:
        with self._device as device:
            self.download()
            device.wait()
        return self.array


class Buffers:
    """See runner.Buffers: all of them in one block, so that a row of all of them is copied by one call.

    They lie a whole number of heads apart, one that keeps every address aligned.
    """

    def __init__(self, device: Device, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> None:
        self._device, self._names, self._shape, self._dtype = device, tuple(names), shape, dtype
        self._spare: tuple[Block, Layout] | None = None
        self._place()

    def _place(self) -> None:
        rows, self._heads, length, width = self._shape
        self._position_size = size_of((width,), self._dtype)
        head = length * self._position_size
        together = lcm(head, ALIGNMENT) // head  # heads, to come to an aligned address again
        lines = -(-rows * self._heads // together) * together
        block = self._device.memory.take(len(self._names) * lines * head)
        with self._device as device:
            device.clear(block.address, block.size)
        self._layout = Layout(block.address, head, lines)
        self.values = {
            name: Tensor(
                device=self._device,
                block=block,
                address=block.address + index * lines * head,
                dtype=self._dtype,
                shape=self._shape,
            )
            for index, name in enumerate(self._names)
        }

    def grow(self, length: int, filled: int) -> None:
        kept = (self.values, self._layout)  # the memory, until it is copied
        before, (rows, heads, _, width) = self._shape, self._shape
        self._shape, self._spare = (rows, heads, length, width), None
        try:
            self._place()
        except MemoryError:
            self._shape = before
            raise
        with self._device as device:
            box = (filled * self._position_size, rows * heads, len(self._names))
            device.copy_box(self._layout, 0, kept[1], 0, box)
            device.wait()

    def copy_rows(self, rows: Ids, sources: Ids, filled: int) -> None:
        box = (filled * self._position_size, self._heads, len(self._names))
        with self._device as device:
            for to, source in moves(rows.tolist(), sources.tolist()):
                device.copy_box(*self._line(to), *self._line(source), box)

    def _line(self, row: int) -> tuple[Layout, int]:
        """Where a row begins."""
        if row != SPARE:
            return self._layout, row * self._heads
        if self._spare is None:
            pitch = self._layout.pitch
            block = self._device.memory.take(len(self._names) * self._heads * pitch)
            self._spare = block, Layout(block.address, pitch, self._heads)
        return self._spare[1], 0

    def array(self, name: str, filled: int) -> Array:
        return self.values[name].array()[:, :, :filled].copy()
