"""Custom modules that write norms, attention and rotary embeddings out: an export fuses them as ``txopt optimize`` would."""

import math
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softmax

from tests.exporter.cacheless import WIDTH, Learned, Rotary, join, split
from tests.exporter.models import checkpoint
from tests.exporter.test_incremental import check_greedy
from txopt.exporter import checkpoint as sources
from txopt.exporter.custom import DecodeCache
from txopt.exporter.fusion import FUSIONS, fuse
from txopt.exporter.graph import clean, count
from txopt.exporter.pipeline import export
from txopt.exporter.trace import trace
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model


class Norm(nn.Module):
    """Differences from the mean over the root of their mean square; the others change one thing each."""

    epsilon = 1e-6

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        difference = x - x.mean(-1, keepdim=True)
        return self.weight * difference / torch.sqrt(self.variance(x) + self.epsilon) + self.bias

    def variance(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)


class ByVar(Norm):
    def variance(self, x: Tensor) -> Tensor:
        return x.var(-1, keepdim=True, unbiased=False)


class Berts(Norm):
    """An epsilon that is nearly zero, and is none."""

    epsilon = 1e-12


class Unbiased(Norm):
    def variance(self, x: Tensor) -> Tensor:
        return x.var(-1, keepdim=True)


class WrittenOut(Learned):
    """Nothing of ``torch.nn`` but tables and projections, in the encoder as in the decoder."""

    norm: type[Norm] = Norm

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.fourth = (self.norm() for _ in range(4))

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        y = self.fourth(x)
        q, k, v = (split(project(y)) for project in (self.q, self.k, self.v))
        seen = attention_mask.bool()[:, None, None, :]
        x = x + self.o(join(self.attend(self.turned(q), self.turned(k), v, seen)))
        return self.first(x) * attention_mask[..., None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return softmax(scores.masked_fill(~mask, -math.inf), -1) @ v


class WrittenByVar(WrittenOut):
    norm = ByVar


class WrittenLikeBert(WrittenOut):
    norm = Berts


class WrittenRotary(WrittenOut, Rotary):
    pass


class WrittenExplicitly(WrittenOut):
    """The protocol with a cache; what it leaves to the module is written out."""

    def decode(self, tokens: Tensor, memory: Tensor, cache: DecodeCache) -> Tensor:  # type: ignore[override]
        x = self.tokens(tokens) + self.places(cache.positions)
        y = self.first(x)
        q, k, v = (split(project(y)) for project in (self.q, self.k, self.v))
        x = x + self.o(join(cache.self_attention(0, q, k, v)))
        q = split(self.cross_q(self.second(x)))
        attended = cache.cross_attention(0, q, lambda: (split(self.cross_k(memory)), split(self.cross_v(memory))))
        x = x + self.cross_o(join(attended))
        return self.logits(x + self.feed(self.third(x)))


WRITTEN = (WrittenOut, WrittenByVar, WrittenLikeBert, WrittenRotary, WrittenExplicitly)
WHOLE = {"encoder": (1, 2), "decoder": (2, 3)}  # attentions and norms
SPELLED = {"Softmax", "ReduceMean", "Sqrt", "Pow", "RMSNormalization"}


def made(kind: type[Learned]) -> Learned:
    torch.manual_seed(0)
    return kind().eval()


@pytest.mark.parametrize("kind", WRITTEN, ids=lambda kind: kind.__name__)
def test_what_a_module_writes_out_is_fused_and_proved(kind: type[WrittenOut], tmp_path: Path) -> None:
    module = made(kind)
    artifact = export(module, tmp_path / "out", prove=True)
    for name, (attentions, norms) in WHOLE.items():
        nodes, patterns = (artifact.manifest.fusion[name][key] for key in ("nodes", "patterns"))
        assert (nodes["Attention"], nodes["LayerNormalization"]) == (attentions, norms)
        assert not SPELLED & nodes.keys()
        assert nodes.get("RotaryEmbedding", 0) == (2 if kind is WrittenRotary else 0)
        assert all(not report["refused"] for report in patterns.values())
        assert patterns["LayerNormalization"]["proof"]["held"] == norms
    assert artifact.manifest.fusion["encoder"]["patterns"]["Attention"]["proof"]["held"] == 1
    if kind is not WrittenExplicitly:
        check_greedy(module, Model(artifact))


def test_epsilons_are_those_of_the_module(tmp_path: Path) -> None:
    for name, expected in (("norm", 1e-6), ("bert", 1e-12)):
        artifact = export(made(WrittenLikeBert if name == "bert" else WrittenOut), tmp_path / name)
        assert {round(found / expected, 5) for found in epsilons(artifact)} == {1.0}


def epsilons(artifact: Artifact) -> list[float]:
    graphs = [ir.load(artifact.path / spec.file).graph for spec in artifact.manifest.graphs.values()]
    norms = [node for graph in graphs for node in graph if node.op_type == "LayerNormalization"]
    return [node.attributes["epsilon"].as_float() for node in norms]


def test_what_is_nearly_a_norm_stays_and_is_told(tmp_path: Path) -> None:
    artifact = export(made(type("Near", (WrittenOut,), {"norm": Unbiased})), tmp_path / "out")
    for name, (attentions, norms) in WHOLE.items():
        nodes, patterns = (artifact.manifest.fusion[name][key] for key in ("nodes", "patterns"))
        assert nodes["Attention"] == attentions
        assert "LayerNormalization" not in nodes
        assert len(patterns["LayerNormalization"]["refused"]) == norms
        assert all("torch's x.var() of 32" in reason for reason in patterns["LayerNormalization"]["refused"])


@pytest.mark.parametrize("name", ["t5", "distilbert"])
def test_a_rule_that_fuses_nothing_changes_nothing(name: str, tmp_path: Path) -> None:
    """The exports of families, which write nothing out, are the same bytes whatever is looked for."""
    source: Any = sources.load(str(checkpoint(name, tmp_path)), torch.float32, trust_remote_code=False).source
    for model in trace(source, torch.float32).graphs.values():
        alone, all_of_them = model.clone(), model.clone()
        found = fuse(all_of_them, FUSIONS)
        matched = [rule for rule, report in zip(FUSIONS, found.values(), strict=True) if report.fused]
        fuse(alone, matched)
        assert bytes_of(alone) == bytes_of(all_of_them)


def bytes_of(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("y = Add(x, tiny)", {"Add": 1}),
        ("y = Sub(x, tiny)", {"Sub": 1}),
        ("y = Mul(nearly, x)", {"Mul": 1}),
        ("y = Div(x, nearly)", {"Div": 1}),
        ("a = Add(x, zero) y = Neg(a)", {"Neg": 1}),
        ("a = Mul(one, x) y = Neg(a)", {"Neg": 1}),
        ("s = ReduceSum<keepdims=0>(x) t = Add(s, tiny) y = Mul(x, t)", {"Mul": 1, "ReduceSum": 1}),
    ],
)
def test_what_changes_nothing_is_left_out_and_what_changes_little_is_not(nodes: str, left: dict[str, int]) -> None:
    """Of two numbers without axes the sum must not get one; there the small one goes."""
    constants = "float zero = {0.0}, float one = {1.0}, float tiny = {1e-12}, float nearly = {1.000001}"
    text = f'<ir_version: 10, opset_import: ["" : 24]> net (float[B,3] x) => (float[B,3] y) <{constants}> {{ {nodes} }}'
    model = ir.from_onnx_text(text)
    assert count(clean(model)) == left
