"""Text, sound and images around a model: the pieces of a stream are the text, and what is no source is told so."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models

from tests.runtime.test_audio import CLIP
from tests.runtime.test_audio import FRONTEND as AUDIO
from tests.tiny_tokenizers import byte_level
from txopt.runtime.decoder import Ids
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.pipeline import Pipeline
from txopt.runtime.text import TextFrontend

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
WORDS = ["▁it", "▁does", "▁n't", "'t", "▁n", "▁'", "'", "▁.", ".", "▁", "s", "ve", "▁re", "▁漢", "<s>", "�"]


def byte_fallback() -> Tokenizer:
    """As sentencepiece's: bytes where the vocabulary ends, unreadable all together if one of a run does not fit."""
    vocabulary = BYTES | {word: 256 + index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def words(decoder: Any) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        pieces = ["it", "##s", "do", "##es", "n't", "'", "'m", ".", "!", ",", "▁on", "on</w>", "s", "ve", "[SEP]", "re"]
        tokenizer = Tokenizer(models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="it"))
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["[SEP]"])
        return tokenizer

    return make


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": lambda: byte_level(["<|endoftext|>"]),
    "byte fallback": byte_fallback,
    "word pieces": words(decoders.WordPiece(cleanup=True)),
    "byte pairs": words(decoders.BPEDecoder()),
    "metaspace": words(decoders.Metaspace()),
}


class Says:
    """A model that says ``ids``, whatever it is asked; a decoder alone says the prompt first."""

    def __init__(
        self, ids: list[int], directory: Path, frontend: dict[str, Any], kind: str = "encoder-decoder"
    ) -> None:
        self.manifest = SimpleNamespace(frontend=frontend, kind=kind, generation={"decoder_start_token_id": 0})
        self.artifact = SimpleNamespace(path=directory)
        self.ids = ids

    def generate(self, *, input_ids: Any = None, decoder_input_ids: Any = None, **rest: Any) -> Any:
        start = input_ids if self.manifest.kind == "decoder" else decoder_input_ids
        prompt = [0] if start is None else np.asarray(start)[0].tolist()
        return SimpleNamespace(sequences=np.array([prompt + self.ids], np.int64))

    def stream(self, **rest: Any) -> Iterator[Ids]:
        return (np.array([token]) for token in self.ids)


def pipeline(*arguments: Any, **more: Any) -> Pipeline:
    return Pipeline(cast(Any, Says(*arguments, **more)))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizers")
    for name, make in TOKENIZERS.items():
        make().save(str(directory / name))
    return directory


def frontend(tokenizer: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "tokenizer": tokenizer, **more}


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_the_pieces_of_a_stream_are_the_text_whatever_the_ids(tokenizer: str, clean: bool, directory: Path) -> None:
    facts = frontend(tokenizer, clean_up_tokenization_spaces=clean)
    text = TextFrontend(directory, facts)
    text.encode = lambda *_, **__: {"input_ids": np.array([[1]])}  # type: ignore[method-assign]
    size = Tokenizer.from_file(str(directory / tokenizer)).get_vocab_size()
    said = pipeline([], directory, facts)
    said._input = said._text = text

    @given(st.lists(st.integers(0, size + 1), max_size=24))
    def holds(ids: list[int]) -> None:
        cast(Any, said)._model.ids = ids
        pieces = list(said.stream("it"))
        assert "".join(pieces) == said("it")
        assert all(pieces)

    holds()


@pytest.mark.parametrize(
    ("tokenizer", "clean", "tokens", "pieces"),
    [
        ("bytes", False, "Ġ|a|æ|¼|¢|b", [" ", "a", "漢", "b"]),
        ("bytes", False, "a|æ|¼", ["a", "�"]),
        ("bytes", False, "a|æ|b", ["a", "�b"]),
        ("byte fallback", False, "▁it|<0xE6>|<0xBC>|<0xA2>|▁it", ["it", "漢 it"]),
        ("byte fallback", False, "▁it|<0xE6>|<0xBC>|<0xA2>|<0xFF>|<s>|s", ["it", "����s"]),
        ("byte fallback", True, "▁does|▁n|'t|▁it|▁.", ["doe", "sn't i", "t."]),
    ],
)
def test_a_piece_waits_only_for_what_may_change_it(
    tokenizer: str, clean: bool, tokens: str, pieces: list[str], directory: Path
) -> None:
    known = Tokenizer.from_file(str(directory / tokenizer))
    ids = [known.token_to_id(token) for token in tokens.split("|")]
    assert None not in ids
    facts = frontend(tokenizer, clean_up_tokenization_spaces=clean)
    assert list(pipeline(ids, directory, facts).stream("it")) == pieces


