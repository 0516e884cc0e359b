"""What an artifact says of its compiled engines: ``engines/engines.json``, read without tolerance.

Owns the keys of that file; docs/format.md specifies it in words. Its hash and those of the plans are in the manifest, so what is read
here was checked before. It loads no engine and asks no driver.

A *set* is what one build makes: a plan for each graph, for one library and some GPUs. A plan has optimization *profiles*: ranges of
the lengths that vary (graphs.AXES), each with the length that it is tuned for.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, explain
from txopt.runtime.files import FOLDER, read
from txopt.runtime.graphs import AXES, TensorSpec
from txopt.runtime.manifest import PRECISIONS, Manifest
from txopt.runtime.strict_json import Fields, canonical, limited, parse, show

FILE = f"{FOLDER}/engines.json"
FORMAT = 1
LARGEST = 1 << 20  # bytes of the file; hundreds of times what is needed
GPU = re.compile(r"SM[0-9]{2,3}")
_WORD = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_SHOWN = 4  # wrong names in a message
Lengths = tuple[int, int, int]  # least, usual, most


@dataclass(frozen=True)
class Library:
    """Who builds and runs plans: the names of its module, the usual one first, and what pip brings it by."""

    modules: tuple[str, ...]
    package: str


LIBRARIES = {
    "tensorrt": Library(("tensorrt", "tensorrt_bindings"), '"tensorrt-cu13>=10.16"'),
    "tensorrt-rtx": Library(("tensorrt_rtx", "tensorrt_rtx_bindings"), "tensorrt-rtx-cu13"),
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Ranges of the lengths that vary, by letter; ``name`` says what it is for, such as "step" or "prefill"."""

    name: str
    axes: Mapping[str, Lengths]

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "Profile":
        fields = Fields(value, where, problems, ("name", "axes"))
        axes: dict[str, Lengths] = {}
        for letter, lengths in fields.mapping("axes").items():
            rising = isinstance(lengths, list) and len(lengths) == 3 and all(type(n) is int for n in lengths)
            if letter not in AXES or not rising or not 1 <= lengths[0] <= lengths[1] <= lengths[2]:
                problems.append(
                    f"{where}.axes: expected a letter of {' '.join(AXES)} with a least, a usual and a largest length, "
                    f"found {show(letter)}: {show(lengths)}"
                )
            else:
                axes[letter] = (lengths[0], lengths[1], lengths[2])
        return cls(name=_word(fields, "name", "step"), axes=axes)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "axes": {letter: list(lengths) for letter, lengths in self.axes.items()}}

    def takes(self, lengths: Mapping[str, int]) -> bool:
        """Whether every one of ``lengths``, by letter, lies in its range."""
        return all(self.axes[axis][0] <= length <= self.axes[axis][2] for axis, length in lengths.items())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One compiled graph: its file, and its inputs and outputs as the engine has them."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...]

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "Plan":
        fields = Fields(value, where, problems, ("file", "inputs", "outputs", "profiles"))
        inputs, outputs = (
            tuple(
                TensorSpec.from_json(item, f"{where}.{key}[{i}]", problems) for i, item in enumerate(fields.items(key))
            )
            for key in ("inputs", "outputs")
        )
        profiles = tuple(
            Profile.from_json(item, f"{where}.profiles[{i}]", problems)
            for i, item in enumerate(fields.items("profiles"))
        )
        for key, tensors in (("inputs", inputs), ("outputs", outputs)):
            problems += [
                f"{where}.{key}: expected different names, found {show(name)} twice"
                for name in _twice(item.name for item in tensors)
            ]
        varying = {axis for item in (*inputs, *outputs) for axis in item.axes if isinstance(axis, str)}
        if "S" in varying:
            problems.append(f"{where}: expected the length of the cache in the place of S, found S")
        if not profiles:
            problems.append(f"{where}.profiles: expected at least one, found none")
        for profile in profiles:
            if profile.axes.keys() != varying:
                asked, found = " ".join(sorted(varying)), " ".join(sorted(profile.axes))
                problems.append(f"{where}.profiles: expected ranges of {asked}, found {found} in {show(profile.name)}")
        return cls(file=fields.text("file"), inputs=inputs, outputs=outputs, profiles=profiles)

    def to_json(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "inputs": [item.to_json() for item in self.inputs],
            "outputs": [item.to_json() for item in self.outputs],
            "profiles": [profile.to_json() for profile in self.profiles],
        }


