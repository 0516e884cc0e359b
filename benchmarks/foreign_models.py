"""The architectures that the fusion table speaks of, with random weights of any size, and files of them by torch's two exporters.

Each is the whole teacher-forced model, source and target in, logits out; attention is written out (eager), as files of models that
were not written for it hold it.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXPORTERS = ("dynamo", "torchscript")


@dataclass(frozen=True)
class Size:
    """``layers`` of encoder and decoder each, ``width`` by ``heads``, a vocabulary; the feed-forward is four times as wide."""

    layers: int = 2
    width: int = 16
    heads: int = 2
    vocabulary: int = 40
    positions: int = 64

    @property
    def bart(self) -> dict[str, Any]:
        """The names that BART's configuration and its many descendants share."""
        return {
            "vocab_size": self.vocabulary,
            "d_model": self.width,
            "encoder_layers": self.layers,
            "decoder_layers": self.layers,
            "encoder_attention_heads": self.heads,
            "decoder_attention_heads": self.heads,
            "encoder_ffn_dim": 4 * self.width,
            "decoder_ffn_dim": 4 * self.width,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        }


@dataclass(frozen=True)
class Model:
    """A PyTorch module, its inputs by name (tensors) with their dynamic axes, and how many attention blocks and norms it runs.

    ``own_blocks``: the attention blocks of txopt's export, which has LED's global attention as an input.
    """

    module: Any
    inputs: dict[str, Any]
    axes: dict[str, dict[int, str]]
    blocks: int
    own_blocks: int
    norms: int


_NAMES = "T5 mT5 BART mBART Marian Pegasus M2M100 LED ProphetNet FSMT MVP SpeechT5 TrOCR Whisper"
NAMES = tuple(_NAMES.split())


def build(name: str, size: Size, *, batch: int = 2, source: int = 8, target: int = 5) -> Model:
    """The model ``name`` with weights from seed 0; ``source`` and ``target`` are tokens (or windows of sound) of the examples."""
    import torch

    torch.manual_seed(0)
    model = _transformers_model(name, size).eval()
    with contextlib.suppress(ValueError):  # some have no other
        model.set_attn_implementation("eager")
    ids = {"decoder_input_ids": torch.randint(3, size.vocabulary, (batch, target))}
    inputs, axes = _source(name, size, batch, source)
    if name == "Whisper":  # its decoder asks torch.diff for packed sequences unless it has a mask
        ids["decoder_attention_mask"] = torch.ones(batch, target, dtype=torch.int64)
    inputs, axes = {**inputs, **ids}, {**axes, **{key: {0: "batch", 1: "target"} for key in ids}}
    norms = sum(type(module).__name__.endswith("LayerNorm") for module in model.modules())
    blocks = 3 * size.layers + (size.layers if name == "ProphetNet" else 0)  # its decoder attends in two streams
    own = blocks + (size.layers if name == "LED" else 0)
    return Model(_wrapped(model, tuple(inputs)), inputs, axes, blocks, own, norms)


