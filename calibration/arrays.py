"""Calibration data that is arrays already: the encoder's inputs by name, in an .npz file, a mapping, or an iterable of mappings.

Owns how such arrays become samples: the first axis is samples, padding is cut off where a mask says so, and "labels" are the
references: int64 [n,L], padded with -100 or the padding id, or [n] and [n,C] as an encoder alone is asked (classes.py). What fits the
graph is padding.py's and the runtime's to say.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from txopt.calibration.padding import Feeds, Padding
from txopt.calibration.problems import Problems
from txopt.calibration.sources import Source
from txopt.runtime.arrays import as_array
from txopt.runtime.errors import InputError

LABELS = "labels"


def of_npz(path: Path, padding: Padding, problems: Problems) -> Iterator[Source]:
    """The samples of an .npz file; those that do not fit are added to ``problems``.

    Raises:
        InputError: no .npz file, or arrays that do not fit together or the model.
    """
    try:
        with path.open("rb") as file:  # numpy leaves a file open that it does not understand
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array without a name")
            arrays = {name: archive[name] for name in archive.files}
    except OSError as err:
        raise InputError(f"{path}: cannot be read: {err.strerror or err}") from err
    except Exception as err:  # numpy lets whatever zipfile, zlib and its own header raise pass, and recommends pickle
        raise InputError(
            f"{path}: expected an .npz archive of arrays of numbers by name, found something else"
        ) from err
    yield from of_mapping(arrays, path.name, padding, problems)


def of_mapping(arrays: Mapping[str, Any], name: str, padding: Padding, problems: Problems) -> Iterator[Source]:
    """The samples of arrays [n,...]; ``name`` is what they are called in messages."""
    try:
        yield from _rows(arrays, name, padding, problems)
    except InputError as err:
        raise InputError(f"{name}: {err}") from err


def of_item(number: int, item: Any, padding: Padding, problems: Problems) -> Iterator[Source]:
    """The samples of one item of an iterable: arrays of one sample with or without a first axis for it, or of several."""
    if not isinstance(item, Mapping):
        problems.add(f"item {number}", f"expected arrays by name, as the first item has, found {type(item).__name__}")
        return
    ranks = {spec.name: len(spec.axes) for spec in padding.inputs}
    try:
        values = {name: as_array(name, value) for name, value in item.items()}
        single = any(value.ndim == ranks[name] - 1 for name, value in values.items() if name in ranks)
        batch = {name: value[None] for name, value in values.items()} if single else values
        yield from _rows(batch, f"item {number}", padding, problems)
    except InputError as err:
        problems.add(f"item {number}", err)


def width(value: Feeds, padding: Padding) -> float:
    """A sample's length: its longest axis that may be padded."""
    return float(max(padding.sizes(value).values(), default=0))


def _rows(arrays: Mapping[str, Any], name: str, padding: Padding, problems: Problems) -> Iterator[Source]:
    feeds = padding.checked({key: value for key, value in arrays.items() if key != LABELS})
    count = len(next(iter(feeds.values())))
    labels = _labels(arrays, count)
    for index in range(count):
        where = f"{name}[{index}]"
        try:
            value = padding.cropped({key: array[index : index + 1] for key, array in feeds.items()})
        except InputError as err:
            problems.add(where, err)
            continue
        yield Source(where=where, value=value, labels=None if labels is None else labels[index])


def _labels(arrays: Mapping[str, Any], count: int) -> Any:
    if LABELS not in arrays:
        return None
    labels = as_array(LABELS, arrays[LABELS])
    if labels.ndim not in (1, 2) or labels.dtype.kind not in "iufb" or len(labels) != count:
        raise InputError(
            f"labels: expected numbers [{count}] or [{count},L], padded with -100, found {labels.dtype} {list(labels.shape)}"
        )
    return labels
