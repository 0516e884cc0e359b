"""Checkpoints that are not what they say: refused, named, before anything is made of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as t
from safetensors.numpy import load_file, save_file
from transformers.models.fsmt.modeling_fsmt import SinusoidalPositionalEmbedding

from tests.exporter.models import checkpoint
from txopt.exporter import pretrained
from txopt.exporter.pipeline import export
from txopt.runtime.errors import SourceError
from txopt.runtime.model import Model

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_weights_that_nothing_reads_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A config.json that switches a part of the model off makes another model of the same checkpoint."""
    source = checkpoint("t5", tmp_path)
    weights = load_file(source / "model.safetensors")
    save_file({**weights, "prompts.weight": np.zeros(4, np.float32)}, source / "model.safetensors", {"format": "pt"})
    export(source, tmp_path / "out")
    assert "does not read: prompts.weight" in caplog.text


def test_a_missing_weight_is_not_made_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    t.BertForSequenceClassification(t.BertConfig(**SIZES)).save_pretrained(source)
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("classifier.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights.*\n.*classifier\.weight"):
        export(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_computed_may_be_missing(tmp_path: Path) -> None:
    """FSMT's checkpoints were published without their sinusoids."""
    source = checkpoint("fsmt", tmp_path)
    weights = load_file(source / "model.safetensors")
    sinusoids = [name for name in weights if "embed_positions" in name]
    assert len(sinusoids) == 2
    rest = {name: value for name, value in weights.items() if name not in sinusoids}
    save_file(rest, source / "model.safetensors", {"format": "pt"})
    module = pretrained.load(source, torch.float32).module
    for name in sinusoids:
        table = module.get_parameter(name)
        made = SinusoidalPositionalEmbedding.get_embedding(*table.shape, module.config.pad_token_id)
        torch.testing.assert_close(table, made)


def test_a_prophetnet_that_transformers_cannot_run_is_refused(tmp_path: Path) -> None:
    source = checkpoint("prophetnet", tmp_path)
    config = json.loads((source / "config.json").read_text("utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"pad_token_id": 1}))
    with pytest.raises(SourceError, match="pad_token_id: expected 0, got 1"):
        export(source, tmp_path / "out")


HEADS: dict[str, Callable[[], Any]] = {
    "BertLMHeadModel": lambda: t.BertLMHeadModel(t.BertConfig(**SIZES)),
    "BertForQuestionAnswering": lambda: t.BertForQuestionAnswering(t.BertConfig(**SIZES)),
    "T5Model": lambda: t.T5Model(t.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    "GPT2Model": lambda: t.GPT2Model(t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_no_road_carries_is_named(name: str, tmp_path: Path) -> None:
    HEADS[name]().save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=name):
        export(tmp_path / "source", tmp_path / "out")


def test_a_refused_head_comes_with_the_way_to_its_body(tmp_path: Path) -> None:
    HEADS["BertForQuestionAnswering"]().save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=r"as an encoder: expected .* model\.base_model\.save_pretrained\(\.\.\.\)"):
        export(tmp_path / "source", tmp_path / "out")


DISTILBERT: dict[str, Any] = {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
LANGUAGE_HEADS: dict[str, Callable[[], Any]] = {
    "BertForMaskedLM": lambda: t.BertForMaskedLM(t.BertConfig(**SIZES)),
    "BertForPreTraining": lambda: t.BertForPreTraining(t.BertConfig(**SIZES)),
    "RobertaForMaskedLM": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SIZES)),
    "XLMRobertaForMaskedLM": lambda: t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**SIZES)),
    "DistilBertForMaskedLM": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(**DISTILBERT)),
}


