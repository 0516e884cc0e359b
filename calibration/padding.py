"""Samples of several lengths as one batch, and back: which axes may be padded, with what, and on which side.

Owns what the manifest's axes and masks say of that (docs/format.md, "The alphabet of axes"): an axis may be padded where a mask is
about it. It does not know where samples come from.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError
from txopt.runtime.graphs import GraphSpec, TensorSpec, source_masks
from txopt.runtime.inputs import bounds_of, check_inputs
from txopt.runtime.manifest import Manifest

Array = NDArray[Any]
Feeds = dict[str, Array]
Sizes = dict[str | int, int]  # by axis, the lengths that may be padded


class Padding:
    """The inputs of an artifact's first graph; of a decoder alone, its prompt, which is padded on the left."""

    def __init__(self, manifest: Manifest) -> None:
        encoder, frontend = manifest.graphs.get("encoder"), manifest.frontend
        self._spec = encoder or GraphSpec(
            file="", inputs=tuple(map(_prompt, ("input_ids", "attention_mask"))), outputs=()
        )
        self._masks = source_masks(manifest.graphs) if encoder else {"attention_mask": "T"}
        self._left = frontend.get("padding_side") == "left" or encoder is None
        self._axes = {item.name: item.axes for item in self._spec.inputs}
        self._token = int(frontend.get("pad_token_id") or 0)
        self._silence = float(frontend.get("padding_value", 0.0))
        self._bounds = bounds_of(frontend)
        self._samples = frontend.get("least_samples"), frontend.get("most_samples")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    def checked(self, arrays: Mapping[str, Any]) -> Feeds:
        """``arrays`` [n,...] by name as the graph takes them, masks filled in; what fits, whatever is padded.

        Raises:
            InputError: names, types, shapes that do not fit, all of them listed.
        """
        return check_inputs(self._spec, arrays, masks=self._masks)

    def cropped(self, feeds: Feeds) -> Feeds:
        """One sample [1,...] without its padding.

        Raises:
            InputError: nothing is left, or more than the model reads, or ids that it does not know.
        """
        kept = {axis: self._heard(feeds, axis) for axis in set(self._masks.values())}
        values = {
            name: value[tuple(kept.get(axis, slice(None)) for axis in self._axes[name])]
            for name, value in feeds.items()
        }
        return check_inputs(self._spec, values, masks=self._masks, bounds=self._bounds, samples=self._samples)

    def sizes(self, feeds: Feeds) -> Sizes:
        """The lengths of a sample that a batch may pad."""
        covered = set(self._masks.values())
        return {
            axis: size
            for name, value in feeds.items()
            for axis, size in zip(self._axes.get(name, ()), value.shape, strict=False)
            if axis in covered
        }

    def rigid(self, feeds: Feeds) -> tuple[int, ...]:
        """The other lengths: samples share a batch where these are equal."""
        covered = {*self._masks.values(), "B"}
        sizes = ((self._axes.get(name, ()), value.shape) for name, value in sorted(feeds.items()))
        return tuple(
            size for axes, shape in sizes for axis, size in zip(axes, shape, strict=False) if axis not in covered
        )

    def together(self, samples: Sequence[Feeds]) -> Feeds:
        """Samples [1,...] as one batch [B,...], each input as wide as the longest."""
        return {name: self._stacked(name, [sample[name] for sample in samples]) for name in samples[0]}

    def _stacked(self, name: str, values: Sequence[Array]) -> Array:
        widest = np.max([value.shape[1:] for value in values], axis=0).astype(int)
        batch = np.full((len(values), *widest), self._fill(name, values[0]), values[0].dtype)
        for row, value in zip(batch, values, strict=True):
            starts = [most - size if self._left else 0 for most, size in zip(widest, value.shape[1:], strict=True)]
            row[tuple(slice(start, start + size) for start, size in zip(starts, value.shape[1:], strict=True))] = value[
                0
            ]
        return batch

    def _fill(self, name: str, value: Array) -> float:
        if name == "input_ids":
            return self._token
        return self._silence if value.dtype.kind == "f" else 0  # a mask's, and what the rest is does not matter

    def _heard(self, feeds: Feeds, axis: str | int) -> slice:
        """From the first place of ``axis`` that counts to the last, as all masks of it say."""
        places = np.flatnonzero(np.any([feeds[name][0] != 0 for name, on in self._masks.items() if on == axis], axis=0))
        if not len(places):
            raise InputError(f"{', '.join(self._masks)}: expected at least one place that counts, found padding alone")
        return slice(int(places[0]) if self._left else 0, int(places[-1]) + 1)


def _prompt(name: str) -> TensorSpec:
    return TensorSpec(name=name, dtype="int64", axes=("B", "T"))
