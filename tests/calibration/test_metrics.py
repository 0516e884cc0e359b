"""Metrics: counted by hand in tables, equal to the libraries' own figures and to g2p's evaluation, whatever the text."""

import sys
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from examples.g2p import evaluate
from txopt.calibration.metrics import METRICS, Measured, metric, pick, spoken_form
from txopt.runtime.errors import InputError, MissingDependencyError, UsageError

# Of the figures that are also computed by the libraries, in points.
ROUNDING = 1e-9
ERRORS = {"wer", "wer-raw", "cer", "cer-raw", "phoneme-error", "word-error"}

texts = st.text(alphabet="ab c.,'-Ä", max_size=12)
solid = texts.map(lambda text: f"a{text}")  # a reference that holds a word


@st.composite
def corpora(draw: st.DrawFn, most: int = 3) -> tuple[list[str], list[list[str]]]:
    references = draw(st.lists(st.lists(solid, min_size=1, max_size=most), min_size=1, max_size=6))
    return [draw(texts) for _ in references], references


def measure(name: str, said: list[str], references: list[list[str]]) -> Measured:
    return metric(name).measure(said, references)


def figure(measured: Measured) -> float:
    """The corpus figure in points."""
    return float(measured.metric.figures(measured.statistics.sum(axis=0, keepdims=True))[0])


