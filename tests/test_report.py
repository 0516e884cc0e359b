"""The page of ``txopt quantize --report``: what it shows, that equal input is an equal page, that nothing in it can run or load."""

import copy
import json
import re
from typing import Any

import pytest

from tests.test_cli import txopt
from tests.test_page import EVIL, Reader
from txopt.page.chart import apart, bars, scale
from txopt.page.quantization import _short, content
from txopt.page.render import render


def estimate(value: float | None, room: float = 0.5) -> dict[str, float | None]:
    return {
        "value": value,
        "low": None if value is None else value - room,
        "high": None if value is None else value + room,
    }


def point(
    size: int, loss: float | None, finer: int, *, passed: bool, chosen: bool = False, speed: float | None = 2.0
) -> dict[str, Any]:
    return {
        "weights_bytes": size,
        "loss": estimate(loss),
        "forced_tokens": estimate(99.0),
        "finer": [f"w{index}" for index in range(finer)],
        "passed": passed,
        "chosen": chosen,
        "front": True,
        "speed": None if speed is None else {"median": speed, "low": speed - 0.1, "high": speed + 0.1},
    }


def samples(**more: Any) -> dict[str, Any]:
    counts = {"found": 300, "duplicates": 0, "samples": 128, "references": 128, "places": 900, "label_tokens": 777}
    return {"sha256": "ab" * 32, "synthetic": False, **counts, "seconds": None, "notices": [], **more}


def document() -> dict[str, Any]:
    histogram = {"bar_width": 0.5, "bars": [100, 50, 0, 1]}
    found = {"amax": 1.5, "min": -1.0, "max": 1.9, "count": 151, "method": "mse", "histogram": histogram}
    return {
        "out": "out",
        "source": "some/checkpoint",
        "precision": "int8",
        "max_loss": 0.3,
        "refused": None,
        "scheme": {"bits": 8, "block": 64, "symmetric": True, "method": "rtn"},
        "weights_before": 8_000_000,
        "points": [
            point(2_000_000, 1.25, 0, passed=False),
            point(2_100_000, 0.125, 2, passed=True, chosen=True),
            point(2_400_000, 0.0, 4, passed=True),
        ],
        "sensitivities": {"decoder:head": 0.01},
        "layers": [
            {"graph": "decoder", "name": "head", "rows": 64, "columns": 80, "form": None, "weight": 0.0, "output": 0.0},
            {
                "graph": "encoder",
                "name": "table",
                "rows": 64,
                "columns": 9,
                "form": "8 bits",
                "weight": 0.01,
                "output": None,
            },
            {
                "graph": "decoder",
                "name": "fc",
                "rows": 64,
                "columns": 9,
                "form": "8 bits",
                "weight": 0.01,
                "output": 0.04,
            },
        ],
        "outliers": [
            {
                "graph": "decoder",
                "name": "gelu",
                "kind": "activation",
                "channel": 17,
                "largest": 90.0,
                "tail": 3.0,
                "times": 30.0,
            }
        ],
        "observed": 32,
        "ranges": [{"graph": "decoder", "name": "gelu", "clipped": True, "times": 1.1, **found}],
        "calibrated": samples(),
        "measured": samples(samples=172),
        "loss": {
            "data": {"sha256": "cd" * 32, "samples": 172, "references": "data"},
            "metric": {"name": "word-error", "signature": "word-error|refs:any"},
            "baseline": {"sha256": "12" * 32, "figure": estimate(35.0)},
            "candidate": {"sha256": "34" * 32, "figure": estimate(35.125)},
            "loss": estimate(0.125),
            "changed": 3,
            "agreement": {"forced_tokens": estimate(99.5), "divergence_nats": estimate(0.002, 0.001)},
            "interval": {"method": "paired bootstrap", "confidence": 0.95, "resamples": 1000, "seed": 0},
            "max_loss": 0.3,
            "passed": True,
        },
        "finer": [{"graph": "decoder", "weight": "head", "as": "float32", "divergence_nats": 0.01}],
    }


