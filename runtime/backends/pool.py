"""Memory that is asked for again and again in the same sizes: blocks are kept for the next who asks, and freed with the pool.

Owns sizes and reuse. It knows no device: whoever makes a pool says how memory is allocated and freed. Of the blocks that fit, the one
that was made first is given, so who asks again for what it asked for and gave back before gets the same addresses.
"""

from collections.abc import Callable
from itertools import count
from threading import RLock

LEAST = 512  # bytes; addresses are multiples of at least 256, which TensorRT asks for
_FINENESS = 3  # bits of a size besides its highest: at most an eighth is wasted


class Block:
    """``size`` bytes at ``address``, back in their pool when nobody holds this any more."""

    __slots__ = ("_number", "_pool", "address", "size")

    def __init__(self, pool: "Pool", number: int, address: int, size: int) -> None:
        self._pool, self._number, self.address, self.size = pool, number, address, size

    def __del__(self) -> None:
        self._pool.give_back(self._number, self.address, self.size)


class Pool:
    """Blocks of one kind of memory.

    Args:
        allocate: memory of so many bytes by its address; MemoryError where there is none left.
        free: what it gave.
    """

    def __init__(self, allocate: Callable[[int], int], free: Callable[[int], None]) -> None:
        self._allocate, self._free = allocate, free
        self._kept: dict[int, list[tuple[int, int]]] = {}  # by size: which of the blocks it is, and its address
        self._numbers = count()
        self._ended = False
        self._lock = RLock()  # a block may be given back wherever Python collects it, also inside of ``take``

    def take(self, size: int) -> Block:
        """At least ``size`` bytes, of any content.

        Errors:
            MemoryError: there are none left, also after all kept blocks are freed.
        """
        size = rounded(size)
        with self._lock:
            kept = self._kept.get(size)
            if kept:
                first = min(kept)
                kept.remove(first)
                return Block(self, *first, size)
        try:
            address = self._allocate(size)
        except MemoryError:
            self.trim()
            address = self._allocate(size)
        return Block(self, next(self._numbers), address, size)

    def give_back(self, number: int, address: int, size: int) -> None:
        with self._lock:
            if not self._ended:
                self._kept.setdefault(size, []).append((number, address))
                return
        self._free(address)  # of a pool and its blocks that die together, the pool may be the first

    def trim(self) -> None:
        """Frees what is kept."""
        with self._lock:
            kept, self._kept = self._kept, {}
        for _, address in (block for blocks in kept.values() for block in blocks):
            self._free(address)

    def __del__(self) -> None:
        self._ended = True
        self.trim()


def rounded(size: int) -> int:
    """The size of the block for ``size`` bytes."""
    step = 1 << max(LEAST.bit_length() - 1, size.bit_length() - 1 - _FINENESS)
    return max(LEAST, -(-size // step) * step)
