"""From a checkpoint's tokenizer and processors to what an artifact carries: tokenizer files and the "frontend" facts.

Everything that transformers decides from class names and configuration files is decided here, once, and written down as
data that ``runtime/text.py``, ``audio.py`` and ``image.py`` follow. It does not know the model.
"""

import json
import logging
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from txopt.exporter.spm import MARK, Converted, convert
from txopt.runtime.errors import MissingDependencyError, SourceError

logger = logging.getLogger(__name__)

Frontend = dict[str, Any]

TOKENIZER, TARGET_TOKENIZER = "tokenizer.json", "target_tokenizer.json"
_CHARACTERS = "spm_char.model"
_SENTENCEPIECE_FILES = (
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "tokenizer.model",
    "source.spm",
    _CHARACTERS,
)
_TOKENIZER_FILES = (TOKENIZER, "vocab.json", "vocab.txt", "prophetnet.tokenizer", *_SENTENCEPIECE_FILES)
_FSMT_VOCABULARY = "vocab-src.json"
_NO_LIMIT = 1 << 20  # tokenizers without a limit carry an absurd one
_LANGUAGE_TOKEN = re.compile(r"[a-z]{3}_[A-Z][a-z]{3}")  # NLLB
_AUDIO: Frontend = {
    "feature_size": 80,
    "sampling_rate": 16000,
    "n_fft": 400,
    "hop_length": 160,
    "chunk_length": 30,
    "padding_value": 0.0,
    "dither": 0.0,
}
_IMAGE_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
_IMAGE_NUMBERS = ("size", "resample", "crop_size", "rescale_factor", "image_mean", "image_std")
_IMAGE_METHODS = ("_preprocess", "resize", "center_crop", "rescale", "normalize")


def collect(source: Path, task: str, family: str, staging: Path, *, source_limit: int | None = None) -> Frontend:
    """Writes tokenizer files into ``staging`` and returns the manifest's "frontend".

    Args:
        source: a checkpoint directory.
        task: the manifest's; "speech-to-text" and "image-to-text" ask for features, everything else for text.
        family: the manifest's; "whisper" has known features where the checkpoint does not say.
        staging: an existing directory.
        source_limit: most tokens that the model's positions can hold; a tokenizer may ask for fewer.

    Returns:
        type "text", "audio", "waveform", "image" or, where the checkpoint has no tokenizer or processor that fits, "arrays".

    Raises:
        SourceError: tokenizer or processor files that cannot be read.
        MissingDependencyError: sentencepiece is needed and missing.
    """
    features = _audio(source, family) or _image(source)
    if features is None and (task.startswith(("speech", "image")) or family == "whisper"):
        features = {"type": "arrays"}
    text = _text(source, task, staging)
    if features is None:
        if text is not None and source_limit is not None:
            text["max_source_length"] = min(text["max_source_length"] or source_limit, source_limit)
        return text or {"type": "arrays"}
    if text is not None:
        kept = ("tokenizer", "target_tokenizer", "clean_up_tokenization_spaces", "pad_token_id")
        features |= {key: text[key] for key in kept if key in text}
    if features["type"] == "audio":
        _speech_tokens(source, features, staging)
    return features


def collect_files(
    source: Path, target: Path | None, staging: Path, *, pad_token_id: int = 0, source_limit: int | None = None
) -> Frontend:
    """The text front end of a model of one's own, which names its tokenizers files; ``target`` None: the source's.

    Raises:
        SourceError: a file that is missing or not a tokenizer.
    """
    frontend: Frontend = {"type": "text", "add_special_tokens": True, "max_source_length": source_limit}
    frontend["pad_token_id"] = pad_token_id
    for key, path in (("tokenizer", source), ("target_tokenizer", target)):
        if path is not None:
            frontend[key] = TOKENIZER if key == "tokenizer" else TARGET_TOKENIZER
            try:
                tokenizer = Tokenizer.from_file(str(path))
            except Exception as err:  # what tokenizers raises is a bare Exception
                raise SourceError(f"{path}: expected a file that tokenizers wrote, found: {err}") from err
            _save(tokenizer, staging / frontend[key])
    return frontend


