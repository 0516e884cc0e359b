"""The search on g2p: every attempt is a point of the certificate, the chosen one is the artifact, and the report tells it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.test_page import Reader
from txopt.calibration import activations, evaluate, gate
from txopt.calibration.speed import ROUNDS, Speed, speed
from txopt.exporter import products, search, static
from txopt.exporter.quantize import Options, quantize, quantize_artifact
from txopt.page.file import MARKS
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, LossError, ParityError, StaleError, UsageError
from txopt.runtime.model import Model
from txopt.runtime.parity import verify
from txopt.summary import of_artifact

pytestmark = pytest.mark.slow

WORDS = ("hello", "calibration", "cat", "windows", "tree", "encyclopedia", "night", "a")
MARK = MARKS["quantization.html"]


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("".join(f"{word}\n" for word in WORDS))
    return path


def losing(monkeypatch: pytest.MonkeyPatch, losses: Iterator[float]) -> None:
    """Attempt after attempt loses what ``losses`` says."""
    judged = gate.judge

    def judge(*arguments: Any, **named: Any) -> gate.Verdict:
        verdict = judged(*arguments, **named)
        loss = replace(verdict.comparison.loss, value=next(losses))
        return replace(verdict, comparison=replace(verdict.comparison, loss=loss))

    monkeypatch.setattr(gate, "judge", judge)


def running(monkeypatch: pytest.MonkeyPatch, speeds: Iterator[float], noise: float) -> None:
    """Attempt after attempt is as fast as ``speeds`` says, give or take ``noise``."""

    def made(*arguments: Any) -> Speed:
        median = next(speeds)
        return Speed(low=median - noise, median=median, high=median + noise)

    monkeypatch.setattr(search, "speed", made)


def searched(g2p: Artifact, words: Path, out: Path, **more: Any) -> tuple[Artifact, list[dict[str, Any]]]:
    made = quantize(g2p.path, out, calibration=words, max_loss=0.5, **more)
    return made, Artifact.open(out).manifest.calibration["search"]


def test_one_attempt_that_holds_is_one_point(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    made = quantize(g2p.path, tmp_path / "out", calibration=words)
    (point,) = made.manifest.calibration["search"]
    assert point["chosen"]
    assert point["finer"] == []
    assert point["weights_bytes"] == made.manifest.files["weights.data"].size
    assert point["loss"] == made.manifest.calibration["loss"]["loss"]


@pytest.mark.parametrize(("noise", "best"), [(1.0, 2), (0.01, 3)], ids=["the smallest", "the fastest"])
def test_every_attempt_is_a_point_and_the_chosen_one_is_kept(
    noise: float, best: int, g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, iter([3.0, 2.0, 0.4, 0.3, 0.2]))
    running(monkeypatch, iter([1.0, 1.1, 1.2, 1.3, 1.25]), noise)
    made, points = searched(g2p, words, tmp_path / "out", method="rtn")
    assert [len(point["finer"]) for point in points] == [0, 2, 4, 8, 16]
    assert [point["passed"] for point in points] == [False, False, True, True, True]
    assert [point["chosen"] for point in points].index(True) == best
    sizes = [point["weights_bytes"] for point in points]
    assert sizes == sorted(set(sizes))
    assert made.manifest.files["weights.data"].size == sizes[best]
    assert [each["weight"] for each in made.manifest.calibration["finer"]] == points[best]["finer"]
    assert made.manifest.calibration["loss"]["loss"]["value"] == points[best]["loss"]["value"]
    assert verify(tmp_path / "out").passed


def test_equal_runs_are_equal_bytes_whatever_the_clock_says(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        with monkeypatch.context() as patched:
            losing(patched, iter([3.0, 0.2, 0.1, 0.1, 0.1]))
            running(patched, iter([1.0, 1.1 + number, 1.2, 1.3, 1.25]), noise=2.0)
            searched(g2p, words, tmp_path / f"out{number}")
    first, second = ((tmp_path / f"out{number}/manifest.json").read_bytes() for number in range(2))
    assert first == second


def test_fp32_is_fed_the_references_once(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced, fed = evaluate._forced, []

    def counting(model: Model, *given: Any) -> Any:
        fed.append(model.manifest.precision)
        return forced(model, *given)

    monkeypatch.setattr(evaluate, "_forced", counting)
    losing(monkeypatch, iter([3.0, 0.2, 0.1, 0.1, 0.1]))
    searched(g2p, words, tmp_path / "out")
    assert (fed.count("fp32"), fed.count("int8")) == (1, 5)


def test_an_attempt_that_cannot_be_proved_is_left_out(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove, calls = products.prove, iter(range(9))

    def proved(*given: Any) -> products.Products:
        if next(calls) == 2:
            raise ParityError("a product is not that of its integers")
        return prove(*given)

    monkeypatch.setattr(products, "prove", proved)
    losing(monkeypatch, iter([3.0, 0.2, 0.1, 0.1]))
    _, points = searched(g2p, words, tmp_path / "out")
    assert [len(point["finer"]) for point in points] == [0, 2, 8, 16]


def test_a_finer_weight_is_called_what_it_is_stored_as(
    artifacts: Callable[[str], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a table that encoder and decoder share, whose finer scheme is not that of the encoder's linear layers."""
    losing(monkeypatch, iter([3.0, 2.0, 2.0, 2.0, 2.0, 0.1]))
    made = quantize(artifacts("t5").path, tmp_path / "out", scheme="mixed", limit=4, max_loss=0.5)
    models = {name: ir.load(made.file(spec.file)) for name, spec in made.manifest.graphs.items()}
    finer = {(each["graph"], each["weight"]): each["as"] for each in made.manifest.calibration["finer"]}
    floats = {(name, weight) for name, model in models.items() for weight in model.graph.initializers}
    assert {weight for weight, form in finer.items() if form == "float32"} == finer.keys() & floats
    assert set(finer.values()) == {"float32", "8 bits in blocks of 64"}
    assert {finer[graph, "lm_head.weight"] for graph in models} == {"float32"}


