"""Reference cases asked anew: another model's answers to the same questions, in the same form."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from txopt.calibration.reanswer import reanswer
from txopt.runtime.artifact import Artifact
from txopt.runtime.cases import Case, load
from txopt.runtime.model import Model
from txopt.runtime.parity import TOLERANCE, replay

pytestmark = pytest.mark.slow

MODELS = ("g2p", "gpt2", "t5")


@pytest.fixture(scope="module")
def asked(
    artifacts: Callable[[str], Artifact], g2p: Artifact
) -> Callable[[str], tuple[Artifact, list[Case], list[Case]]]:
    """An artifact, its cases, and the same answered by the artifact itself."""

    def ask(name: str) -> tuple[Artifact, list[Case], list[Case]]:
        artifact = g2p if name == "g2p" else artifacts(name)
        cases = load(artifact.path)
        return artifact, cases, reanswer(Model(artifact), cases)

    return ask


@pytest.mark.parametrize("name", MODELS)
def test_the_artifacts_own_answers_are_pytorchs(
    name: str, asked: Callable[[str], tuple[Artifact, list[Case], list[Case]]]
) -> None:
    """Tensor by tensor of the same shape and sample, at the tolerance of parity; ids, margins and scores too."""
    _, cases, again = asked(name)
    for old, new in zip(cases, again, strict=True):
        assert (new.name, new.schedule, new.options) == (old.name, old.schedule, old.options)
        assert new.inputs is old.inputs
        np.testing.assert_array_equal(new.tokens, old.tokens)
        assert new.expected.keys() == old.expected.keys()
        for tensor, value in old.expected.items():
            assert new.expected[tensor].dtype == value.dtype
            close(new.expected[tensor], value)
        assert new.generated.keys() == old.generated.keys()
        for search, ids in old.generated.items():
            np.testing.assert_array_equal(new.generated[search], ids)
        for mine, theirs in ((new.margins, old.margins), (new.scores, old.scores)):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.dtype == np.float32
                seen = np.isfinite(mine) & np.isfinite(theirs)
                assert mine.shape == theirs.shape
                assert seen.any()
                close(mine[seen], theirs[seen])


def close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=TOLERANCE["fp32"] * max(1, np.abs(want).max()), rtol=0)


@pytest.mark.parametrize("name", ["g2p", "gpt2"])
def test_what_was_answered_is_what_is_replayed(
    name: str, asked: Callable[[str], tuple[Artifact, list[Case], list[Case]]]
) -> None:
    """No error at all: who answered is who is asked."""
    artifact, _, again = asked(name)
    report = replay(artifact, again).require()
    assert report.largest_error == 0
    assert not report.near_ties


def test_another_models_answers_are_its_own(g2p: Artifact) -> None:
    """Every answer is asked for: of what the case held before nothing is left."""
    cases = [
        replace(case, expected={name: value + 7 for name, value in case.expected.items()}) for case in load(g2p.path)
    ]
    for old, new in zip(cases, reanswer(Model(g2p), cases), strict=True):
        for name, value in new.expected.items():
            assert np.abs(old.expected[name] - value).max() > 6, name


def test_a_case_without_searches_gets_none(g2p: Artifact) -> None:
    case = replace(load(g2p.path)[0], generated={}, margins=None, scores=None)
    (again,) = reanswer(Model(g2p), [case])
    assert (again.generated, again.margins, again.scores) == ({}, None, None)
