"""Foreign .onnx files, from any exporter: optimized into a directory of their own, and proved to say the same; or looked at.

Owns what reaches the caller and the disk. The file itself is never parsed here: ``foreign_child`` does everything that native code
could crash in, in a process of its own.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txopt.exporter.child import Progress, ask
from txopt.runtime.errors import ArtifactError, SourceError
from txopt.runtime.writer import ArtifactWriter
from txopt.runtime.written import OPTIMIZED, is_optimized

STAGES = ("read", "convert", "clean", "fuse", "lower", "write", "prove")


@dataclass(frozen=True, kw_only=True)
class OptimizeReport:
    """What ``optimize`` did: nodes before and after, fusions by operator ({"fused", "refused"}), and the certificate of parity.

    ``cache``, where one was asked for: "buffers", outputs by inputs; "position", the input that says where to write; "length", the
    name of theirs.
    """

    path: Path
    source: Path
    opset: int
    nodes_before: int
    nodes_after: int
    operators: dict[str, int]
    fusions: dict[str, dict[str, Any]]
    parity: dict[str, Any]
    cache: dict[str, Any] | None
    files: dict[str, int]

    @property
    def fused(self) -> int:
        return sum(int(report["fused"]) for report in self.fusions.values())

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "source": str(self.source), "fused": self.fused}


def optimize(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    prove: bool = False,
    in_place_cache: bool = False,
    progress: Progress | None = None,
) -> OptimizeReport:
    """Fuses the .onnx file ``path`` into the directory ``out``: model.onnx, of opset 24, and weights.data.

    Args:
        path: the file, of opset 11 to 24; external data lies beside it.
        out: the directory to make; it is there as a whole or not at all.
        overwrite: replace what an earlier ``optimize`` left at ``out``; anything else there is never touched.
        prove: replay every fusion alone, and leave out what does not hold.
        in_place_cache: pasts that grow by Concat become buffers of fixed length, updated in place (docs/optimize.md).
        progress: called with the name of each of STAGES as it begins.

    Raises:
        SourceError: the file cannot be read, is no standard ONNX, or runs on no input that could be drawn; or a cache was asked
            for that cannot be made in place.
        ParityError: the new graph does not say what the file says. ArtifactError: ``out`` may not be written.
    """
    source = _file(path)
    if source.resolve().is_relative_to(Path(out).resolve()):
        raise ArtifactError(
            f"{out}: holds {source}, which would be replaced while it is read; choose another directory"
        )
    with _FolderWriter(out, overwrite=overwrite) as writer:
        asked = {"directory": str(writer.directory), "prove": prove, "in_place_cache": in_place_cache}
        found = _ask(source, progress, task="optimize", **asked)
        sizes = {name: (writer.directory / name).stat().st_size for name in OPTIMIZED}
        writer.publish()
    return OptimizeReport(path=Path(out), source=source, files=sizes, **found)


def inspect(path: str | os.PathLike[str], *, progress: Progress | None = None) -> dict[str, Any]:
    """What is in a .onnx file, and what ``optimize`` would fuse in it; writes nothing.

    Raises:
        SourceError: it is no ONNX file, or not a whole one.
    """
    return picture(path, progress=progress)[0]


def picture(path: str | os.PathLike[str], *, progress: Progress | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what ``inspect`` gives, the graph by layers before and after its fusions), as ``description.picture`` has it.

    Raises:
        SourceError: as ``inspect``.
    """
    source = _file(path)
    found = _ask(source, progress, task="inspect")
    return {"path": str(source), **found["document"]}, found["picture"]


def stored(directory: Path, files: Mapping[str, str]) -> dict[str, Any]:
    """The graphs of an artifact at ``directory`` by layers, as ``description.stored`` has it; ``files`` are theirs by name.

    Raises:
        SourceError: one of them is no ONNX file.
    """
    return _ask(directory, None, task="look", files={name: str(directory / file) for name, file in files.items()})


def _file(path: str | os.PathLike[str]) -> Path:
    source = Path(path)
    if source.is_dir():
        inside = sorted(file.name for file in source.glob("*.onnx"))
        hint = f"name one of its files: {', '.join(inside)}" if inside else "there is none in it"
        raise SourceError(f"{source}: expected a .onnx file, found a directory; {hint}")
    if not source.exists():
        raise SourceError(f"{source}: expected a .onnx file, found nothing there; check the name")
    if not source.is_file():
        raise SourceError(f"{source}: expected a .onnx file, found a device, pipe or socket")
    return source


def _ask(source: Path, progress: Progress | None, **asked: Any) -> dict[str, Any]:
    """The child's answer to one task."""
    return ask("txopt.exporter.foreign_child", source, asked, progress)


class _FolderWriter(ArtifactWriter):
    """All of a directory or nothing, as artifacts are written; but there is no manifest, and OPTIMIZED are all there is."""

    def publish(self) -> None:
        """Make ``directory`` the one at ``out``.

        Raises:
            ArtifactError: it cannot be written, or something appeared at ``out`` meanwhile.
        """
        self._put(sorted(self.directory.iterdir()))

    def _check_out(self) -> None:
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise ArtifactError(f"{self.out}: expected a new directory, found a file there; choose another name")
        if Path.cwd().is_relative_to(self.out):
            raise ArtifactError(f"{self.out}: is the current directory and cannot be replaced; name one inside it")
        found = sorted(file.name for file in self.out.iterdir())
        if not found:
            return
        if found != sorted(OPTIMIZED) or not is_optimized(self.out):
            raise ArtifactError(
                f"{self.out}: expected a new directory, found one that txopt optimize did not write, so it is never overwritten; "
                "choose another name"
            )
        if not self._overwrite:
            raise ArtifactError(
                f"{self.out}: an optimized model is there already; choose another name, or overwrite it (--overwrite)"
            )