def write(model: Model, exporter: str, path: Path) -> None:
    """The file that ``torch.onnx.export`` makes, "dynamo" or "torchscript", with its own default opset or 17.

    Raises:
        whatever torch raises where it cannot.
    """
    import torch

    arguments, names = tuple(model.inputs.values()), list(model.inputs)
    with quiet():
        if exporter == "dynamo":
            dims = tuple(dict.fromkeys(model.axes[name], torch.export.Dim.DYNAMIC) for name in names)
            program = torch.onnx.export(
                model.module, arguments, dynamo=True, input_names=names, dynamic_shapes=(dims,), verbose=False
            )
            assert program is not None, "no error and no program"
            program.save(path)
        else:
            torch.onnx.export(
                model.module,
                arguments,
                path,
                dynamo=False,
                input_names=names,
                dynamic_axes=model.axes,
                opset_version=17,
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters print and warn of their insides."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _wrapped(model: Any, names: tuple[str, ...]) -> Any:
    import torch

    class Logits(torch.nn.Module):
        """``model`` with positional inputs, and logits alone."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> Any:
            return self.model(**dict(zip(names, inputs, strict=True)), use_cache=False)["logits"]

    return Logits()


def _source(name: str, size: Size, batch: int, length: int) -> tuple[dict[str, Any], dict[str, dict[int, str]]]:
    import torch

    rows = {0: "batch"}
    if name == "Whisper":
        return {"input_features": torch.randn(batch, 80, 2 * size.positions)}, {"input_features": rows}
    if name == "TrOCR":
        return {"pixel_values": torch.randn(batch, 3, 32, 32)}, {"pixel_values": rows}
    if name == "SpeechT5":
        return {"input_values": torch.randn(batch, 200 * length)}, {"input_values": {0: "batch", 1: "source"}}
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, -length // 4 :] = 0
    inputs = {"input_ids": torch.randint(3, size.vocabulary, (batch, length)), "attention_mask": mask}
    return inputs, {key: {0: "batch", 1: "source"} for key in inputs}


def _transformers_model(name: str, size: Size) -> Any:
    import transformers as t

    t.logging.set_verbosity_error()
    if name in ("T5", "mT5"):
        config, model = (
            (t.T5Config, t.T5ForConditionalGeneration) if name == "T5" else (t.MT5Config, t.MT5ForConditionalGeneration)
        )
        return model(
            config(
                vocab_size=size.vocabulary,
                d_model=size.width,
                d_kv=size.width // size.heads,
                d_ff=4 * size.width,
                num_layers=size.layers,
                num_heads=size.heads,
                decoder_start_token_id=0,
            )
        )
    positions = {"max_position_embeddings": size.positions}
    if name == "LED":
        return t.LEDForConditionalGeneration(
            t.LEDConfig(
                **size.bart,
                max_encoder_position_embeddings=size.positions,
                max_decoder_position_embeddings=size.positions,
                attention_window=8,
            )
        )
    if name == "ProphetNet":
        return t.ProphetNetForConditionalGeneration(_prophetnet(size, t))
    if name == "FSMT":
        sizes = {key: value for key, value in size.bart.items() if key not in ("vocab_size", "decoder_start_token_id")}
        vocabularies = {"src_vocab_size": size.vocabulary, "tgt_vocab_size": size.vocabulary}
        return t.FSMTForConditionalGeneration(t.FSMTConfig(langs=["en", "de"], **vocabularies, **sizes, **positions))
    if name == "SpeechT5":
        return t.SpeechT5ForSpeechToText(_speecht5(size, t))
    if name == "TrOCR":
        return t.VisionEncoderDecoderModel(
            encoder=t.ViTModel(
                t.ViTConfig(
                    hidden_size=size.width,
                    num_hidden_layers=size.layers,
                    num_attention_heads=size.heads,
                    intermediate_size=4 * size.width,
                    image_size=32,
                    patch_size=8,
                )
            ),
            decoder=t.TrOCRForCausalLM(
                t.TrOCRConfig(
                    vocab_size=size.vocabulary,
                    d_model=size.width,
                    decoder_layers=size.layers,
                    decoder_attention_heads=size.heads,
                    decoder_ffn_dim=4 * size.width,
                    **positions,
                )
            ),
        )
    if name == "Whisper":
        lengths = {"max_source_positions": size.positions, "max_target_positions": size.positions}
        return t.WhisperForConditionalGeneration(t.WhisperConfig(**size.bart, **lengths))
    models = {
        "BART": (t.BartConfig, t.BartForConditionalGeneration),
        "mBART": (t.MBartConfig, t.MBartForConditionalGeneration),
        "Marian": (t.MarianConfig, t.MarianMTModel),
        "Pegasus": (t.PegasusConfig, t.PegasusForConditionalGeneration),
        "M2M100": (t.M2M100Config, t.M2M100ForConditionalGeneration),
        "MVP": (t.MvpConfig, t.MvpForConditionalGeneration),
    }
    config, model = models[name]
    return model(config(**size.bart, **positions))


def _prophetnet(size: Size, t: Any) -> Any:
    return t.ProphetNetConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_encoder_layers=size.layers,
        num_decoder_layers=size.layers,
        num_encoder_attention_heads=size.heads,
        num_decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
        max_position_embeddings=size.positions,
        ngram=2,
        num_buckets=8,
        relative_max_distance=16,
    )


def _speecht5(size: Size, t: Any) -> Any:
    shared = {key: value for key, value in size.bart.items() if key != "d_model"}
    return t.SpeechT5Config(
        **shared,
        hidden_size=size.width,
        conv_dim=(size.width, size.width),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        max_text_positions=size.positions,
        max_speech_positions=size.positions,
    )
