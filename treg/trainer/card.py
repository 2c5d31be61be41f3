"""The card of a trained model, with a header that the hub accepts, and what of a run's folder is
pushed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg.data.annotated import is_annotated, read_meta
from treg.losses import LossOptions

TITLE = "T-REG: Preference Optimization with Token-Level Reward Regularization"
CITATION = f"""\
@inproceedings{{zhou2025treg,
  title     = {{{{{TITLE}}}}},
  author    = {{Zhou, Wenxuan and others}},
  booktitle = {{Annual Meeting of the Association for Computational Linguistics}},
  year      = {{2025}},
  eprint    = {{2412.02685}}
}}"""
# as TRL's trainers name the paper of their cards
PAPER = {"title": TITLE, "id": "2412.02685", "citation": CITATION}
# of the sources that are a method of a paper, by their names
SOURCE_PAPERS = {
    "contrastive": "T-REG, arXiv 2412.02685, Eq. 3",
    "redistribution": "RED, arXiv 2411.08302",
    "implicit": "RTO, arXiv 2404.18922",
    "messagewise": "arXiv 2411.00809",
    "entropy": "segment rewards, arXiv 2501.02790",
    "spans": "marks as in arXiv 2306.01693",
    "edits": "FIGA, arXiv 2311.04072",
}
FACTS = (
    "learning_rate",
    "lr_scheduler_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "optim",
    "seed",
    "max_length",
)
RESULTS = ("eval_loss", "eval_rewards/")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
# what a run keeps for itself: its lock, its settings, its data, which may be nobody's business
NOT_PUSHED = (
    "lock",
    "treg_run.json",
    "annotated*.parquet",
    "*.parts/",
    "*.tmp",
    "samples.jsonl",
    "checkpoint-*/",
    "merged/",
)
OBJECTIVE = """
## Objective

