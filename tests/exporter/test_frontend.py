"""What a checkpoint says of text, sound and images means in the artifact what it means to transformers."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, WhisperFeatureExtractor
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.donut.image_processing_pil_donut import DonutImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests import tiny_tokenizers as tiny
from txopt.exporter.frontend import check_images, collect, collect_files
from txopt.runtime.audio import AudioFrontend, decoder_prompt
from txopt.runtime.errors import SourceError
from txopt.runtime.image import ImageFrontend
from txopt.runtime.text import TextDecoder, TextFrontend

pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")

Maker = Callable[[Path], Path]
TEXT: dict[str, Maker] = {
    "bert": tiny.bert,
    "prophetnet": tiny.prophetnet,
    "t5": tiny.t5,
    "gpt2": tiny.gpt2,
    "marian": tiny.marian,
    "marian, BPE": partial(tiny.marian, model_type="bpe"),
    "marian, many targets": partial(tiny.marian, codes=(">>deu<<", ">>fra<<")),
    "m2m_100": tiny.m2m100,
    "mbart": tiny.mbart,
    "nllb": tiny.nllb,
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def samples(count: int) -> list[str]:
    """Sentences, and words in any order with characters that no tokenizer here was trained on."""
    words = " ".join(tiny.ENGLISH + tiny.GERMAN).split()
    words += [*"ßäöüWZ漢字Ω…½ﬁ12,.!?'\"▁\u3000\t\n", "  ", "</s>", "<unk>", "e\u0301", "\u200b", "ｶﾞ", "\U0010ffff"]
    words += [">>deu<<", ">>zzz<<", "👨‍👩‍👧"]
    source = random.Random(0)
    made = [
        "".join(source.choice(words) + source.choice(["", " ", " "]) for _ in range(source.randint(1, 8)))
        for _ in range(count)
    ]
    return [*tiny.SENTENCES, *made]


@pytest.mark.parametrize("name", TEXT)
def test_texts_become_the_ids_transformers_gives(name: str, tmp_path: Path, out: Path) -> None:
    source = TEXT[name](tmp_path / "source")
    frontend = collect(source, "text-to-text", name.split(",")[0], out)
    assert frontend["type"] == "text"
    assert json.loads(json.dumps(frontend)) == frontend
    text, reference = TextFrontend(out, frontend), AutoTokenizer.from_pretrained(source)
    cut = frontend["max_source_length"] is not None
    for sample in samples(300):
        assert text.encode([sample])["input_ids"][0].tolist() == reference([sample], truncation=cut)["input_ids"][0]


@pytest.mark.parametrize("name", TEXT)
def test_ids_become_the_text_transformers_gives(name: str, tmp_path: Path, out: Path) -> None:
    source = TEXT[name](tmp_path / "source")
    text = TextFrontend(out, collect(source, "text-to-text", name.split(",")[0], out))
    reference = AutoTokenizer.from_pretrained(source)
    size = reference.vocab_size if name.startswith("marian") else len(reference)
    for length in range(1, 60):
        ids = np.random.default_rng(length).integers(0, size, length % 12 + 1)
        assert text.decode(ids) == reference.batch_decode([ids.tolist()], skip_special_tokens=True)[0]


@pytest.mark.parametrize("name", ["bert", "t5", "marian", "gpt2"])
def test_batches_are_padded_as_transformers_does(name: str, tmp_path: Path, out: Path) -> None:
    source = TEXT[name](tmp_path / "source")
    task = "text-generation" if name == "gpt2" else "text-to-text"
    text = TextFrontend(out, collect(source, task, name, out))
    reference = AutoTokenizer.from_pretrained(source)
    if name == "gpt2":
        reference.pad_token, reference.padding_side = reference.eos_token, "left"
    expected = reference(tiny.SENTENCES, padding=True, truncation=name != "gpt2", return_tensors="np")
    for key, value in text.encode(tiny.SENTENCES).items():
        np.testing.assert_array_equal(value, expected[key])


@pytest.mark.parametrize(
    ("name", "source_code", "target_code"),
    [("m2m_100", "de", "fr"), ("mbart", "de_DE", "ro_RO"), ("nllb", "deu_Latn", "fra_Latn")],
)
def test_languages_are_transformers(name: str, source_code: str, target_code: str, tmp_path: Path, out: Path) -> None:
    source = TEXT[name](tmp_path / "source")
    text = TextFrontend(out, collect(source, "text-to-text", name, out))
    reference = AutoTokenizer.from_pretrained(source, src_lang=source_code)
    for sample in tiny.SENTENCES:
        ids = text.encode([sample], source_language=source_code)["input_ids"][0].tolist()
        assert ids == reference([sample])["input_ids"][0]
    expected = reference._build_translation_inputs("x", src_lang=source_code, tgt_lang=target_code, return_tensors="np")
    assert text.forced_bos_token_id(target_code) == expected["forced_bos_token_id"]


def test_marian_targets_are_said_in_the_source(tmp_path: Path, out: Path) -> None:
    source = TEXT["marian, many targets"](tmp_path / "source")
    text = TextFrontend(out, collect(source, "text-to-text", "marian", out))
    reference = AutoTokenizer.from_pretrained(source)
    expected = reference([">>fra<< The old man."])["input_ids"]
    assert text.encode(["The old man."], target_language="fra")["input_ids"].tolist() == expected
    assert text.encode([">>fra<< The old man."])["input_ids"].tolist() == expected
    assert text.forced_bos_token_id("fra") is None


def test_marian_with_two_vocabularies(tmp_path: Path, out: Path) -> None:
    source = tiny.marian(tmp_path / "source")
    words = [*tiny.pieces(source / "target.spm"), "<pad>"]
    (source / "target_vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"separate_vocabs": True}))
    text = TextFrontend(out, collect(source, "text-to-text", "marian", out))
    reference = AutoTokenizer.from_pretrained(source)
    for sample in samples(30):
        assert text.encode([sample])["input_ids"][0].tolist() == reference([sample])["input_ids"][0]
    # spm alone, without special tokens: transformers takes the source's ids for the target's special tokens
    ids = [words.index(piece) for piece in ("▁", "D", "er", "▁", "M", "a", "n", "n") if piece in words]
    assert text.decode(ids) == "".join(words[index] for index in ids).replace("▁", " ").strip()


def test_the_models_positions_limit_the_source(tmp_path: Path, out: Path) -> None:
    source = tiny.t5(tmp_path / "source")
    assert collect(source, "text-to-text", "t5", out)["max_source_length"] == 512
    assert collect(source, "text-to-text", "t5", out, source_limit=64)["max_source_length"] == 64
    assert collect(source, "text-to-text", "t5", out, source_limit=4096)["max_source_length"] == 512
    source = tiny.gpt2(tmp_path / "other")
    assert collect(source, "text-generation", "gpt2", out, source_limit=64)["max_source_length"] == 64


@pytest.mark.parametrize("name", ["bert", "marian", "m2m_100", "nllb"])
def test_files_are_the_same_bytes_each_time(name: str, tmp_path: Path, out: Path) -> None:
    source = TEXT[name](tmp_path / "source")
    again = tmp_path / "again"
    again.mkdir()
    assert collect(source, "text-to-text", name, out) == collect(source, "text-to-text", name, again)
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in again.iterdir())
    for path in out.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()


@pytest.mark.parametrize("task", ["text-to-text", "speech-to-text", "image-to-text", "text-generation"])
def test_a_checkpoint_without_tokenizer_takes_arrays(task: str, tmp_path: Path, out: Path) -> None:
    source = tiny.write_config(tmp_path / "source", model_type="bart")
    assert collect(source, task, "bart", out) == {"type": "arrays"}
    assert list(out.iterdir()) == []


def test_a_tokenizer_with_rules_of_its_own_is_named_and_left_out(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FSMT's asks sacremoses, which an artifact does not need to be installed."""
    for name in ("vocab-src.json", "vocab-tgt.json"):
        (tmp_path / name).write_text("{}")
    assert collect(tmp_path, "text-to-text", "fsmt", out) == {"type": "arrays"}
    assert "FSMTTokenizer" in caplog.text


