"""Buffers and feeds: what a session promises whatever the caller does with its arrays."""

import gc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.ort import Runner
from txopt.runtime.errors import InputError, UsageError
from txopt.runtime.graphs import GraphSpec, TensorSpec
from txopt.runtime.inputs import check_inputs
from txopt.runtime.model import Model, load


@pytest.fixture(scope="module")
def model(g2p: Artifact) -> Model:
    return Model(g2p, threads=1)


def test_arrays_outlive_the_engine_values_they_came_from(model: Model) -> None:
    """The engine's own view of a value is dead memory once the value is gone; whoever asks for an array gets a copy."""
    ids = np.array([[5, 6, 7, 2]])
    encoded = model.encode(input_ids=ids)
    decoder = model.decode(encoded)
    decoder.feed(np.array([[1, 9]]))
    arrays = [model.session.array(encoded.values["memory"]), decoder.cached("self_key.0")]
    before = [array.copy() for array in arrays]
    assert all(array.base is None for array in arrays)
    del encoded, decoder
    gc.collect()
    again = model.encode(input_ids=ids[:, ::-1].copy())  # takes the memory that was freed
    model.decode(again).feed(np.array([[1, 20]]))
    for array, value in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, value)


def test_strided_tokens_are_fed_as_they_are(model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 6, 7, 2]]))
    tokens = np.array([[1, 9, 10, 11, 12, 13]])
    whole = model.decode(encoded).feed(tokens)
    decoder = model.decode(encoded)
    parts = [decoder.feed(tokens[:, start : start + 2]) for start in (0, 2, 4)]
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)


def test_reorder_lets_rows_go_on_as_others(model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 6, 7, 2]]))
    decoder = model.decode(encoded, beams=3)
    decoder.feed(np.array([[1, 9], [1, 10], [1, 11]]))
    decoder.reorder(np.array([2, 2, 0]))
    logits = decoder.step(np.array([20, 21, 20])).copy()
    for row, (prefix, last) in enumerate([(11, 20), (11, 21), (9, 20)]):
        alone = model.decode(encoded).feed(np.array([[1, prefix, last]]))[0, -1]
        np.testing.assert_allclose(logits[row], alone, atol=1e-5)


def test_wrong_inputs_are_all_named(model: Model) -> None:
    with pytest.raises(
        InputError, match=r"(?s)attention_mask: expected int64.*foo: unknown|foo: unknown.*attention_mask: expected"
    ):
        model.encode(input_ids=np.ones((1, 3), np.int64), attention_mask=np.ones((2, 3), np.int64), foo=np.ones(1))
    with pytest.raises(InputError, match="at least 0, got -1"):
        model.encode(input_ids=np.array([[1, -1]]))
    with pytest.raises(InputError, match=r"got input_ids int64 \[1, 2\] up to 500, .*; look for ids beyond"):
        replaced(model, source_vocabulary=None).encode(input_ids=np.array([[1, 500]]))


def replaced(model: Model, **facts: Any) -> Model:
    """The same graphs, with other facts in the manifest's front end."""
    manifest = replace(model.manifest, frontend=model.manifest.frontend | facts)
    return Model(replace(model.artifact, manifest=manifest), threads=1)


def test_sources_beyond_the_models_tables_are_refused_before_the_engine_sees_them(model: Model) -> None:
    bounded = replaced(model, source_vocabulary=31, source_positions=4)
    assert bounded.generate(input_ids=[[4, 5, 30, 2]], max_new_tokens=2).sequences.shape[0] == 1
    with pytest.raises(InputError) as caught:
        bounded.generate(input_ids=[[4, 5, 24, 2, 31]])
    assert "input_ids: expected ids of this model's source vocabulary, 0 to 30, got 31" in str(caught.value)
    assert "input_ids: expected sources of at most 4 tokens, padding included" in str(caught.value)
    assert "got 5; shorten them" in str(caught.value)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no sources", "no tokens"])
def test_nothing_to_read_is_refused_before_the_engine_sees_it(shape: tuple[int, int], model: Model) -> None:
    """ONNX Runtime's Attention knows no empty batch and no empty length."""
    with pytest.raises(InputError, match=r"input_ids: expected int64 \[B,T\], got int64"):
        model.generate(input_ids=np.zeros(shape, np.int64))
    with pytest.raises(InputError, match="tokens: expected int64"):
        model.decode(model.encode(input_ids=[[3], [4]])).prefill(np.zeros(shape, np.int64))


RAGGED: Any = [[5, 6, 2], [5, 2]]


