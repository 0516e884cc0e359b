"""What said text is worth beside its references: counts for each sample, and a corpus figure from their sum.

Owns the metrics, how text is made comparable for them, and which of them an artifact that generates is judged by; what an encoder
alone answers is counted in answer_metrics.py. It compares no systems and knows no limits: ``bootstrap`` and ``gate`` do. Figures are
points, 0 to 100 (error rates may pass 100). S, D, I are substitutions, deletions and insertions of the shortest edit (Levenshtein)
from a reference to what was said. Where a sample has several references:

| metric | points, summed over all samples | of several references |
|---|---|---|
| wer, wer-raw | 100 (S + D + I) / N, N words of the reference | the closest: fewest edits, then shortest |
| cer, cer-raw | the same of characters, spaces among them | the closest |
| phoneme-error | the same of phonemes, text separated by spaces | the closest, as in examples/g2p/evaluate.py |
| word-error | 100 * samples that equal no reference, as sequences of phonemes / samples | any |
| exact-match | 100 * samples that equal a reference, character by character / samples | any |
| bleu | 100 BP exp(sum of log p_n / 4), p_n precision of word n-grams, n = 1 to 4; BP brevity penalty | clipped by the largest |
| chrf | 100 * 5 P R / (4 P + R), P and R means of precision and recall of character n-grams, n = 1 to 6 | the best, or the first |

Edits are jiwer's. bleu (Papineni et al., ACL 2002) and chrf (Popovic, WMT 2015; with recall weighing double, chrF2) are counted and
computed by sacrebleu (Post, "A Call for Clarity in Reporting BLEU Scores", WMT 2018) in its default settings, which its signature
names. A silent reference adds no words, and whatever was said to it as insertions.

wer and cer compare what was said, not how it is written, for a Whisper writes capitals and commas and many transcripts do not: text is
put into NFKC and lower case, apostrophes inside of words are dropped ("don't" is "dont"), and every other character of Unicode's
categories P and S is a space. Numbers and abbreviations stay as they are written. wer-raw and cer-raw take text as it is. All of them
take runs of white space as one space.
"""

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any, Literal

import numpy as np

from txopt.calibration.answer_metrics import count_cosines, count_right, count_squares, r_squared
from txopt.calibration.bootstrap import Figures, Statistics, percent
from txopt.runtime.errors import InputError, MissingDependencyError, UsageError, explain
from txopt.runtime.frontend import kind_of

References = Sequence[Sequence[Any]]  # texts, or of an encoder alone answers (heads.py)
# Counts of each sample [N,C], and the rules that they were counted by, sacrebleu's signature or one in its style.
Count = Callable[[Sequence[Any], References], tuple[Statistics, str]]

# Languages written without spaces between words: by ISO 639-1 and 639-3, and as Whisper calls them.
_CODES = ("zh", "zho", "cmn", "yue", "wuu", "ja", "jpn", "th", "tha", "lo", "lao", "km", "khm", "my", "mya")
_NAMES = ("chinese", "mandarin", "cantonese", "japanese", "thai", "lao", "khmer", "myanmar", "burmese")
UNSPACED = frozenset((*_CODES, *_NAMES))
_IN_WORD = re.compile("(?<=\\w)['’\N{MODIFIER LETTER APOSTROPHE}](?=\\w)")
_MOST_PROBLEMS = 12


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A way to judge text, or answers. ``figures`` turns sums [R,C] of rows of counts into points [R]."""

    name: str
    higher_is_better: bool
    count: Count
    figures: Figures

    def measure(self, said: Sequence[Any], references: References) -> "Measured":
        """Counts each of N samples.

        Args:
            said: N texts, or answers.
            references: for each of them, at least one that would have been right.

        Raises:
            InputError: nothing to judge, samples without a reference, or references that hold no words.
        """
        problems = _problems(said, references)
        if problems:
            left = len(problems) - _MOST_PROBLEMS
            shown = problems[:_MOST_PROBLEMS] + ([f"... and {left} more"] if left > 0 else [])
            raise InputError(explain(f"{self.name} cannot be measured:", shown))
        statistics, signature = self.count(said, references)
        return Measured(metric=self, signature=f"{self.name}|{signature}", statistics=statistics)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One system's counts [N,C] under ``metric``; equal signatures are comparable figures."""

    metric: Metric
    signature: str
    statistics: Statistics