def test_damaged_tokenizers_are_named(tmp_path: Path, out: Path) -> None:
    source = tiny.write_config(tmp_path / "source", model_type="bert")
    (source / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="the tokenizer cannot be read"):
        collect(source, "embedding", "bert", out)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda source: (source / "vocab.json").write_text('{"<unk>": 0, "</s>": 5}'), "found gaps or repeats"),
        (lambda source: tiny.train_sentencepiece(source / "source.spm", tiny.ENGLISH, 30, "char"), "unigram or BPE"),
    ],
)
def test_damaged_marian_files_are_named(
    damage: Callable[[Path], object], message: str, tmp_path: Path, out: Path
) -> None:
    source = tiny.marian(tmp_path / "source")
    damage(source)
    with pytest.raises(SourceError, match=message):
        collect(source, "text-to-text", "marian", out)


def test_tokenizers_of_a_model_of_ones_own(tmp_path: Path, out: Path) -> None:
    path = tmp_path / "mine.json"
    tiny.byte_level(["<pad>"]).save(str(path))
    frontend = collect_files(path, None, out, pad_token_id=7, source_limit=20)
    text = TextFrontend(out, frontend)
    assert text.decode(text.encode(["a frog"])["input_ids"][0]) == "a frog"
    assert set(collect_files(path, path, out)) >= {"tokenizer", "target_tokenizer"}
    with pytest.raises(SourceError, match=r"none\.json: expected a file that tokenizers wrote"):
        collect_files(tmp_path / "none.json", None, out)


