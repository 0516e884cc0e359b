"""Large pages are advice: what lies in them stays what and where it was."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from txopt.runtime.backends import huge_pages


def test_memory_that_grew_inside_is_advised_and_keeps_its_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    advised: list[tuple[int, int]] = []
    advise = huge_pages._advise
    monkeypatch.setattr(huge_pages, "_advise", lambda start, end: (advised.append((start, end)), advise(start, end)))
    with huge_pages.collapsed():
        region = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        numbers = np.frombuffer(region, np.int64)
        numbers[:] = np.arange(len(numbers))
        address = numbers.ctypes.data
    assert any(start <= address and address + numbers.nbytes <= end for start, end in advised)
    assert numbers.ctypes.data == address
    np.testing.assert_array_equal(numbers, np.arange(len(numbers)))


SMALL = """
import mmap
from txopt.runtime.backends import huge_pages

advised = []
huge_pages._advise = lambda start, end: advised.append((start, end))
with huge_pages.collapsed():
    grown = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
print(advised)
"""


def test_small_growth_is_left_alone() -> None:
    """In a process of its own: what other tests freed and other threads grow by lies beside."""
    done = subprocess.run([sys.executable, "-c", SMALL], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_system_that_does_not_tell_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "missing")
    with huge_pages.collapsed():
        pass
