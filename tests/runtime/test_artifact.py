"""Attacks on a directory that claims to be an artifact: each is refused before any file but the manifest is parsed."""

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.runtime.artifacts import FILES, edit, manifest, put, write
from txopt.runtime.artifact import Artifact
from txopt.runtime.errors import ArtifactError
from txopt.runtime.files import sha256
from txopt.runtime.manifest import LARGEST

ENTRY = {"size": 1, "sha256": "0" * 64}


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("intact") / "out"
    write(out)
    return out


@pytest.fixture
def out(tmp_path: Path, intact: Path) -> Path:
    """A copy to attack."""
    return Path(shutil.copytree(intact, tmp_path / "out"))


def refused(out: Path, message: str) -> str:
    with pytest.raises(ArtifactError, match=message) as error:
        Artifact.open(out)
    assert str(error.value).startswith(str(out))
    return str(error.value)


def test_an_intact_artifact_opens(out: Path) -> None:
    artifact = Artifact.open(str(out))
    assert artifact.manifest.files.keys() == FILES.keys()
    assert artifact.manifest.parity == manifest().parity
    assert all(artifact.file(name).read_bytes() == content for name, content in FILES.items())


def test_it_may_be_moved_and_reached_through_a_link(out: Path, tmp_path: Path) -> None:
    out.rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved", target_is_directory=True)
    Artifact.open(tmp_path / "link")


@pytest.mark.parametrize("name", ["manifest.json", "../out/encoder.onnx", "nothing.onnx", "/etc/passwd"])
def test_only_listed_files_are_given_out(out: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="listed files"):
        Artifact.open(out).file(name)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found(out: Path, name: str, where: str) -> None:
    content = bytearray(FILES[name])
    content[0 if where == "first" else -1] ^= 1
    (out / name).write_bytes(content)
    refused(out, f"'{name}': expected SHA-256 [0-9a-f]{{16}}[.]{{3}}, found")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 1])
def test_the_hash_is_sha_256_of_the_whole_file(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == (size, hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(out: Path, name: str) -> None:
    (out / name).write_bytes(FILES[name][:-1])
    refused(out, f"'{name}': expected {len(FILES[name])} bytes, found {len(FILES[name]) - 1}")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found(out: Path, name: str) -> None:
    (out / name).unlink()
    refused(out, f"'{name}': listed in the manifest, but no such file is there")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("notes.txt", "'notes.txt': not listed"),
        ("engines/other.plan", "'engines/other.plan': not listed"),
        (".hidden", "expected a plain file name"),
        ("model.pt", "pickles"),
        ("pytorch_model.bin", "pickles"),
        ("data.pkl", "pickles"),
        ("engines/cache.PKL", "pickles"),
        ("library.so", "expected a suffix"),
        ("script.py", "expected a suffix"),
        ("a\nb.txt", "expected a plain file name"),
        ("back\\slash.txt", "expected a plain file name"),
    ],
)
def test_an_unlisted_file_is_refused(out: Path, name: str, message: str) -> None:
    (out / name).write_bytes(b"x")
    refused(out, message)


