"""Q, K and V side by side: what becomes one projection, what must not and why, and that the numbers stay."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.exporter.plain_engine import run
from txopt.exporter import fusion
from txopt.exporter.fusion.qkv import fuse
from txopt.exporter.graph import count

Array = NDArray[Any]

WIDTH, HEADS, SIZE = 8, 4, 2
TOLERANCE = {np.float32: 1e-5, np.float16: 2e-2}  # absolute, of values up to 22


class Block:
    """Self-attention as it is after the trace, node by node.

    Args:
        half: float16 throughout.
        biases: which of "qkv" have one; K's stands on the left.
        cut: the shape that cuts into heads; a number is a constant, "x[1]" the length of that axis of x.
        kv_heads: fewer than HEADS for grouped queries.
        cached: K and V are written into buffers, and attention reads those.
        layers: what the weights of each layer begin with; layers of one name share them.
    """

    def __init__(
        self,
        *,
        half: bool = False,
        biases: str = "qkv",
        cut: Sequence[int | str] = ("x[0]", "x[1]", -1, SIZE),
        kv_heads: int = HEADS,
        cached: bool = False,
        layers: Sequence[str] = ("",),
    ) -> None:
        self.dtype = np.float16 if half else np.float32
        self.random = np.random.default_rng(0)
        self.heads = dict(zip("qkv", (HEADS, kv_heads, kv_heads), strict=True))
        self.biases, self.cached = biases, cached
        self.constants: dict[str, Array] = {}
        self.nodes: dict[str, onnx.NodeProto] = {}
        self.inputs: dict[str, Sequence[int | str]] = {"x": ("R", "Q", WIDTH)}
        self.outputs: list[str] = []
        self.add("Shape", ["x"], "x[0]", start=0, end=1)
        self.add("Shape", ["x"], "x[1]", start=1, end=2)
        self.add("Shape", ["x"], "x[:]")
        counted, swapped = ("x[0]", "x[1]", HEADS, SIZE), ("x[1]", "x[0]", HEADS, SIZE)
        shapes = {
            "cut": cut,
            "cut again": cut,
            "counted cut": counted,
            "swapped cut": swapped,
        }  # all but the first for read()
        for name, parts in shapes.items():
            self.constants |= {str(part): np.array([part]) for part in parts if isinstance(part, int)}
            self.add("Concat", [str(part) for part in parts], name, axis=0)
        y = "x"
        for index, weights in enumerate(layers):
            y = self.layer(y, f"layer.{index}", weights)
        self.outputs.append(y)

    def layer(self, x: str, scope: str, weights: str) -> str:
        operands = [self.projection(part, x, scope, weights) for part in "qkv"]
        for index, part in enumerate("kv" if self.cached else "", start=1):
            buffer, written = f"{scope}/{part}_buffer", f"{scope}/{part}_written"
            self.inputs |= {"position": ("R",), buffer: ("R", self.heads[part], "S", SIZE)}
            operands[index] = self.add("TensorScatter", [buffer, operands[index], "position"], written, axis=2)
            self.outputs.append(written)
        self.add("Attention", operands, f"{scope}/attended")
        self.add("Transpose", [f"{scope}/attended"], f"{scope}/by_token", perm=[0, 2, 1, 3])
        return self.add("Reshape", [f"{scope}/by_token", "x[:]"], f"{scope}/y", allowzero=1)

    def projection(self, part: str, x: str, scope: str, weights: str) -> str:
        width, name, own = self.heads[part] * SIZE, f"{scope}/{part}", f"{weights}{part}"
        self.constants.setdefault(f"{own}.weight", self.random.normal(size=(WIDTH, width)).astype(self.dtype))
        below = self.add("MatMul", [x, f"{own}.weight"], f"{name}_product")
        if part in self.biases:
            self.constants.setdefault(f"{own}.bias", self.random.normal(size=width).astype(self.dtype))
            operands = [below, f"{own}.bias"] if part != "k" else [f"{own}.bias", below]
            below = self.add("Add", operands, f"{name}_shifted")
        self.add("Reshape", [below, "cut"], f"{name}_cut")
        return self.add("Transpose", [f"{name}_cut"], name, perm=[0, 2, 1, 3])

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes[output] = onnx.helper.make_node(op, inputs, [output], name=output, **attributes)
        return output

    def give(self, *names: str) -> "Block":
        """These values are outputs too."""
        self.outputs.extend(names)
        return self

    def take(self, name: str, *shape: int | str) -> "Block":
        """``name`` comes from outside."""
        self.constants.pop(name, None)
        self.inputs[name] = shape
        return self

    def hold(self, name: str, value: Array) -> "Block":
        """``name`` is a constant instead of whatever it was."""
        self.constants[name] = value
        self.nodes.pop(name, None)
        return self

    def use(self, op: str, *inputs: str, **attributes: Any) -> "Block":
        """One more node, for an output of its own."""
        return self.give(self.add(op, inputs, f"other {op}", **attributes))

    def turn(self, name: str, op: str, **attributes: Any) -> "Block":
        """Node ``name`` is an ``op`` instead."""
        self.add(op, self.nodes[name].input, name, **attributes)
        return self

    def read(self, name: str, index: int, value: str) -> "Block":
        """Node ``name`` reads ``value`` instead."""
        self.nodes[name].input[index] = value
        return self

    def model(self) -> ir.Model:
        kinds = dict.fromkeys(self.inputs, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)))
        kinds |= {"position": onnx.TensorProto.INT64}
        graph = onnx.helper.make_graph(
            list(self.nodes.values()),
            "block",
            [onnx.helper.make_tensor_value_info(name, kinds[name], shape) for name, shape in self.inputs.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in self.outputs],
            [onnx.numpy_helper.from_array(value, name) for name, value in self.constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)
        return RemoveUnusedNodesPass()(ir.from_proto(onnx.shape_inference.infer_shapes(model, strict_mode=True))).model

    def feeds(self, queries: int = 3) -> dict[str, Array]:
        """Two rows, written at 0 and 1 into buffers of length 5."""
        random = np.random.default_rng(1)
        lengths: dict[Any, Any] = {"R": 2, "Q": queries, "S": 5}
        shapes = {name: [lengths.get(axis, axis) for axis in shape] for name, shape in self.inputs.items()}
        feeds: dict[str, Array] = {name: random.normal(size=shape).astype(self.dtype) for name, shape in shapes.items()}
        return feeds | ({"position": np.arange(2)} if "position" in feeds else {})


def check_same(block: Block, model: ir.Model) -> None:
    """``model`` is valid, stores no weight twice and says what ``block`` says, at several tokens and at one."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert [value.name for value in model.graph.outputs] == block.outputs
    assert weights(model) == weights(block.model())
    for feeds in (block.feeds(), block.feeds(queries=1)):
        for before, after in zip(run(block.model(), feeds), run(model, feeds), strict=True):
            assert after.dtype == before.dtype == block.dtype
            np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE[block.dtype])


