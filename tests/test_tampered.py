"""Artifacts whose manifest or cases someone edited, hashes made right again: an error with a reason, never a traceback."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import txopt
from txopt.runtime.artifact import Artifact
from txopt.runtime.backends.ort import Call
from txopt.runtime.errors import ArtifactError, ParityError, TxoptError
from txopt.summary import of_artifact


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return txopt.export("txopt.examples.g2p.model:factory", tmp_path_factory.mktemp("tampered") / "out").path


@pytest.fixture
def edited(artifact: Path, tmp_path: Path) -> Callable[[str, Any], Path]:
    def edit(key: str, value: Any) -> Path:
        copy = tmp_path / "copy"
        shutil.copytree(artifact, copy)
        document = json.loads((copy / "manifest.json").read_text("utf-8"))
        *path, last = key.split("/")
        place = document
        for name in path:
            place = place[name]
        place[last] = value
        (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
        return copy

    return edit


@pytest.mark.slow
def test_another_start_token_does_not_pass_for_verified(edited: Callable[[str, Any], Path]) -> None:
    with pytest.raises(ParityError, match="greedy"):
        txopt.verify(edited("generation/decoder_start_token_id", 9)).require()


@pytest.mark.slow
@pytest.mark.parametrize("value", [{}, {"errors": "none", "tolerance": 1, "passed": True}, {"errors": {"a": "b"}}])
def test_a_certificate_that_cannot_be_read_is_said(edited: Callable[[str, Any], Path], value: Any) -> None:
    _, text = of_artifact(Artifact.open(edited("parity", value)))
    assert "no certificate of parity that can be read" in text


@pytest.mark.slow
@pytest.mark.parametrize("value", [3, {"nodes": [1], "patterns": {}}, {"nodes": {}, "patterns": {"QKV": 1}}])
def test_what_another_writer_says_of_fusions_is_left_alone(edited: Callable[[str, Any], Path], value: Any) -> None:
    _, text = of_artifact(Artifact.open(edited("fusion/encoder", value)))
    assert "encoder: another writer's report of fusions" in text
    assert "decoder: 96 nodes" in text


@pytest.mark.slow
def test_cases_without_their_tensors_are_refused(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    file = copy / "parity.safetensors"
    index = json.dumps([{"name": "single", "schedule": [1], "options": {}}])
    save_file({key: value for key, value in load_file(file).items() if "tokens" not in key}, file, {"cases": index})
    document = json.loads((copy / "manifest.json").read_text("utf-8"))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    document["files"][file.name] |= {"sha256": digest, "size": file.stat().st_size}
    (copy / "manifest.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(ArtifactError, match="single/tokens"):
        txopt.verify(copy)


@pytest.mark.slow
@pytest.mark.parametrize("value", [4096, None])
def test_a_cache_longer_than_the_models_positions_is_named(edited: Callable[[str, Any], Path], value: Any) -> None:
    """The table of positions is in the graph: only running it tells."""
    model = txopt.load(edited("cache/max_length", value))
    source = {"input_ids": [[3, 4, 5]]}
    said = f"cache.max_length: expected positions that the decoder's graph has, found {value}, and it fails at position"
    with pytest.raises(ArtifactError, match=re.escape(f"{said} 64")):
        model.generate(**source, max_new_tokens=200, min_new_tokens=200, num_beams=1)
    with pytest.raises(ArtifactError, match=re.escape(f"{said} 2999")):
        model.decode(model.encode(**source)).prefill(np.full((1, 3000), 3))


@pytest.mark.slow
def test_an_engine_that_fails_at_any_position_is_not_the_manifests_fault(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = txopt.load(artifact)
    decoder = model.decode(model.encode(input_ids=[[3, 4, 5]]))

    def failing(self: Call) -> None:
        raise TxoptError("the engine failed: no memory")

    monkeypatch.setattr(Call, "run", failing)
    with pytest.raises(TxoptError, match="no memory") as caught:
        decoder.prefill(np.full((1, 3), 3))
    assert not isinstance(caught.value, ArtifactError)
