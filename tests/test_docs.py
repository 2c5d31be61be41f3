"""Holds README.md and the pages of docs/: what they show runs, and what they point at is there."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from treg.data import parse_row
from treg.data.annotated import read_annotated
from treg.ops import reference

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def tool(name: str) -> ModuleType:
    """A file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_make_docs_installs_what_the_extra_does():
    listed = re.search(r"^docs = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (install,) = re.findall(r"INSTALL\) (mkdocs.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = {x.strip(" '\"") for x in listed[1].split(",")}
    assert {x.strip("'") for x in install.split()} == wanted | {"ruff"}


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_the_snippet_of_the_readme_runs_as_printed(capsys):
    """Against the dense reference in float64, on the snippet's own inputs."""
    (snippet,) = python_blocks(README)
    names: dict = {}
    exec(snippet, names)
    exact = [names[x].detach().double().requires_grad_() for x in ("hidden", "head")]
    given = [names[x] for x in ("target", "rewards", "ref_logps")]
    expected = reference.fused_treg_loss(*exact, *given, beta=0.1, alpha=0.25).loss
    gradients = torch.autograd.grad(expected, exact)
    assert capsys.readouterr().out == f"loss {expected:.4f}\n"
    for found, right in zip((names["hidden"].grad, names["head"].grad), gradients, strict=True):
        assert (found - right).norm() <= 1e-5 * right.norm()


def dead_links(file: Path) -> list[str]:
    """Links to files that are not there. Pictures are made by other means, and come later."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)", text)
    return [x for x in links if "://" not in x and not (file.parent / x).exists()]


def test_links_lead_somewhere(tmp_path):
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *PAGES]
    assert {str(file): dead_links(file) for file in files if dead_links(file)} == {}
    (tmp_path / "page.md").write_text("[a](gone.md#part) [b](page.md) ![c](gone.png)")
    assert dead_links(tmp_path / "page.md") == ["gone.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_pages_is_python(page):
    for block in python_blocks(page.read_text()):
        ast.parse(block)


def test_the_rows_that_are_shown_are_read():
    """All three are a question and two answers of one turn each."""
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    rows = [parse_row(json.loads(line), chat=True) for line in shown.splitlines()]
    assert [row.prompt[0]["content"] for row in rows] == ["What is 2 + 2?", "Hi", "Hi"]
    assert [row.chosen[0]["content"] for row in rows] == ["4", "Hello!", "Hello!"]
    assert [row.rejected[0]["content"] for row in rows] == ["5", "Go away.", "Go away."]
    assert all(
        [x["role"] for x in (*row.prompt, *row.chosen, *row.rejected)]
        == ["user", "assistant", "assistant"]
        for row in rows
    )


def test_an_annotated_file_is_filtered_as_shown(tmp_path, monkeypatch):
    tiny = pytest.importorskip("tiny")
    pytest.importorskip("pyarrow")
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    lengths = (5, 600, 7)
    rows = [tiny_row(index, length) for index, length in enumerate(lengths)]
    meta = {"fingerprint": {"model": "m", "tokenizer": "t"}, "settings": {}, "report": {}}
    tiny.write_annotated("annotated.parquet", rows, meta)
    (block,) = python_blocks((ROOT / "docs" / "annotated-file.md").read_text())
    exec(block, {})
    before, meta_before = read_annotated(tmp_path / "annotated.parquet")
    after, meta_after = read_annotated(tmp_path / "short.parquet")
    assert meta_after["fingerprint"] == meta_before["fingerprint"] == meta["fingerprint"]
    assert [x["where"] for x in after] == [before[0]["where"], before[2]["where"]]


def test_a_step_with_shared_prompts_runs_as_printed():
    """Its loss and gradients are those of each sequence in a row of its own."""
    tiny = pytest.importorskip("tiny")
    page = (ROOT / "docs" / "training-step.md").read_text()
    (block,) = (x for x in python_blocks(page) if "share_prompts" in x)
    model = tiny.tiny_llama(50)
    with torch.no_grad():
        reference = tiny.tiny_llama(50, initializer_range=0.2)
    prompt, answers = torch.arange(1, 7).reshape(2, 3), torch.arange(10, 26).reshape(4, 4)
    ids = torch.cat([prompt.repeat(2, 1), answers], dim=1)
    mask = torch.ones_like(ids)
    ids[1, 5:], mask[1, 5:] = 0, 0
    labels = ids.masked_fill((mask == 0) | (torch.arange(7) < 3), -100)
    rewards = torch.rand(ids.shape) - 0.5
    names = {"torch": torch, "model": model, "reference": reference, "ids": ids, "mask": mask}
    exec(block, names | {"labels": labels, "rewards": rewards})
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    exec(
        block.replace("share_prompt=shared, ", "attention_mask=mask, ")
        .replace("scored_rows(hidden, labels, shared)", "scored_rows(hidden, labels)")
        .replace("**shared.inputs", "input_ids=ids, attention_mask=mask"),
        names | {"labels": labels, "rewards": rewards},
    )
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).norm() <= 1e-5 * p.grad.norm() > 0, name


def test_advantages_as_printed():
    blocks = python_blocks((ROOT / "docs" / "online.md").read_text())
    names: dict = {}
    exec(blocks[0], names)
    mask, advantages, by_pairs = (names[x] for x in ("mask", "advantages", "by_pairs"))
    for found in (advantages, by_pairs):
        assert found[mask].all() and not found[~mask].any()
    assert by_pairs[2, 0] == by_pairs[2, 2] != by_pairs[2, 3]  # a hole between two tokens of a pair


def tiny_row(index: int, length: int) -> dict:
    row = {"index": index, "where": f"row {index}", "prompt_ids": [1, 2]}
    row["prompt_text"] = "?"
    for side in ("chosen", "rejected"):
        row[f"{side}_ids"] = [3] * length
        row[f"{side}_token_rewards"] = [0.25] * length
        row[f"{side}_text"] = "word " * length
        row[f"ref_{side}_logps"] = -1.0
    return row


# what griffe makes a table of, one parameter a row

DOCSTRING = """\
What it does.

Args:
    hidden: [N, D].
    weight: [V, D]. target: [N] int64;
        see beta: it is no entry here.
    beta: > 0, a scale. alpha: >= 0.
    bias, shard: as elsewhere.
Returns:
    A number. beta: not here.
"""


def test_args_of_a_docstring_get_a_row_each():
    pytest.importorskip("griffe")
    names = ["hidden", "weight", "target", "beta", "alpha", "bias", "shard"]
    found = tool("griffe_args").with_entries(DOCSTRING, names)
    assert found == (
        "What it does.\n\nArgs:\n"
        "    hidden: [N, D].\n"
        "    weight: [V, D].\n"
        "    target: [N] int64; see beta: it is no entry here.\n"
        "    beta: \\> 0, a scale.\n"
        "    alpha: \\>= 0.\n"
        "    bias: as elsewhere.\n"
        "    shard: as elsewhere.\n"
        "Returns:\n    A number. beta: not here.\n"
    )


def test_long_text_of_several_parameters_is_not_repeated():
    pytest.importorskip("griffe")
    long = "word " * 30
    found = tool("griffe_args").with_entries(f"Args:\n    a, b: {long}\n", ["a", "b"])
    assert found == f"Args:\n    a: {long.strip()}\n    b: see `a`\n"


@pytest.mark.parametrize("package", ["ops", "losses", "rl", "rewards", "data", "heads", "trainer"])
def test_the_reference_has_every_public_name(package):
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    hooks = tool("docs_hooks")
    page = hooks.on_page_markdown((ROOT / "docs" / "api" / f"{package}.md").read_text())
    module = importlib.import_module(f"treg.{package}")
    for name in module.__all__:
        assert f"::: treg.{package}.{name}" in page.splitlines()


def test_formulas_and_what_a_page_loads():
    pytest.importorskip("latex2mathml")
    pytest.importorskip("mkdocs")
    hooks = tool("docs_hooks")
    page = hooks.on_page_markdown("before\n\n```math\n\\frac{1}{2}\n```\n\nafter")
    drawn = re.sub("</?mrow>", "", page)
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in drawn and "```" not in page
    link = '<a href="https://a.org">a</a><link rel="canonical" href="https://b.org">'
    loaded = '<script src="https://c.org/x.js"></script><link rel=x href="//d.org/y.css">'
    assert hooks.loads(link + loaded) == ["https://c.org/x.js", "//d.org/y.css"]


def test_the_table_of_versions_is_the_record(tmp_path):
    compat = tool("compat")
    page = (ROOT / "docs" / "compatibility.md").read_text()
    record = {"oldest-3.10": {"outcome": "2 tests fail", "passed": 3, "skipped": 1}}
    record["newest-3.13"] = {"outcome": "no Python 3.13 on this machine"}
    table = compat.table(record)
    assert "| oldest-3.10 | 3.10 |  |  |  |  |  | 2 tests fail: 3 passed, 1 skipped |" in table
    assert "| newest-3.13 | 3.13 |  |  |  |  |  | no Python 3.13 on this machine |" in table
    assert table in compat.with_table(page, record)
    with pytest.raises(ValueError, match="expected the lines"):
        compat.with_table("no markers", record)


def test_files_that_pages_include_are_there():
    """A formatter takes the mark for Python where it stands in a block of Python."""
    included = 0
    for page in (ROOT / "docs").rglob("*.md"):
        text = page.read_text()
        assert "--8 <" not in text, page
        for name in re.findall(r'--8<-- "(.*)"', text):
            assert (ROOT / name).is_file(), name
            included += 1
    assert included >= 10
