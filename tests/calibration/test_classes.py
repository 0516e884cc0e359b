"""References of encoders alone: labels, numbers, and a label for each token; what is none is told with its place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from tests.calibration.models import EMBEDDING, LOGITS, TOKEN_LOGITS, model
from tests.runtime.artifacts import tensor
from txopt.calibration.data import read
from txopt.runtime.errors import InputError
from txopt.runtime.model import Model

WORDS = ("[PAD]", "[UNK]", "good", "bad", "soup", "bread")
NAMES = {"0": "negative", "1": "positive", "2": "so, so"}
ONE, TWO = ((tensor("logits", "float32", "B", count),) for count in (1, 2))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of single words."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def classifier(folder: Path, scores: str = "softmax", outputs: Any = LOGITS, **frontend: Any) -> Model:
    text = {"type": "text", "tokenizer": "tokenizer.json", "pad_token_id": 0, "scores": scores, **frontend}
    labels = {} if "labels" in frontend or outputs is not LOGITS else {"labels": NAMES}
    return model(folder, {**text, **labels}, kind="encoder", outputs=outputs)


def answers(data: Any, artifact: Model) -> dict[str, Any]:
    return {
        entry.source.value: None if entry.answer is None else entry.answer.tolist()
        for entry in read(data, artifact).entries
    }


def table(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_label_is_named_or_numbered(words: Path, tmp_path: Path) -> None:
    artifact = classifier(words)
    (tmp_path / "a.csv").write_text(
        'source,target\ngood,positive\nbad, negative \nsoup,"so, so"\nbread,1\ngood soup,\n'
    )
    named = {"good": [1], "bad": [0], "soup": [2], "bread": [1], "good soup": None}
    assert answers(tmp_path / "a.csv", artifact) == named
    rows = [{"source": "good", "target": 1}, {"source": "bad", "target": "0"}, {"source": "soup", "target": ["so, so"]}]
    assert answers(table(tmp_path, rows), artifact) == {"good": [1], "bad": [0], "soup": [2]}
    assert answers([("good", 2), ("bad", np.int64(0)), "soup"], artifact) == {"good": [2], "bad": [0], "soup": None}


def test_a_name_goes_before_a_number(words: Path) -> None:
    turned = classifier(words, labels={"0": "1", "1": "0", "2": "2"})
    assert answers([("good", "1"), ("bad", 1)], turned) == {"good": [0], "bad": [1]}


def test_several_labels_are_listed_or_marked(words: Path, tmp_path: Path) -> None:
    artifact = classifier(words, scores="sigmoid")
    rows = [
        {"source": "good", "target": "positive, negative"},
        {"source": "bad", "target": ["negative", "so, so"]},
        {"source": "soup", "target": "so, so"},  # whole, the name of one
        {"source": "bread", "target": []},
        {"source": "good soup", "target": [0, 1, 0]},
        {"source": "bad soup"},
    ]
    assert answers(table(tmp_path, rows), artifact) == {
        "good": [True, True, False],
        "bad": [True, False, True],
        "soup": [False, False, True],
        "bread": [False, False, False],
        "good soup": [False, True, False],
        "bad soup": None,
    }


def test_a_regression_has_numbers(words: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("source,target\ngood,4.5\nbad,-1e1\n")
    for scores in ("none", "sigmoid"):
        found = answers(tmp_path / "a.csv", classifier(words, scores=scores, outputs=ONE))
        assert found == {"good": [4.5], "bad": [-10]}
    assert answers([("good", [1, 2.5]), ("bad", "3, 4")], classifier(words, scores="none", outputs=TWO)) == {
        "good": [1, 2.5],
        "bad": [3, 4],
    }


def test_sources_alone_are_enough(words: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good soup\nbad bread\n")
    for outputs in (LOGITS, TOKEN_LOGITS, EMBEDDING):
        samples = read(tmp_path / "a.txt", classifier(words, outputs=outputs))
        assert [entry.answer for entry in samples.entries] == [None, None]
        assert samples.counts.references == 0


def test_references_are_counted(words: Path) -> None:
    samples = read([("good", 0), ("bad", 1), "soup"], classifier(words))
    assert samples.counts.references == 2
    assert sum(samples.part(index, index + 1).counts.references for index in range(3)) == 2
    assert read([("good", 0)], classifier(words)).sha256 != read([("good", 1)], classifier(words)).sha256


IDS = np.array([[2, 4, 0], [3, 4, 5], [2, 5, 0]])
MASK = np.array([[1, 1, 0], [1, 1, 1], [1, 1, 0]])


def of_arrays(labels: Any, artifact: Model, ids: Any = IDS, mask: Any = MASK) -> dict[tuple[int, ...], Any]:
    samples = read({"input_ids": ids, "attention_mask": mask, "labels": labels}, artifact)
    return {
        tuple(sample.feeds["input_ids"][0].tolist()): None if entry.answer is None else entry.answer.tolist()
        for sample, entry in zip(samples, samples.entries, strict=True)
    }


def test_arrays_have_labels_by_head(words: Path) -> None:
    plain: dict[str, Any] = {"type": "arrays"}
    label = model(words, plain, kind="encoder", outputs=LOGITS)
    assert of_arrays(np.array([2, 0, 1]), label) == {(2, 4): [2], (3, 4, 5): [0], (2, 5): [1]}
    assert of_arrays(np.array([[2], [0], [1]]), label) == {(2, 4): [2], (3, 4, 5): [0], (2, 5): [1]}
    several = model(words, {**plain, "scores": "sigmoid"}, kind="encoder", outputs=LOGITS)
    marks = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 1]])
    for dtype in (np.int64, np.float32, bool):
        assert of_arrays(marks.astype(dtype), several)[3, 4, 5] == [False, False, False]
    numbers = model(words, {**plain, "scores": "none"}, kind="encoder", outputs=ONE)
    assert of_arrays(np.array([0.5, 1, 2], np.float32), numbers) == {(2, 4): [0.5], (3, 4, 5): [1], (2, 5): [2]}


def test_tokens_have_labels_without_their_padding(words: Path) -> None:
    tokens = model(words, {"type": "arrays"}, kind="encoder", outputs=TOKEN_LOGITS)
    labels = np.array([[-100, 2, -100], [0, 1, 2], [1, 1, -100]])
    expected = {(2, 4): [-100, 2], (3, 4, 5): [0, 1, 2], (2, 5): [1, 1]}
    assert of_arrays(labels, tokens) == expected
    left = model(words, {"type": "arrays", "padding_side": "left"}, kind="encoder", outputs=TOKEN_LOGITS)
    turned = np.array([[-100, -100, 2], [0, 1, 2], [-100, 1, 1]])
    ids = np.array([[0, 2, 4], [3, 4, 5], [0, 2, 5]])
    assert of_arrays(turned, left, ids, MASK[:, ::-1]) == expected


LABEL = "target: expected a label, one of negative, positive, so, so, or its number; found "
WRONG: dict[str, tuple[dict[str, Any], list[Any], list[str]]] = {
    "no label of the model's": (
        {},
        [("good", "positve"), ("bad", 3), ("soup", "1"), ("bread", 1.5), ("good soup", -1), ("bad soup", "9" * 9999)],
        [
            f"item 0: {LABEL}'positve'",
            f"item 1: {LABEL}3",
            f"item 3: {LABEL}1.5",
            f"item 4: {LABEL}-1",
            f"item 5: {LABEL}'99999",
        ],
    ),
    "two of one": ({}, [("good", ["negative", "positive"])], [f"item 0: {LABEL}a list of 2"]),
    "none among several": (
        {"scores": "sigmoid"},
        [("good", "positive, grumpy"), ("bad", [0, 1]), ("soup", [0, 1, 2])],
        [
            f"item 0: {LABEL}'grumpy'",
            "item 1: target: expected a 0 or a 1 for each of 3 labels, or their names, found a list of 2",
            "item 2: target: expected a 0 or a 1 for each of 3 labels, or their names, found a list of 3",
        ],
    ),
    "no number": (
        {"scores": "none", "outputs": ONE},
        [("good", "very"), ("bad", [1, 2]), ("soup", "nan"), ("bread", 10**400)],
        [
            "item 0: target: expected a number, as the model gives, found 'very'",
            "item 1: target: expected a number, as the model gives, found a list of 2",
            "item 2: target: expected a number, as the model gives, found 'nan'",
            "item 3: target: expected a number, as the model gives, found 1000000",
        ],
    ),
    "of an embedding": (
        {"outputs": EMBEDDING},
        [("good", "bad"), ("soup", 1), "bread"],
        [
            "item 0: target: expected none, as no embedding is right or wrong; leave it out",
            "item 1: target: expected none",
        ],
    ),
    "words for tokens": (
        {"outputs": TOKEN_LOGITS},
        [("good soup", "O O"), ("bad soup", [0, 1, 1]), ("bread", [3]), ("bad", [0.5])],
        [
            "item 0: target: expected the number of each token's label, which text does not have; leave it out",
            "item 1: target: expected one for each of 2 tokens, and -100 for padding, found 3 in all",
            "item 2: target: expected 0 to 2, or -100, found 3",
            "item 3: target: expected the number of each token's label",
        ],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_reference_is_told_all_at_once(case: str, words: Path) -> None:
    given, data, parts = WRONG[case]
    with pytest.raises(InputError) as raised:
        read(data, classifier(words, **given))
    title, *lines = str(raised.value).splitlines()
    assert title.startswith("items: these data cannot calibrate this artifact")
    assert len(lines) == len(parts)
    for line, part in zip(sorted(lines), parts, strict=True):
        assert part in line


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros((2, 3), np.int64), r"labels: expected numbers \[3\] or \[3,L\], .*found int64 \[2, 3\]"),
        (np.zeros((3, 3, 1), np.int64), r"labels: expected numbers"),
        (np.array(["a", "b", "c"]), r"labels: expected numbers"),
        (np.full((3, 3), 7), r"arrays\[2\]: labels: expected 0 to 2, or -100, found 7"),
        (np.zeros((3, 2), np.int64), r"arrays\[1\]: labels: expected one for each of 3 tokens"),
        (np.zeros((3, 3), np.int64), r"arrays\[0\]: labels: expected one for each of 2 tokens, and -100 for padding"),
    ],
)
def test_arrays_of_labels_that_do_not_fit(labels: Any, message: str, words: Path) -> None:
    with pytest.raises(InputError, match=message):
        of_arrays(labels, model(words, {"type": "arrays"}, kind="encoder", outputs=TOKEN_LOGITS))


def test_models_that_generate_take_texts_alone(words: Path, tmp_path: Path) -> None:
    text = {"type": "text", "tokenizer": "tokenizer.json", "target_tokenizer": "tokenizer.json"}
    artifact = model(words, text)
    rows = [{"source": "good", "target": 1}, {"source": "bad", "target": ["bad"]}]
    with pytest.raises(InputError, match=r"(?s)data.jsonl:1: target: expected text or null, found 1.*jsonl:2: target"):
        read(table(tmp_path, rows), artifact)
    with pytest.raises(InputError, match="item 0: expected a reference text or None, found int"):
        read([("good", 1)], artifact)
