"""Every preference method on the demo's world: the same start, pairs and steps, one table.

    python examples/compare_methods.py [--methods dpo treg-true] [--seeds 0 1 2] [--steps 20]
        [--pairs 200] [--learning_rate 1e-3] [--output methods.json]

A chat model of a million parameters that knows invented towns, and errs, is trained on pairs in
which chosen answers have wrong facts too (`treg.demo.world`). Each run ends with the same three
measures on towns that no pair was about:

    wrong facts    of answers to questions, sampled at temperature 1
    malformed      sampled answers with anything in them that is no sentence about the town
    ranked right   pairs whose chosen answer has the larger sum_t (lp_t - ref_t), whatever was
                   trained on

What token rewards need is made first: a DPO model, one of swapped pairs, a reward model. They are
trained on the same pairs, with a seed of their own.

Every finished run is in the output at once. The same command again trains what is missing. Needs
the extra `train`; a quarter of an hour on two cores at most.
"""

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from treg.data import EncodeOptions
from treg.data.annotated import read_annotated
from treg.demo import run as demo
from treg.demo import world
from treg.demo.detection import ALL, REWARD, detection
from treg.demo.records import Record, environment
from treg.losses import OBJECTIVES
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.trainer import TRegTrainer

HELPER_SEED = 1000  # of the models that token rewards need
REWARD_EPOCHS, REWARD_RATE = 3, 1e-4
PACKAGES = ("torch", "transformers", "accelerate")
MEASURES = ("wrong facts", "malformed", "ranked right", "seconds")


@dataclass(frozen=True)
class Signal:
    """Token rewards or weights: a source, its options, and how they are shaped. The options model
    and base name one of the models that are trained here.
    """

    source: str
    options: dict[str, Any] = field(default_factory=dict)
    shaping: tuple[str, ...] = ()


# one spread and one limit for all rewards that T-REG takes: those of the contrastive ones
SCALED = ("standardise=0.16", "clip=0.5")
SIGNALS = {
    "none": Signal("constant"),  # the objective looks at no token rewards
    "contrastive": Signal("contrastive"),
    "surprise": Signal("surprise", shaping=SCALED),
    "entropy": Signal("entropy", shaping=SCALED),
    "implicit": Signal("implicit", {"model": "dpo"}),
    "implicit, scaled": Signal("implicit", {"model": "dpo"}, SCALED),
    "implicit of two": Signal("implicit", {"model": "dpo", "base": "reversed", "beta": 1.0}),
    "red, scaled": Signal("redistribution", {"model": "reward"}, SCALED),
    "edits": Signal("edits"),
    "edits, scaled": Signal("edits", shaping=SCALED),
    "true": Signal("spans", {"column": "{side}_marks"}),
    "mask": Signal("messagewise"),  # of contrastive rewards
    "shuffled": Signal("shuffled"),  # the contrastive ones
    "random": Signal("random", {"spread": 0.16}),
}


@dataclass(frozen=True)
class Method:
    """A row of the table: an objective, the signal in its data, and arguments of TRegConfig."""

    group: str
    loss: str
    signal: str = "none"
    changes: dict[str, Any] = field(default_factory=dict)
    rate: float = world.LEARNING_RATE


