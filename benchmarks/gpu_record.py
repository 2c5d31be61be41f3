"""The record of `gpu_run.py`."""

import json
import os
from pathlib import Path


class Record:
    """A JSON file that is always whole."""

    def __init__(self, path: Path, commit: str | None):
        self.path, self.commit = path, commit
        self.data = (
            json.loads(path.read_text())
            if path.exists()
            else {"stages": {}, "excluded": {}, "cells": {}}
        )

    def has(self, kind: str, name: str, renew: bool) -> bool:
        found = self.data[kind].get(name)
        if found is None or "unfinished" in found:
            return False
        return not (renew and found.get("commit") != self.commit)

    def put(self, kind: str, name: str, value: dict) -> None:
        self.data[kind][name] = {"commit": self.commit, **value}
        self.save()

    def put_part(self, kind: str, name: str, value: dict, why: str = "interrupted") -> None:
        """What is known of a job that has not ended."""
        self.put(kind, name, {**value, "unfinished": why})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        with beside.open("w") as file:
            file.write(one_a_line(self.data))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)


def one_a_line(data: dict[str, dict]) -> str:
    """JSON of which every entry of an entry has a line: short, and a change shows where it is."""
    parts = (
        f"{json.dumps(kind)}: {{"
        + ",".join(f"\n {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        + "\n}"
        for kind, entries in data.items()
    )
    return "{\n" + ",\n".join(parts) + "\n}\n"
