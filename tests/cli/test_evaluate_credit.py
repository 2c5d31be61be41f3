"""treg evaluate-credit from a file to the table, with a model whose log-probs are known."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

transformers = pytest.importorskip("transformers")
metrics = pytest.importorskip("sklearn.metrics")
pytest.importorskip("pyarrow")

from treg.cli import main  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = tiny.tiny_tokenizer(chat=False)
ANSWERS = [
    "the old owl said that the answer is 42.",
    "the sun and the moon are happy.",
    "Once upon a time there was a little fox.",
    "the user is happy, said the fox",
    "here is a conversation with the owl",
    "keep it short, the system says hello",
]


def bigrams():
    """A model that sees the last token alone: its blocks add nothing to the embeddings."""
    model = tiny.tiny_llama(len(TOKENIZER), num_hidden_layers=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


def logps_of(model, before, ids):
    """log p of each id after the one before it, in float64, from the tables of a `bigrams`."""
    embeddings = model.model.embed_tokens.weight.detach().double().numpy()
    head = model.lm_head.weight.detach().double().numpy()
    scale = model.model.norm.weight.detach().double().numpy()
    x = embeddings[[before, *ids[:-1]]]
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + model.config.rms_norm_eps) * scale
    logits = x @ head.T
    logits -= logits.max(1, keepdims=True)
    every = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return every[np.arange(len(ids)), ids], -(np.exp(every) * every).sum(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("evaluate")
    bigrams().save_pretrained(path / "model")
    TOKENIZER.save_pretrained(path / "model")
    rows = []
    for i, answer in enumerate(ANSWERS):
        words = [x.span() for x in re.finditer(r"\w+", answer)]
        spans = [{"start": a, "end": b, "type": "odd" if i % 2 else "even"} for a, b in words[i::4]]
        rows.append({"prompt": f"what is {i}?", "answer": answer, "spans": spans})
    (path / "marked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = []
    for i in range(3):
        spans = {"rejected_spans": rows[2 * i]["spans"], "chosen_spans": []}
        texts = {"chosen": ANSWERS[2 * i + 1], "rejected": ANSWERS[2 * i]}
        pairs.append({"prompt": f"what is {i}?", **texts, **spans})
    (path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return path


def evaluated(folder, tmp_path, *more, data="marked.jsonl", model="model"):
    """What goes into --json."""
    out = tmp_path / "out.json"
    command = ["--data", folder / data, "--format", "spans", "--json", out]
    command += ["--model", folder / model] if model else []
    assert main(["evaluate-credit", *map(str, command), *map(str, more)]) == 0
    return json.loads(out.read_text())


def values(said):
    """Of each score the values of its measures."""
    results = said["evaluation"]["results"]
    return {x["name"]: {k: v["value"] for k, v in x["measures"].items()} for x in results}


def test_the_table_of_known_log_probs(folder, tmp_path, capsys):
    said = evaluated(folder, tmp_path, "--rewards", "surprise", "--draws", 50)
    model = bigrams()
    wrong, surprise, entropy, position = [], [], [], []
    for line in (folder / "marked.jsonl").read_text().splitlines():
        row = json.loads(line)
        start = len(row["prompt"])
        whole = TOKENIZER(row["prompt"] + row["answer"], return_offsets_mapping=True)
        first = len(TOKENIZER(row["prompt"])["input_ids"])
        ids, places = whole["input_ids"][first:], whole["offset_mapping"][first:]
        logps, entropies = logps_of(model, whole["input_ids"][first - 1], ids)
        surprise.append(-logps)
        entropy.append(entropies)
        position.append(np.arange(len(ids)) / len(ids))
        marked = [(x["start"] + start, x["end"] + start) for x in row["spans"]]
        wrong.append([any(a < end and b > begin for begin, end in marked) for a, b in places])
    wrong = np.concatenate(wrong)
    found = values(said)
    for name, finds in (
        ("surprise (rewards)", surprise),
        ("surprise (baseline)", surprise),
        ("entropy", entropy),
        ("position", position),
    ):
        finds = np.concatenate(finds)
        assert found[name]["auroc"] == pytest.approx(metrics.roc_auc_score(wrong, finds), abs=1e-3)
        expected = metrics.average_precision_score(wrong, finds)
        assert found[name]["average_precision"] == pytest.approx(expected, abs=1e-3)
    evaluation = said["evaluation"]
    assert (evaluation["tokens"], evaluation["wrong"]) == (len(wrong), wrong.sum())
    assert evaluation["labels"].keys() == {"even", "odd"}
    shown = capsys.readouterr().out
    assert f"{len(wrong):,} judged tokens, {wrong.sum()} of them wrong" in shown
    assert f"{found['entropy']['auroc']:.3f} [" in shown
    assert "surprise (rewards) is not above the best baseline" in shown
    assert "AUROC by error type" in shown


def test_the_same_seed_gives_the_same_numbers(folder, tmp_path):
    first, again = (evaluated(folder, tmp_path, "--rewards", "random") for _ in range(2))
    assert first == again
    other = evaluated(folder, tmp_path, "--rewards", "random", "--seed", 1)
    assert values(first)["random (baseline)"] != values(other)["random (baseline)"]
    assert values(first)["surprise"] == values(other)["surprise"]


def test_halves_and_limits(folder, tmp_path, capsys):
    parts = [
        evaluated(folder, tmp_path, "--rewards", "random", "--draws", 5, *more)["evaluation"]
        for more in (("--half", "first"), ("--half", "second"), (), ("--limit", 2))
    ]
    first, second, whole, two = [part["tokens"] for part in parts]
    assert first + second == whole > two and parts[3]["documents"] == 2
    assert "marked.jsonl (spans) first half with model" in capsys.readouterr().out


def test_both_halves_are_what_each_is_alone(folder, tmp_path, capsys):
    given = ("--rewards", "random", "--draws", 20)
    alone = {
        x: evaluated(folder, tmp_path, *given, "--half", x) for x in ("all", "first", "second")
    }
    capsys.readouterr()
    said = evaluated(folder, tmp_path, *given, "--half", "both")
    text = capsys.readouterr().out
    assert "evaluation" not in said and "conclusions" not in said
    for part, expected in alone.items():
        assert said[part]["evaluation"] == expected["evaluation"]
        assert said[part]["conclusions"] == expected["conclusions"]
    heads = ["both halves with model", "\nall documents\n", "\nfirst half\n", "\nsecond half\n"]
    places = [text.index(head) for head in heads]
    assert places == sorted(places) and text.count("The best baseline is") == 3
    assert said["settings"]["marked"]["half"] == "both"


def test_both_halves_on_a_page(folder, tmp_path):
    evaluated(folder, tmp_path, "--half", "both", "--draws", 5, "--plots", tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "first half" in page and "second half" in page


def test_a_half_without_a_document_says_so(folder, tmp_path, capsys):
    row = (folder / "marked.jsonl").read_text().splitlines()[0]
    (tmp_path / "one.jsonl").write_text(row)
    command = ["--data", str(tmp_path / "one.jsonl"), "--format", "spans", "--half", "both"]
    assert main(["evaluate-credit", *command, "--model", "m"]) == 2
    error = capsys.readouterr().err
    assert "half, found none: with the seed 0 none of 1 is in it; give more documents" in error
    assert "another --seed" in error


def test_a_half_whose_answers_are_all_refused_is_named(folder):
    from treg.cli.evaluate_credit import _Run
    from treg.cli.options import EvaluateOptions, MarkedOptions, RewardsOptions
    from treg.evaluate.evaluation import evaluate_scores
    from treg.evaluate.scored import ScoredAnswer, in_half

    name = next(x for x in "abcdef" if in_half(x, "second", 0))
    flags, scores = np.array([True, False]), {"s": np.array([0.1, 0.2])}
    answers = [ScoredAnswer(name, scores, flags, ~flags)]
    run = _Run(MarkedOptions(["d"], "spans", half="both"), EvaluateOptions(), RewardsOptions())
    parts = run.parts(answers)
    assert list(parts) == ["all", "second"]
    lines = run.told({part: evaluate_scores(x, draws=0) for part, x in parts.items()})
    assert lines[-1] == "first half: none of its answers could be scored"


def test_a_sample_is_drawn_from_the_whole_file(folder, tmp_path):
    def drawn(*more):
        run_of(folder, *more).check()
        return [answer.index or 0 for answer in run_of(folder, *more).answers()[0]]

    found = {seed: drawn("--sample", "3", "--seed", str(seed)) for seed in range(20)}
    for indices in found.values():
        assert len(indices) == 3 and indices == sorted(set(indices))
    assert found[0] == drawn("--sample", "3")
    # each document comes in some sample, the last one too
    assert {x for indices in found.values() for x in indices} == set(range(len(ANSWERS)))
    assert drawn("--sample", "100") == list(range(len(ANSWERS)))
    first = drawn("--half", "first")
    assert set(drawn("--half", "first", "--sample", "1")) < set(first)


def run_of(folder, *more):
    """The run of a command on the folder's answers, before anything is loaded."""
    from treg.cli.evaluate_credit import KINDS, _Run
    from treg.cli.options import parse

    given = ["--data", str(folder / "marked.jsonl"), "--format", "spans", "--model", "m", *more]
    return _Run(*parse("evaluate-credit", given, KINDS))


