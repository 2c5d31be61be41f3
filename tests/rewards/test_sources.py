"""What every source of token rewards must keep, and a source that a user writes."""

import json
import sys
from dataclasses import asdict, fields, replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from judges import causal_lm, judge
from tiny import tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.annotated import (
    read_annotated,
    read_meta,
    stream_columns,
    streams_of,
    write_annotated,
)
from treg.rewards import (
    SOURCES,
    Context,
    ContrastivePrompts,
    load_source,
    make_options,
    source_class,
)
from treg.rewards.annotate import AnnotateOptions, annotate, annotate_pairs
from treg.rewards.base import check_response, score_checked
from treg.rewards.lookup import TokenRewards
from treg.rewards.response import Response, ResponsePairs

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
MARKS = {"chosen_spans": [[0, 2]], "rejected_spans": []}
ROWS = [
    {"prompt": "what is better?", "chosen": "the old owl", "rejected": "the sun and the moon"},
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
]
ROWS = [row | MARKS for row in ROWS]
# for each source: options that give other settings, and a model that cannot hold a response
OTHER_OPTIONS = {
    "contrastive": {
        "prompts": ContrastivePrompts("{{ messages[-1].content }}{{ better }}", "<answer>")
    },
    "redistribution": {"beta_c": 0.5},
    "implicit": {"beta": 0.5},
    "surprise": {"unit": "word"},
    "entropy": {"of": "contrastive"},
    "messagewise": {"baseline": 0.1},
    "spans": {"inside": -1.0},
    "edits": {"added": 0.5},
    "several": {"mix": {"surprise": 0.5}},
    "constant": {"value": -1.0},
    "random": {"seed": 1},
    "shuffled": {"seed": 1},
}
SHORT = tiny_llama(len(TOKENIZER), max_position_embeddings=8)
TOO_SHORT = {  # None: any response can be scored
    "contrastive": SHORT,
    "redistribution": MODEL,
    "implicit": SHORT,
    "surprise": SHORT,
    "entropy": SHORT,
    "messagewise": SHORT,
    "spans": None,
    "edits": None,
    "several": SHORT,
    "constant": None,
    "random": None,
    "shuffled": SHORT,
}
# options that a source cannot do without, made when they are asked for; those beside TOO_SHORT
NEEDED = {
    "implicit": lambda: {"model": causal_lm()},
    "redistribution": lambda: {"model": judge()},
}
SHORT_OPTIONS = {"redistribution": lambda: {"model": judge(max_position_embeddings=8)}}


def responses(rows=None, tokenizer=TOKENIZER, max_length=256):
    pairs, _ = load_pairs(rows or ROWS, tokenizer, EncodeOptions(max_length))
    return [response for pair in ResponsePairs(pairs, tokenizer) for response in pair]


def needed(name):
    return NEEDED.get(name, dict)()


def make(name, options=None, model=MODEL):
    options = needed(name) | (options or {})
    return load_source(name, options, Context(model, TOKENIZER, tokens_per_batch=2048))


def test_every_source_has_its_cases():
    assert SOURCES.keys() == OTHER_OPTIONS.keys() == TOO_SHORT.keys()


@pytest.mark.parametrize("name", SOURCES)
class TestEverySource:
    def test_settings_are_json_and_change_with_the_options(self, name):
        settings = make(name).settings()
        assert json.loads(json.dumps(settings)) == settings == make(name).settings()
        assert make(name, OTHER_OPTIONS[name]).settings() != settings

    def test_other_settings_are_refused_by_a_file(self, name, tmp_path):
        def run(options):
            chosen = AnnotateOptions(rewards=name, rewards_options=needed(name) | options)
            annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", chosen, progress=False)

        run({})
        run({})
        with pytest.raises(ValueError, match=r"a\.parquet: made with .*, now it is"):
            run(OTHER_OPTIONS[name])

    def test_one_finite_number_a_token(self, name):
        source, given = make(name), responses()
        assert all(source.check(response) is None for response in given)
        for response, found in zip(given, source.score(given), strict=True):
            assert found.keys() == set(source.streams)
            for values in found.values():
                assert values.shape == (len(response.ids),) and values.isfinite().all()
                assert values.is_floating_point()

    def test_the_same_bits_twice(self, name):
        given = responses()
        source = make(name)
        for a, b, c in zip(
            source.score(given), source.score(given), make(name).score(given), strict=True
        ):
            for stream in a:
                assert torch.equal(a[stream], b[stream]) and torch.equal(a[stream], c[stream])

    def test_what_does_not_fit_is_refused(self, name):
        options, model = SHORT_OPTIONS.get(name, dict)(), TOO_SHORT[name]
        if model is None:
            assert make(name, model=SHORT).check(responses()[0]) is None
            return
        problem = make(name, options, model=model).check(responses()[0])
        assert isinstance(problem, RowProblem) and problem.where == "row 0"

    def test_options_are_described(self, name):
        for option in fields(SOURCES[name].Options):
            assert option.metadata.get("help"), option.name


