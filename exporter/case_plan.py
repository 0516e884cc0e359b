"""Which reference cases a source is asked for: how long their rows are, and how many tokens each call of the decoder takes.

Owns the choice; reference.py asks PyTorch. None of the shapes is one that was traced.
"""

from dataclasses import dataclass, replace
from itertools import accumulate

from txopt.exporter.source import Facts
from txopt.runtime.row_decoder import FIRST_BUCKET


@dataclass(frozen=True)
class Plan:
    """One case: ``rows`` are source (or prompt) lengths, ``schedule`` the query tokens of each call of the decoder."""

    name: str
    rows: tuple[int, ...]
    schedule: tuple[int, ...] = ()
    generates: bool = True


SINGLE = Plan("single", (5,), (1,) * 6)
PADDED = Plan("padded", (9, 4, 7), (1, 3, 1, 2))
PAST_THE_BUCKET = Plan("past-the-first-bucket", (3,), (2, FIRST_BUCKET - 3, 1, 1, 4), generates=False)


def plans(facts: Facts) -> tuple[list[Plan], list[str]]:
    """The cases of a model, in the order in which they are replayed, and what cannot be asked of it, with the reason.

    A model whose positions end before the first buffer is full is led to its last position instead.
    """
    if facts.kind == "encoder":
        offered = [replace(plan, schedule=()) for plan in (SINGLE, PADDED)]
        return [_clipped(plan, facts.source_limit) for plan in offered], ["no decoder: nothing is generated"]
    shared = facts.kind == "decoder" and facts.limit is not None  # the prompt takes positions from what is generated
    longest = max(1, (facts.limit or 0) // 2) if shared else facts.source_limit
    offered = [_clipped(plan, longest) for plan in (SINGLE, PADDED, PAST_THE_BUCKET)]
    if facts.limit is None:
        return offered, []
    rooms = [facts.limit - (max(plan.rows) if shared else 0) for plan in offered]
    fitting = [replace(plan, schedule=_fitted(plan.schedule, room)) for plan, room in zip(offered, rooms, strict=True)]
    if fitting[-1] == offered[-1]:
        return fitting, []
    last = replace(offered[-1], name="to-the-last-position", schedule=_to(rooms[-1]))
    reason = f"too few to outgrow the first buffer of {FIRST_BUCKET}; its last position is reached instead"
    return [*fitting[:-1], last], [
        f'case "{PAST_THE_BUCKET.name}": the model has {facts.limit} target positions, {reason}'
    ]


def _clipped(plan: Plan, limit: int | None) -> Plan:
    return replace(plan, rows=tuple(min(length, limit or length) for length in plan.rows))


def _fitted(schedule: tuple[int, ...], room: int) -> tuple[int, ...]:
    """As many of the calls as there are positions for."""
    return tuple(queries for queries, total in zip(schedule, accumulate(schedule), strict=True) if total <= room)


def _to(last: int) -> tuple[int, ...]:
    """Calls that fill exactly ``last`` positions: a prefill, one wide call, and single steps at the end."""
    return (1,) * last if last < 6 else (2, last - 4, 1, 1)
