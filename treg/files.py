"""Files that are whole or absent, folders that one process has for itself, and YAML."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside path, which takes its place when the block is done; a reader sees the
    old or the new.
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_yaml(path: str | Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder for this process alone; ValueError if another one has it. Freed with the process,
    however it ends.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{folder}: another run is at work on it; wait for it, or give another output"
            ) from None
        yield


def last_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that is whole: the trainer's state is what the first process writes
    last.
    """
    folders = [
        x for x in Path(output_dir).glob("checkpoint-*") if x.name.rpartition("-")[2].isdigit()
    ]
    for folder in sorted(folders, key=lambda x: -int(x.name.rpartition("-")[2])):
        try:
            json.loads((folder / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return folder
    return None
