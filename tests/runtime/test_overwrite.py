"""What is at OUT already: an artifact may be replaced when asked, and nothing else is ever touched."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.artifacts import edit, fill, manifest, put, tree, write
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError
from txopt.runtime.writer import ArtifactWriter


def test_an_artifact_is_not_overwritten_unasked(place: Path) -> None:
    write(place / "out")
    before = tree(place)
    with pytest.raises(ArtifactError, match="--overwrite"), ArtifactWriter(place / "out"):
        pytest.fail("the export must not even start")
    assert tree(place) == before


def users_file(out: Path) -> None:
    out.write_text("mine")


def users_directory(out: Path) -> None:
    out.mkdir()
    (out / "mine.txt").write_text("mine")


def foreign_manifest(out: Path) -> None:
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a web app", "version": "1.0"}')


def damaged_manifest(out: Path) -> None:
    write(out)
    (out / "manifest.json").write_text("{")


def notes_in_an_artifact(out: Path) -> None:
    write(out)
    (out / "notes.txt").write_text("mine")


def hidden_file_in_an_artifact(out: Path) -> None:
    write(out)
    (out / ".secret").write_text("mine")


def directory_in_an_artifact(out: Path) -> None:
    write(out)
    (out / "experiments").mkdir()
    (out / "experiments" / "mine.txt").write_text("mine")


def directory_in_engines(out: Path) -> None:
    write(out)
    (out / "engines" / "logs").mkdir()


def link_in_an_artifact(out: Path) -> None:
    write(out)
    (out / "mine.txt").symlink_to("../thesis.txt")


def link_to_users_directory(out: Path) -> None:
    users_directory(out.with_name("elsewhere"))
    out.symlink_to("elsewhere")


IN_THE_WAY = r"never overwritten|found a file"
USERS_DATA = [
    users_file,
    users_directory,
    foreign_manifest,
    damaged_manifest,
    notes_in_an_artifact,
    hidden_file_in_an_artifact,
    directory_in_an_artifact,
    directory_in_engines,
    link_in_an_artifact,
    link_to_users_directory,
]


@pytest.mark.parametrize("make", USERS_DATA, ids=lambda make: make.__name__)
@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_is_not_only_an_artifact_is_never_overwritten(
    place: Path, make: Callable[[Path], None], when: str
) -> None:
    out = place / "out"
    if when == "before":
        make(out)
        before = tree(place)
        with pytest.raises(ArtifactError, match=IN_THE_WAY), ArtifactWriter(out, overwrite=True):
            pytest.fail("the export must not even start")
    else:
        if make is link_to_users_directory:
            return  # the name is resolved once; a link made later is met as what it is: something in the way
        with ArtifactWriter(out, overwrite=True) as writer:
            fill(writer.directory)
            make(out)
            before = {name: data for name, data in tree(place).items() if not name.startswith(writer.directory.name)}
            with pytest.raises(ArtifactError, match=IN_THE_WAY):
                writer.commit(manifest())
    assert tree(place) == before


def test_the_current_directory_is_not_replaced(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "out").mkdir()
    monkeypatch.chdir(place / "out")
    with pytest.raises(ArtifactError, match="current directory"), ArtifactWriter("."):
        pass


@pytest.mark.parametrize("inner", ["inner", "engines/inner", "deep/er/inner", "link/inner"])
def test_nothing_is_written_into_an_artifact(place: Path, inner: str) -> None:
    """Where it would be in the way of the next overwriting of that."""
    write(place / "out")
    if inner.startswith("link"):
        (place / "link").symlink_to("out")
    before = tree(place)
    out = place / inner if inner.startswith("link") else place / "out" / inner
    with pytest.raises(ArtifactError, match="is inside the artifact"), ArtifactWriter(out, overwrite=True):
        pytest.fail("the export must not even start")
    assert tree(place) == before


def test_nothing_is_written_into_an_optimized_model(place: Path) -> None:
    (place / "out").mkdir()
    (place / "out" / "weights.data").write_bytes(b"")
    (place / "out" / "model.onnx").write_bytes(b"\x08\x0a\x12\x05txopt")
    with pytest.raises(ArtifactError, match="is inside the optimized model"), ArtifactWriter(place / "out" / "inner"):
        pytest.fail("the export must not even start")


@pytest.mark.parametrize("make", [users_directory, foreign_manifest, damaged_manifest])
def test_any_other_directory_may_be_written_into(place: Path, make: Callable[[Path], None]) -> None:
    make(place / "out")
    write(place / "out" / "inner")
    Artifact.open(place / "out" / "inner")


def test_a_parent_that_is_a_file_is_refused(place: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be written"), ArtifactWriter(place / "thesis.txt" / "out"):
        pass


# Overwriting


def test_overwriting_keeps_the_old_until_the_commit(place: Path) -> None:
    write(place / "out")
    edit(place / "out", put("family", "the old one"))
    with ArtifactWriter(place / "out", overwrite=True) as writer:
        fill(writer.directory)
        assert Artifact.open(place / "out").manifest.family == "the old one"
        writer.commit(manifest())
        assert Artifact.open(place / "out").manifest.family == manifest().family
    assert {path.name for path in place.iterdir()} == {"out", "thesis.txt"}


@pytest.mark.parametrize("damage", ["flipped", "missing", "newer"])
def test_a_damaged_artifact_may_be_overwritten(place: Path, damage: str) -> None:
    write(place / "out")
    if damage == "flipped":
        (place / "out" / "weights.data").write_bytes(b"x")
    elif damage == "missing":
        (place / "out" / "weights.data").unlink()
    else:
        edit(place / "out", put("format", 99))
    write(place / "out", overwrite=True)
    Artifact.open(place / "out")


def test_of_two_writers_the_second_is_refused(place: Path) -> None:
    with ArtifactWriter(place / "out") as first, ArtifactWriter(place / "out") as second:
        for writer in (first, second):
            fill(writer.directory)
        first.commit(manifest())
        with pytest.raises(ArtifactError, match="already"):
            second.commit(manifest())
    Artifact.open(place / "out")
    assert {path.name for path in place.iterdir()} == {"out", "thesis.txt"}


def test_what_appears_in_the_last_moment_costs_nobody_anything(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / "out")
    edit(place / "out", put("family", "the old one"))
    rename = os.rename

    def disturbed(source: Path, target: Path) -> None:
        rename(source, target)
        monkeypatch.setattr(os, "rename", rename)
        users_directory(place / "out")

    with ArtifactWriter(place / "out", overwrite=True) as writer:
        fill(writer.directory)
        monkeypatch.setattr(os, "rename", disturbed)
        with pytest.raises(ArtifactError, match="something appeared there meanwhile") as error:
            writer.commit(manifest())
    with pytest.raises(ArtifactError, match="never overwritten"), ArtifactWriter(place / "out", overwrite=True):
        pass
    assert (place / "out" / "mine.txt").read_text() == "mine"
    (old,) = place.glob(".out.txopt-*")
    assert str(old) in str(error.value)
    assert Artifact.open(old).manifest.family == "the old one"
