"""The demo: token rewards on a small world with known truth, and what they change in training.

annotate    preference pairs are scored by the tiny chat model under the contrastive prompts; since
            it is known which tokens are wrong, -rhat and the model's surprise are judged as
            detectors of them (AUROC)
train       DPO and T-REG, from the same model, on the same pairs in the same order, for the same
            steps
evaluate    held-out pairs (reward accuracy, margin); held-out questions are answered by sampling,
            and each answer is checked against the table of facts
"""

import copy
import json
import logging
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from treg.data import SIDES, EncodeOptions
from treg.data.annotated import read_annotated
from treg.demo.detection import detection, in_spans
from treg.demo.worlds import WORLDS
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.trainer import TRegConfig, TRegTrainer
from treg.viz import write_page
from treg.viz.views import pair_views

WORLD = "rumours"
CONTROL = "T-REG, shuffled"
METHODS = {"DPO": 0.0, "T-REG": 0.5, CONTROL: 0.5}  # alpha
BETA = 0.1
EPOCHS = 1
BATCH = 10
PAIRS = 200
SHOWN = 40  # pairs of the page
TRUTH = "wrong fact"  # what is marked on it
# the truth takes no part in training: its tokens are watched
REWARDS = {
    "sources": [
        {"stream": "contrastive", "name": "contrastive"},
        {"stream": "marks", "name": "spans", "column": "{side}_marks"},
    ],
    "mix": {"contrastive": 1.0},
}
LONGEST = 128  # tokens of an answer
# what is measured of a policy
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
Table = tuple[list[str], list[list[str]]]  # header, rows


def run(
    output: str = "treg-demo", seeds: int = 3, pairs: int | None = None, world: str = WORLD
) -> dict[str, Any]:
    """Run the demo, print what it measures, and leave data, page and a JSON of the results in
    output.

    Args:
        output: folder, made where it is missing.
        seeds: training runs of each method.
        pairs: preference pairs to train on; None: 200.
        world: a key of WORLDS.
    Returns:
        What results.json holds: world, auroc, before, runs, table, pairs, device.
    Raises:
        ValueError: seeds or pairs below 1; no such world.
    """
    if world not in WORLDS:
        raise ValueError(f"world: expected one of {', '.join(WORLDS)}, got {world!r}")
    place = WORLDS[world]
    pairs = PAIRS if pairs is None else pairs
    for name, value in (("seeds", seeds), ("pairs", pairs)):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
    out, start = Path(output), time.perf_counter()
    quiet()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(place.MODEL)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(place.MODEL, dtype=torch.float32)
    model = model.to(device)
    print(
        f"treg demo on {device}: a chat model of {model.num_parameters() / 1e6:.1f} M parameters "
        f"that knows {len(place.TOWNS)} invented towns, {place.ERRS}"
    )

    rows = {
        "train": place.preference_rows(0, pairs, "train"),
        "held-out": place.preference_rows(1, place.HELD_OUT_PAIRS, "test"),
    }
    files, found = {}, {}
    for name, pair_rows in rows.items():
        files[name] = _annotate(model, tokenizer, pair_rows, out / name)
    for name, pair_rows in rows.items():
        found[name] = detection(files[name], pair_rows, tokenizer)
    _print_detection(found)

    print(
        f"\ntraining: {len(METHODS)} methods x {seeds} seeds, {pairs} pairs, {EPOCHS} epoch, "
        f"beta {BETA}, alpha {METHODS['T-REG']}, learning rate {place.LEARNING_RATE}"
    )
    before = {"method": "before", "seed": 0, **answer_questions(place, model, tokenizer, seed=0)}
    trained = _train_all(place, model, tokenizer, files, out, seeds)
    table = _table(before, trained.runs)
    _print_table(*table)
    results = {
        "world": world,
        "auroc": found,
        "before": before,
        "runs": trained.runs,
        "table": table,
    }
    results |= {"pairs": pairs, "device": device, "learning rate": place.LEARNING_RATE}
    (out / "results.json").write_text(json.dumps(results, indent=1))

    _write_page(
        out / "report.html", trained, tokenizer, files["held-out"], rows["held-out"], results
    )
    print(
        f"\n{time.perf_counter() - start:.0f} s; open {out / 'report.html'}; "
        f"the numbers are in {out / 'results.json'}"
    )
    return results


