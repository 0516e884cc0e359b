"""Makes tests/data/tf2onnx/*.onnx.xz: tiny Transformers of Keras and TensorFlow as tf2onnx exports them, with random weights of
our own.

Runs in an environment of its own:

    python3.11 -m venv tf
    tf/bin/pip install tensorflow-cpu==2.21.0 keras==3.15.1 tf_keras==2.21.0 tf2onnx==1.17.0 onnx==1.23.2 onnxruntime==1.32.0
    tf/bin/python tests/data/make_tf2onnx_files.py tests/data/tf2onnx

encoder.onnx      Keras 3, no mask; as Keras' own ``model.export(format="onnx")``, which asks tf2onnx
masked.onnx       the same under a mask of the source, given as an input
translator.onnx   Keras 3, encoder and decoder, masks from the padding id of the embeddings, causal in the decoder
keras2.onnx       Keras 2, under the same mask; its first layer's norms are TensorFlow's fused batch norm, as epsilons from 1.001e-5
                  on make them, those of the second are not
bert.onnx         TensorFlow without layers, as BERT was written: tf.matmul and transposes, tf.nn.moments, -10000 for padding

Of two layers each, with any batch and lengths. Keras writes attention in two ways, by ``ops.dot_product_attention`` and, where there
is dropout to apply in training, by einsum and its Softmax layer: each of its models has a layer of both. Every file is run and
compared with TensorFlow before it is kept.
"""

import lzma
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
import tf2onnx
import tf_keras
from keras import layers, ops

SEED = 20261123
VOCABULARY, PLACES, WIDTH, HEADS, INNER = 37, 24, 16, 2, 32
DROPOUTS = (0.0, 0.1)  # one for each layer


class Embedding(layers.Layer):
    """Tokens and places, summed; ids of zero are padding if ``padded``."""

    def __init__(self, *, padded: bool = False) -> None:
        super().__init__()
        self.tokens = layers.Embedding(VOCABULARY, WIDTH, mask_zero=padded)
        self.places = layers.Embedding(PLACES, WIDTH)

    def call(self, ids: Any) -> Any:
        return self.tokens(ids) + self.places(ops.arange(ops.shape(ids)[1]))

    def compute_mask(self, ids: Any, mask: Any = None) -> Any:
        return self.tokens.compute_mask(ids)


def attention(x: Any, memory: Any, dropout: float, **options: Any) -> Any:
    y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS, dropout=dropout)(x, memory, **options)
    return layers.LayerNormalization(epsilon=1e-6)(x + y)


def dense(x: Any) -> Any:
    y = layers.Dense(INNER, activation=lambda y: keras.activations.gelu(y, approximate=True))(x)
    return layers.LayerNormalization(epsilon=1e-6)(x + layers.Dense(WIDTH)(y))


def einsum_dense(x: Any) -> Any:
    y = layers.EinsumDense("abc,cd->abd", (None, INNER), bias_axes="d", activation="relu")(x)
    y = layers.EinsumDense("abc,cd->abd", (None, WIDTH), bias_axes="d")(y)
    return layers.LayerNormalization(epsilon=1e-6)(x + y)


def encoder() -> keras.Model:
    ids = layers.Input((None,), dtype="int32", name="ids")
    x = Embedding()(ids)
    for dropout in DROPOUTS:
        x = dense(attention(x, x, dropout))
    return keras.Model([ids], x)


def masked() -> keras.Model:
    ids, mask = (layers.Input((None,), dtype="int32", name=name) for name in ("ids", "mask"))
    x, rows = Embedding()(ids), ops.expand_dims(mask, 1)
    for dropout in DROPOUTS:
        x = dense(attention(x, x, dropout, attention_mask=rows))
    return keras.Model([ids, mask], x)


def translator() -> keras.Model:
    source, target = (layers.Input((None,), dtype="int32", name=name) for name in ("source", "target"))
    memory, y = Embedding(padded=True)(source), Embedding(padded=True)(target)
    for dropout in DROPOUTS:
        memory = einsum_dense(attention(memory, memory, dropout))
    for dropout in DROPOUTS:
        y = attention(y, y, dropout, use_causal_mask=True)
        y = einsum_dense(attention(y, memory, dropout))
    return keras.Model([source, target], layers.Dense(VOCABULARY)(y))


def keras2() -> tf_keras.Model:
    x, mask = tf_keras.Input((None, WIDTH), name="x"), tf_keras.Input((None,), dtype="int32", name="mask")
    y = x
    for epsilon in (1e-3, 1e-12):
        rows = mask[:, tf.newaxis, :]
        z = tf_keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, attention_mask=rows)
        y = tf_keras.layers.LayerNormalization(epsilon=epsilon)(y + z)
        z = tf_keras.layers.Dense(WIDTH)(tf_keras.layers.Dense(INNER, activation="relu")(y))
        y = tf_keras.layers.LayerNormalization(epsilon=epsilon)(y + z)
    return tf_keras.Model([x, mask], y)


