"""Pasts that grow by Concat become buffers: what is turned, that it says the same in place, and what is refused."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from tests.exporter import cached_decoders
from tests.exporter.cached_decoders import HEADS, LAYERS, NAMES, PRESENTS, WIDTH, WORDS, exported
from txopt.exporter import foreign, foreign_child, in_place
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import ParityError, SourceError

Array = NDArray[Any]

OPTIMUM = Path(__file__).parents[1] / "data" / "optimum"
KINDS = ("Unmasked", "Causal", "Filled", "Padded", "Biased", "Sdpa", "UpperLeft", "Grouped", "Interleaved")
ROADS = {"TorchScript": {"dynamo": False}, "dynamo": {"dynamo": True}, "opset 23": {"dynamo": True, "opset": 23}}


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's work without a child, which would import everything once more for every file."""
    monkeypatch.setattr(
        foreign,
        "ask",
        lambda module, source, task, progress: foreign_child.work(
            {"source": str(source), **task}, progress or (lambda _: None)
        ),
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A decoder's file by one of the roads, each made once."""
    made: dict[object, Path] = {}

    def make(kind: str, road: str = "dynamo", tokens: int | None = None) -> Path:
        key = kind, road, tokens
        if key not in made:
            folder = tmp_path_factory.mktemp("files")
            made[key] = exported(getattr(cached_decoders, kind), folder, tokens=tokens, **ROADS[road])
        return made[key]

    return make


@pytest.fixture(scope="module")
def optimum(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Optimum's decoder_with_past_model.onnx of a family."""
    folder = tmp_path_factory.mktemp("optimum")

    def make(family: str) -> Path:
        with tarfile.open(OPTIMUM / f"{family}.tar.xz") as archive:
            archive.extractall(folder / family, filter="data")
        return folder / family / "decoder_with_past_model.onnx"

    return make


def turned(file: Path, out: Path, **options: Any) -> foreign.OptimizeReport:
    return foreign.optimize(file, out, in_place_cache=True, **options)


def axes(values: Any) -> dict[str, list[int | str]]:
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


def check_buffers(out: Path, buffers: dict[str, str]) -> onnx.ModelProto:
    """Every one of ``buffers`` is written by a TensorScatter at the position, under the old names and with one length."""
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    inputs, outputs = axes(model.graph.input), axes(model.graph.output)
    assert list(inputs)[-1] == "cache_position"
    assert inputs["cache_position"] == [1]
    scatters = {node.input[0]: node for node in model.graph.node if node.op_type == "TensorScatter"}
    assert {past: node.output[0] for past, node in scatters.items()} == buffers
    for past, present in buffers.items():
        assert inputs[past] == outputs[present]
        assert inputs[past][2] == "cache_length"
    assert not [node for node in model.graph.node if node.op_type == "Concat" and set(node.input) & set(buffers)]
    return model


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_past_becomes_a_buffer_and_the_graph_says_the_same(
    files: Any, tmp_path: Path, kind: str, road: str
) -> None:
    report = turned(files(kind, road), tmp_path / "out")
    assert report.cache == {
        "buffers": dict(zip(NAMES, PRESENTS, strict=True)),
        "position": "cache_position",
        "length": "cache_length",
    }
    check_buffers(tmp_path / "out", report.cache["buffers"])
    assert report.operators["Attention"] == LAYERS
    assert report.operators["TensorScatter"] == 2 * LAYERS
    assert report.parity["largest_error"] < 1e-6
    sizes = [run["sizes"] for run in report.parity["runs"]]
    assert len(sizes) == 5
    for name, least in (("batch", 3), ("length", 4), ("past", 5), ("cache_length", 4)):
        assert len({size[name] for size in sizes}) >= least, name
    assert {1, 4} <= {size["length"] for size in sizes}
    assert {0, 1, 16} <= {size["past"] for size in sizes}


@pytest.mark.parametrize("road", ["TorchScript", "dynamo"])
def test_a_file_that_takes_one_token_a_step_is_turned_too(files: Any, tmp_path: Path, road: str) -> None:
    report = turned(files("Causal", road, tokens=1), tmp_path / "out")
    check_buffers(tmp_path / "out", dict(zip(NAMES, PRESENTS, strict=True)))
    assert report.parity["largest_error"] < 1e-6


@pytest.mark.parametrize("family", ["t5", "bart", "marian", "whisper"])
def test_optimums_decoder_keeps_its_cross_attention_and_gets_buffers(optimum: Any, tmp_path: Path, family: str) -> None:
    report = turned(optimum(family), tmp_path / "out")
    buffers = {
        f"past_key_values.{layer}.decoder.{kind}": f"present.{layer}.decoder.{kind}"
        for layer in range(2)
        for kind in ("key", "value")
    }
    model = check_buffers(tmp_path / "out", buffers)
    cross = {name: found for name, found in axes(model.graph.input).items() if ".encoder." in name}
    assert len(cross) == 4
    assert all("cache_length" not in found for found in cross.values())
    assert report.operators["Attention"] == 4
    assert report.parity["largest_error"] < 1e-5


def test_buffers_that_are_bound_in_place_say_what_growing_pasts_say(files: Any, tmp_path: Path) -> None:
    """A prompt of three tokens and six steps; every buffer is input and output at one address, and keeps it."""
    file, batch, places = files("Causal"), 2, 16
    turned(file, tmp_path / "out")
    original, runner = Runner(file), Runner(tmp_path / "out" / "model.onnx")
    random = np.random.default_rng(0)
    ids = random.integers(0, WORDS, (batch, 9))
    pasts = {name: np.zeros((batch, HEADS, 0, WIDTH // HEADS), np.float32) for name in NAMES}
    arrays = {name: random.normal(size=(batch, HEADS, places, WIDTH // HEADS)).astype(np.float32) for name in NAMES}
    untouched = {name: array.copy() for name, array in arrays.items()}
    buffers = {name: runner.tensor(array) for name, array in arrays.items()}
    first = 0
    for count in (3, 1, 1, 1, 1, 1, 1):
        new = ids[:, first : first + count]
        expected = {name: original.array(value) for name, value in original.run({"ids": new, **pasts}).items()}
        pasts = {past: expected[present] for past, present in zip(NAMES, PRESENTS, strict=True)}
        logits = np.empty(expected["logits"].shape, np.float32)
        inputs = {"ids": runner.tensor(new), "cache_position": runner.tensor(np.array([first])), **buffers}
        outputs = {present: buffers[past] for past, present in zip(NAMES, PRESENTS, strict=True)}
        runner.bind(inputs, {"logits": runner.tensor(logits), **outputs}).run()
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-5)
        first += count
    for name, array in arrays.items():
        np.testing.assert_allclose(array[:, :, :first], pasts[name], atol=1e-5)
        np.testing.assert_array_equal(array[:, :, first:], untouched[name][:, :, first:])


def test_a_buffer_that_is_too_short_is_refused_by_the_engine(files: Any, tmp_path: Path) -> None:
    turned(files("Causal"), tmp_path / "out")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    feeds = {name: np.zeros((1, HEADS, 4, WIDTH // HEADS), np.float32) for name in NAMES}
    with pytest.raises(Exception, match="max_sequence_length"):
        session.run(None, {"ids": np.ones((1, 2), np.int64), "cache_position": np.array([3]), **feeds})


def test_it_is_done_only_where_asked(files: Any, tmp_path: Path) -> None:
    report = foreign.optimize(files("Causal"), tmp_path / "out")
    assert report.cache is None
    assert "TensorScatter" not in report.operators


def test_fusions_are_proved_alone_as_ever(files: Any, tmp_path: Path) -> None:
    report = turned(files("Padded"), tmp_path / "out", prove=True)
    assert report.fusions["Attention"]["proof"]["held"] == LAYERS
    assert report.operators["TensorScatter"] == 2 * LAYERS


# What is refused.


@pytest.mark.parametrize(
    ("kind", "road", "reasons"),
    [
        ("Reversed", "dynamo", ["node_cat puts what is new before past_key.0", "node_cat_3 puts what is new before"]),
        ("Peeking", "dynamo", [r"node_ReduceMean_\d+ \(ReduceMean\) reads past_value.1"]),
        ("Peeking", "TorchScript", [r"/ReduceMean \(ReduceMean\) reads past_value.1"]),
        (
            "Capped",
            "dynamo",
            [
                r"node_transpose_3 \(Transpose\) reads present_key.0",
                r"node_matmul_1 \(MatMul\) reads present_value.0",
                "not fused: node_softmax: node_tanh changes the scores",
            ],
        ),
    ],
)
def test_a_near_miss_is_refused_with_the_node_and_the_reason(
    files: Any, tmp_path: Path, kind: str, road: str, reasons: list[str]
) -> None:
    with pytest.raises(SourceError, match="its pasts cannot become buffers") as caught:
        turned(files(kind, road), tmp_path / "out")
    for reason in reasons:
        assert caught.match(reason)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["decoder_model.onnx", "encoder_model.onnx"])
def test_a_file_without_a_growing_past_has_nothing_to_turn(optimum: Any, tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=f"{name}: nothing to turn into a buffer; expected Concat"):
        turned(optimum("t5").with_name(name), tmp_path / "out")


def small(nodes: str, past: str = "float[b,2,p,4]", new: str = "float[b,2,l,4]") -> onnx.ModelProto:
    """One block over a past, written by hand."""
    text = f"""<ir_version: 10, opset_import: ["" : 23]> net ({new} q, {past} past, {new} new) => ({new} y, {past} present) {{
        {nodes}
    }}"""
    made = onnx.parser.parse_model(text)
    for node in made.graph.node:
        node.name = f"{node.op_type}_{node.output[0]}"
    return made


ATTENTION = "y = Attention(q, present, present)"


def test_one_cache_that_is_both_k_and_v_is_turned(tmp_path: Path) -> None:
    onnx.save(small(f"present = Concat<axis = -2>(past, new) {ATTENTION}"), tmp_path / "in.onnx")
    turned(tmp_path / "in.onnx", tmp_path / "out")
    check_buffers(tmp_path / "out", {"past": "present"})


GROWN = "present = Concat<axis = 2>(past, new) a = Attention(q, present, present)"
READ_ACROSS = """n = Shape(past) i = Constant<value_ints = [1]>() j = Constant<value_ints = [4]>() part = Slice(n, i, j)
    m = Shape<start = -2>(present) both = Concat<axis = 0>(part, m) sum = ReduceSum<keepdims = 0>(both)"""
READ_IN_A_BRANCH = """rows = Shape<start = 0, end = 1>(past) one = Constant<value_ints = [1]>() asked = Greater(rows, one)
    sum = If(asked) <then_branch = a () => (float t) { x = Shape<start = 2, end = 3>(present) w = Squeeze(x) t = Cast<to = 1>(w) },
        else_branch = b () => (float f) { z = Shape(past) k = ReduceSum<keepdims = 0>(z) f = Cast<to = 1>(k) }>"""


ALIBI = """zero = Constant<value_int = 0>() one = Constant<value_int = 1>() two = Constant<value_int = 2>()
    l = Shape<start = 2, end = 3>(q) c = Shape<start = 2, end = 3>(present) size = Concat<axis = 0>(l, c)
    last = Squeeze(c) keys = Range(zero, last, one) rest = Mod(keys, two) even = Equal(rest, zero)
    number = Cast<to = 1>(keys) added = Expand(number, size) boolean = Expand(even, size)"""


@pytest.mark.parametrize("mask", ["", ", boolean", ", added"])
def test_is_causal_becomes_a_mask(tmp_path: Path, mask: str) -> None:
    """Some engines take no mask beside it."""
    nodes = f"present = Concat<axis = 2>(past, new) {ALIBI} y = Attention<is_causal = 1>(q, present, present{mask})"
    onnx.save(small(nodes), tmp_path / "in.onnx")
    turned(tmp_path / "in.onnx", tmp_path / "out")
    model = check_buffers(tmp_path / "out", {"past": "present"})
    (attention,) = [node for node in model.graph.node if node.op_type == "Attention"]
    assert len(attention.input) == 4
    assert "is_causal" not in {attribute.name for attribute in attention.attribute}


def test_a_cache_of_fewer_heads_than_queries_is_turned(tmp_path: Path) -> None:
    nodes = "present = Concat<axis = 2>(past, new) qq = Concat<axis = 1>(q, q) both = Attention(qq, present, present)"
    onnx.save(small(f"{nodes} y, z = Split<axis = 1, num_outputs = 2>(both)"), tmp_path / "in.onnx")
    turned(tmp_path / "in.onnx", tmp_path / "out")
    check_buffers(tmp_path / "out", {"past": "present"})


@pytest.mark.parametrize("read", [READ_ACROSS, READ_IN_A_BRANCH], ids=["across", "in a branch"])
def test_whoever_reads_a_length_hears_of_the_places_that_are_filled(tmp_path: Path, read: str) -> None:
    onnx.save(small(f"{GROWN} {read} f = Cast<to = 1>(sum) y = Add(a, f)"), tmp_path / "in.onnx")
    turned(tmp_path / "in.onnx", tmp_path / "out")
    check_buffers(tmp_path / "out", {"past": "present"})


def test_names_that_are_taken_are_left_to_the_file(tmp_path: Path) -> None:
    model = small(f"{GROWN} f = Cast<to = 1>(cache_position) y = Add(a, f)")
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.INT64, ["cache_length", 1, 1, 1])
    model.graph.input.append(onnx.helper.make_value_info("cache_position", kind))
    onnx.save(model, tmp_path / "in.onnx")
    report = turned(tmp_path / "in.onnx", tmp_path / "out")
    assert report.cache == {
        "buffers": {"past": "present"},
        "position": "cache_position_",
        "length": "cache_length_",
    }


def test_shapes_that_a_file_states_wrongly_do_not_spread(files: Any, tmp_path: Path) -> None:
    """torch writes the batch that it saw into outputs whose axes nobody named."""
    model = onnx.load(files("Causal", "TorchScript"))
    for output in model.graph.output[1:]:
        output.type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, tmp_path / "in.onnx")
    turned(tmp_path / "in.onnx", tmp_path / "out")
    written = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert all(found[0] != 2 for found in axes(written.graph.output).values())


@pytest.mark.parametrize(
    ("nodes", "kinds", "reason"),
    [
        (f"present = Concat<axis = 1>(past, new) {ATTENTION}", (), "Concat_present joins along axis 1"),
        (f"present = Concat<axis = 2>(past, new, new) {ATTENTION}", (), "Concat_present joins 3 values"),
        (
            f"present = Concat<axis = 2>(past, new) {ATTENTION}",
            ("float[b,2,6,4]",),
            "Concat_present joins past, whose length is always 6; export it with one that varies",
        ),
        (
            "present = Concat<axis = 1>(past, new) y = Add(q, new)",
            ("float[b,p,4]", "float[b,l,4]"),
            "Concat_present joins past, which has 3 axes",
        ),
        (
            f"grown = Concat<axis = 2>(past, new) present = Neg(grown) {ATTENTION}",
            (),
            "nothing to turn into a buffer; (.|\n)*Concat_grown gives grown, which is no output",
        ),
        (
            "present = Concat<axis = 2>(past, new) n = Constant<value_ints = [1, 2, 1, 1]>() k = Tile(present, n) "
            "qq = Concat<axis = 1>(q, q) both = Attention(qq, k, k) y, z = Split<axis = 1, num_outputs = 2>(both)",
            (),
            r"Tile_k \(Tile\) reads present(.|\n)*not fused: Attention_both: Tile_k repeats all heads one after the other",
        ),
        (
            "present = Concat<axis = 2>(past, new) y = Attention(q, present, new)",
            (),
            "Attention_y reads present alone; expected its K and its V",
        ),
    ],
)
def test_a_concat_of_another_form_is_told_with_its_reason(
    tmp_path: Path, nodes: str, kinds: tuple[str, ...], reason: str
) -> None:
    onnx.save(small(nodes, *kinds), tmp_path / "in.onnx")
    with pytest.raises(SourceError, match=reason):
        turned(tmp_path / "in.onnx", tmp_path / "out")


# That the proof sees what goes wrong.


def visible_too_far(rewriter: Any, attention: Any) -> Any:
    """One place too many is seen."""
    rewriter.filled = rewriter.add("Add", rewriter.filled, rewriter.scalar(1, in_place.ir.DataType.INT64))
    return VISIBLE(rewriter, attention)


VISIBLE = in_place._Rewriter.visible


def test_a_mask_that_shows_one_place_too_many_is_found(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place._Rewriter, "visible", visible_too_far)
    with pytest.raises(ParityError, match="logits deviates by"):
        turned(files("Unmasked"), tmp_path / "out")


def test_a_mask_that_is_padded_with_what_shows_is_found(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scalar = in_place._Rewriter.scalar
    monkeypatch.setattr(in_place._Rewriter, "scalar", lambda self, number, dtype: scalar(self, 0, dtype))
    with pytest.raises(ParityError, match="logits deviates by"):
        turned(files("Causal"), tmp_path / "out")


def test_a_length_that_is_read_off_the_buffer_is_found(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_place._Rewriter, "read", lambda self, value, past, length: None)
    with pytest.raises(ParityError):
        turned(files("Biased"), tmp_path / "out")


def test_a_buffer_that_is_changed_behind_the_new_tokens_is_found(
    files: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new tokens go one place too far."""
    scatter = in_place._Rewriter.scatter

    def moved(rewriter: Any, pair: Any) -> None:
        position = rewriter.position
        rewriter.position = rewriter.add("Add", position, rewriter.scalar(1, in_place.ir.DataType.INT64))
        scatter(rewriter, pair)
        rewriter.position = position

    monkeypatch.setattr(in_place._Rewriter, "scatter", moved)
    with pytest.raises(ParityError):
        turned(files("Unmasked"), tmp_path / "out")
