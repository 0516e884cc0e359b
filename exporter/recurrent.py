"""Recurrent layers of a module: nn.RNN, nn.GRU, nn.LSTM and their cells.

A decoder here remembers earlier tokens by attention alone, and torch writes a recurrent layer out step by step, for the length of the
example. Knows which layers there are and which a call runs; neither caches nor graphs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from txopt.runtime.errors import SourceError

_KINDS = (nn.RNNBase, nn.RNNCellBase)


@contextmanager
def none_in_decode(module: nn.Module) -> Iterator[None]:
    """Watches a call of decode().

    Raises:
        SourceError: it ran recurrent layers; an error of its own comes first.
    """
    run: dict[str, None] = {}
    handles = [
        part.register_forward_pre_hook(partial(_note, run, _called(name, part)))
        for name, part in module.named_modules()
        if isinstance(part, _KINDS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if run:
        raise SourceError(
            f"decode() runs recurrent layers: {', '.join(run)}; expected a Transformer decoder, which remembers earlier tokens by "
            "attention alone: no cache here keeps a recurrent state from one token to the next. Put self-attention in their place and "
            "train again (docs/custom-models.md)"
        )


def found_in(module: nn.Module) -> Sequence[str]:
    """``gru (GRU)``, for each recurrent layer of ``module``."""
    return [_called(name, part) for name, part in module.named_modules() if isinstance(part, _KINDS)]


def _note(run: dict[str, None], called: str, part: nn.Module, given: Any) -> None:
    run.setdefault(called)


def _called(name: str, part: nn.Module) -> str:
    while name.startswith("module."):  # those that txopt puts around a stranger's
        name = name.removeprefix("module.")
    return f"{name} ({type(part).__name__})"
