"""Holds the tree: who may import whom, what importing costs, what a wheel contains."""

import ast
import graphlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES = 350

# What a module, or a package and all below it, may import besides the standard library; the longest
# key wins. "*": anything without a private name in it. A module that no key covers is a finding:
# give it a row.
HUGGING_FACE = {"transformers", "accelerate", "datasets"}
MAY_IMPORT = {
    "treg_kernels": {"treg_kernels", "torch", "triton"},
    "treg.checks": {"treg_kernels", "torch"},
    "treg.results": {"torch"},
    "treg.files": {"yaml"},
    "treg.operators": {"torch"},
    "treg.losses": {
        *("treg.losses", "treg.checks", "treg.operators", "treg.results", "treg_kernels", "torch"),
    },
    "treg.ops": {"treg.ops", "treg.checks", "treg.losses", "treg.results", "treg_kernels", "torch"},
    "treg.ops.reference": {"treg.results", "torch"},
    "treg.heads": {"treg.heads", "treg.ops", "treg.results", "torch", "transformers"},
    "treg.data": {"treg.data", "treg.files", "torch", "numpy", "jinja2", "pyarrow", *HUGGING_FACE},
    "treg.rewards": {
        *("treg.rewards", "treg.data", "treg.files", "treg.heads", "treg.ops"),
        *("torch", "numpy", "jinja2", "tqdm", *HUGGING_FACE),
    },
    "treg.trainer": {
        *("treg.trainer", "treg.data", "treg.heads", "treg.ops", "treg.losses", "treg.results"),
        *("torch", "numpy", "peft", *HUGGING_FACE),
    },
    "treg.evaluate": {"treg.evaluate", "numpy"},
    "treg.viz": {
        *("treg.viz", "treg.data", "treg.evaluate", "treg.files", "treg.rewards"),
        *("torch", "numpy", "jinja2", "markupsafe", "rich", "matplotlib"),
    },
    # the demo is a user of the library
    "treg.demo": {
        *("treg.demo", "treg.data", "treg.evaluate", "treg.rewards", "treg.trainer", "treg.viz"),
        *("torch", "numpy", "tokenizers", "safetensors", *HUGGING_FACE),
    },
    "treg.cli": {
        *(
            "treg",
            "treg.cli",
            "treg.checks",
            "treg.data",
            "treg.demo",
            "treg.files",
            "treg.losses",
            "treg.ops",
        ),
        *("treg.rewards", "treg.trainer", "treg.viz", "torch", "peft", *HUGGING_FACE),
    },
    "treg.__main__": {"treg.cli"},
    "treg.integrations": {"*"},
    "treg.old_names": {"treg.heads", "treg.losses", "treg.ops", "treg.rewards", "treg.viz"},
}
# The package itself only gathers public names.
MAY_IMPORT["treg"] = MAY_IMPORT.keys() - {
    "treg_kernels",
    "treg.cli",
    "treg.demo",
    "treg.__main__",
    "treg.integrations",
}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every library module under root."""
    found = {}
    for source, package in ((root, "treg"), (root / "kernels", "treg_kernels")):
        for file in sorted((source / package).rglob("*.py")):
            parts = file.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """What a module imports, wherever in the file and also by a literal name: library modules in
    full, others' root.
    """
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            targets = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            if function in ("import_module", "__import__"):
                targets = [importlib.util.resolve_name(str(node.args[0].value), package)]
        for target in targets:
            top = target.partition(".")[0]
            if top not in ("treg", "treg_kernels"):
                yield top
                continue
            # `from module import name`: the module is meant, unless the name is a module itself. A
            # module that does not exist is kept as written, so that it is judged by its row.
            parent = target.rpartition(".")[0]
            yield (
                parent
                if target not in known and parent in known and isinstance(node, ast.ImportFrom)
                else target
            )


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
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def environment_reads(root: Path) -> list[str]:
    names = {"environ", "environb", "getenv", "getenvb"}
    found = []
    for name, file in modules(root).items():
        for node in ast.walk(ast.parse(file.read_text())):
            used = (
                {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            )
            used |= {node.attr} if isinstance(node, ast.Attribute) else set()
            found += [f"{name} uses {word}" for word in used & names]
    return found


def long_files(root: Path) -> list[str]:
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules(root).items()}
    return [f"{name} has {length} lines" for name, length in lengths.items() if length > MAX_LINES]


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


RULES = [wrong_direction, cycles, environment_reads, long_files, kernels_package, machine_paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_tree_keeps(rule):
    assert {"treg", "treg.ops", "treg_kernels"} <= modules(ROOT).keys()
    assert rule(ROOT) == []


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
    (long_files, "treg.ops.a has 351 lines", {"treg/ops/a.py": "\n" * 351}),
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


# Runs in a fresh interpreter. An access counts if the nearest frame outside os and its mapping base
# is library code.
IMPORT_PROBE = """
import json, os, sys
from pathlib import Path
from collections.abc import MutableMapping

root = Path(sys.argv[1])
library = tuple(str(root / folder) + os.sep for folder in ("treg", "kernels"))
reads = []

def note(key):
    frame = sys._getframe(2)
    while frame and frame.f_globals.get("__name__") in ("os", "_collections_abc", "collections.abc"):
        frame = frame.f_back
    if frame and os.path.realpath(frame.f_code.co_filename).startswith(library):
        reads.append(str(key))

