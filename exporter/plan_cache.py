"""Plans and kernel timings that earlier builds left in a directory, so that the same build is done once.

A file is named by what its plan depends on: the graph, its weights, the library and its version, the GPUs, the options, the profiles.
It begins with its own hash; what does not match was cut short or changed, and is built again. One build at a time writes in a
directory; files appear whole. Knows no library.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from txopt.exporter.engine import Built
from txopt.runtime.errors import UsageError
from txopt.runtime.files import lock, sha256
from txopt.runtime.strict_json import canonical
from txopt.runtime.written import is_artifact

_SUFFIX = ".cache"


@dataclass(frozen=True)
class PlanCache:
    """The directory, or None: nothing is kept, nothing found."""

    directory: Path | None

    @classmethod
    @contextmanager
    def opened(cls, directory: Path | None) -> Iterator[Self]:
        """The cache, alone in ``directory``, which is made where it is not there.

        Raises:
            UsageError: it cannot be, or is inside an artifact.
        """
        if directory is None:
            yield cls(None)
            return
        check_place(directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise UsageError(f"--timing-cache {directory}: cannot be made: {err.strerror or err}") from err
        try:
            unlock = lock(directory, wait=True)
        except OSError:  # no locks here; files appear whole all the same
            unlock = None
        try:
            yield cls(directory)
        finally:
            if unlock is not None:
                unlock()

    def find(self, key: str) -> Built | None:
        """What was kept under ``key``."""
        data = self._read(key)
        if data is None:
            return None
        header, _, plan = data.partition(b"\n")
        return Built(plan=plan, **json.loads(header))

    def keep(self, key: str, built: Built) -> None:
        facts = {"layers": dict(built.layers), "float_casts": built.float_casts, "apart": built.apart}
        header = json.dumps(facts).encode()
        self._write(key, header + b"\n" + built.plan)

    def timing(self, library: str) -> bytes | None:
        """What a ``library`` (its name, version and GPU) measured of kernels."""
        return self._read(f"timing-{library}")

    def keep_timing(self, library: str, data: bytes | None) -> None:
        if data is not None:
            self._write(f"timing-{library}", data)

    def _read(self, name: str) -> bytes | None:
        if self.directory is None:
            return None
        try:
            data = (self.directory / f"{name}{_SUFFIX}").read_bytes()
        except OSError:
            return None
        digest, _, rest = data.partition(b"\n")
        return rest if digest == hashlib.sha256(rest).hexdigest().encode() else None

    def _write(self, name: str, data: bytes) -> None:
        if self.directory is None:
            return
        path = self.directory / f"{name}{_SUFFIX}"
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with unfinished.open("wb") as file:
                file.write(hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except OSError as err:
            raise UsageError(f"--timing-cache {self.directory}: cannot be written: {err.strerror or err}") from err
        finally:
            unfinished.unlink(missing_ok=True)


def key_of(files: Mapping[str, Path], facts: Mapping[str, Any]) -> str:
    """The name that the plan of ``files`` (a graph and its weights) is kept under; ``facts`` is whatever else it depends on."""
    hashes = {name: sha256(path)[1] for name, path in files.items()}
    return hashlib.sha256(canonical({"files": hashes, "facts": dict(facts)})).hexdigest()


def check_place(directory: Path) -> None:
    """UsageError where ``directory`` is inside an artifact."""
    place = Path(os.path.realpath(directory))
    for holder in (place, *place.parents):
        if is_artifact(holder):
            raise UsageError(
                f"--timing-cache {directory}: is inside the artifact {holder}, which holds the files of its manifest and no others; "
                "keep it elsewhere"
            )
