"""What a figure was measured on, as far as it decides figures: the processor, its cores, and what it multiplies integers with."""

import os
import platform
from pathlib import Path
from typing import Any

# Kernels of engines differ by these; the best that is there is named.
_INTEGERS = ("amx_int8", "avx512_vnni", "avx_vnni", "avx512bw", "avx2", "i8mm", "asimddp")


def machine() -> dict[str, Any]:
    """{"cpu", "cores", "integers", "python"}; "integers" is the widest instruction set for products of 8 bits, None if unknown."""
    lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": os.cpu_count(),
        "integers": next((name for name in _INTEGERS if name in flags), None),
        "python": platform.python_version(),
    }


def described(found: dict[str, Any]) -> str:
    """``found`` of ``machine``, for a page."""
    integers = f", {found['integers']} for integers" if found.get("integers") else ""
    return f"{found['cores']} cores of an {found['cpu']}{integers}"
