"""The model of times on an H200: its fit to what was measured elsewhere, its arithmetic, its
order.
"""

import math
from dataclasses import replace

import pytest
import roofline
from loss_head_cases import HEADS, gpu_case
from roofline import RATES, UPSTREAM

# of a made-up report: all counts of a thread
STASH = {"block": "128x256x64", "instructions": 3500}
STASH |= {"loop": {"instructions": 100}, "plain_epilogue": 700, "full_epilogue": 2100}


@pytest.fixture
def report(monkeypatch):
    rows = [{**STASH, "case": f"{kind}, bfloat16"} for kind in ("forward", "stash", "gradient")]
    monkeypatch.setattr(roofline, "_compiled", lambda: rows)
    monkeypatch.setattr(roofline, "_host_record", lambda: roofline.HOST_US)
    return rows


# -- the fit


def test_fit_meets_upstreams_curve_and_no_other_is_nearer():
    curve = UPSTREAM["triton"]

    def worst(rate, overhead):
        return max(abs(x * 1e12 * (1 + overhead / k) / rate - 1) for k, x in curve.items())

    residuals = {k: roofline.plain_rate(k) / (x * 1e12) - 1 for k, x in curve.items()}
    assert max(map(abs, residuals.values())) <= 0.03
    found = worst(roofline.PLAIN_RATE, roofline.PLAIN_OVERHEAD)
    others = (
        worst(rate * 1e12, overhead) for rate in range(640, 680, 2) for overhead in range(0, 400, 5)
    )
    assert found <= 1.01 * min(others)


def test_the_vendors_curve_is_met_and_steady_beyond_its_ends():
    for k, x in UPSTREAM["cublas"].items():
        assert roofline.cublas(k) == pytest.approx(x * 1e12)
    assert roofline.cublas(64) == roofline.cublas(512)
    assert roofline.cublas(10**6) == roofline.cublas(16384)
    assert roofline.cublas(math.sqrt(2048 * 4096)) == pytest.approx(631e12)
    assert RATES["cool"].vendor(8192) == pytest.approx(790e12)
    assert RATES["hot"].vendor(128256) == pytest.approx(700e12)


def test_a_plain_tile_takes_what_was_measured(monkeypatch):
    """Upstream's own product through `Cost`, with the epilogue that upstream's kernel has."""
    monkeypatch.setattr(roofline, "instructions", lambda *_: roofline.PLAIN_INSTRUCTIONS)
    case = gpu_case("llama-3-8b", 16384, "all", "forward")
    for k, x in UPSTREAM["triton"].items():
        c = roofline.Cost(case, roofline.Rates(1.0), 8192).product(8192, 8192, k, kind="stash")
        assert c.in_kernels == pytest.approx(2 * 8192**2 * k / (x * 1e12), rel=0.03)


# -- the arithmetic


@pytest.mark.parametrize("kind", ["cool", "hot"])
def test_a_cell_by_hand(report, kind):
    """Llama-3's head, N = 16384, trainable: four groups of two pairs."""
    case = gpu_case("llama-3-8b", 16384, "all", "trainable")
    N, D, V = 16384, 4096, 128256
    scale = {"cool": 790 / 661, "hot": 700 / 665}[kind]
    logits, dhidden, dweight = (scale * x * 1e12 for x in (646, 665, 646))  # k = D, V, 4096
    # outside the loop 3400; a plain tile leaves the full side out, 1300, a full one 2700
    thread = 1300 + (1 - (1 - 256 / V) ** 128) * 1400
    clocks = (thread - 480) * 2 / 0.7
    step = 2 * 128 * 256 * 64 / (scale * 656.4e12 / 132)
    tile = (4096 / 64 + 167.5 / 64 + clocks / 1024) * step
    stash = 32 * 501 / 132 * tile
    small = 4 * 4096 * D + 3 / 4 * 4 * V * D  # bytes a group: scaled rows, sums of dweight
    moved = 4 * small + 4 * N * D + 6 * V * D
    flop = 2 * N * D * V
    launches = 4 * 4 + 3 + 1
    want = 4 * stash + flop / dhidden + flop / dweight + moved / 4.3e12 + launches * 4e-6
    assert roofline.cost(case, "treg_fused", kind).seconds == pytest.approx(want, rel=1e-9)
    bare = flop / logits + flop / dhidden + flop / (scale * 665e12)  # dweight's k is 16384
    assert roofline.cost(case, "gemm_3", kind).seconds == pytest.approx(bare + 12e-6, rel=1e-9)


def test_a_small_cell_is_the_weight_that_is_read(report):
    case = gpu_case("llama-3-8b", 128, "all", "forward")
    read = 2 * case.vocab * case.hidden / 4.3e12
    assert roofline.cost(case, "gemm_1", "cool").seconds == pytest.approx(read, rel=0.08)


