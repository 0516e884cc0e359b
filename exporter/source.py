"""What the pipeline asks of a model, wherever it comes from: facts, two traceable calls, and PyTorch's own answers.

``huggingface.py`` and ``custom_source.py`` implement it. Axes: B sources, R rows, Q query tokens, S self-cache length,
T source length, N raw samples, H heads, D head size, M memory width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from txopt.exporter.framing import Framing

Kind = str  # "encoder-decoder", "encoder" or "decoder": the artifact's graphs
KV = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of the encoder (or of an encoder-only model): its name, dtype and axes; integers are fixed sizes."""

    name: str
    dtype: str
    axes: tuple[str | int, ...]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the manifest says of a model; ``limit`` is the longest target, None where the model has no bound.

    ``source_limit`` is the longest source a table of positions can hold. ``framing`` says what becomes of raw samples, where those
    are the input. ``outputs`` names what an encoder-only model returns.
    """

    kind: Kind
    task: str
    family: str
    inputs: tuple[Input, ...]
    generation: Mapping[str, Any]
    vocabulary: int
    source_vocabulary: int
    limit: int | None = None
    source_limit: int | None = None
    framing: Framing | None = None
    outputs: tuple[str, ...] = ()
    labels: Mapping[str, str] | None = None
    scores: str | None = None  # what makes a classifier's logits scores: "softmax", "sigmoid" or "none" (regression)

    @property
    def source_bounds(self) -> dict[str, int | None]:
        """What must hold of a source's ids or samples whoever makes them, as the manifest's front end says it; else empty."""
        if self.framing is not None:
            longest = None if self.source_limit is None else self.framing.samples(self.source_limit + 1) - 1
            return {"least_samples": self.framing.samples(1), "most_samples": longest}
        if self.kind == "decoder" or not any(item.name == "input_ids" for item in self.inputs):
            return {}
        return {"source_vocabulary": self.source_vocabulary, "source_positions": self.source_limit}

    @property
    def padded(self) -> bool:
        return any(item.name == "attention_mask" for item in self.inputs)


@dataclass
class Forward:
    """PyTorch's answer to one teacher-forced pass: memory [B,T,M], logits [B,L,V], K/V per layer [B,H,L or T,D]."""

    memory: Tensor | None
    logits: Tensor
    self_kv: list[KV]
    cross_kv: list[KV]


@dataclass
class Generated:
    """What PyTorch's search found: ids int64 [B,L], prompt included, and beam search's scores float32 [B]."""

    ids: Tensor
    scores: Tensor | None = None


class Source(Protocol):
    """A model ready to be traced and questioned."""

    module: nn.Module
    traced: nn.Module  # the copy that is exported; shares its weights with ``module``
    facts: Facts

    def encode(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Traceable. Inputs in the order of ``facts.inputs``; encoder-decoders give memory and then k, v of every layer, and
        where they make frames of samples the mask of these, int64 [B,T], at last; encoder-only models their named outputs."""

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_mask: Tensor | None,
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        """Traceable. Logits [R,Q,V] and the written buffers; see ``cache.DecodeState`` for the arguments."""

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        """PyTorch's own teacher-forced pass, without txopt's operators; ``mask`` [B,L] marks left padding of a decoder-only prompt."""

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PyTorch's own outputs of an encoder-only model."""

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        """PyTorch's own generate(); None where the model has none for these options."""