def _write_page(
    path: Path, trained: "Trained", tokenizer: Any, file: Path, rows: Sequence[dict], results: dict
) -> None:
    """The page of held-out pairs, on which the tokens of wrong facts are marked."""
    examples = read_annotated(file)[0][:SHOWN]
    pairs = []
    for example, pair in zip(
        examples,
        pair_views(examples, tokenizer, policy=trained.policies["T-REG"], beta=BETA),
        strict=True,
    ):
        sides = {}
        for side in SIDES:
            wrong = in_spans(rows[example["index"]][f"wrong_{side}"], getattr(pair, side).pieces)
            sides[side] = replace(getattr(pair, side), marked=np.flatnonzero(wrong).tolist())
        pairs.append(replace(pair, **sides))
    facts = {
        "pairs": results["pairs"],
        "epochs": EPOCHS,
        "beta": BETA,
        "alpha": METHODS["T-REG"],
        "batch": BATCH,
        "learning rate": results["learning rate"],
        "device": results["device"],
    }
    header, *detected = _detection_table(results["auroc"])
    write_page(
        path,
        pairs,
        title="treg demo: token rewards on a world of known truth",
        settings={name: str(value) for name, value in facts.items()},
        history=trained.history,
        tables=[
            (
                "Held-out questions and pairs, mean (standard deviation) over seeds",
                *results["table"],
            ),
            (
                "AUROC as detectors of wrong facts (1 finds them all, 0.5 is chance)",
                header,
                detected,
            ),
        ],
        alpha=METHODS["T-REG"],
        truth=TRUTH,
    )


def quiet() -> None:
    """Nothing but the demo's own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)


def _annotate(model: Any, tokenizer: Any, rows: Sequence[dict], stem: Path) -> Path:
    """Rows as a JSONL file and, beside it, annotated."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    source, target = stem.with_suffix(".jsonl"), stem.with_suffix(".parquet")
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target.unlink(missing_ok=True)
    shutil.rmtree(f"{target}.parts", ignore_errors=True)
    start = time.perf_counter()
    options = AnnotateOptions(
        EncodeOptions(512),
        tokens_per_batch=8192,
        per_token=True,
        rewards="several",
        rewards_options=REWARDS,
    )
    report = annotate(model, tokenizer, source, target, options, progress=False)
    print(f"annotated {report.kept} {stem.name} pairs in {time.perf_counter() - start:.1f} s")
    return target


def _print_detection(found: dict[str, dict[str, dict[str, float]]]) -> None:
    print("\nAUROC as detectors of wrong facts (1 finds them all, 0.5 is chance)")
    table = _detection_table(found)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *cells in table:
        numbers = "  ".join(x.rjust(w) for x, w in zip(cells, widths[1:], strict=True))
        print(f"  {name.ljust(widths[0])}  {numbers}")


