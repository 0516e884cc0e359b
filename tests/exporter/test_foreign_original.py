"""The foreign file is asked itself: axis names that it does not hold to, and what it cannot be asked or is not asked."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from txopt.exporter import foreign, foreign_original
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import InputError, SourceError

SUM = "s = ReduceSum<keepdims=1>(b, ones) y = Add(a, s)"  # nothing asks for equal lengths
PAIR = "c = Mul(a, m) s = ReduceSum<keepdims=1>(b, ones) y = Add(c, s)"
PAIRS = "c = Mul(a, m) d = Mul(b, n) s = ReduceSum<keepdims=1>(d, ones) y = Add(c, s)"


def asked(nodes: str, inputs: str, folder: Path) -> foreign_original.Original:
    listed = ", ".join(f"float[rows,length] {name}" for name in inputs)
    made = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> net ({listed}) => (float[rows,length] y) '
        f"<int64[1] ones = {{1}}> {{ {nodes} }}"
    )
    file = folder / "in.onnx"
    onnx.save(made, file)
    return foreign_original.ask(file, ir.from_proto(made))


@pytest.mark.parametrize(
    ("nodes", "inputs", "expected"),
    [
        ("y = Add(a, b)", "ab", set()),
        (SUM, "ab", {("a", 1)}),
        (PAIR, "amb", {("b", 1)}),
        (PAIRS, "ambn", {("a", 1), ("m", 1)}),
        ("y = Identity(a)", "a", set()),
    ],
)
def test_lengths_of_one_name_that_may_differ_are_told_apart(
    nodes: str, inputs: str, expected: set[tuple[str, int]], tmp_path: Path
) -> None:
    original = asked(nodes, inputs, tmp_path)
    assert set(original.renamed) == expected
    assert len(set(original.renamed.values())) == (1 if expected else 0), "those that go together keep one name"
    assert [answer.feeds["a"].shape for answer in original.answers] != []


def test_answers_are_to_unequal_lengths(tmp_path: Path) -> None:
    first = asked(SUM, "ab", tmp_path).answers[0].feeds
    assert first["a"].shape[1] != first["b"].shape[1]


def test_new_names_go_to_a_fresh_graph_and_old_ones_are_forgotten() -> None:
    model = ir.from_proto(
        onnx.shape_inference.infer_shapes(
            onnx.parser.parse_model(
                '<ir_version: 8, opset_import: ["" : 17]> net (float[rows,length] a, float[rows,length] b) => (float[rows,length] y) '
                "{ c = Relu(b) y = Mul(a, c) }"
            )
        )
    )
    foreign_original.rename(model, {("b", 1): "other"})
    shapes = {str(value.name): str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert shapes == {"a": "[rows,length]", "b": "[rows,other]", "y": "[rows,None]"}
    assert str(model.graph[0].outputs[0].shape) == "[rows,None]"


def test_a_file_with_one_name_for_source_and_target_is_optimized_for_both(tmp_path: Path) -> None:
    """Keys are read by the length of "sequence" twice; the fused file must run where they differ, as the original does."""
    nodes = (
        "t = Transpose<perm=[0,2,1]>(k) s = MatMul(q, t) p = Softmax<axis=-1>(s) o = MatMul(p, k) "
        "l = Shape<start=1,end=2>(o) r = Concat<axis=0>(l, left) y = Reshape(o, r) "
        "m = Shape<start=1,end=2>(k) n = Concat<axis=0>(m, left) z = Reshape(k, n)"
    )
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[batch,sequence,4] q, float[batch,sequence,4] k) '
        f"=> (float[?,?] y, float[?,?] z) <int64[1] left = {{-1}}> {{ {nodes} }}"
    )
    file = tmp_path / "in.onnx"
    onnx.save(made, file)
    report = foreign.optimize(file, tmp_path / "out")
    assert report.fusions["Attention"]["fused"] == 1
    feeds = {"q": np.ones((2, 3, 4), np.float32), "k": np.ones((2, 8, 4), np.float32)}
    before, after = Runner(file), Runner(tmp_path / "out" / "model.onnx")
    for name in ("y", "z"):
        np.testing.assert_allclose(
            after.array(after.run(feeds)[name]), before.array(before.run(feeds)[name]), rtol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("end", ["x", "y"])
def test_bfloat16_at_the_ends_is_refused_with_what_to_do(end: str, tmp_path: Path) -> None:
    kinds = {"x": "float", "y": "float", end: "bfloat16"}
    text = (
        f'<ir_version: 10, opset_import: ["" : 20]> net ({kinds["x"]}[batch,8] x) => ({kinds["y"]}[batch,8] y) '
        f"{{ wide = Cast<to=1>(x) h = Gelu(wide) y = Cast<to={16 if end == 'y' else 1}>(h) }}"
    )
    onnx.save(onnx.parser.parse_model(text), file := tmp_path / "in.onnx")
    said = f"{end}: expected float16, float32, .* which numpy has .* found bfloat16.*export it with float32"
    with pytest.raises(SourceError, match=said):
        foreign.optimize(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_batch_is_for_unfused_files_alone(tmp_path: Path) -> None:
    """docs/optimize.md says so; once the engine takes one, the sentence goes."""
    attention = "k = Transpose<perm=[0,2,1]>(x) s = MatMul(x, k) p = Softmax<axis=-1>(s) y = MatMul(p, x)"
    text = f'<ir_version: 8, opset_import: ["" : 17]> net (float[rows,length,8] x) => (float[rows,length,8] y) {{ {attention} }}'
    onnx.save(onnx.parser.parse_model(text), file := tmp_path / "in.onnx")
    report = foreign.optimize(file, tmp_path / "out")
    assert report.fusions["Attention"]["fused"] == 1
    for shape in ((0, 3, 8), (2, 0, 8)):
        feeds = {"x": np.zeros(shape, np.float32)}
        answers = Runner(file)
        assert answers.array(answers.run(feeds)["y"]).shape == shape
        with pytest.raises(InputError, match="must be greater than 0"):
            Runner(tmp_path / "out" / "model.onnx").run(feeds)
