"""The record of an experiment: a JSON file that grows by a row a run; and statistics of rows."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Record:
    """What was asked for, where it ran, and a row for each run that is done.

    Args:
        path: of the JSON file. One that is there must have been made with the same settings.
        settings: all that changes rows. Under "methods" methods by name, to which others may be
            added later.
    Raises:
        ValueError: the file is none of these, or was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        given: dict[str, Any] = json.loads(json.dumps(settings))
        self.content: dict[str, Any] = {"settings": given, "rows": []}
        if path.exists():
            self.content = _read(path)
            self._take(given)

    def _take(self, settings: dict[str, Any]) -> None:
        """Refuse settings that are not those of the rows."""
        made_with = self.content["settings"]
        known = made_with["methods"] | settings["methods"]
        for name, value in made_with.items():
            now = settings["methods"] | value if name == "methods" else settings.get(name)
            if now != (known if name == "methods" else value):
                raise ValueError(
                    f"output: expected a record with {name} {now}, got {value} in {self.path}; "
                    "give another file, or remove it"
                )
        self.content["settings"] = settings | {"methods": known}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.content["rows"]

    def has(self, **values: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(x.get(k) == v for k, v in values.items()) for x in self.rows)

    def began(self, command: str, where: Mapping[str, Any]) -> None:
        """Keep the command that makes the rows to come, and its environment."""
        commands = self.content.setdefault("commands", [])
        if command not in commands:
            commands.append(command)
        self.content["environment"] = dict(where)

    def take(self, row: Mapping[str, Any]) -> None:
        """Keep a run, in five significant digits."""
        digits = json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.5g}"))
        self.rows.append(digits)
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # a run that is killed while it writes leaves the file as it was
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        temporary.replace(self.path)


def _read(path: Path) -> dict[str, Any]:
    """The content of a record; ValueError for a file that is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        reason: object = error
    else:
        if isinstance(content, dict) and {"settings", "rows"} <= content.keys():
            return content
        reason = "it has no settings and rows"
    raise ValueError(
        f"output: expected a record of this script, got {path}: {reason}; give another file, or "
        "remove it"
    )


def environment(processes: int, packages: Sequence[str]) -> dict[str, Any]:
    """Where a record is made: processes of one thread each, cores, versions, commit, load."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "processes": processes,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit.stdout.strip() or None,
        "load_average": os.getloadavg()[:2],
    }


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of a mean by Student's t; nan for one value."""
    if len(values) < 2:
        return math.nan
    quantile = T975[min(len(values) - 2, len(T975) - 1)]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def cell(values: Sequence[float], percent: bool = False, sign: str = "") -> str:
    """Mean and, of more than one value, (half the width of the interval)."""
    if not values:
        return ""
    factor, end = (100, " %") if percent else (1, "")
    form = ".1f" if percent or max(map(abs, values)) >= 10 else ".2f"
    text = format(statistics.mean(values) * factor, sign + form) + end
    if len(values) > 1:
        text += f" ({half_width(values) * factor:{form}})"
    return text