def metric(name: str) -> Metric:
    """The metric called ``name``.

    Raises:
        UsageError: no metric is called so.
        MissingDependencyError: it needs jiwer or sacrebleu, which is not installed.
    """
    if name in OF_ANSWERS:
        return OF_ANSWERS[name]
    if name not in METRICS:
        raise UsageError(f"expected a metric, one of {', '.join((*METRICS, *OF_ANSWERS))}; found {name!r}")
    return METRICS[name](name)


def pick(task: str, *, has_references: bool, frontend: Mapping[str, Any], language: str | None = None) -> str:
    """The name of the metric that an artifact that generates is judged by, unless its user names another.

    Without references it is "exact-match" with what the fp32 artifact says: no quality is measured, only change. With references:

    | what it does | metric | because |
    |---|---|---|
    | hears speech | wer; cer for languages without spaces | what transcripts are compared by |
    | "translation", or a front end with languages | bleu; chrf for languages without spaces | what translations are published in |
    | "grapheme-to-phoneme" | word-error | what the field publishes; a word with one wrong phoneme is wrong |
    | any other text out | chrf | short texts often have no 4-gram in common, and bleu is then 0 or smoothing; it needs no |
    | | | tokenizer, and agrees with human judges at least as well (Kocmi et al., "To Ship or Not to Ship", WMT 2021) |
    | has ids for text | exact-match | there is nothing in between |

    Args:
        task: the manifest's, or one of the two above, which no manifest tells.
        has_references: whether the data says what is right.
        frontend: the manifest's.
        language: what it speaks, where it has a choice; by default the front end's target language.
    """
    if not has_references or kind_of(frontend) == "arrays":
        return "exact-match"
    spoken = (language or frontend.get("target_language") or "").lower().strip("<|>")
    spaced = re.split(r"[-_]", spoken)[0] not in UNSPACED
    if kind_of(frontend) == "audio":
        return "wer" if spaced else "cer"
    if task == "grapheme-to-phoneme":
        return "word-error"
    translates = task == "translation" or bool(frontend.get("languages"))
    return "bleu" if translates and spaced else "chrf"


def spoken_form(text: str) -> str:
    """``text`` without what cannot be heard: NFKC, lower case, no punctuation, single spaces."""
    folded = _IN_WORD.sub("", unicodedata.normalize("NFKC", text).lower())
    kept = (" " if unicodedata.category(character)[0] in "PS" else character for character in folded)
    return single_spaced("".join(kept))


def single_spaced(text: str) -> str:
    """``text`` with one space for every run of white space, and none around it."""
    return " ".join(text.split())


def _problems(said: Sequence[str], references: References) -> list[str]:
    if len(said) != len(references):
        return [f"expected references for each of {len(said)} samples, found them for {len(references)}"]
    if not said:
        return ["expected at least one sample, found none"]
    problems = [
        f"sample {index}: expected a list of references, found {'text' if isinstance(texts, str) else 'none'}"
        for index, texts in enumerate(references)
        if isinstance(texts, str) or not texts
    ]
    every = [text for texts in references for text in texts]
    if not problems and all(isinstance(text, str) and not text.strip() for text in every):
        problems.append("expected references with words in them; all are empty")
    return problems