# Static int8


@pytest.fixture
def torn(monkeypatch: pytest.MonkeyPatch) -> str:
    """The head's input is clipped far too low: what comes out is nonsense. Its weight's name."""
    found = activations.amax_of
    monkeypatch.setattr(
        activations,
        "amax_of",
        lambda ranges, graph: {
            name: amax / (200 if (graph, name) == ("decoder", "layer_norm_6") else 1)
            for name, amax in found(ranges, graph).items()
        },
    )
    return "graph.module.head.weight.T"


def test_a_static_product_that_loses_too_much_stays_in_float_with_its_reason(
    torn: str, g2p: Artifact, words: Path, tmp_path: Path
) -> None:
    made, points = searched(g2p, words, tmp_path / "out", scheme="static", report=tmp_path / "page.html")
    calibration = made.manifest.calibration
    first = calibration["finer"][0]
    assert (first["graph"], first["weight"], first["as"]) == ("decoder", torn, "float32")
    assert first["divergence_nats"] > 10 * calibration["finer"][1]["divergence_nats"]
    assert torn in calibration["weights"]["decoder"]["float"]
    assert not points[0]["passed"]
    assert points[0]["loss"]["value"] > 0.5
    assert points[1]["chosen"]
    assert f"{torn} in float32:" in of_artifact(made)[1]
    assert verify(made.path).passed
    read = Reader((tmp_path / "page.html").read_text("utf-8"))
    assert "float32" in read.text
    assert torn in read.text