def _text(source: Path, task: str, staging: Path) -> Frontend | None:
    """The text front end, or None where the checkpoint has no tokenizer, or one that cannot be written down."""
    if (source / _FSMT_VOCABULARY).is_file():
        logger.warning(
            "%s: FSMTTokenizer splits words with Moses' rules, which no tokenizer file holds, so the artifact takes and gives ids",
            source.name,
        )
        return None
    if not any((source / name).is_file() for name in _TOKENIZER_FILES):
        return None
    tokenizer = _load_tokenizer(source)
    frontend: Frontend = {
        "type": "text",
        "tokenizer": TOKENIZER,
        "max_source_length": _limit(tokenizer),
        "add_special_tokens": True,
        "pad_token_id": next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0),
        "padding_side": "left" if task == "text-generation" else "right",
        "clean_up_tokenization_spaces": _cleans_up(tokenizer),
    }
    name = type(tokenizer).__name__
    if name == "MarianTokenizer":
        return frontend | _marian(source, tokenizer, staging)
    if name == "SpeechT5Tokenizer":
        backend = _characters(tokenizer)
    elif name == "ProphetNetTokenizer" and tokenizer.do_basic_tokenize:
        backend = _word_pieces(tokenizer)
    elif name == "M2M100Tokenizer":
        backend = _m2m100(source, tokenizer, frontend)
    elif hasattr(tokenizer, "backend_tokenizer"):
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    else:
        logger.warning("%s: %s has no fast tokenizer, so the artifact takes and gives ids", source.name, name)
        return None
    if hasattr(tokenizer, "src_lang") and hasattr(tokenizer, "prefix_tokens"):
        frontend |= _languages(tokenizer)
    _save(backend, staging / TOKENIZER)
    return frontend


def _load_tokenizer(source: Path) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Marian's advice to install sacremoses, which tokenization does not use
        try:
            return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except ImportError as err:
            raise MissingDependencyError(
                f"{source}: its tokenizer needs a package that is not installed: {err}"
            ) from err
        except Exception as err:  # transformers lets whatever its many tokenizers raise pass
            raise SourceError(
                f"{source}: the tokenizer cannot be read: {err}; mend its files, or take them away"
            ) from err


def _limit(tokenizer: Any) -> int | None:
    limit = tokenizer.model_max_length
    return int(limit) if limit and limit < _NO_LIMIT else None


def _cleans_up(tokenizer: Any) -> bool:
    """Whether transformers' decode() removes spaces before punctuation; for BPE it does not, whatever is set."""
    wanted = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return wanted and (backend is None or type(backend.model).__name__ != "BPE" or bool(forced))


def _marian(source: Path, tokenizer: Any, staging: Path) -> Frontend:
    """Two sentencepiece models, one vocabulary (or two); the target's language may stand before the text: >>fra<<."""
    vocabulary = source / "vocab.json"
    target_vocabulary = source / "target_vocab.json" if tokenizer.separate_vocabs else vocabulary
    _marian_half(source / "target.spm", target_vocabulary, tokenizer, staging / TARGET_TOKENIZER)
    converted = _marian_half(source / "source.spm", vocabulary, tokenizer, staging / TOKENIZER)
    return {
        "target_tokenizer": TARGET_TOKENIZER,
        "unknown_from": converted.unknown_from,
        "unknown_prefix": MARK,
        "unk_token_id": tokenizer.encoder[tokenizer.unk_token],
        "languages": {code[2:-2]: tokenizer.encoder[code] for code in tokenizer.supported_language_codes},
        "language_marks": [">>", "<<"],
        "source_template": ["target_language", "text", tokenizer.encoder[tokenizer.eos_token]],
    }


def _marian_half(spm: Path, vocabulary: Path, tokenizer: Any, out: Path) -> Converted:
    known = _json(vocabulary)
    converted = convert(spm, vocabulary, special=[token for token in tokenizer.all_special_tokens if token in known])
    end = tokenizer.eos_token
    converted.tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", "$B", end], special_tokens=[(end, known[end])]
    )
    _save(converted.tokenizer, out)
    return converted


