"""What a quantized artifact says of a source does not depend on its batch: equal to the bit, at the blocks that quantization uses.

runtime/alignment.py says what is promised; the same artifacts without it, and blocks that are too wide, fail the same comparison.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.calibration.graphs import engine, single
from txopt.calibration.packing import for_matmul_nbits
from txopt.calibration.quantize import put
from txopt.calibration.recipe import SCHEMES, Recipe, recipe_of
from txopt.calibration.rounder import Rounder
from txopt.calibration.rounding import round_to_nearest
from txopt.exporter import weights
from txopt.exporter.lowering import LOWERINGS
from txopt.exporter.lowering.blocks import ACCURACY
from txopt.runtime.artifact import Artifact
from txopt.runtime.inputs import Bound
from txopt.runtime.model import Model

pytestmark = pytest.mark.slow

Ids = NDArray[np.int64]
MODELS = ("t5", "marian", "g2p")
ENCODERS = ("bert", "roberta", "distilbert")  # a label, labels of tokens, an embedding
BATCH = 8
STEPS = 12


@pytest.fixture(scope="module")
def quantized(
    artifacts: Callable[[str], Artifact], g2p: Artifact, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Model]:
    """An artifact rounded and lowered, nothing proved: random weights make more of a rounded activation than parity allows."""
    made: dict[tuple[str, str, int | None, str], Artifact] = {}

    def make(name: str, precision: str, block: int | None = None, scheme: str = "weights") -> Model:
        key = name, precision, block, scheme
        if key not in made:
            source = g2p if name == "g2p" else artifacts(name)
            recipe = recipe_of(scheme, precision, method="rtn", block=block)
            assert isinstance(recipe, Recipe)
            models = {graph: ir.load(source.file(spec.file)) for graph, spec in source.manifest.graphs.items()}
            blocks = Rounder({}).blocks(models, recipe)
            for graph, model in models.items():
                put(model.graph, blocks[graph])
                LOWERINGS["cpu"](model, precision)
            directory = tmp_path_factory.mktemp("quantized")
            weights.write(models, directory)
            made[key] = Artifact(path=Path(directory), manifest=replace(source.manifest, precision=precision))
        return Model(made[key], threads=1)

    return make


def sources(model: Model, drawn: np.random.Generator, lengths: list[int]) -> tuple[Ids, Ids]:
    """Ids and mask [B,T]."""
    most = int(model.manifest.frontend["source_vocabulary"])
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    return drawn.integers(3, most, mask.shape) * mask, mask


def said(model: Model, ids: Ids, mask: Ids, tokens: Ids, prompt: int) -> NDArray[np.float32]:
    """Logits of a prefill of ``prompt`` tokens and of steps along the others, [B,1+S,V]."""
    decoder = model.decode(model.encode(input_ids=ids, attention_mask=mask))
    found = [decoder.prefill(tokens[:, :prompt]).copy()]
    found += [decoder.step(column).copy() for column in tokens[:, prompt:].T]
    return np.stack(found, 1)


def rounds(seed: int = 0, longest: int = 40) -> Iterator[tuple[np.random.Generator, list[int], int]]:
    """Lengths of a batch's sources, each once shorter by one than whole lanes and else at random, and of the prompt."""
    drawn = np.random.default_rng(seed)
    for length in (2, 5, 7, 15, 23, 31, 39):
        others = [int(number) for number in drawn.integers(1, longest + 1, BATCH - 1)]
        yield drawn, [length, *others], int(drawn.integers(1, 6))


def differences(model: Model) -> list[tuple[int, int]]:
    """(length, longest of its batch) of the sources whose logits are not those that they have alone."""
    found = []
    for drawn, lengths, prompt in rounds():
        ids, mask = sources(model, drawn, lengths)
        tokens = drawn.integers(3, 28, (BATCH, prompt + STEPS))
        together = said(model, ids, mask, tokens, prompt)
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            alone = said(model, ids[one, :length], mask[one, :length], tokens[one], prompt)
            if not np.array_equal(alone[0], together[row]):
                found.append((length, max(lengths)))
    return found


def sums_alike(precision: str) -> bool:
    """Whether this processor's kernel gives a row alone what it gives it among others, at the blocks of ``precision``."""
    drawn = np.random.default_rng(0)
    packed = for_matmul_nbits(round_to_nearest(drawn.standard_normal((64, 64)).astype(np.float32), SCHEMES[precision]))
    packed = replace(packed, attributes={**packed.attributes, "accuracy_level": ACCURACY})
    rows = drawn.standard_normal((BATCH, 64)).astype(np.float32)
    alone = [engine(single("MatMulNBits", packed, x=row), x=row)[0] for row in rows[:, None]]
    return np.array_equal(engine(single("MatMulNBits", packed, x=rows), x=rows)[0], np.concatenate(alone))