def stored(model: ir.Model) -> dict[str, Array]:
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}


def weights(model: ir.Model) -> int:
    """Numbers in all matrices."""
    return sum(array.size for array in stored(model).values() if array.ndim == 2)


ONE = {"Attention": 1, "Concat": 1, "MatMul": 1, "Reshape": 2, "Shape": 3, "Split": 1, "Transpose": 2}
TWO = {"Attention": 2, "Concat": 1, "MatMul": 2, "Reshape": 4, "Shape": 3, "Split": 2, "Transpose": 4}

# how a block is made, and the nodes that are left of it
MATCHES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "three biases": ({}, {"Add": 1, **ONE}),
    "no bias for K, into buffers": ({"biases": "qv", "cached": True}, {"Add": 1, **ONE, "TensorScatter": 2}),
    "no bias": ({"biases": ""}, ONE),
    "heads in numbers": ({"cut": ("x[0]", "x[1]", HEADS, SIZE)}, {"Add": 1, **ONE}),
    "rows in numbers": ({"cut": (2, "x[1]", HEADS, SIZE)}, {"Add": 1, **ONE, "Shape": 2}),
    "tokens left open": ({"cut": ("x[0]", -1, HEADS, SIZE)}, {"Add": 1, **ONE, "Shape": 2}),
    "into buffers": ({"cached": True}, {"Add": 1, **ONE, "TensorScatter": 2}),
    "grouped queries, no bias for V": ({"biases": "qk", "kv_heads": 2}, {"Add": 1, **ONE}),
    "grouped queries into buffers": ({"kv_heads": 1, "cached": True}, {"Add": 1, **ONE, "TensorScatter": 2}),
    "two layers": ({"layers": ("a.", "b.")}, {"Add": 2, **TWO}),
    "two layers of one name": ({"layers": ("a.", "a.")}, {"Add": 2, **TWO}),
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", MATCHES)
def test_three_projections_become_one_and_say_the_same(name: str, half: bool) -> None:
    options, nodes = MATCHES[name]
    block = Block(half=half, **options)
    model = block.model()
    report = fuse(model)
    assert (report.operator, report.fused, report.refused) == ("QKV", nodes["Attention"], [])
    assert count(model) == nodes
    check_same(block, model)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_heads_in_wrong_places_are_beyond_the_tolerance(half: bool) -> None:
    """The broken twin: the packed weight's columns stand one head further on."""
    block = Block(half=half)
    model = block.model()
    fuse(model)
    packed = model.graph.initializers["q.weight|k.weight|v.weight"]
    packed.const_value = ir.tensor(np.roll(stored(model)[str(packed.name)], SIZE, axis=-1), name=packed.name)
    difference = np.abs(run(model, block.feeds())[0] - run(block.model(), block.feeds())[0])
    assert difference.max() > 100 * TOLERANCE[block.dtype]


