"""The manifest reads what it writes, and nothing else."""

import contextlib
import dataclasses
import enum
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.runtime.artifacts import Document, manifest, put
from txopt.runtime.errors import ArtifactError
from txopt.runtime.files import PICKLES, SUFFIXES
from txopt.runtime.frontend import COMMON, KEYS, TYPES
from txopt.runtime.graphs import AXES, DTYPES, CacheSpec, GraphSpec, TensorSpec
from txopt.runtime.manifest import FORMATS, KINDS, LARGEST, PRECISIONS, TARGETS, Manifest
from txopt.runtime.strict_json import DEEPEST

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def document() -> Document:
    return json.loads(json.dumps(manifest().to_json()))  # type: ignore[no-any-return]


def drop(*path: str) -> Callable[[Document], None]:
    def change(doc: Document) -> None:
        place: Any = doc
        for key in path[:-1]:
            place = place[int(key) if isinstance(place, list) else key]
        del place[int(path[-1]) if isinstance(place, list) else path[-1]]

    return change


def encoder_only() -> Manifest:
    graphs = {"encoder": manifest().graphs["encoder"]}
    return dataclasses.replace(manifest(), kind="encoder", graphs=graphs, cache=None, task="embedding")


def decoder_only() -> Manifest:
    graph = manifest().graphs["decoder"]
    inputs = tuple(t for t in graph.inputs if not t.name.startswith(("cross_", "encoder_")))
    graphs = {"decoder": dataclasses.replace(graph, inputs=inputs)}
    return dataclasses.replace(manifest(), kind="decoder", graphs=graphs, task="text-generation")


@pytest.mark.parametrize("whole", [manifest(), encoder_only(), decoder_only()], ids=lambda m: m.kind)
def test_what_is_written_is_read_back(whole: Manifest) -> None:
    assert Manifest.from_json(json.loads(whole.to_bytes())) == whole


