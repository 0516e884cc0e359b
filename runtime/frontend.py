"""What a manifest may say of its front end: the type and range of every key, by the type of the front end.

Owns docs/format.md, "The front end". It makes no inputs and opens no tokenizer: text.py, audio.py and image.py do that,
and may rely on what is checked here. Keys that it does not know are left alone, for "frontend" is an open object.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from txopt.runtime.strict_json import show

Frontend = Mapping[str, Any]

TYPES = ("text", "audio", "waveform", "image", "arrays")
TOKENIZERS = ("tokenizer", "target_tokenizer")  # keys that name files
SCORES = ("softmax", "sigmoid", "none")
LANGUAGES = ("source_language", "target_language")
RATES = (1_000, 768_000)  # samples a second
WIDEST = 65_536  # of an image's side and of a Fourier transform: far beyond any model, and still harmless
LONGEST = 600  # seconds that a speech model hears at once
LARGEST = 1e30  # of numbers that meet float32 arrays


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a key's value must be, in words and as a test; ``needed``: the key must be there."""

    expected: str
    holds: Callable[[Any], bool]
    needed: bool = False


def kind_of(frontend: Frontend) -> str:
    """What a user gives: "text", "audio", "image" or "arrays"; a waveform is audio that is not made spectra of."""
    kind = str(frontend["type"])
    return "audio" if kind == "waveform" else kind


def frontend_problems(frontend: Frontend) -> Iterator[str]:
    """Every key of ``frontend`` whose value no front end can work with."""
    kind = frontend.get("type")
    if kind not in TYPES:
        yield f"frontend.type: expected one of {', '.join(TYPES)}, found {show(kind)}"
        return
    wrong = set()
    for key, rule in (COMMON | KEYS[kind]).items():
        if key not in frontend:
            if rule.needed:
                yield f"frontend.{key}: expected {rule.expected}, found no such key"
                wrong.add(key)
        elif not rule.holds(frontend[key]):
            yield f"frontend.{key}: expected {rule.expected}, found {show(frontend[key])}"
            wrong.add(key)
    if not wrong:  # what must agree can only be judged where each is right
        yield from CONTRADICTIONS[kind](frontend)


def label_problems(frontend: Frontend, classes: int) -> Iterator[str]:
    """Whether a classifier of so many ``classes`` has as many labels, where it has any."""
    labels = frontend.get("labels")
    if labels and len(labels) != classes:
        yield f"frontend.labels: expected one for each of the {classes} classes of logits, found {len(labels)}"


def _is_integer(value: object, least: int, most: int | None = None) -> bool:
    # bool is an int to Python, and not to JSON
    return type(value) is int and value >= least and (most is None or value <= most)


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # type: ignore[operator]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _integer(least: int, most: int | None = None) -> Rule:
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    return Rule(expected=expected, holds=lambda value: _is_integer(value, least, most))


def _map(expected: str, holds: Callable[[Any], bool]) -> Rule:
    """An object whose values hold; that its keys are text is JSON's doing."""
    return Rule(expected=expected, holds=lambda value: isinstance(value, dict) and all(map(holds, value.values())))


def _or_null(rule: Rule) -> Rule:
    return replace(rule, expected=f"{rule.expected}, or null", holds=lambda value: value is None or rule.holds(value))


def _needed(rule: Rule) -> Rule:
    return replace(rule, needed=True)


def _one_of(*options: str) -> Rule:
    return Rule(expected=f"one of {', '.join(options)}", holds=lambda value: value in options)


def _is_template(value: object) -> bool:
    if not isinstance(value, list | tuple) or sum(item == "text" for item in value) != 1:
        return False
    return all(_is_integer(item, 0) or item in ("text", *LANGUAGES) for item in value)


def _is_marks(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_text, value))


def _is_bound(value: object) -> bool:
    known = {"vocabulary", "positions"}
    return (
        isinstance(value, dict) and set(value) <= known and all(v is None or _is_integer(v, 1) for v in value.values())
    )


def _is_labels(value: object) -> bool:
    return isinstance(value, dict) and all(_is_text(value.get(str(index))) for index in range(len(value)))


