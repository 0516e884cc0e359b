"""Anyone's own model: the g2p example through the custom door, and modules that are no custom model."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from tests.exporter.cacheless import Learned
from txopt.examples.g2p.model import G2P, factory
from txopt.exporter.custom import DecodeCache
from txopt.exporter.pipeline import export
from txopt.exporter.precision import DTYPES
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

WORDS = ["cat", "it's", "pronunciation", "xylophone", "transformer", "a", "onomatopoeia"]


def test_the_example_is_verified(g2p: Artifact) -> None:
    assert g2p.manifest.family == "custom"
    assert g2p.manifest.source["name"] == "txopt.examples.g2p.model:factory"
    assert g2p.manifest.fusion["decoder"]["nodes"]["Attention"] == 4
    report = verify(g2p.path)
    assert report.passed
    assert any("beam search has no PyTorch reference" in note for note in report.skipped), "said, not hidden"


def test_words_are_pronounced_as_pytorch_pronounces_them(g2p: Artifact) -> None:
    model = Model(g2p)
    feeds, options = model.pipeline("text").prepare(WORDS)
    got = model.generate(**feeds, **options, num_beams=1).sequences
    expected = greedy(factory(), torch.from_numpy(feeds["input_ids"]), torch.from_numpy(feeds["attention_mask"]))
    np.testing.assert_array_equal(got, expected.numpy())


def test_text_comes_back_as_phonemes(g2p: Artifact) -> None:
    assert Model(g2p).pipeline("text")("cat") == "K AE1 T"


def greedy(module: G2P, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The plainest loop: all tokens anew at every step, no cache."""
    start, end, pad = (module.special_ids[f"{name}_token_id"] for name in ("decoder_start", "eos", "pad"))
    ids = torch.full((len(input_ids), 1), start)
    finished = torch.zeros(len(input_ids), dtype=torch.bool)
    with torch.no_grad():
        memory = module.encode(input_ids, mask)
        while not finished.all() and ids.shape[1] < module.max_length:
            best = module.decode(ids, memory, mask)[:, -1].argmax(-1)
            best[finished] = pad
            finished |= best == end
            ids = torch.cat([ids, best[:, None]], 1)
    return ids


class Tiny(nn.Module):
    """The smallest model that follows the protocol; its variants below break one rule each."""

    special_ids: ClassVar[Any] = {"decoder_start_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    max_length = 40
    layers: ClassVar[tuple[int, ...]] = (0, 1)

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 16)
        self.places = nn.Embedding(self.max_length, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.head = nn.Linear(16, 20)

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded: Tensor = self.embed(input_ids)
        return embedded * attention_mask[:, :, None]

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        x = self.embed(tokens) + self.places(cache.positions)
        for layer in self.layers:
            q, k, v = (split(part(x)) for part in (self.q, self.k, self.v))
            x = x + merge(cache.self_attention(layer, q, k, v))
            x = x + merge(
                cache.cross_attention(layer, split(self.q(x)), lambda: (split(self.k(memory)), split(self.v(memory))))
            )
        logits: Tensor = self.head(x)
        return logits

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.table(ids)
        return embedded


def split(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], 2, 8).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class WithoutSpecialIds(Tiny):
    special_ids: ClassVar[Any] = None


class WithoutTwoSpecialIds(Tiny):
    special_ids: ClassVar[Any] = {"eos_token_id": 2}


class WithoutMethods(nn.Module):
    special_ids: ClassVar[Any] = {"eos_token_id": 2, "pad_token_id": 0}


class CountingFromOne(Tiny):
    layers: ClassVar[tuple[int, ...]] = (1, 2)


class SkippingLayers(Tiny):
    layers: ClassVar[tuple[int, ...]] = (0, 2)


class WithoutEmbedding(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = (nn.Linear(1, 16, bias=False) for _ in range(2))

    def embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.table(ids[:, :, None].float())
        return embedded

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        logits: Tensor = self.head(self.embed(tokens))
        return logits


class NoModule:
    encode = decode = None


def test_a_module_itself_is_a_source(tmp_path: Path) -> None:
    artifact = export(Tiny(), tmp_path / "out")
    assert artifact.manifest.parity["passed"]
    assert artifact.manifest.source["name"] == "Tiny"
    ids = np.array([[3, 4, 5, 0], [6, 7, 8, 9]])
    mask = (ids > 0).astype(np.int64)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 1}
    from txopt.exporter.custom_source import CustomSource

    feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    expected = CustomSource(Tiny()).generate(feeds, **options)
    assert expected is not None
    got = Model(artifact).generate(input_ids=ids, attention_mask=mask, **options).sequences
    np.testing.assert_array_equal(got, expected.ids.numpy())