def _detection_table(found: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    """A header, and a row for each set of pairs and score."""
    columns = next(iter(next(iter(found.values())).values()))
    rows = [["", *columns]]
    for pairs, scores in found.items():
        for score, aurocs in scores.items():
            rows.append([f"{pairs} pairs, {score}", *(f"{x:.3f}" for x in aurocs.values())])
    return rows


def shuffled(examples: Sequence[dict], tokenizer: Any, seed: int) -> list[dict]:
    """Examples whose token rewards are permuted within each response: as large as before, in the
    wrong places.
    """
    rng = np.random.default_rng(seed)
    mixed = []
    for example in examples:
        example = dict(example)
        for side in SIDES:
            is_text = ~np.isin(example[f"{side}_ids"], tokenizer.all_special_ids)
            rewards = example[f"{side}_token_rewards"].copy()
            rewards[is_text] = rng.permutation(rewards[is_text])
            example[f"{side}_token_rewards"] = rewards
        mixed.append(example)
    return mixed


def swapped(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example whose chosen answer is the rejected one, and the other way round."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    found = {}
    for name, value in example.items():
        found["_".join(other.get(part, part) for part in name.split("_"))] = value
    return found


@dataclass
class Trained:
    """What the training runs left."""

    runs: list[dict[str, Any]]  # method, seed, and COLUMNS of each run
    history: dict[str, list[dict]]  # the log of each run, by "method/seed"
    policies: dict[str, Any]  # the last policy of each method


def _train_all(
    world: Any, model: Any, tokenizer: Any, files: dict[str, Path], out: Path, seeds: int
) -> Trained:
    """Every method with every seed."""
    trained = Trained([], {}, {})
    data = {method: read_annotated(files["train"])[0] for method in METHODS}
    for seed in range(seeds):
        data[CONTROL] = shuffled(data["T-REG"], tokenizer, seed)
        for method, alpha in METHODS.items():
            policy, measured, log = train_once(
                world,
                model,
                tokenizer,
                data[method],
                str(files["held-out"]),
                out,
                alpha=alpha,
                seed=seed,
            )
            trained.runs.append({"method": method, "seed": seed, **measured})
            trained.history[f"{method}/{seed}"] = log
            trained.policies[method] = policy
            print(
                f"  {method:15} seed {seed}: wrong facts {measured['wrong facts']:.1%}, "
                f"held-out accuracy {measured['accuracy']:.2f}, {measured['train s']:.1f} s"
            )
    return trained


def config(out: Path, seed: int, **changes: Any) -> TRegConfig:
    """The demo's training, with changes, the learning rate among them: arguments of TRegConfig by
    name.
    """
    settings: dict[str, Any] = {
        "beta": BETA,
        "num_train_epochs": EPOCHS,
        "seed": seed,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 64,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return TRegConfig(str(out / "run"), **(settings | changes))


def train_once(
    world: Any,
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
    args = config(out, seed, alpha=alpha, learning_rate=world.LEARNING_RATE)
    trainer = TRegTrainer(policy, None, args, train, held_out, tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    memory = _PeakMemory()
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    peak = memory.mib()
    scores = trainer.evaluate()
    measured = {
        **answer_questions(world, policy, tokenizer, seed),
        "accuracy": scores["eval_rewards/accuracies"],
        "margin": scores["eval_rewards/margins"],
        "alignment": scores["eval_treg/alignment"],
        "train s": seconds,
        "peak MiB": peak,
    }
    return policy, measured, trainer.state.log_history


def answer_questions(world: Any, model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """Answers to held-out questions, sampled at temperature 1: the share of wrong facts, and of
    malformed answers.
    """
    questions = world.prompts("test") * world.SAMPLES
    answers = sampled(model, tokenizer, questions, seed)
    checks = [world.check(q, answer) for q, answer in zip(questions, answers, strict=True)]
    wrong = sum(check.wrong for check in checks)
    facts = wrong + sum(check.right for check in checks)
    return {
        "wrong facts": wrong / max(facts, 1),
        "facts an answer": facts / len(checks),
        "malformed": sum(check.malformed for check in checks) / len(checks),
    }


@torch.inference_mode()
def sampled(
    model: Any, tokenizer: Any, questions: Sequence[str], seed: int, longest: int = LONGEST
) -> list[str]:
    """An answer to each question, sampled at temperature 1, of so many tokens at most."""
    texts = []
    for question in questions:
        messages = [{"role": "user", "content": question}]
        texts.append(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
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
        max_new_tokens=longest,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    prompt_length = batch["input_ids"].shape[1]
    return tokenizer.batch_decode(ids[:, prompt_length:], skip_special_tokens=True)


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
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1024
        return float("nan")


def _table(before: dict[str, Any], runs: Sequence[dict[str, Any]]) -> Table:
    """A row for each method: mean and, over more than one seed, (standard deviation)."""
    rows = []
    for method in ("before", *METHODS):
        cells = [method]
        for column in COLUMNS:
            values = []
            for measured in (before, *runs):
                if measured["method"] == method and column in measured:
                    values.append(measured[column])
            cells.append(_cell(column, values))
        rows.append(cells)
    return ["method", *COLUMNS], rows


def _cell(column: str, values: Sequence[float]) -> str:
    if not values:
        return "-"
    if column in ("wrong facts", "malformed"):
        form = "{:.1%}"
    elif column == "peak MiB":
        form = "{:.0f}"
    else:
        form = "{:.2f}"
    text = form.format(statistics.mean(values))
    if len(values) > 1:
        text += f" ({form.format(statistics.stdev(values))})"
    return text


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print("\nheld-out questions and pairs, mean (standard deviation) over seeds")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for method, *numbers in (header, *rows):
        cells = [method.ljust(widths[0])]
        for number, width in zip(numbers, widths[1:], strict=True):
            cells.append(number.rjust(width))
        print("  ".join(cells))