@pytest.mark.parametrize("lengths", [(0, 0), (2, -1), (-1, 3)], ids=["copied", "tokens open", "rows open"])
def test_a_constant_may_cut_into_heads(lengths: tuple[int, int]) -> None:
    block = Block().hold("cut", np.array([*lengths, HEADS, SIZE]))
    model = block.model()
    assert fuse(model).fused == 1
    np.testing.assert_allclose(run(model, block.feeds())[0], run(block.model(), block.feeds())[0], rtol=0, atol=1e-5)


def test_the_weights_say_the_size_of_heads_that_the_shape_leaves_open() -> None:
    block = Block(cut=("x[0]", "x[1]", HEADS, -1))
    model = block.model()
    assert fuse(model).fused == 1
    check_same(block, model)


def test_layers_that_share_all_three_weights_share_one_packed_weight() -> None:
    model = Block(layers=("a.", "a.")).model()
    fuse(model)
    assert [name for name, array in stored(model).items() if array.ndim == 2] == ["a.q.weight|a.k.weight|a.v.weight"]


@pytest.mark.parametrize(
    "parts",
    [
        ("x[0]", "open", "heads and size"),
        ("x[0]", "all else"),
        ("x[:2]", str(HEADS), str(SIZE)),
        ("x[:2]", "heads and size"),
    ],
)
def test_constants_of_several_numbers_may_cut_into_heads(parts: Sequence[str]) -> None:
    block = Block(cut=("x[0]", "x[1]", HEADS, SIZE))
    block.hold("open", np.array([-1])).hold("heads and size", np.array([HEADS, SIZE]))
    block.hold("all else", np.array([-1, HEADS, SIZE]))
    block.nodes = {"x[:2]": onnx.helper.make_node("Shape", ["x"], ["x[:2]"], name="x[:2]", end=2), **block.nodes}
    block.add("Concat", parts, "cut", axis=0)
    model = block.model()
    report = fuse(model)
    assert (report.fused, report.refused) == (1, [])
    check_same(block, model)


def test_a_shape_that_does_not_come_apart_is_said() -> None:
    block = Block().hold("size", np.array([SIZE]))
    block.nodes = {"x[:3]": onnx.helper.make_node("Identity", ["x[:]"], ["x[:3]"], name="x[:3]"), **block.nodes}
    block.nodes = {"x[:]": block.nodes.pop("x[:]"), **block.nodes}
    block.add("Concat", ["x[:3]", "size"], "cut", axis=0)
    assert fuse(block.model()).refused == [f"layer.0/attended: {UNKNOWN}"]


UNKNOWN = "the shape that cuts into heads is not put together of lengths that are known one by one"
DIFFERENT = "Q, K and V are cut into heads by different shapes"
CLOSED = "the shape that cuts into heads does not say their size"
SWAPPED = ("layer.0/v_cut", 1, "swapped cut")
SHARED = "q.weight is read elsewhere too"