@pytest.mark.parametrize(
    ("precision", "scheme"), [("int8", "weights"), ("int4", "weights"), ("int8", "rows"), ("int8", "mixed")]
)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_equal_to_the_bit(name: str, precision: str, scheme: str, quantized: Callable[..., Model]) -> None:
    assert not differences(quantized(name, precision, scheme=scheme)) or not sums_alike(precision)


@pytest.mark.parametrize(("precision", "everywhere"), [("int8", True), ("int4", False)])
def test_where_the_engine_sums_rows_alike(precision: str, everywhere: bool) -> None:
    """At 4 bits it does with AVX-512, and not with AVX2 alone; docs/quantization.md says so."""
    assert sums_alike(precision) or not everywhere


@pytest.mark.parametrize("search", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_and_scores_are_equal(
    name: str, precision: str, search: dict[str, int], quantized: Callable[..., Model]
) -> None:
    model = quantized(name, precision)
    for drawn, lengths, _ in [*rounds()][::3]:
        ids, mask = sources(model, drawn, lengths)
        together = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=20, **search)
        for row, length in enumerate(lengths):
            alone = model.generate(input_ids=ids[row : row + 1, :length], max_new_tokens=20, **search)
            width = alone.sequences.shape[1]
            np.testing.assert_array_equal(alone.sequences[0], together.sequences[row, :width])
            if alone.scores is not None:
                assert together.scores is not None
                assert alone.scores[0] == together.scores[row]


@pytest.mark.parametrize("name", MODELS)
def test_padding_of_ones_own_changes_nothing(name: str, quantized: Callable[..., Model]) -> None:
    model, drawn = quantized(name, "int8"), np.random.default_rng(0)
    tokens = drawn.integers(3, 28, (1, STEPS))
    for length in (1, 6, 7, 8, 15):
        ids, mask = sources(model, drawn, [length])
        plain = said(model, ids, mask, tokens, 1)
        for more in (1, 2, 9, 20):
            wider = [np.pad(each, ((0, 0), (0, more))) for each in (ids, mask)]
            np.testing.assert_array_equal(said(model, *wider, tokens, 1), plain)


@pytest.mark.parametrize("positions", [41, 42, 45, 47])
@pytest.mark.parametrize("name", MODELS)
def test_positions_need_be_no_whole_lanes(name: str, positions: int, quantized: Callable[..., Model]) -> None:
    """The longest sources are then padded less; what is left over is padding for all others."""
    model = quantized(name, "int8")
    model.session._bounds = {"input_ids": Bound(positions=positions)}
    drawn = np.random.default_rng(positions)
    lengths = [positions, positions - 1, 40, 39, 33, 7, 5, 1]
    ids, mask = sources(model, drawn, lengths)
    tokens = drawn.integers(3, 28, (BATCH, STEPS))
    together = said(model, ids, mask, tokens, 1)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = said(model, ids[one, :length], mask[one, :length], tokens[one], 1)
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("name", MODELS)
def test_buffers_that_grow_change_nothing(name: str, quantized: Callable[..., Model]) -> None:
    """To the last position that the model has: 64 of g2p, 80 of Marian, and past the first bucket of T5."""
    model = quantized(name, "int8")
    most = model.manifest.cache.max_length if model.manifest.cache else None
    drawn = np.random.default_rng(0)
    lengths = [7, 15, 3, 20, 1, 5, 12, 9]
    ids, mask = sources(model, drawn, lengths)
    tokens = drawn.integers(3, 28, (BATCH, most or 90))
    together = said(model, ids, mask, tokens, 60)
    for row in (0, 4):
        one = slice(row, row + 1)
        alone = said(model, ids[one, : lengths[row]], mask[one, : lengths[row]], tokens[one], 60)
        np.testing.assert_array_equal(alone[0], together[row])