def test_an_annotated_file_is_joined(folder, tmp_path):
    """Its streams give what the source gives on the fly; a model is not needed."""
    made = tmp_path / "a.parquet"
    command = ["--model", folder / "model", "--data", folder / "pairs.jsonl", "--output", made]
    options = ["--rewards", "several", "--rewards.sources", "surprise", "fixed=constant"]
    extra = ["--per_token", "--max_length", 200]
    assert main(["annotate", *map(str, [*command, *options, *extra])]) == 0
    more = ("--annotated", made, "--tokenizer", folder / "model")
    joined = evaluated(folder, tmp_path, *more, data="pairs.jsonl", model=None)
    direct = evaluated(folder, tmp_path, *options, data="pairs.jsonl")
    joined, direct = values(joined), values(direct)
    assert set(joined) == {
        *("surprise (file)", "fixed", "surprise (baseline)", "surprise_by_word"),
        *("position", "length", "random"),
    }
    for a, b in (("surprise (file)", "surprise (rewards)"), ("fixed", "fixed")):
        for name, value in joined[a].items():
            assert value == pytest.approx(direct[b][name], abs=1e-3), name
    named = evaluated(folder, tmp_path, *more, "--streams", "fixed", data="pairs.jsonl", model=None)
    assert "surprise (file)" not in values(named) and "fixed" in values(named)
    assert "pair_accuracy" in joined["fixed"]


