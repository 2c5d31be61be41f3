"""The finished parts of an annotation that is under way, in a folder of their own.

    manifest.json               what the annotation is made with
    part-N.parquet              the rows of some pairs, and in the metadata whose they are
    part-N.parquet.sha256       of that file's bytes; written after it
    _rows                       the rows as they are encoded (see `treg.data.row_cache`)
    lock

A part counts if its bytes have that checksum, and if it says that it is this part of this run.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from treg.data import Pair
from treg.data.annotated import read_meta
from treg.data.row_cache import remove_row_cache
from treg.data.tables import read_parquet
from treg.files import file_digest, locked, read_json, replacing, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PART = re.compile(r"part-\d{5,}\.parquet(\.sha256)?(\.(treg-)?\d+\.tmp)?")
ROWS = "_rows"  # the folder of rows that are encoded
OTHERS = re.compile(r"manifest\.json(\.treg-\d+\.tmp)?")


class Parts:
    """The parts of a run.

    Args:
        folder: where they lie. run: the digest of what the run is made with.
        pairs: those of each part.
    """

    def __init__(self, folder: Path, run: str, pairs: Sequence[Sequence[Pair]]):
        self.folder = folder
        self.run = run
        self.pairs = pairs

    def file(self, number: int) -> Path:
        return self.folder / f"part-{number:05}.parquet"

    def meta(self, number: int) -> dict[str, Any]:
        """What a part says of itself."""
        pairs = [pair.index for pair in self.pairs[number]]
        return {"run": self.run, "part": number, "pairs": pairs}

    def confirm(self, number: int) -> None:
        """Write the checksum of a part that is written."""
        file = self.file(number)
        with replacing(_checksum_file(file)) as temporary:
            temporary.write_text(file_digest(file))

    def is_whole(self, number: int) -> bool:
        """Whether a part need not be computed again; if it is there and must be, says why."""
        file = self.file(number)
        if not file.exists():
            return False
        problem = self._problem(number)
        if problem is not None:
            log.warning("%s is computed again: it %s", file, problem)
        return problem is None

    def _problem(self, number: int) -> str | None:
        file = self.file(number)
        try:
            checksum = _checksum_file(file).read_text()
        except (OSError, UnicodeDecodeError):
            return "was not finished: it has no checksum that can be read"
        if checksum != file_digest(file):
            return "is damaged: it has not the checksum that was written"
        try:
            meta, rows = read_meta(file), read_parquet(file).num_rows
        except ValueError as error:
            return f"cannot be read: {error}"
        if any(meta.get(name) != value for name, value in self.meta(number).items()):
            return "is another run's, or another part"
        if rows + len(meta.get("problems", ())) != len(self.pairs[number]):
            return "has not the rows of its pairs"
        return None

    def remove(self) -> None:
        """Remove the parts and what belongs to them, the manifest after them, and the folder unless
        something else lies in it. Without a manifest the folder is a run's if it holds encoded rows
        and nothing else.
        """
        files = list(self.folder.iterdir()) if self.folder.is_dir() else []
        names = {file.name for file in files}
        if MANIFEST not in names and names - {"lock"} != {ROWS}:
            return
        for ours in (PART, OTHERS):
            for file in files:
                if ours.fullmatch(file.name):
                    file.unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)
        remove_row_cache(self.folder / ROWS)
        with contextlib.suppress(OSError):  # files of somebody else
            self.folder.rmdir()


def _checksum_file(file: Path) -> Path:
    return Path(f"{file}.sha256")


@contextlib.contextmanager
def claimed(folder: Path, made_with: dict[str, Any], check_same: Callable) -> Iterator[None]:
    """The folder of parts, made or found to be of the same annotation, for this run alone.

    Raises:
        ValueError: parts of another annotation, by check_same(folder, found, made_with); a manifest
            that is damaged; another run at work.
    """
    with locked(folder):
        manifest = folder / MANIFEST
        if manifest.exists():
            try:
                found = read_json(manifest)
            except ValueError as error:
                raise ValueError(f"{error}; remove {folder}, or give another output") from error
            check_same(folder, found, made_with)
        else:
            write_json(manifest, made_with)
        yield
