"""Images to text: the shapes that a vision encoder-decoder takes beside the usual one, and those that are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t

from txopt.exporter import huggingface_facts, pretrained
from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model

IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}


def trocr(directory: Path, *, image_size: Any = 32, **decoder: Any) -> Path:
    """A tiny checkpoint, spread so that greedy ids vary from step to step."""
    torch.manual_seed(0)
    vit = t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=image_size,
        patch_size=8,
    )
    sizes: dict[str, Any] = {"vocab_size": 100, "d_model": 64, "max_position_embeddings": 80, "decoder_layers": 2}
    heads: dict[str, Any] = {"decoder_attention_heads": 4, "decoder_ffn_dim": 128, "cross_attention_hidden_size": 32}
    config = t.TrOCRConfig(**sizes, **heads, **IDS, **decoder)
    model = t.VisionEncoderDecoderModel(encoder=t.ViTModel(vit), decoder=t.TrOCRForCausalLM(config)).eval()
    for name, value in IDS.items():
        setattr(model.config, name, value)
        setattr(model.generation_config, name, value)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    model.save_pretrained(directory)
    return directory


def edit(directory: Path, **decoder: Any) -> Path:
    """Changes what config.json says of the decoder."""
    file = directory / "config.json"
    config = json.loads(file.read_text("utf-8"))
    config["decoder"] |= decoder
    file.write_text(json.dumps(config), "utf-8")
    return directory


def test_sinusoidal_positions_are_computed_as_transformers_computes_them(tmp_path: Path) -> None:
    """from_pretrained() leaves the table without memory: the proof is a model made in memory."""
    source = trocr(tmp_path / "source", use_learned_position_embeddings=False)
    loaded = pretrained.load(source, torch.float32).module
    made = t.VisionEncoderDecoderModel(t.VisionEncoderDecoderConfig.from_pretrained(source)).eval()
    made.load_state_dict(loaded.state_dict())
    pixels, tokens = torch.randn(1, 3, 32, 32), torch.randint(4, 100, (1, 12))
    with torch.no_grad():
        expected = made(pixel_values=pixels, decoder_input_ids=tokens).logits[0, -1].numpy()
    artifact = export(source, tmp_path / "out")
    assert "Sin" not in artifact.manifest.fusion["decoder"]["nodes"], "a table, not a formula in every step"
    model = Model(artifact)
    got = model.decode(model.encode(pixel_values=pixels.numpy())).prefill(tokens.numpy())[0]
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_the_sinusoidal_table_follows_the_precision(tmp_path: Path) -> None:
    source = trocr(tmp_path / "source", use_learned_position_embeddings=False)
    assert export(source, tmp_path / "out", precision="fp16").manifest.parity["passed"]


@pytest.mark.parametrize("image_size", [[32, 64], [64, 32]])
def test_images_may_be_wider_than_high(image_size: list[int], tmp_path: Path) -> None:
    source = trocr(tmp_path / "source", image_size=image_size)
    artifact = export(source, tmp_path / "out")
    assert artifact.manifest.graphs["encoder"].inputs[0].axes == ("B", 3, *image_size)
    pixels = np.random.default_rng(0).standard_normal((2, 3, *image_size)).astype(np.float32)
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 1}
    expected = pretrained.load(source, torch.float32).generate({"pixel_values": torch.from_numpy(pixels)}, **options)
    assert expected is not None
    got = Model(artifact).generate(pixel_values=pixels, **options).sequences
    np.testing.assert_array_equal(got, expected.ids.numpy())


def test_another_decoder_is_named(tmp_path: Path) -> None:
    source = edit(trocr(tmp_path / "source"), model_type="gpt2", add_cross_attention=True)
    with pytest.raises(
        SourceError, match=r"model_type 'gpt2': a vision-encoder-decoder is supported with trocr.*custom"
    ):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_decoder_without_cross_attention_is_named(tmp_path: Path) -> None:
    source = edit(trocr(tmp_path / "source"), model_type="gpt2", add_cross_attention=False)
    with pytest.raises(SourceError, match=r"'gpt2', and without cross-attention \(add_cross_attention: false\)"):
        export(source, tmp_path / "out")


def test_trocr_has_cross_attention_whatever_its_configuration_says(tmp_path: Path) -> None:
    """transformers builds it in always: what it computes is what is exported."""
    source = edit(trocr(tmp_path / "source"), add_cross_attention=False, is_decoder=False)
    artifact = export(source, tmp_path / "out")
    assert artifact.manifest.parity["passed"]
    assert artifact.manifest.fusion["decoder"]["nodes"]["Attention"] == 4, "two layers of self- and cross-attention"


def test_a_size_that_the_configuration_lacks_is_named() -> None:
    config = t.VisionEncoderDecoderConfig(encoder=t.BertConfig().to_dict(), decoder=t.TrOCRConfig().to_dict())
    with pytest.raises(SourceError, match=r"configuration has no encoder\.image_size\.0"):
        huggingface_facts._value(config, "encoder.image_size.0")
