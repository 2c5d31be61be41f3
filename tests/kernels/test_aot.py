"""What the compiler makes of every kernel, without a device: legality, registers, tensor cores; see
aot_worker.py.
"""

import functools
import json

import aot_report
import pytest
import triton
from aot_code import contents_of, instructions
from aot_report import ARCHS

pytestmark = pytest.mark.aot
GEMMS = {"_tile_kernel", "_gradient_kernel", "_active_gradient_kernel", "_product_kernel"}
KERNELS = GEMMS | {
    "_offset_kernel",
    "_combine_kernel",
    "_active_kernel",
    "_list_kernel",
    "_pair_kernel",
    "_kl_kernel",
    "_stash_sum_kernel",
    "_scale_kernel",
}
DESCRIPTORS = ("sm90", "sm100")  # architectures with a copy engine
# Bytes that a thread may spill; 0 where nothing is said. The largest tiles' sums take half of its
# 255 registers. A softcap's tanh and the statistics then find too few, once a tile, outside the
# loop over D (tested on sm90):
OPTIONS_SPILL = {"sm80": 40, "sm90": 480, "sm100": 300}
# Rows that no descriptor can address need a pointer for each element or two:
UNALIGNED_SPILL = {"sm80": 40, "sm90": 60, "sm100": 700}


@functools.cache
def report(arch: str) -> dict:
    """In the form of the record: through JSON."""
    return json.loads(aot_report.to_text(aot_report.compiled(arch)))


def rows(arch: str) -> list[dict]:
    return report(arch)["rows"]


def label(row: dict) -> str:
    return f"{row['kernel']} {row['block']} ({row['case']})"