@pytest.mark.parametrize("name", ["encode", "generate"])
@pytest.mark.parametrize(
    ("inputs", "about"),
    [
        ({"input_ids": RAGGED}, "input_ids"),
        ({"input_ids": [[5, 2], [5, 2]], "attention_mask": [[1, 1], [1]]}, "attention_mask"),
    ],
)
def test_rows_of_different_lengths_are_to_be_padded(name: str, inputs: Any, about: str, model: Model) -> None:
    with pytest.raises(InputError, match=f"{about}: rows differ in length; pad them, and give an attention_mask"):
        getattr(model, name)(**inputs)


def test_rows_of_different_lengths_are_no_tokens(model: Model) -> None:
    encoded = model.encode(input_ids=[[5, 6, 2], [5, 2, 0]])
    with pytest.raises(InputError, match="tokens: rows differ in length"):
        model.decode(encoded).prefill(RAGGED)
    with pytest.raises(InputError, match="mask: rows differ in length"):
        model.decode(encoded).prefill(np.ones((2, 2), np.int64), RAGGED)
    decoder = model.decode(encoded)
    decoder.prefill(np.ones((2, 1), np.int64))
    with pytest.raises(InputError, match="tokens: rows differ in length"):
        decoder.step([1, [2]])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rows: rows differ in length"):
        decoder.reorder([0, [1]])  # type: ignore[arg-type]


def test_more_tokens_than_positions_are_refused(model: Model) -> None:
    decoder = model.decode(model.encode(input_ids=np.array([[5, 2]])))
    with pytest.raises(InputError, match="64 target positions, asked for 65"):
        decoder.feed(np.ones((1, 65), np.int64))


@pytest.mark.parametrize("threads", [0, -1, "1", True, 1.5, 10**12, [1]])
def test_threads_that_are_no_number_of_threads_are_refused(g2p: Artifact, threads: Any) -> None:
    with pytest.raises(UsageError, match=r"threads: expected an integer from 1 to 4096, got "):
        load(g2p.path, threads=threads)


@pytest.mark.parametrize(
    "device",
    ["tpu", None, 3, "cpu:1", "cpu:", "cuda:", "cuda:x", "cuda:²", "cuda:" + "1" * 5000, "tensorrt:-1", ["cpu"]],
    ids=lambda device: str(device)[:12],
)
def test_devices_that_are_none_are_refused(g2p: Artifact, device: Any) -> None:
    with pytest.raises(
        UsageError, match=r'device must be one of "cpu", "cuda", "cuda-graphs", "tensorrt", all .* got '
    ):
        load(g2p.path, device=device)


def test_numpys_integers_are_integers(g2p: Artifact) -> None:
    model = load(g2p.path, threads=np.int64(1))  # type: ignore[arg-type]
    encoded = model.encode(input_ids=np.array([[5, 2]]))
    assert model.decode(encoded, beams=np.int32(2)).feed(np.array([[1], [1]])).shape[0] == 2  # type: ignore[arg-type]


SPEECH = GraphSpec(
    file="encoder.onnx",
    inputs=(TensorSpec(name="features", dtype="float16", axes=("B", 2, "T")),),
    outputs=(TensorSpec(name="memory", dtype="float16", axes=("B", "T", 8)),),
)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 70_000.0])
def test_features_that_are_no_numbers_are_refused_by_name(number: float) -> None:
    """70,000 is beyond float16, which this encoder takes."""
    features = np.zeros((1, 2, 3), np.float32)
    assert check_inputs(SPEECH, {"features": features})["features"].dtype == np.float16
    features[0, 1, 2] = number
    with pytest.raises(
        InputError, match=r"features: expected finite numbers that float16 holds, got (nan|inf|70000\.0)"
    ):
        check_inputs(SPEECH, {"features": features})


@pytest.mark.parametrize("number", [0, -1, "2", True, 1.5, None])
@pytest.mark.parametrize("name", ["beams", "batch"])
def test_numbers_of_rows_that_are_none_are_refused(model: Model, name: str, number: Any) -> None:
    encoded = model.encode(input_ids=np.array([[5, 2]]))
    with pytest.raises(UsageError, match=f"{name}: expected an integer, at least 1, got "):
        model.decode(encoded, **{name: number})


@pytest.mark.parametrize("rows", [10**9, 10**30, 10**400])
def test_more_rows_than_memory_holds_are_refused_with_their_size(model: Model, rows: int) -> None:
    encoded = model.encode(input_ids=np.array([[5, 2]]))
    with pytest.raises(UsageError, match=r"buffers for 10+ rows .* take [\d,]+ GiB of memory.*fewer beams \(num_beams"):
        model.decode(encoded, beams=rows)