def _edit_rate(name: str, *, unit: Literal["words", "characters"], form: Callable[[str], str]) -> Metric:
    """Edits over the length of the closest reference."""
    try:
        import jiwer
    except ImportError as err:
        raise _missing(name, "jiwer") from err
    align = jiwer.process_words if unit == "words" else jiwer.process_characters
    rules = f"norm:nfkc+lower+nopunct|unicode:{unicodedata.unidata_version}" if form is spoken_form else "norm:none"

    def count(said: Sequence[str], references: References) -> tuple[Statistics, str]:
        forms = [[form(text) for text in texts] for texts in references]
        if not any(text for texts in forms for text in texts):
            raise InputError(f"{name} cannot be measured: the references hold nothing but punctuation")
        repeated = [form(text) for text, texts in zip(said, forms, strict=True) for _ in texts]
        aligned = align([text for texts in forms for text in texts], repeated)
        edits = (
            sum(
                max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                for chunk in chunks
                if chunk.type != "equal"
            )
            for chunks in aligned.alignments
        )
        pairs = zip(edits, map(len, aligned.references), strict=True)
        closest = [min(islice(pairs, len(texts))) for texts in forms]
        return np.array(closest, np.float64), f"refs:closest|{rules}|jiwer:{version('jiwer')}"

    return Metric(name=name, higher_is_better=False, count=count, figures=percent)


def _share(name: str, *, of_wrong: bool) -> Metric:
    """The share of samples that equal one of their references, as text, or that equal none, as sequences of phonemes."""
    form: Callable[[str], str] = single_spaced if of_wrong else str

    def count(said: Sequence[str], references: References) -> tuple[Statistics, str]:
        right = [form(text) in map(form, texts) for text, texts in zip(said, references, strict=True)]
        counted = np.not_equal(right, of_wrong)
        return np.stack([counted, np.ones(len(right))], axis=1).astype(np.float64), "refs:any|norm:none"

    return Metric(name=name, higher_is_better=not of_wrong, count=count, figures=percent)


def _sacrebleu(name: str) -> Metric:
    try:
        import sacrebleu.metrics
    except ImportError as err:
        raise _missing(name, "sacrebleu") from err
    make = sacrebleu.metrics.BLEU if name == "bleu" else sacrebleu.metrics.CHRF
    compute = make()

    def count(said: Sequence[str], references: References) -> tuple[Statistics, str]:
        scores = make()  # which learns the number of references, and writes it into its signature
        most = max(map(len, references))
        streams = [[texts[place] if place < len(texts) else None for texts in references] for place in range(most)]
        # What sacrebleu's own significance tests are made of; it has no public name for a sample's counts.
        rows = scores._extract_corpus_statistics(said, streams)
        return np.array(rows, np.float64), str(scores.get_signature())

    def figures(sums: Statistics) -> Statistics:
        return np.array([compute._compute_score_from_stats(row).score for row in sums.tolist()])

    return Metric(name=name, higher_is_better=True, count=count, figures=figures)


def _missing(name: str, package: str) -> MissingDependencyError:
    return MissingDependencyError(f'the metric {name} needs {package}: pip install "txopt[calibration]"')


METRICS: dict[str, Callable[[str], Metric]] = {
    "wer": partial(_edit_rate, unit="words", form=spoken_form),
    "wer-raw": partial(_edit_rate, unit="words", form=single_spaced),
    "cer": partial(_edit_rate, unit="characters", form=spoken_form),
    "cer-raw": partial(_edit_rate, unit="characters", form=single_spaced),
    "phoneme-error": partial(_edit_rate, unit="words", form=single_spaced),
    "word-error": partial(_share, of_wrong=True),
    "exact-match": partial(_share, of_wrong=False),
    "bleu": _sacrebleu,
    "chrf": _sacrebleu,
}
# Of encoders alone: which of them one is judged by is heads.py's.
OF_ANSWERS = {
    "accuracy": Metric(name="accuracy", higher_is_better=True, count=count_right, figures=percent),
    "r-squared": Metric(name="r-squared", higher_is_better=True, count=count_squares, figures=r_squared),
    "cosine": Metric(name="cosine", higher_is_better=True, count=count_cosines, figures=percent),
}