def test_whisper_that_knows_english(tmp_path: Path, out: Path) -> None:
    source = tiny.whisper(tmp_path / "source", multilingual=False)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(source)
    frontend = collect(source, "speech-to-text", "whisper", out)
    assert frontend["type"] == "audio"
    assert frontend["feature_size"] == 80
    assert not frontend["multilingual"]
    assert AudioFrontend(frontend).features(np.zeros(100, np.float32)).shape == (1, 80, 3000)
    assert decoder_prompt(frontend, {"decoder_start_token_id": 301}) == [301, frontend["no_timestamps_token_id"]]


def test_whisper_that_knows_languages(tmp_path: Path, out: Path) -> None:
    """Without preprocessor_config.json: the number of mel bands is the model's."""
    source = tiny.whisper(tmp_path / "source", multilingual=True)
    frontend = collect(source, "speech-to-text", "whisper", out)
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert frontend["feature_size"] == 128
    prompt = decoder_prompt(frontend, {"decoder_start_token_id": 301}, language="german", task="translate")
    assert tokenizer.convert_ids_to_tokens(prompt[1:]) == ["<|de|>", "<|translate|>", "<|notimestamps|>"]
    decoder = TextDecoder(out, frontend)
    for seed in range(30):
        ids = np.random.default_rng(seed).integers(0, len(tokenizer), 10).tolist()
        if tokenizer.convert_tokens_to_ids("<|startofprev|>") not in ids[:1]:  # a prompt, which transformers cuts off
            assert decoder.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)


def test_whisper_without_generation_config_asks_its_tokenizer(tmp_path: Path, out: Path) -> None:
    source = tiny.whisper(tmp_path / "source", multilingual=True)
    stated = collect(source, "speech-to-text", "whisper", out)
    (source / "generation_config.json").unlink()
    tiny.write_config(source, model_type="whisper", num_mel_bins=128, vocab_size=51865)
    assert collect(source, "speech-to-text", "whisper", out) == stated
    tiny.write_config(source, model_type="whisper", num_mel_bins=128, vocab_size=51864)
    assert not collect(source, "speech-to-text", "whisper", out)["multilingual"]


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 32, "width": 24}, resample=3),
        DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    ],
)
def test_image_processors(processor: Any, tmp_path: Path, out: Path) -> None:
    source = tiny.t5(tmp_path / "source")
    processor.save_pretrained(source)
    frontend = collect(source, "image-to-text", "vision-encoder-decoder", out)
    assert json.loads(json.dumps(frontend)) == frontend
    assert frontend["type"] == "image"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    reference = AutoImageProcessor.from_pretrained(source, backend="pil")
    expected = reference(image, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(ImageFrontend(frontend).encode([image])["pixel_values"], expected, rtol=0, atol=1e-5)
    assert TextDecoder(out, frontend).decode([1]) == ""


def test_an_old_image_processor_file(tmp_path: Path, out: Path) -> None:
    """As TrOCR's checkpoints carry it: a feature extractor's name, and one number for the size."""
    source = tiny.write_config(tmp_path / "source", model_type="vision-encoder-decoder")
    saved = {"feature_extractor_type": "ViTFeatureExtractor", "size": 384, "resample": 2, "do_resize": True}
    saved |= {"do_normalize": True, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (source / "preprocessor_config.json").write_text(json.dumps(saved))
    frontend = collect(source, "image-to-text", "vision-encoder-decoder", out)
    assert frontend["size"] == {"height": 384, "width": 384}
    assert "tokenizer" not in frontend
    image = Image.new("RGB", (30, 30), (255, 0, 127))
    assert ImageFrontend(frontend).encode([image])["pixel_values"].shape == (1, 3, 384, 384)


def test_image_processors_with_steps_of_their_own_take_arrays(
    tmp_path: Path, out: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tiny.t5(tmp_path / "source")
    DonutImageProcessorPil().save_pretrained(source)
    frontend = collect(source, "image-to-text", "vision-encoder-decoder", out)
    assert frontend["type"] == "arrays"
    assert frontend["tokenizer"] == "tokenizer.json"
    assert "steps that txopt does not repeat" in caplog.text


@pytest.mark.parametrize(
    ("frontend", "warns"),
    [
        ({"do_resize": True, "size": {"height": 64, "width": 32}}, True),
        ({"do_resize": True, "size": {"height": 32, "width": 64}}, False),
        (
            {
                "do_resize": True,
                "size": {"shortest_edge": 8},
                "do_center_crop": True,
                "crop_size": {"height": 8, "width": 8},
            },
            True,
        ),
        ({"do_resize": True, "size": {"shortest_edge": 32}}, False),
        ({"do_resize": False}, False),
    ],
)
def test_images_that_the_model_does_not_take_are_told(
    frontend: dict[str, Any], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    check_images(frontend, (32, 64))
    assert ("the model takes 32 x 64" in caplog.text) == warns