WHOLE, TREG = "whole answers", "T-REG"
CREDIT, TRUTH, CONTROLS = "other token credit", "with the true marks", "controls"
PER_TOKEN_MEAN = {"beta": 2.0, "gamma": 1.0}  # of objectives whose reward is a mean over tokens
ALPHA = {"alpha": demo.METHODS["T-REG"]}
METHODS = {
    "dpo": Method(WHOLE, "dpo"),
    "treg-contrastive": Method(TREG, "dpo", "contrastive", ALPHA),
    "treg-surprise": Method(TREG, "dpo", "surprise", ALPHA),
    "treg-entropy": Method(TREG, "dpo", "entropy", ALPHA),
    "treg-implicit": Method(TREG, "dpo", "implicit, scaled", ALPHA),
    "treg-red": Method(TREG, "dpo", "red, scaled", ALPHA),
    "treg-edits": Method(TREG, "dpo", "edits, scaled", ALPHA),
    "treg-simpo": Method(TREG, "simpo", "contrastive", PER_TOKEN_MEAN | ALPHA),
    "treg-true": Method(TRUTH, "dpo", "true", ALPHA),
    "messagewise-true": Method(TRUTH, "messagewise", "true"),
    "treg-shuffled": Method(CONTROLS, "dpo", "shuffled", ALPHA),
    "treg-random": Method(CONTROLS, "dpo", "random", ALPHA),
    # what larger steps do by themselves
    "dpo-faster": Method(CONTROLS, "dpo", rate=5e-4),
    "simpo": Method(WHOLE, "simpo", changes=PER_TOKEN_MEAN),
    "ipo": Method(WHOLE, "ipo"),
    "tgdpo": Method(CREDIT, "tgdpo", "implicit"),
    "tis_dpo": Method(CREDIT, "tis_dpo", "implicit of two"),
    "sepo": Method(CREDIT, "sepo", "implicit", {"beta": 1.0}),
    "d2po": Method(CREDIT, "d2po"),
    "confpo": Method(CREDIT, "confpo", changes=PER_TOKEN_MEAN),
    "messagewise": Method(CREDIT, "messagewise", "contrastive"),
    "figa": Method(CREDIT, "figa", "edits"),
    "tdpo1": Method(CREDIT, "tdpo1"),
    "tdpo2": Method(CREDIT, "tdpo2"),
    "sparsepo": Method(CREDIT, "sparsepo", "mask"),
    "robust": Method(WHOLE, "robust", changes={"label_smoothing": 0.1}),
    "exo_pair": Method(WHOLE, "exo_pair", changes={"label_smoothing": 0.1}),
    "hinge": Method(WHOLE, "hinge"),
    "nca_pair": Method(WHOLE, "nca_pair"),
    "bco_pair": Method(WHOLE, "bco_pair"),
    "apo_zero": Method(WHOLE, "apo_zero"),
    "apo_down": Method(WHOLE, "apo_down"),
    "sppo_hard": Method(WHOLE, "sppo_hard"),
    "discopop": Method(WHOLE, "discopop"),
    "orpo": Method(WHOLE, "orpo"),
    "cpo": Method(WHOLE, "cpo"),
}
# bfpo is not there: no answer of this world is safe or unsafe


