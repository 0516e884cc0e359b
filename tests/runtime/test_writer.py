"""Writing is all or nothing, whatever interrupts it, and never at the cost of what was there."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.artifacts import FILES, edit, fill, manifest, put, tree, write
from txopt.runtime import writer as writer_module
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError, TxoptError
from txopt.runtime.writer import ArtifactWriter

ROOT = Path(__file__).parents[2]


def test_everything_is_on_the_disk_before_it_gets_its_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[int | str] = []
    rename = os.rename

    def logged(*args: Path) -> None:
        log.append("rename")
        rename(*args)

    monkeypatch.setattr(os, "fsync", lambda descriptor: log.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", logged)
    write(place / "out")
    inodes = {name: (place / "out" / name).stat().st_ino for name in [*FILES, "manifest.json", "engines", "."]}
    before, after = log[: log.index("rename")], log[log.index("rename") + 1 :]
    assert set(before) == set(inodes.values())
    assert max(before.index(inodes[name]) for name in FILES) < before.index(inodes["manifest.json"])
    assert after == [place.stat().st_ino]


def test_a_commit_leaves_the_artifact_and_nothing_else(place: Path) -> None:
    artifact = write(place / "out")
    assert {path.name for path in place.iterdir()} == {"out", "thesis.txt"}
    assert Artifact.open(place / "out").manifest == artifact.manifest
    assert artifact.path == place / "out"


def test_the_same_input_gives_the_same_bytes(place: Path) -> None:
    write(place / "one")
    write(place / "two")
    assert tree(place / "one") == tree(place / "two")


def test_the_files_lie_beside_out_until_then(place: Path) -> None:
    with ArtifactWriter(place / "out") as writer:
        assert writer.directory.parent == place
        assert not (place / "out").exists()


def test_the_artifact_has_the_permissions_that_the_user_chose(place: Path) -> None:
    (place / "mine").mkdir()
    write(place / "out")
    assert (place / "out").stat().st_mode == (place / "mine").stat().st_mode


def test_missing_parents_are_made(place: Path) -> None:
    write(place / "a" / "b" / "out")
    Artifact.open(place / "a" / "b" / "out")


def test_a_relative_out_does_not_follow_the_current_directory(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with ArtifactWriter("out") as writer:
        monkeypatch.chdir("/")
        fill(writer.directory)
        writer.commit(manifest())
    Artifact.open(place / "out")


def test_an_empty_directory_may_be_filled(place: Path) -> None:
    (place / "out").mkdir()
    write(place / "out")
    Artifact.open(place / "out")


def test_a_link_to_an_artifact_stays_a_link(place: Path) -> None:
    write(place / "real")
    (place / "out").symlink_to("real")
    write(place / "out", overwrite=True)
    assert (place / "out").is_symlink()
    Artifact.open(place / "real")


# What must leave everything as it was


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("there", ["nothing", "an empty directory", "an artifact", "no parents"])
def test_an_interrupted_export_leaves_what_was_there(place: Path, error: type[BaseException], there: str) -> None:
    out = place / "deep" / "er" / "out" if there == "no parents" else place / "out"
    if there == "an artifact":
        write(out)
    elif there == "an empty directory":
        out.mkdir()
    before = tree(place)

    def interrupted() -> None:
        with ArtifactWriter(out, overwrite=True) as writer:
            fill(writer.directory)
            raise error

    with pytest.raises(error):
        interrupted()
    assert tree(place) == before


class FailsOnce:
    """Every step of a commit that reads or writes the disk; the ``at``-th fails, before or after it did its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str, at: int) -> None:
        self.left, self.error, self.moment = at, error, moment
        for name in ("listing", "sha256", "sync"):
            monkeypatch.setattr(writer_module, name, self.wrapped(getattr(writer_module, name)))
        monkeypatch.setattr(os, "rename", self.wrapped(os.rename))

    def wrapped(self, step: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, **named: object) -> object:
            self.left -= 1
            if self.left == 0 and self.moment == "before":
                raise self.error
            result = step(*args, **named)
            if self.left == 0:
                raise self.error
            return result

        return run


