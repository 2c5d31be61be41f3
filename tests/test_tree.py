"""Holds the tree: who may import whom, rooms and arrows, and what no library file may hold.

A room is a folder or a single file directly under treg/, or kernels/, or benchmarks/. An arrow is
one room importing another where no longer way implies it.
"""

import ast
import functools
import graphlib
import importlib.util
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest
import slow

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 500  # of a file
MAX_ROOMS = 20
MAX_ARROWS = 60
MAX_ROOM_IMPORTS = 60  # pairs of rooms, arrows or not, without what the package itself gathers
MAX_TOKENS = 9.0  # names, operators and numbers in a line of treg/ that has any, on average

# What a module, or a package and all below it, may import besides the standard library; the longest
# key wins. "*": anything without a private name in it. A module that no key covers is a finding:
# give it a row.
HUGGING_FACE = {"transformers", "accelerate", "datasets"}
MAY_IMPORT = {
    "treg_kernels": {"treg_kernels", "torch", "triton"},
    "treg.checks": {"treg_kernels", "torch"},
    "treg.results": {"torch"},
    "treg.operators": {"torch"},
    "treg.files": {"yaml"},
    "treg.losses": {
        *("treg.losses", "treg.checks", "treg.operators", "treg.results", "treg_kernels", "torch"),
    },
    "treg.ops": {
        *("treg.ops", "treg.checks", "treg.losses", "treg.operators", "treg.results"),
        *("treg_kernels", "torch"),
    },
    "treg.ops.reference": {"treg.results", "torch"},
    # online training, on tensors
    "treg.rl": {"treg.rl", "treg.checks", "treg.ops", "torch"},
    "treg.heads": {"treg.heads", "treg.ops", "treg.data.tree", "torch", "numpy", "transformers"},
    "treg.data": {"treg.data", "treg.files", "torch", "numpy", "jinja2", "pyarrow", *HUGGING_FACE},
    "treg.rewards": {
        *("treg.rewards", "treg.data", "treg.files", "treg.heads", "treg.ops"),
        *("torch", "numpy", "jinja2", "tqdm", "peft", "httpx2", "httpx", *HUGGING_FACE),
    },
    "treg.trainer": {
        *("treg.trainer", "treg.data", "treg.files", "treg.heads", "treg.ops", "treg.losses"),
        *("treg.results", "torch", "numpy", "peft", *HUGGING_FACE),
    },
    # the measures themselves need numpy alone
    "treg.evaluate": {
        *("treg.evaluate", "treg.data", "treg.rewards", "torch", "numpy", "sklearn"),
    },
    "treg.viz": {
        *("treg.viz", "treg.data", "treg.evaluate", "treg.files", "treg.rewards"),
        *("torch", "numpy", "jinja2", "markupsafe", "matplotlib", "rich", "tqdm"),
    },
    # the demo is a user of the library
    "treg.demo": {
        *("treg.demo", "treg.data", "treg.evaluate", "treg.rewards", "treg.trainer", "treg.viz"),
        *("torch", "numpy", "tokenizers", "safetensors", *HUGGING_FACE),
    },
    "treg.cli": {
        *("treg", "treg.cli", "treg.data", "treg.demo", "treg.evaluate", "treg.files"),
        *("treg.losses", "treg.ops", "treg.rewards", "treg.trainer", "treg.viz"),
        *("torch", "peft", *HUGGING_FACE),
    },
    "treg.__main__": {"treg.cli"},
    "treg.integrations": {"*"},
    "treg.old_names": {
        "treg.old_names",
        "treg.heads",
        "treg.losses",
        "treg.ops",
        "treg.rewards",
        "treg.viz",
    },
}
# The package itself only gathers public names.
MAY_IMPORT["treg"] = MAY_IMPORT.keys() - {
    *("treg_kernels", "treg.cli", "treg.demo", "treg.__main__", "treg.integrations"),
}


@functools.cache
def syntax(text: str) -> ast.Module:
    return ast.parse(text)


