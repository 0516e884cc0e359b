"""How many of something a caller asks for: a whole number, at least 1, and what that takes in memory.

Owns those two checks, which cost nothing compared with what is opened or allocated after them.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import Any

from txopt.runtime.errors import UsageError


def count(name: str, value: Any, most: int | None = None) -> int:
    """``value`` as an int from 1 to ``most`` (None: no bound), or UsageError that names it."""
    expected = "an integer, at least 1" if most is None else f"an integer from 1 to {most}"
    try:
        number = index(value)
    except TypeError:
        raise UsageError(f"{name}: expected {expected}, got {value!r}") from None
    if isinstance(value, bool) or number < 1 or (most is not None and number > most):
        raise UsageError(f"{name}: expected {expected}, got {value!r}")
    return number


@contextmanager
def allocating(size: int, rows: int) -> Iterator[None]:
    """Around the allocation of ``size`` bytes for ``rows`` rows: UsageError where the machine cannot hold them.

    A system may promise memory that it does not have, and end the process when it is written to; so asking is not enough.
    """
    try:
        if size > memory():
            raise MemoryError
        yield
    except MemoryError as err:
        raise UsageError(
            f"buffers for {rows} rows (sources times beams or returned sequences) take {-(-size // 2**30):,} GiB of memory, "
            "more than this machine has to give: ask for fewer beams (num_beams, num_return_sequences), a smaller batch, "
            "or shorter rows"
        ) from err


def memory() -> int:
    """Bytes of this machine's memory; where the system does not say, as many as an address can name."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return sys.maxsize
