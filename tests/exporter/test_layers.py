"""The layer and the part that a name tells: names as the exporters of PyTorch and TensorFlow and as txopt itself write them."""

import pytest

from txopt.exporter.layers import OUTSIDE, layer_of, part_of, stack_of


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        # txopt: "module path/operator_number"
        ("encoder.0/Attention_25", "encoder.0", ""),
        ("model.decoder.layers.0.self_attn.q_proj/MatMul_38", "decoder.0", "self_attn.q_proj"),
        ("encoder.block.3.layer.1.DenseReluDense.wi/MatMul_47", "encoder.3", "layer.1.DenseReluDense.wi"),
        ("decoder.model.decoder.layers.1.encoder_attn.k_proj/MatMul_39", "decoder.1", "encoder_attn.k_proj"),
        # weights of checkpoints
        ("model.decoder.layers.3.self_attn.q.weight", "decoder.3", "self_attn.q"),
        ("model.decoder.layers.3.fc1.weight.T", "decoder.3", "fc1"),
        ("transformer.h.11.attn.c_attn.weight", "transformer.11", "attn.c_attn"),
        ("bert.encoder.layer.0.output.dense.bias", "bert.encoder.0", "output.dense"),
        ("decoder.2.feed_forward.0.weight", "decoder.2", "feed_forward.0"),
        ("visual.transformer.resblocks.7.mlp.weight", "visual.transformer.resblocks.7", "mlp"),
        ("layers.4.norm.weight", "layers.4", "norm"),
        # two towers stay two
        ("text_model.encoder.layers.0.mlp.fc1.weight", "text_model.encoder.0", "mlp.fc1"),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", "vision_model.encoder.0", "mlp.fc1"),
        ("0.auto_model.encoder.layer.3.output.dense.weight", "0.auto_model.encoder.3", "output.dense"),
        # TorchScript: scopes with slashes, the list's name twice
        ("/model/encoder/layers.0/self_attn/MatMul", "encoder.0", "self_attn"),
        ("/t5/encoder/block.0/layer.0/SelfAttention/q/MatMul", "t5.encoder.0", "layer.0.SelfAttention.q"),
        ("/blocks/blocks.5/mlp/fc1/MatMul", "blocks.5", "mlp.fc1"),
        ("/0/norm/ReduceMean", "layer.0", "norm"),
        # TensorFlow
        ("tf_bert/bert/encoder/layer_._4/attention/Softmax", "tf_bert.bert.encoder.4", "attention"),
        ("encoder/layer_2/ffn/MatMul", "encoder.2", "ffn"),
        # weights joined by a fusion, a missing bias among them
        (
            "model.encoder.layers.1.self_attn.q_proj.weight.T|model.encoder.layers.1.self_attn.k_proj.weight.T",
            "encoder.1",
            "self_attn.q_proj|k_proj",
        ),
        ("zeros|model.encoder.layers.1.self_attn.k_proj.bias", "encoder.1", "self_attn.k_proj"),
        # no layer
        ("encoder.final_layer_norm.weight", OUTSIDE, "encoder.final_layer_norm"),
        ("model.decoder.embed_tokens/Gather_13", OUTSIDE, "model.decoder.embed_tokens"),
        ("/lm_head/MatMul", OUTSIDE, "lm_head"),
        ("/Shape_3", OUTSIDE, "/Shape_3"),
        # nothing told
        ("onnx::MatMul_123", None, "onnx::MatMul_123"),
        ("val_94", None, "val_94"),
        ("", None, ""),
        ("Softmax_12/Attention", None, "Softmax_12"),
        ("node_softmax/Attention", None, "node_softmax"),
        ("node_layer_norm_2", None, "node_layer_norm_2"),
        ("cross_key.0", OUTSIDE, "cross_key"),
        ("<script>alert(1)</script>", OUTSIDE, "<script>alert(1)<"),
    ],
)
def test_a_name_tells_its_layer_and_part(name: str, layer: str | None, part: str) -> None:
    assert layer_of(name) == layer
    assert part_of(name) == part


def test_the_number_of_a_layer_is_a_number() -> None:
    assert stack_of("text_model.encoder.10") == ("text_model.encoder", 10)


@pytest.mark.parametrize("name", ["layers.99999999999999999999.x", "layers.٣.x", "./../..", "|||", "layers.0"])
def test_odd_names_tell_nothing_or_a_place_and_never_fail(name: str) -> None:
    assert layer_of(name) in (OUTSIDE, None)
    part_of(name)
