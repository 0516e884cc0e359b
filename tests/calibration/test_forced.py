"""One pass of teacher forcing shows what the decode loop computes step by step, padding left out."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.calibration.made import normal
from txopt.calibration.forced import Forced
from txopt.calibration.linears import reads
from txopt.exporter.pipeline import export
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import UsageError
from txopt.runtime.model import Model

pytestmark = pytest.mark.slow

Array = NDArray[Any]
Make = Callable[[str], Artifact]

CLOSE = 1e-5  # of the largest magnitude, at least 1
LENGTHS = (6, 2, 4)  # of targets


def tokens(vocabulary: int = 40) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(3, vocabulary, (len(LENGTHS), max(LENGTHS)))


def masked(rows: Sequence[int]) -> NDArray[np.int64]:
    return (np.arange(max(rows)) < np.array(rows)[:, None]).astype(np.int64)


def text(*lengths: int, vocabulary: int = 30) -> dict[str, Array]:
    mask = masked(lengths)
    return {
        "input_ids": np.random.default_rng(1).integers(3, vocabulary, mask.shape) * mask,
        "attention_mask": mask,
    }


def activations(artifact: Artifact) -> dict[str, list[str]]:
    """What large weights are multiplied with, the logits and the caches."""
    found = {}
    for name, spec in artifact.manifest.graphs.items():
        graph = ir.load(artifact.file(spec.file)).graph
        inputs = [str(read.activations.name) for read in reads(graph) if read.activations is not None]
        found[name] = inputs + [out.name for out in spec.outputs if out.name in ("logits", "memory", "memory.1")]
    return found


def seen(
    artifact: Artifact, inputs: Mapping[str, Array], ids: NDArray[np.int64], lengths: Sequence[int]
) -> dict[tuple[str, str], Array]:
    with Forced(artifact, activations(artifact), threads=1) as forced:
        return {(each.graph, each.name): each.values for each in forced.run(inputs, ids, lengths)}


def close(got: Array, want: Array) -> None:
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=CLOSE * max(1, np.abs(want).max()), rtol=0)


def rows_of(inputs: Mapping[str, Array], row: int, lengths: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """One row without its padding: the second axis of each input is cut to its length, where ``lengths`` says one."""
    return {
        name: value[row : row + 1, : lengths[name][row]] if name in lengths else value[row : row + 1]
        for name, value in inputs.items()
    }


@dataclasses.dataclass(frozen=True)
class Fed:
    """Inputs [3,...] of one artifact, and how much of the second axis of each counts."""

    inputs: dict[str, Array]
    lengths: dict[str, Sequence[int]]


SOURCES: dict[str, Fed] = {
    "g2p": Fed(text(7, 3, 12), dict.fromkeys(("input_ids", "attention_mask"), (7, 3, 12))),
    "gpt2": Fed({}, {}),
    "whisper": Fed({"input_features": normal(3, 80, 100)}, {}),
    "speecht5": Fed(
        {"input_values": normal(3, 1200) * 0.1, "attention_mask": np.ones((3, 1200), np.int64)},
        {},  # its first norm hears padding (docs/decisions.md 24)
    ),
    "two": Fed(
        # As many tokens as regions: axes go by name, or padding of one is taken for the other's.
        {
            **text(5, 2, 3, vocabulary=40),
            "regions": normal(3, 5, 12),
            "regions_mask": masked((1, 5, 4)),
        },
        {
            **dict.fromkeys(("input_ids", "attention_mask"), (5, 2, 3)),
            **dict.fromkeys(("regions", "regions_mask"), (1, 5, 4)),
        },
    ),
}


@pytest.fixture(scope="module")
def made(artifacts: Make, g2p: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Make:
    built = {"g2p": g2p}

    def make(name: str) -> Artifact:
        if name not in built:
            two = "tests.exporter.memories:factory"
            built[name] = artifacts(name) if name != "two" else export(two, tmp_path_factory.mktemp("two") / "out")
        return built[name]

    return make


@pytest.fixture(autouse=True)
def _small_weights_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models have tiny weights; every product is to be looked at."""
    monkeypatch.setattr("txopt.calibration.linears.LEAST_SIZE", 64)
    return


@pytest.mark.parametrize("name", SOURCES)
def test_logits_are_those_of_a_decode_loop(name: str, made: Make) -> None:
    artifact, ids = made(name), tokens()
    got = seen(artifact, SOURCES[name].inputs, ids, LENGTHS)["decoder", "logits"]
    session = Model(artifact, threads=1).session
    encoded = session.encode(SOURCES[name].inputs) if SOURCES[name].inputs else None
    decoder = session.decoder(encoded, batch=len(ids))
    steps = np.stack([decoder.step(column).copy() for column in ids.T], 1)
    close(got, np.concatenate([row[:length] for row, length in zip(steps, LENGTHS, strict=True)]))


