"""The ratios that this project is held to on an H200, and what results say: met, missed by so much,
not measured.

A time is judged by the worse of its cool and its hot ratio, each median over median of methods
timed in turns.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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


def judge(bar: Bar, cells: dict[str, dict]) -> Verdict:
    """What a result file's cells say of a bar."""
    cell = cells.get(bar.cell)
    if cell is None or "methods" not in cell:
        return Verdict({}, "not measured" if cell is None else f"failed: {cell['failed']}")
    methods = cell["methods"]
    ours = methods.get(bar.ours, {})
    if "failed" in ours:
        return Verdict({}, f"failed: {ours['failed']}")
    values = {}
    for kind in ("cool", "hot") if bar.quantity == "time" else ("",):
        mine = _value(ours, bar.quantity, kind)
        theirs = [
            x
            for name in bar.against
            if (x := _value(methods.get(name, {}), bar.quantity, kind)) is not None
        ]
        if mine is None or (bar.against and not theirs):
            continue
        unit = GIB if bar.quantity == "extra_bytes" else 1.0
        values[kind] = mine / min(theirs) if bar.against else mine / unit
    if not values:
        reasons = [
            f"{name}: {methods.get(name, {}).get('reason')}"
            for name in bar.against
            if "reason" in methods.get(name, {})
        ]
        return Verdict({}, "; ".join(["not measured", *reasons]))
    over = max(values.values()) / bar.limit - 1
    return Verdict(values, "met" if over <= 0 else f"missed by {100 * over:.1f} %")


def _value(method: dict, quantity: str, kind: str) -> float | None:
    if quantity == "time":
        return method.get(kind, {}).get("median")
    return (
        method.get("extra_bytes")
        if quantity == "extra_bytes"
        else method.get("errors", {}).get(quantity)
    )


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
