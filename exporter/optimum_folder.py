"""A folder that optimum-onnx exported an encoder-decoder to: which of its files say what. Opens none but config.json.

encoder_model.onnx             the encoder
decoder_model.onnx             the decoder over a whole sequence
decoder_model_merged.onnx      the same and the next one behind one If; read where the plain one is not there
decoder_with_past_model.onnx   the decoder over one more token: never read, for it cannot make cross K/V
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from txopt.exporter.families import find
from txopt.exporter.families.family import Family
from txopt.runtime.errors import SourceError, explain

ENCODER, PLAIN, MERGED, STEP = (
    "encoder_model.onnx",
    "decoder_model.onnx",
    "decoder_model_merged.onnx",
    "decoder_with_past_model.onnx",
)
_NAMES = (ENCODER, PLAIN, MERGED, STEP)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """The files of one export; ``merged``: ``decoder`` holds both decoders."""

    path: Path
    encoder: Path
    decoder: Path
    merged: bool
    config: PreTrainedConfig
    family: Family

    def hashes(self) -> dict[str, str]:
        """SHA-256 of every file that was read, external data included, by name."""
        beside = [
            file for file in self.path.iterdir() if file.suffix.startswith(".onnx_data") or file.suffix == ".data"
        ]
        return {
            file.name: _sha256(file)
            for file in sorted([self.encoder, self.decoder, *beside, self.path / "config.json"])
        }

    def generation(self) -> GenerationConfig:
        """generation_config.json, or what config.json says of it where there is none.

        Raises:
            SourceError: it cannot be read.
        """
        try:
            if (self.path / "generation_config.json").is_file():
                return GenerationConfig.from_pretrained(self.path, local_files_only=True)
            return GenerationConfig.from_model_config(self.config)
        except Exception as err:  # transformers raises a dozen kinds
            raise SourceError(f"{self.path}/generation_config.json cannot be read: {_first_line(err)}") from err


def is_folder(source: Any) -> bool:
    """Whether ``source`` is a directory with files by Optimum's names, and without the checkpoint they came from."""
    if not isinstance(source, (str, os.PathLike)) or not os.path.isdir(source):
        return False
    path = Path(source)
    return any((path / name).is_file() for name in _NAMES) and not any(path.glob("*.safetensors"))


def open_folder(path: Path) -> Folder:
    """The folder at ``path``.

    Raises:
        SourceError: files that are needed are missing, config.json cannot be read, or no family knows the model.
    """
    decoder = next((path / name for name in (PLAIN, MERGED) if (path / name).is_file()), None)
    problems = [f"no {name}" for name in (ENCODER, "config.json") if not (path / name).is_file()]
    if decoder is None:
        found = f", and {STEP} alone cannot make the cross-attention's K and V" if (path / STEP).is_file() else ""
        problems.append(f"neither {PLAIN} nor {MERGED}{found}")
    if problems or decoder is None:
        title = f"{path}: expected the files that optimum-cli export onnx writes for an encoder-decoder, found:"
        raise SourceError(explain(title, problems))
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # transformers raises a dozen kinds
        raise SourceError(f"{path}/config.json cannot be read: {_first_line(err)}") from err
    family = find(config.model_type)
    if family.kind != "encoder-decoder":
        raise SourceError(
            f"{path}/config.json is of {'an' if family.kind == 'encoder' else 'a'} {family.kind} ({config.model_type}), but its files "
            "are an encoder-decoder's"
        )
    return Folder(
        path=path,
        encoder=path / ENCODER,
        decoder=decoder,
        merged=decoder.name == MERGED,
        config=config,
        family=family,
    )


def _first_line(err: Exception) -> str:
    return str(err).strip().split("\n")[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
