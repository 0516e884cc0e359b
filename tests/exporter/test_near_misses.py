"""Modules that people write, by both of torch's exporters: what is an operator fuses, what is nearly one says why it does not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from txopt import cli
from txopt.exporter.foreign_child import inspect


class Turned(nn.Module):
    """Scores by keys and queries, heads last."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bqhd,bkhd->bkqh", q, k) * 0.5
        return torch.einsum("bkqh,bkhd->bqhd", scores.softmax(dim=1), v)


class KeysByQueries(nn.Module):
    """Every query is a column of the scores; a later key is hidden from it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = k @ q.transpose(-1, -2) * 0.5
        later = torch.arange(k.shape[2])[:, None] > torch.arange(q.shape[2]) + 1
        return scores.masked_fill(later, -torch.inf).softmax(dim=-2).transpose(-1, -2) @ v


class ByHand(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * 0.5
        exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
        return self.divided(exponentials) @ v

    def divided(self, exponentials: Tensor) -> Tensor:
        return exponentials / exponentials.sum(-1, keepdim=True)


class OffByOne(ByHand):
    def divided(self, exponentials: Tensor) -> Tensor:
        return exponentials / (1 + exponentials.sum(-1, keepdim=True))


class Sink(nn.Module):
    """One more column, of a number for each head, that has no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.randn(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) * 0.5
        sink = self.sink.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


class GuardedByNanToNum(nn.Module):
    """Nothing is kept for the first query, whose probabilities become zeros."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        hidden = torch.arange(k.shape[2]) >= torch.arange(q.shape[2])[:, None]
        scores = (q @ k.transpose(-1, -2) * 0.5).masked_fill(hidden, -torch.inf)
        return torch.nan_to_num(scores.softmax(-1)) @ v


class LogitScale(nn.Module):
    """Swin v2: cosines of queries and keys, times a learned number for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor([2.0, 6.0]).view(2, 1, 1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).transpose(-1, -2)
        return (scores * self.logit_scale.clamp(max=4.6).exp()).softmax(-1) @ v


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))


class Variance(Norm):
    unbiased = False

    def forward(self, x: Tensor) -> Tensor:
        variance = x.var(-1, keepdim=True, unbiased=self.unbiased)
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5) * self.weight + self.bias


class Unbiased(Variance):
    unbiased = True


class VarianceAndMean(Norm):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
        return (x - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class ByMoments(Norm):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x * x).mean(-1, keepdim=True) - mean * mean
        return (x - mean) * torch.rsqrt(variance.clamp(min=0) + 1e-5) * self.weight + self.bias


class SumOfSquares(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6) * self.weight


class MeanBySum(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6) * self.weight


# the operator it is, or nearly; nothing, or the reason that must be given
MODULES: dict[type[nn.Module], tuple[str, str]] = {
    Turned: ("Attention", ""),
    KeysByQueries: ("Attention", ""),
    ByHand: ("Attention", ""),
    OffByOne: ("Softmax", "adds to the sum of exponentials (a sink)"),
    GuardedByNanToNum: ("Attention", ""),
    LogitScale: ("Attention", ""),
    Sink: ("Attention", "adds to the scores (a sink, or other keys)"),
    Variance: ("LayerNormalization", ""),
    VarianceAndMean: ("LayerNormalization", ""),
    Unbiased: ("LayerNormalization", "the variance is multiplied by 1.14286, as by torch's x.var() of 8"),
    ByMoments: ("LayerNormalization", "which cancels where the mean is large"),
    SumOfSquares: ("RMSNormalization", "sums the squares, the operator averages them"),
    MeanBySum: ("RMSNormalization", ""),
}


def exported(module: nn.Module, path: Path, *, dynamo: bool) -> Path:
    torch.manual_seed(0)
    is_norm = isinstance(module, Norm)
    inputs = (torch.randn(2, 5, 8),) if is_norm else tuple(torch.randn(2, n, 2, 4) for n in (3, 5, 5))
    names = ["x"] if is_norm else ["q", "k", "v"]
    lengths = {"x": "length", "q": "target", "k": "source", "v": "source"}
    axes: dict[str, dict[int, Any]] = {name: {0: "batch", 1: lengths[name]} for name in names}
    options: dict[str, Any] = {"dynamic_axes": axes, "opset_version": 17}
    if dynamo:
        dims = {name: torch.export.Dim(name) for name in ("batch", *lengths.values())}
        options = {"dynamic_shapes": {n: {i: dims[a] for i, a in axes[n].items()} for n in names}, "verbose": False}
    torch.onnx.export(module.eval(), inputs, str(path), input_names=names, dynamo=dynamo, **options)
    return path


@pytest.mark.filterwarnings("ignore")  # both exporters warn of themselves
@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
def test_what_is_the_operator_fuses_and_what_is_not_says_why(
    kind: type[nn.Module], dynamo: bool, tmp_path: Path
) -> None:
    operator, reason = MODULES[kind]
    document = inspect(exported(kind(), tmp_path / "in.onnx", dynamo=dynamo), lambda stage: None)["document"]
    fusions = document["fusions"]
    refused = [refusal for report in fusions.values() for refusal in report["refused"]]
    assert fusions[operator]["fused"] == (0 if reason else 1)
    assert [reason in refusal for refusal in refused] == [True] * bool(reason)


@pytest.mark.filterwarnings("ignore")
def test_the_commands_show_the_reason_and_prove_what_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sink = exported(Sink(), tmp_path / "sink.onnx", dynamo=False)
    for command in (["inspect", str(sink)], ["optimize", str(sink), str(tmp_path / "sink")]):
        with pytest.raises(SystemExit) as done:
            cli.main([*command, "--quiet"])
        assert done.value.code == 0
        assert "adds to the scores (a sink, or other keys)" in capsys.readouterr().out
    variance = exported(Variance(), tmp_path / "variance.onnx", dynamo=True)
    with pytest.raises(SystemExit) as done:
        cli.main(["optimize", str(variance), str(tmp_path / "variance"), "--quiet", "--prove"])
    assert done.value.code == 0
    assert "LayerNormalization: 1 fused, 0 refused" in capsys.readouterr().out
