"""What txopt wrote before, told by a look at a directory from outside: artifacts and optimized models.

It opens nothing of them but the manifest and a file's first bytes, and does not say whether they are intact.
"""

import contextlib
from pathlib import Path

from txopt.runtime.errors import ArtifactError
from txopt.runtime.files import MANIFEST, read
from txopt.runtime.manifest import LARGEST
from txopt.runtime.strict_json import parse

OPTIMIZED = ("model.onnx", "weights.data")  # all that a directory of txopt optimize holds
_OURS = b"\x12\x05txopt"  # producer_name, of the first fields that protobuf writes


def is_artifact(folder: Path) -> bool:
    """Whether a manifest of txopt is in ``folder``, of any format version."""
    with contextlib.suppress(OSError, ArtifactError):
        document = parse(read(folder / MANIFEST, LARGEST + 1), [])
        return is_manifest(document)
    return False


def is_manifest(document: object) -> bool:
    """Whether a JSON document is one of ours: a format and a list of files."""
    return (
        isinstance(document, dict) and type(document.get("format")) is int and isinstance(document.get("files"), dict)
    )


def is_optimized(folder: Path) -> bool:
    """Whether ``folder`` has both files of ``txopt optimize``, and whatever else."""
    with contextlib.suppress(OSError):
        return all((folder / name).is_file() for name in OPTIMIZED) and _OURS in read(folder / OPTIMIZED[0], 64)
    return False


def check_outside(out: Path) -> None:
    """Refuses what would be written into something that holds its own files and no others, and could not be replaced afterwards.

    Args:
        out: a resolved path, of something that is there or not.

    Raises:
        ArtifactError: one of its parents is an artifact or an optimized model.
    """
    for parent in out.parents:
        kind = "the artifact" if is_artifact(parent) else "the optimized model" if is_optimized(parent) else None
        if kind is not None:
            raise ArtifactError(
                f"{out}: is inside {kind} {parent}, which holds its own files and no others; choose a place beside it"
            )