def _per_channel(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def check(value: object) -> bool:
        several = isinstance(value, list | tuple)
        values: Any = value if several else [value]
        return (not several or len(values) in (1, 3)) and all(map(holds, values))

    return check


_FLAG = Rule(expected="true or false", holds=lambda value: type(value) is bool)
_TEXT = Rule(expected="text that is not empty", holds=_is_text)
_FILE = Rule(expected="a file name", holds=lambda value: isinstance(value, str))
_NUMBER = Rule(expected=f"a number from -{LARGEST:g} to {LARGEST:g}", holds=_is_number)
_OBJECT = Rule(expected="an object", holds=lambda value: isinstance(value, dict))
_ID = _integer(0)
_IDS = _map("an object of token ids, integers of at least 0", lambda value: _is_integer(value, 0))

# Of every type: who classifies has labels, who reads or says ids may have a tokenizer, encoders have bounds.
COMMON: dict[str, Rule] = {
    "tokenizer": _FILE,
    "target_tokenizer": _FILE,
    "pad_token_id": _or_null(_ID),
    "clean_up_tokenization_spaces": _FLAG,
    "timestamp_begin": _or_null(_ID),
    "source_vocabulary": _or_null(_integer(1)),
    "source_positions": _or_null(_integer(1)),
    "least_samples": _or_null(_integer(1)),
    "most_samples": _or_null(_integer(1)),
    "bounds": _map("an object of vocabulary and positions, integers of at least 1 or null, by input", _is_bound),
    "labels": Rule(expected='an object of names, "0" and on without gaps', holds=_is_labels),
    "scores": _one_of(*SCORES),
}

KEYS: dict[str, dict[str, Rule]] = {
    "text": {
        "tokenizer": _needed(_FILE),
        "max_source_length": _or_null(_integer(1)),
        "add_special_tokens": _FLAG,
        "padding_side": _one_of("left", "right"),
        "languages": _IDS,
        "source_template": Rule(
            expected=f'a list of token ids and of the words "text" (once), {" and ".join(LANGUAGES)}',
            holds=_is_template,
        ),
        "source_language": _or_null(_TEXT),
        "target_language": _or_null(_TEXT),
        "language_marks": Rule(expected="a list of two texts, neither empty", holds=_is_marks),
        "unknown_from": _or_null(_ID),
        "unk_token_id": _or_null(_ID),
        "unknown_prefix": _or_null(_TEXT),
    },
    "audio": {
        "feature_size": _needed(_integer(1, 4096)),
        "sampling_rate": _needed(_integer(*RATES)),
        "n_fft": _needed(_integer(2, WIDEST)),
        "hop_length": _needed(_integer(1)),
        "chunk_length": Rule(
            expected=f"seconds, a number above 0 and at most {LONGEST}",
            holds=lambda value: _is_number(value) and 0 < value <= LONGEST,
            needed=True,
        ),
        "padding_value": _NUMBER,
        "dither": _NUMBER,
        "multilingual": _FLAG,
        "lang_to_id": _IDS,
        "task_to_id": _IDS,
        "language_names": _map("an object of language codes, texts", _is_text),
        "no_timestamps_token_id": _or_null(_ID),
    },
    "waveform": {
        "sampling_rate": _needed(_integer(*RATES)),
        "padding_value": _NUMBER,
        "do_normalize": _FLAG,
    },
    "image": {
        "do_resize": _FLAG,
        "size": _or_null(_OBJECT),
        "resample": _integer(0, 5),
        "do_center_crop": _FLAG,
        "crop_size": _or_null(_OBJECT),
        "do_rescale": _FLAG,
        "rescale_factor": _or_null(_NUMBER),
        "do_normalize": _FLAG,
        "image_mean": _or_null(
            Rule(expected="a number, or a list of one for each of 3 channels", holds=_per_channel(_is_number))
        ),
        "image_std": _or_null(
            Rule(
                expected="a number above 0, or a list of one for each of 3 channels",
                holds=_per_channel(lambda value: _is_number(value) and value > 1 / LARGEST),
            )
        ),
    },
    "arrays": {},
}


def _of_text(frontend: Frontend) -> Iterator[str]:
    limit, template = frontend.get("max_source_length"), frontend.get("source_template") or ["text"]
    if limit is not None and limit < len(template):
        yield (
            f"frontend.max_source_length: expected at least {len(template)}, for a token beside the "
            f"{len(template) - 1} that source_template puts around it, found {limit}"
        )


def _of_audio(frontend: Frontend) -> Iterator[str]:
    samples = int(frontend["chunk_length"] * frontend["sampling_rate"])
    if not frontend["hop_length"] <= samples:
        found = f"{frontend['hop_length']} and {samples}"
        yield f"frontend.hop_length: expected no more than the samples of chunk_length seconds, found {found}"
    if frontend.get("multilingual") and "lang_to_id" not in frontend:
        yield "frontend.lang_to_id: expected the languages of a multilingual model, found no such key"


def _of_image(frontend: Frontend) -> Iterator[str]:
    sides = {"size": ({"height", "width"}, {"shortest_edge"}), "crop_size": ({"height", "width"},)}
    for step, keys in STEPS.items():
        for key in keys if frontend.get(step) else ():
            value = frontend.get(key)
            if value is None:
                yield f"frontend.{key}: expected what {step} needs, found {'null' if key in frontend else 'no such key'}"
            elif key in sides and not _is_size(value, sides[key]):
                words = " or ".join(" and ".join(sorted(names)) for names in sides[key])
                found = ", ".join(f"{show(name)}: {show(side)}" for name, side in value.items()) or "nothing"
                yield f"frontend.{key}: expected {words}, integers from 1 to {WIDEST}, found {found}"


def _of_waveform(frontend: Frontend) -> Iterator[str]:
    least, most = frontend.get("least_samples"), frontend.get("most_samples")
    if least is not None and most is not None and least > most:
        yield f"frontend.least_samples: expected no more than most_samples, {most}, found {least}"


def _of_arrays(frontend: Frontend) -> Iterator[str]:
    return iter(())


def _is_size(value: Mapping[str, object], sides: tuple[set[str], ...]) -> bool:
    return set(value) in sides and all(_is_integer(side, 1, WIDEST) for side in value.values())


# An image's steps, with the numbers that each needs.
STEPS: dict[str, tuple[str, ...]] = {
    "do_resize": ("size",),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}

CONTRADICTIONS: dict[str, Callable[[Frontend], Iterator[str]]] = {
    "text": _of_text,
    "audio": _of_audio,
    "waveform": _of_waveform,
    "image": _of_image,
    "arrays": _of_arrays,
}
