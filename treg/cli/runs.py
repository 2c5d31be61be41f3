"""A training run in its folder: whose the folder is, whether the run is finished, where it goes on.

The folder keeps the settings and the digests of what was read in treg_run.json, from before the
first checkpoint on. What lists the files of the model, treg_files.json, is written last.
"""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from treg.cli.loading import say
from treg.cli.options import words
from treg.files import (
    SEAL,
    broken_seal,
    checkpoint_folders,
    content_digest,
    digest_of,
    file_digests,
    last_checkpoint,
    plain,
    read_json,
    remove_leftovers,
    seal,
    unseal,
    write_json,
)
from treg.rewards.annotate import process_state

# options that are compared by what lies at their paths
READ = words("data eval_data chat_template model ref_model tokenizer")
FOLDERS_OF_MODELS = words("model ref_model tokenizer")
OF_MODELS = words(".safetensors .bin .json .jinja .model .txt")  # what is read of their folders
# what a finished run has and a user has no reason to edit
FINISHED = words("*.safetensors *.bin *.index.json config.json adapter_config.json")
STATE = "trainer_state.json"


def claim_run(out: Path, settings: dict[str, Any]) -> str:
    """Keep the settings of a run beside it.

    Returns:
        The day on which the run began, YYYY-MM-DD.
    Raises:
        ValueError: the folder holds checkpoints or a model of other settings, of other data or
            models under the same names, or of no run.
    """
    file = out / "treg_run.json"
    settings = plain(settings | {"content": _contents(settings, out)})
    held = _held(out)
    before = read_json(file) if file.exists() and held else None
    settings["begun"] = _begun(file) or datetime.date.today().isoformat()
    if held and before is None:
        raise ValueError(
            f"output_dir: expected a folder for this run, got {out}, which holds {held} and no "
            f"{file.name} of a run that made it; give another output_dir"
        )
    if before is not None:
        _check_same_run(out, before, settings)
    process_state().wait_for_everyone()  # until all have read it
    if process_state().is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for name in (file.name, SEAL):  # of runs that were killed while they wrote
            remove_leftovers(out / name)
        write_json(file, settings)
    process_state().wait_for_everyone()
    return read_json(file)["begun"]  # every process has the day that is written


def _begun(file: Path) -> str | None:
    """The day on which the run of a treg_run.json began; None: it does not say."""
    try:
        return read_json(file).get("begun")
    except (OSError, ValueError, AttributeError):
        return None


def _held(out: Path) -> str | None:
    """The name of a checkpoint or of weights in a folder."""
    for folder in checkpoint_folders(out):
        return folder.name
    for pattern in (SEAL, "*.safetensors", "*.bin"):
        for file in sorted(out.glob(pattern)):
            return file.name
    return None


def _contents(settings: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """SHA-256 of what each path of the settings leads to, a list of them where it is a list; None
    for names on the hub.
    """
    found: dict[str, Any] = {}
    for name in READ:
        given = settings.get(name)
        if isinstance(given, list):
            found[name] = [_content(name, x, out) for x in given]
        else:
            found[name] = _content(name, given, out) if given else None
    return found


def _content(name: str, given: str, out: Path) -> str | None:
    path = Path(given)
    if name in FOLDERS_OF_MODELS and path.is_dir():
        files = [x for x in path.iterdir() if x.is_file() and x.suffix in OF_MODELS]
        return digest_of({x.name: y for x, y in file_digests(files).items()})
    return content_digest(path, without=out)


def _check_same_run(out: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    was, is_now = before.get("content", {}), now["content"]
    # runs of earlier versions had one source, and no weights
    before = {"data_weights": [1.0] * len(_each(before.get("data")))} | before
    if before.get("token_budget"):  # and packs of sequences that share nothing
        before = {"share_prompt": False} | before
    for name in sorted(now.keys() & before.keys() - {"content", "begun"}):
        old, new = before[name], now[name]
        detail = ""
        if name in READ:
            digests = _each(was.get(name)), _each(is_now[name])
            same, detail = _same_sources(_each(old), _each(new), *digests)
            if same:
                continue
        elif old == new:
            continue
        raise ValueError(
            f"{name}: {out} holds a run with {old!r}, now it is {new!r}{detail}; give another "
            "output_dir, or remove that one"
        )


def _each(value: Any) -> list[Any]:
    """A list, or one value as a list."""
    return value if isinstance(value, list) else [value]


def _same_sources(
    old: list[Any], new: list[Any], was: list[str | None], now: list[str | None]
) -> tuple[bool, str]:
    """Whether paths lead to the same content as those of a run, in the same order: they may have
    been moved; and where they do not, what differs, to be added to a message.

    was, now: their SHA-256, None where they are names.
    """
    if len(old) != len(new):
        return False, ""
    was = was + [None] * (len(old) - len(was))  # of runs that kept none
    for x, y, a, b in zip(old, new, was, now, strict=True):
        if not a or not b:
            if x != y:
                return False, ""
        elif a != b:
            if sorted(map(str, was)) == sorted(map(str, now)):
                return False, " (the same in another order)"
            which = f"{y}: " if len(new) > 1 else ""
            return False, f" ({which}SHA-256 {a[:12]} and {b[:12]})"
    return True, ""


def finished(out: Path) -> bool:
    """Whether the run in out was trained to its end and saved, and its model is there.

    Raises:
        ValueError: files of the model are there and were changed since.
    """
    if not (out / SEAL).exists():
        return False
    try:
        listed = read_json(out / SEAL)["sha256"]
    except (ValueError, KeyError) as error:
        say(f"the model is saved again: {error}")
        return False
    missing = [name for name in listed if not (out / name).is_file()]
    if missing:
        say(f"{out} holds a finished run that lacks {', '.join(missing)}: it is saved again")
        return False
    problem = broken_seal(out)
    if problem is not None:
        raise ValueError(
            f"output_dir: {out} holds a finished run, but it {problem}; remove that file to have "
            "it made again, or give another output_dir"
        )
    return True


def finish(out: Path) -> None:
    """List the files of the model, which is saved; after this the run is finished."""
    files = {x for pattern in FINISHED for x in out.glob(pattern)} | {out / STATE}
    seal(out, [x for x in files if x.is_file()])


def going_on_from(out: Path) -> str | None:
    """The checkpoint that every process goes on from; None: from the beginning."""
    found: list[Any] = [None]
    if process_state().is_main_process:
        checkpoint = last_checkpoint(out, say)
        found = [None if checkpoint is None else str(checkpoint)]
        unseal(out)  # the model is about to be written
    broadcast_object_list(found)
    if found[0] is not None:
        say(f"going on from {found[0]}")
    elif checkpoint_folders(out):
        say("no checkpoint can be gone on from: the run starts from its beginning")
    return found[0]


def last_history(run: Path) -> list[dict[str, Any]]:
    """The log of a training run: of the whole, or of its newest checkpoint; [] without one.

    Raises:
        ValueError: no state can be read, though there are some.
    """
    problem = None
    for folder in (run, *checkpoint_folders(run)):
        if (folder / STATE).exists():
            try:
                return read_json(folder / STATE).get("log_history", [])
            except ValueError as error:
                problem = problem or error
    if problem is not None:
        raise problem
    return []
