"""Branches and loops as torch's exporters and Optimum write them: what is in them is fused, both branches of an If alike."""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from txopt.exporter import foreign_child
from txopt.runtime.errors import SourceError

HEADS, SIZE, WIDTH = 4, 8, 32
DATA = Path(__file__).parents[1] / "data" / "optimum"


class Block(nn.Module):
    """Cross-attention and a feed-forward, which torch.jit.script can read."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def cut(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], 4, 8).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = self.cut(self.q(self.norm(x))), self.cut(self.k(memory)), self.cut(self.v(memory))
        p = (q @ k.transpose(2, 3) * 0.35355).softmax(-1)
        x = x + self.o((p @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], 32))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()


class Chosen(Two):
    """By torch.cond, as the new exporter has it."""

    def forward(self, x: Tensor, memory: Tensor, flag: Tensor) -> Any:
        def first(x: Tensor, memory: Tensor) -> Tensor:
            return self.a(x, memory)  # type: ignore[no-any-return]

        def second(x: Tensor, memory: Tensor) -> Tensor:
            return self.b(x, memory) * 0.5  # type: ignore[no-any-return]

        return torch.cond(flag, first, second, (x, memory))


class Scripted(Two):
    def forward(self, x: Tensor, memory: Tensor, flag: Tensor) -> Tensor:
        return self.a(x, memory) if bool(flag) else self.b(x, memory) * 0.5  # type: ignore[no-any-return]


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = Block()

    def forward(self, x: Tensor, memory: Tensor, flag: Tensor) -> Tensor:
        for _ in range(int(flag)):
            x = self.a(x, memory)
        return x


NAMES = {"input_names": ["x", "memory", "flag"], "output_names": ["y"]}


def by_dynamo(module: nn.Module, flag: Tensor, file: Path) -> None:
    axes = tuple({0: torch.export.Dim("batch"), 1: torch.export.Dim(name)} for name in ("length", "source"))
    inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH), flag)
    torch.onnx.export(module, inputs, file, dynamo=True, opset_version=18, dynamic_shapes=(*axes, None), **NAMES)  # type: ignore[arg-type]


def by_script(module: nn.Module, flag: Tensor, file: Path) -> None:
    axes = {"x": {0: "batch", 1: "length"}, "memory": {0: "batch", 1: "source"}, "y": {0: "batch", 1: "length"}}
    inputs = (torch.randn(2, 5, WIDTH), torch.randn(2, 7, WIDTH), flag)
    scripted = torch.jit.script(module)
    torch.onnx.export(scripted, inputs, file, dynamo=False, opset_version=17, dynamic_axes=axes, **NAMES)  # type: ignore[arg-type]


# who exports what with which flag, the operator that holds the bodies, and how many of them are the same block
EXPORTS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], type[nn.Module], Tensor, str, int]] = {
    "torch.cond": (by_dynamo, Chosen, torch.tensor(True), "If", 2),
    "a scripted if": (by_script, Scripted, torch.tensor(True), "If", 2),
    "a scripted loop": (by_script, Repeated, torch.tensor(3), "Loop", 1),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EXPORTS)
def test_branches_and_loops_of_torch_are_fused(name: str, tmp_path: Path) -> None:
    export, module, flag, operator, blocks = EXPORTS[name]
    torch.manual_seed(0)
    export(module().eval(), flag, tmp_path / "in.onnx")
    found = optimized(tmp_path / "in.onnx", tmp_path)
    operators = found["operators"]
    assert {key: operators.get(key, 0) for key in ("Attention", "Gelu", "LayerNormalization", "Softmax", "Erf")} == {
        "Attention": blocks,
        "Gelu": blocks,
        "LayerNormalization": 2 * blocks,
        "Softmax": 0,
        "Erf": 0,
    }
    assert operators[operator] == 1


def optimized(file: Path, folder: Path) -> dict[str, Any]:
    (folder / "out").mkdir()
    found = foreign_child.optimize(file, folder / "out", lambda stage: None)
    for report in found["fusions"].values():
        assert (report["refused"], report["proof"]["unproved"]) == ([], [])
    return found


MERGED = {"bart": {"Attention": 8, "Gelu": 4, "LayerNormalization": 14}, "t5": {"Attention": 8, "RMSNormalization": 14}}


@pytest.mark.parametrize("family", MERGED)
def test_both_decoders_of_a_merged_file_of_optimum_are_fused(family: str, tmp_path: Path) -> None:
    """Two layers with self- and cross-attention, once with and once without a past."""
    with tarfile.open(DATA / f"{family}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    found = optimized(next(tmp_path.rglob("decoder_model_merged.onnx")), tmp_path)
    operators = found["operators"]
    assert {key: operators.get(key, 0) for key in (*MERGED[family], "Softmax")} == {**MERGED[family], "Softmax": 0}
    assert found["operators"]["If"] == 1


def refused_buffers(file: Path, folder: Path) -> str:
    """What is said where its pasts should become buffers."""
    (folder / "out").mkdir()
    with pytest.raises(SourceError) as caught:
        foreign_child.optimize(file, folder / "out", lambda stage: None, in_place_cache=True)
    assert not list((folder / "out").iterdir())
    return str(caught.value)


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_pasts_of_a_merged_file_are_no_buffers_and_what_to_give_instead_is_told(family: str, tmp_path: Path) -> None:
    with tarfile.open(DATA / f"{family}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    file = next(tmp_path.rglob("decoder_model_merged.onnx"))
    said = refused_buffers(file, tmp_path)
    parts = ("is a merged decoder", "4 pasts grow", "If on use_cache_branch", "decoder_with_past_model.onnx")
    for part in (*parts, f"txopt export {file.parent}"):
        assert part in said, said
    assert "found none" not in said


def test_pasts_that_grow_in_a_branch_of_another_file_are_no_buffers(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["" : 23]> net (float[b,2,p,4] past, float[b,2,l,4] new) => (float[b,2,e,4] present) {
        rows = Shape<start = 0, end = 1>(past) one = Constant<value_ints = [1]>() asked = Greater(rows, one)
        present = If(asked) <then_branch = a () => (float[b,2,c,4] t) { t = Concat<axis = 2>(past, new) },
            else_branch = b () => (float[b,2,d,4] f) { f = Neg(new) }>
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "in.onnx")
    said = refused_buffers(tmp_path / "in.onnx", tmp_path)
    assert "1 pasts grow inside the branches of If_" in said
    assert said.endswith("export the decoder that takes a past as a file of its own")
