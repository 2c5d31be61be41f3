"""What an annotation is made with, as its file and its parts keep it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treg.data import EncodeOptions, Pair, common_prefix, described
from treg.data.annotated import ID_COLUMNS, read_annotated, read_meta, tokenizer_fingerprint
from treg.data.fingerprints import config_of, model_fingerprint
from treg.data.served import SAME_MODEL, distance
from treg.files import read_json
from treg.rewards.annotate_options import AnnotateOptions
from treg.rewards.base import Context, TokenRewardSource
from treg.rewards.engines import Engine
from treg.rewards.names import DEFAULT_SOURCE
from treg.rewards.parts import MANIFEST
from treg.rewards.registry import make_options, streams_given
from treg.rewards.several import SeveralSource
from treg.rewards.shaping import shaped_streams

SERVER = "server"  # what a server says of itself
CUTTING = ("tokens_per_batch", "share_prefix")  # settings that change roundings only


def made_with_of(
    context: Context,
    fingerprint: str,
    rewards: TokenRewardSource,
    pairs: Sequence[Pair],
    options: AnnotateOptions,
) -> dict[str, Any]:
    """What goes into the metadata besides the report. fingerprint: of the model.

    The settings of the default source stand among the file's, as they always did; those of any
    other, and of one that is shaped, stand under `streams`, which the default file does not have.
    """
    model = context.model
    own = _json_settings(rewards)
    default = options.rewards == DEFAULT_SOURCE
    settings: dict[str, Any] = {"encode": _encode_settings(options.encode)}
    if default:
        settings |= own
    served = isinstance(model, Engine)
    settings |= {
        "tokens_per_batch": options.tokens_per_batch,
        "per_token": options.per_token,
        "share_prefix": options.share_prefix,
    }
    if not options.reference:
        settings["reference"] = False
    if served:
        settings = {k: v for k, v in settings.items() if k not in CUTTING} | {"engine": "server"}
    else:
        settings |= {"dtype": str(model.dtype), "autocast": _autocast(model.device.type)}
    made_with: dict[str, Any] = {
        "fingerprint": {
            "model": fingerprint,
            "tokenizer": tokenizer_fingerprint(context.tokenizer),
            "pairs": _pairs_fingerprint(pairs),
        },
        "config": {} if served else config_of(model),
        "settings": settings,
    }
    if served:
        made_with[SERVER] = model.said()
    if not default or options.steps:
        made_with["streams"] = _described(rewards, options, own)
    return made_with


def fingerprint_of(model: Any) -> str:
    """Of a model that runs here, with its adapters, or of an engine."""
    if isinstance(model, Engine):
        return model.fingerprint
    return model_fingerprint(model, adapters=True)


def _encode_settings(options: EncodeOptions) -> dict[str, Any]:
    """How rows became ids; of what was added later, only what is not the default."""
    default, given = asdict(EncodeOptions()), asdict(options)
    always = ("max_length", "chat")
    return {x: given[x] for x in given if x in always or given[x] != default[x]}


def _described(
    rewards: TokenRewardSource, options: AnnotateOptions, settings: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Of each stream: its source, the source's settings, and the shaping."""
    own = {"source": options.rewards, "settings": settings, "shaping": []}
    described = dict.fromkeys(rewards.streams, own)
    if isinstance(rewards, SeveralSource):
        described |= rewards.described
    return _with_steps(described, options)


def _with_steps(described: dict[str, dict[str, Any]], options: AnnotateOptions) -> dict[str, Any]:
    """Streams after the steps that follow their sources' own."""
    steps = list(map(str, options.steps))
    for stream in shaped_streams(described):
        shaping = described[stream]["shaping"] + steps
        described[stream] = described[stream] | {"shaping": shaping}
    return described


def planned(options: AnnotateOptions) -> dict[str, Any]:
    """What a file with these options will say of itself, as far as it is known before its source is
    loaded: how rows become ids, and the source and the shaping of each stream.
    """
    name, given = options.rewards, options.source_options
    own = {"source": name, "shaping": []}
    described = dict.fromkeys(streams_given(name, given), own)
    for entry in getattr(make_options(name, given), "entries", ()):
        described[entry.stream] = {"source": entry.name, "shaping": list(map(str, entry.steps))}
    settings = {"encode": _encode_settings(options.encode)}
    return {"settings": settings, "streams": _with_steps(described, options)}


