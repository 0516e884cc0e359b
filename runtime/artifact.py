"""Reading an artifact: nothing in its directory is believed until all of it is checked.

Owns the order of the checks (names, kinds of files, sizes, hashes, manifest) and gathers what they find. It parses no
file but manifest.json, and it does not write: see ``writer``. docs/format.md specifies the format.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from txopt.runtime.errors import ArtifactError, UsageError, explain
from txopt.runtime.files import MANIFEST, Listing, listing, name_problem, read, sha256
from txopt.runtime.manifest import LARGEST, FileEntry, Manifest, read_manifest
from txopt.runtime.strict_json import limited, parse, show


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A directory whose files are what its manifest says.

    ``open`` is the way in for every directory that someone else may have touched. The constructor checks nothing: it
    serves whoever has just written the files and holds their manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Artifact":
        """The artifact at ``path``, every file of it hashed.

        Raises:
            ArtifactError: there is none; it was written by a newer txopt; or files are damaged, missing, not listed,
                of a kind that is refused, or reach out of the directory: all of that in one message.
        """
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"artifact: expected the path of a directory, got {show(path)}")
        root = Path(path)
        try:
            found = listing(root)
            manifest, problems = _checked(root, found)
        except FileNotFoundError as err:
            raise ArtifactError(f"{root}: expected the directory of an artifact, found nothing there") from err
        except NotADirectoryError as err:
            raise ArtifactError(f"{root}: expected the directory of an artifact, found a file") from err
        except OSError as err:
            raise ArtifactError(f"{root}: cannot be read: {err.strerror or err}") from err
        except ArtifactError as err:
            raise ArtifactError(f"{root}: {err}") from err
        if problems:
            title = (
                f"{root}: not an intact artifact; nothing of it was opened. Export it again, or copy it again whole:"
            )
            raise ArtifactError(explain(title, limited(problems)))
        return cls(path=root, manifest=manifest)

    def file(self, name: str) -> Path:
        """Where the listed file ``name`` is.

        Raises:
            ArtifactError: the manifest lists no such file.
        """
        if name not in self.manifest.files:
            listed = ", ".join(sorted(self.manifest.files)) or "none"
            raise ArtifactError(f"{self.path}: expected one of the listed files ({listed}), found {show(name)}")
        return self.path / name


def _checked(root: Path, found: Listing) -> tuple[Manifest, list[str]]:
    """The manifest, to be used only if the list of problems beside it is empty."""
    if MANIFEST not in found.files:
        linked = [problem for problem in found.problems if problem.startswith(show(MANIFEST))]
        raise ArtifactError(*linked or ["expected an artifact, found a directory without manifest.json"])
    data = read(found.files[MANIFEST], LARGEST + 1)
    if len(data) > LARGEST:
        raise ArtifactError(f"manifest.json: expected at most {LARGEST} bytes, found more")
    problems: list[str] = []
    try:
        document = parse(data, problems)
    except ArtifactError as err:
        raise ArtifactError(f"manifest.json: {err}") from err
    manifest = read_manifest(document, problems)
    if not manifest.files:
        problems.append("files: expected every file of the artifact, found none")
    problems += found.problems
    problems += _file_problems(manifest.files, found)
    return manifest, problems


def _file_problems(listed: dict[str, FileEntry], found: Listing) -> Iterator[str]:
    """Where the files differ from the list. Only names that the directory scan found are ever opened."""
    for name in sorted(found.files.keys() - listed.keys() - {MANIFEST}):
        yield name_problem(name) or f"{show(name)}: not listed in the manifest; remove it, or put it elsewhere"
    for name, entry in sorted(listed.items()):
        if name not in found.files or name == MANIFEST:
            yield f"{show(name)}: listed in the manifest, but no such file is there"
            continue
        try:
            size = found.files[name].lstat().st_size
            digest = ""
            if size == entry.size:  # else there is nothing to prove, and perhaps much to read
                size, digest = sha256(found.files[name])
        except OSError as err:
            yield f"{show(name)}: cannot be read: {err.strerror or err}"
            continue
        if size != entry.size:
            yield f"{show(name)}: expected {entry.size} bytes, found {size}"
        elif digest != entry.sha256:
            yield f"{show(name)}: expected SHA-256 {entry.sha256[:16]}..., found {digest[:16]}..."
