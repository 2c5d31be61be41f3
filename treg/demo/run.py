"""The demo: token rewards on a small world with known truth, and what they change in training.

annotate    preference pairs are scored by the tiny chat model under the contrastive prompts; since it is known which
            tokens are wrong, -rhat is judged as a detector of them (AUROC)
train       DPO and T-REG, from the same model, on the same pairs in the same order, for the same steps
evaluate    held-out pairs (reward accuracy, margin); held-out questions are answered by sampling, and each answer is
            checked against the table of facts
"""

import copy
import json
import logging
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from treg.data import SIDES, EncodeOptions
from treg.data.annotated import read_annotated
from treg.demo import world
from treg.evaluate import auroc
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.base import content_length
from treg.trainer import TRegConfig, TRegTrainer
from treg.viz import token_pieces, write_page
from treg.viz.views import pair_views

MODEL = Path(__file__).parent / "model"
CONTROL = "T-REG, shuffled"
METHODS = {"DPO": 0.0, "T-REG": 0.5, CONTROL: 0.5}  # alpha
BETA, LEARNING_RATE, EPOCHS, BATCH, PAIRS = 0.1, 3e-4, 1, 10, 200
HELD_OUT_PAIRS, SAMPLES = 128, 3  # answers to each held-out question


def run(output: str = "treg-demo", seeds: int = 5, pairs: int | None = None) -> dict[str, Any]:
    """Run the demo, print what it measures, and leave data, page and a JSON of the results in
    output.

    Args:
        seeds: training runs of each method. pairs: preference pairs to train on; None: 200.
    Returns:
        What results.json holds: auroc, runs, table.
    Raises:
        ValueError: seeds or pairs below 1.
    """
    pairs = PAIRS if pairs is None else pairs
    for name, value in (("seeds", seeds), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
    out, start = Path(output), time.perf_counter()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    print(
        f"treg demo on {device}: a chat model of {model.num_parameters() / 1e6:.1f} M parameters that knows "
        f"{len(world.TOWNS)} invented towns, and errs"
    )

    rows = {
        "train": world.preference_rows(0, pairs, "train"),
        "held-out": world.preference_rows(1, HELD_OUT_PAIRS, "test"),
    }
    files = {}
    for name, found in rows.items():
        files[name] = _annotate(model, tokenizer, found, out / name)
    auroc = {name: wrong_token_auroc(files[name], rows[name], tokenizer) for name in rows}
    print(
        "\nAUROC as detectors of the tokens that state a wrong fact (0.5 is chance; the model knows this world well)"
    )
    for name, found in auroc.items():
        print(f"  {name:9} pairs: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))

    runs, history, last = [], {}, {}
    print(
        f"\ntraining: {len(METHODS)} methods x {seeds} seeds, {pairs} pairs, {EPOCHS} epoch, beta {BETA}, "
        f"alpha {METHODS['T-REG']}, learning rate {LEARNING_RATE}"
    )
    before = {"method": "before", "seed": 0, **answer_questions(model, tokenizer, seed=0)}
    train = {method: read_annotated(files["train"])[0] for method in METHODS}
    for seed in range(seeds):
        train[CONTROL] = shuffled(train["T-REG"], tokenizer, seed)
        for method, alpha in METHODS.items():
            data = train[method], str(files["held-out"])
            policy, found, log = train_once(model, tokenizer, *data, out, alpha=alpha, seed=seed)
            runs.append({"method": method, "seed": seed, **found})
            history[f"{method}/{seed}"], last[method] = log, policy
            print(
                f"  {method:15} seed {seed}: wrong facts {found['wrong facts']:.1%}, held-out accuracy "
                f"{found['accuracy']:.2f}, {found['train s']:.1f} s"
            )
    table = _table(before, runs)
    _print_table(*table)
    results = {"auroc": auroc, "before": before, "runs": runs, "table": table}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    examples, _ = read_annotated(files["held-out"])
    shown = pair_views(examples[:40], tokenizer, policy=last["T-REG"], beta=BETA)
    write_page(
        out / "report.html",
        shown,
        title="treg demo: token rewards on a world of known truth",
        settings={
            "pairs": str(pairs),
            "epochs": str(EPOCHS),
            "beta": str(BETA),
            "batch": str(BATCH),
            "learning rate": str(LEARNING_RATE),
            "alpha": str(METHODS["T-REG"]),
            "device": device,
        },
        history=history,
        tables=[("Held-out questions and pairs, mean (standard deviation) over seeds", *table)],
    )
    print(
        f"\n{time.perf_counter() - start:.0f} s; open {out / 'report.html'}; the numbers are in {out / 'results.json'}"
    )
    return results


def _annotate(model: Any, tokenizer: Any, rows: Sequence[dict], stem: Path) -> Path:
    """Rows as a JSONL file and, beside it, annotated."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    source, target = stem.with_suffix(".jsonl"), stem.with_suffix(".parquet")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target.unlink(missing_ok=True)
    shutil.rmtree(f"{target}.parts", ignore_errors=True)
    start = time.perf_counter()
    options = AnnotateOptions(EncodeOptions(512), tokens_per_batch=8192, per_token=True)
    report = annotate(model, tokenizer, source, target, options, progress=False)
    print(f"annotated {report.kept} {stem.name} pairs in {time.perf_counter() - start:.1f} s")
    return target


def wrong_token_auroc(file: Path, rows: Sequence[dict], tokenizer: Any) -> dict[str, float]:
    """How well the token rewards, and the model's own surprise, tell the tokens of wrong values
    from the others.

    A token is positive if its text overlaps the span of a wrong value. Tokens that end a response
    are left out.
    """
    examples, _ = read_annotated(file)
    labels, scores = [], {"-rhat": [], "-log pi_ref": []}
    for x in examples:
        for side in SIDES:
            ids = x[f"{side}_ids"]
            n = content_length(ids.tolist(), tokenizer)
            ends = np.cumsum([len(p) for p in token_pieces(ids[:n], tokenizer)])
            starts = np.concatenate([[0], ends[:-1]])
            wrong = np.zeros(n, bool)
            for a, b in rows[x["index"]][f"wrong_{side}"]:
                wrong |= (starts < b) & (ends > a)
            labels.append(wrong)
            scores["-rhat"].append(-x[f"{side}_token_rewards"][:n])
            scores["-log pi_ref"].append(-x[f"ref_{side}_token_logps"][:n])
    return {
        name: auroc(np.concatenate(parts), np.concatenate(labels)) for name, parts in scores.items()
    }


def shuffled(examples: Sequence[dict], tokenizer: Any, seed: int) -> list[dict]:
    """Examples whose token rewards are permuted within each response: as large as before, in the
    wrong places.
    """
    rng, special = np.random.default_rng(seed), tokenizer.all_special_ids
    mixed = []
    for x in examples:
        x = dict(x)
        for side in SIDES:
            text = ~np.isin(x[f"{side}_ids"], special)
            rewards = x[f"{side}_token_rewards"].copy()
            rewards[text] = rng.permutation(rewards[text])
            x[f"{side}_token_rewards"] = rewards
        mixed.append(x)
    return mixed


def train_once(
    model: Any,
    tokenizer: Any,
    train: Sequence[dict],
    held_out: str,
    out: Path,
    *,
    alpha: float,
    seed: int,
) -> tuple[Any, dict[str, float], list[dict]]:
    """One training run from a copy of model: the policy, what was measured, the log."""
    policy = copy.deepcopy(model)
    args = TRegConfig(
        str(out / "run"),
        beta=BETA,
        alpha=alpha,
        learning_rate=LEARNING_RATE,
        num_train_epochs=EPOCHS,
        seed=seed,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=64,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        logging_steps=4,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = TRegTrainer(policy, None, args, train, held_out, tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    memory, start = _PeakMemory(), time.perf_counter()
    trainer.train()
    seconds, peak = time.perf_counter() - start, memory.mib()
    scores = trainer.evaluate()
    found = {
        **answer_questions(policy, tokenizer, seed),
        "accuracy": scores["eval_rewards/accuracies"],
        "margin": scores["eval_rewards/margins"],
        "alignment": scores["eval_treg/alignment"],
        "train s": seconds,
        "peak MiB": peak,
    }
    return policy, found, trainer.state.log_history


@torch.inference_mode()
def answer_questions(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """Answers to held-out questions, sampled at temperature 1: the share of wrong facts, and of
    malformed answers.
    """
    questions = world.prompts("test") * SAMPLES
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    torch.manual_seed(seed)
    model.eval()
    ids = model.generate(
        input_ids=batch["input_ids"].to(model.device),
        attention_mask=batch["attention_mask"].to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(
        ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    checks = [world.check(q, a) for q, a in zip(questions, answers, strict=True)]
    wrong, right = sum(c.wrong for c in checks), sum(c.right for c in checks)
    return {
        "wrong facts": wrong / max(wrong + right, 1),
        "facts an answer": (wrong + right) / len(checks),
        "malformed": sum(c.malformed for c in checks) / len(checks),
    }


class _PeakMemory:
    """The most memory that a process, or its GPU, held since this was made."""

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS

    def mib(self) -> float:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next(
            (int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")),
            float("nan"),
        )


COLUMNS = (
    "wrong facts",
    "facts an answer",
    "malformed",
    "accuracy",
    "margin",
    "alignment",
    "train s",
    "peak MiB",
)


def _table(
    before: dict[str, Any], runs: Sequence[dict[str, Any]]
) -> tuple[list[str], list[list[str]]]:
    """Header, and a row for each method: mean and, over more than one seed, (standard
    deviation).
    """
    rows = []
    for method in ("before", *METHODS):
        cells = [method]
        for column in COLUMNS:
            values = [x[column] for x in (before, *runs) if x["method"] == method and column in x]
            percent = column in ("wrong facts", "malformed")
            form = "{:.1%}" if percent else "{:.0f}" if column == "peak MiB" else "{:.2f}"
            text = form.format(statistics.mean(values)) if values else "-"
            if len(values) > 1:
                text += f" ({form.format(statistics.stdev(values))})"
            cells.append(text)
        rows.append(cells)
    return ["method", *COLUMNS], rows


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    print("\nheld-out questions and pairs, mean (standard deviation) over seeds")
    for row in (header, *rows):
        print(
            "  ".join(
                cell.rjust(w) if i else cell.ljust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
