"""A model that hears samples: its frames, its front end, and text from sound as transformers gives it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, SpeechT5FeatureExtractor, SpeechT5ForSpeechToText

from tests import tiny_tokenizers as tiny
from txopt.benchmarks.inputs import draw
from txopt.exporter.framing import Framing
from txopt.exporter.frontend import collect
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import InputError
from txopt.runtime.model import Model
from txopt.runtime.text import TextDecoder

Artifacts = Callable[[str], Artifact]
Make = Callable[[str], Path]


@pytest.mark.parametrize("convolutions", [((10, 5), (3, 2), (2, 2)), ((4, 4),), ((3, 1), (7, 3))])
def test_frames_are_those_of_the_convolutions(convolutions: tuple[tuple[int, int], ...]) -> None:
    framing = Framing(convolutions)
    layers = torch.nn.Sequential(*(torch.nn.Conv1d(1, 1, kernel, stride) for kernel, stride in convolutions))
    for samples in range(framing.samples(1), framing.samples(4) + 1):
        frames = layers(torch.zeros(1, 1, samples)).shape[2]
        assert framing.frames(samples) == frames
        assert framing.samples(frames) <= samples < framing.samples(frames + 1)


def test_pieces_become_the_text_transformers_gives(tmp_path: Path) -> None:
    source = tiny.speecht5(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    frontend = collect(source, "speech-to-text", "speecht5", out)
    assert frontend["type"] == "arrays"
    text, reference = TextDecoder(out, frontend), AutoTokenizer.from_pretrained(source)
    for length in range(1, 60):
        ids = np.random.default_rng(length).integers(0, len(reference), length % 12 + 1)
        assert text.decode(ids) == reference.decode(ids.tolist(), skip_special_tokens=True)


def test_sound_becomes_the_text_transformers_gives(tmp_path: Path, checkpoints: Make) -> None:
    source = tmp_path / "source"
    model = SpeechT5ForSpeechToText.from_pretrained(checkpoints("speecht5"))
    with torch.no_grad():
        for layer in model.speecht5.decoder.wrapped_decoder.layers:
            layer.encoder_attn.out_proj.weight.mul_(20)  # else every sound says the same
    model.save_pretrained(source)
    tiny.speecht5(source, config=False)
    extractor = SpeechT5FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(source)
    sounds = [np.random.default_rng(n).normal(0, 0.3, n).astype(np.float32) for n in (800, 1501, 560)]
    inputs = extractor(sounds, sampling_rate=16000, padding=True, return_tensors="pt")
    pipeline = Model(export(source, tmp_path / "out")).pipeline("audio")
    tokenizer = AutoTokenizer.from_pretrained(source)
    unspeakable = list(range(len(tokenizer), model.config.vocab_size))
    for beams in (1, 3):
        options = {"max_new_tokens": 12, "num_beams": beams, "suppress_tokens": unspeakable}
        expected = tokenizer.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)
        assert len(set(expected)) == 3
        assert pipeline(sounds, **options) == expected


def test_a_weight_that_is_computed_of_others_is_rounded_once(tmp_path: Path, checkpoints: Make) -> None:
    """The positional convolution's, of direction and length: bfloat16 on the CPU is held to the tolerance of float32."""
    assert export(checkpoints("speecht5"), tmp_path / "out", precision="bf16").manifest.parity["passed"]


def test_a_mask_may_be_left_out_and_samples_have_bounds(artifacts: Artifacts) -> None:
    model = Model(artifacts("speecht5"))
    sound = np.random.default_rng(0).normal(0, 0.3, (2, 700)).astype(np.float32)
    whole = model.encode(input_values=sound)
    masked = model.encode(input_values=sound, attention_mask=np.ones((2, 700), np.int64))
    np.testing.assert_array_equal(*(model.session.array(each.values["memory"]) for each in (whole, masked)))
    assert "attention_mask" in whole.masks
    assert whole.masks["attention_mask"].shape == (2, model.session.array(whole.values["memory"]).shape[1])
    frontend = model.manifest.frontend
    least, most = frontend["least_samples"], frontend["most_samples"]
    assert "attention_mask" in model.encode(input_values=sound[:, :least]).masks
    assert "attention_mask" in model.encode(input_values=np.zeros((1, most), np.float32)).masks
    for width, words in ((least - 1, f"at least {least}"), (most + 1, f"at most {most}")):
        with pytest.raises(InputError, match=words):
            model.encode(input_values=np.zeros((1, width), np.float32))
    mask = (np.arange(700) < np.array([[700], [least - 1]])).astype(np.int64)
    with pytest.raises(InputError, match=f"at least {least}"):
        model.encode(input_values=sound, attention_mask=mask)


def test_a_benchmark_draws_sounds_that_can_be_heard(artifacts: Artifacts) -> None:
    artifact = artifacts("speecht5")
    inputs = draw(artifact, 2, 9)
    assert inputs["input_values"].shape == (2, artifact.manifest.frontend["least_samples"])
    assert Model(artifact).encode(**inputs).batch == 2
