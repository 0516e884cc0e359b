"""What the pipeline asks of a model, wherever it comes from: facts, two traceable calls, and PyTorch's own answers.

``huggingface.py`` and ``custom_source.py`` implement it. Axes: B sources, R rows, Q query tokens, S self-cache length,
T source length (U, W those of further memories), N raw samples, H heads, D head size, M memory width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from txopt.exporter.framing import Framing
from txopt.runtime.cases import Lengths
from txopt.runtime.graphs import MASKS, SOURCE_AXES

Kind = str  # "encoder-decoder", "encoder" or "decoder": the artifact's graphs
KV = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input of the encoder (or of an encoder-only model): its name, dtype and axes; integers are fixed sizes.

    Ids are below ``vocabulary``, and ``limit`` is how long its second axis may be; None: as ``Facts`` says for all inputs.
    """

    name: str
    dtype: str
    axes: tuple[str | int, ...]
    vocabulary: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """One result of the encoder that the decoder attends to.

    ``axis`` is that of its length, None where the model fixes it; ``mask`` the input that says where it has tokens, None where it is
    never padded.
    """

    axis: str | int | None
    mask: str | None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the manifest says of a model; ``limit`` is the longest target, None where the model has no bound.

    ``source_limit`` is the longest source a table of positions can hold. ``framing`` says what becomes of raw samples, where those
    are the input. ``memories`` are what an encoder-decoder's encoder returns, and ``crossed`` which of them each cross-attention of
    the decoder reads, all the first where it is empty. ``outputs`` names what an encoder-only model returns.
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
    memories: tuple[Memory, ...] = ()
    crossed: tuple[int, ...] = ()
    outputs: tuple[str, ...] = ()
    labels: Mapping[str, str] | None = None
    scores: str | None = None  # what makes a classifier's logits scores: "softmax", "sigmoid" or "none" (regression)

    @property
    def source_bounds(self) -> dict[str, Any]:
        """What must hold of sources whoever makes them, as the manifest's front end says it; empty where nothing is known."""
        if self.framing is not None:
            longest = None if self.source_limit is None else self.framing.samples(self.source_limit + 1) - 1
            return {"least_samples": self.framing.samples(1), "most_samples": longest}
        if self.kind == "decoder":
            return {}
        found: dict[str, Any] = {}
        if any(item.name == "input_ids" for item in self.inputs):
            found = {"source_vocabulary": self.source_vocabulary, "source_positions": self.source_limit}
        others = [item for item in self.inputs if item.name != "input_ids" and (item.vocabulary or item.limit)]
        bounds = {item.name: {"vocabulary": item.vocabulary, "positions": item.limit} for item in others}
        return found | ({"bounds": bounds} if bounds else {})

    @property
    def masks(self) -> dict[str, str | int]:
        """The inputs that are masks, each once, and the axis that each is about."""
        named = {"attention_mask"} | {memory.mask for memory in self.memories}
        return {item.name: item.axes[1] for item in self.inputs if item.name in named}

    def lengths(self, inputs: Mapping[str, Any]) -> Lengths:
        """How long the sources of a case are, in places of its memories: of ``inputs`` by name, or of the frames they become."""
        if self.framing is None:
            return Lengths(inputs, self.masks)
        heard = {f"{MASKS}{name}": self.framing.frames(inputs[name].sum(1)) for name in self.masks}
        masks = {name: np.arange(counts.max()) < counts[:, None] for name, counts in heard.items()}
        return Lengths({**inputs, **masks}, dict.fromkeys(masks, "T"))

    def cross_memory(self, cross: int) -> Memory:
        """The memory that the decoder's cross-attention number ``cross`` reads."""
        return self.memories[self.crossed[cross] if self.crossed else 0]

    def limit_of(self, axis: str) -> int | None:
        """How long the inputs' ``axis`` may be; None where nothing bounds it."""
        limits = [item.limit for item in self.inputs if axis in item.axes and item.limit is not None]
        return min(limits, default=self.source_limit if axis == SOURCE_AXES[0] else None)


@dataclass
class Forward:
    """PyTorch's answer to one teacher-forced pass: memories [B,T,M], logits [B,L,V], K/V per attention [B,H,L or T,D]."""

    memories: Sequence[Tensor]
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
        """Traceable. Inputs in the order of ``facts.inputs``; encoder-decoders give their memories and then k, v of every
        cross-attention, and where they make frames of samples the mask of these, int64 [B,T], at last; encoder-only models their
        named outputs."""

    def decode(
        self,
        tokens: Tensor,
        position: Tensor,
        source_masks: Sequence[Tensor | None],
        self_kv: Sequence[KV],
        cross_kv: Sequence[KV],
    ) -> tuple[Tensor, list[KV]]:
        """Traceable. Logits [R,Q,V] and the written buffers; ``source_masks`` by memory, see ``cache.DecodeState``."""

    def forward(self, inputs: Mapping[str, Tensor], tokens: Tensor, mask: Tensor | None = None) -> Forward:
        """PyTorch's own teacher-forced pass, without txopt's operators; ``mask`` [B,L] marks left padding of a decoder-only prompt."""

    def outputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PyTorch's own outputs of an encoder-only model."""

    def generate(self, inputs: Mapping[str, Tensor], **options: Any) -> Generated | None:
        """PyTorch's own generate(); None where the model has none for these options."""