def drawn(*shape: int, around: float = 0.0) -> tf.Variable:
    return tf.Variable(random.normal(around, 0.3, shape).astype(np.float32))


class Bert(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = drawn(VOCABULARY, WIDTH), drawn(PLACES, WIDTH)
        self.layers = [
            {
                **{name: (drawn(WIDTH, WIDTH), drawn(WIDTH)) for name in ("q", "k", "v", "out")},
                **{name: (drawn(WIDTH, around=1), drawn(WIDTH)) for name in ("first", "second")},
                "inner": (drawn(WIDTH, INNER), drawn(INNER)),
                "outer": (drawn(INNER, WIDTH), drawn(WIDTH)),
            }
            for _ in DROPOUTS
        ]

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32, name=name) for name in ("ids", "mask")])
    def __call__(self, ids: Any, mask: Any) -> Any:
        batch, length = tf.unstack(tf.shape(ids))
        x = tf.reshape(tf.gather(self.tokens, tf.reshape(ids, [-1])), [batch, length, WIDTH])
        x = tf.reshape(x + tf.slice(self.places, [0, 0], [length, -1]), [-1, WIDTH])
        adder = (1.0 - tf.cast(mask[:, tf.newaxis, tf.newaxis, :], tf.float32)) * -10000.0
        for layer in self.layers:
            q, k, v = (
                tf.transpose(
                    tf.reshape(projected(x, *layer[name]), [batch, length, HEADS, WIDTH // HEADS]), [0, 2, 1, 3]
                )
                for name in ("q", "k", "v")
            )
            scores = tf.multiply(tf.matmul(q, k, transpose_b=True), (WIDTH // HEADS) ** -0.5) + adder
            context = tf.transpose(tf.matmul(tf.nn.softmax(scores), v), [0, 2, 1, 3])
            context = tf.reshape(context, [batch * length, WIDTH])
            x = normed(x + projected(context, *layer["out"]), *layer["first"])
            inner = projected(x, *layer["inner"])
            inner = inner * 0.5 * (1.0 + tf.math.erf(inner / np.sqrt(2.0).astype(np.float32)))
            x = normed(x + projected(inner, *layer["outer"]), *layer["second"])
        return tf.reshape(x, [batch, length, WIDTH])


def projected(x: Any, weight: Any, bias: Any) -> Any:
    return tf.nn.bias_add(tf.matmul(x, weight), bias)


def normed(x: Any, weight: Any, bias: Any) -> Any:
    mean, variance = tf.nn.moments(x, [-1], keepdims=True)
    return tf.nn.batch_normalization(x, mean, variance, bias, weight, 1e-12)


MODELS: dict[str, Callable[[], Any]] = {
    "encoder": encoder,
    "masked": masked,
    "translator": translator,
    "keras2": keras2,
    "bert": Bert,
}


def drawn_anew(model: Any) -> None:
    """Biases would be zeros, and norms would do nothing."""
    for weight in model.weights:
        name = weight.path if isinstance(model, keras.Model) else weight.name
        weight.assign(random.normal("gamma" in name, 0.3, weight.shape))


def export(model: Any, file: Path) -> None:
    if isinstance(model, keras.Model):
        model([np.ones((2, 5), np.int32) for _ in model.inputs])
        drawn_anew(model)
        model.export(str(file), format="onnx", verbose=False)
        return
    function, signature = model.__call__, None
    if isinstance(model, tf_keras.Model):
        drawn_anew(model)
        function = tf.function(lambda x, mask: model([x, mask]))
        signature = [tf.TensorSpec(item.shape, item.dtype, name=item.name) for item in model.inputs]
    tf2onnx.convert.from_function(function, signature or function.input_signature, output_path=str(file))


def compare(model: Any, file: Path) -> None:
    """Asks both on arrays of three rows."""
    session = onnxruntime.InferenceSession(str(file))
    given = []
    for place, item in enumerate(session.get_inputs()):
        length = 7 if item.name == "mask" else 7 + place
        array = random.random((3, length)) < 0.7 if item.name == "mask" else random.integers(1, VOCABULARY, (3, length))
        given.append(
            random.normal(size=(3, 7, WIDTH)).astype(np.float32) if item.name == "x" else array.astype(np.int32)
        )
    expected = model(*given) if isinstance(model, Bert) else model(given if len(given) > 1 else given[0])
    found = session.run(None, {item.name: array for item, array in zip(session.get_inputs(), given, strict=True)})
    error = np.abs(found[0] - expected.numpy()).max()
    if not error < 1e-5:
        raise SystemExit(f"{file.name} deviates by {error} from TensorFlow")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name, build in MODELS.items():
            random = np.random.default_rng(SEED)
            keras.utils.clear_session()
            keras.utils.set_random_seed(SEED)
            made, onnx_file = build(), Path(scratch) / f"{name}.onnx"
            export(made, onnx_file)
            compare(made, onnx_file)
            (target / f"{name}.onnx.xz").write_bytes(lzma.compress(onnx_file.read_bytes(), preset=9))