def test_a_static_search_that_finds_nothing_is_refused_with_what_the_first_lost(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, iter([3.0, 2.0, 2.0, 2.0, 2.0]))
    with pytest.raises(LossError, match=r"lost 3\.00 points"):
        searched(g2p, words, tmp_path / "out", scheme="static", report=tmp_path / "page.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]


# Ranges


def test_ranges_are_kept_and_serve_again(
    g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "kept/ranges.json"
    first = quantize(g2p.path, tmp_path / "first", scheme="static", calibration=words, ranges=file)
    before = file.read_bytes()

    def never(*arguments: object, **named: object) -> None:
        raise AssertionError("it was observed again")

    monkeypatch.setattr(activations, "observe", never)
    again = quantize(g2p.path, tmp_path / "again", scheme="static", calibration=words, ranges=file)
    assert again.manifest == first.manifest
    with pytest.raises(StaleError, match=r"ranges\.json: these ranges.*(?s:.*)data: expected"):
        quantize(g2p.path, tmp_path / "other", scheme="static", calibration=["cat", "dog"], ranges=file)
    with pytest.raises(StaleError, match="method: expected absmax, found mse"):
        quantize(g2p.path, tmp_path / "other", scheme="static", method="absmax", calibration=words, ranges=file)
    assert file.read_bytes() == before
    assert not (tmp_path / "other").exists()


def test_ranges_are_for_static_int8_and_lie_beside_artifacts(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--ranges: are of the scheme static"):
        quantize(g2p.path, tmp_path / "out", calibration=words, ranges=tmp_path / "ranges.json")
    with pytest.raises(UsageError, match="inside the artifact"):
        quantize(g2p.path, tmp_path / "out", scheme="static", calibration=words, ranges=g2p.path / "ranges.json")


# The report


def test_a_report_shows_what_was_found(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    quantize(g2p.path, tmp_path / "out", calibration=words, report=target)
    page = target.read_bytes()
    assert page.startswith(MARK)
    read = Reader(page.decode())
    for said in ("What was lost", "exact-match", "Layer by layer", "Ranges of activations", "8 bits in blocks of 64"):
        assert said in read.text
    assert [tag for tag, _ in read.tags].count("figure") > 20
    assert read.open == []


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_refused_run_leaves_the_report(
    precision: str, g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losing(monkeypatch, iter([9.0] * 9))
    with pytest.raises(LossError):
        quantize(
            *(g2p.path, tmp_path / "out"),
            **{"precision": precision, "method": "rtn", "calibration": words, "max_loss": 0.5},
            report=tmp_path / "page.html",
        )
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    read = Reader((tmp_path / "page.html").read_text("utf-8"))
    assert "refused" in read.text
    assert "lost 9.00 points" in read.text
    assert read.text.count("loses too much") >= 5
    assert "Layer by layer" in read.text


@pytest.mark.parametrize("scheme", ["weights", "static"])
def test_what_cannot_be_proved_leaves_a_report_of_what_was_seen(
    scheme: str, g2p: Artifact, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given: Any) -> None:
        raise ParityError("a product is not that of its integers")

    monkeypatch.setattr(products, "prove", wrong)
    monkeypatch.setattr(static, "prove_static", wrong)
    with pytest.raises(ParityError):
        quantize(g2p.path, tmp_path / "out", scheme=scheme, calibration=words, report=tmp_path / "page.html")
    assert [entry.name for entry in tmp_path.iterdir()] == ["page.html"]
    text = Reader((tmp_path / "page.html").read_text("utf-8")).text
    assert "a product is not that of its integers" in text
    assert "Ranges of activations" in text


def test_ctrl_c_leaves_no_page(g2p: Artifact, words: Path, tmp_path: Path) -> None:
    def progress(name: str, done: int = 0, total: int = 0) -> None:
        if name == "report":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(g2p.path, tmp_path / "out", calibration=words, report=tmp_path / "page.html", progress=progress)
    assert list(tmp_path.iterdir()) == []


PLACES: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "a folder that is not there": (lambda tmp, source: tmp / "no/page.html", "make it first"),
    "inside the source": (lambda tmp, source: source / "page.html", "is inside the artifact"),
    "a file of somebody": (lambda tmp, source: tmp / "mine.html", "never overwritten"),
}


@pytest.mark.parametrize("what", PLACES)
def test_where_no_page_may_be_is_said_before_anything_is_done(
    what: str, g2p: Artifact, words: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.html").write_text("mine")
    place, said = PLACES[what]
    seen: list[str] = []
    options = Options(calibration=words, report=place(tmp_path, g2p.path))
    with pytest.raises((ArtifactError, UsageError), match=said):
        quantize_artifact(g2p.path, tmp_path / "out", options, progress=lambda name, *_: seen.append(name))
    assert seen == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.html"]


def test_speed_is_that_of_the_same_work_in_turn(g2p: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths are forced to those of fp32, and a model is as fast as itself."""
    from txopt.calibration.data import read

    baseline, candidate, asked = Model(g2p), Model(g2p), []
    samples = read(list(WORDS), baseline)
    heard = evaluate.said(baseline, samples)
    for name, model in (("before", baseline), ("after", candidate)):
        generate = model.generate

        def spied(name: str = name, generate: Any = generate, **options: Any) -> Any:
            result = generate(**options)
            asked.append((name, result.sequences.shape[1], options["min_new_tokens"], options["max_new_tokens"]))
            return result

        monkeypatch.setattr(model, "generate", spied)
    found = speed(baseline, candidate, samples, heard)
    longest = max(map(len, heard.ids))
    assert {each[1:] for each in asked} == {(longest + 1, longest, longest)}
    names = [name for name, *_ in asked]
    assert names[:6] == ["before", "after", "after", "before", "before", "after"]
    assert len(names) == 2 * (1 + ROUNDS)
    assert 0 < found.low <= found.median <= found.high