# what is wrong, and everything that one message must say of it
WRONG: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no special_ids": (WithoutSpecialIds, ("special_ids", "decoder_start_token_id", "eos_token_id", "pad_token_id")),
    "two special ids missing": (
        WithoutTwoSpecialIds,
        ("special_ids has no decoder_start_token_id", "special_ids has no pad_token_id"),
    ),
    "no methods and an id missing": (
        WithoutMethods,
        ("no method encode()", "no method decode()", "special_ids has no decoder_start_token_id"),
    ),
    "no module at all": (NoModule, ("NoModule", "no method encode()", "no method decode()", "no special_ids")),
    "layers counted from one": (CountingFromOne, ("layer 1", "number them 0, 1")),
    "layers skipped": (SkippingLayers, ("layer 2", "number them 0, 1")),
    "no embedding": (WithoutEmbedding, ("no nn.Embedding", "source_vocabulary")),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_custom_model_is_told_everything_at_once(what: str, tmp_path: Path) -> None:
    make, said = WRONG[what]
    with pytest.raises(SourceError) as caught:
        export(make(), tmp_path / "out")
    missing = [part for part in said if part not in str(caught.value)]
    assert not missing, str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("no.such.package:factory", "cannot import no.such.package"),
        ("txopt.examples.g2p.model:no_such", "no callable no_such"),
        ("txopt.examples.g2p.model:WEIGHTS", "no callable WEIGHTS"),
        ("some/where/deep/down", "expected a checkpoint's directory, a hub id, or package.module:factory"),
    ],
)
def test_a_factory_that_is_not_there(source: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=said):
        export(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_tokenizers_that_are_not_there_are_named(tmp_path: Path) -> None:
    module = Tiny()
    module.tokenizers = {"source": "nowhere.json"}  # type: ignore[assignment]
    with pytest.raises(SourceError, match=r"nowhere\.json"):
        export(module, tmp_path / "out")


def test_a_module_in_half_precision_is_exported_in_the_precision_asked_for(tmp_path: Path) -> None:
    artifact = export(factory().half(), tmp_path / "out")
    assert artifact.manifest.precision == "fp32"
    assert artifact.manifest.parity["passed"]


def test_a_module_goes_on_as_it_was(tmp_path: Path) -> None:
    """Someone exports in the middle of a training."""
    module = Tiny().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    export(module, tmp_path / "out", precision="fp16")
    assert module.training
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in module.parameters())
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class DroppingTokens(Tiny):
    """torch's functional dropout drops unless it is told not to."""

    def embed(self, ids: Tensor) -> Tensor:
        return dropout(super().embed(ids), 0.1)


class DroppingLogits(Tiny):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        return dropout(super().decode(tokens, memory, cache), 0.1)


class DroppingPositions(Learned):
    def placed(self, x: Tensor) -> Tensor:
        return x + dropout(self.places(torch.arange(x.shape[1])), 0.1)


class AlwaysTraining(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def eval(self) -> "AlwaysTraining":
        return self

    def embed(self, ids: Tensor) -> Tensor:
        dropped: Tensor = self.drop(super().embed(ids))
        return dropped


class Training(Tiny):
    """Dropout that evaluation turns off."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.1)
        self.train()

    def embed(self, ids: Tensor) -> Tensor:
        dropped: Tensor = self.drop(super().embed(ids))
        return dropped


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        (DroppingTokens, "encode"),
        (DroppingLogits, "decode"),
        (DroppingPositions, "decode"),
        (AlwaysTraining, "encode"),
    ],
)
def test_a_module_that_answers_at_random_is_told_so(kind: type[nn.Module], part: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=rf"different answers to equal inputs: {part}\(\).*dropout"):
        export(kind(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_dropout_that_evaluation_turns_off_is_no_chance(tmp_path: Path) -> None:
    assert export(Training(), tmp_path / "out").manifest.parity["passed"]


def state_of(module: nn.Module) -> list[Any]:
    """What an export could change of a module: its modes, and its tensors' dtypes, numbers and readiness to be trained."""
    modes = [part.training for part in module.modules()]
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [*modes, *((name, value.dtype, value.requires_grad, value.tolist()) for name, value in tensors)]


class Locked(Tiny):
    """What cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.register_buffer("scale", torch.ones(16))


class LockedAndFailing(Locked):
    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:
        raise RuntimeError("no")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_module_that_cannot_be_copied_goes_on_as_it_was(precision: str, tmp_path: Path) -> None:
    module = Locked().to(DTYPES[precision]).train()
    before = state_of(module)
    export(module, tmp_path / "out", precision=precision)
    assert state_of(module) == before


def test_a_module_that_cannot_be_copied_goes_on_as_it_was_when_it_is_refused(tmp_path: Path) -> None:
    module = LockedAndFailing().train()
    before = state_of(module)
    with pytest.raises(SourceError, match="trial call failed"):
        export(module, tmp_path / "out")
    assert state_of(module) == before


def test_buffers_of_a_module_stay_as_narrow_as_they_were(tmp_path: Path) -> None:
    module = Tiny()
    module.register_buffer("scale", torch.ones(16))
    before = state_of(module.bfloat16())
    export(module, tmp_path / "out", precision="bf16")
    assert state_of(module) == before


def test_a_module_that_cannot_be_copied_is_exported_all_the_same(tmp_path: Path) -> None:
    assert export(Locked(), tmp_path / "out").manifest.family == "custom"
    with pytest.raises(SourceError, match=r"Locked cannot be copied .* is not torch\.float32; give it in that dtype"):
        export(Locked().half(), tmp_path / "half")