def page_of(given: dict[str, Any]) -> tuple[str, Reader]:
    page = render(content(given), "quantization.html")
    read = Reader(page)
    assert read.open == []
    return page, read


def test_equal_input_is_an_equal_page() -> None:
    given = document()
    before = copy.deepcopy(given)
    assert page_of(given)[0] == page_of(json.loads(json.dumps(document())))[0]
    assert given == before


def test_every_part_is_there() -> None:
    page, read = page_of(document())
    text = " ".join(Reader(page.replace("</td>", " </td>")).text.split())
    for said in (
        "lost 0.12, allowed 0.3",
        "some/checkpoint in int8: weights: 8 bits in blocks of 64, symmetric, by rtn",
        "word-error, quantized 35.12 34.62 to 35.62",
        "tokens chosen alike, fed the same ones 99.50 %",
        "0.263x of 8.0 MB",
        "2 2 2.1 MB 0.12 -0.38 to 0.62 99.00 % 2.00x (1.90 to 2.10) chosen",
        "decoder head float32 0.01",
        "decoder activation gelu 17 90 3 30.0",
        "clipped at 1.5",
        "172 of 300",
        "ab" * 32,
    ):
        assert said in text, said
    circles = [attributes["class"] for tag, attributes in read.tags if tag == "circle"]
    assert circles == 2 * ["failed", "chosen", "passed"]
    assert text.index("encoder table") < text.index("decoder head 64")
    assert "<script" not in page


def test_a_point_that_holds_and_is_beaten_is_said_to_be() -> None:
    given = document()
    for each in given["points"]:
        each["front"] = False
    _, read = page_of(given)
    assert read.text.count("holds, but another is better in all three") == 1


def test_a_refusal_shows_its_message_and_no_chosen_point() -> None:
    given = document() | {"refused": "lost too much\n  - by far"}
    for each in given["points"]:
        each |= {"chosen": False, "passed": False}
    _, read = page_of(given)
    assert "✗ refused" in read.text
    assert "lost too much\n  - by far" in read.text
    assert "chosen" not in {attributes.get("class") for tag, attributes in read.tags if tag == "circle"}


def test_what_was_not_found_out_before_a_refusal_is_left_out() -> None:
    asked = {key: document()[key] for key in ("out", "source", "precision", "max_loss")}
    _, read = page_of({**asked, "refused": "nothing could be proved"})
    assert "nothing could be proved" in read.text
    assert not [tag for tag, _ in read.tags if tag == "section"]
    some = document() | {"points": [], "loss": None, "scheme": None, "finer": [], "refused": "no proof"}
    assert "Layer by layer" in page_of(some)[1].text


def test_numbers_that_are_none_have_no_place_on_the_chart() -> None:
    given = document()
    given["points"][0]["loss"] = estimate(None)
    page, read = page_of(given)
    assert "not a number" in read.text
    assert len([tag for tag, _ in read.tags if tag == "circle"]) == 4
    assert not re.search(r"\b(nan|inf|None)\b", page)


def test_speeds_that_were_not_measured_have_no_chart() -> None:
    given = document()
    for each in given["points"]:
        each["speed"] = None
    _, read = page_of(given)
    assert "times as fast" not in read.text
    assert "speed beside fp32" not in read.text


def evil(value: Any) -> Any:
    """``value`` with every name and text in it made one that would run."""
    if isinstance(value, dict):
        return {key: each if key in ("kind", "graph") else evil(each) for key, each in value.items()}
    if isinstance(value, list):
        return [evil(each) for each in value]
    return f"'\"><img src=x onerror=alert(2)>{EVIL}" if isinstance(value, str) else value


def test_names_are_text_and_nothing_else() -> None:
    page, read = page_of(evil(document()) | {"refused": EVIL})
    assert "alert(1)" in page
    assert not re.search(r"<\s*(script|img|iframe|link|object|base)", page, re.IGNORECASE)
    assert not [name for _, attributes in read.tags for name in attributes if name.startswith(("on", "href", "src"))]