@pytest.mark.parametrize("name", LANGUAGE_HEADS)
def test_the_body_under_a_language_model_head_embeds(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    module = LANGUAGE_HEADS[name]().eval()
    module.save_pretrained(tmp_path / "source")
    artifact = export(tmp_path / "source", tmp_path / "out")
    assert artifact.manifest.task == "embedding"
    assert f"{name} is exported as" in caplog.text
    assert "its language-model head is left out" in caplog.text
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        expected = module.base_model(ids).last_hidden_state.mean(1).numpy()
    np.testing.assert_allclose(Model(artifact).embed(input_ids=ids.numpy()), expected, rtol=0, atol=1e-5)


def test_a_masked_language_model_that_lacks_its_body_is_refused(tmp_path: Path) -> None:
    LANGUAGE_HEADS["BertForMaskedLM"]().save_pretrained(tmp_path / "source")
    (file,) = (tmp_path / "source").glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop("bert.embeddings.word_embeddings.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(SourceError, match=r"lacks weights.*\n.*word_embeddings"):
        export(tmp_path / "source", tmp_path / "out")


def gpt2(positions: int) -> Any:
    sizes: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return t.GPT2LMHeadModel(t.GPT2Config(**sizes, n_positions=positions, bos_token_id=0, eos_token_id=2))


def bert(positions: int) -> Any:
    return t.BertModel(t.BertConfig(**SIZES, max_position_embeddings=positions))


def bart(positions: int) -> Any:
    layers: dict[str, Any] = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads: dict[str, Any] = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
    config = t.BartConfig(vocab_size=40, d_model=16, max_position_embeddings=positions, **layers, **heads)
    return t.BartForConditionalGeneration(config)


def test_a_start_beyond_the_vocabulary_is_refused_by_name(tmp_path: Path) -> None:
    model = t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    )  # starts at 50256
    with pytest.raises(
        SourceError, match="bos_token_id: expected a token below 40, the size of the vocabulary, got 50256"
    ):
        export(model, tmp_path / "out")


@pytest.mark.parametrize("positions", [2, 8])
@pytest.mark.parametrize("make", [gpt2, bert, bart])
def test_a_handful_of_positions_is_enough(make: Callable[[int], Any], positions: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make(positions).save_pretrained(tmp_path / "source")
    assert export(tmp_path / "source", tmp_path / "out").manifest.parity["passed"]


@pytest.mark.parametrize("make", [gpt2, bert, bart])
def test_one_position_is_not(make: Callable[[int], Any], tmp_path: Path) -> None:
    make(1).save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match="max_position_embeddings: expected at least 2 positions, got 1"):
        export(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_the_sources_fault(tmp_path: Path) -> None:
    t.BertModel(t.BertConfig(**SIZES)).save_pretrained(tmp_path / "source")
    (file,) = (tmp_path / "source").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SourceError, match="cannot load it as BertModel"):
        export(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize(
    ("labels", "problem", "by_hand"),
    [
        (1, None, torch.sigmoid),
        (3, "multi_label_classification", torch.sigmoid),
        (2, "regression", lambda x: x),
        (3, None, lambda x: x.softmax(-1)),
    ],
)
def test_scores_are_what_the_checkpoint_says(labels: int, problem: str | None, by_hand: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = t.BertForSequenceClassification(t.BertConfig(**SIZES, num_labels=labels, problem_type=problem)).eval()
    module.save_pretrained(tmp_path / "source")
    ids = np.array([[3, 4, 5]])
    got = Model(export(tmp_path / "source", tmp_path / "out")).classify(input_ids=ids)
    with torch.no_grad():
        np.testing.assert_allclose(got, by_hand(module(torch.from_numpy(ids)).logits).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["t5", "bert", "fsmt"])
def test_a_model_in_memory_is_a_source_and_goes_on_as_it_was(name: str, tmp_path: Path) -> None:
    module = pretrained.load(checkpoint(name, tmp_path), torch.float32).module.train().requires_grad_(True)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    artifact, read = export(module, tmp_path / "out"), export(tmp_path / name, tmp_path / "read")
    assert artifact.manifest.source["name"] == type(module).__name__
    for file in ("encoder.onnx", "weights.data"):
        assert artifact.file(file).read_bytes() == read.file(file).read_bytes()
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_model_in_memory_that_no_family_knows_is_refused(tmp_path: Path) -> None:
    module = t.CTRLModel(t.CTRLConfig(vocab_size=20, n_embd=8, dff=8, n_layer=1, n_head=2, n_positions=16))
    with pytest.raises(SourceError, match="no family knows model_type 'ctrl'"):
        export(module, tmp_path / "out")


def test_a_language_model_in_memory_embeds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = t.BertForMaskedLM(t.BertConfig(**SIZES))
    assert export(module, tmp_path / "out").manifest.task == "embedding"
    assert "without its language-model head" in caplog.text


class Classifier(t.BertForSequenceClassification):
    """A user's own name for what transformers has."""


class Filler(t.BertForMaskedLM):
    """Likewise."""


class Sentences(t.BertModel):
    """Likewise."""


class OwnHead(t.BertPreTrainedModel):
    """A head of the user's own, which nothing here knows."""

    def __init__(self, config: t.BertConfig) -> None:
        super().__init__(config)
        self.bert = t.BertModel(config)
        self.post_init()


class TranslatorWithoutEncoder(t.BartForCausalLM):
    """A decoder alone, which its name does not say."""


@pytest.mark.parametrize(
    ("kind", "task"), [(Classifier, "text-classification"), (Filler, "embedding"), (Sentences, "embedding")]
)
def test_a_class_of_ones_own_is_what_it_extends(kind: Any, task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    artifact = export(kind(t.BertConfig(**SIZES)), tmp_path / "out")
    assert artifact.manifest.task == task
    assert artifact.manifest.parity["passed"]


BART: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "OwnHead": (lambda: OwnHead(t.BertConfig(**SIZES)), r"'OwnHead' \(a BertPreTrainedModel\), as an encoder"),
    "BertLMHeadModel": (lambda: t.BertLMHeadModel(t.BertConfig(**SIZES)), "'BertLMHeadModel', as an encoder"),
    "TranslatorWithoutEncoder": (
        lambda: TranslatorWithoutEncoder(t.BartConfig(**BART)),
        r"'TranslatorWithoutEncoder' \(a BartForCausalLM\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_in_memory_that_no_road_carries_is_named(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    with pytest.raises(SourceError, match=f"the model has the architecture {said}") as caught:
        export(make(), tmp_path / "out")
    assert "config.json" not in str(caught.value), "there is none"


def test_a_model_in_memory_that_cannot_be_copied_says_what_to_do(tmp_path: Path) -> None:
    module = t.BertModel(t.BertConfig(**SIZES))
    module.computed = module.embeddings.word_embeddings.weight.sum() * 2
    with pytest.raises(SourceError, match=r"BertModel cannot be copied .*; model\.save_pretrained\(\.\.\.\) it"):
        export(module, tmp_path / "out")
