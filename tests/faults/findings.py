"""What trials find, and the table of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Iterable

    from fork_server import Ended

LOST, DIFFERENT, TRACEBACK, OVER, LEFT = PROBLEMS = ("lost", "different", "traceback", "over 60 s", "left behind")
# No problem: another model that plain transformers loads, which docs/reliability.md does not exclude.
UNNOTICED = "not promised"


@dataclass
class Trial:
    """One trial: its kind, how to repeat it, and its problems."""

    kind: str
    what: str
    problems: list[tuple[str, str]] = field(default_factory=list)
    unnoticed: bool = False

    def add(self, problem: str, detail: object) -> None:
        """Note a problem, one of `PROBLEMS`."""
        assert problem in PROBLEMS
        self.problems.append((problem, str(detail)[:2000]))

    def require(self, condition: object, problem: str, detail: object) -> None:
        """Note a problem unless the condition holds."""
        if not condition:
            self.add(problem, detail)

    def judge_end(self, ended: Ended, *statuses: int) -> None:
        """Note a traceback, too long a time, and another exit status than these."""
        self.require(not ended.over_limit, OVER, f"{ended.seconds:.0f} s")
        self.require(not ended.traceback, TRACEBACK, ended.err[-1500:])
        self.require(ended.status in statuses, DIFFERENT, f"exit status {ended.status}: {ended.err[-600:]}")

    def __str__(self) -> str:
        return "\n".join([f"{self.kind}: {self.what}", *(f"  {problem}: {text}" for problem, text in self.problems)])


def table(trials: Iterable[Trial]) -> str:
    """Count the trials of each kind, and those with each problem, as a Markdown table."""
    kinds: dict[str, list[Trial]] = {}
    for trial in trials:
        kinds.setdefault(trial.kind, []).append(trial)
    columns = (*PROBLEMS, UNNOTICED)
    lines = [f"| kind | trials | {' | '.join(columns)} |", f"| --- | --- |{' --- |' * len(columns)}"]
    for kind, found in kinds.items():
        counts = Counter(problem for trial in found for problem in {problem for problem, _ in trial.problems})
        unnoticed = sum(trial.unnoticed for trial in found)
        cells = [kind, f"{len(found):,}", *(str(counts[problem]) for problem in PROBLEMS), str(unnoticed)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
