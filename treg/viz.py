"""Token rewards beside implicit rewards, for people: a page of pairs, a terminal view and training curves.

Per response token t: rhat_t, the token reward, in [-0.5, 0.5], and i_t = beta * (log pi_t - log pi_ref,t), the implicit
reward. T-REG asks the second to follow the first. Colours have fixed scales, so that two pages can be compared.
"""

import base64
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from treg.data import common_prefix
from treg.files import replacing

PageTable = tuple[str, Sequence[str], Sequence[Sequence[object]]]  # title, header, rows
History = dict[str, list[dict[str, Any]]]  # the `state.log_history` of a transformers Trainer, by run

REWARD_LIMIT, IMPLICIT_LIMIT, LARGE = 0.5, 0.2, 0.1  # where the colours end; |rhat| of a clear opinion is above LARGE
# Controls, bidi overrides and other characters without a shape, shown as symbols. Means the same in Python and JS.
HIDDEN = r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\ufffb]"
SYMBOLS = {"\n": "↵\n", "\t": "⇥\t", "\r": "↤"}  # found in most fonts; the others are shown as code points
PANEL, LEGEND, DPI = (480, 330), 40, 120  # of the curves; width and height of a panel, height of the legend, in pixels
# Okabe and Ito's colours, which stay apart for colour-blind readers; grey for their black, unseen on a dark ground
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#808080")
FIRST_CURVES = ("loss", "rewards/accuracies", "rewards/margins", "treg/reg_loss", "treg/alignment", "learning_rate")
NO_CURVE = re.compile("(step|epoch|total_flos|train_.*|.*_runtime|.*_per_second)$")


def token_pieces(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """One string per token, such that "".join(pieces) is the decoded text, special tokens kept.

    A piece is what its token adds to the decoded text of the tokens before it, so nothing is assumed of the
    vocabulary. A character whose bytes span several tokens stands whole at the token that completes it and the others
    are ""; bytes that are no UTF-8 show as the decoder's U+FFFD, at the first token of an ill-formed sequence.
    """
    ids = [int(i) for i in ids]

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False) if part else ""

    # Windows make the cost linear. They fail where a decoder looks far (a long run of byte tokens): then the whole.
    pieces = [p for start in range(0, len(ids), 64) for p in _window_pieces(ids, start, start + 64, 8, decode)]
    return pieces if "".join(pieces) == decode(ids) else _window_pieces(ids, 0, len(ids), 0, decode)


def _window_pieces(ids: list[int], start: int, end: int, reach: int, decode: Callable[[list[int]], str]) -> list[str]:
    """Pieces of ids[start:end]; `reach` tokens on either side settle leading spaces and characters cut in two."""
    low, end = max(0, start - reach), min(end, len(ids))
    text, bounds = decode(ids[low : end + reach]), [0]
    for stop in range(start, end + 1):
        part = decode(ids[low:stop])
        # an unfinished character decodes to U+FFFD, which the finished text does not have at that place
        bounds.append(max(bounds[-1], common_prefix(part, text)))
    return [text[a:b] for a, b in pairwise(bounds[1:])]


@dataclass(frozen=True)
class Side:
    """One response: a piece of text per token and, where known, the numbers of each token."""

    pieces: list[str]
    rewards: list[float] | None = None  # rhat_t
    implicit: list[float] | None = None  # beta * (log pi_t - log pi_ref,t)
    special: Sequence[int] = ()  # positions of special tokens, shown as chips

    @classmethod
    def from_ids(cls, ids: Sequence[int], tokenizer: Any, rewards=None, implicit=None) -> "Side":
        """The side of these token ids, its pieces from `token_pieces` and its special tokens from the tokenizer."""
        added = getattr(tokenizer, "added_tokens_decoder", {}).items()
        special = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        return cls(token_pieces(ids, tokenizer), rewards, implicit, [t for t, i in enumerate(ids) if int(i) in special])


@dataclass(frozen=True)
class PairView:
    """A preference pair to show."""

    where: str  # file:line
    prompt: str
    chosen: Side
    rejected: Side


def agreement(pairs: Sequence[PairView]) -> dict[str, float | int]:
    """How token rewards and implicit rewards go together, over all tokens of all pairs.

    Returns:
        pairs, tokens; agree, disagree, ties: tokens by whether sign(rhat) == sign(implicit), a zero in either is a
        tie; sign_agreement = agree / (agree + disagree); pearson, spearman (ties share their mean rank);
        mean_reward_chosen, mean_reward_rejected; large_rewards, the share of |rhat| > 0.1.
        A key is absent where its numbers are (no rewards, no implicit rewards, a constant under a correlation).
    Raises:
        ValueError: no pair; numbers that are not finite or not one per piece, by pair and token.
    """
    return _agreement(_numbers(pairs))