@dataclass(frozen=True, kw_only=True)
class EngineSet:
    """What one build made.

    Attributes:
        runtime: the library, one of LIBRARIES; ``version`` is its version, which a plan of no other can be loaded by, unless
            ``any_version``.
        capabilities: the GPUs it was built for, such as "SM89"; with ``any_hardware`` also others of their generation and later.
        precision: what it computes in.
        cache_length: places in the self-attention buffers; None without a decoder.
        plans: by graph, as the manifest names them.
    """

    runtime: str
    version: str
    any_version: bool
    capabilities: tuple[str, ...]
    any_hardware: bool
    precision: str
    cache_length: int | None
    plans: Mapping[str, Plan]

    @classmethod
    def from_json(cls, value: object, where: str, problems: list[str]) -> "EngineSet":
        keys = (
            "runtime",
            "version",
            "any_version",
            "capabilities",
            "any_hardware",
            "precision",
            "cache_length",
            "plans",
        )
        fields = Fields(value, where, problems, keys)
        capabilities = fields.items("capabilities")
        odd = [one for one in capabilities if type(one) is not str or not GPU.fullmatch(one)]
        if odd or not capabilities:
            found = ", ".join(map(show, odd[:_SHOWN])) or "none"
            problems.append(f"{where}.capabilities: expected names such as SM89, found {found}")
        for key in ("any_version", "any_hardware"):
            if type(fields.get(key)) is not bool:
                problems.append(f"{where}.{key}: expected true or false, found {show(fields.get(key))}")
        plans = {
            name: Plan.from_json(plan, f"{where}.plans.{name}", problems)
            for name, plan in fields.mapping("plans").items()
        }
        if not plans:
            problems.append(f"{where}.plans: expected a plan for each graph, found none")
        return cls(
            runtime=fields.choice("runtime", LIBRARIES),
            version=_word(fields, "version", "1.7.1"),
            any_version=fields.get("any_version") is True,
            capabilities=tuple(map(str, capabilities)),
            any_hardware=fields.get("any_hardware") is True,
            precision=fields.choice("precision", PRECISIONS),
            cache_length=fields.count_or_none("cache_length", 1),
            plans=plans,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "runtime": self.runtime,
            "version": self.version,
            "any_version": self.any_version,
            "capabilities": list(self.capabilities),
            "any_hardware": self.any_hardware,
            "precision": self.precision,
            "cache_length": self.cache_length,
            "plans": {name: plan.to_json() for name, plan in self.plans.items()},
        }


def to_bytes(sets: tuple[EngineSet, ...]) -> bytes:
    """engines.json of ``sets``, canonical."""
    return canonical({"format": FORMAT, "sets": [one.to_json() for one in sets]})


def engines_of(artifact: Artifact) -> tuple[EngineSet, ...]:
    """The sets of an opened artifact; none where it has no engines.

    Raises:
        ArtifactError: engines.json is of another version or breaks its rules, or names a file or a graph that the manifest does not.
    """
    if FILE not in artifact.manifest.files:
        return ()
    data = read(artifact.path / FILE, LARGEST + 1)
    problems: list[str] = []
    if len(data) > LARGEST:
        raise ArtifactError(f"{FILE}: expected at most {LARGEST} bytes, found more")
    try:
        document = parse(data, problems)
    except ArtifactError as err:
        raise ArtifactError(f"{FILE}: {err}") from err
    fields = Fields(document, "", problems, ("format", "sets"))
    if type(fields.get("format")) is not int or fields.get("format") != FORMAT:
        raise ArtifactError(
            f"{FILE}: expected format {FORMAT}, found {show(fields.get('format'))}: build the engines again"
        )
    sets = tuple(EngineSet.from_json(one, f"sets[{i}]", problems) for i, one in enumerate(fields.items("sets")))
    problems += _contradictions(sets, artifact.manifest)
    if problems:
        raise ArtifactError(
            explain(f"{FILE}: does not describe this artifact's engines; build them again:", limited(problems))
        )
    return sets


def _word(fields: Fields, key: str, example: str) -> str:
    """A text that messages may hold as it is, for it cannot steer a terminal."""
    text = fields.text(key)
    if text and not _WORD.fullmatch(text):
        fields.problems.append(
            f"{fields.path(key)}: expected letters, digits, '.', '+', '_' or '-', such as {example}, found {show(text)}"
        )
    return text


def _contradictions(sets: tuple[EngineSet, ...], manifest: Manifest) -> Iterator[str]:
    """Where ``sets`` are not of the artifact with this manifest, or not of one another."""
    for i, one in enumerate(sets):
        if one.precision != manifest.precision and one.precision in PRECISIONS:
            yield f"sets[{i}].precision: expected {manifest.precision}, as the manifest says, found {show(one.precision)}"
        if (one.cache_length is None) != (manifest.cache is None):
            expected = "null, for there is no decoder" if manifest.cache is None else "a number of places"
            yield f"sets[{i}].cache_length: expected {expected}, found {show(one.cache_length)}"
        if one.plans.keys() != manifest.graphs.keys():
            found = ", ".join(map(show, one.plans)) or "none"
            yield f"sets[{i}].plans: expected {' and '.join(manifest.graphs)}, found {found}"
        for name, plan in one.plans.items():
            if plan.file not in manifest.files or not plan.file.endswith(".plan"):
                yield f"sets[{i}].plans.{name}.file: expected a .plan among the manifest's files, found {show(plan.file)}"
    for file in _twice(plan.file for one in sets for plan in one.plans.values()):
        yield f"sets: expected plans in different files, found {show(file)} twice"


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