# -- loading


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("contrastiv", "expected one of contrastive.* did you mean 'contrastive'?"),
        ("no.such.module:Source", "expected a class that Python can import as 'no.such.module:S"),
        ("json:NoSource", "expected a class that Python can import as 'json:NoSource'"),
        ("json:JSONDecoder", "json:JSONDecoder: expected Options, a frozen dataclass"),
    ],
)
def test_unknown_sources_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        source_class(name)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"rewards\.promts: .* did you mean 'prompts'\?"):
        make_options("contrastive", {"promts": "x"})


# -- responses


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
def test_a_response_of_a_pair(chat):
    tokenizer = tiny_tokenizer(chat=chat)
    row = {"prompt": "the fox?", "chosen": " is déjà 🦊 old", "rejected": "was", "spans": [1]}
    chosen, rejected = responses([row], tokenizer)
    assert (chosen.side, rejected.side, chosen.where) == ("chosen", "rejected", "row 0")
    assert chosen.row == {"spans": [1]}
    assert tokenizer.decode(chosen.ids[: chosen.content]).strip() == "is déjà 🦊 old"
    assert chosen.content < len(chosen.ids)
    assert chosen.messages.tolist() == [0] * len(chosen.ids)


def test_messages_of_a_response():
    turns = [
        {"role": "assistant", "content": "the owl"},
        {"role": "tool", "content": "42 owl"},
        {"role": "assistant", "content": "it is 42"},
    ]
    prompt = [{"role": "user", "content": "the fox?"}]
    rejected = [{"role": "assistant", "content": "no"}]
    chosen, _ = responses([{"prompt": prompt, "chosen": turns, "rejected": rejected}])
    assert chosen.text == "the owl\n42 owl\nit is 42"
    for i, turn in enumerate(turns):
        inside = TOKENIZER.decode(chosen.ids[chosen.messages == i])
        others = [other["content"] for other in turns if other is not turn]
        assert turn["content"] in inside and not any(other in inside for other in others)


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("text", ["déjà 🦊 old, 東京!", "  the owl  \n", "x"])
def test_characters_of_a_response(chat, text):
    """The tokens' spans tile the text, and each span holds what its token says."""
    tokenizer = tiny_tokenizer(chat=chat)
    chosen, _ = responses([{"prompt": "the fox?", "chosen": text, "rejected": "was"}], tokenizer)
    spans = chosen.spans
    assert spans[0, 0] == 0 and spans[-1, 1] == len(chosen.text)
    assert (spans[1:, 0] == spans[:-1, 1]).all()
    for token, (start, end) in zip(chosen.ids.tolist(), spans.tolist(), strict=True):
        said = tokenizer.decode([token])
        if end > start and "\ufffd" not in said:
            assert chosen.text[start:end] == said
    # a character of several tokens belongs to the one that completes it
    if "🦊" in text:
        at = chosen.text.index("🦊")
        (whole,) = [i for i, (a, b) in enumerate(spans.tolist()) if a <= at < b]
        assert "🦊" in tokenizer.decode(chosen.ids[: whole + 1])
        assert "🦊" not in tokenizer.decode(chosen.ids[:whole])