class Study:
    """The world, the model that all start from, and what is made of them when it is asked for."""

    def __init__(self, pairs: int, steps: int, folder: Path):
        self.steps = steps
        self.folder = folder
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(world.MODEL)
        self.start: Any = transformers.AutoModelForCausalLM.from_pretrained(
            world.MODEL, dtype=torch.float32
        )
        self.rows = world.preference_rows(0, pairs, "train")
        self.held_out_rows = world.preference_rows(1, world.HELD_OUT_PAIRS, "test")
        self.held_out = self._annotated("held-out", self.held_out_rows, SIGNALS["none"])
        # of each signal: seconds, AUROC; of the reward model: which share of pairs it ranks right
        self.signals: dict[str, dict[str, float]] = {}
        self._examples: dict[str, list[dict]] = {}
        self._helpers: dict[str, str] = {}

    def train(self, method: Method, seed: int, rate: float) -> tuple[Any, float]:
        """A policy and the seconds of its training."""
        return self._trained(method, self.examples(method.signal), seed, rate)

    def ranked_right(self, policy: Any) -> float:
        """The share of held-out pairs that a policy ranks right, as DPO's accuracy."""
        args = demo.config(self.folder, 0, loss_type="dpo", alpha=0.0, learning_rate=0.0)
        judge = TRegTrainer(policy, None, args, None, self.held_out, self.tokenizer)
        judge.remove_callback(transformers.PrinterCallback)
        return judge.evaluate()["eval_rewards/accuracies"]

    def examples(self, name: str) -> list[dict]:
        """The training pairs with a signal, a key of SIGNALS."""
        if name not in self._examples:
            signal = SIGNALS[name]
            models = {}
            for option in ("model", "base"):
                if option in signal.options:
                    models[option] = self._helper(signal.options[option])
            options = signal.options | models
            start = time.perf_counter()
            filled = Signal(signal.source, options, signal.shaping)
            self._examples[name] = self._annotated(name, self.rows, filled)
            seconds = time.perf_counter() - start
            file = self.folder / f"{name}.parquet"
            auroc = detection(file, self.rows, self.tokenizer)[REWARD][ALL]
            self.signals[name] = {"seconds": seconds, "auroc": auroc}
            say(f"signal {name}: {seconds:.1f} s, AUROC of wrong tokens {auroc:.3f}")
        return self._examples[name]

    def _annotated(self, name: str, rows: Sequence[dict], signal: Signal) -> list[dict]:
        options = AnnotateOptions(
            EncodeOptions(512),
            tokens_per_batch=8192,
            per_token=True,
            rewards=signal.source,
            rewards_options=signal.options,
            shaping=signal.shaping,
        )
        file = self.folder / f"{name}.parquet"
        annotate(self.start, self.tokenizer, rows, file, options, progress=False, strict=True)
        return read_annotated(file)[0]

    def _trained(
        self, method: Method, examples: Sequence[dict], seed: int, rate: float
    ) -> tuple[Any, float]:
        changes = {"alpha": 0.0, "learning_rate": rate, "max_steps": self.steps} | method.changes
        args = demo.config(self.folder, seed, loss_type=method.loss, **changes)
        policy = copy.deepcopy(self.start)
        # a KL divergence needs a reference that runs; the others find its log-probs in the data
        with_kl = "kl" in OBJECTIVES[method.loss].needs
        reference = copy.deepcopy(self.start) if with_kl else None
        trainer = TRegTrainer(policy, reference, args, examples, None, self.tokenizer)
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        return policy, time.perf_counter() - start

    def _helper(self, name: str) -> str:
        """The folder of a model that token rewards need."""
        if name not in self._helpers:
            start = time.perf_counter()
            model = self._reward_model() if name == "reward" else self._dpo_model(name)
            path = self.folder / f"model-{name}"
            model.save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            self._helpers[name] = str(path)
            say(f"model {name}: {time.perf_counter() - start:.1f} s")
        return self._helpers[name]

    def _dpo_model(self, name: str) -> Any:
        """DPO on the pairs, or on the pairs with their answers swapped."""
        examples = self.examples("none")
        if name == "reversed":
            examples = [demo.swapped(example) for example in examples]
        dpo = METHODS["dpo"]
        return self._trained(dpo, examples, HELPER_SEED, dpo.rate)[0]

    def _reward_model(self) -> Any:
        """The start with a linear head, trained by -log sigma(R_w - R_l)."""
        torch.manual_seed(HELPER_SEED)
        model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
            world.MODEL, num_labels=1, dtype=torch.float32
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=REWARD_RATE)
        for _ in range(REWARD_EPOCHS):
            for some in torch.randperm(len(self.rows)).split(demo.BATCH):
                better, worse = self._rewards(model, [self.rows[i] for i in some]).chunk(2)
                loss = -torch.nn.functional.logsigmoid(better - worse).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        model.eval()
        self.signals["reward model"] = {
            "training pairs ranked right": self._ranked_right_by(model, self.rows),
            "held-out pairs ranked right": self._ranked_right_by(model, self.held_out_rows),
        }
        return model

    @torch.no_grad()
    def _ranked_right_by(self, model: Any, rows: Sequence[dict]) -> float:
        better, worse = self._rewards(model, rows).chunk(2)
        return (better > worse).double().mean().item()

    def _rewards(self, model: Any, rows: Sequence[dict]) -> torch.Tensor:
        """R of the chosen answers, then of the rejected ones, [2 rows]."""
        texts = []
        for side in ("chosen", "rejected"):
            for row in rows:
                messages = row["prompt"] + row[side]
                texts.append(self.tokenizer.apply_chat_template(messages, tokenize=False))
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """All that changes a row but its seed and its learning rate."""
    methods = {}
    for name in args.methods:
        method = METHODS[name]
        methods[name] = {
            "loss_type": method.loss,
            "changes": method.changes,
            "signal": asdict(SIGNALS[method.signal]),
        }
    return {
        "pairs": args.pairs,
        "steps": args.steps,
        "pairs a step": demo.BATCH,
        "beta": demo.BETA,
        "held-out pairs": world.HELD_OUT_PAIRS,
        "answers": len(world.prompts("test")) * world.SAMPLES,
        "helpers": {"seed": HELPER_SEED, "epochs": REWARD_EPOCHS, "learning rate": REWARD_RATE},
        "methods": methods,
    }


