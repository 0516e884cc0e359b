"""What ``txopt inspect`` and the summary of an artifact tell of its engines; no library is there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.runtime.planned import planned, with_sets
from txopt.cli import main
from txopt.inspection import inspect
from txopt.runtime.artifact import Artifact
from txopt.runtime.engines import FILE, engines_of
from txopt.runtime.writer import ArtifactWriter
from txopt.summary import megabytes


@pytest.fixture(scope="module")
def artifact(g2p: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return planned(g2p, tmp_path_factory.mktemp("planned") / "artifact", computes=False)


def test_engines_are_told_with_library_gpus_precision_cache_and_profiles(artifact: Artifact) -> None:
    document, text = inspect(artifact.path)
    lines = text.splitlines()
    at = lines.index("  engines of tensorrt-rtx 1.7.1 for SM89, in fp32, cache of 64 places")
    plan = (artifact.path / "engines/decoder.plan").stat().st_size
    assert f"    engines/decoder.plan: {megabytes(plan)}" in lines[at:]
    assert (
        "      profile step: B 1 to 8 (tuned for 1), Q 1, R 1 to 32 (tuned for 4), T 1 to 60 (tuned for 16)"
        in lines[at:]
    )
    assert lines[-1].startswith("  verified")
    assert document["engines"] == [one.to_json() for one in engines_of(artifact)]
    assert document["engines_problem"] is None


def test_where_engines_run_besides_is_told(artifact: Artifact, tmp_path: Path) -> None:
    (one,) = engines_of(artifact)
    wide = replace(one, any_version=True, any_hardware=True, capabilities=("SM80", "SM89"))
    text = inspect(with_sets(artifact, tmp_path / "out", (wide,), {}).path)[1]
    assert "engines of tensorrt-rtx 1.7.1 and later for SM80, SM89 and later, in fp32" in text


def test_an_artifact_without_engines_tells_of_none(g2p: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    document, text = inspect(g2p.path)
    assert (document["engines"], document["engines_problem"]) == ([], None)
    assert "engines" not in text
    with pytest.raises(SystemExit):
        main(["inspect", str(g2p.path), "--json"])
    assert json.loads(capsys.readouterr().out)["engines"] == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda document: document | {"format": 9}, "expected format 1, found 9"),
        (lambda document: document["sets"][0].update(runtime="cuda\x1b[2J") or document, "runtime: expected one of"),
    ],
)
def test_engines_that_cannot_be_read_leave_the_rest_told(
    change: Callable[[dict[str, object]], object], problem: str, artifact: Artifact, tmp_path: Path
) -> None:
    """They are bound by their hashes all the same: somebody else, or a later version, wrote them."""
    with ArtifactWriter(tmp_path / "out") as writer:
        for name in artifact.manifest.files:
            (writer.directory / name).parent.mkdir(exist_ok=True)
            (writer.directory / name).write_bytes((artifact.path / name).read_bytes())
        text = json.dumps(change(json.loads((artifact.path / FILE).read_text())))
        (writer.directory / FILE).write_text(text)
        writer.commit(artifact.manifest)
    document, text = inspect(tmp_path / "out")
    assert document["engines"] is None
    assert problem in document["engines_problem"]
    assert f"  engines that cannot be read: {FILE}: " in text
    assert problem in text
    assert "\x1b" not in text
    assert text.splitlines()[-1].startswith("  verified")