def _characters(tokenizer: Any) -> Tokenizer:
    """SpeechT5's pieces are characters, as a tokenizer that says them; it speaks, and is given nothing to read."""
    vocabulary = tokenizer.get_vocab()
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=tokenizer.unk_token))
    backend.decoder = decoders.Metaspace()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    backend.add_special_tokens(sorted(special | set(tokenizer.all_special_tokens), key=vocabulary.__getitem__))
    return backend


def _word_pieces(tokenizer: Any) -> Tokenizer:
    """ProphetNet's, which is BERT's of old with one token around a text instead of two."""
    basic, vocabulary = tokenizer.basic_tokenizer, tokenizer.get_vocab()
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=tokenizer.unk_token))
    bert = normalizers.BertNormalizer(
        handle_chinese_chars=basic.tokenize_chinese_chars,
        strip_accents=basic.strip_accents,
        lowercase=basic.do_lower_case,
    )
    # Code points that are not assigned are control characters to Python's version of it, and left in by this one.
    backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"[\p{Cn}\p{Co}]"), ""), bert])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    end = tokenizer.sep_token
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, vocabulary[end])]
    )
    backend.add_special_tokens(sorted(set(tokenizer.all_special_tokens), key=vocabulary.__getitem__))
    return backend


def _m2m100(source: Path, tokenizer: Any, frontend: Frontend) -> Tokenizer:
    """Languages sit after the vocabulary, so the pieces that have no embedding start after the languages."""
    spm = next(path for name in ("sentencepiece.bpe.model", "spm.model") if (path := source / name).is_file())
    known = _json(source / "vocab.json")
    extra = [(token, index) for token, index in tokenizer.lang_token_to_id.items() if token not in known]
    names = dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.lang_token_to_id])
    special = [token for token in names if token in known or token in dict(extra)]
    converted = convert(spm, source / "vocab.json", special=special, extra=extra)
    frontend |= {"unknown_from": converted.unknown_from, "unknown_prefix": MARK, "unk_token_id": tokenizer.unk_token_id}
    return converted.tokenizer


def _languages(tokenizer: Any) -> Frontend:
    """M2M100, NLLB, mBART: a language token before or after the source; the target's is forced as the first output."""
    ids: Mapping[str, int] | None = getattr(tokenizer, "lang_code_to_id", None)
    if ids is None:
        ids = {token: index for token, index in tokenizer.get_vocab().items() if _LANGUAGE_TOKEN.fullmatch(token)}
    language = ids.get(tokenizer.src_lang)
    if language is None:
        raise SourceError(
            f"the tokenizer has no token for its source language {tokenizer.src_lang!r}: add a tokenizer.json"
        )
    around = [*tokenizer.prefix_tokens, "text", *tokenizer.suffix_tokens]
    frontend: Frontend = {
        "languages": dict(sorted(ids.items())),
        "source_language": tokenizer.src_lang,
        "source_template": ["source_language" if item == language else item for item in around],
    }
    if tokenizer.tgt_lang is not None:
        frontend["target_language"] = tokenizer.tgt_lang
    return frontend


def _audio(source: Path, family: str) -> Frontend | None:
    saved = _processor(source, "feature_extractor")
    kind = saved.get("feature_extractor_type", "WhisperFeatureExtractor" if family == "whisper" else None)
    if kind == "SpeechT5FeatureExtractor":
        known = {"sampling_rate": 16000, "padding_value": 0.0, "do_normalize": False}
        return {"type": "waveform", **{key: saved.get(key, value) for key, value in known.items()}}
    if kind != "WhisperFeatureExtractor":
        return None
    frontend: Frontend = {"type": "audio", **_AUDIO}
    if family == "whisper":
        frontend["feature_size"] = _json(source / "config.json").get("num_mel_bins", 80)
    return frontend | {key: saved[key] for key in _AUDIO if key in saved}


