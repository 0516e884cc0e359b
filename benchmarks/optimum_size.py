"""How large an artifact is beside Optimum's folder it comes from: ``python -m txopt.benchmarks.optimum_size [--out FILE.json]``.

The folders that the tests keep (T5, BART, Marian, Whisper; optimum-onnx made them), by which of Optimum's decoders were kept. All
files of either count, an artifact's reference cases too. These models are small: most of the bytes are graphs, not weights.
"""

import argparse
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from txopt.benchmarks.fusion import FOLDERS

KEPT = {
    "all four files": (),
    "without the merged decoder": ("decoder_model_merged.onnx",),
    "the merged decoder alone": ("decoder_model.onnx", "decoder_with_past_model.onnx"),
}


def measure(archive: Path, work: Path) -> dict[str, Any]:
    """Bytes of the folder and of the artifact, by what was kept of the folder."""
    from txopt.exporter.pipeline import export

    results = {}
    for index, (kept, left_out) in enumerate(KEPT.items()):
        place = work / f"{archive.name}.{index}"
        with tarfile.open(archive) as packed:
            packed.extractall(place, filter="data")
        folder = next(path.parent for path in place.rglob("config.json"))
        for name in left_out:
            (folder / name).unlink()
        artifact = export(folder, work / "out")
        sizes = {"folder": _bytes(folder), "artifact": _bytes(artifact.path)}
        results[kept] = {**sizes, "ratio": round(sizes["artifact"] / sizes["folder"], 3)}
        shutil.rmtree(artifact.path)
    return results


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--optimum", type=Path, default=FOLDERS, help="where NAME.tar.xz of such folders lie")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        results = {
            archive.name.partition(".")[0]: measure(archive, Path(work))
            for archive in sorted(arguments.optimum.glob("*.tar.xz"))
        }
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n", "utf-8")
    sys.stdout.write("| folder | " + " | ".join(KEPT) + " |\n|" + "---|" * (len(KEPT) + 1) + "\n")
    for name, found in results.items():
        sys.stdout.write(f"| {name} | " + " | ".join(f"{found[kept]['ratio']:.2f}" for kept in KEPT) + " |\n")


if __name__ == "__main__":
    main()
