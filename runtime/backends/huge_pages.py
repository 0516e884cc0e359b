"""Large pages for what an engine allocates: weights that are read whole at every step are read faster from them.

Most systems give large pages only where they are asked for ("madvise"), and the engine's allocator does not ask. ``collapsed``
asks for all memory that grew inside it. It is advice: contents and addresses stay, and where the system knows no such pages
nothing happens. Source: madvise(2), MADV_COLLAPSE, Linux 6.1.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEAST = 4 << 20  # bytes; smaller regions hold no weights worth the call
PAGE = 2 << 20  # bytes of a large page
_MADV_COLLAPSE = 25
_MAPS = Path("/proc/self/maps")

Region = tuple[int, int]


@contextmanager
def collapsed() -> Iterator[None]:
    """Memory that is allocated inside, and still there at the end, lies in large pages afterwards."""
    before = dict(_anonymous())
    yield
    for start, end in _anonymous():
        if end - start - (before.get(start, start) - start) >= LEAST:
            _advise(start, end)


def _anonymous() -> list[Region]:
    """Writable private regions without a file behind them, (start, end) by address; none where the system does not say."""
    try:
        lines = _MAPS.read_text("ascii", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        addresses, permissions, _, _, _, *name = line.split(maxsplit=5)
        if permissions == "rw-p" and name in ([], ["[heap]"]):
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _advise(start: int, end: int) -> None:
    first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
    if first < last:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_COLLAPSE)