def python_files(root: Path, *folders: str) -> list[Path]:
    return [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every library module under root."""
    return named_files(root, "treg") | named_files(root / "kernels", "treg_kernels")


def named_files(source: Path, package: str) -> dict[str, Path]:
    found = {}
    for file in python_files(source, package):
        parts = file.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        found[".".join(parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports, wherever in the file and also by a literal name: library modules in
    full, others' root.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(syntax(file.read_text())):
        for target in targets(node, package):
            top = target.partition(".")[0]
            parent = target.rpartition(".")[0]
            if top not in ("treg", "treg_kernels"):
                yield top
            elif isinstance(node, ast.ImportFrom) and target not in known and parent in known:
                # `from module import name`: the module is meant, unless the name is a module itself
                yield parent
            else:
                # a module that does not exist is kept as written, so that it is judged by its row
                yield target


def targets(node: ast.AST, package: str) -> list[str]:
    """The dotted names that a node of the syntax tree imports."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        return [f"{base}.{alias.name}" for alias in node.names]
    if not isinstance(node, ast.Call) or not node.args:
        return []
    if isinstance(node.func, ast.Attribute):
        function = node.func.attr
    else:
        function = getattr(node.func, "id", "")
    if function in ("import_module", "__import__") and isinstance(node.args[0], ast.Constant):
        return [importlib.util.resolve_name(str(node.args[0].value), package)]
    return []


def row_of(name: str) -> set[str] | None:
    keys = [
        key for key in MAY_IMPORT if name == key or (key != "treg" and name.startswith(key + "."))
    ]
    return MAY_IMPORT[max(keys, key=len)] if keys else None


def allowed(target: str, row: set[str]) -> bool:
    if target in sys.stdlib_module_names or any(
        target == key or target.startswith(key + ".") for key in row
    ):
        return True
    return "*" in row and not any(part.startswith("_") for part in target.split("."))


def wrong_direction(root: Path) -> list[str]:
    known, found = modules(root), []
    for name, file in known.items():
        row = row_of(name)
        if row is None:
            found.append(f"{name}: no row in MAY_IMPORT")
            continue
        found += [
            f"{name} imports {target}"
            for target in imports(name, file, known)
            if not allowed(target, row)
        ]
    return found


def cycles(root: Path) -> list[str]:
    known = modules(root)
    graph = {
        name: sorted((known.keys() & imports(name, file, known)) - {name})
        for name, file in known.items()
    }
    return circle(graph)


def circle(graph: dict) -> list[str]:
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def room_of(name: str) -> str:
    """treg.ops of treg.ops.head; treg, treg_kernels and benchmarks are rooms themselves. The old
    names of modules are the package's own: like it they only gather.
    """
    parts = name.split(".")
    if parts[:2] == ["treg", "old_names"]:
        return "treg"
    return ".".join(parts[:2]) if parts[0] == "treg" else parts[0]


def rooms(root: Path) -> dict[str, list[str]]:
    """Room -> the rooms that it imports, sorted."""
    known = modules(root)
    files = known | named_files(root, "benchmarks")
    graph: dict[str, set[str]] = {room_of(name): set() for name in files}
    for name, file in files.items():
        graph[room_of(name)] |= {room_of(target) for target in imports(name, file, known)}
    return {room: sorted((imported & graph.keys()) - {room}) for room, imported in graph.items()}


def arrows(graph: dict[str, list[str]]) -> list[tuple[str, str]]:
    """The imports that no longer way implies."""
    reached: dict[str, set[str]] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        reached[room] = set(graph[room])
        for imported in graph[room]:
            reached[room] |= reached[imported]
    found = []
    for room, imported in graph.items():
        for target in imported:
            if not any(target in reached[other] for other in imported):
                found.append((room, target))
    return found


def circles_of_rooms(root: Path) -> list[str]:
    return circle(rooms(root))


def too_many_rooms(root: Path) -> list[str]:
    found = sorted(rooms(root))
    return [f"{len(found)} rooms: {', '.join(found)}"] if len(found) > MAX_ROOMS else []


def too_many_arrows(root: Path) -> list[str]:
    graph = rooms(root)
    if circle(graph):
        return []  # a finding of another rule
    found = arrows(graph)
    return [f"{len(found)} arrows: {found}"] if len(found) > MAX_ARROWS else []


def too_many_room_imports(root: Path) -> list[str]:
    """A way that is implied is coupling all the same. The package itself only gathers names."""
    graph = rooms(root)
    graph.pop("treg", None)
    count = sum(len(set(imported) - {"treg"}) for imported in graph.values())
    return [f"{count} imports between rooms"] if count > MAX_ROOM_IMPORTS else []


def environment_reads(root: Path) -> list[str]:
    names = {"environ", "environb", "getenv", "getenvb"}
    found = []
    for name, file in modules(root).items():
        for node in ast.walk(syntax(file.read_text())):
            used = set()
            if isinstance(node, ast.ImportFrom):
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.Attribute):
                used = {node.attr}
            found += [f"{name} uses {word}" for word in used & names]
    return found