@pytest.mark.parametrize("name", SOURCES)
def test_a_batch_shows_what_its_rows_show_alone(name: str, made: Make) -> None:
    """Every value that a weight is multiplied with: as many places as are no padding, and the same numbers."""
    artifact, ids, fed = made(name), tokens(), SOURCES[name]
    together = seen(artifact, fed.inputs, ids, LENGTHS)
    alone = [
        seen(artifact, rows_of(fed.inputs, row, fed.lengths), ids[row : row + 1, :length], [length])
        for row, length in enumerate(LENGTHS)
    ]
    assert together
    for key, values in together.items():
        assert values.ndim == 2
        close(values, np.concatenate([one[key] for one in alone]))
        if key[0] == "decoder":
            assert len(values) == sum(LENGTHS)


def test_frames_are_not_samples(made: Make) -> None:
    """Where an encoder makes frames of sound, its own mask of them says which are padding."""
    artifact = made("speecht5")
    mask = masked((1200, 300, 700))
    inputs = {"input_values": normal(3, 1200) * 0.1 * mask, "attention_mask": mask}
    values = seen(artifact, inputs, tokens(), LENGTHS)["encoder", "memory"]
    frames = Model(artifact, threads=1).session.encode(inputs).masks["attention_mask"]
    assert frames.shape[1] < 100
    assert len(set(frames.sum(1))) == 3
    assert len(values) == frames.sum()


def test_inputs_of_a_graph_can_be_looked_at(made: Make) -> None:
    """Features that a first layer reads are nobody's output."""
    artifact = made("two")
    inputs = SOURCES["two"].inputs
    with Forced(artifact, {"encoder": ["regions"], "decoder": ["cross_key.1"]}) as forced:
        found = {each.name: each.values for each in forced.run(inputs, tokens(), LENGTHS)}
    np.testing.assert_array_equal(found["regions"], inputs["regions"][inputs["regions_mask"] != 0])
    assert found["cross_key.1"].shape == (3 * 4 * 5, 8)


def test_names_of_nothing_are_refused(g2p: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(
        UsageError, match=r"encoder.onnx: expected names of values between its nodes, found no 'nothing'"
    ):
        Forced(g2p, {"encoder": ["nothing"]})
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_and_the_artifact_is_not_touched(
    g2p: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in g2p.path.iterdir()}
    with Forced(g2p, {"encoder": ["memory"], "decoder": ["logits", "logits"]}, threads=1) as forced:
        assert len(list(tmp_path.iterdir())) == 1
        names = [each.name for each in forced.run(SOURCES["g2p"].inputs, tokens(), LENGTHS)]
    assert names == ["memory", "logits"]
    assert not list(tmp_path.iterdir())
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in g2p.path.iterdir()} == before


def test_an_encoder_can_serve_several_decoders(g2p: Artifact) -> None:
    """Graphs that are not named are not opened, and what one encoder gave is another decoder's to read."""
    inputs, ids = SOURCES["g2p"].inputs, tokens()
    with Forced(g2p, {"encoder": []}) as encoder, Forced(g2p, {"decoder": ["logits"]}) as decoder:
        given = encoder.encoded(inputs)
        (logits,) = decoder.decoded(given, ids, LENGTHS)
    close(logits.values, seen(g2p, inputs, ids, LENGTHS)["decoder", "logits"])


def test_other_weights_change_what_is_seen(g2p: Artifact) -> None:
    graph = ir.load(g2p.file("decoder.onnx")).graph
    read = next(read for read in reads(graph) if read.activations is not None)
    assert read.weight.const_value is not None
    weight = read.weight.const_value.numpy()
    inputs, ids = SOURCES["g2p"].inputs, tokens()

    def logits(other: Array) -> Array:
        taps = {"encoder": [], "decoder": ["logits"]}
        with Forced(g2p, taps, weights={"decoder": {read.name: other}}) as forced:
            return next(iter(forced.run(inputs, ids, LENGTHS))).values

    plain = seen(g2p, inputs, ids, LENGTHS)["decoder", "logits"]
    np.testing.assert_array_equal(logits(weight.copy()), plain)
    assert np.abs(logits(weight * np.float32(1.5)) - plain).max() > 0.01


def test_an_artifact_s_files_keep_one_name(g2p: Artifact) -> None:
    """A second one, a hard link, would stay behind a process that is killed, and readers of ONNX refuse such files."""
    with Forced(g2p, {"encoder": []}):
        assert {g2p.file(name).stat().st_nlink for name in g2p.manifest.files} == {1}