# blocks that are almost packed, and what must be said of each layer; nothing where Q, K and V are no candidates at all
NEAR_MISSES: dict[str, tuple[Block, list[str]]] = {
    "weight read elsewhere": (Block().use("Neg", "q.weight"), [SHARED]),
    "weight is an output": (Block().give("q.weight"), [SHARED]),
    "one weight of two layers": (Block(layers=("", "b.")).read("layer.1/q_product", 1, "q.weight"), [SHARED] * 2),
    "weights of a refused layer": (Block(layers=("", "")).read(*SWAPPED), [DIFFERENT, SHARED]),
    "V cut by another shape": (Block().read(*SWAPPED), [DIFFERENT]),
    "a number of heads that K does not have": (
        Block(cut=("x[0]", -1, HEADS, SIZE), kv_heads=2),
        ["the shape that cuts into heads says another number of them than the weights"],
    ),
    "heads and their size left open": (Block(cut=("x[0]", "x[1]", "x[0]", -1)), [CLOSED]),
    "size left open, K and V narrower": (
        Block(cut=("x[0]", "x[1]", HEADS, -1), kv_heads=2),
        ["the heads of Q, K and V are of different sizes"],
    ),
    "product read elsewhere": (Block().use("Neg", "layer.0/q_product"), []),
    "sum read elsewhere": (Block().use("Neg", "layer.0/k_shifted"), []),
    "cut read elsewhere": (Block().use("Neg", "layer.0/v_cut"), []),
    "product is an output": (Block().give("layer.0/q_product"), []),
    "sum is an output": (Block().give("layer.0/k_shifted"), []),
    "cut is an output": (Block().give("layer.0/v_cut"), []),
    "K is an output": (Block().give("layer.0/k"), []),
    "Q of another input": (Block().take("z", "R", "Q", WIDTH).read("layer.0/q_product", 0, "z"), []),
    "Q scaled": (Block().turn("layer.0/q_shifted", "Mul"), []),
    "another permutation": (Block().turn("layer.0/k", "Transpose", perm=[0, 2, 3, 1]), []),
    "no permutation": (Block().turn("layer.0/k", "Transpose"), []),
    "bias of length 1": (Block().hold("k.bias", np.ones(1, np.float32)), []),
    "bias of two axes": (Block().hold("k.bias", np.ones((1, WIDTH), np.float32)), []),
    "bias from outside": (Block().take("q.bias", WIDTH), []),
    "weight from outside": (Block().take("v.weight", WIDTH, WIDTH), []),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_left_alone_and_says_why(name: str) -> None:
    block, reasons = NEAR_MISSES[name]
    model = block.model()
    untouched = ir.to_proto(model).SerializeToString(deterministic=True)
    report = fuse(model)
    assert report.fused == 0
    assert report.refused == [f"layer.{layer}/attended: {reason}" for layer, reason in enumerate(reasons)]
    assert ir.to_proto(model).SerializeToString(deterministic=True) == untouched


@pytest.mark.parametrize("shape", ["cut again", "counted cut"])
def test_shapes_that_say_the_same_may_cut(shape: str) -> None:
    block = Block().read("layer.0/v_cut", 1, shape)
    model = block.model()
    assert fuse(model).fused == 1
    check_same(block, model)


def test_shapes_made_of_equal_lengths_are_one_after_the_reshapes() -> None:
    model = Block().read("layer.0/v_cut", 1, "cut again").model()
    assert fusion.fuse(model)["QKV"].fused == 1
    check_same(Block(), model)


def test_layers_are_told_apart_by_their_weights_not_by_the_names_of_tensors() -> None:
    """Constants that were folded have none."""
    block = Block(layers=("a.", "b."), biases="")
    model = block.model()
    for value in model.graph.initializers.values():
        value.const_value = ir.Tensor(stored(model)[str(value.name)])
    assert fuse(model).fused == 2
    check_same(block, model)


TWICE = {
    "K is read elsewhere": Block().use("Neg", "layer.0/k"),
    "one is both Q and K": Block().read("layer.0/attended", 1, "layer.0/q"),
    "two attentions over one Q, K and V": Block().use("Attention", "layer.0/q", "layer.0/k", "layer.0/v", is_causal=1),
    "two attentions over one K and V": Block(layers=("a.", "b."))
    .read("layer.1/q_product", 0, "x")
    .read("layer.1/attended", 1, "layer.0/k")
    .read("layer.1/attended", 2, "layer.0/v")
    .give("layer.0/y"),
}


@pytest.mark.parametrize("name", TWICE)
def test_projections_that_serve_twice_stay_right(name: str) -> None:
    """Packed or not: nothing breaks, and no weight is stored twice."""
    block, model = TWICE[name], TWICE[name].model()
    fuse(model)
    check_same(block, model)