def test_the_page_loads_nothing_and_forbids_scripts() -> None:
    page, read = page_of(document())
    policies = [attributes for tag, attributes in read.tags if tag == "meta" and "http-equiv" in attributes]
    assert [each["content"] for each in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert not re.search(r"https?:|url\(|@import", page)


def test_hundreds_of_layers_stay_a_page() -> None:
    given = document()
    given["layers"] = [{**given["layers"][2], "name": f"fc{index}"} for index in range(1000)]
    given["ranges"] = [{**given["ranges"][0], "name": f"gelu{index}", "times": index} for index in range(500)]
    page, read = page_of(given)
    assert "And 600 more." in read.text
    assert "And 440 more, which reach less far." in read.text
    assert "gelu499" in page
    assert "gelu3 " not in page
    assert len(page) < 500_000


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("head.weight", "head.weight"),
        ("a.0.query.weight.T|a.0.key.weight.T|a.0.value.weight.T", "a.0.(query|key|value).weight.T"),
        ("query.w|key.w", "(query|key).w"),
        ("a|b", "a|b"),
        ("a.w|a.w", "a.w|a.w"),
    ],
)
def test_packed_weights_have_one_name(name: str, short: str) -> None:
    assert _short(name) == short


# Charts


@pytest.mark.parametrize("numbers", [[0.0], [1.0, 1.0], [-3.0, 5.0], [0.999, 1.001], [1e-9, 2e-9], [1e6, 3e6]])
def test_a_scale_holds_its_numbers_and_has_a_few_round_ticks(numbers: list[float]) -> None:
    found = scale(numbers, 50, 500)
    assert all(50 <= found.at(number) <= 500 for number in numbers)
    assert 2 <= len(found.ticks()) <= 11
    places = [place for place, _ in found.ticks()]
    assert places == sorted(set(places))
    assert len({text for _, text in found.ticks()}) == len(places)


def test_labels_do_not_lie_on_each_other() -> None:
    places = apart([(10, 10), (11, 10), (12, 11), (300, 10)])
    assert len({(round(x / 16), round(y / 13)) for x, y in places}) == 4


def test_bars_are_one_outline() -> None:
    assert bars([1, 0, 1], 30, 10) == "M0 10V0.0H10.0V10.0H20.0V0.0H30.0V10Z"
    assert bars([], 30, 10) == "M0 10V10Z"


def test_2_what_cannot_be_done_is_said(tmp_path: Any) -> None:
    done = txopt("quantize", "nowhere", "out", "--report", "no/page.html", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "make it first" in done.stderr
    done = txopt("export", "nowhere", "out", "--report", "page.html", cwd=tmp_path)
    assert done.returncode == 2
    assert "report: is for int8, int4, fp8" in done.stderr


def test_ranges_are_printed(tmp_path: Any) -> None:
    histogram = {"bar_width": 0.5, "bars": [9, 5, 0, 1]}
    found = {"amax": 1.5, "min": -1.0, "max": 1.9, "count": 15, "method": "mse", "histogram": histogram}
    key = {"graph": "ab" * 32, "data": "cd" * 32, "method": "mse", "settings": {"steps": "loop"}}
    stored = {"format": 1, "key": key, "tensors": {"decoder:gelu\u001b[2J": found}}
    (tmp_path / "ranges.json").write_text(json.dumps(stored))
    done = txopt("inspect", "ranges.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ranges of 1 tensors, by mse" in done.stdout
    assert "steps loop" in done.stdout
    assert "-1 to 1.9, clipped at 1.5; 15 values" in done.stdout
    assert "\u001b" not in done.stdout
    assert json.loads(txopt("inspect", "ranges.json", "--json", cwd=tmp_path).stdout)["key"] == key
    refused = txopt("inspect", "ranges.json", "--html", "page.html", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
