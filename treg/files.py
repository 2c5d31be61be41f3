"""Files that are whole or absent and say if they were changed since, folders that one process has
for itself, checkpoints that a run can go on from, and YAML.

What is written lies on the disk before it takes its name: file and folder are synchronised. A JSON
file carries the SHA-256 of its content, a folder a list of its files with theirs.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SEAL = "treg_files.json"  # the list of a folder's files
CHECKSUM = "checksum"  # the key of a JSON file's SHA-256
BLOCK = 1 << 20  # bytes that are hashed at a time
# any of these, and those that an index names, are the weights of a checkpoint
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.bin",
    "pytorch_model_fsdp*",  # FSDP: a folder of shards, or one file
    "latest",  # DeepSpeed: the name of its own folder
)
# what a resume reads beside them, each under any of its names
RESUMED = {
    "optimizer": ("optimizer.pt", "optimizer.bin", "optimizer_*", "latest"),
    "scheduler": ("scheduler.pt", "latest"),
    "random state": ("rng_state*.pth",),
    "training arguments": ("training_args.bin",),
}


def synchronise(path: str | Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What a library raises when it cannot write becomes an OSError that names the path."""
    try:
        yield
    except Exception as error:  # torch raises a RuntimeError, safetensors its own
        said = isinstance(error, (OSError, RuntimeError)) or "Safetensor" in type(error).__name__
        if not said:
            raise
        raise OSError(
            f"{path}: expected to write it, got {type(error).__name__}: {error}{_free(path)}"
        ) from error


def _free(path: str | Path) -> str:
    """What is free on the disk of a path, to be added to a message."""
    for folder in (Path(path).absolute(), *Path(path).absolute().parents):
        if folder.is_dir():
            return f"; {shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}"
    return ""


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside path, which takes its place when the block is done; a reader sees the
    old or the new.
    """
    temporary = Path(f"{path}.treg-{os.getpid()}.tmp")
    try:
        yield temporary
        synchronise(temporary)
        os.replace(temporary, path)
        synchronise(temporary.parent)
    except OSError as error:
        raise OSError(f"{path}: expected to write it, got: {error}{_free(path)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: str | Path) -> None:
    """Remove the temporary files of path that `replacing` left in processes that were killed, and
    no other file.
    """
    path = Path(path)
    ours = re.compile(re.escape(path.name) + r"\.treg-\d+\.tmp")
    for file in path.parent.iterdir():
        if ours.fullmatch(file.name):
            file.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """A value as a JSON file gives it back; what JSON has no form for, as text."""
    return json.loads(json.dumps(value, default=str))


def digest_of(value: Any) -> str:
    """SHA-256 of a value that JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """A JSON object as a whole file, with the checksum of its content."""
    value = plain(value)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**value, CHECKSUM: digest_of(value)}, indent=1))


def read_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file, without its checksum; files without one are read too.

    Raises:
        FileNotFoundError: no such file. ValueError: no JSON object, or one that was changed since
            it was written.
    """
    try:
        value = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object, got a damaged file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    checksum = value.pop(CHECKSUM, None)
    if checksum is not None and checksum != digest_of(value):
        raise ValueError(
            f"{path}: expected the content that was written, got another; the file is damaged or "
            "was edited"
        )
    return value


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


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_digests(files: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, several at a time."""
    files = list(files)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return dict(zip(files, pool.map(file_digest, files), strict=True))


def content_digest(path: str | Path, *, without: str | Path | None = None) -> str | None:
    """SHA-256 of a file's bytes, or of the names and bytes of a folder's files, hidden ones left
    out; None where there is no such path.

    without: a folder that does not count if it lies in the other.
    """
    path = Path(path)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return None
    files = [x for x in path.rglob("*") if x.is_file()]
    if without is not None:
        files = [x for x in files if not x.resolve().is_relative_to(Path(without).resolve())]
    names = {x: x.relative_to(path) for x in files}
    kept = [x for x in files if not any(part.startswith(".") for part in names[x].parts)]
    return digest_of({str(names[x]): digest for x, digest in file_digests(kept).items()})