@pytest.mark.parametrize("beams", [4097, 10**9])
def test_more_beams_than_anybody_searches_are_refused(model: Model, beams: int) -> None:
    """Some numbers that memory seems to hold end the process once it is written to."""
    with pytest.raises(UsageError, match=r"num_beams.*at most 4096"):
        model.generate(input_ids=np.array([[5, 2]]), num_beams=beams)


def test_memory_that_the_system_refuses_is_told_likewise(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise MemoryError

    decoder = model.decode(model.encode(input_ids=np.array([[5, 2]])))
    monkeypatch.setattr(Runner, "buffers", refuse)
    with pytest.raises(UsageError, match=r"buffers for 1 rows .* take 1 GiB of memory"):
        decoder.feed(np.array([[1]]))


def test_sources_that_do_not_fit_the_decoder_are_refused(model: Model) -> None:
    encoded = model.encode(input_ids=np.array([[5, 2], [6, 2]]))
    with pytest.raises(UsageError, match=r"expected decode\(model.encode\(...\)\), got no sources"):
        model.decode()
    with pytest.raises(UsageError, match="batch=3 and 2 encoded sources: leave batch out"):
        model.decode(encoded, batch=3)
    with pytest.raises(InputError, match=r"expected what encode\(\) gave, got dict"):
        model.decode({})  # type: ignore[arg-type]
    assert model.decode(encoded, batch=2).feed(np.array([[1], [1]])).shape[0] == 2


def test_another_models_sources_are_refused(model: Model) -> None:
    """Another's have other layers, sizes, dtypes or no mask; all of it is told at once."""
    encoded = model.encode(input_ids=np.array([[5, 6, 2]]))
    runner = model.session._runners["decoder"]
    values = dict(encoded.values)
    values["cross_key.7"] = values.pop("cross_key.0")
    values["cross_key.1"] = runner.tensor(np.zeros((1, 3, 3, 32), np.float32))
    values["cross_value.1"] = runner.tensor(np.zeros((1, 3, 3, 64), np.float16))
    with pytest.raises(InputError) as caught:
        model.decode(replace(encoded, values=values, masks={}))
    for part in (
        "these encoded sources are not this model's; expected what its own encode() gave",
        "cross_key.0: missing; expected cross_key.0 float32 [B,3,T,64]",
        "cross_key.1: expected float32 [B,3,T,64], got float32 [1, 3, 3, 32]",
        "cross_key.7: unknown",
        "cross_value.1: expected float32 [B,3,T,64], got float16 [1, 3, 3, 64]",
        "encoder_attention_mask: expected the mask",
    ):
        assert part in str(caught.value)
    for wrong in (replace(encoded, batch=2), replace(encoded, masks={"attention_mask": np.ones((1, 4), np.int64)})):
        with pytest.raises(InputError, match="not this model's"):
            model.decode(wrong)


@pytest.mark.parametrize("search", [{}, {"num_beams": 2}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"decoder_start_token_id": 73},
            "decoder_start_token_id: expected ids of this model's vocabulary, 0 to 72, got 73",
        ),
        ({"decoder_start_token_id": 10**20}, "decoder_start_token_id: expected an integer"),
        ({"decoder_input_ids": [[1, 73]]}, "decoder_input_ids: expected ids .* 0 to 72, got 73"),
        ({"decoder_input_ids": [[-1, 5]]}, "decoder_input_ids: expected ids .* 0 to 72, got -1"),
        ({"decoder_input_ids": [[2**63]]}, "decoder_input_ids: expected ids .* got 9223372036854775808"),
        ({"decoder_input_ids": [[10**20]]}, r"expected int64 \[B,P\].* got object"),
    ],
)
def test_starts_out_of_the_vocabulary_are_the_callers_fault(
    model: Model, arguments: dict[str, Any], message: str, search: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        model.generate(input_ids=np.array([[5, 2]]), max_new_tokens=2, **arguments, **search)
    assert caught.value.exit_code == 2


def test_rows_stay_with_their_source(model: Model) -> None:
    """The cross K/V stay where they are, so a row that took over another source's would read the wrong one."""
    decoder = model.decode(model.encode(input_ids=np.array([[5, 2], [6, 2]])), beams=2)
    decoder.feed(np.ones((4, 1), np.int64))
    for wrong in ([0, 1, 1, 3], [2, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, -1]):
        with pytest.raises(InputError, match=r"from 0 to 3, each within its source's 2 adjacent rows"):
            decoder.reorder(np.array(wrong))
    for wrong in ([0, 1], [0.0, 1.0, 2.0, 3.0]):
        with pytest.raises(InputError, match=r"rows: expected int64 \[4\], got"):
            decoder.reorder(np.array(wrong))
    decoder.reorder(np.array([1, 1, 3, 2]))