@pytest.mark.parametrize(
    "name", ["model.pt", "model.bin", "model.pkl", "model.npy", "library.so", "MODEL.ONNX", "LICENSE"]
)
def test_listing_a_forbidden_file_does_not_help(out: Path, name: str) -> None:
    (out / name).write_bytes(b"x")
    size, digest = sha256(out / name)
    edit(out, put(f"files/{name}", {"size": size, "sha256": digest}))
    refused(out, "suffix|pickles")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "engines/../../secret.txt",
        "engines/deeper/x.plan",
        "sub/x.txt",
        "/secret.txt",
        "C:secret.txt",
        "C:/secret.txt",
        "..\\secret.txt",
        "engines\\x.plan",
        "./encoder.onnx",
        "engines//x.plan",
        "~/secret.txt",
        "secret.txt\0.json",
        "secret.txt\n",
        "sécret.txt",
        "",
        ".",
        "..",
        "x" * 300 + ".txt",
    ],
)
def test_a_name_that_could_leave_the_directory_is_refused_unread(
    out: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    document = json.loads((out / "manifest.json").read_text())
    document["files"][name] = ENTRY
    (out / "manifest.json").write_text(json.dumps(document))
    opened: list[str] = []
    real = os.open

    def noted(path: str, flags: int) -> int:
        opened.append(str(path))
        return real(path, flags)

    monkeypatch.setattr(os, "open", noted)
    message = refused(out, "expected a plain file name")
    assert len(opened) >= len(FILES)
    assert all(path.startswith(str(out)) and "secret" not in path for path in opened)
    assert all(line.isprintable() for line in message.splitlines())


def test_the_manifest_cannot_list_itself(out: Path) -> None:
    edit(out, put("files/manifest.json", ENTRY))
    refused(out, "cannot list itself")


def test_names_that_differ_in_case_alone_are_refused(out: Path) -> None:
    edit(out, put("files/Encoder.onnx", ENTRY))
    refused(out, "one name on some file systems")


@pytest.mark.parametrize("target", ["outside", "inside", "nowhere"])
def test_a_symbolic_link_is_refused(out: Path, tmp_path: Path, target: str) -> None:
    shutil.copy(out / "tokenizer.json", tmp_path / "outside")
    shutil.copy(out / "tokenizer.json", out / "inside")
    (out / "tokenizer.json").unlink()
    (out / "tokenizer.json").symlink_to({"outside": "../outside", "inside": "inside", "nowhere": "nowhere"}[target])
    refused(out, "'tokenizer.json': expected a regular file, found a symbolic link")


def test_a_linked_folder_is_refused(out: Path, tmp_path: Path) -> None:
    (out / "engines").rename(tmp_path / "elsewhere")
    (out / "engines").symlink_to("../elsewhere", target_is_directory=True)
    refused(out, "'engines': expected a regular file, found a symbolic link")


def test_a_linked_manifest_is_refused(out: Path, tmp_path: Path) -> None:
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    (out / "manifest.json").symlink_to("../manifest.json")
    refused(out, "'manifest.json': expected a regular file")


@pytest.mark.parametrize("name", ["encoder.onnx", "manifest.json", "engines/sm80.plan", "extra", "engines/extra"])
def test_a_directory_where_none_may_be_is_refused(out: Path, name: str) -> None:
    (out / name).unlink(missing_ok=True)
    (out / name).mkdir()
    refused(out, "expected a file, found a directory|without manifest.json")


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_what_is_no_regular_file_is_refused_without_waiting(
    out: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out / "encoder.onnx").unlink()
    if kind == "pipe":
        os.mkfifo(out / "encoder.onnx")
    else:
        monkeypatch.chdir(out)  # a socket's path may be no longer than about 100 characters
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("encoder.onnx")
    refused(out, "'encoder.onnx': expected a regular file, found a device, pipe or socket")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "expected JSON"),
        (b"{", "expected JSON"),
        (b"[]", "expected format 1 or 2, found None"),
        (b'{"name": "a web app"}', "expected format 1 or 2, found None: not an artifact of txopt"),
        (b"\x80\x04K\x01.", "expected UTF-8"),
        (b"\xef\xbb\xbf{}", "expected JSON"),
        (b"\xff\xfe{\0}\0", "expected UTF-8"),
        (b'{"format": 1} {}', "expected JSON"),
        (b'{"format": 3}', "written by a newer txopt"),
        (b'{"format": 1' + b"0" * 5000 + b"}", "expected JSON|newer"),
        (b"[" * 200_000, "nesting|expected JSON"),
        (b'{"format": 1, "source": ' + b"[" * 100 + b"]" * 100 + b"}", "levels of nesting"),
        (b" " * (LARGEST + 1), "expected at most"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_a_hostile_manifest_is_refused(out: Path, text: bytes, message: str) -> None:
    (out / "manifest.json").write_bytes(text)
    refused(out, message)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_refused(out: Path, number: str) -> None:
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace("1.5e-06", number))
    refused(out, "parity.largest_error: expected a finite number")


@pytest.mark.parametrize("at", ['"kind":', '"largest_error":', '"size":'])
def test_duplicate_keys_are_refused(out: Path, at: str) -> None:
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace(at, f"{at} 0, {at}", 1))
    refused(out, f"duplicate keys in one object: '{at[1:-2]}'")


def test_an_artifact_that_lists_no_files_is_refused(out: Path) -> None:
    edit(out, put("files", {}))
    message = refused(out, "expected every file of the artifact, found none")
    assert all(f"'{name}': not listed" in message for name in FILES)


def test_all_problems_come_in_one_message(out: Path) -> None:
    (out / "encoder.onnx").write_bytes(b"other")
    (out / "decoder.onnx").unlink()
    (out / "extra.txt").write_bytes(b"")
    edit(out, put("target", "abacus"))
    message = refused(out, "not an intact artifact")
    assert all(word in message for word in ("'encoder.onnx'", "'decoder.onnx'", "'extra.txt'", "target: expected"))


def test_a_flood_of_problems_is_cut(out: Path) -> None:
    edit(out, put("files", {f"../{i}": ENTRY for i in range(20_000)}))
    assert len(refused(out, "and .* more")) < 20_000


def test_a_file_that_may_not_be_read_is_named(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: Path) -> tuple[int, str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("txopt.runtime.artifact.sha256", forbid)
    refused(out, "'encoder.onnx': cannot be read: Permission denied")


def test_a_place_without_an_artifact_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "nowhere", "found nothing there")
    refused(tmp_path / "file", "found a file")
    refused(tmp_path / "empty", "found a directory without manifest.json")
