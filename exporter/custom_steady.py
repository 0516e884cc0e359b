"""Whether a module says the same of equal inputs, without which no reference of its answers means anything.

A module left in training mode is put into evaluation mode before it is asked; what still draws random numbers then was told to.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from txopt.exporter.custom import as_memories
from txopt.exporter.difference import difference
from txopt.runtime.errors import SourceError

# Of an answer's largest number: sums in another order are far below, one dropped number is far above.
TOLERANCE = 1e-3


def steady(part: str, ask: Callable[[], Any]) -> Any:
    """The answer of ``part`` of a module, which is asked twice.

    Errors:
        SourceError: it is another one the second time.
    """
    first, second = ask(), ask()
    for one, other in zip(as_memories(first), as_memories(second), strict=False):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            continue  # judged by who needs a tensor
        error = difference(one.detach().float().numpy(), other.detach().float().numpy())
        if error > TOLERANCE:
            raise SourceError(
                f"the module gives different answers to equal inputs: {part}, asked twice, differs by {error:.2g} of its largest "
                "number. After module.eval() nothing may draw random numbers: look for dropout called with training=True (the "
                "default of torch.nn.functional.dropout), and for a train() or eval() of the module's own"
            )
    return first
