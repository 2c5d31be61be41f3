"""What an evaluation says: tables for a terminal, and what follows, in sentences."""

from collections.abc import Sequence

from treg.evaluate.evaluation import Evaluation, Measure, ScoreResult

WORDS = {
    "auroc": "AUROC",
    "first_error": "first-error accuracy",
    "pair_accuracy": "pair accuracy",
}
# of the columns of the table: their titles, and whether intervals are shown
TITLES = {
    "auroc": ("AUROC", True),
    "average_precision": ("avg. precision", False),
    "sign_agreement": ("sign agreement", False),
    "zeros": ("zeros", False),
    "within_document": ("within document", False),
    "pair_accuracy": ("pairs, by sum", True),
    "pair_accuracy_by_mean": ("by mean", False),
    "first_error": ("first error", True),
}
MOST_LABELS = 20  # rows of the table of error types


def head_lines(found: Evaluation) -> list[str]:
    """How much there is, and what chance gives."""
    answers = _count(found.answers, "answer")
    documents = _count(found.documents, "document")
    lines = [f"{answers} of {documents}, {found.tokens:,} judged tokens"]
    if found.wrong and found.base_rate is not None:
        lines[0] += f", {found.wrong:,} of them wrong: base rate {found.base_rate:.3f}"
    if found.right:
        lines[0] += f"; {found.right:,} are marked as right"
    if found.chance is not None:
        lines.append(f"first error: a step at random is right in {found.chance:.3f}")
    return lines


def table(found: Evaluation) -> list[str]:
    """A row a score, the baselines last; columns that the data cannot give are left out."""
    shown = [
        name
        for name in TITLES
        if any(result.measures[name].value is not None for result in found.results)
    ]
    if not found.wrong:  # without a wrong token the signs of the others say nothing
        shown = [x for x in shown if x not in ("average_precision", "sign_agreement")]
    rows = [["", *(TITLES[name][0] for name in shown)]]
    begun = False
    for result in found.results:
        if result.baseline and not begun:
            rows.append(["baselines:"])
            begun = True
        cells = [
            said(result.measures[name]) if TITLES[name][1] else _number(result.measures[name])
            for name in shown
        ]
        rows.append([("  " if result.baseline else "") + result.name, *cells])
    return aligned(rows)


def label_table(found: Evaluation) -> list[str]:
    """A row an error type: how often it is, and the AUROC of each score; a star where the interval
    does not hold 0.5. Empty where there are no types.
    """
    if not found.labels or set(found.labels) == {""}:
        return []
    rows = [["", "tokens", "documents", *(result.name for result in found.results)]]
    for label, facts in list(found.labels.items())[:MOST_LABELS]:
        cells = [_starred(result.labels[label]) for result in found.results]
        rows.append([label or "(none)", f"{facts.tokens:,}", f"{facts.documents:,}", *cells])
    lines = ["AUROC by error type; *: the interval does not hold 0.5", *aligned(rows)]
    left = len(found.labels) - MOST_LABELS
    if left > 0:
        lines.append(f"and {left} more, which --json has")
    return lines


def _count(number: int, name: str) -> str:
    return f"{number:,} {name}{'s' * (number != 1)}"


def _number(value: Measure) -> str:
    return "-" if value.value is None else f"{value.value:.3f}"


def _starred(value: Measure) -> str:
    star = value.low is not None and not value.holds(0.5)
    return _number(value) + ("*" if star else " ")


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns stand below one another, the first to the left, the others to the right.
    A row of one cell alone takes no part in the widths.
    """
    whole = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=False)]
        lines.append("  ".join([first, *others]).rstrip())
    return lines


def conclusions(found: Evaluation) -> list[str]:
    """What follows for each score that is no baseline, in sentences."""
    if found.headline is None:
        return [
            "These marks give no measure that ranks scores: expected wrong and other tokens, a "
            "first wrong step, or pairs."
        ]
    word, by_name = WORDS[found.headline], {x.name: x for x in found.results}
    lines = []
    if found.best is not None:
        value = by_name[found.best].measures[found.headline]
        lines.append(f"The best baseline is {found.best}: {word} {said(value)}.")
    for result in found.results:
        if not result.baseline:
            lines.append(_about(result, found))
            lines += _of_chance(result, found, word)
    return lines


def _about(result: ScoreResult, found: Evaluation) -> str:
    """Whether a score is above the best baseline."""
    value, apart = result.measures[found.headline or ""], result.over_best
    if apart is None or apart.value is None:
        return f"{result.name}: {said(value)}; there is no baseline to compare it with."
    difference = f"the difference is {said(apart, sign=True)}"
    if apart.low is None:
        above = "above" if apart.value > 0 else "not above"
        return f"{result.name} is {above} the best baseline: {difference}, without an interval."
    if apart.low > 0:
        return f"{result.name} is above the best baseline: {difference}."
    if apart.value > 0:
        return (
            f"{result.name} is not shown to be above the best baseline: {difference}, which holds "
            "0."
        )
    return f"{result.name} is not above the best baseline: {difference}."


def _of_chance(result: ScoreResult, found: Evaluation, word: str) -> list[str]:
    """What there is to say of a score beside chance."""
    value, apart = result.measures[found.headline or ""], result.over_chance
    if apart is None or apart.low is None or apart.high is None:
        few = "an interval needs more documents that have what is measured"
        if not found.draws:
            few = "no draws were asked for"
        return [f"{result.name}: {word} {said(value)} has no interval; {few}."]
    chance = "0.5" if found.headline != "first_error" else f"chance, {found.chance:.3f}"
    if apart.holds(0):
        return [
            f"{result.name}: the interval of its {word}, {said(value)}, holds {chance}: it is "
            "not told apart from chance here."
        ]
    if apart.high < 0:
        return [
            f"{result.name}: its {word}, {said(value)}, is below {chance}: turned round it would "
            "be the better score."
        ]
    return []


def said(value: Measure, *, sign: bool = False) -> str:
    """0.541 [0.519, 0.570]"""
    form = "+.3f" if sign else ".3f"
    if value.value is None:
        return "unknown"
    if value.low is None or value.high is None:
        return f"{value.value:{form}}"
    return f"{value.value:{form}} [{value.low:{form}}, {value.high:{form}}]"
