"""How many frames a stack of convolutions makes of raw samples, and how many samples it takes to make so many frames."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Count = TypeVar("Count", int, Tensor, NDArray[np.int64])


@dataclass(frozen=True)
class Framing:
    """``convolutions``: kernel and stride of each, from the samples up; none of them pads."""

    convolutions: tuple[tuple[int, int], ...]

    def frames(self, samples: Count) -> Count:
        """The frames T of N samples: PyTorch's formula for nn.Conv1d, layer by layer."""
        for kernel, stride in self.convolutions:
            samples = (samples - kernel) // stride + 1
        return samples

    def samples(self, frames: int) -> int:
        """The fewest samples N that make so many frames."""
        for kernel, stride in reversed(self.convolutions):
            frames = (frames - 1) * stride + kernel
        return frames
