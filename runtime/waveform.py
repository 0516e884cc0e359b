"""Sound in as it is: files to samples at the model's rate, padded to one length, for models that make their own features.

Reading is audio.py's. What differs between models is data in the manifest's "frontend".
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from txopt.runtime.audio import AudioSource, Samples, Window, heard
from txopt.runtime.errors import InputError, explain

_LEAST_VARIANCE = 1e-7  # transformers' zero_mean_unit_var_norm; keeps silence finite


class WaveformFrontend:
    """Sound to samples.

    Keys of "frontend": sampling_rate, padding_value, do_normalize (each sound to mean 0 and variance 1), least_samples, most_samples.
    """

    def __init__(self, frontend: Mapping[str, Any]) -> None:
        self.sampling_rate = int(frontend["sampling_rate"])
        self._padding = float(frontend.get("padding_value", 0.0))
        self._normalizes = bool(frontend.get("do_normalize", False))
        self._least = frontend.get("least_samples") or 1
        self._most = frontend.get("most_samples")

    def encode(self, audio: Sequence[AudioSource], *, window: Window | None = None) -> dict[str, Any]:
        """Feeds for the encoder.

        Args:
            audio: B paths, open binary files, or arrays [N] of samples in [-1, 1] at ``sampling_rate`` Hz.
            window: (start, end) in seconds: which part of each to hear; None: all.

        Returns:
            input_values float32 [B,N], padded on the right, and attention_mask int64 [B,N].

        Raises:
            InputError: as ``audio.heard``; also a sound too short to make a frame of, or longer than the model hears at once.
            MissingDependencyError: a file is to be read and soundfile is not installed.
        """
        if len(audio) == 0:
            raise InputError("expected at least one sound, found none")
        longest = None if self._most is None else self._most / self.sampling_rate
        names = [f"sound {index}" for index in range(len(audio))]
        rows = [
            heard(item, name, self.sampling_rate, window=window, longest=longest)[: self._most]  # resampling rounds up
            for name, item in zip(names, audio, strict=True)
        ]
        short = [
            f"{name}: {len(row)} samples at {self.sampling_rate} Hz"
            for name, row in zip(names, rows, strict=True)
            if len(row) < self._least
        ]
        if short:
            raise InputError(explain(f"expected sounds of at least {self._least} samples, found shorter ones:", short))
        lengths = np.array([len(row) for row in rows])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        values = np.full(mask.shape, self._padding, np.float32)
        for row, samples in zip(values, rows, strict=True):
            row[: len(samples)] = self._normalized(samples)
        return {"input_values": values, "attention_mask": mask}

    def _normalized(self, samples: Samples) -> Samples:
        if not self._normalizes:
            return samples
        centred: Samples = (samples - samples.mean()) / np.sqrt(samples.var() + np.float32(_LEAST_VARIANCE))
        return centred