@pytest.mark.parametrize(
    ("error", "moment"),
    [
        (OSError(28, "No space left on device"), "before"),
        (KeyboardInterrupt(), "before"),
        (KeyboardInterrupt(), "after"),
    ],
    ids=["disk full", "Ctrl-C before", "Ctrl-C after"],
)
@pytest.mark.parametrize("old", [False, True], ids=["new", "overwrite"])
def test_a_commit_that_fails_at_any_step_leaves_the_old_or_the_new(
    place: Path, error: BaseException, moment: str, old: bool
) -> None:
    outcomes = []
    for at in range(1, 100):
        if old:
            write(place / "out", overwrite=True)
            edit(place / "out", put("family", "the old one"))
        before = tree(place)
        with pytest.MonkeyPatch.context() as patch, ArtifactWriter(place / "out", overwrite=True) as writer:
            fill(writer.directory)
            steps = FailsOnce(patch, error, moment, at)
            with contextlib.suppress(ArtifactError, KeyboardInterrupt):
                writer.commit(manifest())
        outcomes.append("before" if tree(place) == before else "after")
        if outcomes[-1] == "after":
            assert Artifact.open(place / "out").manifest.family == manifest().family
            assert {path.name for path in place.iterdir()} == {"out", "thesis.txt"}
            shutil.rmtree(place / "out")
        if steps.left > 0:
            break
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes, reverse=True)  # before, before, ..., after: there is one moment of commit


def test_forgetting_to_commit_leaves_nothing(place: Path) -> None:
    before = tree(place)
    with ArtifactWriter(place / "out") as writer:
        fill(writer.directory)
    assert tree(place) == before


# What a killed process left


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.runtime.artifacts import fill, manifest
from txopt.runtime import writer as module
real = os.rename
renames = [0]
def rename(*args):
    renames[0] += 1
    real(*args)
    if renames[0] == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
with module.ArtifactWriter(Path({out!r}), overwrite=True) as writer:
    fill(writer.directory)
    if {at} == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = rename
    writer.commit(manifest())
"""


@pytest.mark.parametrize("at", [0, 1, 2], ids=["writing", "old one moved aside", "new one in place"])
def test_the_next_writer_tidies_up_after_a_killed_one(place: Path, at: int) -> None:
    write(place / "out")
    edit(place / "out", put("family", "the old one"))
    script = KILLED.format(root=str(ROOT), out=str(place / "out"), at=at)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert len(list(place.glob(".out.txopt-*"))) == (2 if at == 1 else 1)
    with pytest.raises(ArtifactError, match="already"), ArtifactWriter(place / "out"):
        pass
    assert {path.name for path in place.iterdir()} == {"out", "thesis.txt"}
    assert Artifact.open(place / "out").manifest.family == (manifest().family if at == 2 else "the old one")


def test_a_living_writer_is_left_alone(place: Path) -> None:
    with ArtifactWriter(place / "out") as first:
        fill(first.directory)
        with ArtifactWriter(place / "out"):
            pass
        first.commit(manifest())
    Artifact.open(place / "out")


@pytest.mark.parametrize(
    "name", [".out.txopt-notes", ".out.txopt-0123abcd.new.txt", ".output.txopt-0123abcd.new", "out.txopt-0123abcd.new"]
)
def test_only_what_writers_made_is_tidied(place: Path, name: str) -> None:
    (place / name).mkdir()
    (place / name / "mine.txt").write_text("mine")
    write(place / "out")
    assert (place / name / "mine.txt").read_text() == "mine"


# What cannot be committed


@pytest.mark.parametrize("name", ["model.pt", "LICENSE", "a b.txt", "manifest.json", ".hidden.txt"])
def test_a_file_that_no_reader_accepts_is_not_committed(place: Path, name: str) -> None:
    before = tree(place)
    with ArtifactWriter(place / "out") as writer:
        fill(writer.directory)
        (writer.directory / name).write_bytes(b"x")
        with pytest.raises(ArtifactError, match="cannot be an artifact"):
            writer.commit(manifest())
    assert tree(place) == before


@pytest.mark.parametrize("name", ["encoder.onnx", "tokenizer.json", "parity.safetensors"])
def test_a_file_that_the_manifest_speaks_of_must_be_there(place: Path, name: str) -> None:
    with ArtifactWriter(place / "out") as writer:
        fill(writer.directory)
        (writer.directory / name).unlink()
        with pytest.raises(ArtifactError, match=f"expected '{name}' among"):
            writer.commit(manifest())
    assert {path.name for path in place.iterdir()} == {"thesis.txt"}


def test_an_empty_directory_is_no_artifact(place: Path) -> None:
    with pytest.raises(ArtifactError, match="expected files, found none"), ArtifactWriter(place / "out") as writer:
        writer.commit(manifest())


def test_a_second_commit_is_our_own_mistake(place: Path) -> None:
    with ArtifactWriter(place / "out") as writer:
        fill(writer.directory)
        writer.commit(manifest())
        with pytest.raises(TxoptError, match="second"):
            writer.commit(manifest())


def test_a_draft_can_be_used_before_it_is_committed(place: Path) -> None:
    with ArtifactWriter(place / "out") as writer:
        fill(writer.directory)
        draft = writer.draft(manifest())
        assert all(draft.file(name).read_bytes() == content for name, content in FILES.items())
        assert writer.commit(draft.manifest).manifest.files["weights.data"].sha256
    Artifact.open(place / "out")