def _agreement(numbers: list[list[dict[str, np.ndarray]]]) -> dict[str, float | int]:
    sides = [side for pair in numbers for side in pair]
    out: dict[str, float | int] = {"pairs": len(numbers), "tokens": sum(side["tokens"].size for side in sides)}
    both = [side for side in sides if "rewards" in side and "implicit" in side]
    if both:
        r, i = (np.concatenate([side[name] for side in both]) for name in ("rewards", "implicit"))
        signs = np.sign(r) * np.sign(i)
        agree, disagree = int((signs > 0).sum()), int((signs < 0).sum())
        out |= {"agree": agree, "disagree": disagree, "ties": signs.size - agree - disagree}
        if agree + disagree:
            out["sign_agreement"] = agree / (agree + disagree)
        for name, x, y in (("pearson", r, i), ("spearman", ranks(r), ranks(i))):
            if x.size and np.ptp(x) > 0 and np.ptp(y) > 0:
                x, y = x - x.mean(), y - y.mean()
                out[name] = float(x @ y / np.sqrt((x @ x) * (y @ y)))
    chosen, rejected = (np.concatenate([[], *(s["rewards"] for s in sides[k::2] if "rewards" in s)]) for k in (0, 1))
    large = np.abs(np.concatenate([chosen, rejected])) > LARGE
    means = (("mean_reward_chosen", chosen), ("mean_reward_rejected", rejected), ("large_rewards", large))
    return out | {name: float(x.mean()) for name, x in means if x.size}