def products(arch: str) -> list[dict]:
    """The kernels of 16-bit matrix products."""
    return [
        r
        for r in rows(arch)
        if r["kernel"] in GEMMS and "float32" not in r["case"] and r.get("source") != "logits"
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_and_fits(arch):
    assert {r["kernel"] for r in rows(arch)} == KERNELS
    too_large = [label(r) for r in rows(arch) if not r["fits"]]
    assert not too_large, f"more shared memory than {arch} has: {too_large}"


@pytest.mark.parametrize("arch", ARCHS)
def test_spills(arch):
    def most(row):
        allowed = {"unaligned": UNALIGNED_SPILL}
        allowed |= dict.fromkeys(("all options", "softcap"), OPTIONS_SPILL)
        return max(
            (bound.get(arch, 0) for word, bound in allowed.items() if word in row["case"]),
            default=0,
        )

    spills = {label(r): r["spill_bytes"] for r in rows(arch) if r["spill_bytes"] > most(r)}
    assert not spills, spills


def test_no_spill_within_the_loop_over_the_hidden_size():
    inside = [r for r in products("sm90") if "unaligned" not in r["case"]]
    assert inside and all(r["loop"]["matrix"] > 0 and r["loop"]["local"] == 0 for r in inside)


def test_an_odd_vocabulary_and_an_odd_offset_take_the_same_tile():
    """Rows of the stash are apart and hidden is copied: descriptors, and nothing spills."""
    for kind, most in (("stash", 680 + 128), ("gradient", 400)):
        (row,) = [
            r for r in rows("sm90") if r["case"] == f"{kind}, bfloat16, V = 50257" and "source" in r
        ]
        assert (row["block"], row["source"]) == ("128x256x64", "descriptors")
        assert row["spill_bytes"] == 0 and row["plain_epilogue"] <= most
    for kind in ("forward", "stash", "gradient"):
        again = report("sm90")["again"]
        assert again[f"{kind}, bfloat16, hidden at an odd offset"] == f"{kind}, bfloat16"
        if kind != "forward":
            assert again[f"{kind}, bfloat16, V = 128257"] == f"{kind}, bfloat16, V = 50257"


def test_a_softcap_costs_what_it_says():
    """What every tile goes through, a bounded logit's 12 instructions and no spill among it; and a
    plain tile in all, where the slope is one more.
    """
    (row,) = [
        r
        for r in rows("sm90")
        if r["case"] == "stash, bfloat16, softcap, Gemma-2" and "source" in r
    ]
    assert (row["block"], row["source"]) == ("128x256x64", "descriptors")
    assert row["every_epilogue"] <= 1600
    assert row["every_epilogue"] + row["plain_epilogue"] <= 2550


@pytest.mark.parametrize("arch", ARCHS)
def test_16_bit_products_run_on_tensor_cores(arch):
    assert {r["kernel"] for r in products(arch)} == GEMMS
    without = [label(r) for r in products(arch) if r["matrix"] == 0]
    assert not without, f"no tensor-core instruction on {arch}: {without}"


def test_one_loop_over_all_tiles_prefetches_across_epilogues():
    """Of each step, both copies are issued before the epilogue, and products are not waited for."""
    found = [r for r in rows("sm90") if "one loop" in r["case"] and r["kernel"] in GEMMS]
    assert len(found) == 3
    for r in found:
        assert r["loads_before_epilogue"] == r["loop"]["tma_loads"] == 2, label(r)
        assert r["loop"]["matrix"] == 4 and r["loop"]["local"] == 0, label(r)
        assert r["every_epilogue"] + r["plain_epilogue"] > 3 * r["loop"]["instructions"], label(r)
    others = [r for r in products("sm90") if "one loop" not in r["case"]]
    assert others and not any("loads_before_epilogue" in r for r in others)


@pytest.mark.parametrize("arch", DESCRIPTORS)
def test_the_copy_engine_reads_what_it_can_address(arch):
    found = [r for r in products(arch) if "source" in r]
    assert {r["source"] for r in found} == {"descriptors", "pointers"}
    for r in found:
        aligned = "unaligned" not in r["case"]
        assert (r["source"] == "descriptors") == aligned == (r["tma_loads"] > 0), label(r)
        writes = r["case"].startswith(("stash", "gradient"))
        assert (r["tma_stores"] > 0) == (aligned and writes), label(r)


@pytest.mark.parametrize("arch", sorted(set(ARCHS) - set(DESCRIPTORS) - {"gfx942"}))
def test_without_a_copy_engine_aligned_rows_are_copied_asynchronously(arch):
    for r in products(arch):
        if "unaligned" not in r["case"]:
            assert r["async_copies"] > 0 and r["tma_loads"] == 0, label(r)


@pytest.mark.parametrize("arch", ARCHS)
def test_as_many_blocks_a_multiprocessor_as_programs_are_launched(arch):
    tiled = [r for r in rows(arch) if "programs" in r]
    assert tiled and any(r["programs"] for r in tiled) == (arch in DESCRIPTORS)
    for r in tiled:
        assert r["blocks_per_sm"] >= max(1, r["programs"]), label(r)


def test_no_batch_needs_a_kernel_of_its_own():
    """Rows that start anywhere, and any number of them: what two batches have compiled serves
    all. What compiles in the middle of a training takes seconds.
    """
    found = aot_report.said_of("sm90", "aot_keys.py")
    assert len(found) > 10 and {name: anew for name, anew in found.items() if anew} == {}


@pytest.mark.parametrize("arch", ARCHS)
def test_no_atomics(arch):
    """Atomics would make the same inputs give different bits."""
    assert not [label(r) for r in rows(arch) if r["atomics"]]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_record_is_what_is_compiled(arch):
    """A change of a kernel comes with its record: python benchmarks/aot_report.py."""
    record = aot_report.recorded(arch)
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of Triton {record['triton']}, this is {triton.__version__}")
    assert report(arch)["again"] == record["again"], "run python benchmarks/aot_report.py"
    now = {(r["case"], r["kernel"], i): r for i, r in enumerate(rows(arch))}
    then = {(r["case"], r["kernel"], i): r for i, r in enumerate(record["rows"])}
    assert now.keys() == then.keys(), "run python benchmarks/aot_report.py"
    assert now == then, "run python benchmarks/aot_report.py"


def test_the_tables_are_those_of_the_records():
    reports = [aot_report.recorded(arch) for arch in ARCHS]
    assert (aot_report.OUT / "README.md").read_text() == aot_report.readme(reports)


SASS = """
        /*0000*/                   S2R R7, SR_TID.X ;
        /*0010*/              @!P1 BRA 0x60 ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/               @P5 BRA 0x20 ;
        /*0060*/               @P3 BRA 0xa0 ;
        /*0070*/                   STL [R1], R2 ;
        /*0080*/                   FADD R0, R1, R2 ;
        /*0090*/                   BRA 0xd0 ;
        /*00a0*/                   FADD R0, R1, R2 ;
        /*00b0*/                   FADD R0, R1, R2 ;
        /*00b8*/                   FADD R0, R1, R2 ;
        /*00c0*/              @!P0 ATOMG.E.ADD PT, R2, desc[UR4][R2.64], R5 ;
        /*00d0*/               @P2 BRA 0x10 ;
        /*00e0*/                   EXIT ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""
# a step that leaps over a tile's end
FLAT_SASS = """
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR24], R24 ;
        /*0020*/                   UTMALDG.2D [UR8], [UR4] ;
        /*0030*/               @P0 BRA 0xc0 ;
        /*0040*/                   FADD R0, R1, R2 ;
        /*0050*/               @P3 BRA 0x90 ;
        /*0060*/                   FADD R0, R1, R2 ;
        /*0070*/                   FADD R0, R1, R2 ;
        /*0080*/                   BRA 0xb0 ;
        /*0090*/                   STL [R1], R2 ;
        /*00a0*/                   FADD R0, R1, R2 ;
        /*00b0*/                   FADD R0, R1, R2 ;
        /*00b4*/                   FADD R0, R1, R2 ;
        /*00c0*/               @P5 BRA 0x10 ;
        /*00e0*/                   EXIT ;
"""


def test_reading_a_loop_over_all_tiles():
    found = contents_of(instructions(FLAT_SASS), sides=True)
    loop = {"instructions": 4, "matrix": 1, "tma_loads": 1, "local": 0}
    assert {key: found["loop"][key] for key in loop} == loop
    assert found["loads_before_epilogue"] == 1
    assert [found[f"{side}_epilogue"] for side in ("every", "plain", "full")] == [2, 2, 3]


def test_reading_machine_code():
    found = contents_of(instructions(SASS), sides=True)
    loop = {"instructions": 4, "matrix": 1, "tma_loads": 1, "barriers": 1, "local": 0}
    assert {key: found["loop"][key] for key in loop} == loop
    assert (found["instructions"], found["local"], found["atomics"]) == (17, 1, 1)
    # of every tile: the branch itself is the one instruction
    assert [found[f"{side}_epilogue"] for side in ("every", "plain", "full")] == [1, 3, 4]
    longer = SASS.replace("               @P3 BRA", "  FADD R1, R1, R2 ;\n /*0064*/  @P3 BRA")
    assert contents_of(instructions(longer), sides=True)["every_epilogue"] == 2
    without_else = SASS.replace("BRA 0xd0 ;", "FADD R0, R1, R2 ;")
    assert "plain_epilogue" not in contents_of(instructions(without_else), sides=True)
    assert "loop" not in contents_of(instructions(SASS.replace("HGMMA", "FFMA")), sides=True)
