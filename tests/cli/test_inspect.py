"""treg inspect: which models are compared, in which dtype, and what the page says of it."""

import json
import re

import numpy as np
import pytest
import tiny
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")

from treg.cli import main  # noqa: E402
from treg.data.annotated import read_annotated  # noqa: E402
from treg.viz.views import pair_views  # noqa: E402

BETA = 0.1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, annotations that it made in bfloat16, and another model, as if trained from it."""
    path = tmp_path_factory.mktemp("inspect")
    tokenizer = tiny.tiny_tokenizer()
    model = tiny.tiny_llama(len(tokenizer))
    for name in ("model", "trained"):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
    rows = []
    for i in range(4):
        answers = {"chosen": f"the answer is {2 * i}.", "rejected": f"the sun said {i}"}
        rows.append(json.dumps({"prompt": f"what is {i} + {i}?", **answers}))
    (path / "prefs.jsonl").write_text("\n".join(rows))
    made = ["--model", path / "model", "--data", path / "prefs.jsonl", "--dtype", "bfloat16"]
    made += ["--per_token", "--output", path / "a.parquet"]
    assert main(["annotate", *map(str, made)]) == 0
    return path


def inspect(folder, tmp_path, *more):
    page = tmp_path / "page.html"
    command = ["--data", folder / "a.parquet", "--output", page, "--beta", BETA, *more]
    assert main(["inspect", *map(str, command)]) == 0
    html = page.read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    return html, data["pairs"]


def logps(model, example, side):
    """Per-token log-probs, from the logits of the model itself."""
    prompt, response = example["prompt_ids"].tolist(), example[f"{side}_ids"].tolist()
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0].double()
    rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return rows[torch.arange(len(response)), torch.tensor(response)].numpy()


def load(folder, name):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def assert_implicit(folder, pairs, reference):
    """reference: (example, side) -> log-probs."""
    policy = load(folder, "trained")
    examples, _ = read_annotated(folder / "a.parquet")
    for pair, example in zip(pairs, examples, strict=True):
        for side in ("chosen", "rejected"):
            want = BETA * (logps(policy, example, side) - reference(example, side))
            assert pair[side]["implicit"] == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_the_annotating_model_has_no_implicit_rewards(folder, tmp_path, capsys):
    """Its file's log-probs are of bfloat16, and it runs in float32 here."""
    html, pairs = inspect(folder, tmp_path, "--model", folder / "model")
    for pair in pairs:
        assert pair["margin"] == 0
        assert not np.any(pair["chosen"]["implicit"]) and not np.any(pair["rejected"]["implicit"])
    note = "The model is the one that made the annotation"
    assert note in html and note in capsys.readouterr().out


def test_a_reference_of_another_dtype_runs_again(folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "treg_run.json").write_text(json.dumps({"model": str(folder / "model")}))
    html, pairs = inspect(folder, tmp_path, "--model", folder / "trained", "--run", run)
    reference = load(folder, "model")
    assert_implicit(folder, pairs, lambda example, side: logps(reference, example, side))
    assert "made in bfloat16 and the model runs in float32, so the reference was run again" in html


def test_without_the_reference_the_page_says_that_the_dtypes_differ(folder, tmp_path, capsys):
    html, pairs = inspect(folder, tmp_path, "--model", folder / "trained")
    assert_implicit(folder, pairs, lambda x, side: x[f"ref_{side}_token_logps"].astype(float))
    note = "made in bfloat16 and the model runs in float32: a part of the implicit rewards is"
    assert note in html and note in capsys.readouterr().out
    assert '<dt>dtype</dt><dd dir="auto">float32</dd>' in html


def test_the_dtype_that_is_asked_for(folder, tmp_path, capsys):
    command = ("--model", folder / "trained", "--dtype")
    html, _ = inspect(folder, tmp_path, *command, "bfloat16")
    assert '<dt>dtype</dt><dd dir="auto">bfloat16</dd>' in html and "runs in" not in html
    bad = ["inspect", "--data", folder / "a.parquet", *command, "int8"]
    assert main([str(x) for x in bad]) == 2
    assert "dtype: expected auto, float32, bfloat16 or float16, got 'int8'" in (
        capsys.readouterr().err
    )


def test_no_absolute_path_is_on_the_page(folder, tmp_path):
    html, pairs = inspect(folder, tmp_path, "--model", folder / "trained", "--limit", 3)
    assert str(folder) not in html and str(tmp_path) not in html
    assert [pair["where"] for pair in pairs] == [f"prefs.jsonl:{n}" for n in (1, 2, 3)]
    assert '<dt>pairs</dt><dd dir="auto">3 of 4</dd>' in html


def test_the_bar_moves_with_every_forward(folder, monkeypatch):
    seen = []

    class Bar:
        def __init__(self, total, disable, **_):
            seen.append((total, disable))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            seen.append(count)

    monkeypatch.setattr("treg.viz.views.tqdm", Bar)
    examples, _ = read_annotated(folder / "a.parquet")
    tokenizer = tiny.tiny_tokenizer()
    models = {"policy": load(folder, "trained"), "reference": load(folder, "model")}
    pair_views(examples, tokenizer, **models, tokens_per_batch=1, progress=True)
    (total, disabled), *counts = seen
    assert not disabled and len(counts) == 16 and sum(counts) == total  # a forward a sequence
