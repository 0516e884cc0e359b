"""The speech that quantization is measured on: clips made by espeak-ng from sentences.txt, and recorded ones where a folder has them.

espeak-ng is the Debian package of that name (``apt install espeak-ng``), version 1.51 for the committed results. Every sentence is
spoken once, the voices taking turns; every third is for calibration and the others for measuring, so that none is in both. Without
espeak-ng the recorded clips are divided so.
Sentences are written for this: numbers are avoided, which Whisper writes as digits or as words.

Clips are kept as espeak-ng writes them, 22050 Hz mono; the runtime resamples to what the model takes, as in serving.
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from txopt.runtime.audio import duration
from txopt.runtime.errors import InputError, MissingDependencyError, TxoptError

SENTENCES = Path(__file__).with_name("sentences.txt")
REFERENCES = "references.tsv"
LONGEST = 30.0  # seconds: Whisper's window, behind which sound is cut
CALIBRATION = 3  # every third sentence


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A voice of espeak-ng, words a minute and pitch (0 to 99)."""

    name: str
    speed: int
    pitch: int


VOICES = (
    Voice(name="en-us", speed=160, pitch=50),
    Voice(name="en-gb", speed=150, pitch=40),
    Voice(name="en-us+f3", speed=150, pitch=55),
    Voice(name="en-gb-x-rp", speed=165, pitch=45),
    Voice(name="en-us+m3", speed=175, pitch=35),
)


@dataclass(frozen=True, kw_only=True)
class Speech:
    """Two tables for ``calibration.data.read``, file and what is said in it, and what they are made of."""

    test: Path
    calibration: Path
    facts: dict[str, Any]


def sentences(file: Path = SENTENCES) -> list[str]:
    return [line for line in file.read_text("utf-8").splitlines() if line.strip()]


def prepare(folder: Path, recorded: Sequence[Path] = (), *, limit: int | None = None) -> Speech:
    """Writes clips and tables into ``folder``.

    Args:
        folder: an empty one.
        recorded: folders with a references.tsv, measured with the synthesised clips; a clip counts once.
        limit: most sentences; None: all.

    Raises:
        InputError: a folder has no references.tsv, or a clip is longer than a Whisper hears at once.
        MissingDependencyError: no espeak-ng, and nothing recorded either.
    """
    program = shutil.which("espeak-ng")
    if program is None and not recorded:
        raise MissingDependencyError(
            "expected clips to measure: install espeak-ng (apt install espeak-ng), or name a folder with --speech"
        )
    found = _recorded(recorded)
    rows: dict[str, list[tuple[Path, str]]] = {"test": found, "calibration": []}
    if program is None:
        rows = {"test": [row for row in found if row not in found[::CALIBRATION]], "calibration": found[::CALIBRATION]}
    facts: dict[str, Any] = {"recorded_clips": len(rows["test"]), "espeak": None}
    if program is not None:
        for number, sentence in enumerate(sentences()[:limit]):
            clip = folder / f"{number:03}.wav"
            _speak(program, sentence, VOICES[number % len(VOICES)], clip)
            rows["calibration" if number % CALIBRATION == 0 else "test"].append((clip, sentence))
        facts["espeak"] = _version(program)
        facts["voices"] = [vars(voice) for voice in VOICES]
    for name, clips in rows.items():
        seconds = [duration(clip) for clip, _ in clips]
        if long := [str(clip) for (clip, _), length in zip(clips, seconds, strict=True) if length > LONGEST]:
            raise InputError(f"expected clips of at most {LONGEST:g} s, found longer ones: {', '.join(long)}")
        facts[f"{name}_clips"], facts[f"{name}_seconds"] = len(clips), round(sum(seconds), 1)
        (folder / f"{name}.tsv").write_text("".join(f"{clip}\t{said}\n" for clip, said in clips), "utf-8")
    return Speech(test=folder / "test.tsv", calibration=folder / "calibration.tsv", facts=facts)


def _recorded(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    found: dict[str, tuple[Path, str]] = {}
    for folder in folders:
        table = folder / REFERENCES
        if not table.is_file():
            raise InputError(
                f"{folder}: expected a {REFERENCES} there, lines of file, tab and what is said; found none"
            )
        for line in table.read_text("utf-8").splitlines():
            name, _, said = line.partition("\t")
            found.setdefault(name, (folder.resolve() / name, said))
    return list(found.values())


def _speak(program: str, sentence: str, voice: Voice, clip: Path) -> None:
    command = [program, "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "-w", str(clip), sentence]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not clip.is_file():
        raise TxoptError(f"espeak-ng could not say {sentence!r} with voice {voice.name}: {done.stderr.strip()}")


def _version(program: str) -> str:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    return said.partition("Data at:")[0].strip()
