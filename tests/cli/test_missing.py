"""What the command line says of a package that is not installed, and of how to get it."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from surroundings import environment

from treg import cli
from treg.cli import EXIT_FAILED, main, missing

ROOT = Path(__file__).resolve().parents[2]
PROJECT = (ROOT / "pyproject.toml").read_text()


def extra(name: str) -> set[str]:
    """The packages of an extra of pyproject.toml, without their versions."""
    listed = re.search(rf"^{name} = \[(.*?)\]$", PROJECT, re.DOTALL | re.MULTILINE).group(1)
    return set(re.findall(r'"([a-z0-9-]+)', listed))


def test_packages_and_name_are_those_of_the_project():
    assert missing.TRAIN.keys() == extra("train")
    assert missing.EVALUATE.keys() == extra("evaluate")
    assert f'\nname = "{missing.DISTRIBUTION}"\n' in PROJECT


@pytest.mark.parametrize("package", missing.TRAIN)
def test_a_package_of_the_extra(package):
    module = {"pyyaml": "yaml"}.get(package, package)
    said = missing.advice(ModuleNotFoundError(f"No module named {module!r}", name=module))
    assert f"{package} is for {missing.TRAIN[package]}" in said
    assert said.endswith("pip install 'treg-losses[train]'")


def test_the_package_of_evaluate_credit():
    said = missing.advice(ModuleNotFoundError("No module named 'sklearn'", name="sklearn"))
    assert "scikit-learn is for treg evaluate-credit" in said
    assert said.endswith("pip install 'treg-losses[evaluate]'")


def test_another_package_is_not_promised_by_the_extra():
    said = missing.advice(ModuleNotFoundError("No module named 'mine'", name="mine.rewards"))
    assert "mine is no part of treg-losses" in said and "[train]" not in said


def test_a_package_that_transformers_finds_missing_itself():
    """The error of transformers, word for word where it matters: it has no `name`."""
    text = "The `Trainer` requires `accelerate>=1.1.0`: Please run `pip install x`"
    assert missing.advice(ImportError(text)).endswith("pip install 'treg-losses[train]'")


def test_a_log_that_cannot_be_written(monkeypatch):
    """The error that transformers itself raises."""
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    with pytest.raises(RuntimeError) as raised:
        integration_utils.TensorBoardCallback()
    said = missing.advice(raised.value)
    assert "pip install tensorboard;" in said and "[train]" not in said


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), ImportError("cannot import name 'a' from 'treg'")]
)
def test_other_errors_are_nobodys_missing_package(error):
    assert missing.advice(error) is None


def test_a_fault_is_raised_and_a_missing_package_is_not(monkeypatch, capsys):
    def fails(error):
        def load(name):
            raise error

        monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=load))
        return main(["train"])

    error = ModuleNotFoundError("No module named 'peft'", name="peft")
    assert fails(error) == EXIT_FAILED
    assert "treg train: error: No module named 'peft'; peft is for" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="CUDA error"):
        fails(RuntimeError("CUDA error"))


def test_where_it_really_is_missing(tmp_path):
    assert importlib.util.find_spec("jinja2")
    code = (
        "import sys; sys.modules['transformers'] = None; import treg.cli as c; sys.exit(c.main())"
    )
    command = [sys.executable, "-c", code, "annotate", "--model", "m", "--data", "d"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == EXIT_FAILED
    assert done.stderr.endswith("pip install 'treg-losses[train]'\n")
    assert "transformers is for models" in done.stderr
