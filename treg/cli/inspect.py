"""treg inspect: annotated pairs and a trained model's implicit rewards as a page."""

import json
from pathlib import Path
from typing import Any

from treg.cli.loading import drawable, load_model, load_tokenizer, say
from treg.cli.options import InspectOptions, parse
from treg.data.annotated import read_annotated, tokenizer_fingerprint
from treg.files import last_checkpoint
from treg.rewards.annotate import process_state
from treg.viz import plot_curves, print_pairs, write_page
from treg.viz.views import pair_views

# what a page says of a run
FACTS = (
    "loss_type",
    "beta",
    "alpha",
    "gamma",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "use_peft",
    "seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "ref_model",
)


def run(argv: list[str]) -> None:
    text = """\
Show annotated pairs token by token on one self-contained HTML page, with a trained model's implicit rewards beside the
token rewards, and the curves of its training.

  treg inspect --data annotated.parquet --tokenizer MODEL
  treg inspect --data out/annotated.parquet --model out --output page.html --terminal"""
    (o,) = parse("inspect", argv, (InspectOptions,), text)

    if o.limit < 1:
        raise ValueError(f"limit: expected a positive number of pairs, got {o.limit}")
    examples, meta = read_annotated(o.data)
    examples = examples[: o.limit]
    if (o.tokenizer or o.model) is None:
        raise ValueError(
            "tokenizer: expected --tokenizer or --model to decode the tokens, got neither"
        )
    tokenizer = load_tokenizer(o.tokenizer or o.model)
    if tokenizer_fingerprint(tokenizer) != meta["fingerprint"]["tokenizer"]:
        raise ValueError(
            f"tokenizer: {o.data} was annotated with another tokenizer or chat template; give --tokenizer"
        )
    run = Path(o.run or o.model or ".")
    settings = (
        json.loads((run / "treg_run.json").read_text()) if (run / "treg_run.json").exists() else {}
    )
    history = _history(run) if o.run or o.model else []
    beta = o.beta if o.beta is not None else settings.get("beta", 0.1)
    reference = o.ref_model
    if o.model is not None and reference is None and "ref_chosen_token_logps" not in examples[0]:
        reference = settings.get("ref_model") or settings.get("model")  # what the run started from
    models = [
        None if x is None else load_model(x, "auto", process_state().device)
        for x in (o.model, reference)
    ]
    pairs = pair_views(examples, tokenizer, policy=models[0], reference=models[1], beta=beta)
    output = Path(o.output or Path(o.data).with_suffix(".html"))
    facts = {
        "data": o.data,
        "model": o.model or "none",
        **{k: settings[k] for k in FACTS if k in settings},
        "beta": beta,
    }
    facts = {k: str(v) for k, v in facts.items()}
    curves = {run.name: history} if drawable(history) else None
    write_page(
        output, pairs, title=f"Token rewards: {Path(o.data).name}", settings=facts, history=curves
    )
    if o.curves:
        if curves is None:
            raise ValueError(
                f"curves: expected a training run with a log in {run}, found none; give it with --run"
            )
        plot_curves(curves, o.curves)
    if o.terminal:
        print_pairs(pairs)
    say(f"{len(pairs)} pairs", f"wrote {output}")


def _history(run: Path) -> list[dict[str, Any]]:
    """The log of a training run: of the whole, or of its last checkpoint."""
    folder = run if (run / "trainer_state.json").exists() else last_checkpoint(run)
    return (
        []
        if folder is None
        else json.loads((folder / "trainer_state.json").read_text())["log_history"]
    )
