"""What a family of models is to txopt: data, and at most one named hook."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from txopt.exporter.source import Input

Hook = Callable[[nn.Module], nn.Module]

TEXT = (
    Input(name="input_ids", dtype="int64", axes=("B", "T")),
    Input(name="attention_mask", dtype="int64", axes=("B", "T")),
)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """A decoder's table of positions: the module's path, the name of its weight, and what it adds to a position to look it up.

    ``after_padding``: positions begin after the table's ``padding_idx`` instead.
    """

    path: str
    weight: str = "weight"
    offset: int = 0
    after_padding: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family, in one place.

    Args:
        model_types: the ``model_type`` values of transformers' configurations.
        kind: "encoder-decoder", "encoder" or "decoder".
        task: what the artifact does, unless the architecture says otherwise (``tasks``).
        inputs: the encoder's inputs; sizes named like configuration values ("num_mel_bins") are read from there.
        convolutions: where inputs are raw samples [B,N], the configuration's lists of the kernels and strides that make frames.
        decoders: the ``model_type`` values of ``config.decoder`` that the family knows; empty where there is one decoder.
        positions: the decoder's table of positions, where the model itself takes one position for all rows; the first that is
            there counts.
        limit: the configuration value that bounds the target, None where nothing does.
        source_limit: the configuration value that bounds a text source.
        position_argument: the name under which the model takes positions [R,Q], where it does.
        padding_mask: the encoder's attention_mask stays [B,T], and the decoder gets none: their attention is not transformers'
            interface, and what a hook makes of it finds the mask in the decoder call.
        stepwise: what transformers' decoder says of several tokens is not what it generates by, one token at a time; so that is
            how its references are recorded.
        hook: prepares a copy of the module for the trace; needs a paragraph in docs/decisions.md.
    """

    name: str
    model_types: tuple[str, ...]
    kind: str = "encoder-decoder"
    task: str = "text-to-text"
    inputs: tuple[Input, ...] = TEXT
    convolutions: tuple[str, str] | None = None
    decoders: tuple[str, ...] = ()
    positions: tuple[Positions, ...] = ()
    limit: str | None = None
    source_limit: str | None = None
    position_argument: str | None = None
    padding_mask: bool = False
    stepwise: bool = False
    hook: Hook | None = None
