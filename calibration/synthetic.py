"""What calibration falls back to where nobody gave data: random sources of this model's kind, from a seed.

Owns how they are drawn. They have no references and no meaning: ranges observed on them are wide guesses, losses say little.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from txopt.calibration.padding import Feeds, Padding
from txopt.calibration.sources import Source
from txopt.runtime.errors import InputError, MissingDependencyError
from txopt.runtime.frontend import kind_of
from txopt.runtime.graphs import GLOBAL_MASK, source_masks
from txopt.runtime.inputs import bounds_of
from txopt.runtime.model import Model
from txopt.runtime.text import TextDecoder

COUNT = 32  # samples, where nobody says how many
LONGEST = 128  # tokens or places; fewer where the model has fewer
SECONDS = 10.0
PIXELS = 256
WHAT = {
    "text": "texts of random tokens of the model's vocabulary",
    "audio": "tones and bursts of noise",
    "image": "images of noise",
    "arrays": "random arrays",
}


def draw(model: Model, padding: Padding, count: int, seed: int) -> Iterator[Source]:
    """``count`` sources, their lengths spread evenly over what the model reads.

    Raises:
        InputError: nothing says which ids an input may have.
    """
    kind = kind_of(model.manifest.frontend)
    make = {"text": _texts, "audio": _sounds, "image": _images}.get(kind)
    generator = np.random.default_rng(seed)
    values = _arrays(model, padding, count, generator) if make is None else make(model, count, generator)
    for number, value in enumerate(values):
        yield Source(where=f"synthetic {number}", value=value)


def _lengths(count: int, least: int, most: int) -> list[int]:
    return [int(length) for length in np.linspace(least, max(least, most), count).round()]


def _texts(model: Model, count: int, generator: np.random.Generator) -> Iterator[str]:
    """Random ids said as text, so that they go through the front end like any text; special ids are not said."""
    frontend = model.manifest.frontend
    says = TextDecoder(model.artifact.path, {"tokenizer": frontend["tokenizer"]})
    known = [frontend.get(key) for key in ("source_vocabulary", "unknown_from")]
    vocabulary = min((size for size in known if size), default=says.vocabulary)
    positions = [frontend.get(key) for key in ("source_positions", "max_source_length")]
    longest = max(1, min([LONGEST, *(most - 4 for most in positions if most)]))  # room for what comes around a text
    for length in _lengths(count, 1, longest):
        text = ""
        for _ in range(100):  # some ids are spaces, or said by nothing
            text = text if text.strip() else says.decode(generator.integers(0, vocabulary, length))
        if text.strip():
            yield text


def _sounds(model: Model, count: int, generator: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """A tone that glides, louder and softer, with bursts of noise."""
    frontend = model.manifest.frontend
    rate, most = int(frontend["sampling_rate"]), frontend.get("most_samples")
    seconds = min(SECONDS, frontend.get("chunk_length") or (most / rate if most else SECONDS))
    least = max(frontend.get("least_samples") or 1, min(rate, int(seconds * rate)))
    for length in _lengths(count, least, int(seconds * rate)):
        time = np.arange(length) / rate
        low, high = generator.uniform(80, 0.2 * rate, 2)
        tone = np.sin(2 * np.pi * (low * time + (high - low) * time**2 / (2 * time[-1] + 1)))
        loudness = 0.3 * (1 + np.sin(2 * np.pi * generator.uniform(0.5, 4) * time))
        bursts = np.repeat(generator.random(length * 10 // rate + 1) < 0.3, -(-rate // 10))[:length]
        yield (0.5 * loudness * tone + 0.1 * bursts * generator.standard_normal(length)).astype(np.float32)


def _images(model: Model, count: int, generator: np.random.Generator) -> Iterator[object]:
    """Patches of colour in several sizes, with noise on them."""
    try:
        from PIL import Image
    except ImportError as err:
        raise MissingDependencyError('reading images needs Pillow: pip install "txopt[image]"') from err
    for _ in range(count):
        size = 2 ** int(generator.integers(2, 6))
        patches = np.kron(generator.integers(0, 256, (size, size, 3)), np.ones((PIXELS // size, PIXELS // size, 1)))
        noise = generator.normal(0, 16, patches.shape)
        yield Image.fromarray(np.clip(patches + noise, 0, 255).astype(np.uint8))


def _arrays(model: Model, padding: Padding, count: int, generator: np.random.Generator) -> Iterator[Feeds]:
    """By the manifest's axes: ids below the vocabulary, masks without padding, floats of mean 0 and variance 1."""
    frontend, bounds = model.manifest.frontend, bounds_of(model.manifest.frontend)
    drawn = [item.name for item in padding.inputs if item.dtype == "int64" and not _is_mask(model, item.name)]
    unknown = [name for name in drawn if name not in bounds or bounds[name].vocabulary is None]
    if unknown:
        raise InputError(
            f"{', '.join(unknown)}: expected a vocabulary to draw random ids from, and the manifest names none; give data"
        )
    positions = [bound.positions for bound in bounds.values() if bound.positions]
    for length in _lengths(count, 1, min([LONGEST, *positions])):
        least, most = frontend.get("least_samples") or 1, frontend.get("most_samples") or 16_000
        samples = int(generator.integers(least, max(least, most) + 1))
        feeds: Feeds = {}
        for item in padding.inputs:
            sizes = {"B": 1, "N": samples}
            shape = [axis if isinstance(axis, int) else sizes.get(axis, length) for axis in item.axes]
            if item.dtype != "int64":
                feeds[item.name] = generator.standard_normal(shape).astype(item.dtype)
            elif _is_mask(model, item.name):
                feeds[item.name] = np.full(shape, int(item.name != GLOBAL_MASK), np.int64)
            else:
                feeds[item.name] = generator.integers(0, bounds[item.name].vocabulary or 1, shape)
        yield feeds


def _is_mask(model: Model, name: str) -> bool:
    return name in {*source_masks(model.manifest.graphs), "attention_mask", GLOBAL_MASK}
