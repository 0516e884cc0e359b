"""Whether a graph, opened, is the one that the manifest describes: files can be swapped, and manifests edited.

Owns the comparison of names, dtypes and axes. It knows no engine: whoever opened the graph says what it found.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from txopt.runtime.graphs import AXES, GraphSpec, TensorSpec
from txopt.runtime.strict_json import show

Tensor = tuple[str, tuple[int | str | None, ...]]  # dtype by the manifest's name; lengths, names of lengths, or unknown


@dataclass(frozen=True, kw_only=True)
class Opened:
    """The inputs and outputs of a graph as the engine sees them, by name."""

    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def mismatches(name: str, spec: GraphSpec, opened: Opened) -> Iterator[str]:
    """Where the graph ``name`` of the manifest is not what its file holds."""
    for kind, said, found in (("inputs", spec.inputs, opened.inputs), ("outputs", spec.outputs, opened.outputs)):
        where = f"graphs.{name}.{kind}"
        for item in said:
            if item.name not in found:
                yield f"{where}: expected {item} in {show(spec.file)}, found no such tensor"
            elif not _is(item, *found[item.name]):
                dtype, shape = found[item.name]
                axes = ",".join("?" if axis is None else str(axis)[:32] for axis in shape)
                yield f"{where}: expected {item} in {show(spec.file)}, found {dtype} [{axes}]"
        for unknown in sorted(found.keys() - {item.name for item in said}):
            yield f"{where}: expected every tensor of {show(spec.file)}, found {show(unknown)} in the file alone"


def _is(item: TensorSpec, dtype: str, shape: tuple[int | str | None, ...]) -> bool:
    return (
        item.dtype == dtype
        and len(item.axes) == len(shape)
        and all(_agree(said, found) for said, found in zip(item.axes, shape, strict=True))
    )


def _agree(said: str | int, found: int | str | None) -> bool:
    """A name of the engine's own, or none, says nothing; a number says that the length is fixed."""
    if isinstance(found, int) or found in AXES:
        return said == found
    return True