def test_a_decoders_stream_begins_with_its_prompt_as_its_text_does(directory: Path) -> None:
    said = pipeline([260], directory, frontend("bytes"), "decoder")
    pieces = list(said.stream("a frog"))
    assert "".join(pieces) == said("a frog")
    assert pieces[0].startswith("a frog")


def test_a_start_prompt_of_the_callers_own_is_no_text(directory: Path) -> None:
    said = pipeline([65, 66], directory, frontend("bytes"))
    assert (
        said("a", decoder_input_ids=[[0, 5, 6]])
        == said("a")
        == "".join(said.stream("a", decoder_input_ids=[[0, 5, 6]]))
    )
    heard = pipeline([65, 66], directory, AUDIO)
    assert heard([CLIP], decoder_input_ids=[[0, 5, 6]]) == ["65 66"]


SAMPLES = np.zeros(1600, np.float32)
IMAGE: dict[str, Any] = {"type": "image", "do_rescale": True, "rescale_factor": 1 / 255}
LISTS: tuple[tuple[dict[str, Any], Any, str], ...] = (
    (AUDIO, SAMPLES, r"float arrays of samples; put one sound into a list: \[samples\]; got ndarray"),
    (AUDIO, CLIP, r"a list of paths.*got (Posix|Windows)Path"),
    (AUDIO, b"RIFF", "a list of paths, open files.*got bytes"),
    (AUDIO, [0.0, 0.5, 0.0], r"sound 0: expected a path, .*array of samples, found float; .*\[np.array\(samples"),
    (AUDIO, [SAMPLES, [0.0, 0.5]], r"sound 1: expected a path, .* found list; .*\[np.array\(samples"),
    (AUDIO, [None], "sound 0: expected a path, .* found NoneType"),
    (IMAGE, Image.new("RGB", (2, 2)), r"Pillow images; put one image into a list: \[image\]; got Image"),
    (IMAGE, [np.zeros((2, 2, 3), np.uint8)], "Pillow image, found ndarray; .*PIL.Image.fromarray"),
    (IMAGE, [[0, 0, 0]], "Pillow image, found list"),
    ({}, 5, "a str or a list of them .*got int"),
    ({}, None, "a str or a list of them .*got NoneType"),
    ({}, b"a frog", "a str or a list of them .*got bytes"),
    ({}, np.array([[4, 5]]), r"ids go to model.generate\(input_ids=...\).*got ndarray"),
    ({}, [np.array([4, 5])], "text 0: expected str, found ndarray"),
    ({}, ["a", 5, None], "(?s)text 1: expected str, found int.*text 2: expected str, found NoneType"),
    ({}, [], "at least one text"),
)


@pytest.mark.parametrize(("facts", "sources", "message"), LISTS)
def test_what_is_no_source_is_told_what_to_give(
    facts: dict[str, Any], sources: Any, message: str, directory: Path
) -> None:
    asked = pipeline([65], directory, facts or frontend("bytes"))
    with pytest.raises(InputError, match=message):
        asked(sources)
    with pytest.raises(InputError, match=message):
        asked.prepare(sources)


def test_one_source_is_streamed(directory: Path) -> None:
    with pytest.raises(InputError, match="text 0: expected str, found list"):
        list(pipeline([65], directory, frontend("bytes")).stream(["a"]))


def test_one_path_as_a_str_is_one_source(directory: Path) -> None:
    heard = pipeline([65, 66], directory, AUDIO)
    assert heard(str(CLIP)) == "65 66"
    assert heard.prepare(str(CLIP))[0]["input_features"].shape[0] == 1


def test_an_artifact_of_arrays_has_no_pipeline(directory: Path) -> None:
    with pytest.raises(UsageError, match=r"give arrays, model.generate\(input_ids=...\)"):
        pipeline([], directory, {"type": "arrays"})("a")