def test_characters_of_several_messages():
    turns = [
        {"role": "assistant", "content": "the owl"},
        {"role": "tool", "content": "42 owl"},
        {"role": "assistant", "content": "it is 42"},
    ]
    row = {
        "prompt": [{"role": "user", "content": "the fox?"}],
        "chosen": turns,
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    chosen, rejected = responses([row])
    assert chosen.other_ids is rejected.ids and rejected.other_ids is chosen.ids
    for i, turn in enumerate(turns):
        mine = chosen.spans[chosen.messages == i]
        mine = mine[mine[:, 1] > mine[:, 0]]
        assert chosen.text[mine[0, 0] : mine[-1, 1]].strip() == turn["content"]


def test_a_text_that_the_tokens_do_not_say_has_no_spans():
    chosen, _ = responses()[:2]
    assert replace(chosen, text="another text", completion="another text").spans is None


# -- a source of one's own

SOURCE = """
from dataclasses import dataclass, field
import torch
from treg.data import RowProblem

@dataclass(frozen=True)
class Options:
    scale: float = field(default=1.0, metadata={"help": "Weight of a long word."})
    banned: list[str] | None = field(default=None, metadata={"help": "Words that are refused."})

class LongWords:
    Options = Options
    streams = ("STREAM",)

    def __init__(self, options, context):
        self.options, self.tokenizer = options, context.tokenizer

    def settings(self):
        return {"scale": self.options.scale, "banned": self.options.banned}

    def check(self, response):
        if any(word in response.text for word in self.options.banned or []):
            return RowProblem("banned word", response.text, response.where)

    def score(self, responses):
        return [{"STREAM": self.of(response)} for response in responses]

    def of(self, response):
        lengths = [len(self.tokenizer.decode([i]).strip()) for i in response.ids.tolist()]
        return self.options.scale * (torch.tensor(lengths) > 2).float() + 0.5
"""


@pytest.fixture
def own_source(tmp_path, monkeypatch):
    """ "module:Class" of a user's source of a stream."""

    def write(stream):
        folder = tmp_path / stream
        folder.mkdir(exist_ok=True)
        (folder / f"my_{stream}.py").write_text(SOURCE.replace("STREAM", stream))
        monkeypatch.syspath_prepend(str(folder))
        sys.modules.pop(f"my_{stream}", None)
        return f"my_{stream}:LongWords"

    return write


def expected(ids, scale=1.0):
    lengths = [len(TOKENIZER.decode([i]).strip()) for i in ids.tolist()]
    return scale * (np.array(lengths) > 2) + 0.5


def test_a_source_of_ones_own(tmp_path, own_source):
    name, output = own_source("token_weights"), tmp_path / "a.parquet"
    options = AnnotateOptions(
        rewards=name, rewards_options={"scale": 2.0, "banned": ["moon"]}, reference=False
    )
    report = annotate(MODEL, TOKENIZER, ROWS, output, options, progress=False)
    assert report.dropped == {"banned word": 1} and report.kept == 1
    (example,), meta = read_annotated(output)
    for side in ("chosen", "rejected"):
        found = example[f"{side}_token_weights"]
        assert found.tolist() == expected(example[f"{side}_ids"], 2.0).tolist()
    assert not any("token_rewards" in k or k.startswith("ref_") for k in example)
    settings = {"scale": 2.0, "banned": ["moon"]}
    assert meta["streams"] == {
        "token_weights": {"source": name, "settings": settings, "shaping": []}
    }
    assert "prompts" not in meta["settings"] and streams_of(meta) == ("token_weights",)
    # the same command again leaves it, another option refuses it, and so does the default source
    annotate(MODEL, TOKENIZER, ROWS, output, options, progress=False)
    for other in (
        replace(options, rewards_options={"scale": 1.0, "banned": ["moon"]}),
        replace(options, reference=True),
        AnnotateOptions(),
    ):
        with pytest.raises(ValueError, match=r"a\.parquet: made with .*, now it is"):
            annotate(MODEL, TOKENIZER, ROWS, output, other, progress=False)


def test_a_stream_is_found_by_token_ids(tmp_path, own_source):
    options = AnnotateOptions(rewards=own_source("token_weights"))
    annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
    (example, _), _ = read_annotated(tmp_path / "a.parquet")
    weights = TokenRewards(tmp_path / "a.parquet", stream="token_weights")
    ids = np.concatenate([example["prompt_ids"], example["chosen_ids"]])
    found = weights.of(ids)
    assert found[len(example["prompt_ids"]) :].tolist() == example["chosen_token_weights"].tolist()
    with pytest.raises(ValueError, match="expected the column chosen_token_rewards"):
        TokenRewards(tmp_path / "a.parquet")


def test_the_default_file_says_nothing_of_streams(tmp_path):
    """Its columns and metadata are in this order; text and config came later than the rest."""
    options = AnnotateOptions(EncodeOptions(64), per_token=True)
    annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
    (example, *_), meta = read_annotated(tmp_path / "a.parquet")
    assert list(example) == [
        "index",
        "where",
        "prompt_ids",
        "chosen_ids",
        "rejected_ids",
        "chosen_token_rewards",
        "rejected_token_rewards",
        "ref_chosen_logps",
        "ref_rejected_logps",
        "ref_chosen_token_logps",
        "ref_rejected_token_logps",
        "prompt_text",
        "chosen_text",
        "rejected_text",
    ]
    assert list(meta) == ["fingerprint", "config", "settings", "report"]
    assert list(meta["fingerprint"]) == ["model", "tokenizer", "pairs"]
    assert list(meta["settings"]) == [
        "encode",
        "prompts",
        "tokens_per_batch",
        "per_token",
        "share_prefix",
        "dtype",
        "autocast",
    ]
    assert meta["settings"]["prompts"] == asdict(ContrastivePrompts())


# -- what a source must not do


class Wrong:
    """A source whose results are what a test says."""

    Options = type(make_options("contrastive", {}))
    streams = ("token_rewards",)

    def __init__(self, found, settings=None):
        self.found, self.given = found, settings or {}

    def settings(self):
        return self.given

    def check(self, response):
        return None

    def score(self, responses):
        return self.found(responses)


def ones(response: Response) -> torch.Tensor:
    return torch.ones(len(response.ids))


WRONG = {
    "fewer results": (lambda xs: [], r"expected 4 results, one for each response, got 0"),
    "another stream": (
        lambda xs: [{"token_weights": ones(x)} for x in xs],
        "row 0: chosen: expected the streams token_rewards, got token_weights",
    ),
    "too few": (
        lambda xs: [{"token_rewards": ones(x)[1:]} for x in xs],
        "expected token_rewards as a tensor of shape",
    ),
    "a list": (
        lambda xs: [{"token_rewards": ones(x).tolist()} for x in xs],
        "one number a token, got list",
    ),
    "not finite": (
        lambda xs: [{"token_rewards": ones(x) / 0} for x in xs],
        "expected finite token_rewards",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_source_gives_is_checked(wrong):
    found, message = WRONG[wrong]
    with pytest.raises(ValueError, match=message):
        score_checked(Wrong(found), responses())


class Refuses(Wrong):
    """One that refuses what says "sun", in the way that a test says."""

    def __init__(self, problem, found=lambda xs: [{"token_rewards": ones(x)} for x in xs]):
        super().__init__(found)
        self.problem = problem

    def check(self, response):
        return self.problem if "sun" in response.text else None


def test_where_a_problem_is_need_not_be_said(tmp_path, monkeypatch):
    class Own(Refuses):
        def __init__(self, options, context):
            super().__init__(RowProblem("the sun", "it shines"))

    monkeypatch.setitem(SOURCES, "own", Own)
    options = AnnotateOptions(rewards="own")
    report = annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
    assert report.dropped == {"the sun": 1} and report.kept == 1
    assert report.examples == {"the sun": ["row 0: the sun: it shines"]}


@pytest.mark.parametrize("problem", [True, False, "too long", ValueError("no")])
def test_what_check_returns_is_checked(problem):
    with pytest.raises(ValueError, match=r"Refuses\.check: row 0: rejected: expected None or a Ro"):
        for response in responses():
            check_response(Refuses(problem), response)


def test_nothing_is_scored_where_every_pair_is_refused():
    def found(given):
        raise AssertionError("asked for nothing")

    pairs, _ = load_pairs(ROWS[:1], TOKENIZER, EncodeOptions(256))
    context = Context(MODEL, TOKENIZER)
    source = Refuses(RowProblem("the sun"), found)
    rows, (problem,) = annotate_pairs(source, context, pairs)
    assert rows == [] and problem.where == "row 0"


def test_the_model_is_in_eval_mode_when_a_source_sees_it(tmp_path, monkeypatch):
    model, modes = tiny_llama(len(TOKENIZER)).train(), []

    class Looks(Refuses):
        def __init__(self, options, context):
            super().__init__(None)
            modes.append(context.model.training)

    monkeypatch.setitem(SOURCES, "own", Looks)
    options = AnnotateOptions(rewards="own", reference=False)
    annotate(model, TOKENIZER, ROWS, tmp_path / "a.parquet", options, progress=False)
    assert modes == [False]


def test_negative_weights_are_refused_when_they_are_made():
    source = Wrong(lambda xs: [{"token_weights": -ones(x)} for x in xs])
    source.streams = ("token_weights",)
    with pytest.raises(ValueError, match=r"row 0: chosen: expected token_weights >= 0, got -1\.0"):
        score_checked(source, responses())


def test_settings_that_are_no_json(tmp_path, monkeypatch):
    monkeypatch.setattr(SOURCES["contrastive"], "settings", lambda self: {"x": {1, 2}})
    with pytest.raises(ValueError, match="settings: expected what JSON can hold"):
        annotate(MODEL, TOKENIZER, ROWS, tmp_path / "a.parquet", progress=False)


# -- files of any streams


def row(index=0, **more):
    return {
        "index": index,
        "where": f"f:{index}",
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 5],
        "rejected_ids": [6],
    } | more


def numbers(stream, chosen, rejected):
    return dict(zip(stream_columns(stream), (chosen, rejected), strict=True))


STREAMS = {"streams": {"token_weights": {}, "surprise": {}}}


def test_files_of_other_streams(tmp_path):
    path = tmp_path / "a.parquet"
    given = row(**numbers("token_weights", [1, 0, 2], [1]), **numbers("surprise", [0, 1, 2], [3]))
    write_annotated(path, [given], STREAMS, streams=("token_weights", "surprise"), reference=False)
    (example,), meta = read_annotated(path)
    assert read_meta(path) == meta == STREAMS
    assert {k: v if isinstance(v, (int, str)) else v.tolist() for k, v in example.items()} == given


@pytest.mark.parametrize(
    ("stream", "chosen", "message"),
    [
        ("token_weights", [1, 2], "row 0: expected 3 finite numbers in chosen_token_weights"),
        ("token_weights", [1, -1, 0], "row 0: expected chosen_token_weights >= 0, got -1.0"),
        ("token_rewards", [1, 2, float("inf")], "3 finite numbers in chosen_token_rewards"),
    ],
)
def test_what_the_loss_takes_is_checked_though_no_metadata_name_it(
    tmp_path, stream, chosen, message
):
    path = tmp_path / "a.parquet"
    streams = ("surprise", stream)
    given = row(**numbers("surprise", [0, 1, 2], [3]), **numbers(stream, chosen, [1]))
    write_annotated(path, [given], {"streams": {"surprise": {}}}, streams=streams, reference=False)
    with pytest.raises(ValueError, match=message):
        read_annotated(path)


def test_half_of_a_stream_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    given = row(**numbers("token_rewards", [1, 0, 2], [1]))
    write_annotated(path, [given], {}, reference=False)
    table = pyarrow.parquet.read_table(path)
    weights = table.column("chosen_token_rewards")
    pyarrow.parquet.write_table(table.append_column("chosen_token_weights", weights), path)
    with pytest.raises(ValueError, match="got one without the columns rejected_token_weights"):
        read_annotated(path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"chosen_surprise": [1, 2]}, "row 0: expected 3 finite numbers in chosen_surprise"),
        ({"rejected_surprise": [float("nan")]}, "1 finite numbers in rejected_surprise"),
        ({"chosen_token_weights": None}, "3 finite numbers in chosen_token_weights.* got 0"),
    ],
)
def test_any_stream_is_checked(tmp_path, changed, message):
    given = row(**numbers("token_weights", [1, 0, 2], [1]), **numbers("surprise", [0, 1, 2], [3]))
    path = tmp_path / "a.parquet"
    write_annotated(
        path, [given | changed], STREAMS, streams=("token_weights", "surprise"), reference=False
    )
    with pytest.raises(ValueError, match=message):
        read_annotated(path)


