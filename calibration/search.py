"""Which weights get a finer scheme when a coarse one loses too much: the most sensitive ones, more of them with every attempt.

Owns the order of attempts. Each is a whole artifact, measured by the gate on the task itself: sensitivities only say whom to ask
first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from txopt.calibration.recipe import Recipe
from txopt.calibration.sensitivity import Sensitivity

# Of all weights. Every attempt costs a measurement, so the share doubles; the last one leaves nothing in the coarse scheme.
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def attempts(recipe: Recipe, found: Sequence[Sensitivity]) -> Iterator[Recipe]:
    """Recipes that lose less and less; ``found`` has the most sensitive weight first.

    None leaves all weights in float: that is the artifact that there is already, and no quantized one.
    """
    tried = 0
    for share in SHARES:
        count = max(1, round(share * len(found)))
        if count > tried:
            made = replace(recipe, finer=recipe.finer | {each.name for each in found[:count]})
            if not any(made.scheme_of(each.name, graph=each.graph) for each in found):
                return
            yield made
            tried = count