def _json_settings(rewards: TokenRewardSource) -> dict[str, Any]:
    """The settings of a source as a file gives them back."""
    settings = rewards.settings()
    try:
        return json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(rewards).__name__}.settings: expected what JSON can hold, got {settings!r}: "
            f"{error}"
        ) from error


def comparable(made_with: dict[str, Any]) -> dict[str, Any]:
    """made_with without how the work was cut, which changes roundings only: after running out of
    memory one goes on with smaller batches.
    """
    settings = {k: v for k, v in made_with["settings"].items() if k not in CUTTING}
    return made_with | {"settings": settings}


def _pairs_fingerprint(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
            digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
        digest.update(pair.index.to_bytes(8, "little"))
    return digest.hexdigest()[:16]


def _autocast(device: str) -> str | None:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def begun_on(output: Path, folder: Path) -> str | None:
    """The day, YYYY-MM-DD, that an annotation or its parts were begun on, where its rows have the
    day in them: a run that goes on keeps it. None: there is none, or it cannot be read.
    """
    try:
        meta = read_meta(output) if output.exists() else read_json(folder / MANIFEST)
        return meta["settings"]["encode"].get("date")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # whoever needs the file says so


def first_change(files: Iterable[Path], pairs: Sequence[Pair], tokenizer: Any) -> str:
    """Which row became other tokens since some annotated files were written, and what changed; ""
    where none of them has such a row.
    """
    by_index = {pair.index: pair for pair in pairs}
    for file in files:
        try:
            examples, _ = read_annotated(file)
        except ValueError:
            continue
        for example in examples:
            pair = by_index.get(int(example["index"]))
            if pair is None:
                return f"; {example['where']} is not among the rows now"
            for name in ID_COLUMNS:
                was, now = example[name], getattr(pair, name)
                if not np.array_equal(was, now):
                    return f"; {pair.row.where}: {name} " + _change(was, now, tokenizer)
    return ""


def _change(was: Any, now: Any, tokenizer: Any) -> str:
    """How two texts differ, by their first tokens that do."""
    n = common_prefix(was.tolist(), now.tolist())
    texts = [described(tokenizer.decode(ids[max(0, n - 3) : n + 8])) for ids in (was, now)]
    return f"had {texts[0]} where {texts[1]} is now"


def check_same(
    path: Path,
    found: dict[str, Any],
    expected: dict[str, Any],
    changed: Callable[[list[Path]], str] = lambda files: "",
) -> None:
    """ValueError where a file or its parts were made otherwise than this run would make them.

    changed: says of annotated files which row is another one now.
    """
    # settings first: they say what a fingerprint hides
    for group in sorted(expected.keys() | {"streams"}, reverse=True):
        now, before = expected.get(group, {}), found.get(group, {})
        if group == SERVER:
            _check_probe(path, before, now)
            continue
        names = [*now, *(name for name in before if name not in now and name not in CUTTING)]
        names.sort(key=lambda name: name != "engine")  # it decides which others there are
        for name in names:
            if before.get(name) != now.get(name):
                # the default source stands in no file
                missing = DEFAULT_SOURCE if group == "streams" else None
                was, wanted = (values.get(name, missing) for values in (before, now))
                files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
                detail = changed(files) if name == "pairs" else ""
                raise ValueError(
                    f"{path}: made with {name} {was!r}, now it is {wanted!r}{detail}; give another "
                    f"output, or remove {path}"
                )


def _check_probe(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError where a server's log-probs of a text are no longer those of the model that made a
    file, beyond what roundings change: there is another model under the name.
    """
    if before.get("model") != now.get("model"):
        return  # the fingerprint says so
    was, is_now = (x.get("probe", {}).get("logprobs", []) for x in (before, now))
    apart = distance(was, is_now)
    if apart > SAME_MODEL:
        raise ValueError(
            f"{path}: expected the model {now.get('model')!r} that it was made with, got one whose "
            f"log-probs of a text differ by {apart:.3g} nats a token, where roundings differ by "
            f"less than {SAME_MODEL}; serve that model, give another output, or remove {path}"
        )
