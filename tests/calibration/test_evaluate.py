"""What two artifacts of one model say to the same samples, whatever batches they are in."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from txopt.calibration import evaluate
from txopt.calibration.agreement import Agreement
from txopt.calibration.data import read
from txopt.calibration.evaluate import Said, agreement, said
from txopt.calibration.samples import Samples
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model

pytestmark = pytest.mark.slow

PAIRS = [
    ("hello", "HH AH0 L OW1"),
    ("calibration", "K AE2 L AH0 B R EY1 SH AH0 N"),
    ("cat", "K AE1 T"),
    ("windows", "W IH1 N D OW0 Z"),
    ("a", "AH0"),
    ("encyclopedia", "IH0 N S AY2 K L AH0 P IY1 D IY0 AH0"),
]


@pytest.fixture(scope="module")
def model(g2p: Artifact) -> Model:
    return Model(g2p)


@pytest.fixture(scope="module")
def samples(model: Model) -> Samples:
    return read(PAIRS, model)


@pytest.fixture(scope="module")
def gpt2(artifacts: Callable[[str], Artifact]) -> Model:
    return Model(artifacts("gpt2"))


@pytest.fixture(params=[1, 2, 16])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Samples in a batch."""
    monkeypatch.setattr(evaluate, "BATCH", dict.fromkeys(evaluate.BATCH, request.param))
    return int(request.param)


def test_texts_are_the_pipelines_in_the_order_of_the_samples(model: Model, samples: Samples, size: int) -> None:
    found = said(model, samples)
    words = [sample.source for sample in samples]
    assert sorted(words) == sorted(word for word, _ in PAIRS)
    assert list(found.texts) == [model.pipeline("text")(word) for word in words]


def test_ids_have_no_start_no_padding_and_the_end(model: Model, samples: Samples, size: int) -> None:
    (end,) = [model.manifest.generation["eos_token_id"]]
    start = model.manifest.generation["decoder_start_token_id"]
    for sample, ids in zip(samples, said(model, samples).ids, strict=True):
        alone = model.generate(**sample.feeds).sequences[0]
        np.testing.assert_array_equal(ids, alone[1:])
        assert ids[-1] == end
        assert end not in ids[:-1]
        assert start not in ids


def test_samples_options_are_followed(model: Model) -> None:
    """A forced first token, as a target language is."""
    samples = read(PAIRS, model)
    samples.options["forced_bos_token_id"] = 17
    assert {int(ids[0]) for ids in said(model, samples).ids} == {17}


def test_a_model_agrees_with_itself(model: Model, samples: Samples, size: int) -> None:
    found = said(model, samples)
    estimates = agreement(model, model, samples, (found, found)).estimates()
    assert {name: value.value for name, value in estimates.items()} == {
        "forced_tokens": 100,
        "free_prefix": 100,
        "free_sequences": 100,
        "divergence_nats": 0,
    }


class Recorded(Agreement):
    """What was compared, as it came in."""

    @classmethod
    def of(cls, forced: Any, free: Any, divergence: Any = None) -> Any:
        return forced, free, divergence


def test_teacher_forcing_asks_at_each_token_of_a_reference(
    model: Model, samples: Samples, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against every sample alone, fed its prompt and its labels."""
    monkeypatch.setattr(evaluate, "Agreement", Recorded)
    found = said(model, samples)
    forced: Any
    forced, free, divergence = agreement(model, model, samples, (found, found))  # type: ignore[misc]
    for sample, (before, after), (mine, theirs), apart in zip(samples, forced, free, divergence, strict=True):
        assert sample.labels is not None
        fed = np.concatenate([sample.prompt, sample.labels[:-1]])[None]
        logits = model.decode(model.encode(**sample.feeds)).feed(fed)[0, len(sample.prompt) - 1 :]
        np.testing.assert_array_equal(before, logits.argmax(-1))
        np.testing.assert_array_equal(after, before)
        assert len(before) == len(sample.labels) == len(apart)
        assert mine is theirs


def test_without_references_the_baselines_own_words_are_fed(
    model: Model, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the baseline chooses what it said; where it said nothing at all there is one place."""
    samples = read([word for word, _ in PAIRS], model)
    monkeypatch.setattr(evaluate, "Agreement", Recorded)
    found = said(model, samples)
    silent = Said((np.zeros(0, np.int64), *found.ids[1:]), ("", *found.texts[1:]))
    forced, _, _ = agreement(model, model, samples, (silent, found))  # type: ignore[misc]
    assert len(forced[0][0]) == 1
    for ids, (before, _) in zip(silent.ids[1:], forced[1:], strict=True):
        np.testing.assert_array_equal(before, ids)


def test_a_decoder_alone_is_asked_behind_its_prompt(gpt2: Model, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.random.default_rng(0)
    samples = read([{"input_ids": drawn.integers(3, 90, length)} for length in (3, 9, 5)], gpt2)
    samples.options["max_new_tokens"] = 6
    found = said(gpt2, samples)
    for sample, ids in zip(samples, found.ids, strict=True):
        alone = gpt2.generate(**sample.feeds, max_new_tokens=6).sequences[0]
        np.testing.assert_array_equal(ids, alone[sample.feeds["input_ids"].shape[1] :])
    monkeypatch.setattr(evaluate, "Agreement", Recorded)
    forced, _, _ = agreement(gpt2, gpt2, samples, (found, found))  # type: ignore[misc]
    for ids, (before, _) in zip(found.ids, forced, strict=True):
        np.testing.assert_array_equal(before, ids)


def test_another_models_choices_are_counted(model: Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate whose logits are turned around agrees nowhere."""
    found = said(model, samples)
    other = Model(model.artifact)
    opened = other.session.decoder

    def turned(*arguments: Any, **named: Any) -> Any:
        decoder = opened(*arguments, **named)
        feed = decoder.feed
        monkeypatch.setattr(decoder, "feed", lambda ids: -feed(ids))
        return decoder

    monkeypatch.setattr(other.session, "decoder", turned)
    nothing = Said(tuple(np.full(9, 30) for _ in found.ids), found.texts)
    estimates = agreement(model, other, samples, (found, nothing)).estimates()
    assert estimates["forced_tokens"].value == 0
    assert estimates["free_sequences"].value == 0
    assert estimates["divergence_nats"].value > 1


def test_progress_counts_samples(model: Model, samples: Samples, size: int) -> None:
    seen: list[tuple[int, int]] = []
    said(model, samples, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (len(PAIRS), len(PAIRS))
    assert len(seen) == -(-len(PAIRS) // size)
