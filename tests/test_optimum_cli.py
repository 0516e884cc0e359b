"""``optimum-cli export txopt``: found by Optimum's own look-up, and txopt's behaviour behind it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def optimum_cli(*words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def test_optimum_lists_the_command(tmp_path: Path) -> None:
    done = optimum_cli("export", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verified artifact of txopt" in done.stdout


@pytest.mark.slow
def test_it_exports_and_its_exit_codes_are_txopts(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(ROOT / "tests/data/optimum/bart.tar.xz") as archive:
        archive.extractall(tmp_path / "bart", filter="data")
    done = optimum_cli("export", "txopt", "--model", "bart", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "verified against the original files" in done.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()
    again = optimum_cli("export", "txopt", "--model", "bart", "out", cwd=tmp_path)
    assert again.returncode == 2
    assert "an artifact is there already" in again.stderr
    assert optimum_cli("export", "txopt", "--model", "bart", "--overwrite", "out", cwd=tmp_path).returncode == 0
