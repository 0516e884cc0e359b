"""Copies of modules over the same numbers: frozen, cast or set to another mode, they do nothing to the module that they are of."""

import copy
from typing import Any

from torch import Tensor, nn


def borrowed(module: nn.Module) -> Any:
    """A deep copy of ``module``, but for the numbers of its tensors. Raises what deepcopy raises."""
    return copy.deepcopy(module, dict(_tensors(module)))


def rebuilt(module: nn.Module) -> Any:
    """The tree of ``module`` anew, for one that cannot be copied: tensors and modes are its own, all other attributes are shared."""
    tensors, made = _tensors(module), dict[int, Any]()

    def build(part: Any) -> Any:
        if part is None or id(part) in made:
            return made.get(id(part))
        new = made[id(part)] = object.__new__(type(part))
        own = {name: {key: tensors.get(id(value)) for key, value in getattr(part, name).items()} for name in _TENSORS}
        new.__dict__.update({**vars(part), **own})
        new.__dict__["_modules"] = {key: build(value) for key, value in part._modules.items()}
        return new

    return build(module)


_TENSORS = ("_parameters", "_buffers")


def _tensors(module: nn.Module) -> dict[int, Tensor]:
    """What stands for each tensor, by its identity: another one over the same numbers."""
    parameters = {id(value): nn.Parameter(value.detach(), requires_grad=False) for value in module.parameters()}
    return {**parameters, **{id(value): value.detach() for value in module.buffers()}}