def _speech_tokens(source: Path, frontend: Frontend, staging: Path) -> None:
    """Language, task and timestamp ids: generation_config.json's, and the tokenizer's where it does not say."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES, TASK_IDS, TO_LANGUAGE_CODE

    generation = _json(source / "generation_config.json")
    vocabulary: dict[str, int] = {}
    if "tokenizer" in frontend:
        vocabulary = Tokenizer.from_file(str(staging / TOKENIZER)).get_vocab()
    languages = generation.get("lang_to_id") or {t: vocabulary[t] for c in LANGUAGES if (t := f"<|{c}|>") in vocabulary}
    tasks = generation.get("task_to_id") or {t: vocabulary[f"<|{t}|>"] for t in TASK_IDS if f"<|{t}|>" in vocabulary}
    # Whisper's English-only vocabulary is one token shorter than the multilingual one.
    multilingual = generation.get("is_multilingual", _json(source / "config.json").get("vocab_size", 0) >= 51865)
    frontend["multilingual"] = bool(multilingual) and bool(languages)
    frontend["lang_to_id"] = languages if frontend["multilingual"] else {}
    frontend["task_to_id"] = tasks if frontend["multilingual"] else {}
    frontend["language_names"] = {
        name: code for name, code in sorted(TO_LANGUAGE_CODE.items()) if f"<|{code}|>" in frontend["lang_to_id"]
    }
    silent = generation.get("no_timestamps_token_id", vocabulary.get("<|notimestamps|>"))
    if silent is not None:
        frontend |= {"no_timestamps_token_id": silent, "timestamp_begin": silent + 1}


def check_images(frontend: Frontend, expected: tuple[Any, Any]) -> None:
    """Warns where the processor makes images of another height and width than the graph's fixed ones, ``expected``."""
    key = next(
        (key for step, key in (("do_center_crop", "crop_size"), ("do_resize", "size")) if frontend.get(step)), None
    )
    size = frontend.get(key or "", {})
    made = size.get("height"), size.get("width")
    if None not in made and made != expected:
        logger.warning(
            "the processor makes images of %s x %s (height x width), the model takes %s x %s: its images will be refused; "
            "correct preprocessor_config.json, or give arrays",
            *made,
            *expected,
        )


def _image(source: Path) -> Frontend | None:
    """The steps of a plain image processor, or None where there is none or it has steps of its own."""
    if not _processor(source, "image_processor"):
        return None
    from transformers import AutoImageProcessor
    from transformers.image_processing_backends import PilBackend

    try:
        processor = AutoImageProcessor.from_pretrained(
            source, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as err:  # as for tokenizers
        raise SourceError(f"{source}: the image processor cannot be read: {err}; mend its JSON file") from err
    kind, settings = type(processor), processor.to_dict()
    frontend: Frontend = {"type": "image", **{step: bool(settings.get(step)) for step in _IMAGE_STEPS}}
    for key in _IMAGE_NUMBERS:
        if (value := settings.get(key)) is not None:
            frontend[key] = list(value) if isinstance(value, tuple) else value
    plain = all(getattr(kind, method, None) is getattr(PilBackend, method) for method in _IMAGE_METHODS)
    sized = not frontend["do_resize"] or set(frontend["size"]) in ({"height", "width"}, {"shortest_edge"})
    if not plain or not sized or settings.get("do_pad"):
        logger.warning(
            "%s: %s has steps that txopt does not repeat, so the artifact takes pixels", source.name, kind.__name__
        )
        return None
    return frontend


def _processor(source: Path, part: str) -> dict[str, Any]:
    """The saved feature extractor or image processor: on its own, or inside processor_config.json."""
    inside = _json(source / "processor_config.json").get(part)
    if inside:
        return dict(inside)
    alone = _json(source / "preprocessor_config.json")
    is_image = "image_processor_type" in alone or "image_mean" in alone
    return alone if is_image == (part == "image_processor") else {}


def _save(tokenizer: Tokenizer, path: Path) -> None:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(path), pretty=False)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise SourceError(f"{path}: expected JSON, found something else: {err}") from err
    if not isinstance(value, dict):
        raise SourceError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
