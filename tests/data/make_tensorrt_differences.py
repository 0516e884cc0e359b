"""Which names of TensorRT-RTX's Python interface TensorRT does not have: ``python make_tensorrt_differences.py WHEEL ...``.

TensorRT's libraries are not on the package index, and its module cannot be imported without them; but the wheels of its bindings
are there (``pip download --no-deps tensorrt-cu13-bindings==11.4.*``), and the names that they define are strings in their binary.
Prints the JSON of tensorrt_differences.json.
"""

import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType


def names_of(module: ModuleType) -> set[str]:
    """The public names of a module and of its classes."""
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return {name for owner in (module, *classes) for name in dir(owner) if not name.startswith("_")}


def absent(wheel: Path, names: set[str]) -> list[str]:
    """Those of ``names`` that are no strings in the wheel's binary."""
    with zipfile.ZipFile(wheel) as archive:
        (file,) = [name for name in archive.namelist() if name.endswith("/tensorrt.so")]
        data = archive.read(file)
    return sorted(name for name in names if name.encode() + b"\0" not in data)


def main() -> None:
    import tensorrt_rtx_bindings

    names = names_of(tensorrt_rtx_bindings)
    wheels = {Path(wheel).name.split("-")[1]: absent(Path(wheel), names) for wheel in sys.argv[1:]}
    sys.stdout.write(json.dumps(wheels, indent=1) + "\n")


if __name__ == "__main__":
    main()
