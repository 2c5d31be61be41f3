"""What became of the rows of a source: kept, or dropped with a reason that is counted and shown."""

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN_EXAMPLES = 3  # of each reason
LONGEST = 2000  # characters of a message
QUOTED = 80  # characters of a value that it quotes


def printable(text: str, longest: int = LONGEST) -> str:
    """A text from data as it can be shown: no control characters, no halves of characters, and not
    endless.
    """
    if len(text) > longest:
        text = f"{text[: longest - 3]}..."
    return "".join(x if x.isprintable() else repr(x)[1:-1] for x in text)


def described(value: Any) -> str:
    """repr of a value from data, as it can be shown."""
    return printable(repr(value), QUOTED)


class RowProblem(ValueError):
    """Why one row cannot be used.

    Args:
        reason: a short name that is counted.
        detail: what was found in this row.
        where: the row, as `read_rows` names it.
    """

    def __init__(self, reason: str, detail: str = "", where: str = ""):
        reason, detail, where = map(printable, (reason, detail, where))
        colon = ": " if detail else ""
        super().__init__(f"{where}: {reason}{colon}{detail}")
        self.reason = reason
        self.detail = detail
        self.where = where

    def __reduce__(self) -> tuple:
        """From other processes it comes as it is."""
        return type(self), (self.reason, self.detail, self.where)


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
    # of rows that were kept, what a person should know: how many, and the first few
    noted: dict[str, int] = field(default_factory=dict)
    noted_examples: dict[str, list[str]] = field(default_factory=dict)
    # where several sources were read: the rows of each that were seen and kept, by its path
    sources: dict[str, list[int]] = field(default_factory=dict)

    def problem(self, problem: RowProblem) -> None:
        """Count a row that cannot be used."""
        if self.strict:
            raise problem
        _count(problem, self.dropped, self.examples)

    def note(self, note: RowProblem) -> None:
        """Count what there is to say of a row that is used."""
        _count(note, self.noted, self.noted_examples)

    def late_problem(self, problem: RowProblem, *, truncated: bool) -> None:
        """Count a row that was kept and cannot be used after all."""
        self.kept -= 1
        self.truncated -= truncated
        own = [x for x in self.sources if problem.where.startswith(x)]
        if own:
            self.sources[max(own, key=len)][1] -= 1
        self.problem(problem)

    def add(self, other: "Report") -> None:
        """Count the rows of another source as well."""
        self.seen += other.seen
        self.kept += other.kept
        self.truncated += other.truncated
        self.sources |= other.sources
        for counts, added in ((self.dropped, other.dropped), (self.noted, other.noted)):
            for reason, count in added.items():
                counts[reason] = counts.get(reason, 0) + count
        shown = (self.examples, other.examples), (self.noted_examples, other.noted_examples)
        for examples, more in shown:
            for reason, texts in more.items():
                examples[reason] = [*examples.get(reason, []), *texts][:SHOWN_EXAMPLES]

    def stored(self) -> dict[str, Any]:
        """The fields by name, as a file keeps them: `sources` only where there are several."""
        return {k: x for k, x in asdict(self).items() if k != "sources" or x}

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.seen} rows kept, {self.truncated} of them truncated"]
        lines += [f"  {x}: {kept} of {seen}" for x, (seen, kept) in self.sources.items()]
        lines += _listed("dropped", self.dropped, self.examples)
        lines += _listed("kept", self.noted, self.noted_examples)
        return "\n".join(lines)


def _count(problem: RowProblem, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
    counts[problem.reason] = counts.get(problem.reason, 0) + 1
    shown = examples.setdefault(problem.reason, [])
    if len(shown) < SHOWN_EXAMPLES:
        shown.append(str(problem))


def _listed(what: str, counts: dict[str, int], examples: dict[str, list[str]]) -> list[str]:
    lines = []
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f"  {what} {count}: {reason}")
        lines += [f"    {example}" for example in examples[reason]]
    return lines
