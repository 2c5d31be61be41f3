"""Holds the package: what importing costs, the imports that are shown, what a wheel contains."""

import ast
import importlib
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


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
    inside = ("os", "_collections_abc", "collections.abc")
    while frame and frame.f_globals.get("__name__") in inside:
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
heavy = [name for name in ("torch", "triton", "transformers") if name in sys.modules]
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


def test_public_names_and_modules_come_when_they_are_asked_for(tmp_path):
    code = (
        "import treg, sys; before = set(sys.modules); assert 'torch' not in before\n"
        "assert set(treg.__all__) <= set(dir(treg))\n"
        "from treg import *\n"
        "from treg.checks import is_debug as a, set_debug as b\n"
        "from treg.ops import fused_treg_loss as c, linear_logprobs as d\n"
        "assert (is_debug, set_debug, fused_treg_loss, linear_logprobs) == (a, b, c, d)\n"
        "assert treg.fused_treg_loss is c and treg.losses.LossOptions and treg.results\n"
        "try: treg.no_such_name\n"
        "except AttributeError as error: print(error)\n"
    )
    done = fresh_python(["-c", code], tmp_path, [ROOT, ROOT / "kernels"])
    assert done.stdout == "module 'treg' has no attribute 'no_such_name'\n", done.stderr


def test_the_version_costs_no_import_of_torch(tmp_path):
    """Processor time beyond an empty program's."""
    code = (
        "import sys; from treg.cli import main; main(['--version']); print('torch' in sys.modules)"
    )
    version = re.search(r'__version__ = "(.*)"', (ROOT / "treg" / "__init__.py").read_text()).group(
        1
    )

    def seconds(program: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = fresh_python(["-c", program], tmp_path, [ROOT, ROOT / "kernels"])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout

    (spent, printed), (nothing, _) = seconds(code), seconds("pass")
    assert printed == f"treg {version}\nFalse\n"
    assert spent - nothing < 0.3


def bounds(text: str) -> dict[str, str]:
    """Package -> version, of lines `name>=version` or `name==version`."""
    return dict(re.findall(r"^[ \"]*([a-z0-9-]+)[>=]=([\d.]+)", text, flags=re.MULTILINE))


def test_the_oldest_versions_that_are_tested_are_those_that_are_claimed():
    claimed = bounds((ROOT / "pyproject.toml").read_text())
    tested = bounds((ROOT / "constraints-oldest.txt").read_text())
    runtime = claimed.keys() - {"setuptools"}
    assert {"torch", "triton", "numpy", "transformers", "trl"} <= runtime <= tested.keys()
    for name in runtime:
        assert re.sub(r"(\.0)+$", "", tested[name]).startswith(claimed[name]), name


def test_import_probe_catches(tmp_path):
    (tmp_path / "treg").mkdir()
    (tmp_path / "triton.py").touch()
    (tmp_path / "treg" / "__init__.py").write_text(
        "import os, triton\nfrom os import environ\n"
        "os.getenv('A'), os.environ.get('B'), 'C' in environ\n"
        "environ.setdefault('D', ''), list(environ)\n"
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
        "import transformers; from transformers import Trainer\n"
        "from transformers.utils import is_kernels_available\n"
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

    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", "out"]
    done = fresh_python(["-m", "pip", "wheel", *options, "./source"], tmp_path, [])
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "out").glob("treg_losses-*.whl")
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    data = {
        "treg/viz/page.html.jinja",
        "treg/viz/page.css",
        "treg/viz/page.js",
        "treg/demo/model/model.safetensors",
        "treg/demo/model/tokenizer.json",
        "treg/py.typed",
        "treg_kernels/py.typed",
    }
    assert {"treg/__init__.py", "treg_kernels/__init__.py", *data} <= set(names)
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.partition("/")[0] for name in names} == {"treg", "treg_kernels"}


def test_trls_trainers_say_that_trl_is_missing(tmp_path):
    code = (
        "import importlib.metadata as metadata\n"
        "def missing(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = missing\n"
        "import treg.integrations.trl\n"
    )
    done = fresh_python(["-c", code], tmp_path, [ROOT, ROOT / "kernels"])
    assert (
        "ImportError: trl: expected TRL to be installed (pip install 'treg-losses[train,trl]')"
        in (done.stderr)
    )


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def shown_imports() -> list[tuple[str, str, str]]:
    """(where, module, name or "") of every import of treg in README.md, docs/ and examples/."""
    shown = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        name = str(page.relative_to(ROOT))
        shown += [(name, block) for block in python_blocks(page.read_text())]
    for file in sorted((ROOT / "examples").glob("*.py")):
        shown.append((f"examples/{file.name}", file.read_text()))
    found = []
    for where, text in shown:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found += [(where, alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [(where, node.module or "", alias.name) for alias in node.names]
    return [x for x in found if x[1].partition(".")[0] == "treg"]


# What README.md and examples/ of the last release imported from modules that have moved since,
# and where it is now.
OLD_NAMES = {
    ("treg.annotate", "AnnotateOptions"): "treg.rewards.annotate",
    ("treg.annotate", "annotate"): "treg.rewards.annotate",
    ("treg.modeling", "token_logprobs"): "treg.heads.logprobs",
    ("treg.reference", "fused_treg_loss"): "treg.ops.reference",
    ("treg.reference", "linear_logprobs"): "treg.ops.reference",
    ("treg.regularizer", "token_regularizer"): "treg.losses.regularizer",
    ("treg.views", "pair_views"): "treg.viz.views",
}


def imported(module: str, name: str) -> object:
    """What `from module import name` gives; without a name, the module."""
    found = importlib.import_module(module)
    if not name:
        return found
    if not hasattr(found, name):
        return importlib.import_module(f"{module}.{name}")
    return getattr(found, name)


def test_imports_that_are_shown_resolve():
    shown = shown_imports()
    assert {"README.md", "docs/trainers.md", "examples/one_step.py"} <= {
        where for where, _, _ in shown
    }
    missing = []
    for where, module, name in shown:
        try:
            imported(module, name)
        except ImportError as error:
            missing.append(f"{where}: {module} {name}: {error}")
    assert missing == []


@pytest.mark.parametrize(("module", "name"), OLD_NAMES)
def test_old_names_still_work_and_say_the_new_ones(module, name):
    sys.modules.pop(module, None)
    new = OLD_NAMES[module, name]
    with pytest.warns(
        DeprecationWarning, match=f"^{re.escape(module)} is now {re.escape(new)};"
    ) as w:
        importlib.import_module(module)
    assert w[0].filename == importlib.__file__
    assert getattr(sys.modules[module], name) is imported(new, name)


def test_every_old_name_is_tested():
    files = (ROOT / "treg" / "old_names").glob("*.py")
    assert {f"treg.{file.stem}" for file in files} - {"treg.__init__"} == {
        module for module, _ in OLD_NAMES
    }
