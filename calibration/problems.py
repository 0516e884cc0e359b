"""Everything that is wrong with calibration data, told at once: the first few in full, the rest counted.

Owns how many are kept, so that a file of a million wrong lines takes no memory. It does not know what can be wrong.
"""

from dataclasses import dataclass, field

from txopt.runtime.errors import InputError, explain
from txopt.runtime.strict_json import limited

SHOWN = 12


@dataclass
class Problems:
    """What was found so far; ``count`` of them, of which the first are kept in ``lines``."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, problem: object) -> None:
        """``problem``, a text or an error of txopt, found at ``where``; a list of an error's becomes one line."""
        self.count += 1
        if len(self.lines) < SHOWN:
            self.lines.append(f"{where}: " + str(problem).replace("\n  - ", " "))

    def check(self, title: str) -> None:
        """Raises one InputError that begins with ``title``, where anything was added."""
        if self.count:
            rest = [f"... and {self.count - SHOWN} more"] if self.count > SHOWN else []
            raise InputError(explain(title, [*limited(self.lines), *rest]))
