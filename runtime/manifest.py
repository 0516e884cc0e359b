"""The manifest: what an artifact says of itself, as dataclasses that read and write JSON without tolerance.

Owns the keys, their types, and what must agree within one manifest; docs/format.md specifies the same in words. It does
not know the directory around it, nor what a generation option or a parity certificate means; the front end's keys are
frontend.py's, the graphs' are graphs.py's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from txopt.runtime import files as artifact_files
from txopt.runtime.errors import ArtifactError, explain
from txopt.runtime.frontend import TOKENIZERS, frontend_problems, label_problems
from txopt.runtime.graphs import CacheSpec, GraphSpec, TensorSpec, format_needed, graph_problems
from txopt.runtime.strict_json import Fields, canonical, limited, show, value_problems

__all__ = ["FORMATS", "CacheSpec", "FileEntry", "GraphSpec", "Manifest", "TensorSpec"]

FORMATS = (1, 2)  # the versions that are read; each artifact is of the oldest that has what it uses
KINDS = {"encoder-decoder": ("encoder", "decoder"), "encoder": ("encoder",), "decoder": ("decoder",)}
QUANTIZED = ("int8", "int4", "fp8")
PRECISIONS = ("fp32", "fp16", "bf16", *QUANTIZED)
TARGETS = ("cpu", "cuda", "tensorrt")
PARITY_CASES = "parity.safetensors"
LARGEST = 16 << 20  # bytes of manifest.json: thousands of times what is needed, and still harmless
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What the manifest promises of one file: its bytes, and their SHA-256 as 64 lowercase hex digits."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime must know of an artifact that is not in its graphs; docs/format.md explains each key.

    The plain dictionaries (``source``, ``generation``, ``frontend``, ``fusion``, ``calibration``, ``parity``) hold JSON
    values and belong to whoever writes and reads them. ``files`` may be empty until ``ArtifactWriter.commit`` fills it.
    """

    format: int = FORMATS[0]
    kind: str
    task: str
    family: str
    precision: str
    target: str
    source: dict[str, Any]
    versions: dict[str, str]
    graphs: dict[str, GraphSpec]
    cache: CacheSpec | None
    generation: dict[str, Any]
    frontend: dict[str, Any]
    fusion: dict[str, Any]
    calibration: dict[str, Any] | None
    parity: dict[str, Any]
    files: dict[str, FileEntry] = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: object) -> "Manifest":
        """The manifest in a parsed JSON document.

        Raises:
            ArtifactError: it was written by a newer txopt; or keys are missing, unknown or of a wrong type, or
                contradict each other: all of that in one message.
        """
        problems: list[str] = list(value_problems(document, ""))
        manifest = read_manifest(document, problems)
        if problems:
            raise ArtifactError(explain("not a valid manifest:", limited(problems)))
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The document that ``from_json`` reads back.

        Raises:
            ArtifactError: a value is not JSON, or ``from_json`` would refuse the document.
        """
        document: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        document["graphs"] = {name: graph.to_json() for name, graph in self.graphs.items()}
        document["cache"] = None if self.cache is None else self.cache.to_json()
        document["files"] = {name: {"size": e.size, "sha256": e.sha256} for name, e in self.files.items()}
        Manifest.from_json(document)
        return document

    def to_bytes(self) -> bytes:
        """manifest.json: canonical, so that equal manifests are equal bytes.

        Raises:
            ArtifactError: as ``to_json``, or the manifest is larger than any reader accepts.
        """
        data = canonical(self.to_json())
        if len(data) > LARGEST:
            raise ArtifactError(
                f"manifest.json: expected at most {LARGEST} bytes, would be {len(data)}; keep cases in files"
            )
        return data


def read_manifest(document: object, problems: list[str]) -> Manifest:
    """The manifest in ``document`` with all that is wrong added to ``problems``; only to be used if there is nothing.

    Raises:
        ArtifactError: the manifest has another format version, so that its keys cannot be judged.
    """
    check_version(document)
    known = [item.name for item in fields(Manifest)]
    top = Fields(document, "", problems, known)
    calibration = None if top.get("calibration") is None else top.mapping("calibration")
    versions = top.mapping("versions")
    problems += [
        f"versions.{name}: expected text, found {show(v)}" for name, v in versions.items() if type(v) is not str
    ]
    graphs = {
        name: GraphSpec.from_json(graph, f"graphs.{name}", problems) for name, graph in top.mapping("graphs").items()
    }
    cache = None if top.get("cache") is None else CacheSpec.from_json(top.get("cache"), "cache", problems)
    manifest = Manifest(
        format=top.count("format", FORMATS[0]),
        kind=top.choice("kind", KINDS),
        task=top.text("task"),
        family=top.text("family"),
        precision=top.choice("precision", PRECISIONS),
        target=top.choice("target", TARGETS),
        source=top.mapping("source"),
        versions=versions,
        graphs=graphs,
        cache=cache,
        generation=top.mapping("generation"),
        frontend=top.mapping("frontend"),
        fusion=top.mapping("fusion"),
        calibration=calibration,
        parity=top.mapping("parity"),
        files={name: _entry(entry, f"files.{name}", problems) for name, entry in top.mapping("files").items()},
    )
    if isinstance(top.get("frontend"), dict):
        problems += frontend_problems(manifest.frontend)
    if not problems:  # what must agree can only be judged where everything is there
        problems += _contradictions(manifest)
    problems += _file_names(manifest.files)
    return manifest


def check_version(document: object) -> None:
    """Refuse another format version before any of its keys is judged.

    Raises:
        ArtifactError: ``format`` is none of FORMATS.
    """
    version = document.get("format") if isinstance(document, dict) else None
    known = " or ".join(map(str, FORMATS))
    if type(version) is not int or version < FORMATS[0]:
        raise ArtifactError(f"manifest.json: expected format {known}, found {show(version)}: not an artifact of txopt")
    if version > FORMATS[-1]:
        raise ArtifactError(
            f"manifest.json: expected format {known}, found {show(version)}: written by a newer txopt; "
            "upgrade txopt, or export again with this one"
        )


def _entry(value: object, where: str, problems: list[str]) -> FileEntry:
    entry = Fields(value, where, problems, ("size", "sha256"))
    size, digest = entry.count("size", 0), entry.text("sha256")
    if digest and not (len(digest) == 64 and set(digest) <= _HEX):
        problems.append(f"{where}.sha256: expected 64 lowercase hex digits, found {show(digest)}")
    return FileEntry(size=size, sha256=digest)


def _file_names(files: Mapping[str, FileEntry]) -> list[str]:
    problems = [problem for name in files if (problem := artifact_files.name_problem(name))]
    if artifact_files.MANIFEST in files:
        problems.append("files: manifest.json cannot list itself")
    seen: dict[str, str] = {}
    for name in files:
        if (twin := seen.setdefault(name.lower(), name)) != name:
            problems.append(f"files: {show(twin)} and {show(name)} are one name on some file systems")
    return problems


def _contradictions(manifest: Manifest) -> list[str]:
    expected = KINDS[manifest.kind]
    if set(manifest.graphs) != set(expected):
        found = ", ".join(sorted(map(show, manifest.graphs))) or "none"
        return [f"graphs: expected {' and '.join(expected)} for kind {manifest.kind!r}, found {found}"]
    if (manifest.cache is not None) != ("decoder" in expected):
        return [f"cache: expected {'a cache' if manifest.cache is None else 'null'} for kind {manifest.kind!r}"]
    problems = graph_problems(manifest.graphs, manifest.cache)
    if manifest.format != (version := format_needed(manifest.graphs)):
        problems.append(
            f"format: expected {version}, the oldest that has what these graphs use, found {manifest.format}"
        )
    if manifest.kind == "encoder":
        for out in manifest.graphs["encoder"].outputs:
            if out.name == "logits" and out.axes and isinstance(classes := out.axes[-1], int):
                problems += label_problems(manifest.frontend, classes)
    needed = {f"graphs.{name}.file": graph.file for name, graph in manifest.graphs.items()}
    needed |= {f"frontend.{key}": manifest.frontend[key] for key in TOKENIZERS if key in manifest.frontend}
    problems += [f"{w}: {problem}" for w, n in needed.items() if (problem := artifact_files.name_problem(n))]
    if manifest.files:  # a draft lists none yet
        needed["parity"] = PARITY_CASES
        problems += [f"{w}: expected {show(n)} among the files" for w, n in needed.items() if n not in manifest.files]
    return problems
