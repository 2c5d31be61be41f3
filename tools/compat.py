"""Which versions of Python, torch, Triton, transformers and TRL pass the tests, found by trying.

    python tools/compat.py [--rows oldest-3.11 newest-3.13] [--folder DIR] [--list]

Each row of ROWS gets an environment of its own in DIR, one after the other. The committed tree is
installed with the row's constraints, `treg --version` and `treg doctor` are run from elsewhere, and
then the tests of TESTS and SLOW_TESTS. The environment is removed before the next one begins: with
torch's CUDA libraries it takes about 7 GB. Results go into benchmarks/results/compat.json, row by
row, and from there into docs/compatibility.md. A Python that the machine lacks is recorded as such.

Needs Python >= 3.11, git and pip; no GPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "compat.json"
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN = "<!-- compat: python tools/compat.py writes what follows -->"
END = "<!-- compat: end -->"

# what the tests need beside the library
TOOLS = ["pytest", "hypothesis", "packaging", "setuptools"]
# the folders whose quick tests run, and tests that are marked slow and are worth their time here
TESTS = [
    *("tests/losses", "tests/ops", "tests/kernels/test_interpreter.py", "tests/heads"),
    *("tests/data", "tests/rewards", "tests/trainer", "tests/cli", "tests/viz"),
]
SLOW_TESTS = {
    "tests/ops/test_compile.py": "test_compiled_in_one_graph",
    "tests/cli/test_cli.py": "test_from_a_file_to_a_page or test_lora",
    "tests/integrations/test_trl.py": "test_the_regularizer_is_the_dense_one or test_adapters",
}
PACKAGES = ["torch", "triton", "numpy", "transformers", "accelerate", "datasets", "peft", "trl"]
TEST_SECONDS = 1800


@dataclass(frozen=True)
class Row:
    """One environment. `constraints`: a file of the repository, or "" for the newest of all."""

    name: str
    python: str
    constraints: str

    @property
    def extras(self) -> str:
        # TRL's own lower bound of Python
        return "train" if self.python == "3.10" else "train,trl"


ROWS = [
    *(Row(f"oldest-{python}", python, "constraints-oldest.txt") for python in ("3.10", "3.11")),
    *(Row(f"pinned-{p}", p, "constraints.txt") for p in ("3.10", "3.11", "3.12", "3.13")),
    *(Row(f"newest-{p}", p, "") for p in ("3.10", "3.11", "3.12", "3.13")),
]


def find_python(version: str) -> str | None:
    """The interpreter of a version: on PATH, or where pyenv keeps it."""
    places = [shutil.which(f"python{version}")]
    places += sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for place in places:
        if place and _version(str(place)) == version:
            return str(place)
    return None


def _version(python: str) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return found.stdout.strip()


def try_row(row: Row, folder: Path) -> dict:
    """Makes the environment, tests, removes the environment."""
    python = find_python(row.python)
    if python is None:
        return {"python": row.python, "outcome": f"no Python {row.python} on this machine"}
    home = folder / row.name
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    try:
        return _try(row, python, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _try(row: Row, python: str, home: Path) -> dict:
    source = committed_tree(home / "source")
    mine = str(home / "venv" / "bin" / "python")
    result = {"python": row.python, "constraints": row.constraints or "newest"}
    result["commit"] = _git("rev-parse", "--short", "HEAD").strip()
    start = time.monotonic()
    _run([python, "-m", "venv", home / "venv"], home)
    newest = home / "none.txt"
    newest.touch()
    constraints = source / row.constraints if row.constraints else newest
    pip = [mine, "-m", "pip", "install", "--quiet", "--no-cache-dir", "--constraint", constraints]
    installed = _run([*pip, f"{source}[{row.extras}]", *TOOLS], home)
    result["install_seconds"] = round(time.monotonic() - start)
    if installed.returncode:
        return result | {"outcome": "does not install", "output": installed.stderr[-2000:]}
    result["versions"] = versions(mine, home)
    for command in ("--version", "doctor"):
        done = _run([home / "venv" / "bin" / "treg", command], home)
        if done.returncode:
            said = (done.stdout + done.stderr)[-2000:]
            return result | {"outcome": f"treg {command} fails", "output": said}
    start = time.monotonic()
    counts = run_tests(mine, source, home, trl="trl" in row.extras)
    result["test_seconds"] = round(time.monotonic() - start)
    bad = counts["failed"]
    return result | counts | {"outcome": f"{len(bad)} tests fail" if bad else "passes"}


def committed_tree(folder: Path) -> Path:
    """The files of HEAD, without what lies beside them."""
    with tempfile.TemporaryFile() as archive:
        subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, stdout=archive, check=True)
        archive.seek(0)
        with tarfile.open(fileobj=archive) as packed:
            packed.extractall(folder, filter="data")
    return folder


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def _run(command: list, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYENV"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}
    arguments = list(map(str, command))
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True)


def versions(python: str, home: Path) -> dict[str, str]:
    """Package -> installed version, of PACKAGES."""
    listed = json.loads(_run([python, "-m", "pip", "list", "--format", "json"], home).stdout)
    found = {x["name"].lower(): x["version"] for x in listed}
    return {name: found[name] for name in PACKAGES if name in found}


def run_tests(python: str, source: Path, home: Path, trl: bool) -> dict:
    """Counts, and the tests that fail."""
    paths = f"{source}{os.pathsep}{source / 'kernels'}"
    pytest = ["timeout", TEST_SECONDS, python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    runs = [[*TESTS, "-m", "not slow and not aot"]]
    runs += [[f, "-k", k] for f, k in SLOW_TESTS.items() if trl or "trl" not in f]
    counts = {"passed": 0, "skipped": 0, "failed": []}
    for number, arguments in enumerate(runs):
        report = home / f"{number}.xml"
        done = _run([*pytest, *arguments, f"--junit-xml={report}"], source, PYTHONPATH=paths)
        if done.returncode not in (0, 1) or not report.exists():
            print(done.stdout + done.stderr)
            counts["failed"].append(f"{arguments[0]}: pytest ended with {done.returncode}")
            continue
        for case in ElementTree.parse(report).iter("testcase"):
            _count(case, counts)
    return counts


def _count(case: ElementTree.Element, counts: dict) -> None:
    bad = case.find("failure")
    if bad is None:
        bad = case.find("error")
    if bad is not None:
        counts["failed"].append(f"{case.get('classname')}.{case.get('name')}")
    else:
        counts["skipped" if case.find("skipped") is not None else "passed"] += 1


def table(record: dict[str, dict]) -> str:
    """The record as the page shows it."""
    lines = [
        "| environment | Python | torch | Triton | numpy | transformers | TRL | result |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        found = record.get(row.name)
        if found is None:
            lines.append(f"| {row.name} | {row.python} | | | | | | not tried |")
            continue
        have = found.get("versions", {})
        shown = [have.get(name, "") for name in ("torch", "triton", "numpy", "transformers", "trl")]
        said = found["outcome"]
        if "passed" in found:
            said += f": {found['passed']} passed, {found['skipped']} skipped"
        lines.append(f"| {row.name} | {row.python} | {' | '.join(shown)} | {said} |")
    failed = {name: found.get("failed", []) for name, found in record.items()}
    if any(failed.values()):
        lines += ["", "Tests that fail:", ""]
        lines += [f"- {name}: `{test}`" for name, tests in failed.items() for test in tests]
    return "\n".join(lines)


def with_table(text: str, record: dict[str, dict]) -> str:
    """The page with the table between its markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{PAGE.name}: expected the lines {BEGIN!r} and {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{table(record)}\n\n{END}", text)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "treg-compat")
    parser.add_argument("--list", action="store_true", help="print the rows and their Pythons")
    args = parser.parse_args()
    if args.list:
        for row in ROWS:
            print(f"{row.name:14} {row.constraints or 'newest':24} {find_python(row.python)}")
        return 0
    failed = False
    for row in ROWS:
        if row.name not in args.rows:
            continue
        print(f"{row.name} ...", flush=True)
        found = try_row(row, args.folder)
        failed |= found["outcome"] != "passes"
        print(f"{row.name}: {json.dumps(found, indent=1)}", flush=True)
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(record | {row.name: found}, indent=1) + "\n")
        if PAGE.exists():
            PAGE.write_text(with_table(PAGE.read_text(), json.loads(RECORD.read_text())))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