def test_the_bytes_are_canonical() -> None:
    data = manifest().to_bytes()
    assert data.endswith(b"}\n")
    assert "größter".encode() in data
    assert data == json.dumps(document(), sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def test_the_order_of_keys_does_not_show() -> None:
    turned = {name: manifest().graphs[name] for name in reversed(manifest().graphs)}
    assert dataclasses.replace(manifest(), graphs=turned).to_bytes() == manifest().to_bytes()


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_every_key_must_be_there(key: str) -> None:
    with pytest.raises(ArtifactError, match=key):
        Manifest.from_json({name: value for name, value in document().items() if name != key})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("extra", 1), "unknown key 'extra'"),
        (put("graphs/encoder/extra", 1), "graphs.encoder: unknown key 'extra'"),
        (put("graphs/encoder/inputs/0/extra", 1), r"inputs\[0\]: unknown key"),
        (put("cache/extra", 1), "cache: unknown key"),
        (put("kind", "encoder/decoder"), "kind: expected one of encoder-decoder, encoder, decoder"),
        (put("kind", ["encoder"]), "kind: expected one of"),
        (put("kind", "encoder"), "graphs: expected encoder for kind 'encoder', found 'decoder', 'encoder'"),
        (put("task", 7), "task: expected text, found 7"),
        (put("family", ""), "family: expected text that is not empty"),
        (put("precision", "fp4"), "precision: expected one of fp32"),
        (put("target", None), "target: expected one of cpu"),
        (put("source", []), "source: expected an object, found a list of 0"),
        (put("versions/torch", 2.13), "versions.torch: expected text"),
        (put("graphs/encoder", 1), "graphs.encoder: expected an object, found 1"),
        (put("graphs/encoder/file", "encoder.plan"), "expected an .onnx file"),
        (put("graphs/encoder/file", "../encoder.onnx"), "could leave the directory"),
        (put("graphs/encoder/file", "decoder.onnx"), "a file of its own"),
        (put("graphs/encoder/inputs", []), "inputs: expected at least one"),
        (put("graphs/encoder/inputs/0/dtype", "int32"), r"inputs\[0\].dtype: expected one of float32"),
        (put("graphs/encoder/inputs/0/name", "attention_mask"), "expected different names"),
        (put("graphs/encoder/inputs/0/name", "a\nb"), "expected letters"),
        (put("graphs/encoder/inputs/0/axes/0", "X"), r"axes\[0\]: expected a length of at least 1, or one of B R"),
        (
            put("graphs/encoder/inputs/0/axes/1", "V"),
            r"axes\[1\]: expected a length of at least 1, or one of B R Q S T U W",
        ),
        (put("graphs/decoder/outputs/0/axes/2", "T"), r"expected logits float32 \[R,Q,V\]"),
        (put("graphs/encoder/outputs/1/axes/1", "T"), r"expected 'cross_key.0' \[B,H,T,D\]"),
        (put("graphs/encoder/inputs/0/axes/0", 0), r"axes\[0\]: expected a length"),
        (put("graphs/encoder/inputs/0/axes/0", True), r"axes\[0\]: expected a length"),
        (put("graphs/encoder/outputs/0/name", "states"), "expected memory"),
        (put("graphs/encoder/outputs/1/name", "cross_key.1"), "cross_key.i and cross_value.i for i from 0"),
        (put("graphs/encoder/outputs/1/axes", ["B", "T", 4]), r"expected 'cross_key.0' \[B,H,T,D\]"),
        (put("graphs/decoder/inputs/0/axes", ["B", "Q"]), r"expected input_ids int64 \[R,Q\], found input_ids"),
        (put("graphs/decoder/inputs/1/dtype", "float32"), r"expected position int64 \[R\]"),
        (put("graphs/decoder/inputs/2/axes", ["R", "T"]), r"expected encoder_attention_mask int64 \[B,T\]"),
        (put("graphs/decoder/inputs/2/name", "head_mask"), "unknown input 'head_mask'"),
        (put("graphs/decoder/inputs/3/axes/1", 3), r"expected self_key.0 float32 \[R,2,S,4\], found .*\[R,3,S,4\]"),
        (put("graphs/decoder/inputs/5/dtype", "float16"), "expected cross_key.0 float32"),
        (put("graphs/decoder/outputs/0/dtype", "float16"), r"expected logits float32 \[R,Q,V\]"),
        (put("graphs/decoder/outputs/1/name", "key"), "expected present_key.0"),
        (drop("graphs", "decoder"), "graphs: expected encoder and decoder"),
        (put("format", 2), "format: expected 1, the oldest that has what these graphs use, found 2"),
        (put("graphs/decoder/inputs/2/name", "encoder_tags"), "beside an encoder's input 'tags', found no such input"),
        (put("cache", None), "cache: expected a cache"),
        (put("cache/layers", 0), "cache.layers: expected an integer of at least 1, found 0"),
        (put("cache/layers", 1.0), "cache.layers: expected an integer, found 1.0"),
        (put("cache/layers", True), "cache.layers: expected an integer, found True"),
        (put("cache/layers", 2**62), "expected buffers of"),
        (put("cache/heads", 2**80), "cache.heads: expected an integer of 64 bits"),
        (put("cache/max_length", 0), "cache.max_length"),
        (put("cache/dtype", "int64"), "cache.dtype"),
        (put("frontend/type", "video"), "frontend.type: expected one of text"),
        (put("frontend/tokenizer", "/etc/passwd"), "could leave the directory"),
        (put("frontend/tokenizer", 1), "frontend.tokenizer: expected a file name"),
        (put("generation/temperature", math.inf), "generation.temperature: expected a finite number"),
        (put("parity/errors", [0.0, math.nan]), r"parity.errors\[1\]: expected a finite number, found nan"),
        (put("source/name", "\ud800"), "source.name: expected Unicode text"),
        (put("files/x.onnx", {"size": -1, "sha256": "0" * 64}), "files.x.onnx.size: expected an integer of at least 0"),
        (put("files/x.onnx", {"size": 1, "sha256": "0" * 63 + "G"}), "64 lowercase hex digits"),
        (put("files/x.onnx", {"size": 1}), "expected the key 'sha256'"),
        (put("files/x.onnx", {"size": 1, "sha256": "0" * 64}), "expected 'parity.safetensors' among the files"),
    ],
)
def test_a_wrong_manifest_is_refused(change: Callable[[Document], None], message: str) -> None:
    broken = document()
    change(broken)
    with pytest.raises(ArtifactError, match=message):
        Manifest.from_json(broken)


