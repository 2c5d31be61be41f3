"""What became of the rows of a source: kept, or dropped with a reason that is counted and shown."""

from dataclasses import dataclass, field

SHOWN_EXAMPLES = 3  # of each reason


class RowProblem(ValueError):
    """Why one row cannot be used.

    Args:
        reason: a short name that is counted.
        detail: what was found in this row.
        where: the row, as `read_rows` names it.
    """

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        colon = ": " if detail else ""
        super().__init__(f"{where}: {reason}{colon}{detail}")
        self.reason = reason
        self.detail = detail
        self.where = where


@dataclass
class Report:
    """What became of the rows of a source.

    With strict, the first problem is raised instead of counted.
    """

    strict: bool = False
    seen: int = 0
    kept: int = 0
    truncated: int = 0  # of those that were kept
    dropped: dict[str, int] = field(default_factory=dict)  # reason: how many rows
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason: the first few messages

    def problem(self, problem: RowProblem) -> None:
        """Count a row that cannot be used."""
        if self.strict:
            raise problem
        self.dropped[problem.reason] = self.dropped.get(problem.reason, 0) + 1
        examples = self.examples.setdefault(problem.reason, [])
        if len(examples) < SHOWN_EXAMPLES:
            examples.append(str(problem))

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.seen} rows kept, {self.truncated} of them truncated"]
        for reason, count in sorted(self.dropped.items(), key=lambda item: -item[1]):
            lines.append(f"  dropped {count}: {reason}")
            lines += [f"    {example}" for example in self.examples[reason]]
        return "\n".join(lines)
