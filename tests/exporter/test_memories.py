"""Decoders that read several memories: exported, verified, and held against the full-sequence module; or refused with the reason."""

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.exporter.memories import BAD, GOOD, REGIONS, Two, TwoCached, made
from tests.runtime.artifacts import Document, put
from txopt import cli
from txopt.exporter.custom import FullSequence
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import load
from txopt.runtime.decoder import Floats, Ids
from txopt.runtime.errors import ArtifactError, InputError, SourceError
from txopt.runtime.generate import GenerationResult, generate
from txopt.runtime.manifest import Manifest
from txopt.runtime.model import Model
from txopt.runtime.options import GenerationOptions
from txopt.runtime.parity import verify

Feeds = dict[str, Any]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Of a decoder without a cache, by the road of ``txopt export package.module:factory OUT``."""
    return export("tests.exporter.memories:factory", tmp_path_factory.mktemp("two") / "out")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return export(made(TwoCached), tmp_path_factory.mktemp("cached") / "out")


@pytest.fixture(scope="module", params=["two", "cached"])
def artifact(request: pytest.FixtureRequest) -> Artifact:
    found: Artifact = request.getfixturevalue(request.param)
    return found


def batch() -> Feeds:
    """Three rows: the longest document has the fewest regions, and each row has another padding in each."""
    generator = np.random.default_rng(0)
    mask = (np.arange(7) < np.array([[7], [2], [5]])).astype(np.int64)
    seen = (np.arange(4) < np.array([[1], [4], [2]])).astype(np.int64)
    regions = generator.standard_normal((3, 4, REGIONS)).astype(np.float32)
    ids = np.where(mask, generator.integers(3, 40, (3, 7)), 0)
    return {"input_ids": ids, "attention_mask": mask, "regions": regions, "regions_mask": seen}


@dataclass
class Whole:
    """R rows of the full-sequence module, recomputed from the start at every step: what a decoder of an artifact must equal."""

    module: Two
    feeds: Mapping[str, Any]
    beams: int
    max_length: int | None = None

    def prefill(self, ids: Ids, mask: Ids | None) -> Floats:
        inputs = {name: torch.from_numpy(value).repeat_interleave(self.beams, 0) for name, value in self.feeds.items()}
        self.memories = self.module.encode(*(inputs[name] for name in self.module.inputs))
        self.masks = tuple(None if name is None else inputs[name] for name in self.module.memory_masks)
        self.ids = torch.from_numpy(ids)
        return self._logits()

    def step(self, ids: Ids) -> Floats:
        self.ids = torch.cat([self.ids, torch.from_numpy(ids)[:, None]], 1)
        return self._logits()

    def reorder(self, rows: Ids) -> None:
        self.ids = self.ids[torch.from_numpy(rows)]

    def _logits(self) -> Floats:
        with torch.no_grad():
            logits: Tensor = self.module.decode(self.ids, self.memories, self.masks)
        return logits[:, -1].numpy().copy()


def whole(kind: type[Two], feeds: Feeds, **options: Any) -> GenerationResult:
    module, rows = made(kind), len(feeds["input_ids"])
    return generate(
        lambda beams: Whole(module, feeds, beams),
        np.ones((rows, 1), np.int64),
        GenerationOptions.merge({"eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}, options),
    )


GREEDY = {"num_beams": 1, "max_new_tokens": 64, "min_new_tokens": 64}


def test_greedy_ids_are_the_full_sequences_over_64_steps(artifact: Artifact) -> None:
    got = Model(artifact).generate(**batch(), **GREEDY).sequences
    assert got.shape == (3, 65)
    assert len(set(got[:, 1:].ravel().tolist())) > 8, "ids vary, so that equal ids say something"
    np.testing.assert_array_equal(got, whole(Two, batch(), **GREEDY).sequences)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4}, {"num_beams": 1, "do_sample": True, "seed": 3}, {"num_beams": 2, "do_sample": True}],
    ids=str,
)
def test_every_search_finds_what_it_finds_in_the_full_sequence(artifact: Artifact, options: Any) -> None:
    options = {**options, "max_new_tokens": 20} | ({"seed": 3} if options.get("do_sample") else {})
    got, expected = Model(artifact).generate(**batch(), **options), whole(Two, batch(), **options)
    np.testing.assert_array_equal(got.sequences, expected.sequences)
    if expected.scores is not None:
        assert got.scores is not None
        np.testing.assert_allclose(got.scores, expected.scores, atol=1e-4)


def test_a_stream_gives_the_same_ids(two: Artifact) -> None:
    model = Model(two)
    streamed = np.stack(list(model.stream(**batch(), **GREEDY)), 1)
    np.testing.assert_array_equal(streamed, model.generate(**batch(), **GREEDY).sequences[:, 1:])


def test_a_decoder_of_ones_own_loop_reads_both_memories(two: Artifact) -> None:
    """Rows of one source share its K, V and masks; both memories matter to what it says."""
    model, feeds, tokens = Model(two), batch(), np.array([[1, 5], [1, 6], [1, 7]])
    alone = model.decode(model.encode(**feeds)).feed(tokens)
    beams = model.decode(model.encode(**feeds), beams=2).feed(np.repeat(tokens, 2, 0))
    np.testing.assert_allclose(beams, np.repeat(alone, 2, 0), atol=1e-4)
    module = made(Two)
    tensors = [torch.from_numpy(value) for value in feeds.values()]
    expected = module.decode(torch.from_numpy(tokens), module.encode(*tensors), (tensors[1], tensors[3])).numpy()
    np.testing.assert_allclose(alone, expected, atol=1e-4)
    for name in ("input_ids", "regions"):
        other = model.decode(model.encode(**{**feeds, name: feeds[name][[1, 2, 0]]})).feed(tokens)
        assert np.abs(other - alone).max() > 0.1, name


def test_padding_of_either_memory_changes_nothing(two: Artifact) -> None:
    model, feeds = Model(two), batch()
    together = model.decode(model.encode(**feeds)).feed(np.array([[1, 5]] * 3))
    for row, (length, regions) in enumerate([(7, 1), (2, 4), (5, 2)]):
        cut = {
            "input_ids": feeds["input_ids"][row : row + 1, :length],
            "regions": feeds["regions"][row : row + 1, :regions],
        }
        mine = model.decode(model.encode(**cut)).feed(np.array([[1, 5]]))  # masks that are not given mean no padding
        np.testing.assert_allclose(mine[0], together[row], atol=1e-4)


def test_parity_is_recorded_on_lengths_and_masks_of_both(two: Artifact) -> None:
    assert verify(two.path).passed
    certificate = two.manifest.parity
    assert {"single/memory", "single/memory.1", "padded/memory", "padded/memory.1"} <= certificate["errors"].keys()
    assert certificate["invariance"].keys() == {"padding", "batch"}
    padded = next(case for case in load(two.path) if case.name == "padded")
    counts = [padded.inputs[name].sum(1).tolist() for name in ("attention_mask", "regions_mask")]
    assert counts == [[9, 4, 7], [5, 8, 10]]
    assert {"cross_key.3", "cross_value.3", "memory.1"} <= padded.expected.keys()


def test_the_manifest_names_both_lengths(two: Artifact) -> None:
    assert two.manifest.format == 2
    nodes = two.manifest.fusion["decoder"]["nodes"]
    assert (nodes["Attention"], nodes["TensorScatter"]) == (6, 4)
    decoder = {item.name: item.axes for item in two.manifest.graphs["decoder"].inputs}
    assert decoder["encoder_attention_mask"] == ("B", "T")
    assert decoder["encoder_regions_mask"] == ("B", "U")
    assert [decoder[f"cross_key.{i}"][2] for i in range(4)] == ["T", "U", "T", "U"]


def test_the_command_line_takes_all_inputs_of_one_file(
    two: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "in.npz", **batch())
    with pytest.raises(SystemExit) as done:
        cli.main(
            ["run", str(two.path), "--ids", str(tmp_path / "in.npz"), "--max-new-tokens", "9", "--json", "--quiet"]
        )
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out)["ids"] == whole(Two, batch(), max_new_tokens=9).sequences.tolist()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"regions": None}, "regions: missing; expected float32 [B,U,12]"),
        ({"regions_mask": np.ones((3, 5), np.int64)}, "regions_mask: expected int64 [B,U], got int64 [3, 5] (U is 4"),
        (
            {"input_ids": np.full((3, 7), 40)},
            "input_ids: expected ids of this model's source vocabulary, 0 to 39, got 40",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(two: Artifact, change: Feeds, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        Model(two).encode(**{**batch(), **change})


def test_the_sources_of_another_model_are_refused(two: Artifact) -> None:
    model = Model(two)
    encoded = model.encode(**batch())
    wrong = {"attention_mask": encoded.masks["attention_mask"], "regions_mask": encoded.masks["attention_mask"]}
    with pytest.raises(
        InputError, match=r"encoder_regions_mask: expected the mask that encode\(\) read, int64 \[B,U\]"
    ):
        model.decode(replace(encoded, masks=wrong))


def index(graph: str, kind: str, name: str) -> Callable[[Document], str]:
    """Where a tensor is in a manifest."""

    def find(document: Document) -> str:
        names = [item["name"] for item in document["graphs"][graph][kind]]
        return f"graphs/{graph}/{kind}/{names.index(name)}"

    return find


MASK = index("decoder", "inputs", "encoder_regions_mask")
TAMPERED: dict[str, tuple[Callable[[Document], Any], str]] = {
    "an older format": (
        lambda d: put("format", 1)(d),
        "format: expected 2, the oldest that has what these graphs use, found 1",
    ),
    "a mask of another length": (
        lambda d: put(f"{MASK(d)}/axes", ["B", "T"])(d),
        r"expected encoder_regions_mask int64 \[B,U\], as the encoder reads it, found encoder_regions_mask int64 \[B,T\]",
    ),
    "a mask of no input": (
        lambda d: put(f"{MASK(d)}/name", "encoder_pixels_mask")(d),
        "expected 'encoder_pixels_mask' beside an encoder's input 'pixels_mask', found no such input",
    ),
    "a mask of features": (
        lambda d: put(f"{MASK(d)}/name", "encoder_regions")(d),
        r"expected encoder_regions int64 \[B,T\]",
    ),
    "memories with a gap": (
        lambda d: put(f"{index('encoder', 'outputs', 'memory.1')(d)}/name", "memory.2")(d),
        r"expected memory.1 \[B,T,M\] of a float type, found none",
    ),
    "cross K/V of another length": (
        lambda d: put(f"{index('decoder', 'inputs', 'cross_key.1')(d)}/axes", ["B", 4, "T", 8])(d),
        r"expected cross_key.1 float32 \[B,4,U,8\], found cross_key.1 float32 \[B,4,T,8\]",
    ),
    "an axis that is none": (
        lambda d: put(f"{index('encoder', 'outputs', 'memory.1')(d)}/axes/1", "X")(d),
        "one of B R Q S T U W N, found 'X'",
    ),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_a_tampered_manifest_is_refused(two: Artifact, what: str) -> None:
    change, said = TAMPERED[what]
    document = copy.deepcopy(two.manifest.to_json())
    change(json_document := json.loads(json.dumps(document)))
    with pytest.raises(ArtifactError, match=said):
        Manifest.from_json(json_document)


def test_lengths_swapped_throughout_are_not_those_of_the_files(two: Artifact) -> None:
    """A manifest that agrees with itself, but not with its graphs."""
    text = json.dumps(two.manifest.to_json())
    swapped = text.replace('"U"', '"X"').replace('"T"', '"U"').replace('"X"', '"T"')
    with pytest.raises(ArtifactError, match="the graphs in its files are not those of its manifest"):
        Model(replace(two, manifest=Manifest.from_json(json.loads(swapped))))


def test_training_reads_the_memories_the_same_way() -> None:
    """FullSequence takes a mask for each memory, and both protocols are one model."""
    explicit, derived = made(TwoCached), made(Two)
    ids, mask, regions, seen = (torch.from_numpy(value) for value in batch().values())
    memories, tokens = explicit.encode(ids, mask, regions, seen), torch.tensor([[1, 5, 9]] * 3)
    logits = explicit.decode(tokens, memories, FullSequence(tokens, (mask, seen)))  # type: ignore[arg-type]
    assert torch.allclose(logits, derived.decode(tokens, memories, (mask, seen)), atol=1e-5)


@pytest.mark.parametrize("kind", GOOD, ids=lambda kind: kind.__name__)
def test_memories_may_share_a_length_or_have_a_fixed_one(kind: type[Two], tmp_path: Path) -> None:
    artifact = export(made(kind), tmp_path / "out")
    case = next(case for case in load(artifact.path) if case.name == "padded")
    options = {**GREEDY, "max_new_tokens": 24, "min_new_tokens": 24}
    got = Model(artifact).generate(**case.inputs, **options).sequences
    np.testing.assert_array_equal(got, whole(kind, case.inputs, **options).sequences)
    if kind.__name__ == "Three":
        assert artifact.manifest.frontend["bounds"] == {"tags": {"vocabulary": 9, "positions": 8}}
        with pytest.raises(InputError, match="tags: expected ids of this model's source vocabulary, 0 to 8, got 9"):
            Model(artifact).encode(**{**case.inputs, "tags": np.full_like(case.inputs["tags"], 9)})


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
def test_what_cannot_be_carried_is_said(kind: type[Two], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape(BAD[kind])):
        export(kind(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def saying(**facts: Any) -> Two:
    return type("Saying", (Two,), facts)()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"inputs": []}, "inputs: expected a mapping of encode()'s arguments, got []"),
        (
            {"inputs": dict(reversed(Two.inputs.items()))},
            "inputs: expected encode()'s arguments in its order, input_ids",
        ),
        ({"inputs": {**Two.inputs, "regions": 3}}, "inputs['regions']: expected a mapping with axes"),
        ({"inputs": {**Two.inputs, "regions": {"axes": ("B", "V", 8)}}}, "inputs['regions']['axes']: expected"),
        ({"inputs": {**Two.inputs, "regions": {"axes": ()}}}, "inputs['regions']['axes']: expected"),
        (
            {"inputs": {**Two.inputs, "regions_mask": {"axes": ("B", "U", 2)}}},
            "inputs['regions_mask']['axes']: expected",
        ),
        ({"inputs": {**Two.inputs, "input_ids": {"axes": ("B", "T"), "vocabulary": "40"}}}, "['vocabulary']: expected"),
        (
            {"inputs": {**Two.inputs, "input_ids": {"axes": ("B", "T"), "vocabulary": 41}}},
            "vocabulary'] = 41: expected",
        ),
        ({"inputs": {**Two.inputs, "num_beams": {"axes": ("B", 4)}}}, "generate() takes an option of this name"),
        ({"memory_masks": "attention_mask"}, "memory_masks: expected for each memory the name"),
        ({"memory_masks": ("attention_mask", "pixels_mask")}, "memory_masks names 'pixels_mask': expected one of"),
    ],
)
def test_facts_of_inputs_are_checked(facts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=re.escape(said)):
        export(saying(**facts), tmp_path / "out")
