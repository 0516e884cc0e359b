"""Reference texts as labels: what transformers would train on, and what generate() would have to say."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from tests import tiny_tokenizers as tiny
from tests.calibration.models import VOCABULARY, model
from txopt.calibration.data import read
from txopt.calibration.targets import Targets
from txopt.exporter.frontend import collect
from txopt.runtime.errors import InputError
from txopt.runtime.model import Model

TARGETS = [*tiny.GERMAN[:5], *tiny.SENTENCES[:3]]
END = {"t5": 1, "marian": 0, "m2m100": 2, "mbart": 2, "nllb": 2, "prophetnet": 3}
MAKE: dict[str, Callable[[Path], Path]] = {name: getattr(tiny, name) for name in END}


def labels(of: Model, targets: list[str], **options: Any) -> list[list[int] | None]:
    samples = read([(f"{number} frogs", target) for number, target in enumerate(targets)], of, options=options)
    found = {sample.reference: sample.labels for sample in samples}
    return [None if (row := found[target]) is None else row.tolist() for target in targets]


def hugging_face(checkpoint: Path, name: str) -> list[list[int]]:
    """What transformers' tokenizer makes of targets; mBART's language goes to the end there, and is wrapped to the front later."""
    languages = {"m2m100": {"tgt_lang": "de"}, "nllb": {"tgt_lang": "deu_Latn"}}.get(name, {})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, **languages)
    rows = [tokenizer(text_target=text).input_ids for text in TARGETS]
    return [[row[-1], *row[:-1]] for row in rows] if name == "mbart" else rows


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
def test_labels_are_those_of_transformers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, out = MAKE[name](tmp_path / "checkpoint"), tmp_path / "out"
    out.mkdir()
    facts = collect(checkpoint, "text-to-text", name, out)
    options = {"target_language": "deu_Latn"} if name == "nllb" else {}
    # Marian's tokenizer has pieces that its vocab.json, and so the model, does not have.
    vocabulary = facts["unknown_from"] if name == "marian" else VOCABULARY
    artifact = model(out, facts, vocabulary=vocabulary, eos_token_id=END[name], decoder_start_token_id=END[name])
    with caplog.at_level(logging.WARNING):
        found = labels(artifact, TARGETS, **options)
    assert found == hugging_face(checkpoint, name)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Words, with <s> before and </s> behind a text, as BART's."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "frog", "jumps", "frogs", *map(str, range(9))]
TEXT = {"type": "text", "tokenizer": "tokenizer.json"}


@pytest.mark.parametrize(
    ("generation", "frontend", "expected"),
    [
        ({"decoder_start_token_id": 2}, {}, [1, 4, 5, 2]),  # BART: its template's beginning was a target
        ({"decoder_start_token_id": 2, "forced_bos_token_id": 1}, {}, [1, 4, 5, 2]),  # forced and said once
        ({"decoder_start_token_id": 1}, {}, [4, 5, 2]),  # the prompt says it
        ({"decoder_start_token_id": 1, "forced_bos_token_id": 6}, {}, [6, 4, 5, 2]),
        ({"eos_token_id": [7, 2]}, {}, [1, 4, 5, 2]),
        ({"eos_token_id": None}, {}, [1, 4, 5, 2]),
        ({}, {"add_special_tokens": False}, [4, 5, 2]),  # an end that no template puts
        ({"eos_token_id": [7, 2]}, {"add_special_tokens": False}, [4, 5, 7]),
        ({}, {"source_template": ["text", 6]}, [4, 5, 2]),  # the source's template is not the target's
        ({}, {"source_template": ["text", 6], "target_tokenizer": "tokenizer.json"}, [1, 4, 5, 2]),
    ],
)
def test_what_stands_around_a_text_stands_there_once(
    generation: dict[str, Any], frontend: dict[str, Any], expected: list[int], words: Path
) -> None:
    assert labels(model(words, {**TEXT, **frontend}, **generation), ["a frog"]) == [expected]


def test_what_the_tokenizer_cannot_write_is_no_reference(words: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert labels(model(words, TEXT), ["toad", "a toad"]) == [None, [1, 4, 3, 2]]
    assert "references left out, as the model's tokenizer cannot write them: 1" in caplog.text


def test_long_references_are_cut_to_the_models_positions(words: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        (row,) = labels(model(words, TEXT), [" ".join(["frog"] * 100)])
    assert row == [1, *[5] * 63]  # fed are the prompt and all but the last: 64
    assert "references longer than the model has positions for, and cut: 1" in caplog.text


def test_labels_that_are_ids_lose_their_padding(words: Path) -> None:
    targets = Targets(model(words, TEXT, pad_token_id=0).manifest, None, {})
    for given in ([5, 0, 6, 2, 0, 0], [5, 0, 6, 2, -100, -100], [5, 0, 6, 2]):
        assert np.array_equal(targets.of_ids(given) if targets.of_ids(given) is not None else [], [5, 0, 6, 2])
    assert targets.of_ids([-100, -100]) is None
    ending = Targets(model(words, TEXT, pad_token_id=2, eos_token_id=2).manifest, None, {})
    for given in ([5, 6, 2, 2, 2], [5, 6, 2], [5, 6, 2, -100]):
        assert (row := ending.of_ids(given)) is not None
        assert row.tolist() == [5, 6, 2]
    with pytest.raises(
        InputError, match=rf"expected ids of 0 to {VOCABULARY - 1}, padded with -100, found {VOCABULARY}"
    ):
        targets.of_ids([VOCABULARY])
    with pytest.raises(InputError, match="found -7"):
        targets.of_ids([-7, 5])
    with pytest.raises(InputError, match="expected integers"):
        targets.of_ids([0.5])