def long_files(root: Path) -> list[str]:
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules(root).items()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_LINES]


def dense_lines(root: Path) -> list[str]:
    """More code in a line than the eye takes in, on average over treg/."""
    tokens = lines = 0
    for file in python_files(root, "treg"):
        counted = tokens_of_lines(file.read_text())
        tokens += sum(counted.values())
        lines += len(counted)
    if lines == 0 or tokens / lines <= MAX_TOKENS:
        return []
    return [f"{tokens / lines:.2f} code tokens a line"]


def tokens_of_lines(text: str) -> dict[int, int]:
    """Names, operators and numbers of each line that has any."""
    counted: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER):
            line = token.start[0]
            counted[line] = counted.get(line, 0) + 1
    return counted


def formatter_skips(root: Path) -> list[str]:
    """The formatter lays out all but the kernels, whose argument lists are tables."""
    found = []
    for file in python_files(root, "treg", "tests", "benchmarks", "examples"):
        text = file.read_text()
        if "fmt:" not in text:
            continue
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT and re.search(r"#\s*fmt:\s*(skip|off)", token.string):
                found.append(f"{file.relative_to(root)}:{token.start[0]}: {token.string}")
    return found


def kernels_package(root: Path) -> list[str]:
    return [str(file) for file in [root / "kernels" / "__init__.py"] if file.exists()]


def machine_paths(root: Path) -> list[str]:
    """Absolute paths that exist on one machine only. Not /dev, /usr, /bin, /etc: those are
    everywhere.
    """
    pattern = re.compile(
        r"(?<![\w.])(?:/(?:home|Users|root|tmp|opt|mnt|srv|work|data|scratch|var)/|[A-Z]:\\)\w"
    )
    folders = ("treg", "kernels", "tests", "benchmarks", "examples", "docs", ".ci")
    suffixes = {"", ".py", ".toml", ".cfg", ".ini", ".txt", ".md", ".sh", ".yml", ".yaml", ".json"}
    files = [file for file in root.iterdir() if file.is_file() and not file.name.startswith(".")]
    files += [file for folder in folders for file in (root / folder).rglob("*") if file.is_file()]
    return [
        f"{file.relative_to(root)}:{number}: {line.strip()[:80]}"
        for file in sorted(files)
        if file.suffix in suffixes
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1)
        if pattern.search(line)
    ]


