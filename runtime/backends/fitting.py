"""Which of an artifact's engines fit a library and a GPU, and whether they are of the artifact's graphs at all.

Owns both judgements, made from what engines.json and the manifest say. It opens nothing and asks nobody.
"""

from collections.abc import Iterator, Mapping

from txopt.runtime.engines import EngineSet, Plan
from txopt.runtime.errors import StaleError, UsageError, explain
from txopt.runtime.graphs import FLOATS, GraphSpec, TensorSpec, choice_problems


def fitting(sets: tuple[EngineSet, ...], versions: Mapping[str, str], capability: str) -> EngineSet:
    """The set for one of the installed libraries, ``versions`` by name, and a GPU of this ``capability``, such as "SM89".

    What was built for exactly these comes before what merely runs on them, and what was built later before what was built earlier.

    Errors:
        UsageError: none was built for the GPU. StaleError: one was, by another version of the library.
    """
    there = [one for one in sets if one.runtime in versions]
    able = [one for one in there if _runs_on(one, capability)]
    if not able:
        raise UsageError(
            explain(
                f"no engine of this artifact is for this GPU ({capability}) and {' or '.join(sorted(versions))}; build one: "
                f"txopt engine ARTIFACT --capability {capability}. It has engines for:",
                (_described(one) for one in sets),
            )
        )
    current = [one for one in able if _loads(one, versions[one.runtime])]
    if not current:
        installed = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
        raise StaleError(
            explain(
                f"the engines for this GPU ({capability}) are of another version than what is installed ({installed}); build "
                "them again with it (txopt engine), or install theirs:",
                (_described(one) for one in able),
            )
        )
    # Of several that are alike the last, which was built last.
    return min(
        reversed(current), key=lambda one: (capability not in one.capabilities, one.version != versions[one.runtime])
    )


def contract_problems(name: str, graph: GraphSpec, plan: Plan, cache_length: int | None) -> Iterator[str]:
    """Where the plan of the graph ``name`` is not what a session runs in the graph's place.

    Types may differ among floats but for logits, the self-cache has its length, and outputs may be more, such as ``next``.
    """
    for kind, wanted, found in (("inputs", graph.inputs, plan.inputs), ("outputs", graph.outputs, plan.outputs)):
        where = f"{plan.file}: {name}.{kind}"
        has = {item.name: item for item in found}
        for item in wanted:
            other = has.pop(item.name, None)
            if other is None or not _stands_for(other, item, cache_length):
                yield f"{where}: expected {item}, found {other or 'none'}"
        if kind == "inputs":
            yield from (f"{where}: unknown input {item}" for item in has.values())
        elif "logits" in {item.name for item in wanted}:
            yield from (f"{where}: {problem}" for problem in choice_problems(has))


def _stands_for(found: TensorSpec, wanted: TensorSpec, cache_length: int | None) -> bool:
    floats = found.dtype in FLOATS and wanted.dtype in FLOATS and wanted.name != "logits"
    axes = tuple(cache_length if axis == "S" else axis for axis in wanted.axes)
    return (floats or found.dtype == wanted.dtype) and found.axes == axes


def _loads(one: EngineSet, version: str) -> bool:
    """Whether a library of this version loads the set: its own, or one of an earlier version that is made for later ones."""
    return one.version == version or (one.any_version and _numbers(version) >= _numbers(one.version))


def _numbers(version: str) -> list[int]:
    return [int(part) if part.isdecimal() else 0 for part in version.split(".")]


def _runs_on(one: EngineSet, capability: str) -> bool:
    if capability in one.capabilities or not one.any_hardware:
        return capability in one.capabilities
    return any(_generation(capability) >= _generation(built) for built in one.capabilities)


def _generation(capability: str) -> int:
    """8 of SM80 and SM89, 12 of SM120; 0 where the name says none."""
    number = capability.removeprefix("SM")[:-1]
    return int(number) if number.isdecimal() else 0


def _described(one: EngineSet) -> str:
    hardware = f"{', '.join(one.capabilities)}{' and later' if one.any_hardware else ''}"
    return f"{one.runtime} {one.version}{' and later' if one.any_version else ''}, {hardware}, {one.precision}"
