"""The sdist and the wheel hold the whole package as real files, though src/txopt reaches most of it through links."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINKED = ("calibration", "exporter", "runtime")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel made from it; built from a copy, so that nothing is left in the tree."""
    source, out = tmp_path_factory.mktemp("source") / "txopt", tmp_path_factory.mktemp("built")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    leftovers = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in ("src", *LINKED):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leftovers)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def expected() -> set[str]:
    """Every file of the package, as a wheel names it."""
    package = ROOT / "src/txopt"
    page = {f"txopt/page/{file.name}" for file in (package / "page").iterdir() if file.is_file()}
    own = {f"txopt/{file.name}" for file in package.iterdir() if file.is_file()} | page
    linked = (file.relative_to(ROOT) for folder in LINKED for file in (ROOT / folder).rglob("*.py"))
    shared = {file.relative_to(ROOT / "src").as_posix() for file in (ROOT / "src/optimum").rglob("*.py")}
    return own | shared | {f"txopt/{file.as_posix()}" for file in linked}


def test_the_wheel_holds_every_module(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert held == expected()
        assert "txopt/py.typed" in held
        assert wheel.read("txopt/runtime/errors.py") == (ROOT / "runtime/errors.py").read_bytes()


def test_the_sdist_holds_files_and_no_links(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        members = sdist.getmembers()
        assert all(member.isfile() or member.isdir() for member in members)
        names = {member.name.partition("/")[2] for member in members}
        assert {f"src/{name}" for name in expected()} <= names


def test_an_editable_install_sees_every_folder() -> None:
    import txopt.runtime.backends

    assert Path(txopt.runtime.backends.__file__).resolve() == ROOT / "runtime/backends/__init__.py"
