"""treg inspect: annotated pairs and a trained model's implicit rewards as a page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treg.cli.loading import drawable, load_model, load_tokenizer, say
from treg.cli.options import InspectOptions, parse, words
from treg.cli.runs import last_history
from treg.data.annotated import read_annotated, streams_of, tokenizer_fingerprint
from treg.files import read_json
from treg.rewards import DEFAULT_SOURCE, nearest
from treg.rewards.annotate import process_state
from treg.viz import plot_curves, print_pairs, write_page
from treg.viz.views import pair_views

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
    examples = examples[: options.limit]
    tokenizer = _tokenizer(options, meta)
    run = Path(options.run or options.model or ".")
    settings = _settings(run)
    history = last_history(run) if options.run or options.model else []
    beta = options.beta if options.beta is not None else settings.get("beta", 0.1)
    reference = options.ref_model
    kept = "ref_chosen_token_logps" in examples[0]
    if options.model is not None and reference is None and not kept:
        reference = settings.get("ref_model") or settings.get("model")  # what the run started from
    stream = _stream(options.stream, streams_of(meta))
    pairs = pair_views(
        examples,
        tokenizer,
        policy=_load(options.model),
        reference=_load(reference),
        beta=beta,
        stream=stream,
    )
    suffix = f".{options.stream}.html" if options.stream else ".html"
    output = Path(options.output or Path(options.data).with_suffix(suffix))
    facts = {"data": options.data, "stream": stream, "source": _source(meta, stream)}
    facts |= {"model": options.model or "none"}
    facts |= {name: str(settings[name]) for name in FACTS if name in settings}
    facts["beta"] = str(beta)
    curves = {run.name: history} if drawable(history) else None
    title = f"{stream.replace('_', ' ').capitalize()}: {Path(options.data).name}"
    write_page(output, pairs, title=title, settings=facts, history=curves)
    if options.curves:
        if curves is None:
            raise ValueError(
                f"curves: expected a training run with a log in {run}, found none; give it with "
                "--run"
            )
        plot_curves(curves, options.curves)
    if options.terminal:
        print_pairs(pairs)
    say(f"{len(pairs)} pair{'s' * (len(pairs) != 1)}", f"wrote {output}")


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


def _load(path: str | None) -> Any:
    return None if path is None else load_model(path, "auto", process_state().device)


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