def test_without_alignment_it_does_not_hold(quantized: Callable[..., Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """The broken twin: else nothing above would say anything. Which model shows it depends on the processor."""
    found = {}
    for name in MODELS:
        model = quantized(name, "int4" if name == "marian" else "int8")
        monkeypatch.setattr(model.session, "_aligns", False)
        found[name] = differences(model)
    assert any(found.values())


def test_wider_blocks_are_not_promised(quantized: Callable[..., Model]) -> None:
    """Where this fails the engine has learned it: alignment.py's docstring and the recipe's blocks may change."""
    assert differences(quantized("g2p", "int8", 128)) or differences(quantized("g2p", "int4", 64))


def test_more_rows_than_processors_lanes(quantized: Callable[..., Model]) -> None:
    """64 sources at once."""
    model, drawn = quantized("g2p", "int8"), np.random.default_rng(0)
    lengths = [1 + number % 30 for number in range(64)]
    ids, mask = sources(model, drawn, lengths)
    tokens = drawn.integers(3, 28, (64, STEPS))
    together = said(model, ids, mask, tokens, 2)
    for row in range(0, 64, 7):
        one = slice(row, row + 1)
        alone = said(model, ids[one, : lengths[row]], mask[one, : lengths[row]], tokens[one], 2)
        np.testing.assert_array_equal(alone[0], together[row])


def test_a_decoder_alone_keeps_it_for_prompts_padded_on_the_left(quantized: Callable[..., Model]) -> None:
    model, drawn = quantized("gpt2", "int8"), np.random.default_rng(0)
    for lengths in ([1, 7, 3, 12, 15, 2, 9, 5], [70, 3, 64, 8, 66, 1, 15, 31]):
        mask = (np.arange(max(lengths)) >= max(lengths) - np.array(lengths)[:, None]).astype(np.int64)
        prompts = drawn.integers(3, 90, mask.shape) * mask
        decoder = model.decode(batch=BATCH)
        together = [decoder.prefill(prompts, mask).copy()]
        together += [decoder.step(np.full(BATCH, token)).copy() for token in (7, 9, 11)]
        for row, length in enumerate(lengths):
            one = model.decode()
            alone = [one.prefill(prompts[row : row + 1, -length:]).copy()]
            alone += [one.step(np.full(1, token)).copy() for token in (7, 9, 11)]
            for mine, theirs in zip(alone, together, strict=True):
                np.testing.assert_array_equal(mine[0], theirs[row])


def answer(model: Model, ids: Ids, mask: Ids) -> dict[str, NDArray[np.float32]]:
    """What an encoder alone gives, by output."""
    encoded = model.encode(input_ids=ids, attention_mask=mask)
    return {name: model.session.array(value) for name, value in encoded.values.items()}


def moved(model: Model) -> list[tuple[int, int, str]]:
    """(length, longest of its batch, output) of what an encoder alone gives otherwise than it does to a source alone."""
    found = []
    for drawn, lengths, _ in rounds():
        ids, mask = sources(model, drawn, lengths)
        together = answer(model, ids, mask)
        for row, length in enumerate(lengths):
            one = slice(row, row + 1)
            for name, alone in answer(model, ids[one, :length], mask[one, :length]).items():
                mine = together[name][row]
                mine = mine[:length] if alone.ndim == 3 else mine
                if not np.array_equal(alone[0], mine):
                    found.append((length, max(lengths), name))
    return found


@pytest.mark.parametrize(("precision", "scheme"), [("int8", "weights"), ("int4", "weights"), ("int8", "rows")])
@pytest.mark.parametrize("name", ENCODERS)
def test_answers_of_encoders_alone_are_equal_to_the_bit(
    name: str, precision: str, scheme: str, quantized: Callable[..., Model]
) -> None:
    assert moved(quantized(name, precision, scheme=scheme)) == []


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_alone_give_as_many_places_as_they_got(name: str, quantized: Callable[..., Model]) -> None:
    """Alignment is the session's, and not to be seen; up to the last position that the model has."""
    model, drawn = quantized(name, "int8"), np.random.default_rng(0)
    most = int(model.manifest.frontend["source_positions"])
    for length in (1, 7, 8, 9, most - 1, most):
        given = answer(model, *sources(model, drawn, [length, 1]))
        for item in model.manifest.graphs["encoder"].outputs:
            sizes = {"B": 2, "T": length}
            expected = tuple(axis if isinstance(axis, int) else sizes[axis] for axis in item.axes)
            assert given[item.name].shape == expected


def test_without_alignment_encoders_do_not_keep_it(
    quantized: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken twin."""
    found = {}
    for name in ENCODERS:
        model = quantized(name, "int8")
        monkeypatch.setattr(model.session, "_aligns", False)
        found[name] = moved(model)
    assert any(found.values())
