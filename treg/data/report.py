"""What became of the rows of a source: kept, or dropped with a reason that is counted and shown."""

from dataclasses import dataclass, field


class RowProblem(ValueError):
    """Why one row cannot be used. reason: a short name that is counted; detail: what was found."""

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        super().__init__(f"{where}: {reason}{': ' if detail else ''}{detail}")
        self.reason, self.detail, self.where = reason, detail, where


@dataclass
class Report:
    """What became of the rows of a source. With strict, the first problem is raised instead of
    counted.
    """

    strict: bool = False
    seen: int = 0
    kept: int = 0
    truncated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, problem: RowProblem) -> None:
        if self.strict:
            raise problem
        self.dropped[problem.reason] = self.dropped.get(problem.reason, 0) + 1
        kept = self.examples.setdefault(problem.reason, [])
        if len(kept) < 3:
            kept.append(str(problem))

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.seen} rows kept, {self.truncated} of them truncated"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  dropped {count}: {reason}")
            lines += [f"    {example}" for example in self.examples[reason]]
        return "\n".join(lines)