TOP = [
    {"name": "top_values", "dtype": "float32", "axes": ["R", 4]},
    {"name": "top_ids", "dtype": "int64", "axes": ["R", 4]},
    {"name": "log_sum", "dtype": "float32", "axes": ["R"]},
]


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([{"name": "next", "dtype": "int64", "axes": ["R"]}, *TOP], None),
        ([{"name": "next", "dtype": "int64", "axes": ["R"]}], None),
        (
            [{"name": "next", "dtype": "int64", "axes": ["R", "Q"]}],
            r"expected next int64 \[R\], found next int64 \[R,Q\]",
        ),
        ([{"name": "next", "dtype": "float32", "axes": ["R"]}], "expected next int64"),
        (TOP[:2], "top_values and top_ids of one width, and log_sum, together"),
        (TOP[1:], "top_values and top_ids of one width, and log_sum, together"),
        ([TOP[0] | {"axes": ["R", "V"]}, *TOP[1:]], "one of B R Q S"),
        ([TOP[0] | {"axes": ["R", "S"]}, *TOP[1:]], r"expected top_values float32 \[R,K\]"),
    ],
)
def test_what_a_decoder_finds_in_its_logits(found: list[Document], message: str | None) -> None:
    made = document()
    made["graphs"]["decoder"]["outputs"].extend(found)
    if message is None:
        assert Manifest.from_json(made).to_json() == made
    else:
        with pytest.raises(ArtifactError, match=message):
            Manifest.from_json(made)


def test_all_problems_come_in_one_message() -> None:
    broken = document() | {"task": 1, "target": "tpu", "extra": None}
    del broken["family"]
    with pytest.raises(ArtifactError) as error:
        Manifest.from_json(broken)
    assert all(word in str(error.value) for word in ("task", "target", "extra", "family"))


def test_a_newer_format_is_the_only_thing_said() -> None:
    with pytest.raises(ArtifactError, match=f"found {FORMATS[-1] + 1}: written by a newer txopt; upgrade") as error:
        Manifest.from_json({"format": FORMATS[-1] + 1, "shape": "unheard of"})
    assert "shape" not in str(error.value)


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, True, None])
def test_what_is_no_format_version_is_refused(version: object) -> None:
    with pytest.raises(ArtifactError, match="expected format 1 or 2"):
        Manifest.from_json(document() | {"format": version})


@pytest.mark.parametrize("value", [None, [], "manifest", 1])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(value)


def test_an_encoder_alone_names_its_outputs_by_the_task() -> None:
    outputs = encoder_only().graphs["encoder"].outputs
    rows_first = dataclasses.replace(outputs[0], axes=("R", 8))
    graph = dataclasses.replace(encoder_only().graphs["encoder"], outputs=(rows_first,))
    with pytest.raises(ArtifactError, match="axis B first"):
        dataclasses.replace(encoder_only(), graphs={"encoder": graph}).to_json()


def test_an_encoder_alone_has_no_cache() -> None:
    with pytest.raises(ArtifactError, match="cache: expected null"):
        dataclasses.replace(encoder_only(), cache=manifest().cache).to_json()


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("value", [np.int64(1), np.float32(1), {1, 2}, Colour.RED, b"x", {1: 2}, 10**30, math.nan])
def test_what_is_not_json_cannot_be_written(value: object) -> None:
    with pytest.raises(ArtifactError, match="generation"):
        dataclasses.replace(manifest(), generation={"key": [value]}).to_bytes()


def test_a_tuple_is_written_as_a_list() -> None:
    data = dataclasses.replace(manifest(), generation={"eos_token_id": (1, 2)}).to_bytes()
    assert json.loads(data)["generation"] == {"eos_token_id": [1, 2]}


def test_a_manifest_that_no_reader_accepts_is_not_written() -> None:
    with pytest.raises(ArtifactError, match="keep cases in files"):
        dataclasses.replace(manifest(), parity={"cases": "x" * LARGEST}).to_bytes()


def test_the_specification_names_everything_that_is_checked() -> None:
    text = (Path(__file__).parents[2] / "docs/format.md").read_text(encoding="utf-8")
    keys = [field.name for kind in (Manifest, CacheSpec, GraphSpec, TensorSpec) for field in dataclasses.fields(kind)]
    words = [
        *keys,
        *KINDS,
        *PRECISIONS,
        *TARGETS,
        *TYPES,
        *COMMON,
        *(key for table in KEYS.values() for key in table),
        *DTYPES,
        *AXES,
        *SUFFIXES,
        *PICKLES,
    ]
    assert [word for word in words if not re.search(rf"[`\"{{]{re.escape(word)}[`\"}}]", text)] == []
    assert f"versions {FORMATS[0]} and {FORMATS[-1]}\n" in text
    assert f"{LARGEST >> 20} MiB" in text
    assert f"nested at most {DEEPEST} deep" in text


@given(st.sampled_from([field.name for field in dataclasses.fields(Manifest)]), JSON)
def test_any_json_in_any_place_is_accepted_or_refused_with_artifact_error(key: str, value: object) -> None:
    with contextlib.suppress(ArtifactError):
        read = Manifest.from_json(document() | {key: value})
        assert Manifest.from_json(json.loads(read.to_bytes())) == read
