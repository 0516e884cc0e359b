"""The one exception tree of txopt. Every error a user can cause says what was expected, what was found, what to do.

TxoptError                    exit code 1: a defect of txopt
├── UsageError                exit code 2: wrong option, argument or input
│   ├── InputError            tensors, text, audio or images that do not fit the model
│   │   └── LimitError        more than compiled engines were built for; the model itself takes it
│   ├── DeviceMemoryError     a GPU has no memory left for what was asked
│   ├── SourceError           a checkpoint or module that txopt cannot read or does not support
│   └── ArtifactError         an artifact that is damaged, unsafe, too new, or not one at all
│       └── StaleError        a sound result of an earlier run, made from something else than what is asked for now
├── ParityError               exit code 3: the artifact does not say what PyTorch said
├── LossError                 exit code 3: quantization lost more of the task's metric than allowed
└── MissingDependencyError    exit code 4: an optional engine or package is not installed
"""

from collections.abc import Iterable


class TxoptError(Exception):
    """Base of all errors raised on purpose; raised itself only for defects of txopt."""

    exit_code = 1


class UsageError(TxoptError):
    """Wrong usage: an option or a combination of options that cannot work."""

    exit_code = 2


class InputError(UsageError):
    """Input data (tensors, text, audio, images) that does not fit the model."""


class LimitError(InputError):
    """Lengths or batches beyond what an artifact's engines were built for; other engines of the same model take them."""


class DeviceMemoryError(UsageError, MemoryError):
    """A GPU, or the host beside it, has no memory left for what was asked."""


class SourceError(UsageError):
    """A checkpoint or module that cannot be read or is not supported."""


class ArtifactError(UsageError):
    """An artifact that is damaged, unsafe, written by a newer txopt, or not an artifact."""


class StaleError(ArtifactError):
    """A stored result made from another graph, other data or other settings; making it anew mends it."""


class ParityError(TxoptError):
    """The exported graphs disagree with PyTorch beyond the tolerance; nothing is left behind."""

    exit_code = 3


class LossError(TxoptError):
    """Quantization lost more of the task's metric than allowed, or the loss is not a number; nothing is left behind."""

    exit_code = 3


class MissingDependencyError(TxoptError):
    """An optional engine or package is missing; the message says what to install."""

    exit_code = 4


def explain(title: str, problems: Iterable[str]) -> str:
    """One message out of many problems, so that a user mends all of them at once."""
    return "\n".join([title, *(f"  - {problem}" for problem in problems)])
