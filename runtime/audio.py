"""Sound in: files to mono samples at the model's rate, samples to log-mel features, and a speech model's first ids.

Reading goes through ``soundfile`` (WAV, FLAC, OGG, MP3: whatever its libsndfile reads), imported when a file is read.
What differs between models (mel bands, window, language and task ids) is data in the manifest's "frontend".
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from txopt.runtime.errors import InputError, MissingDependencyError
from txopt.runtime.frontend import RATES
from txopt.runtime.mel import log_mel
from txopt.runtime.resample import resample

Samples = NDArray[np.float32]
AudioSource = str | Path | BinaryIO | NDArray[Any]
Window = tuple[float, float]


def read_audio(
    source: str | Path | BinaryIO, sampling_rate: int, *, window: Window | None = None, longest: float | None = None
) -> Samples:
    """A sound file as mono float32 [N] in [-1, 1] at ``sampling_rate`` Hz; channels are averaged.

    Args:
        source: a path, or an open binary file that can seek.
        window: (start, end) in seconds; None: all of it.
        longest: seconds that may be read at most; None: no bound.

    Raises:
        InputError: not a file, not sound, no samples, samples that are not numbers, a window outside the file, or more
            than ``longest`` seconds.
        MissingDependencyError: soundfile is not installed.
    """
    name = _name(source)
    with _opened(source) as file:
        rate = int(file.samplerate)
        start, stop = _bounds(name, window, longest, file.frames / rate)
        if start:
            file.seek(round(start * rate))
        samples = file.read(round((stop - start) * rate), dtype="float32", always_2d=True)
    if samples.size == 0:
        raise InputError(f"{name}: expected sound, found a sound file without samples")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)
    return resample(_finite(name, mono), rate, sampling_rate)


def duration(source: str | Path | BinaryIO) -> float:
    """Seconds of a sound file, as its header says; no sample is read. Errors as ``read_audio``."""
    with _opened(source) as file:
        return int(file.frames) / int(file.samplerate)


@contextmanager
def _opened(source: str | Path | BinaryIO) -> Iterator[Any]:
    """A sound file with a rate that can be worked with; what it raises while it is read is told as InputError too."""
    soundfile = _soundfile()
    name = _name(source)
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise InputError(
            f"{name}: expected a sound file, found {'a folder' if Path(source).is_dir() else 'no such file'}"
        )
    try:
        with soundfile.SoundFile(source) as file:
            rate = int(file.samplerate)
            if not RATES[0] <= rate <= RATES[1]:
                raise InputError(f"{name}: expected {RATES[0]} to {RATES[1]} samples a second, found {rate}")
            yield file
    except soundfile.SoundFileError as err:
        raise InputError(f"{name}: expected sound (WAV, FLAC, OGG, MP3), found something else: {err}") from err


def heard(
    source: AudioSource, name: str, sampling_rate: int, *, window: Window | None = None, longest: float | None = None
) -> Samples:
    """Samples of a file, or of an array [N] that has this rate already; arguments and errors as ``read_audio``.

    Raises:
        InputError: also an array that is not one channel of samples, and what is no sound.
    """
    if isinstance(source, np.ndarray):
        return _part(source, name, sampling_rate, window, longest)
    if isinstance(source, (str, Path)) or hasattr(source, "read"):
        return read_audio(source, sampling_rate, window=window, longest=longest)
    raise InputError(
        f"{name}: expected a path, an open binary file or a float array of samples, found {type(source).__name__}; "
        "make plain numbers an array, and put the array into a list: [np.array(samples, np.float32)]"
    )


def _part(
    samples: NDArray[Any], name: str, sampling_rate: int, window: Window | None, longest: float | None
) -> Samples:
    if samples.ndim != 1 or samples.dtype.kind != "f" or samples.size == 0:
        raise InputError(
            f"{name}: expected samples of one channel, floats in [-1, 1] of shape [N] at {sampling_rate} Hz; "
            f"found {samples.dtype} {list(samples.shape)}; average channels, divide integers by their largest value"
        )
    start, stop = _bounds(name, window, longest, samples.size / sampling_rate)
    return _finite(name, samples[round(start * sampling_rate) : round(stop * sampling_rate)].astype(np.float32))


class AudioFrontend:
    """Sound to features.

    Keys of "frontend": feature_size, sampling_rate, n_fft, hop_length, chunk_length (seconds), padding_value.
    ``dither`` is not applied: it is noise, and the same sound must give the same text.
    """

    def __init__(self, frontend: Mapping[str, Any]) -> None:
        self.sampling_rate = int(frontend["sampling_rate"])
        self.seconds = float(frontend["chunk_length"])
        self._length = int(frontend["chunk_length"] * self.sampling_rate)
        self._mels = int(frontend["feature_size"])
        self._n_fft = int(frontend["n_fft"])
        self._hop = int(frontend["hop_length"])
        self._padding = float(frontend.get("padding_value", 0.0))

    def encode(self, audio: Sequence[AudioSource], *, window: Window | None = None) -> dict[str, NDArray[np.float32]]:
        """Feeds for the encoder.

        Args:
            audio: B paths, open binary files, or arrays [N] of samples in [-1, 1] at ``sampling_rate`` Hz.
            window: (start, end) in seconds: which part of each to hear; None: all.

        Returns:
            input_features, float32 [B, feature_size, frames of one window].

        Raises:
            InputError: as ``read_audio``; also an array that is not one channel of samples, and what is no sound.
            MissingDependencyError: a file is to be read and soundfile is not installed.
        """
        if len(audio) == 0:
            raise InputError("expected at least one sound, found none")
        rows = [
            heard(item, f"sound {index}", self.sampling_rate, window=window, longest=self.seconds)
            for index, item in enumerate(audio)
        ]
        return {"input_features": np.stack([self._features(row) for row in rows])}

    def features(self, samples: NDArray[Any]) -> NDArray[np.float32]:
        """float32 [1, feature_size, frames] of ``samples`` [N] at ``sampling_rate`` Hz; errors as ``encode``."""
        return self._features(heard(samples, "samples", self.sampling_rate, longest=self.seconds))[None]

    def _features(self, samples: Samples) -> NDArray[np.float32]:
        return log_mel(
            samples[: self._length],  # resampling rounds the number of samples up
            length=self._length,
            mels=self._mels,
            n_fft=self._n_fft,
            hop_length=self._hop,
            sampling_rate=self.sampling_rate,
            padding_value=self._padding,
        )


def decoder_prompt(
    frontend: Mapping[str, Any],
    generation: Mapping[str, Any],
    *,
    language: str | None = None,
    task: str | None = None,
    timestamps: bool = False,
) -> list[int]:
    """The ids a speech model's decoder starts from: start, language, task, and the wish for no timestamps.

    Args:
        frontend: the manifest's; multilingual, lang_to_id, language_names, task_to_id, no_timestamps_token_id are read.
        generation: the manifest's; decoder_start_token_id, and the defaults ``language`` and ``task``.
        language: a code ("de"), a token ("<|de|>") or an English name ("german"); needed where the model knows several.
        task: "transcribe" (the default) or "translate" (into English).

    Raises:
        InputError: a language or task that the model does not know, or no language where one is needed.
    """
    start = generation.get("decoder_start_token_id")
    if type(start) is not int:
        raise InputError(
            f"generation.decoder_start_token_id: expected the id that this model starts from, found {start!r}; "
            "export the artifact again"
        )
    for name, word in (("language", language or generation.get("language")), ("task", task or generation.get("task"))):
        if not isinstance(word, str | None):
            raise InputError(f"{name}={word!r}: expected text")
    prompt = [start]
    if frontend.get("multilingual"):
        prompt.append(_language_id(frontend, language or generation.get("language")))
        tasks: Mapping[str, int] = frontend.get("task_to_id") or {}
        chosen = task or generation.get("task") or "transcribe"
        if chosen in tasks:
            prompt.append(int(tasks[chosen]))
        elif tasks or task is not None:
            raise InputError(
                f"task={chosen!r}: expected {' or '.join(sorted(tasks)) or 'none, the model has one task'}"
            )
    elif language not in (None, "en", "english", "<|en|>") or task not in (None, "transcribe"):
        raise InputError(
            f"language={language!r}, task={task!r}: this model transcribes English and nothing else; leave both "
            "out, or export a multilingual model"
        )
    silent = frontend.get("no_timestamps_token_id")
    if silent is not None and not timestamps:
        prompt.append(int(silent))
    return prompt


def _language_id(frontend: Mapping[str, Any], language: str | None) -> int:
    ids: Mapping[str, int] = frontend["lang_to_id"]
    codes = sorted(token.strip("<|>") for token in ids)
    if language is None:
        raise InputError(f"expected a language, found none; say which is spoken: {', '.join(codes)}")
    word = language.strip().lower()
    code = (frontend.get("language_names") or {}).get(word, word.removeprefix("<|").removesuffix("|>"))
    if f"<|{code}|>" not in ids:
        raise InputError(f"language={language!r}: expected one of {', '.join(codes)}")
    return int(ids[f"<|{code}|>"])


def _bounds(name: str, window: Window | None, longest: float | None, length: float) -> Window:
    """Seconds to read, checked against what there is."""
    start, stop = window or (0.0, length)
    if window is not None and not 0.0 <= start < min(stop, length):
        raise InputError(f"{name}: window {window}: expected 0 <= start < end seconds, start below {length:.2f}")
    stop = min(stop, length)
    if longest is not None and stop - start > longest:
        raise InputError(
            f"{name}: {stop - start:.2f} s of sound, the model hears {longest:g} s at once, and longer sound is not "
            "cut up for you yet; choose a part with window=(start, end) in seconds"
        )
    return start, stop


def _finite(name: str, samples: Samples) -> Samples:
    if not np.isfinite(samples).all():
        raise InputError(f"{name}: expected finite samples, found NaN or infinity; the recording is damaged")
    return samples


def _name(source: str | Path | BinaryIO) -> str:
    return str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", "sound"))


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as err:  # OSError: the package without its libsndfile
        raise MissingDependencyError(f'reading sound needs soundfile: pip install "txopt[audio]" ({err})') from err
    return cast(Any, soundfile)