def test_a_step_of_few_rows_takes_the_hosts_time(report):
    case = gpu_case("llama-3-8b", 128, "all", "trainable")
    found = roofline.predict(case)
    assert found["treg_fused"] == {"cool": 1.45, "hot": 1.45}
    assert found["treg_logprobs"]["cool"] == 1.15
    assert found["gemm_3"]["cool"] < 1.0  # the host's time of others is not known
    bound = roofline.host_bound_rows("llama-3-8b", "trainable")
    sides = [replace(case, pairs=1, length=rows // 2) for rows in (bound, bound + 32)]
    assert bound > 128
    seconds = [roofline.cost(x, "treg_fused", "cool").seconds for x in sides]
    assert seconds[0] <= 1.45e-3 < seconds[1]


def test_the_hosts_record_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline, "HOST", tmp_path / "host.json")
    for text in (
        '{"before": {}, "after": {"treg_fused": {"fwd_bwd_us": 700.0}}}',
        '{"treg_fused": {"after": {"fwd_bwd_us": 700.0}}, "treg_logprobs": {"after": {}}}',
    ):
        roofline.HOST.write_text(text)
        roofline._host_record.cache_clear()
        assert roofline.host_seconds("treg_packed", "trainable") == pytest.approx(7e-4)
    roofline._host_record.cache_clear()
    assert roofline.host_seconds("trl_chunked", "trainable") == 0.0


# -- what follows from the compiler's report


def test_instructions_follow_the_report(report):
    V = 128256
    assert roofline.instructions("stash", 10**12, False) == pytest.approx(1300, rel=1e-6)
    assert roofline.instructions("stash", 256, False) == 2700  # every tile holds a target
    full = 1 - math.exp(128 * math.log1p(-256 / V))
    assert roofline.instructions("stash", V, False) == pytest.approx(1300 + 1400 * full)
    report += [{**STASH, "case": "stash, bfloat16, all options", "instructions": 9000}]
    assert roofline.epilogue_row("stash", True)["instructions"] == 9000
    report += [{**STASH, "case": "stash, bfloat16, softcap", "instructions": 5000}]
    assert roofline.epilogue_row("stash", True)["instructions"] == 5000
    assert roofline.epilogue_row("stash", False)["instructions"] == 3500
    with pytest.raises(ValueError, match=r"sm90.json: expected a row 'gradient'.*aot_report"):
        roofline.epilogue_row("gradient", True)


def test_a_kernel_nears_the_vendors_as_the_loop_grows():
    """More steps over D, or fewer instructions beside them, and never more than all of it."""
    case, hot = gpu_case("qwen3", 4096, "all", "trainable"), RATES["hot"]
    rates = [roofline.rate("stash", replace(case, hidden=D), hot) for D in (640, 2048, 4096, 8192)]
    assert rates == sorted(rates) and rates[-1] < hot.vendor(8192)
    for head, (D, _, _) in HEADS.items():
        case = gpu_case(head, 4096, "all", "trainable")
        forward, stash = (roofline.rate(kind, case, hot) for kind in ("forward", "stash"))
        assert stash < forward < hot.vendor(D)


@pytest.mark.parametrize("method", ["treg_fused", "treg_logprobs", "treg_smallest", "gemm_3"])
def test_more_work_takes_longer(method):
    def seconds(rows, hidden):
        case = gpu_case("llama-3-8b", rows, "all", "trainable")
        return roofline.cost(replace(case, hidden=hidden), method, "hot").seconds

    by_rows = [seconds(rows, 4096) for rows in (128, 512, 2048, 4096, 16384, 65536)]
    by_hidden = [seconds(4096, hidden) for hidden in (640, 2048, 3584, 4096, 8192)]
    assert by_rows == sorted(set(by_rows)) and by_hidden == sorted(set(by_hidden))


# -- the tables


def test_room_is_where_the_bar_is_just_met():
    found = roofline.outlooks()
    assert [x.margin for x in found] == sorted(x.margin for x in found)
    assert {x.bar.what for x in found} == {x.what for x in roofline.BARS if x.quantity == "time"}
    cases = {case.name: case for case in roofline.gpu_cases()}
    for x in (found[0], found[-1]):
        ours = roofline.cost(cases[x.bar.cell], x.bar.ours, "hot")
        slower = ours.seconds + (x.room["hot"] - 1) * ours.in_kernels
        assert slower / (ours.seconds / x.ratio["hot"]) == pytest.approx(x.bar.limit)
        assert (x.margin >= 0) == (min(x.room.values()) >= 1)
        assert x.bounds[0] < max(x.ratio.values()) < x.bounds[1]


def test_the_notes_hold_the_models_tables():
    text = roofline.NOTES.read_text()
    assert roofline.with_region(text) == text, "run python benchmarks/roofline.py"
    with pytest.raises(ValueError, match="expected the lines"):
        roofline.with_region("no markers")
