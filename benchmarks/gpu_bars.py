"""The ratios that this project is held to on an H200, and what results say: met, missed by so much,
not measured.

A time is judged by the worse of its cool and its hot ratio, each median over median of methods
timed in turns. A bar is never judged by another peer than those it names: where the one that it
names did not run it is not measured, and where it names several ("the fastest of") the verdict
says of which it is.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from loss_head_cases import HEADS
from loss_head_peers import FOUR_PRODUCTS

GIB = 2**30


@dataclass(frozen=True)
class Bar:
    """ours (the name of a method) must stay under limit * the least of `against`, or under limit
    alone.
    """

    what: str
    cell: str
    ours: str
    against: tuple[str, ...]
    limit: float
    # or "extra_bytes" (limit in GiB where it stands alone), or a key of a method's errors
    quantity: str = "time"


@dataclass(frozen=True)
class Verdict:
    values: dict[
        str, float
    ]  # "cool" and "hot", or "" for what is no time; empty where not measured
    text: str


def _float32_dweight(head: str) -> float:
    D, V, _ = HEADS[head]
    return 4 * V * D / GIB


def _head_bars(head: str, slack: float) -> list[Bar]:
    """Ratios at N = 16384; slack multiplies the limits."""
    cell = f"{head}-N16384-all-"
    rows = [
        ("trainable, 3 bare products", "trainable", "treg_fused", ("gemm_3",), 1.10),
        ("trainable, TRL", "trainable", "treg_fused", ("trl_chunked",), 0.80),
        ("trainable, fastest peer of 4 products", "trainable", "treg_fused", FOUR_PRODUCTS, 0.90),
        ("frozen, 2 bare products", "frozen", "treg_fused", ("gemm_2",), 1.10),
        ("frozen, TRL", "frozen", "treg_fused", ("trl_chunked",), 0.72),
        ("forward, 1 bare product", "forward", "treg_logprobs", ("gemm_1",), 1.08),
    ]
    return [
        Bar(f"{head} N=16384 {what}", cell + mode, ours, against, round(limit * slack, 3))
        for what, mode, ours, against, limit in rows
    ]


_LLAMA, _REAL = "llama-3-8b-N16384-all-trainable", "llama-3-8b-N16384-realistic-trainable"
BARS = [
    *_head_bars("llama-3-8b", 1.0),
    Bar(
        "llama-3-8b N=2048 trainable, 3 bare products",
        "llama-3-8b-N2048-all-trainable",
        "treg_fused",
        ("gemm_3",),
        1.15,
    ),
    Bar("real masks, packed: time, Liger DPO", _REAL, "treg_packed", ("liger_dpo",), 0.35),
    Bar(
        "real masks, packed: extra memory, Liger DPO",
        _REAL,
        "treg_packed",
        ("liger_dpo",),
        0.15,
        "extra_bytes",
    ),
    Bar(
        "extra memory, GiB (1 + float32 dweight)",
        _LLAMA,
        "treg_fused",
        (),
        round(1 + _float32_dweight("llama-3-8b"), 3),
        "extra_bytes",
    ),
    Bar(
        "extra memory with the smallest budget, GiB",
        _LLAMA,
        "treg_smallest",
        (),
        0.5,
        "extra_bytes",
    ),
    Bar("log-prob error, rms, nats", _LLAMA, "treg_fused", (), 1e-5, "logprobs_rms_nats"),
    Bar("dhidden error, relative", _LLAMA, "treg_fused", (), 3e-3, "dhidden"),
    Bar("dweight error, relative", _LLAMA, "treg_fused", (), 3e-3, "dweight"),
    *_head_bars("gemma-2-9b", 1.05),
]


# of "the fastest of", those worth a minute of a GPU; no step of the plan runs the others in a cell
# that bars are set on, and the verdict names them
QUICK = ("trl_chunked", "liger_scaled_ce", "cce_exact", "verl")


def methods_of(cell: str, bars: Iterable[Bar] = BARS) -> tuple[str, ...]:
    """The methods that a cell's bars need: ours and those they name, of many the QUICK ones."""
    named = [
        name
        for bar in bars
        if bar.cell == cell
        for name in (bar.ours, *bar.against)
        if name in QUICK or len(bar.against) == 1 or name == bar.ours
    ]
    return tuple(dict.fromkeys(named))


