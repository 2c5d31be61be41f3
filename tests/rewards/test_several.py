"""Several sources in one pass: each stream is what its source gives alone."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from judges import causal_lm, judge, judge_tokenizer
from tiny import tiny_llama, tiny_tokenizer

import treg.rewards.implicit
import treg.rewards.reward_model
from treg.cli import main
from treg.cli.options import RewardsOptions, RowOptions, parse
from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import read_annotated
from treg.rewards import Context, load_source, make_options, streams_given
from treg.rewards.annotate import AnnotateOptions, annotate, annotate_pairs
from treg.rewards.base import score_checked
from treg.rewards.response import ResponsePairs

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [
    {"prompt": "what is better?", "chosen": "the old owl", "rejected": "the sun and the moon"},
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
]
SOURCES = [
    {"stream": "contrast", "name": "contrastive", "unit": "word"},
    {"stream": "surprise", "name": "surprise", "shape": ["centre", "scale=0.5"]},
    {"stream": "segments", "name": "entropy", "threshold": 4.5},
    {"stream": "mask", "name": "messagewise", "take": "token_weights"},
]


def responses():
    pairs, _ = load_pairs(ROWS, TOKENIZER, EncodeOptions(256))
    return [response for pair in ResponsePairs(pairs, TOKENIZER) for response in pair]


def scored(name, given, context=None, **options):
    source = load_source(name, options, context or Context(MODEL, TOKENIZER))
    return score_checked(source, given)


def test_each_stream_is_that_of_its_source_alone():
    given = responses()
    found = scored("several", given, sources=SOURCES)
    alone = {
        "contrast": scored("contrastive", given, unit="word"),
        "segments": scored("entropy", given, threshold=4.5),
    }
    for i, response in enumerate(given):
        assert list(found[i]) == ["contrast", "surprise", "segments", "mask"]
        for stream, of in alone.items():
            assert found[i][stream].tolist() == of[i]["token_rewards"].tolist()
        mask = scored("messagewise", given)[i]["token_weights"]
        assert found[i]["mask"].tolist() == mask.tolist()
        n, plain = response.content, scored("surprise", given)[i]["token_rewards"]
        want = 0.5 * (plain[:n] - plain[:n].mean())
        np.testing.assert_allclose(found[i]["surprise"][:n], want, rtol=1e-5, atol=1e-6)
        assert not found[i]["surprise"][n:].any()


def test_common_forwards_run_once():
    """The reference for surprise, entropies and the reference columns; two requests for two
    readings of them.
    """
    seen = []
    context = Context(MODEL, TOKENIZER, on_tokens=seen.append)
    pairs, _ = load_pairs(ROWS, TOKENIZER, EncodeOptions(256))
    source = load_source("several", {"sources": SOURCES}, context)
    annotate_pairs(source, context, pairs)
    alone = []
    for name, reference in (("contrastive", False), ("constant", True)):
        context = Context(MODEL, TOKENIZER, on_tokens=alone.append)
        annotate_pairs(load_source(name, {}, context), context, pairs, reference=reference)
    assert sum(seen) == sum(alone) > 0


@pytest.mark.parametrize("name", ["redistribution", "implicit"])
def test_a_model_that_two_sources_name_is_loaded_and_run_once(name, monkeypatch):
    module = treg.rewards.reward_model if name == "redistribution" else treg.rewards.implicit
    loads, seen, load = [], [], module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    context = Context(MODEL, TOKENIZER, on_tokens=seen.append)
    inner = {"model": judge("llama", judge_tokenizer) if name == "redistribution" else causal_lm()}
    sources = [
        {"stream": "own", "name": name, **inner},
        {"stream": "mask", "name": "messagewise", "take": "token_weights"}
        | {"of": name, "of_options": inner},
    ]
    made, given = load_source("several", {"sources": sources}, context), responses()
    assert len(loads) == 1
    assert [made.check(x) for x in given] == [None] * len(given)
    found = made.score(given)
    both = sum(seen)
    # a source of another scale has the same model
    factor = {"beta_c": 0.5} if name == "redistribution" else {"beta": 0.5}
    other = load_source(name, inner | factor, context)
    assert len(loads) == 1 and other is not load_source(name, inner, context)
    seen.clear()
    context = Context(MODEL, TOKENIZER, on_tokens=seen.append)
    alone = load_source(name, inner, context)
    assert len(loads) == 2 and [alone.check(x) for x in given] == [None] * len(given)
    for streams, wanted in zip(found, alone.score(given), strict=True):
        assert streams["own"].tolist() == wanted["token_rewards"].tolist()
    assert both == sum(seen) > 0


def test_a_mix_is_a_weighted_sum():
    given = responses()
    mix = {"surprise": 0.25, "contrast": -2.0}
    for found in scored("several", given, sources=SOURCES, mix=mix):
        want = 0.25 * found["surprise"].double() - 2 * found["contrast"].double()
        np.testing.assert_allclose(found["token_rewards"], want, rtol=1e-5, atol=1e-6)


def test_streams_are_known_before_a_model_is_loaded():
    assert streams_given("several", {}) == ("contrastive", "surprise")
    options = {"sources": ["a=surprise"], "mix": ["a=1"]}
    assert streams_given("several", options) == ("token_rewards", "a")
    assert streams_given("messagewise", {}) == ("token_rewards", "token_weights")


def test_a_file_says_what_each_stream_is(tmp_path):
    options = AnnotateOptions(
        rewards="several",
        rewards_options={"sources": SOURCES[:2], "mix": ["surprise=1"]},
        shaping=("clip=0.5",),
    )

    def run(options):
        annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
        return read_annotated(tmp_path / "a.parquet")

    (example, *_), meta = run(options)
    run(options)
    streams = meta["streams"]
    assert list(streams) == ["token_rewards", "contrast", "surprise"]
    assert streams["surprise"] == {
        "source": "surprise",
        "settings": {"unit": "token"},
        "shaping": ["centre", "scale=0.5", "clip=0.5"],
        "take": "token_rewards",
    }
    assert streams["contrast"]["settings"]["unit"] == "word"
    assert streams["token_rewards"]["settings"]["mix"] == {"surprise": 1.0}
    assert np.abs(example["chosen_surprise"]).max() == 0.5
    for other in (
        {"sources": SOURCES[:2], "mix": ["surprise=2"]},
        {"sources": [SOURCES[0], SOURCES[1] | {"shape": "centre"}], "mix": ["surprise=1"]},
    ):
        changed = AnnotateOptions(rewards="several", rewards_options=other, shaping=("clip=0.5",))
        with pytest.raises(ValueError, match=r"a\.parquet: made with .*, now it is"):
            run(changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": []}, "sources: expected sources of different streams, got none"),
        ({"sources": ["surprise", "surprise"]}, "different streams, got surprise, surprise"),
        ({"sources": ["suprise"]}, "did you mean 'surprise'?"),
        ({"sources": ["a b=surprise"]}, "can be part of a column's, got 'a b'"),
        ({"sources": ["my.module:Class"]}, "can be part of a column's, got 'my.module:Class'"),
        ({"sources": ["ids=surprise"]}, "can be part of a column's, got 'ids'"),
        ({"sources": ["{"]}, "sources: expected a JSON object"),
        ({"sources": [{"name": "surprise"}]}, "sources: expected stream in"),
        ({"sources": [3]}, "rewards.sources: expected a list of (text or values by name)"),
        ({"sources": ["a=several"]}, "sources: expected single sources, got 'several' within it"),
        ({"sources": [SOURCES[1] | {"unti": "word"}]}, "did you mean 'unit'?"),
        ({"sources": [SOURCES[1] | {"shape": ["center"]}]}, "did you mean 'centre'?"),
        (
            {"sources": [SOURCES[1] | {"take": "token_weights"}]},
            "surprise: expected take to be one of token_rewards, got 'token_weights'",
        ),
        (
            {"mix": ["suprise=1"]},
            "mix: expected streams among contrastive, surprise, got 'suprise'",
        ),
        ({"mix": ["surprise=1", "surprise=2"]}, "mix: expected each name once, got 'surprise'"),
        ({"mix": ["surprise"]}, "mix: expected STREAM=NUMBER, got 'surprise'"),
        ({"mix": ["surprise=x"]}, "mix: expected STREAM=NUMBER, got 'surprise=x'"),
        ({"mix": ["surprise=inf"]}, "mix: expected STREAM=NUMBER, got 'surprise=inf'"),
        (
            {"sources": ["token_rewards=surprise"], "mix": ["token_rewards=1"]},
            "mix: expected no source with the stream token_rewards beside it",
        ),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_options("several", options)


@pytest.mark.parametrize("name", ["stream", "name", "take", "shape"])
def test_a_source_whose_options_have_other_keys_names(name, monkeypatch):
    """What was given of them would go to the one or to the other."""

    class Own(treg.rewards.SOURCES["constant"]):
        Options = dataclasses.make_dataclass("Options", [(name, str, "x")], frozen=True)

    monkeypatch.setitem(treg.rewards.SOURCES, "own", Own)
    message = rf"sources: expected a source without options .*, got 'own' with {name}; rename"
    with pytest.raises(ValueError, match=message):
        make_options("several", {"sources": ["a=own"]})


def test_what_the_streams_are_is_found_out_once(monkeypatch):
    """Settings may hold fingerprints of models."""
    asked = []
    kind = treg.rewards.SOURCES["surprise"]
    settings = kind.settings
    monkeypatch.setattr(kind, "settings", lambda self: asked.append(1) or settings(self))
    source = load_source("several", {"sources": ["surprise"]}, Context(MODEL, TOKENIZER))
    assert source.settings() == {"sources": source.described, "mix": {}}
    assert source.described["surprise"]["settings"] == {"unit": "token"} and len(asked) == 1


def test_yaml_and_the_command_line_say_the_same(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "rewards:\n  name: several\n  sources:\n"
        "    - {stream: contrast, name: contrastive, unit: word}\n    - surprise\n"
        "  mix: {contrast: 1, surprise: 0.5}\n"
    )
    argv = ["--rewards", "several", "--rewards.sources", json.dumps(SOURCES[0]), "surprise"]
    argv += ["--rewards.mix", "contrast=1", "surprise=0.5"]
    found = []
    for options in (["--config", str(config)], argv):
        _, rewards = parse("annotate", ["--data", "x", *options], (RowOptions, RewardsOptions))
        made = make_options("several", rewards.rewards_options)
        found.append((made.entries, made.weights))
    assert found[0] == found[1]
    assert found[0][1] == {"contrast": 1.0, "surprise": 0.5}


@pytest.mark.slow
def test_from_the_command_line_to_a_page_of_any_stream(tmp_path, capsys):
    MODEL.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    Path(tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    paths = ["--model", tmp_path / "model", "--data", tmp_path / "a.jsonl"]
    more = ["--rewards", "several", "--shape", "centre", "--output", tmp_path / "a.parquet"]
    assert main(["annotate", *map(str, [*paths, *more])]) == 0
    for stream in ("contrastive", "surprise"):
        inspect = ["--data", tmp_path / "a.parquet", "--tokenizer", tmp_path / "model"]
        assert main(["inspect", *map(str, [*inspect, "--stream", stream])]) == 0
        page = (tmp_path / f"a.{stream}.html").read_text()
        assert f'<dt>source</dt><dd dir="auto">{stream}</dd>' in page
    capsys.readouterr()
    train = ["--output_dir", tmp_path / "out", "--rewards", "several", "--use_cpu", "true"]
    assert main(["train", *map(str, [*paths, *train])]) == 2
    assert "which gives contrastive, surprise and no token_rewards" in capsys.readouterr().err
