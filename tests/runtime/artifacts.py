"""A small artifact to attack: files of the right names, whose contents no test needs to parse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from txopt.runtime.artifact import Artifact
from txopt.runtime.graphs import CacheSpec, GraphSpec, TensorSpec
from txopt.runtime.manifest import Manifest
from txopt.runtime.writer import ArtifactWriter

FILES = {
    "encoder.onnx": b"encoder",
    "decoder.onnx": b"decoder",
    "weights.data": bytes(range(256)),
    "parity.safetensors": b"cases",
    "tokenizer.json": b"{}",
    "engines/sm80.plan": b"plan",
}
Document = dict[str, Any]


def tensor(name: str, dtype: str, *axes: str | int) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, axes=axes)


def manifest() -> Manifest:
    """An encoder-decoder of one layer, two heads of four, 32 words; no files listed yet."""
    cache = CacheSpec(layers=1, heads=2, head_size=4, dtype="float32", max_length=64)
    cross = (tensor("cross_key.0", "float32", "B", 2, "T", 4), tensor("cross_value.0", "float32", "B", 2, "T", 4))
    mask = tensor("attention_mask", "int64", "B", "T")
    encoder = GraphSpec(
        file="encoder.onnx",
        inputs=(tensor("input_ids", "int64", "B", "T"), mask),
        outputs=(tensor("memory", "float32", "B", "T", 8), *cross),
    )
    decoder = GraphSpec(
        file="decoder.onnx",
        inputs=(
            tensor("input_ids", "int64", "R", "Q"),
            tensor("position", "int64", "R"),
            tensor("encoder_attention_mask", "int64", "B", "T"),
            *cache.tensors("self"),
            *cross,
        ),
        outputs=(tensor("logits", "float32", "R", "Q", 32), *cache.tensors("present")),
    )
    return Manifest(
        kind="encoder-decoder",
        task="text-to-text",
        family="t5",
        precision="fp32",
        target="cpu",
        source={"name": "tiny", "files": {"model.safetensors": "ab" * 32}},
        versions={"txopt": "0.1.0", "torch": "2.13.0"},
        graphs={"encoder": encoder, "decoder": decoder},
        cache=cache,
        generation={"eos_token_id": [1], "decoder_start_token_id": 0},
        frontend={"type": "text", "tokenizer": "tokenizer.json", "max_source_length": None},
        fusion={"Attention": 3},
        calibration=None,
        parity={"cases": 3, "largest_error": 1.5e-6, "note": "größter Fehler"},
    )


def fill(directory: Path) -> None:
    (directory / "engines").mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)


def write(out: Path, *, overwrite: bool = False) -> Artifact:
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        fill(writer.directory)
        return writer.commit(manifest())


def edit(out: Path, change: Callable[[Document], None]) -> None:
    """Change the manifest as an attacker would: with any JSON, whatever it means."""
    path = out / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def put(where: str, value: object) -> Callable[[Document], None]:
    """The change that sets the value at a path such as "graphs/decoder/inputs/0/name"."""

    def change(document: Document) -> None:
        *path, last = where.split("/")
        place: Any = document
        for key in path:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value

    return change


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below ``root``, hidden ones too, with its bytes."""
    return {p.relative_to(root).as_posix(): p.read_bytes() if p.is_file() else None for p in root.rglob("*")}