def seal(folder: str | Path, files: Iterable[Path] | None = None) -> None:
    """List the files of a folder with their SHA-256, once they are on the disk.

    files: None: all in it.
    """
    folder = Path(folder)
    if files is None:
        files = [x for x in folder.rglob("*") if x.is_file() and x.name != SEAL]
    files = sorted(files)
    for path in [*files, *{x.parent for x in files}]:
        synchronise(path)
    digests = file_digests(files)
    listed = {str(x.relative_to(folder)): digests[x] for x in files}
    write_json(folder / SEAL, {"sha256": listed})


def unseal(folder: str | Path) -> None:
    """Before the files of a folder are written anew."""
    (Path(folder) / SEAL).unlink(missing_ok=True)


def broken_seal(folder: str | Path) -> str | None:
    """What is wrong with the files that a folder's seal lists; None: nothing."""
    folder = Path(folder)
    try:
        listed = read_json(folder / SEAL)["sha256"]
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing:
            return f"lacks {', '.join(missing)}"
        found = file_digests(folder / name for name in listed)
    except (OSError, ValueError, KeyError) as error:
        return f"cannot be read: {error}"
    changed = [name for name in listed if found[folder / name] != listed[name]]
    if changed:
        return f"holds another {', '.join(changed)} than was written: damaged, or another run's"
    return None


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The checkpoint-N of a training run, the newest first, whole or not."""
    folders = [
        x for x in Path(output_dir).glob("checkpoint-*") if x.name.rpartition("-")[2].isdigit()
    ]
    return sorted(folders, key=lambda x: -int(x.name.rpartition("-")[2]))


def last_checkpoint(
    output_dir: str | Path, tell: Callable[[str], Any] = log.warning
) -> Path | None:
    """The newest checkpoint of a run that is whole: all that a resume reads is there and as it was
    written.

    `treg.trainer` seals its checkpoints. Where one is sealed, those that are not were never
    finished. Where none is, as of other trainers, each file is tested by what its format says of
    it.

    tell: is told of each newer one that is passed over, and why.
    """
    folders = checkpoint_folders(output_dir)
    sealed = any((x / SEAL).exists() for x in folders)
    for folder in folders:
        problem = checkpoint_problem(folder, sealed=sealed)
        if problem is None:
            return folder
        tell(f"{folder} is passed over: it {problem}")
    return None


def checkpoint_problem(folder: str | Path, *, sealed: bool) -> str | None:
    """Why a run cannot go on from a checkpoint; None: it can. sealed: whether it must be."""
    folder = Path(folder)
    if sealed and not (folder / SEAL).exists():
        return f"was not finished: it has no {SEAL}"
    problem = broken_seal(folder) if sealed else _damage(folder)
    if problem is not None:
        return problem
    try:
        step = read_json(folder / "trainer_state.json").get("global_step")
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    if step != int(folder.name.rpartition("-")[2]):
        return f"holds the state of step {step}"
    if not _any(folder, WEIGHTS):
        return f"lacks weights, expected {', '.join(WEIGHTS[:3])} or another form of them"
    for what, names in RESUMED.items():
        if not _any(folder, names):
            only = what == "optimizer"
            why = ", as --save_only_model leaves it; no run can go on from it" if only else ""
            return f"lacks the {what} ({names[0]}){why}"
    return None


def _any(folder: Path, patterns: Iterable[str]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint, as far as their formats tell."""
    for index in folder.glob("*.index.json"):
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            return f"has a damaged {index.name}: {error}"
        missing = sorted(x for x in shards if not (folder / x).is_file())
        if missing:
            return f"lacks {', '.join(missing)}"
    for file in sorted(folder.iterdir()):
        if file.suffix == ".safetensors" and not _is_safetensors(file):
            return f"has a damaged {file.name}"
        if file.suffix in (".pt", ".pth", ".bin") and not _is_whole_zip(file):
            return f"has a damaged {file.name}"
    return None


def _is_safetensors(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with open(file, "rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > file.stat().st_size:
                return False
            header = json.loads(opened.read(length))
        ends = [x["data_offsets"][1] for name, x in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return False
    return file.stat().st_size == 8 + length + max(ends, default=0)


def _is_whole_zip(file: Path) -> bool:
    """Whether what `torch.save` wrote keeps the CRC of each of its members."""
    try:
        with zipfile.ZipFile(file) as opened:
            return opened.testzip() is None
    except Exception:  # zipfile raises half a dozen kinds on damaged files
        return False
