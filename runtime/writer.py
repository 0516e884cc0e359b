"""Writing an artifact: all of it or nothing, and never over anything that is not one.

Owns the temporary directory beside OUT, the order in which bytes reach the disk, and what happens when the process is
interrupted or killed at any moment. It does not know how the files are made.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, TxoptError, explain
from txopt.runtime.files import FOLDER, MANIFEST, listing, lock, name_problem, read, sha256, sync
from txopt.runtime.manifest import LARGEST, FileEntry, Manifest
from txopt.runtime.strict_json import limited, parse, show
from txopt.runtime.written import check_outside, is_manifest

Unlock = Callable[[], None]


class ArtifactWriter:
    """Collects the files of one artifact in ``directory``, beside ``out`` on its file system, and commits them at once.

        with ArtifactWriter(out) as writer:
            ...                                # write files into writer.directory
            artifact = writer.commit(manifest)

    Leaving the block without ``commit``, by an exception, by Ctrl-C, or by SIGTERM within ``termination.terminable``, removes
    everything that was written. What a killed process left is removed by the next writer of the same ``out``; an artifact that it had
    moved aside to replace is put back.

    Args:
        out: the artifact's future directory; missing parents are made.
        overwrite: whether an artifact at ``out`` may be replaced. It stays in place until the new one is complete.
            Anything else at ``out`` (but an empty directory) is never touched, whatever this says, and nothing is
            written into an artifact or an optimized model.
    """

    def __init__(self, out: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.out = Path(os.path.realpath(out))  # so that a link to a directory stays a link
        self.directory = self._sibling("new")
        self._overwrite = overwrite
        self._committed = False
        self._made: list[Path] = []  # parents of out, outermost first
        self._unlock: Unlock | None = None

    def __enter__(self) -> Self:
        """Raises ArtifactError if ``out`` may not be written."""
        try:
            check_outside(self.out)
            self._sweep()
            self._check_out()
            self._make_directory()
        except OSError as err:
            self._clean()
            raise ArtifactError(f"{self.out}: cannot be written: {err.strerror or err}") from err
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clean()

    def draft(self, manifest: Manifest) -> Artifact:
        """What ``commit`` would make of ``directory`` as it is now, for those who must run it first; not hashed yet.

        Raises:
            ArtifactError: a file may not be in an artifact.
        """
        entries = {name: FileEntry(size=path.stat().st_size, sha256="") for name, path in self._files().items()}
        return Artifact(path=self.directory, manifest=replace(manifest, files=entries))

    def staged(self, manifest: Manifest) -> Artifact:
        """``draft``, hashed: what others may refer to by its hash before it is committed."""
        return Artifact(path=self.directory, manifest=replace(manifest, files=self._hashed()))

    def commit(self, manifest: Manifest) -> Artifact:
        """Make the files in ``directory`` the artifact at ``out``; ``manifest.files`` is filled in here.

        Raises:
            ArtifactError: a file may not be in an artifact, the manifest would be refused by a reader, or something
                appeared at ``out`` meanwhile. Nothing is at ``out`` then, or what was there before.
        """
        if self._committed:
            raise TxoptError("expected one commit of an ArtifactWriter, found a second")
        try:
            complete = replace(manifest, files=self._hashed())
            data = complete.to_bytes()
            target = self.directory / MANIFEST
            with open(target, "xb") as file:
                file.write(data)
        except OSError as err:
            raise ArtifactError(f"{self.out}: cannot be written: {err.strerror or err}") from err
        self._put((target, *self.directory.glob(FOLDER)))
        return Artifact(path=self.out, manifest=complete)

    def _put(self, files: Iterable[Path]) -> None:
        """Makes ``directory`` the one at ``out`` once ``files``, which no one has synced yet, are on the disk."""
        try:
            for path in (*files, self.directory):
                sync(path)
            self._check_out()
            self._publish()
            self._committed = True
        except OSError as err:
            raise ArtifactError(f"{self.out}: cannot be written: {err.strerror or err}") from err
        self._clean()
        # It is there: some file systems cannot promise that a new name survives a power cut.
        with contextlib.suppress(OSError):
            sync(self.out.parent)

    def _files(self) -> dict[str, Path]:
        found = listing(self.directory)
        problems = [*found.problems, *filter(None, map(name_problem, found.files))]
        if MANIFEST in found.files:
            problems.append(f"{show(MANIFEST)}: expected to be written by commit, found it there already")
        if not found.files:
            problems.append("expected files, found none")
        if problems:
            raise ArtifactError(explain(f"{self.out}: these files cannot be an artifact:", limited(problems)))
        return dict(sorted(found.files.items()))

    def _hashed(self) -> dict[str, FileEntry]:
        entries = {}
        for name, path in self._files().items():
            sync(path)
            size, digest = sha256(path)
            entries[name] = FileEntry(size=size, sha256=digest)
        return entries

    def _check_out(self) -> None:
        """Called twice, since minutes pass between the first look at ``out`` and the rename."""
        if not os.path.lexists(self.out):
            return
        if not self.out.is_dir():
            raise ArtifactError(f"{self.out}: expected a new directory, found a file there; choose another name")
        if Path.cwd().is_relative_to(self.out):
            raise ArtifactError(f"{self.out}: is the current directory and cannot be replaced; name one inside it")
        if not any(self.out.iterdir()):
            return
        if foreign := foreign_content(self.out):
            title = f"{self.out}: is there and not (only) an artifact, so it is never overwritten; choose another name:"
            raise ArtifactError(explain(title, limited(foreign)))
        if not self._overwrite:
            raise ArtifactError(
                f"{self.out}: an artifact is there already; choose another name, or overwrite it (--overwrite)"
            )

    def _make_directory(self) -> None:
        for parent in reversed(self.out.parents):
            if not parent.exists():
                parent.mkdir(exist_ok=True)
                self._made.append(parent)
        while self._unlock is None:
            self.directory.mkdir()  # not mkdtemp: the artifact keeps these permissions
            try:
                self._unlock = lock(self.directory, wait=True)
            except FileNotFoundError:  # swept between the two lines
                continue
            except OSError:  # no locks here; so nobody sweeps either
                self._unlock = _nothing

    def _publish(self) -> None:
        if not self._overwrite or not self.out.exists():
            os.rename(self.directory, self.out)  # fails where something but an empty directory appeared
            return
        try:
            unlock = lock(self.out, wait=False)  # keeps sweepers from the old artifact while it is moved aside
        except OSError:
            unlock = _nothing
        if unlock is None:
            raise ArtifactError(f"{self.out}: another process is replacing this artifact; try again later")
        retired = self._sibling("old")
        try:
            os.rename(self.out, retired)
            os.rename(self.directory, self.out)
        except BaseException as err:
            if not os.path.lexists(self.out):
                os.rename(retired, self.out)
            elif self.directory.exists():
                found = f"{self.out}: something appeared there meanwhile; the artifact that was there is now {retired}"
                raise ArtifactError(found) from err
            raise
        finally:
            if not self.directory.exists():  # asked of the disk: Ctrl-C may fall between the rename and the next line
                shutil.rmtree(retired, ignore_errors=True)
            unlock()

    def _sibling(self, kind: str) -> Path:
        return self.out.with_name(f".{self.out.name}.txopt-{secrets.token_hex(4)}.{kind}")

    def _sweep(self) -> None:
        """Remove, or put back, what dead writers of the same ``out`` left: their locks went with them."""
        pattern = re.compile(re.escape(f".{self.out.name}.txopt-") + r"[0-9a-f]{8}\.(new|old)")
        if not self.out.parent.is_dir():
            return
        for path in sorted(self.out.parent.iterdir()):
            match = pattern.fullmatch(path.name)
            if not match or path.is_symlink() or not path.is_dir():
                continue
            with contextlib.suppress(OSError):
                if (unlock := lock(path, wait=False)) is not None:
                    try:
                        if match[1] == "old" and not os.path.lexists(self.out):
                            os.rename(path, self.out)
                        elif match[1] == "new" or not foreign_content(self.out):
                            shutil.rmtree(path, ignore_errors=True)
                    finally:
                        unlock()

    def _clean(self) -> None:
        if not self._committed:
            shutil.rmtree(self.directory, ignore_errors=True)
            for parent in reversed(self._made):
                with contextlib.suppress(OSError):  # no longer empty: someone else uses it
                    parent.rmdir()
        if self._unlock is not None:
            self._unlock()
            self._unlock = None


def foreign_content(root: Path) -> list[str]:
    """What a directory holds besides an artifact, damaged or not, of any format version; empty: nothing else.

    An artifact here is a manifest.json with a format and a list of files; only those files, which txopt wrote itself,
    may be removed with it.
    """
    found = listing(root)
    if MANIFEST not in found.files:
        return [*found.problems, "expected manifest.json, found none"]
    try:
        document = parse(read(found.files[MANIFEST], LARGEST + 1), [])
    except ArtifactError as err:
        return [*found.problems, f"manifest.json: {err}"]
    if not isinstance(document, dict) or not is_manifest(document):
        return [*found.problems, "manifest.json: not of txopt: no format, or no list of files"]
    unlisted = sorted(found.files.keys() - document["files"].keys() - {MANIFEST})
    return [*found.problems, *(f"{show(name)}: not a file of the artifact" for name in unlisted)]


def _nothing() -> None:
    """Releases the lock that a system without locks did not give."""