def test_a_stream_that_the_metadata_lists_must_be_there(tmp_path):
    given = row(**numbers("token_weights", [1, 0, 2], [1]))
    path = tmp_path / "a.parquet"
    write_annotated(path, [given], STREAMS, streams=("token_weights",), reference=False)
    with pytest.raises(ValueError, match="without the columns chosen_surprise, rejected_surprise"):
        read_annotated(path)


@pytest.mark.parametrize("name", ["ids", "logps", "two words", ""])
def test_names_that_streams_cannot_have(tmp_path, name):
    with pytest.raises(ValueError, match="streams: expected names"):
        write_annotated(tmp_path / "a.parquet", [], {}, streams=(name,))


def test_files_of_other_programs(tmp_path):
    """Wider types, half of the reference's columns, and columns that are passed on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    columns = row(**numbers("token_rewards", [0.5, 0.25, 0.0], [1.0]), safe=[True], notes=["a"])
    table = pa.Table.from_pylist([columns]).replace_schema_metadata({"treg": "{}"})
    pq.write_table(table, path)
    (example,), _ = read_annotated(path)
    assert example["chosen_ids"].dtype == np.int32 and example["notes"] == ["a"]
    assert example["chosen_token_rewards"].dtype == np.float32
    assert example["chosen_token_rewards"].tolist() == [0.5, 0.25, 0.0]
    pq.write_table(table.append_column("ref_chosen_logps", pa.array([-1.0])), path)
    with pytest.raises(ValueError, match="without the columns ref_rejected_logps"):
        read_annotated(path)
    words = table.set_column(5, "chosen_token_rewards", pa.array([["a", "b", "c"]]))
    pq.write_table(words, path)
    with pytest.raises(ValueError, match=r"chosen_token_rewards: expected list<.*float>, got list"):
        read_annotated(path)
