"""Rotary embeddings as modules spell them and torch's two exporters write them: each becomes one operator, and says the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from tests.exporter.plain_engine import run
from txopt.exporter import onnx_file
from txopt.exporter.fusion import FOREIGN, fuse, rotary
from txopt.exporter.fusion.proof import prove
from txopt.exporter.graph import count

WIDTH, HEADS, SIZE, PLACES = 16, 2, 8, 32


def angles(places: Tensor, width: int = SIZE) -> Tensor:
    return places[..., None] * 1e4 ** (-torch.arange(0, width, 2) / width)


def turned(x: Tensor) -> Tensor:
    left, right = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-right, left), -1)


class Queries(nn.Module):
    """Queries of tokens [B,Q,W] at positions [B,Q], by head, rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return self.rotated(self.project(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2), places)

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        raise NotImplementedError


class Llama(Queries):
    """Cosines of angles that stand twice, for halves."""

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        twice = torch.cat((angles(places), angles(places)), -1)[:, None]
        return q * twice.cos() + turned(q) * twice.sin()


class NeoX(Queries):
    """Tables looked up by position, for the halves of a head's first columns."""

    def __init__(self) -> None:
        super().__init__()
        table = angles(torch.arange(PLACES), SIZE // 2).repeat(1, 2)
        self.register_buffer("cosines", table.cos())
        self.register_buffer("sines", table.sin())

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        first, rest = q[..., : SIZE // 2], q[..., SIZE // 2 :]
        cos, sin = self.cosines[places][:, None], self.sines[places][:, None]
        return torch.cat((first * cos + turned(first) * sin, rest), -1)


class GPTJ(Queries):
    """One table for both, repeated for neighbours; the heads stand after the tokens."""

    def __init__(self) -> None:
        super().__init__()
        table = angles(torch.arange(PLACES), SIZE // 2)
        self.register_buffer("table", torch.cat((table.sin(), table.cos()), -1))

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        q = q.transpose(1, 2)
        sin, cos = (half[:, :, None].repeat_interleave(2, 3) for half in self.table[places].chunk(2, -1))
        first, rest = q[..., : SIZE // 2], q[..., SIZE // 2 :]
        neighbours = torch.stack((-first[..., 1::2], first[..., ::2]), -1).flatten(-2)
        return torch.cat((first * cos + neighbours * sin, rest), -1).permute(0, 2, 1, 3)


class Pairs(Queries):
    """Multiplied out over neighbours, positions from the length."""

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        turn = angles(torch.arange(q.shape[2]))
        cos, sin, left, right = turn.cos(), turn.sin(), q[..., ::2], q[..., 1::2]
        return torch.stack((left * cos - right * sin, left * sin + right * cos), -1).flatten(-2)


class Halves(Queries):
    """Multiplied out over halves."""

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        turn = angles(torch.arange(q.shape[2]))
        (left, right), cos, sin = q.chunk(2, -1), turn.cos(), turn.sin()
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Published(Queries):
    """A library's own code."""

    def __init__(self, apply: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.apply_to = apply

    def rotated(self, q: Tensor, places: Tensor) -> Tensor:
        return self.apply_to(q, places)


def x_transformers() -> Queries:
    library = pytest.importorskip("x_transformers.x_transformers")
    embedding = library.RotaryEmbedding(SIZE - 2)
    return Published(
        lambda q, places: library.apply_rotary_pos_emb(q, embedding.forward_from_seq_len(q.shape[2])[0], 1.0)
    )


def t5_gemma() -> Queries:
    from transformers import T5GemmaModuleConfig
    from transformers.models.t5gemma import modeling_t5gemma as family

    config = T5GemmaModuleConfig(hidden_size=WIDTH, num_attention_heads=HEADS, head_dim=SIZE, vocab_size=40)
    embedding = family.T5GemmaRotaryEmbedding(config)
    return Published(lambda q, places: family.apply_rotary_pos_emb(q, q, *embedding(q, places))[0])


def moonshine() -> Queries:
    from transformers import MoonshineConfig
    from transformers.models.moonshine import modeling_moonshine as family

    embedding = family.MoonshineRotaryEmbedding(MoonshineConfig(hidden_size=WIDTH, decoder_num_attention_heads=HEADS))
    return Published(lambda q, places: family.apply_rotary_pos_emb(q, q, *embedding(q, places))[0])


MODULES: dict[str, tuple[Callable[[], Queries], dict[str, int]]] = {
    "Llama": (Llama, {"interleaved": 0}),
    "GPT-NeoX": (NeoX, {"interleaved": 0, "rotary_embedding_dim": 4}),
    "GPT-J": (GPTJ, {"interleaved": 1, "rotary_embedding_dim": 4, "num_heads": 2}),
    "pairs": (Pairs, {"interleaved": 1}),
    "halves": (Halves, {"interleaved": 0}),
    "x-transformers": (x_transformers, {"interleaved": 1, "rotary_embedding_dim": 6}),
    "T5Gemma": (t5_gemma, {"interleaved": 0}),
    "Moonshine": (moonshine, {"interleaved": 1}),
}


def exported(module: nn.Module, path: Path, *, dynamo: bool) -> ir.Model:
    inputs = (torch.randn(2, 5, WIDTH), torch.arange(5).repeat(2, 1))
    if dynamo:
        dynamic = torch.export.Dim.DYNAMIC
        shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic})
        program = torch.onnx.export(
            module.eval(), inputs, dynamo=True, input_names=["x", "places"], dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        program.save(path)
    else:
        axes = {0: "batch", 1: "length"}
        names = {"input_names": ["x", "places"], "output_names": ["y"], "dynamic_axes": {"x": axes, "places": axes}}
        torch.onnx.export(module.eval(), inputs, path, dynamo=False, opset_version=17, **names)
    model = onnx_file.load(path)
    onnx_file.convert(model, path)
    onnx_file.clean(model)
    return model


def feeds() -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {"x": random.normal(size=(3, 4, WIDTH)).astype(np.float32), "places": random.integers(0, PLACES, (3, 4))}


@pytest.mark.filterwarnings("ignore")  # both exporters and the libraries warn of themselves
@pytest.mark.parametrize(
    ("name", "dynamo"),
    # torch's old exporter cannot write Moonshine's: "All tensors must have the same rank"
    [(name, dynamo) for name in MODULES for dynamo in (True, False) if dynamo or name != "Moonshine"],
)
def test_a_rotation_of_an_exported_module_fuses_and_says_the_same(name: str, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, attributes = MODULES[name]
    graph = exported(make(), tmp_path / "module.onnx", dynamo=dynamo)
    given = feeds()
    before = run(graph, given)[0]
    report = rotary.fuse(graph)
    assert (report.fused, report.refused) == (1, [])
    (node,) = (node for node in graph.graph if node.op_type == "RotaryEmbedding")
    assert {key: attribute.as_int() for key, attribute in node.attributes.items()} == attributes
    onnx.checker.check_model(ir.to_proto(graph), full_check=True)
    np.testing.assert_allclose(run(graph, given)[0], before, rtol=0, atol=1e-6)


class Layers(nn.Module):
    """Queries and keys of two layers, which share one table of angles."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        twice = torch.cat((angles(places), angles(places)), -1)[:, None]
        cos, sin = twice.cos(), twice.sin()
        for project in self.projections:
            q = project(x).view(*x.shape[:2], HEADS, SIZE).transpose(1, 2)
            x = (q * cos + turned(q) * sin).transpose(1, 2).flatten(2)
        return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "TorchScript"])
def test_layers_share_what_is_made_of_the_factors(dynamo: bool, tmp_path: Path) -> None:
    graph = exported(Layers(), tmp_path / "layers.onnx", dynamo=dynamo)
    before = run(graph, feeds())[0]
    assert fuse(graph, FOREIGN)["RotaryEmbedding"].fused == 4
    nodes = count(graph)
    assert nodes["RotaryEmbedding"] == 4
    assert nodes["Slice"] == 2  # one for the cosines, one for the sines
    assert nodes.get("Expand", 0) <= 2
    np.testing.assert_allclose(run(graph, feeds())[0], before, rtol=0, atol=1e-6)


HALVES = "p = Mul(a, c) q = Mul(b, s) r = Sub(p, q) t = Mul(a, s) u = Mul(b, c) v = Add(t, u) y = Concat<axis=-1>(r, v)"


def model(nodes: str) -> ir.Model:
    text = (
        '<ir_version: 10, opset_import: ["" : 24]> g (float[B,2,Q,4] x, float[B,1,Q,2] c, float[B,1,Q,2] s) '
        f"=> (float[B,2,Q,4] y) {{ a, b = Split<axis=3,num_outputs=2>(x) {nodes} }}"
    )
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = f"block/{node.op_type}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def test_factors_that_fit_already_are_taken_as_they_are() -> None:
    graph = model(HALVES)
    assert rotary.fuse(graph).fused == 1
    assert count(graph) == {"RotaryEmbedding": 1, "Squeeze": 2}


@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "cosines and sines exchanged"])
def test_a_rotation_is_proved_alone(broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanged(graph: Any, node: Any, found: Any, tables: Any) -> None:
        rewrite(graph, node, type(found)(**{**vars(found), "cos": found.sin, "sin": found.cos}), tables)

    rewrite = rotary._rewrite
    if broken:
        monkeypatch.setattr(rotary, "_rewrite", exchanged)
    random = np.random.default_rng(0)
    shapes = {"x": (2, 2, 3, 4), "c": (2, 1, 3, 2), "s": (2, 1, 3, 2)}
    given = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    report = prove(rotary.fuse, model(HALVES), [given])
    assert report.fused == (not broken)
    assert [refusal.split(",")[0] for refusal in report.refused] == ["block/Concat: fused"] * broken
    assert report.proof is not None
    assert (report.proof.held, report.proof.unproved) == (not broken, ())


# joins that look like a rotation's and are none: no candidates, so no refusals
OTHERS = {
    "only negated": "n = Neg(b) y = Concat<axis=-1>(n, a)",
    "along another axis": "n = Neg(b) m = Concat<axis=1>(n, a) y = Mul(m, s)",
    "two numbers of several values": "p = Mul(a, c) q = Mul(b, s) r = Sub(p, q) t = Mul(a, a) u = Mul(b, c) v = Add(t, u) "
    "y = Concat<axis=-1>(r, v)",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_rotation_is_no_candidate(name: str) -> None:
    report = rotary.fuse(model(OTHERS[name]))
    assert (report.fused, report.refused) == (0, [])
