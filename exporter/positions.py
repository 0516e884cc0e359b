"""The decoder's table of positions in a checkpoint: read row by row in the trace, and made where transformers leaves it unmade."""

from typing import Any

from torch import Tensor, nn

from txopt.exporter.cache import current
from txopt.exporter.families.family import Positions
from txopt.runtime.errors import SourceError


class RowPositions(nn.Module):
    """A table of positions that every row reads at its own place, whatever the model passes."""

    def __init__(self, weight: Tensor, offset: int) -> None:
        super().__init__()
        self.weight, self.offset = weight, offset

    def forward(self, *_: Any, **__: Any) -> Tensor:
        state = current()
        if state is None:  # the encoder graph's one dummy token
            return self.weight[self.offset : self.offset + 1]
        return self.weight[state.positions + self.offset]


def read_by_row(traced: nn.Module, known: tuple[Positions, ...]) -> None:
    """Replaces the table in ``traced`` by one that follows the rows; ``known`` are the shapes that a family's table takes.

    Raises:
        SourceError: the decoder has none of them.
    """
    for positions in known:
        try:
            table: Any = traced.get_submodule(positions.path)
            weight = getattr(table, positions.weight)
        except AttributeError:
            continue
        offset = table.padding_idx + 1 if positions.after_padding else positions.offset
        traced.set_submodule(positions.path, RowPositions(weight, offset))
        return
    if known:
        expected = " or ".join(f"{positions.path}.{positions.weight}" for positions in known)
        raise SourceError(
            f"the decoder's table of positions: expected it at {expected}, found nothing there; "
            "a decoder of another kind goes through the custom door (docs/custom-models.md)"
        )


def make_tables(module: nn.Module, dtype: Any) -> None:
    """Computes sinusoidal tables that are neither parameters nor buffers, and registers them, so that a cast reaches them.

    transformers builds a model without memory and fills in parameters and buffers; TrOCR's table is neither, and stays empty.
    """
    part: Any
    for part in module.modules():
        table = part.__dict__.get("weights")
        if isinstance(table, Tensor) and hasattr(part, "get_embedding"):
            made: Tensor = part.get_embedding(table.shape[0], part.embedding_dim, part.padding_idx)
            del part.weights
            part.register_buffer("weights", made.to(dtype), persistent=False)


def computed_tables(module: nn.Module) -> set[str]:
    """The names of sinusoidal tables that are parameters: transformers computes those that a checkpoint leaves out."""
    parts = {name for name, part in module.named_modules() if hasattr(part, "get_embedding")}
    return {name for name, _ in module.named_parameters() if name.rpartition(".")[0] in parts}