def test_a_page(folder, tmp_path, capsys):
    page = tmp_path / "out.html"
    evaluated(folder, tmp_path, "--rewards", "surprise", "--draws", 5, "--plots", page)
    assert "<h1>marked.jsonl (spans) with model</h1>" in page.read_text()
    assert f"wrote {page}" in capsys.readouterr().out


def test_the_same_in_python_as_the_page_has_it(folder, tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "evaluate.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder)
    exec(block.replace("MODEL", "model").replace('"contrastive"', '"surprise"'), {})
    said = capsys.readouterr().out
    evaluated(folder, tmp_path, "--rewards", "surprise")
    shown = capsys.readouterr().out
    for word in ("entropy", "position", "The best baseline is"):
        (line,) = (x for x in said.splitlines() if x.strip().startswith(word))
        assert line.split() in [x.split() for x in shown.splitlines()]


def test_an_answer_that_is_too_long_is_counted(folder, tmp_path, capsys):
    short = tiny.tiny_llama(len(TOKENIZER), max_position_embeddings=16)
    short.save_pretrained(folder / "short")
    TOKENIZER.save_pretrained(folder / "short")
    said = evaluated(folder, tmp_path, "--rewards", "surprise", "--draws", 5, model="short")
    (count,) = said["counts"]["answers"]["dropped"].values()
    assert said["evaluation"]["answers"] == len(ANSWERS) - count > 0
    assert re.search(rf"left out {count} answers?: pair too long", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--half third", "half: expected one of first, second, both, all, got 'third'"),
        ("--sample 0", "sample: expected a whole number >= 1, got 0"),
        ("--sample 2 --limit 3", "sample: expected no --limit beside it, got 3"),
        ("--draws -1", "draws: expected a whole number >= 0, got -1"),
        ("--max_length 0", "max_length: expected an integer >= 2 or None, got 0"),
        ("--limit 0", "limit: expected a whole number >= 1, got 0"),
        ("--step_score max", "step_score: expected one of min, mean, sum, got 'max'"),
        ("--plots a.pdf", "plots: expected a path that ends in .svg, .png, .html, got 'a.pdf'"),
        ("--json no/such/a.json", "json: no such folder: no/such"),
        ("--streams a", "streams: expected --annotated FILE with it, got none"),
        ("--shape scal=1", "shape: expected one of"),
    ],
)
def test_what_is_refused(folder, more, message, capsys):
    command = ["--data", str(folder / "marked.jsonl"), "--format", "spans"]
    assert main(["evaluate-credit", *command, "--model", "m", *more.split()]) == 2
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "form", "message"),
    [
        ([], "spans", "expected rows with marked answers, found none: there is no row"),
        (
            [{"answer": "a b", "spans": [], "note": "c"}],
            "spans",
            "or leave it out with --format.columns note=",
        ),
        (
            [{"prompt": "c", "chosen": "a", "rejected": "b"}],
            "spans",
            "name them with --format.side_column",
        ),
        ([{"answer": "a b", "odd": []}], "spans", "name it with --format.column,"),
        ([{"good": "a", "bad": "b"}], "pairs", "are good, bad; name it with --format.good"),
        (
            [{"problem": "a", "parts": ["b"]}],
            "steps",
            "problem, parts; name it with --format.steps",
        ),
        ([{"answer": "a [b]"}], "tags", "expected marks or pairs, found neither in 1 answers; is"),
    ],
)
def test_a_file_of_another_form_says_what_to_give(rows, form, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--data", str(tmp_path / "a.jsonl"), "--format", form, "--model", "m"]
    assert main(["evaluate-credit", *command]) == 2
    error = capsys.readouterr().err
    assert message in error and " --columns" not in error


def test_a_model_is_needed_unless_a_file_has_all(folder, capsys):
    command = ["--data", str(folder / "marked.jsonl"), "--format", "spans"]
    assert main(["evaluate-credit", *command]) == 2
    assert "error: model: expected a causal LM, got none; without one" in capsys.readouterr().err


def test_options_of_a_format(folder, tmp_path, capsys):
    """On its page, on the command line and in YAML, where they may be nested."""
    from treg.cli.options import EvaluateOptions, MarkedOptions, RewardsOptions, parse

    with pytest.raises(SystemExit):
        main(["evaluate-credit", "--format", "tags", "--help"])
    assert "options of the format 'tags':" in capsys.readouterr().out
    config = tmp_path / "run.yaml"
    config.write_text("data: d\nmodel: m\nformat:\n  name: tags\n  tags: [bad, odd]\n")
    kinds = (MarkedOptions, EvaluateOptions, RewardsOptions)
    marked, own, _ = parse("evaluate-credit", ["--config", str(config)], kinds)
    assert (marked.format, marked.format_options, own.model) == (
        "tags",
        {"tags": ["bad", "odd"]},
        "m",
    )
    given = ["--data", "d", "--format", "tags", "--format.tags", "x"]
    marked, *_ = parse("evaluate-credit", given, kinds)
    assert marked.format_options == {"tags": ["x"]}


def test_formats_that_are_listed_without_their_modules():
    from treg.cli.kinds import FORMATS
    from treg.evaluate.readers import READERS

    assert tuple(READERS) == FORMATS