RULES = [
    wrong_direction,
    cycles,
    circles_of_rooms,
    too_many_rooms,
    too_many_arrows,
    too_many_room_imports,
    environment_reads,
    long_files,
    dense_lines,
    formatter_skips,
    kernels_package,
    machine_paths,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_keeps(rule):
    assert {"treg", "treg.ops", "treg_kernels"} <= modules(ROOT).keys()
    assert rule(ROOT) == []


# files by path, for the rules that count
EIGHT_TO_EIGHT = {f"treg/to{i}.py": "" for i in range(8)} | {
    f"treg/from{i}.py": "\n".join(f"import treg.to{j}" for j in range(8)) for i in range(8)
}
EACH_THE_FOLLOWING = {
    f"treg/room{i:02}.py": "\n".join(f"import treg.room{j:02}" for j in range(i + 1, 12))
    for i in range(12)
}
OFFENDERS = [
    (
        wrong_direction,
        "treg.ops.reference imports treg.ops",
        {"treg/ops/reference.py": "from treg import ops"},
    ),
    (wrong_direction, "treg.ops.head imports treg.viz", {"treg/ops/head.py": "from .. import viz"}),
    (
        wrong_direction,
        "treg.ops.head imports treg.viz",
        {"treg/ops/head.py": "from importlib import import_module\nimport_module('treg.viz')"},
    ),
    (
        wrong_direction,
        "treg.ops.head imports triton",
        {"treg/ops/head.py": "import triton.language as tl"},
    ),
    (
        wrong_direction,
        "treg.losses imports treg.ops",
        {"treg/losses.py": "from treg.ops import linear_logprobs"},
    ),
    (wrong_direction, "treg.results imports treg", {"treg/results.py": "import treg"}),
    (
        wrong_direction,
        "treg imports treg.integrations.trl",
        {"treg/__init__.py": "from treg.integrations import trl"},
    ),
    (
        wrong_direction,
        "treg.trainer imports treg.cli",
        {"treg/trainer.py": "def f():\n    from . import cli"},
    ),
    (
        wrong_direction,
        "treg.integrations.trl imports treg.ops._f",
        {"treg/integrations/trl.py": "import treg.ops._f"},
    ),
    (wrong_direction, "treg.unknown: no row in MAY_IMPORT", {"treg/unknown.py": ""}),
    (
        wrong_direction,
        "treg_kernels.lse imports numpy",
        {"kernels/treg_kernels/lse.py": "import numpy"},
    ),
    (
        wrong_direction,
        "treg_kernels.lse imports treg.ops",
        {"kernels/treg_kernels/lse.py": "from treg import ops"},
    ),
    (
        cycles,
        "treg.ops.a <- treg.ops.b <- treg.ops.a",
        {
            "treg/ops/a.py": "from treg.ops import b",
            "treg/ops/b.py": "def f():\n    from .a import x",
        },
    ),
    (
        cycles,
        "treg.ops <- treg.ops.a <- treg.ops",
        {"treg/ops/a.py": "from . import g", "treg/ops/__init__.py": "from treg.ops.a import f"},
    ),
    (
        environment_reads,
        "treg.ops.a uses environ",
        {"treg/ops/a.py": "import os\nos.environ.get('A')"},
    ),
    (environment_reads, "treg.ops.a uses getenv", {"treg/ops/a.py": "from os import getenv"}),
    (
        environment_reads,
        "treg_kernels.a uses getenv",
        {"kernels/treg_kernels/a.py": "import os as o\no.getenv('A')"},
    ),
    (
        circles_of_rooms,
        "treg.ops <- treg.viz <- treg.ops",
        {"treg/ops/a.py": "from treg.viz import b", "treg/viz/b.py": "import treg.ops"},
    ),
    (too_many_rooms, "21 rooms: treg, ", {f"treg/room{i}.py": "" for i in range(17)}),
    # each of 8 rooms imports each of 8 others: 64 ways, and no other way there
    (too_many_arrows, "64 arrows: [('treg.from0', 'treg.to0')", EIGHT_TO_EIGHT),
    # 12 rooms, each of which imports all that follow: 66 imports and 11 arrows
    (too_many_room_imports, "66 imports between rooms", EACH_THE_FOLLOWING),
    (long_files, "treg.ops.a has 501 lines", {"treg/ops/a.py": "\n" * 501}),
    (dense_lines, "9.50 code tokens a line", {"treg/ops/a.py": "a, b = c * d, 2\nf(a, b, c, 1)"}),
    (
        formatter_skips,
        "treg/ops/a.py:1: # fmt: skip",
        {"treg/ops/a.py": "x = [1,2]  # fmt: skip", "kernels/treg_kernels/a.py": "# fmt: off"},
    ),
    (
        formatter_skips,
        "tests/test_a.py:1: # fmt: off",
        {"tests/test_a.py": "# fmt: off\nx = [1,2]"},
    ),
    (kernels_package, "kernels/__init__.py", {"kernels/__init__.py": ""}),
    (
        machine_paths,
        "treg/ops/a.py:1: CACHE",
        {"treg/ops/a.py": "CACHE = '/" + "home/someone/cache'"},
    ),
    (machine_paths, "Makefile:2: X", {"Makefile": "\nX := /" + "opt/x"}),
]


@pytest.mark.parametrize(
    ("rule", "finding", "files"), OFFENDERS, ids=[finding for _, finding, _ in OFFENDERS]
)
def test_rule_catches(rule, finding, files, tmp_path):
    """Each rule can fail: a planted offender is found and named."""
    for path in ("treg/__init__.py", "treg/ops/__init__.py", "treg/cli.py", "treg/viz.py", *files):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(files.get(path, ""))
    (found,) = rule(tmp_path)
    assert finding in found


RUFF_LIMITS = {
    "E501": "x = 1  # " + "long " * 20,
    "C901": "def f(x):\n" + "".join(f"    if x == {i}:\n        x += 1\n" for i in range(12)),
    "PLR0913": f"def f({', '.join(f'a{i}' for i in range(11))}):\n    pass\n",
}


def ruff(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("ruff")
    return subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", *arguments],
        cwd=ROOT,
        input=text,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("rule", RUFF_LIMITS)
def test_linter_limits_the_length_of_lines_complexity_and_parameters(rule):
    """At most 100 characters, a complexity of 12, 10 parameters."""
    path = ("--stdin-filename", "treg/planted.py", "--output-format", "concise", "-")
    found = ruff(*path, text=RUFF_LIMITS[rule])
    assert found.returncode == 1, found.stderr
    assert f" {rule} " in found.stdout


def idle_exemptions(exempt: dict[str, list[str]]) -> list[str]:
    """The rows of per-file-ignores that ignore nothing."""
    broken: dict[str, set[str]] = {}
    for rule in {rule for rules in exempt.values() for rule in rules}:
        everything = ("--config", "lint.per-file-ignores = {}", "--output-format", "json", ".")
        found = json.loads(ruff("--select", rule, *everything).stdout)
        broken[rule] = {str(Path(x["filename"]).relative_to(ROOT)) for x in found}
    idle = []
    for pattern, rules in exempt.items():
        files = {str(file.relative_to(ROOT)) for file in ROOT.glob(pattern)}
        idle += [f"{pattern}: {rule}" for rule in rules if not files & broken[rule]]
    return idle


def test_no_file_is_exempt_from_a_limit_that_it_keeps():
    """The list of exemptions gets shorter with the code."""
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert idle_exemptions(settings["tool"]["ruff"]["lint"]["per-file-ignores"]) == []


def test_an_idle_exemption_is_found():
    exempt = {
        "kernels/treg_kernels/*.py": ["PLR0913", "C901"],
        "treg/results.py": ["PLR0913"],
        "treg/no_such_file.py": ["C901"],
    }
    assert idle_exemptions(exempt) == [
        "kernels/treg_kernels/*.py: C901",
        "treg/results.py: PLR0913",
        "treg/no_such_file.py: C901",
    ]


def test_rows_of_the_slow_tests_name_tests():
    assert slow.idle_rows() == []


def test_an_idle_row_of_the_slow_tests_is_found(monkeypatch):
    monkeypatch.setattr(slow, "FILES", ("ops/test_gone.py",))
    monkeypatch.setattr(slow, "FUNCTIONS", {"test_tree.py": ("test_gone", "test_tree_keeps")})
    assert slow.idle_rows() == ["ops/test_gone.py", "test_tree.py::test_gone"]
