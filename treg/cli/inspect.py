"""treg inspect: annotated pairs and a trained model's implicit rewards as a page."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from treg.cli.loading import DEFAULT_DTYPE, drawable, load_model, load_tokenizer, say
from treg.cli.options import InspectOptions, parse, words
from treg.cli.runs import last_history
from treg.data.annotated import (
    model_fingerprint,
    read_annotated,
    streams_of,
    tokenizer_fingerprint,
)
from treg.files import read_json
from treg.rewards import DEFAULT_SOURCE, nearest
from treg.rewards.annotate import process_state
from treg.viz import plot_curves, print_pairs, write_page
from treg.viz.views import pair_views

# tokens of a forward: small on a CPU, where larger ones are no faster and the bar would stand still
CPU_BATCH, GPU_BATCH = 2048, 16384
USUAL_ALPHA = 0.25  # where the run does not say it
# what a page says of a run
FACTS = words(
    """
    loss_type loss_scalars beta alpha gamma learning_rate num_train_epochs max_steps use_peft seed
    per_device_train_batch_size gradient_accumulation_steps ref_model
    """
)


def run(argv: list[str]) -> None:
    (options,) = parse("inspect", argv, (InspectOptions,))
    if options.limit < 1:
        raise ValueError(f"limit: expected a positive number of pairs, got {options.limit}")
    examples, meta = read_annotated(options.data)
    count = len(examples)
    examples = examples[: options.limit]
    tokenizer = _tokenizer(options, meta)
    run = Path(options.run or options.model or ".")
    settings = _settings(run)
    history = last_history(run) if options.run or options.model else []
    beta = options.beta if options.beta is not None else settings.get("beta", 0.1)
    stream = _stream(options.stream, streams_of(meta))
    models = _models(options, meta, settings, "ref_chosen_token_logps" in examples[0])
    pairs = pair_views(
        examples,
        tokenizer,
        policy=models.policy,
        reference=models.reference,
        beta=beta,
        tokens_per_batch=CPU_BATCH if _device().type == "cpu" else GPU_BATCH,
        stream=stream,
        progress=process_state().is_main_process,
    )
    suffix = f".{options.stream}.html" if options.stream else ".html"
    output = Path(options.output or Path(options.data).with_suffix(suffix))
    facts = {"data": options.data, "stream": stream, "source": _source(meta, stream)}
    facts |= {"pairs": f"{len(pairs)} of {count}", "model": options.model or "none"}
    if models.policy is not None:
        facts["dtype"] = _plain(models.policy.dtype)
    facts |= {name: str(settings[name]) for name in FACTS if settings.get(name) is not None}
    facts["beta"] = str(beta)
    curves = {run.name: history} if drawable(history) else None
    title = f"{stream.replace('_', ' ').capitalize()}: {Path(options.data).name}"
    write_page(
        output,
        pairs,
        title=title,
        settings=facts,
        history=curves,
        notes=models.notes,
        alpha=USUAL_ALPHA if settings.get("alpha") is None else settings["alpha"],
    )
    if options.curves:
        if curves is None:
            raise ValueError(
                f"curves: expected a training run with a log in {run}, found none; give it with "
                "--run"
            )
        plot_curves(curves, options.curves)
    if options.terminal:
        print_pairs(pairs)
    say(*models.notes, f"{len(pairs)} pair{'s' * (len(pairs) != 1)}", f"wrote {output}")


def _tokenizer(options: InspectOptions, meta: dict[str, Any]) -> Any:
    """The tokenizer that the file was annotated with, if it says which."""
    path = options.tokenizer or options.model
    if path is None:
        raise ValueError(
            "tokenizer: expected --tokenizer or --model to decode the tokens, got neither"
        )
    tokenizer = load_tokenizer(path)
    found = meta.get("fingerprint", {}).get("tokenizer")
    if found is not None and found != tokenizer_fingerprint(tokenizer):
        raise ValueError(
            f"tokenizer: {options.data} was annotated with another tokenizer or chat template; "
            "give --tokenizer"
        )
    return tokenizer


@dataclass
class _Models:
    """policy: the trained model; reference: what it is compared with, None: the log-probs that the
    file keeps. notes: what a reader must know of the two.
    """

    policy: Any = None
    reference: Any = None
    notes: list[str] = field(default_factory=list)


def _models(
    options: InspectOptions, meta: dict[str, Any], settings: dict[str, Any], kept: bool
) -> _Models:
    """The models to compare, both in one dtype: a reference of another one differs from the policy
    by its roundings, which would be taken for implicit rewards.

    kept: whether the file keeps the reference's log-prob of each token.
    """
    if options.model is None:
        return _Models()
    policy = _load(options.model, options, settings)
    if options.ref_model is not None:
        return _Models(policy, _load(options.ref_model, options, settings))
    made_by = meta.get("fingerprint", {}).get("model")
    if made_by is not None and made_by == model_fingerprint(policy, adapters=True):
        note = "The model is the one that made the annotation: every implicit reward is 0."
        return _Models(policy, policy, [note])
    begun_from = settings.get("ref_model") or settings.get("model")
    if not kept:
        reference = None if begun_from is None else _load(begun_from, options, settings)
        return _Models(policy, reference)
    made, now = _precision_of(meta), _plain(policy.dtype)
    if made is None or made == now:
        return _Models(policy)
    if begun_from is not None and Path(begun_from).is_dir():
        note = (
            f"The file's reference log-probs were made in {made} and the model runs in {now}, so "
            f"the reference was run again in {now}."
        )
        return _Models(policy, _load(begun_from, options, settings), [note])
    note = (
        f"The file's reference log-probs were made in {made} and the model runs in {now}: "
        "a part of the implicit rewards is rounding. Give the reference model with --ref_model, or "
        "run the model in the same dtype with --dtype."
    )
    return _Models(policy, None, [note])


def _load(path: str, options: InspectOptions, settings: dict[str, Any]) -> Any:
    """A model in the dtype that was asked for; else in that of the run, else as every command."""
    device = _device()
    dtype = options.dtype or settings.get("dtype") or DEFAULT_DTYPE
    if process_state().is_main_process:
        print(f"loading {path} in {dtype} on {device}", file=sys.stderr, flush=True)
    return load_model(path, dtype, device)


def _device() -> torch.device:
    return torch.device(process_state().device or "cpu")


def _precision_of(meta: dict[str, Any]) -> str | None:
    """The dtype in which the file's log-probs were computed, if it says so."""
    made = meta.get("settings", {})
    found = made.get("autocast") or made.get("dtype")
    return None if found is None else _plain(found)


def _plain(dtype: Any) -> str:
    """bfloat16 of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _stream(given: str | None, streams: Sequence[str]) -> str:
    """The stream to show, of those that the file has."""
    if given is None:
        return "token_rewards" if "token_rewards" in streams else streams[0]
    if given not in streams:
        raise ValueError(
            f"stream: expected one of {', '.join(streams)}, which the file has, got {given!r}"
            f"{nearest(given, streams)}"
        )
    return given


def _source(meta: dict[str, Any], stream: str) -> str:
    """What made a stream, as far as the file says it."""
    if "streams" in meta:
        return str(meta["streams"].get(stream, {}).get("source", "unknown"))
    return DEFAULT_SOURCE if stream == "token_rewards" else "unknown"


def _settings(run: Path) -> dict[str, Any]:
    """The options of a training run; none where the folder holds no run."""
    file = run / "treg_run.json"
    return read_json(file) if file.exists() else {}