{paper}: loss_type={loss_type}, beta={beta}, alpha={alpha}, gamma={gamma},
label_smoothing={label_smoothing}, loss_scalars={scalars}, weighting={weighting}.
"""
REGULARIZER = """
With alpha > 0 a regularizer pulls the policy's implicit token rewards towards those of the data, in
the paper the reference model's under contrastive prompts.
"""


@dataclass(frozen=True)
class Card:
    """A card.

    base, datasets: the model and the data that training began with; those that are names of the hub
    stand in the header, local paths in the text by their last part alone. weights: of the datasets,
    or (). sources: of token rewards, by their names. adapters: whether the weights are those of a
    PEFT adapter. more: of the header, such as language and license.
    """

    name: str
    options: LossOptions
    base: str | None = None
    datasets: Sequence[str] = ()
    sources: Sequence[str] = ()
    weights: Sequence[float] = ()
    adapters: bool = False
    tags: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, float] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def header(self) -> dict[str, Any]:
        """The metadata by name."""
        found: dict[str, Any] = {
            "library_name": "peft" if self.adapters else "transformers",
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(self.tags)),
        }
        if self.base is not None and is_hub_name(self.base):
            found["base_model"] = self.base
        datasets = [x for x in self.datasets if is_hub_name(x)]
        if datasets:
            found["datasets"] = datasets
        return found | {name: x for name, x in self.more.items() if x is not None}

    def __str__(self) -> str:
        # what is JSON is YAML
        header = "".join(f"{name}: {_yaml(x)}\n" for name, x in self.header.items())
        base = "an unnamed model" if self.base is None else _link(self.base)
        weights = self.weights or [1.0] * len(self.datasets)
        named = [
            _link(x, "datasets/") + ("" if w == 1 else f" (weight {w:g})")
            for x, w in zip(self.datasets, weights, strict=True)
        ]
        data = ", ".join(named) or "preference pairs"
        text = f"---\n{header}---\n\n# {self.name}\n\n"
        text += f"A fine-tuned version of {base}, trained on {data} with treg.\n"
        if self.results:
            text += "\n## Evaluation\n\n" + _list(self.results)
        text += OBJECTIVE.format(**vars(self.options), paper=self.options.objective.paper)
        if self.options.alpha > 0:
            text += REGULARIZER
        sources = list(dict.fromkeys(self.sources))
        if sources:
            named = [f"{x} ({SOURCE_PAPERS[x]})" if x in SOURCE_PAPERS else x for x in sources]
            text += f"\nToken rewards: {', '.join(named)}.\n"
        if self.facts:
            text += "\n## Training\n\n" + _list(self.facts)
        text += (
            f"\n## Citation\n\n*{TITLE}*\n([arXiv 2412.02685](https://arxiv.org/abs/2412.02685))"
        )
        return f"{text}.\n\n```bibtex\n{CITATION}\n```\n"


def write_card(
    trainer: Any,
    *,
    tags: str | Sequence[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    dataset: str | Sequence[str] | None = None,
    **more: Any,
) -> None:
    """The card of what a `TRegTrainer` has trained, as README.md in its output folder.

    Args:
        tags: added to the trainer's own, and to those that the card has. finetuned_from, dataset:
            folders or names of the hub; None: those that the trainer was given.
        more: of the card's header, such as language and license.
    """
    args, options = trainer.args, trainer.loss_options
    file = Path(args.output_dir or ".") / "README.md"
    given = [tags] if isinstance(tags, str) else list(tags or [])
    own = ["treg", "preference-optimization", options.loss_type]
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    dataset = trainer.trained_on if dataset is None else dataset
    datasets = [dataset] if isinstance(dataset, str) else list(dataset or [])
    weights = [x.weight for x in trainer.data_shares.get("train_dataset", ())]
    facts = {name: getattr(args, name) for name in FACTS}
    facts = {name: getattr(x, "value", x) for name, x in facts.items()}
    facts |= {"steps": trainer.state.global_step, "epochs": trainer.state.epoch}
    evaluated = [x for x in trainer.state.log_history if "eval_loss" in x]
    results = evaluated[-1] if evaluated else {}
    card = Card(
        name=model_name or file.parent.resolve().name,
        options=options,
        base=finetuned_from or getattr(model.config, "_name_or_path", None) or None,
        datasets=datasets,
        weights=weights if len(weights) == len(datasets) else (),
        sources=[x for data in (*trainer.trained_on, *datasets) for x in _sources_of(data)],
        adapters=hasattr(model, "peft_config"),
        tags=[*given, *own, *tags_of(file)],
        facts=facts,
        results={k: x for k, x in results.items() if k.startswith(RESULTS)},
        more=more,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(card), encoding="utf-8")


def _sources_of(data: Any) -> list[str]:
    """The sources of the streams of an annotated file, by their names."""
    if not is_annotated(data):
        return []
    streams = read_meta(data).get("streams")
    if streams is None:  # the default source stands in no file
        return ["contrastive"]
    return [str(x.get("source")) for x in streams.values()]


def is_hub_name(text: str) -> bool:
    """Whether a text is the name of a model or data set on the hub, and no local path."""
    if Path(text).exists() or text.endswith((".parquet", ".json", ".jsonl", ".gz")):
        return False
    return HUB_NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def keep_from_hub(folder: Path) -> None:
    """Add NOT_PUSHED to the folder's .gitignore, which the hub obeys in an upload."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".gitignore"
    there = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    lacking = [x for x in NOT_PUSHED if x not in there]
    if lacking:
        file.write_text("\n".join([*there, *lacking]) + "\n", encoding="utf-8")


def tags_of(card: Path) -> list[str]:
    """The tags of a card that is there; those alone that stand in a list, one a line or in JSON."""
    if not card.exists():
        return []
    header = card.read_text(encoding="utf-8").split("---")[1:2]
    found = re.search(r"^tags: (\[.*\])$", header[0], re.MULTILINE) if header else None
    if found is not None:
        return list(json.loads(found[1]))
    found = re.search(r"^tags:\n((?:- .*\n)+)", header[0], re.MULTILINE) if header else None
    return [x.removeprefix("- ") for x in found[1].splitlines()] if found else []


def _link(name: str, kind: str = "") -> str:
    if is_hub_name(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{Path(name).name}`"


def _yaml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _list(values: Mapping[str, Any]) -> str:
    shown = {k: f"{x:.4g}" if isinstance(x, float) else x for k, x in values.items()}
    return "".join(f"- {name}: {value}\n" for name, value in shown.items())