def compare(args: argparse.Namespace, folder: Path) -> Record:
    """Train and measure what the record does not have."""
    record = Record(args.output, settings_of(args))
    todo = []
    for seed in dict.fromkeys(args.seeds):
        for name in dict.fromkeys(("before", *args.methods)):
            rate = None if name == "before" else args.learning_rate or METHODS[name].rate
            if not record.has(**{"method": name, "seed": seed, "learning rate": rate}):
                todo.append((name, seed, rate))
    if not todo:
        return record
    start = time.perf_counter()
    study = Study(args.pairs, args.steps, folder)
    say(f"{len(todo)} runs of {args.steps} steps on {len(study.rows)} pairs")
    record.began(" ".join(["python", *sys.argv]), environment(1, PACKAGES))
    for i, (name, seed, rate) in enumerate(todo, 1):
        row = {"method": name, "seed": seed, "learning rate": rate}
        policy = study.start
        if rate is not None:  # the start ranks no pair: all of its margins are 0
            policy, row["seconds"] = study.train(METHODS[name], seed, rate)
            row["ranked right"] = study.ranked_right(policy)
        row |= demo.answer_questions(world, policy, study.tokenizer, seed)
        record.content.setdefault("signals", {}).update(study.signals)
        record.take(row)
        say(
            f"{i}/{len(todo)} {name}, seed {seed}: "
            f"{', '.join(f'{x} {row[x]:.3f}' for x in MEASURES if x in row)}; "
            f"{time.perf_counter() - start:.0f} s so far"
        )
    return record


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row for each method and learning rate, mean (standard deviation) over seeds; in
    each group the fewest wrong facts first. The last column is the difference of wrong facts from
    DPO at its own learning rate, seed by seed.
    """
    runs: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for row in rows:
        runs.setdefault((row["method"], row["learning rate"]), []).append(row)
    dpo = {x["seed"]: x["wrong facts"] for x in runs.get(("dpo", METHODS["dpo"].rate), [])}
    groups = ["before", *dict.fromkeys(method.group for method in METHODS.values())]

    def place(key: tuple[str, float | None]) -> tuple[int, float]:
        group = METHODS[key[0]].group if key[0] in METHODS else "before"
        return groups.index(group), statistics.mean(x["wrong facts"] for x in runs[key])

    lines = [f"| | learning rate | {' | '.join(MEASURES)} | wrong facts - DPO's |"]
    lines.append("|---" * (len(MEASURES) + 3) + "|")
    last = 0
    for name, rate in sorted(runs, key=place):
        group, _ = place((name, rate))
        if group != last:
            lines.append(f"| **{groups[group]}** |" + " |" * (len(MEASURES) + 2))
            last = group
        cells = [name, format(rate, "g") if rate else ""]
        for measure in MEASURES:
            values = [x[measure] for x in runs[name, rate] if measure in x]
            cells.append(cell(values, "" if measure in ("ranked right", "seconds") else "%"))
        found = [x["wrong facts"] - dpo[x["seed"]] for x in runs[name, rate] if x["seed"] in dpo]
        cells.append(cell(found, "%", sign="+"))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: Sequence[float], unit: str = "", sign: str = "") -> str:
    """Mean and, of more than one value, (standard deviation)."""
    if not values:
        return ""
    form = ".1%" if unit else ".2f"
    text = format(statistics.mean(values), sign + form)
    if len(values) > 1:
        text += f" ({statistics.stdev(values):{form}})"
    return text


def say(text: str) -> None:
    print(text, flush=True)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=demo.PAIRS // demo.BATCH)
    parser.add_argument("--pairs", type=int, default=demo.PAIRS)
    parser.add_argument("--learning_rate", type=float, help="the same one for all methods")
    parser.add_argument("--output", type=Path, default=Path("methods.json"))
    args = parser.parse_args(given)
    for name in ("steps", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"{name}: expected a positive integer, got {getattr(args, name)}")
    if args.learning_rate is not None and not 0 < args.learning_rate < float("inf"):
        parser.error(f"learning_rate: expected a positive number, got {args.learning_rate}")
    return args


def main() -> None:
    args = arguments()
    demo.quiet()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        record = compare(args, Path(folder))
    say(f"\n{table(record.rows)}\n\nrecord: {args.output}")


if __name__ == "__main__":
    main()
