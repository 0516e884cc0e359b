"""The two graphs of an artifact, opened: ``encode`` once, then a ``RowDecoder`` (row_decoder.py).

Owns what goes into the encoder and from there to a decoder. It knows neither the engine nor how many memories there are: what a
decoder reads of its encoder goes by name. Axes: B sources, R rows (B times the number of beams), T (or U, W) source length.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.alignment import aligned, cut, source_lengths
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.opening import open_engines
from txopt.runtime.backends.runner import Runner
from txopt.runtime.counts import count
from txopt.runtime.errors import ArtifactError, InputError, UsageError, explain
from txopt.runtime.graphs import MASKS, Axes, GraphSpec, frame_masks, source_masks
from txopt.runtime.inputs import axes_of, bounds_of, check_inputs
from txopt.runtime.manifest import QUANTIZED
from txopt.runtime.opened import mismatches
from txopt.runtime.row_decoder import RowDecoder
from txopt.runtime.strict_json import limited

Array = NDArray[Any]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """The encoder's results, where the engine left them, by output name; ``masks`` int64 [B,T] by the name that such an input has."""

    batch: int
    values: dict[str, Any]
    masks: dict[str, Ids]


class Session:
    """An artifact's graphs, ready to run; open it through ``txopt.load``.

    Args:
        artifact: opened, so its hashes are checked already.
        device: "cpu", "cuda", "cuda-graphs" or "tensorrt", all but the first with ":N" for another GPU than the first.
        threads: engine threads, None for one per core.
        as_written: see ``ort.Runner``: what the graphs mean, without the engine's fusions.

    Attributes:
        precision: what runs: the artifact's, or its engines'. arithmetic: what it computes in.

    Errors:
        ArtifactError: a file holds no graph, or another than the manifest says.
    """

    def __init__(
        self, artifact: Artifact, *, device: str = "cpu", threads: int | None = None, as_written: bool = False
    ) -> None:
        self.manifest = artifact.manifest
        self._engines = engines = open_engines(artifact, device=device, threads=threads, as_written=as_written)
        self._runners, self._specs = engines.runners, engines.specs
        self.precision, self.arithmetic = engines.precision, engines.arithmetic
        problems = [
            problem
            for name, spec in self._specs.items()
            for problem in mismatches(name, spec, self._runners[name].opened())
        ]
        if problems:
            title = (
                f"{artifact.path}: the graphs in its files are not those of its manifest (was it edited, or were files "
                "swapped?); export it again:"
            )
            raise ArtifactError(explain(title, limited(problems)))
        self._masks, self._made = source_masks(self.manifest.graphs), frame_masks(self.manifest.graphs)
        frontend = self.manifest.frontend
        self._bounds = bounds_of(frontend)
        self._samples = frontend.get("least_samples"), frontend.get("most_samples")
        self._aligns = self.manifest.precision in QUANTIZED

    def array(self, value: Any) -> Array:
        return next(iter(self._runners.values())).array(value)

    def encode(self, inputs: Mapping[str, Any]) -> Encoded:
        """Runs the encoder; ``inputs`` by name, a missing mask means no padding.

        Errors:
            InputError: unknown, missing or ill-shaped inputs, ids that the model does not know, and sources longer than
                it reads, all of them listed.
        """
        runner = self._runners.get("encoder")
        if runner is None:
            raise UsageError(f"this artifact ({self.manifest.kind}) has no encoder")
        spec = self._specs["encoder"]
        feeds = check_inputs(spec, inputs, masks=self._masks, bounds=self._bounds, samples=self._samples)
        lengths = source_lengths(feeds, self._masks)
        if self._aligns:
            feeds = aligned(spec, feeds, self._masks, self._bounds)
        values = runner.run(feeds)
        if self._aligns and self.manifest.cache is None:  # a decoder is told by masks where places end, a caller is not
            for out in spec.outputs:
                if not lengths.keys().isdisjoint(out.axes):
                    values[out.name] = runner.tensor(cut(out.axes, runner.array(values[out.name]), lengths))
        masks = {name: feeds[name] for name in self._masks}
        masks |= {name.removeprefix(MASKS): runner.array(values[name]) for name in self._made}
        return Encoded(len(next(iter(feeds.values()))), values, masks)

    def decoder(self, encoded: Encoded | None, *, beams: int = 1, batch: int = 1) -> RowDecoder:
        """A decoder of batch times ``beams`` rows; the batch is the encoded sources' where there are any.

        Errors:
            UsageError: no decoder, sources where there is no encoder or the reverse, or more rows than memory holds.
            InputError: ``encoded`` does not fit the decoder: it is another model's.
        """
        beams, batch = count("beams", beams), count("batch", batch)
        spec = self._specs.get("decoder")
        if spec is None:
            raise UsageError(
                f"this artifact ({self.manifest.kind}, {self.manifest.task}) has no decoder and cannot generate"
            )
        runner = self._runners["decoder"]
        if (encoded is None) is ("encoder" in self.manifest.graphs):
            raise UsageError(
                "this decoder reads an encoder's results: expected decode(model.encode(...)), got no sources"
                if encoded is None
                else "this artifact is a decoder alone: expected decode(batch=B), got encoded sources"
            )
        if not isinstance(encoded, Encoded | None):
            raise InputError(f"encoded: expected what encode() gave, got {type(encoded).__name__}")
        if encoded is None:
            return RowDecoder(self._engines, batch * beams, batch * beams, {})
        if batch not in (1, encoded.batch):
            raise UsageError(f"batch={batch} and {encoded.batch} encoded sources: leave batch out, the sources say it")
        fixed = _sources(runner, spec, encoded)
        return RowDecoder(self._engines, encoded.batch * beams, beams, fixed)


def _sources(runner: Runner, spec: GraphSpec, encoded: Encoded) -> dict[str, Any]:
    """What a decoder reads of an encoder's results; InputError where they are another model's."""
    wanted = {item.name: item for item in spec.inputs if item.name.startswith("cross_")}
    found = {name: value for name, value in encoded.values.items() if name.startswith("cross_")}
    problems = [f"{name}: missing; expected {item}" for name, item in wanted.items() if name not in found]
    problems += [f"{name}: unknown; this decoder has no such layer" for name in found if name not in wanted]
    sizes = {"B": encoded.batch}
    for name in wanted.keys() & found.keys():
        dtype, shape = runner.describe(found[name])
        if dtype != wanted[name].dtype or not _fits(wanted[name].axes, shape, sizes):
            problems.append(
                f"{name}: expected {wanted[name].dtype} {axes_of(wanted[name].axes)}, got {dtype} {list(shape)}"
            )
    for item in (item for item in spec.inputs if item.name.startswith(MASKS)):
        mask = encoded.masks.get(item.name.removeprefix(MASKS))
        if mask is None or not _fits(item.axes, mask.shape, sizes):
            problems.append(f"{item.name}: expected the mask that encode() read, int64 {axes_of(item.axes)}")
        else:
            found[item.name] = runner.tensor(mask)
    if problems:
        title = "these encoded sources are not this model's; expected what its own encode() gave:"
        raise InputError(explain(title, sorted(problems)))
    return found


def _fits(axes: Axes, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    """Whether ``shape`` has these ``axes``; lengths that vary are looked up in ``sizes``, new ones noted there."""
    return len(axes) == len(shape) and all(
        size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
        for axis, size in zip(axes, shape, strict=True)
    )