def cool_methods_of(cell: str, bars: Iterable[Bar] = BARS) -> tuple[str, ...]:
    """Those of them that are timed cool as well: of bars on a time that name one other method."""
    named = [
        name
        for bar in bars
        if bar.cell == cell and bar.quantity == "time" and len(bar.against) == 1
        for name in (bar.ours, *bar.against)
    ]
    return tuple(dict.fromkeys(named))


def judge(bar: Bar, cells: dict[str, dict]) -> Verdict:
    """What a result file's cells say of a bar. A verdict on a cell that did not end says
    "unfinished" at its end: another call may change it.
    """
    cell = cells.get(bar.cell)
    if cell is None:
        return Verdict({}, "not measured")
    if "methods" not in cell:
        why = f"failed: {cell['failed']}" if "failed" in cell else "not measured: unfinished"
        return Verdict({}, why)
    verdict = _judged(bar, cell["methods"])
    return replace(verdict, text=verdict.text + ", unfinished" * ("unfinished" in cell))


def _judged(bar: Bar, methods: dict[str, dict]) -> Verdict:
    ours = methods.get(bar.ours, {})
    if "failed" in ours:
        return Verdict({}, f"failed: {ours['failed']}")
    kinds = ("cool", "hot") if bar.quantity == "time" else ("",)
    absent = [name for name in bar.against if not _measured(methods, name, bar.quantity, kinds)]
    if bar.against and len(absent) == len(bar.against):
        return Verdict({}, f"not measured: {_did_not_run(absent, methods)}")
    values = {}
    for kind in _comparable(bar, methods, kinds):
        mine = _value(ours, bar.quantity, kind)
        if mine is None:
            continue
        if bar.against:
            values[kind] = mine / min(_values(bar, methods, kind))
        else:
            values[kind] = mine / (GIB if bar.quantity == "extra_bytes" else 1.0)
    if not values:
        return Verdict({}, f"not measured: {_did_not_run([bar.ours], methods)}")
    over = max(values.values()) / bar.limit - 1
    text = "met" if over <= 0 else f"missed by {100 * over:.1f} %"
    if len(values) < len(kinds):
        text += f", {next(iter(values))} alone"
    if absent:
        ran = [name for name in bar.against if name not in absent]
        text += f", of {', '.join(ran)}; partial: {_did_not_run(absent, methods)}"
    return Verdict(values, text)


def _values(bar: Bar, methods: dict[str, dict], kind: str) -> list[float]:
    """Of the methods that a bar names."""
    found = [_value(methods.get(name, {}), bar.quantity, kind) for name in bar.against]
    return [x for x in found if x is not None]


def _comparable(bar: Bar, methods: dict[str, dict], kinds: tuple[str, ...]) -> list[str]:
    """The kinds in which all ran that ran at all: cool times of some would hide a fast other."""
    counts = {kind: len(_values(bar, methods, kind)) for kind in kinds}
    return [kind for kind in kinds if counts[kind] == max(counts.values())]


def _measured(methods: dict, name: str, quantity: str, kinds: tuple[str, ...]) -> bool:
    return any(_value(methods.get(name, {}), quantity, kind) is not None for kind in kinds)


def _did_not_run(names: list[str], methods: dict[str, dict]) -> str:
    """ "a (why), b did not run" """
    told = []
    for name in names:
        found = methods.get(name, {})
        why = found.get("reason") or found.get("failed")
        told.append(f"{name} ({why})" if why else name)
    return f"{', '.join(told)} did not run"


def _value(method: dict, quantity: str, kind: str) -> float | None:
    if quantity == "time":
        return method.get(kind, {}).get("median")
    if quantity == "extra_bytes":
        return method.get("extra_bytes")
    return method.get("errors", {}).get(quantity)


def table(cells: dict[str, dict], bars: Iterable[Bar] = BARS) -> str:
    """Markdown: every bar, its limit, what was measured, the verdict."""
    lines = ["| bar | limit | cool | hot | |", "|---|---|---|---|---|"]
    for bar in bars:
        verdict = judge(bar, cells)
        cool, hot = (
            f"{verdict.values[k]:.3g}" if k in verdict.values else "" for k in ("cool", "hot")
        )
        if "" in verdict.values:
            cool = f"{verdict.values['']:.3g}"
        lines.append(
            f"| {bar.what} | {bar.limit:g} | {cool} | {hot} | {verdict.text.replace('|', '/')} |"
        )
    return "\n".join(lines)
