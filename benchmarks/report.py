"""What docs/speed.md says of speed and memory, tables and pictures, from the records in results/
alone.

    python benchmarks/report.py [--check]

Rewrites the page between its two bench markers and the pictures beside the records; for a GPU
also report.md, every cell with the times that `roofline.py` predicts for an H200 beside it. Prints
the bars. --check only says whether the page is what the records give.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import gpu_bars
from bars import FLOOR, HALF, HELD, TIMED, instructions_text
from loss_head_cases import DEVICE, Case, gpu_cases
from loss_head_peers import METHODS

HERE = Path(__file__).parent
PAGE, RESULTS = HERE.parent / "docs" / "speed.md", HERE / "results"
BEGIN, END = (
    "<!-- bench: python benchmarks/report.py writes what follows -->",
    "<!-- bench: end -->",
)
MODE_COLUMN = {"trainable": 0, "frozen": 1, "forward": 2}
CPU_ROWS = {
    "treg, fused": "treg_fused",
    "dense, gather - logsumexp": "dense_logsumexp",
    "dense, log_softmax": "dense_log_softmax",
    "Liger DPO": "liger_dpo",
    "the three matrix products alone": FLOOR,
    "treg, half of the tokens ignored": HALF,
}


def region(results: Path = RESULTS) -> str:
    """The page between the markers."""
    return "\n\n".join(
        [
            BEGIN,
            cpu_part(json.loads((results / "cpu" / "bars.json").read_text())),
            gpu_part(gpu_records(results)),
            end_to_end_part(results / "cpu"),
            END,
        ]
    )


def gpu_records(results: Path = RESULTS) -> dict[str, dict]:
    """Records of GPUs by the name of their folder."""
    return {
        path.parent.name: json.loads(path.read_text())
        for path in sorted(results.glob("*/loss_head.json"))
    }


def cpu_part(found: dict) -> str:
    env, medians = found["environment"], {k: x["median_seconds"] for k, x in found["time"].items()}
    exact = medians["bf16"]["treg_fused_exact_logits"]
    rows = [
        f"| {label} | {medians['fp32'][name]:.2f} | {medians['bf16'][name]:.2f}"
        f"{f' ({exact:.2f} with exact logits)' if name == 'treg_fused' else ''} |"
        for label, name in CPU_ROWS.items()
    ]
    shape = HELD["treg_fused"][1]
    held = {k: f"{x / 2**20:.0f}" for k, x in found["memory"]["peak_extra_bytes"].items()}
    torch = env["versions"]["torch"].partition("+")[0]
    has = f" ({instructions_text(found['instructions'])})" if "instructions" in found else ""
    about = f"""On a CPU, {env["cores"]} cores of an {env["device"]}{has}, torch {torch}, medians of
        {found["time"]["fp32"]["rounds"]} rounds in turn: T-REG forward and backward with a
        trainable head, {TIMED.rows} scored tokens ({TIMED.pairs} pairs of 2 x {TIMED.length}),
        D {TIMED.hidden}, V {TIMED.vocab}. `python benchmarks/bars.py`; the record, with the ratios'
        spread, is `benchmarks/results/cpu/bars.json`."""
    memory = f"""Extra peak memory in a cold process, float32, {shape.rows} tokens,
        D {shape.hidden}, V {shape.vocab}: treg {held["treg_fused"]} MiB, dense
        {held["dense_log_softmax"]} (log_softmax) or {held["dense_logsumexp"]} MiB
        (logsumexp); with twice and four times the tokens treg takes
        {held["treg_fused, 2 N"]} and {held["treg_fused, 4 N"]} MiB."""
    lines = ["| seconds | float32 | bfloat16 |", "|---|---|---|", *rows]
    return "\n\n".join([_paragraph(about), "\n".join(lines), _paragraph(memory)])


def end_to_end_part(folder: Path) -> str:
    """Training step and annotation; folder: of the record."""
    import end_to_end_table as table

    record = folder / "end_to_end.json"
    parts = ["## A training step and annotation, end to end"]
    text = """Tokens a second count a pair as 2P + R_w + R_l tokens, whatever a method runs. All
        methods compute the same DPO loss, with the reference's log-probs from the data, and take
        turns; the floor is a bare forward and backward of P + R_w + R_l tokens, or a bare forward
        of as many tokens as annotation ran. Peak memory is beyond the weights, of a first call in a
        process of its own. `python benchmarks/bench_end_to_end.py [--model FOLDER]`"""
    if not record.exists():
        return "\n\n".join([*parts, _paragraph(f"{text}; not measured yet.")])
    parts.append(_paragraph(f"{text}; the record is `benchmarks/results/cpu/end_to_end.json`."))
    for model, found in json.loads(record.read_text())["models"].items():
        env = found["environment"]
        clock = "its own time" if env["threads"] == 1 else "the clock"
        of_cpu = f"{env['threads']} of {env['cores']} cores of an {env['device']}"
        about = f"{model}, {found['parameters'] / 1e6:.0f} million parameters, {found['dtype']}"
        for name, cell in found["cells"].items():
            n = len(cell["lengths"])
            rounds = min(cell[part]["rounds"] for part in table.TITLES if part in cell)
            title = f"""{about}, {name}, {n} pair{"s" * (n > 1)} a step, medians of {rounds} rounds
                with {of_cpu}, seconds of {clock}:"""
            parts += [_paragraph(title), table.markdown(cell, env["threads"])]
    return "\n\n".join(parts)


def _paragraph(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False
    )


def gpu_part(records: dict[str, dict]) -> str:
    if not records:
        return _paragraph("""On a GPU: not measured yet. `python benchmarks/gpu_run.py` measures,
            in slices that end in time, this project beside TRL, Liger, QuACK, cut-cross-entropy,
            verl, PyTorch and bare matrix products; `benchmarks/roofline.py` says what
            to expect, `benchmarks/NOTES.md` what came.""")
    parts = []
    for slug, record in records.items():
        env = record["stages"].get("environment", {})
        about, ceilings = env.get("environment", {}), env.get("ceilings")
        reached = (
            ""
            if not ceilings
            else (
                f", where a large bfloat16 product reaches {ceilings['matmul_tflops']:.0f} "
                f"TFLOP/s and a copy {ceilings['copy_gb_per_s']:.0f} GB/s"
            )
        )
        torch = about.get("versions", {}).get("torch", "?")
        text = f"""On one {about.get("device", slug)}{reached}, torch {torch}: times over times, all
            methods of a cell in turn, cool (idle before each call) and hot (back to back), and
            errors against float64. All cells: `benchmarks/results/{slug}/report.md`."""
        parts += [_paragraph(text), gpu_bars.table(record["cells"])]
    return "\n\n".join(parts)


def full_report(record: dict, predicted: dict[str, dict]) -> str:
    """Every cell: milliseconds, their ratio to the bare products, TFLOP/s, GiB, errors, the
    prediction.
    """
    parts = [gpu_bars.table(record["cells"])]
    for case in gpu_cases():
        cell = record["cells"].get(case.name)
        if cell is not None and cell.keys() & {"failed", "methods"}:
            text = (
                f"failed: {cell['failed']}"
                if "failed" in cell
                else _cell_table(case, cell, predicted)
            )
            parts.append(f"## {case.name}\n\n{text}")
    return "\n\n".join(parts) + "\n"


def _cell_table(case: Case, cell: dict, predicted: dict[str, dict]) -> str:
    kinds = [kind for kind in ("cool", "hot") if any(kind in m for m in cell["methods"].values())]
    head = [f"{kind} ms | predicted | / bare" for kind in kinds]
    scheme = 3 - MODE_COLUMN[case.mode]  # products that no exact method can do without
    rates = f"TFLOP/s of {2 * scheme} N D V | of its own products"
    lines = [
        f"| | {' | '.join(head)} | {rates} | extra GiB | errors: log-probs, dhidden, dweight |",
        "|" + "---|" * (3 * len(kinds) + 5),
    ]
    bare = cell["methods"].get(f"gemm_{scheme}", {})
    for name, found in cell["methods"].items():
        if "hot" not in found:
            lines.append(
                f"| {name} | {found.get('failed') or found.get('reason')} |"
                + " |" * (3 * len(kinds) + 3)
            )
            continue
        row = [name]
        for kind in kinds:
            guess = predicted.get(case.name, {}).get(name, {}).get(kind)
            mine = found.get(kind, {}).get("median")  # others' methods are not all timed cool
            over = mine / bare[kind]["median"] if mine is not None and kind in bare else None
            row += [_number(mine), _number(guess), _number(over)]
        per_product = case.flops_per_product / found["hot"]["median"] / 1e9
        own = (
            METHODS[name].products[MODE_COLUMN[case.mode]]
            if case.mask == "all" and name in METHODS
            else None
        )
        held, errors = found.get("extra_bytes"), found.get("errors", {})
        row += [
            _number(scheme * per_product),
            _number(own and own * per_product),
            _number(held and held / 2**30),
        ]
        row.append(
            ", ".join(f"{errors[k]:.1e}" for k in ("logprobs", "dhidden", "dweight") if k in errors)
        )
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def with_region(text: str, new: str) -> str:
    """A text with what stands between the markers replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected the lines {BEGIN!r} and {END!r}")
    return before + new + after


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = PAGE.read_text()
    fresh = with_region(page, region())
    if args.check:
        print(
            f"{PAGE.name} is what the records give"
            if fresh == page
            else f"{PAGE.name}: run python benchmarks/report.py"
        )
        return int(fresh != page)
    import plots

    PAGE.write_text(fresh)
    found = json.loads((RESULTS / "cpu" / "bars.json").read_text())
    plots.cpu(found, FLOOR, RESULTS / "cpu" / "bars.svg")
    end_to_end = RESULTS / "cpu" / "end_to_end.json"
    if end_to_end.exists():
        plots.end_to_end(json.loads(end_to_end.read_text()), end_to_end.with_suffix(".svg"))
    records = gpu_records()
    predicted = json.loads((RESULTS / "predicted-h200.json").read_text())
    cases = {case.name: case for case in gpu_cases()}
    for slug, record in records.items():
        (RESULTS / slug / "report.md").write_text(full_report(record, predicted))
        cells = {
            (c.head, c.nominal_rows, c.mask, c.mode): record["cells"][name]["methods"]
            for name, c in cases.items()
            if "methods" in record["cells"].get(name, {})
        }
        plots.gpu(cells, RESULTS / slug)
        print(f"{slug}\n\n{gpu_bars.table(record['cells'])}\n")
    if not records:
        hint = " (there is one here: gpu_run.py)" if DEVICE == "cuda" else ""
        print(f"no GPU has been measured{hint}\n")
        print(gpu_bars.table({}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