def ranks(x: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal numbers share their mean rank."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def _numbers(pairs: Sequence[PairView]) -> list[list[dict[str, np.ndarray]]]:
    """For each pair, of both sides: "tokens" 0..T-1, and of "rewards" and "implicit" those there are; each [T]."""
    if not pairs:
        raise ValueError("pairs: expected at least one, got none")

    def checked(label: str, side: Side) -> dict[str, np.ndarray]:
        out: dict[str, np.ndarray] = {"tokens": (at := np.arange(len(side.pieces)))}
        for name, values in (("rewards", side.rewards), ("implicit", side.implicit)):
            if values is not None:
                out[name] = x = np.asarray(values, dtype=np.float64)
                if x.shape != at.shape:
                    raise ValueError(f"{label}.{name}: expected {at.size} numbers, one per piece, got {list(x.shape)}")
                for t in at[~np.isfinite(x)]:
                    raise ValueError(f"{label}.{name}: got {x[t]} at token {t}, {side.pieces[t]!r}; expected a number")
        return out

    return [
        [checked(f"pairs[{n}] ({p.where}): {name}", getattr(p, name)) for name in ("chosen", "rejected")]
        for n, p in enumerate(pairs)
    ]


def _pair_data(pair: PairView, numbers: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the page shows of a pair; a key is absent where its numbers are."""
    data: dict[str, Any] = {"where": pair.where, "prompt": pair.prompt}
    for name, side, x in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), numbers, strict=True):
        data[name] = shown = {"pieces": side.pieces, "special": list(side.special)}
        for key in list(x)[1:]:  # all but "tokens"
            shown |= {key: [float(f"{v:.5g}") for v in x[key]], f"sum_{key}": float(x[key].sum())}
        if "sum_rewards" in shown:
            data[f"sum_{name}"] = shown["sum_rewards"]
            lowest = min(zip(x["rewards"].tolist(), side.pieces, strict=True), default=None)
            data["lowest"] = min(filter(None, (lowest, data.get("lowest"))), default=None)
        if shown.keys() >= {"rewards", "implicit"} and side.pieces:
            shown |= {"mean_product": float((x["rewards"] * x["implicit"]).mean())} | _agreement([[x]])
    if all("sum_implicit" in data[name] for name in ("chosen", "rejected")):
        data["margin"] = data["chosen"]["sum_implicit"] - data["rejected"]["sum_implicit"]
    return data | {"agreement": _agreement([numbers]).get("sign_agreement")}


def visible(text: str) -> str:
    """Text in which every character without a shape is a symbol; line breaks and tabs stay beside theirs."""
    return re.sub(HIDDEN, lambda match: SYMBOLS.get(match[0], f"⟨U+{ord(match[0]):04X}⟩"), text)


def write_page(
    path: str | os.PathLike,
    pairs: Sequence[PairView],
    *,
    title: str,
    settings: dict[str, str],
    history: History | None = None,
    tables: Sequence[PageTable] | None = None,
    implicit_limit: float = IMPLICIT_LIMIT,
) -> None:
    """Write one HTML file that needs nothing else: pairs side by side, coloured by token, with `agreement` above.

    No text can run: it is escaped, or JSON that the page's script turns into text nodes, and the page's policy lets
    only that script run. The address may end in #pair-3 (opens the third), #sort=-margin, #color=implicit, or
    several of them joined by "&". The file appears whole or not at all.

    Args:
        settings, tables: shown above the pairs. history: see `plot_curves`; of FIRST_CURVES, if there are any.
        implicit_limit: where the colours of implicit rewards end; those of the products end at a quarter of it.
    Raises:
        ValueError: as `agreement` and `plot_curves`; a table row that is not as long as its header.
    """
    import jinja2
    from markupsafe import Markup

    for name, header, cells in tables or ():
        if any(len(row) != len(header) for row in cells):
            raise ValueError(f"tables: {name!r}: expected {len(header)} cells in every row, as in the header")
    numbers = _numbers(pairs)
    rows = [_pair_data(pair, x) for pair, x in zip(pairs, numbers, strict=True)]
    limits = {"rewards": REWARD_LIMIT, "implicit": implicit_limit, "product": implicit_limit / 4}
    known = {key.replace("mean_", "") for row in rows for name in ("chosen", "rejected") for key in row[name]}
    limits = {name: limit for name, limit in limits.items() if name in known}
    # ASCII, so U+2028, U+2029 and lone surrogates are escapes; without <, > and & no markup can begin or end
    data = {"hidden": HIDDEN, "symbols": SYMBOLS, "limits": limits, "pairs": rows}
    payload = json.dumps(data, separators=(",", ":"), allow_nan=False)
    payload = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", payload)

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.finalize = lambda x: visible(x) if type(x) is str else x  # not of Markup, a subclass
    environment.filters["sha256"] = lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    # the opening lines of a chat template are the same in every prompt: what differs tells pairs apart
    first, last = min(pair.prompt for pair in pairs), max(pair.prompt for pair in pairs)
    start = first.rfind("\n", 0, common_prefix(first, last)) + 1 if first != last else 0
    curves = [io.BytesIO(), io.BytesIO()] if history is not None else []
    few = {run: [{k: x[k] for k in ("step", *FIRST_CURVES) if k in x} for x in records]
           for run, records in (history or {}).items()}  # fmt: skip
    if any(x.keys() & set(FIRST_CURVES) for records in few.values() for x in records):
        history = few
    for dark, png in enumerate(curves):
        plot_curves(history or {}, png, dark=bool(dark))
    template = Path(__file__).with_name("viz.html.jinja").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        title=title,
        settings=settings,
        agreement=_agreement(numbers),
        tables=tables or (),
        curves=[base64.b64encode(png.getvalue()).decode() for png in curves],
        limits=limits,
        rows=[row | {"snippet": " ".join(row["prompt"][start:].split())[:200]} for row in rows],
        payload=Markup(payload),
    )
    with replacing(path) as temporary:
        temporary.write_bytes(html.encode("utf-8", "replace"))


def print_pairs(pairs: Sequence[PairView], console: Any = None, limit: int | None = 5) -> None:
    """Print pairs and their agreement to a rich Console; tokens coloured by rhat, or by i_t where there is no rhat.

    At most `limit` pairs are printed, all with None; the agreement is of all. Raises ValueError as `agreement`.
    """
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # black on colours that begin well away from white and from black: no patch where a number is near 0
    ramps = {True: ("#cfe5f9", "#9ccaf2", "#62a9e8"), False: ("#fbe0c4", "#f6bf8a", "#f2953f")}

    def coloured(pieces: Sequence[str], values: Sequence[float], end: float) -> Text:
        levels = [min(int(4 * abs(value) / end + 0.5), 3) for value in values]
        styles = [f"black on {ramps[v > 0][k - 1]}" if k else "" for v, k in zip(values, levels, strict=True)]
        return Text.assemble(*zip(map(visible, pieces), styles, strict=True))

    def response(name: str, data: dict[str, Any]) -> Text:
        facts = [f"{k.replace('_', ' ')} {v:+.3f}" for k, v in data.items() if k.startswith(("sum_", "mean_p"))]
        head = (", ".join([name, *facts]) + "\n", "bold")
        values = data.get("rewards", data.get("implicit", [0.0] * len(data["pieces"])))
        end = REWARD_LIMIT if "rewards" in data else IMPLICIT_LIMIT
        return Text.assemble(head, coloured(data["pieces"], values, end))

    console, numbers = console or Console(), _numbers(pairs)
    for pair, x in list(zip(pairs, numbers, strict=True))[:limit]:
        data = _pair_data(pair, x)
        console.rule(Text(visible(pair.where)))
        grid = Table.grid(Column(ratio=1), Column(ratio=1), padding=(0, 2), expand=True)
        grid.add_row(*(response(name, data[name]) for name in ("chosen", "rejected")))
        console.print(Text(visible(pair.prompt) + "\n", "dim"), grid)
    console.rule(Text(f"agreement over {len(pairs)} pairs, {len(pairs[:limit])} of them above"))
    scale = [-0.5, -0.25, -0.125, 0.0, 0.125, 0.25, 0.5]
    console.print(coloured([f" {v:+.3f} " for v in scale], scale, REWARD_LIMIT), "token reward")
    for name, value in _agreement(numbers).items():
        console.print(f"{name.replace('_', ' '):22}{round(value, 3):>9}", highlight=False)


def plot_curves(history: History, path_or_buffer: str | os.PathLike | IO[bytes], *, dark: bool = False) -> None:
    """Draw every number logged more than once over the optimizer steps: a panel a quantity, a line a run, one PNG.

    Args:
        history: log records by run; runs named "dpo/0" and "dpo/1" are seeds of one method and share its colour.
            Numbers that are not finite are gaps.
        dark: light on dark. The size is PANEL pixels a panel, and LEGEND more for the legend at the foot.
    Raises:
        ValueError: no number beside a "step" in any record.
    """
    from matplotlib.figure import Figure  # no pyplot, so no global state; savefig draws with Agg

    series: dict[str, dict[str, list]] = {key: {} for key in FIRST_CURVES}
    for run, record in ((run, record) for run, records in history.items() for record in records if "step" in record):
        for key, value in record.items():
            if isinstance(value, (int, float)) and not NO_CURVE.match(key):
                series.setdefault(key, {}).setdefault(run, []).append((record["step"], value))
    series = {key: runs for key, runs in series.items() if runs}
    curves = {key: runs for key, runs in series.items() if max(map(len, runs.values())) > 1}
    series = curves or series
    if not series:
        raise ValueError("history: expected a number beside a 'step' in at least one record, got none")
    methods = {run: re.sub(r"/\d+$", "", run) for run in history}
    counts = Counter(methods.values())
    looks = {m: {"color": PALETTE[n % 7], "ls": ("-", "--", ":")[n // 7 % 3]} for n, m in enumerate(counts)}
    columns, rows = min(3, len(series)), -(-len(series) // 3)
    size = columns * PANEL[0] / DPI, (rows * PANEL[1] + LEGEND) / DPI
    ink, ground = ("#dfe3ea", "#1b1e24") if dark else ("#14171c", "white")
    figure, lines = Figure(size, DPI, facecolor=ground, layout="constrained"), {}
    for n, (key, runs) in enumerate(series.items()):
        axes = figure.add_subplot(rows, columns, n + 1, facecolor=ground)
        for run, points in runs.items():
            m, (x, y) = methods[run], zip(*points, strict=True)
            (lines[m],) = axes.plot(x, y, **looks[m], lw=1.4, marker="" if len(x) > 12 else "o", ms=3)
        # "$" would begin a formula
        axes.set_title(key.replace("$", r"\$"), loc="left", fontsize=10, color=ink)
        axes.set_xlabel("optimizer step", fontsize=9, color=ink)
        axes.tick_params(labelsize=8, colors=ink)
        axes.yaxis.set_major_formatter("{x:.4g}")
        axes.grid(alpha=0.25)
        axes.spines[:].set_visible(False)
    labels = [(f"{m} ({counts[m]} seeds)" if counts[m] > 1 else m).replace("$", r"\$") for m in lines]
    figure.legend(list(lines.values()), labels, loc="outside lower center", ncols=6, frameon=False, labelcolor=ink)
    figure.savefig(path_or_buffer, format="png")