COUNTED: tuple[tuple[str, str, list[str], list[int]], ...] = (
    # metric, said, references, counts
    ("wer", "The cat sat.", ["the cat sat"], [0, 3]),
    ("wer", "Don't! The well-known cat", ["dont the well known cat"], [0, 5]),
    ("wer", "the cat", ["the black cat sat"], [2, 4]),
    ("wer", "a the cat", ["the cat"], [1, 2]),
    ("wer", "", ["the cat"], [2, 2]),
    ("wer", "the the the", ["the"], [2, 1]),
    ("wer", "a b c", ["x b c d", "a b d"], [1, 3]),
    ("wer", "a b", ["a b c", "a c"], [1, 2]),  # both one edit away: the shorter
    ("wer-raw", "The  cat\tsat.\n", ["the cat sat"], [2, 3]),
    ("wer-raw", " the cat", ["the cat "], [0, 2]),
    ("cer", "Ab c.", ["abc"], [1, 3]),
    ("cer", "abd", ["abc d", "abc"], [1, 3]),
    ("cer-raw", "Ab", ["ab"], [1, 2]),
    ("phoneme-error", "K AE1 T", ["K AE1 T S", "K AA1 T"], [1, 3]),
    ("phoneme-error", "K AE1 T", ["K AE0 T"], [1, 3]),
    ("word-error", "K  AE1 T", ["K AA1 T", "K AE1 T"], [0, 1]),
    ("word-error", "K AE1", ["K AE1 T"], [1, 1]),
    ("exact-match", "a b", ["a  b", "a b"], [1, 1]),
    ("exact-match", "a b", ["a  b"], [0, 1]),
    # lengths of both, then matched and said n-grams of 1 to 4 words
    ("bleu", "the cat sat on mat", ["the cat sat on the mat"], [5, 6, 5, 3, 2, 1, 5, 4, 3, 2]),
    # said, in the reference and matched n-grams of 1 to 6 characters, the best of two references
    ("chrf", "abc", ["xyz", "abd"], [3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
)


@pytest.mark.parametrize(("name", "said", "references", "expected"), COUNTED)
def test_counts_of_a_sample(name: str, said: str, references: list[str], expected: list[int]) -> None:
    assert measure(name, [said], [references]).statistics.tolist() == [expected]


def test_silence_adds_no_words_and_what_was_heard_in_it() -> None:
    found = measure("wer", ["", "thank you", "the cat"], [[""], ["..."], ["the cat"]])
    assert found.statistics.tolist() == [[0, 0], [2, 0], [0, 2]]
    assert figure(found) == 100


SPOKEN = (
    ("Don’t — stop!", "dont stop"),
    ("well-known", "well known"),
    ("'quoted' dogs' rock 'n' roll", "quoted dogs rock n roll"),
    ("\N{LATIN SMALL LIGATURE FI}ne\N{NO-BREAK SPACE}\N{FULLWIDTH DIGIT FIVE} €", "fine 5"),
    ("ÉCOLE", "école"),
    ("e\N{COMBINING ACUTE ACCENT}", "é"),
    ("हिन्दी।", "हिन्दी"),  # vowel signs are marks, not punctuation
    ("… !?", ""),
)


@pytest.mark.parametrize(("written", "spoken"), SPOKEN)
def test_what_cannot_be_heard_is_left_out(written: str, spoken: str) -> None:
    assert spoken_form(written) == spoken


@pytest.mark.parametrize("name", METRICS)
@given(corpora())
def test_who_says_the_reference_is_perfect(name: str, corpus: tuple[list[str], list[list[str]]]) -> None:
    references = corpus[1]
    perfect = measure(name, [texts[-1] for texts in references], references)
    if name == "bleu":  # whose smoothing of texts shorter than four words has no upper end at 100
        assert (perfect.statistics[:, 2:6] == perfect.statistics[:, 6:]).all()
    else:
        assert figure(perfect) == pytest.approx(0 if name in ERRORS else 100, abs=ROUNDING)


@pytest.mark.parametrize("name", METRICS)
@given(corpora())
def test_figures_are_points(name: str, corpus: tuple[list[str], list[list[str]]]) -> None:
    found = measure(name, *corpus)
    assert len(found.statistics) == len(corpus[0])
    assert (found.statistics >= 0).all()
    assert figure(found) >= 0
    if name in ("word-error", "exact-match", "bleu", "chrf"):
        assert figure(found) <= 100 + ROUNDING


@pytest.mark.parametrize("name", METRICS)
@given(corpora(most=2), st.randoms(use_true_random=False))
def test_the_order_of_samples_and_of_references_does_not_matter(
    name: str, corpus: tuple[list[str], list[list[str]]], random: Any
) -> None:
    said, references = corpus
    order = list(range(len(said)))
    random.shuffle(order)
    step = 1 if name == "chrf" else -1  # sacrebleu takes the first of references that fit equally well
    turned = measure(name, [said[place] for place in order], [references[place][::step] for place in order])
    assert figure(turned) == pytest.approx(figure(measure(name, said, references)), abs=ROUNDING)


@pytest.mark.parametrize("name", ["wer", "cer", "wer-raw", "cer-raw", "phoneme-error", "exact-match"])
@given(st.lists(st.tuples(solid, solid), min_size=1, max_size=5))
def test_edits_and_equality_are_symmetric(name: str, pairs: list[tuple[str, str]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    there = measure(name, one, [[text] for text in other]).statistics[:, 0]
    back = measure(name, other, [[text] for text in one]).statistics[:, 0]
    assert there.tolist() == back.tolist()


@given(corpora(most=1))
def test_error_rates_are_those_of_jiwer(corpus: tuple[list[str], list[list[str]]]) -> None:
    said, references = corpus[0], [" ".join(texts[0].split()) for texts in corpus[1]]
    assert figure(measure("wer-raw", *corpus)) == pytest.approx(100 * jiwer.wer(references, said), abs=ROUNDING)
    tidy = [" ".join(text.split()) for text in said]
    assert figure(measure("cer-raw", *corpus)) == pytest.approx(100 * jiwer.cer(references, tidy), abs=ROUNDING)


@pytest.mark.parametrize(("name", "scorer"), [("bleu", BLEU), ("chrf", CHRF)])
@given(corpora())
def test_figures_and_signatures_are_those_of_sacrebleu(
    name: str, scorer: Any, corpus: tuple[list[str], list[list[str]]]
) -> None:
    said, references = corpus
    theirs = scorer()
    most = max(map(len, references))
    streams = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
    found = measure(name, said, references)
    assert figure(found) == pytest.approx(theirs.corpus_score(said, streams).score, abs=ROUNDING)
    assert found.signature == f"{name}|{theirs.get_signature()}"


phonemes = st.lists(st.sampled_from(["K", "AE1", "T"]), min_size=1, max_size=5).map(tuple)


@given(st.lists(st.tuples(phonemes, st.lists(phonemes, min_size=1, max_size=3)), min_size=1, max_size=6))
def test_g2p_errors_are_those_of_the_example(pairs: list[Any]) -> None:
    lexicon = {str(index): tuple(right) for index, (_, right) in enumerate(pairs)}
    theirs = evaluate.score(lexicon, {str(index): said for index, (said, _) in enumerate(pairs)})
    said = [" ".join(spoken) for spoken, _ in pairs]
    references = [[" ".join(spoken) for spoken in right] for _, right in pairs]
    assert figure(measure("phoneme-error", said, references)) == pytest.approx(theirs.per)
    assert figure(measure("word-error", said, references)) == pytest.approx(theirs.wer)


def test_signatures_name_rules_and_versions() -> None:
    assert measure("wer", ["a"], [["a"]]).signature.startswith("wer|refs:closest|norm:nfkc+lower+nopunct|unicode:")
    assert measure("wer-raw", ["a"], [["a"]]).signature.startswith("wer-raw|refs:closest|norm:none|jiwer:4")
    assert measure("exact-match", ["a"], [["a"]]).signature == "exact-match|refs:any|norm:none"
    assert "nrefs:var" in measure("chrf", ["a", "b"], [["a"], ["b", "c"]]).signature


def test_resampled_sums_are_scored_row_by_row() -> None:
    found = measure("bleu", ["the cat sat on it", "a dog"], [["the cat sat on it"], ["the dog"]])
    sums = np.stack([found.statistics[0], found.statistics.sum(axis=0)])
    assert found.metric.figures(sums) == pytest.approx([100, figure(found)])


REFUSED: tuple[tuple[str, list[str], Any, str], ...] = (
    ("wer", [], [], "at least one sample, found none"),
    ("wer", ["a", "b"], [["a"]], "each of 2 samples, found them for 1"),
    ("wer", ["a", "b"], [["a"], []], "sample 1: expected a list of references, found none"),
    ("chrf", ["a", "b"], ["a", []], "sample 0: expected a list of references, found text\n"),
    ("exact-match", ["a"], [["", " "]], "all are empty"),
    ("cer", ["a"], [["..."]], "nothing but punctuation"),
)


@pytest.mark.parametrize(("name", "said", "references", "message"), REFUSED)
def test_what_cannot_be_measured_is_refused(name: str, said: list[str], references: Any, message: str) -> None:
    with pytest.raises(InputError) as err:
        measure(name, said, references)
    assert message in str(err.value)


def test_a_long_list_of_problems_is_cut() -> None:
    with pytest.raises(InputError, match="and 88 more"):
        measure("wer", ["a"] * 100, [[]] * 100)


def test_an_unknown_metric_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"one of wer, .*, chrf, .*, cosine; found 'rouge'"):
        metric("rouge")


@pytest.mark.parametrize(
    ("name", "package"), [("wer", "jiwer"), ("phoneme-error", "jiwer"), ("bleu", "sacrebleu"), ("chrf", "sacrebleu")]
)
def test_a_missing_package_is_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (package, f"{package}.metrics"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=rf'{name} needs {package}: pip install "txopt\[calibration\]"'):
        metric(name)
    assert figure(metric("exact-match").measure(["a"], [["a"]])) == 100


TEXT, SPEECH, WAVEFORM, IMAGE, ARRAYS = ({"type": kind} for kind in ("text", "audio", "waveform", "image", "arrays"))
MULTILINGUAL = {"type": "text", "languages": {"de": 3, "ja": 4}}
PICKED: tuple[tuple[str, dict[str, Any], str | None, str], ...] = (
    # task, front end, language, metric
    ("speech-to-text", SPEECH, None, "wer"),
    ("speech-to-text", WAVEFORM, None, "wer"),
    ("speech-to-text", SPEECH, "<|zh|>", "cer"),
    ("speech-to-text", SPEECH, "Japanese", "cer"),
    ("speech-to-text", SPEECH, "en", "wer"),
    ("text-to-text", TEXT, None, "chrf"),
    ("summarization", TEXT, None, "chrf"),
    ("text-generation", TEXT, None, "chrf"),
    ("image-to-text", IMAGE, None, "chrf"),
    ("translation", TEXT, None, "bleu"),
    ("translation", TEXT, "zho_Hans", "chrf"),
    ("text-to-text", MULTILINGUAL, "de_DE", "bleu"),
    ("text-to-text", MULTILINGUAL | {"target_language": "ja"}, None, "chrf"),
    ("grapheme-to-phoneme", TEXT, None, "word-error"),
    ("text-to-text", ARRAYS, None, "exact-match"),
)


@pytest.mark.parametrize(("task", "frontend", "language", "expected"), PICKED)
def test_the_metric_of_an_artifact(task: str, frontend: dict[str, Any], language: str | None, expected: str) -> None:
    assert pick(task, has_references=True, frontend=frontend, language=language) == expected
    assert pick(task, has_references=False, frontend=frontend, language=language) == "exact-match"