class Recorder(MutableMapping):
    def __init__(self, inner): self.inner = inner
    def __getitem__(self, key): note(key); return self.inner[key]
    def __contains__(self, key): note(key); return key in self.inner
    def __iter__(self): note("all names"); return iter(self.inner)
    def __len__(self): note("their number"); return len(self.inner)
    def __setitem__(self, key, value): self.inner[key] = value
    def __delitem__(self, key): del self.inner[key]
    def copy(self): note("a copy"); return dict(self.inner)

os.environ, os.environb = Recorder(os.environ), Recorder(os.environb)
import treg
assert os.path.realpath(treg.__file__).startswith(library), treg.__file__
heavy = [name for name in ("triton", "transformers") if name in sys.modules]
print(json.dumps({"heavy": heavy, "reads": reads}))
"""


def fresh_python(
    arguments: list[str], cwd: Path, paths: list[Path]
) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def import_treg(root: Path, cwd: Path) -> dict[str, list[str]]:
    done = fresh_python(["-c", IMPORT_PROBE, str(root.resolve())], cwd, [root, root / "kernels"])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_import_loads_nothing_heavy_and_reads_no_environment(tmp_path):
    assert import_treg(ROOT, tmp_path) == {"heavy": [], "reads": []}


def test_import_probe_catches(tmp_path):
    (tmp_path / "treg").mkdir()
    (tmp_path / "triton.py").touch()
    (tmp_path / "treg" / "__init__.py").write_text(
        "import os, triton\nfrom os import environ\n"
        "os.getenv('A'), os.environ.get('B'), 'C' in environ, environ.setdefault('D', ''), list(environ)\n"
    )
    seen = import_treg(tmp_path, tmp_path)
    assert seen["heavy"] == ["triton"]
    assert {"A", "B", "C", "D", "all names"} <= set(seen["reads"])


def fake_hub_kernels(folder: Path) -> Path:
    """A distribution named `kernels`, of a version this transformers accepts, with any name it may
    import.
    """
    location = importlib.util.find_spec("transformers").submodule_search_locations[0]
    text = (Path(location) / "utils" / "import_utils.py").read_text()
    version = re.search(r'KERNELS_MIN_VERSION = "([\d.]+)"', text).group(1)
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text(
        "class Anything:\n"
        "    def __init__(self, *args, **kwargs): pass\n"
        "    def __call__(self, decorated): return decorated\n"
        "def __getattr__(name):\n"
        "    if name.startswith('__'): raise AttributeError(name)\n"
        "    return Anything\n"
    )
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (info / "RECORD").write_text(
        f"kernels/__init__.py,,\n{info.name}/METADATA,,\n{info.name}/RECORD,,\n"
    )
    return folder


def import_trainer(root: Path, stub: Path) -> subprocess.CompletedProcess[str]:
    """As in a checkout: the repository root comes first on sys.path, ahead of the installed
    packages.
    """
    code = (
        "import transformers; from transformers import Trainer; from transformers.utils import is_kernels_available\n"
        "import kernels; print(is_kernels_available(), kernels.__file__)"
    )
    return fresh_python(["-c", code], root, [stub])


def test_transformers_imports_beside_our_kernels_folder(tmp_path):
    pytest.importorskip("transformers")
    assert (ROOT / "kernels" / "treg_kernels").is_dir()
    stub = fake_hub_kernels(tmp_path / "stub")
    done = import_trainer(ROOT, stub)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", str(stub / "kernels" / "__init__.py")]


def test_kernels_package_would_break_transformers(tmp_path):
    """The reason for the rule, and the proof that the test above can fail."""
    pytest.importorskip("transformers")
    ours = tmp_path / "checkout" / "kernels" / "__init__.py"
    ours.parent.mkdir(parents=True)
    ours.touch()
    done = import_trainer(tmp_path / "checkout", fake_hub_kernels(tmp_path / "stub"))
    assert done.returncode != 0
    assert "cannot import name" in done.stderr and str(ours) in done.stderr


def test_wheel_holds_the_library_and_nothing_else(tmp_path):
    if not all(importlib.util.find_spec(tool) for tool in ("pip", "setuptools")):
        pytest.skip("needs pip and setuptools in this environment")
    source = tmp_path / "source"
    source.mkdir()  # a copy: a build leaves files in its source tree
    for name in ("pyproject.toml", "setup.cfg", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("treg", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests", "benchmarks", "treg_notes"):  # packages that a loose pattern would take
        (source / name).mkdir()
        (source / name / "__init__.py").touch()
    (source / "README.md").touch()
    expected = {str(file.relative_to(source)) for file in (source / "treg").rglob("*.py")}
    expected |= {
        str(file.relative_to(source / "kernels")) for file in (source / "kernels").rglob("*.py")
    }

    build = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--wheel-dir",
        "out",
        "./source",
    ]
    done = fresh_python(build, tmp_path, [])
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("treg-*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    data = {
        "treg/viz/page.html.jinja",
        "treg/demo/model/model.safetensors",
        "treg/demo/model/tokenizer.json",
    }
    assert {"treg/__init__.py", "treg_kernels/__init__.py", *data} <= set(names)
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in names} == {"treg", "treg_kernels"}
