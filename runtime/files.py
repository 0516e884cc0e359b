"""The files of an artifact's directory: which names may be there, what is there, hashes, and bytes that reach the disk.

Nothing here follows a symbolic link or opens what is not a regular file. It does not know the manifest.
"""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from txopt.runtime.strict_json import show

MANIFEST = "manifest.json"
FOLDER = "engines"  # the only directory inside an artifact
SUFFIXES = (".onnx", ".data", ".safetensors", ".json", ".txt", ".spm", ".model", ".plan", ".md")
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_NAME = re.compile(rf"(?:{FOLDER}/)?[A-Za-z0-9][A-Za-z0-9._-]{{0,199}}", re.ASCII)
_BUFFER = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a directory holds: regular files by name (``/`` inside FOLDER), and all that may not be there at all."""

    files: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def name_problem(name: str) -> str | None:
    """Why an artifact may not hold a file of this name; None where it may."""
    if not _NAME.fullmatch(name):
        return (
            f"{show(name)}: expected a plain file name, or one below {FOLDER}/ (letters, digits, '.', '_', '-'); "
            "names that could leave the directory are refused"
        )
    suffix = Path(name).suffix.lower()
    if suffix in PICKLES:
        return (
            f"{show(name)}: {suffix} files may hold pickles, which run code when opened; weights belong in .safetensors"
        )
    if Path(name).suffix not in SUFFIXES:
        return f"{show(name)}: expected a suffix among {' '.join(SUFFIXES)}, found {show(Path(name).suffix)}"
    return None


def listing(root: Path) -> Listing:
    """Everything below ``root``, looking into FOLDER and no other directory; reads no file and follows no link.

    Raises:
        OSError: a directory cannot be read.
    """
    found = Listing()
    _scan(root, "", found)
    return found


def _scan(folder: Path, prefix: str, found: Listing) -> None:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = prefix + entry.name
            if entry.is_symlink():
                found.problems.append(
                    f"{show(name)}: expected a regular file, found a symbolic link; put the file itself there"
                )
            elif entry.is_file(follow_symlinks=False):
                found.files[name] = Path(entry.path)
            elif not entry.is_dir(follow_symlinks=False):
                found.problems.append(f"{show(name)}: expected a regular file, found a device, pipe or socket")
            elif name == FOLDER:
                _scan(Path(entry.path), f"{FOLDER}/", found)
            else:
                found.problems.append(f"{show(name)}: expected a file, found a directory; only {FOLDER}/ may be one")


def _open(path: str, flags: int) -> int:
    # No link is followed and no pipe waited for, even if one took the file's place a moment ago.
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def read(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of a regular file.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    with open(path, "rb", buffering=0, opener=_open) as file:
        parts, left = [], most
        while left > 0 and (part := file.read(min(left, _BUFFER))):
            parts.append(part)
            left -= len(part)
    return b"".join(parts)


def sha256(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256 in lowercase hex) of a regular file, in constant memory.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    # Larger buffers than file_digest's own were measured and change nothing: the time is SHA-256's.
    with open(path, "rb", buffering=0, opener=_open) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def sync(path: Path) -> None:
    """Wait until the file, or the directory's list of names, is on the disk."""
    if os.name != "posix":
        return  # Windows can do neither through a descriptor that only reads
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(folder: Path, *, wait: bool) -> Callable[[], None] | None:
    """Take the directory's advisory lock, which the system drops when this process dies; None where another has it.

    Returns the function that releases it. The lock stays with the directory when that is renamed.

    Raises:
        OSError: the directory is not there (any more), or this system or file system has no such locks.
    """
    try:
        import fcntl
    except ImportError as err:  # Windows
        raise OSError("no directory locks on this system") from err
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise FileNotFoundError(f"{folder} was replaced meanwhile")
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return lambda: os.close(descriptor)
