"""Preference files as pairs of token ids: every form, every oddity, the split, packs and
batches.
"""

import gzip
import json
import math
import random
import time

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny import CHATML, END, PAD, shared_data, tiny_tokenizer, wrapped
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from treg.data import (
    EncodeOptions,
    Mixture,
    PairCollator,
    Preference,
    RowProblem,
    encode,
    first_pairs,
    load_pairs,
    pack_pairs,
    pair_tokens,
    parse_row,
    prompt_text,
    text_of,
)

CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat=False)
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
GOOD = {"prompt": "what is better?", "chosen": "the sun", "rejected": "the moon"}
HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what is better?\n\nAssistant:"


def said(role):
    return lambda content, **more: {"role": role, "content": content, **more}


sys, usr, bot, tool = map(said, ("system", "user", "assistant", "tool"))
HH_TURNS = [usr("hi"), bot("hello"), usr("what is better?")]


def ids_of(pair):
    return [getattr(pair, name).tolist() for name in COLUMNS]


def dumped(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# -- rows

CHAT_FORMS = {
    "text": (
        {"prompt": "q", "chosen": " x ", "rejected": "y\n"},
        [usr("q")],
        [bot(" x ")],
        [bot("y\n")],
    ),
    "messages": (
        {"prompt": [sys("be kind"), usr("q")], "chosen": [bot("x")], "rejected": [bot("y")]},
        [sys("be kind"), usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "one-message": (
        {"prompt": usr("q"), "chosen": bot("x"), "rejected": bot("y")},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "messages-text-completions": (
        {"prompt": [usr("q")], "chosen": "x", "rejected": "y"},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "implicit-messages": (
        {"chosen": [usr("q"), bot("x")], "rejected": [usr("q"), bot("y")]},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "implicit-turns-after": (
        {"chosen": [usr("q"), bot("x"), usr("r"), bot("z")], "rejected": [usr("q"), bot("y")]},
        [usr("q")],
        [bot("x"), usr("r"), bot("z")],
        [bot("y")],
    ),
    "implicit-begins-the-other": (
        {"chosen": [usr("q"), bot("x")], "rejected": [usr("q"), bot("x"), usr("r"), bot("z")]},
        [usr("q")],
        [bot("x")],
        [bot("x"), usr("r"), bot("z")],
    ),
    "implicit-hh": (
        {"chosen": HH + " the sun", "rejected": HH + " the moon\n"},
        HH_TURNS,
        [bot("the sun")],
        [bot("the moon")],
    ),
    "implicit-hh-empty-prompt": (
        {"prompt": None, "chosen": HH + " x", "rejected": HH + " y"},
        HH_TURNS,
        [bot("x")],
        [bot("y")],
    ),
    "hh-prompt": (
        {"prompt": HH, "chosen": " x", "rejected": " y"},
        HH_TURNS,
        [bot("x")],
        [bot("y")],
    ),
    "hh-unanswered": (
        {"prompt": "\n\nHuman: q", "chosen": "x", "rejected": "y"},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "hh-quoted": (
        {"prompt": "Read:\n\nHuman: q", "chosen": "x", "rejected": "y"},
        [usr("Read:\n\nHuman: q")],
        [bot("x")],
        [bot("y")],
    ),
    "text-and-conversation": (
        {
            "prompt": "q",
            "chosen": [usr("q"), bot("x")],
            "rejected": [usr("q"), bot("y")],
            "messages": [usr("q"), bot("x")],
        },
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "messages-and-conversation": (
        {
            "prompt": [usr("q"), bot("a"), usr("r")],
            "chosen": [usr("q"), bot("a"), usr("r"), bot("x")],
            "rejected": [usr("q"), bot("a"), usr("r"), bot("y")],
        },
        [usr("q"), bot("a"), usr("r")],
        [bot("x")],
        [bot("y")],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "r"},
            ],
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        [usr("q"), bot("a"), usr("r")],
        [bot("x")],
        [bot("y")],
    ),
    "sharegpt-roles": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "function_call", "value": "f()"},
                {"from": "observation", "value": "1"},
            ],
            "chosen": {"from": "gpt", "value": "x"},
            "rejected": {"from": "gpt", "value": "y"},
        },
        [sys("s"), usr("q"), bot("f()"), tool("1")],
        [bot("x")],
        [bot("y")],
    ),
    "messages-column": (
        {"messages": [usr("q")], "chosen": [bot("x")], "rejected": [bot("y")]},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
    "filled-with-none": (
        {
            "prompt": [usr("q", name=None, tool_calls=None)],
            "messages": None,
            "tools": None,
            "chosen": [bot(None, tool_calls=[{"name": "f", "arguments": {"a": 1, "b": None}}])],
            "rejected": [bot("y", tool_calls=None)],
            "chat_template_kwargs": {},
        },
        [usr("q")],
        [bot("", tool_calls=[{"name": "f", "arguments": {"a": 1, "b": None}}])],
        [bot("y")],
    ),
    "parts-of-text": (
        {
            "prompt": [usr([{"type": "text", "text": "a "}, {"type": "text", "text": "b"}])],
            "chosen": [bot([{"type": "text", "text": "x"}])],
            "rejected": [bot([{"type": "text", "text": "y"}])],
        },
        [usr("a b")],
        [bot("x")],
        [bot("y")],
    ),
    "prompt-is-a-system-turn": (
        {"prompt": [sys("s")], "chosen": "x", "rejected": "y"},
        [sys("s")],
        [bot("x")],
        [bot("y")],
    ),
}
PLAIN_FORMS = {
    "text": ({"prompt": "q ", "chosen": " x ", "rejected": "y\n"}, "q ", " x ", "y\n"),
    "implicit-hh": ({"chosen": HH + " x", "rejected": HH + " y"}, HH, " x", " y"),
    "messages": (
        {"prompt": "q", "chosen": [bot("x")], "rejected": [bot("y")]},
        [usr("q")],
        [bot("x")],
        [bot("y")],
    ),
}


@pytest.mark.parametrize(
    "chat, form", [(True, x) for x in CHAT_FORMS] + [(False, x) for x in PLAIN_FORMS]
)
def test_forms(chat, form):
    row, *want = (CHAT_FORMS if chat else PLAIN_FORMS)[form]
    before = json.dumps(row)
    got = parse_row(row, "here", chat=chat)
    assert [got.prompt, got.chosen, got.rejected] == want
    assert got.where == "here" and got.chat == isinstance(want[0], list)
    assert got.tools is None and got.template_kwargs == {}
    assert json.dumps(row) == before


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]'], ids=["list", "json"])
def test_tools_and_template_kwargs(tools):
    row = {**GOOD, "tools": tools, "chat_template_kwargs": {"style": "terse", "other": None}}
    ((pair,), _) = load_pairs([row], CHAT)
    assert CHAT.decode(pair.prompt_ids) == (
        '<|im_start|>tools\n[{"name": "add"}]<|im_end|>\n<|im_start|>style\nterse<|im_end|>\n'
        "<|im_start|>user\nwhat is better?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [CHAT.decode(x) for x in (pair.chosen_ids, pair.rejected_ids)] == [
        "the sun<|im_end|>\n",
        "the moon<|im_end|>\n",
    ]


def test_text_of():
    assert text_of("a") == "a"
    assert text_of([bot("a"), tool(None), usr("b")]) == "a\n\nb"


LONG = {
    "prompt": "q",
    "chosen": [bot("the sun " * 40 + "a")],
    "rejected": [bot("the sun " * 40 + "b")],
}
CHAT_ODD = {
    "identical": (dumped({**GOOD, "rejected": "the sun"}), "identical completions"),
    "identical-stripped": (dumped({**GOOD, "rejected": " the sun"}), "identical completions"),
    "identical-dialogues": (
        dumped({"chosen": [usr("q"), bot("x")], "rejected": [usr("q"), bot("x")]}),
        "identical completions",
    ),
    "after-truncation": (dumped(LONG), "identical completions"),
    "empty": (dumped({**GOOD, "chosen": ""}), "empty completion"),
    "blank": (dumped({**GOOD, "rejected": " \n"}), "empty completion"),
    "no-messages": (
        dumped({"prompt": "q", "chosen": [], "rejected": [bot("y")]}),
        "empty completion",
    ),
    "no-content": (
        dumped({"prompt": "q", "chosen": [{"role": "assistant"}], "rejected": [bot("y")]}),
        "empty completion",
    ),
    "no-prompt": (dumped({**GOOD, "prompt": ""}), "empty prompt"),
    "no-turns": (
        dumped({"prompt": [], "chosen": [bot("x")], "rejected": [bot("y")]}),
        "empty prompt",
    ),
    "no-column": (dumped({"prompt": "q", "chosen": "x"}), "no column 'rejected'"),
    "null-column": (dumped({**GOOD, "chosen": None}), "no column 'chosen'"),
    "no-columns": (b"{}", "no column 'chosen'"),
    "mixed": (dumped({**GOOD, "rejected": [bot("y")]}), "mixed types"),
    "number": (dumped({**GOOD, "prompt": 10**40}), "mixed types"),
    "NaN": (dumped({**GOOD, "chosen": math.nan}), "mixed types"),
    "NaN-everywhere": (dumped(dict.fromkeys(GOOD, math.nan)), "mixed types"),
    "mixed-messages": (dumped({**GOOD, "prompt": [usr("q"), "q"]}), "mixed types"),
    "mixed-content": (dumped({**GOOD, "prompt": [usr({"text": "q"})]}), "mixed types"),
    "image": (dumped({**GOOD, "prompt": [usr([{"type": "image"}])]}), "not text"),
    "no-role": (dumped({**GOOD, "prompt": [{"content": "q"}]}), "no role"),
    "role-number": (dumped({**GOOD, "prompt": [{"role": 1, "content": "q"}]}), "no role"),
    "unknown-role": (dumped({**GOOD, "prompt": [{"from": "alien", "value": "q"}]}), "unknown role"),
    "role-list": (dumped({**GOOD, "prompt": [{"from": ["human"], "value": "q"}]}), "unknown role"),
    "kwargs-list": (dumped({**GOOD, "chat_template_kwargs": [1]}), "mixed types"),
    "kwargs-clash": (dumped({**GOOD, "chat_template_kwargs": {"tokenize": True}}), "chat template"),
    "tools-broken": (dumped({**GOOD, "tools": "[{"}), "broken JSON"),
    "tools-number": (dumped({**GOOD, "tools": 5}), "chat template"),
    "tools-object": (dumped({**GOOD, "tools": {"name": "add"}}), "chat template"),
    "tools-deep": (dumped({**GOOD, "tools": "[" * 99999}), "broken JSON"),
    "messages-prompts-differ": (
        dumped({"chosen": [usr("q"), bot("x")], "rejected": [usr("r"), bot("y")]}),
        "prompts differ",
    ),
    "hh-prompts-differ": (
        dumped({"chosen": HH + " x", "rejected": HH.replace("hi", "no") + " y"}),
        "prompts differ",
    ),
    "text-without-prompt": (dumped({"chosen": "the sun", "rejected": "the fox"}), "no prompt"),
    "user-after-prompt": (
        dumped({"prompt": [usr("q")], "chosen": [usr("r"), bot("x")], "rejected": [bot("y")]}),
        "prompts differ",
    ),
    "prompt-too-long": (dumped({**GOOD, "prompt": "the fox " * 99}), "prompt too long"),
    "broken-line": (b'{"prompt": "q", "chosen"', "broken JSON"),
    "not-utf8": (dumped(GOOD).replace(b"sun", b"s\xffn"), "broken JSON"),
    "huge-integer": (dumped(GOOD).replace(b"}", b', "n": ' + b"9" * 9999 + b"}"), "broken JSON"),
    "deep": (
        dumped(GOOD).replace(b"}", b', "n": ' + b"[" * 99999 + b"]" * 99999 + b"}"),
        "broken JSON",
    ),
    "surrogate": (dumped({**GOOD, "chosen": "x\ud800"}), "broken text"),
    "surrogate-prompt": (dumped({**GOOD, "prompt": "\udfff"}), "broken text"),
    "list": (b'["q", "x", "y"]', "not an object"),
    "text": (b'"q"', "not an object"),
    "null": (b"null", "not an object"),
}
PLAIN_ODD = {
    "identical": (dumped({**GOOD, "rejected": "the sun"}), "identical completions"),
    "surrogate": (dumped({**GOOD, "rejected": "x\ud800"}), "broken text"),
    "prompt-too-long": (dumped({**GOOD, "prompt": "the fox " * 99}), "prompt too long"),
    "truncated-alike": (
        dumped({**GOOD, "chosen": "the sun " * 99 + "a", "rejected": "the sun " * 99}),
        "identical completions",
    ),
    "prompt-merged-away": (
        dumped({"prompt": "o", "chosen": "nce", "rejected": "ne"}),
        "empty prompt",
    ),
}


@pytest.mark.parametrize(
    "chat, odd", [(True, x) for x in CHAT_ODD] + [(False, x) for x in PLAIN_ODD]
)
def test_odd_rows(tmp_path, chat, odd):
    line, reason = (CHAT_ODD if chat else PLAIN_ODD)[odd]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dumped(GOOD) + line.strip(b"\n") + b"\n" + dumped(GOOD))
    tokenizer, options = (CHAT if chat else PLAIN), EncodeOptions(64)
    pairs, report = load_pairs(path, tokenizer, options)
    assert report.dropped == {reason: 1}
    assert (report.seen, report.kept, report.truncated) == (3, 2, 0)
    assert [p.index for p in pairs] == [0, 2] and [p.row.where for p in pairs] == [
        f"{path}:1",
        f"{path}:3",
    ]
    assert report.examples[reason][0].startswith(f"{path}:2: {reason}")
    assert str(report).splitlines()[:2] == [
        "2 of 3 rows kept, 0 of them truncated",
        f"  dropped 1: {reason}",
    ]
    with pytest.raises(RowProblem) as problem:
        load_pairs(path, tokenizer, options, strict=True)
    assert (problem.value.reason, problem.value.where) == (reason, f"{path}:2")
    assert str(problem.value).startswith(f"{path}:2: {reason}")


def test_deep_rows_from_memory():
    deep: dict = {}
    for _ in range(5000):
        deep = {"a": deep}
    pairs, report = load_pairs([GOOD, {**GOOD, "chat_template_kwargs": {"style": deep}}], CHAT)
    assert len(pairs) == 1 and report.dropped == {"nested too deeply": 1}


@pytest.mark.parametrize(
    "trouble",
    [
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ m.content + 1 }}",
        "{{ m.nothing.at_all }}",
        "{{ m.content[99].x }}",
        "{{ range(10**9) | list }}",
        "{{ m.content | int('x', 'y', 'z') }}",
        "{{ '%d' | format(m.content) }}",
    ],
)
def test_template_that_raises(trouble):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'bad' %}" + trouble + "{% endif %}{% endfor %}"
    )
    tokenizer.chat_template += CHATML
    rows = [GOOD, {**GOOD, "prompt": "bad"}]
    pairs, report = load_pairs(rows, tokenizer)
    assert len(pairs) == 1 and report.dropped == {"chat template": 1}
    with pytest.raises(RowProblem, match="row 1: chat template"):
        load_pairs(rows, tokenizer, strict=True)


def test_roles_in_the_wrong_order():
    tokenizer = tiny_tokenizer()
    alternate = (
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
        "{% endif %}{% endfor %}"
    )
    tokenizer.chat_template = alternate + CHATML
    bad = {"prompt": [usr("q"), usr("r")], "chosen": [bot("x")], "rejected": [bot("y")]}
    _, report = load_pairs([GOOD, bad], tokenizer)
    assert report.examples == {"chat template": ["row 1: chat template: TemplateError: order"]}


def test_template_that_renders_nothing_of_the_prompt():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(RowProblem, match="row 0: prompt rendered otherwise"):
        load_pairs([{**GOOD, "chosen": "x", "rejected": "y"}], tokenizer, strict=True)


def test_problems_are_counted_and_the_first_three_shown():
    _, report = load_pairs([GOOD, *[{**GOOD, "chosen": ""}] * 5, {}], CHAT)
    assert report.dropped == {"empty completion": 5, "no column 'chosen'": 1}
    assert [len(x) for x in report.examples.values()] == [3, 1]
    assert str(report) == (
        "1 of 7 rows kept, 0 of them truncated\n"
        "  dropped 5: empty completion\n"
        "    row 1: empty completion: chosen\n"
        "    row 2: empty completion: chosen\n"
        "    row 3: empty completion: chosen\n"
        "  dropped 1: no column 'chosen'\n"
        "    row 6: no column 'chosen': the columns are none"
    )


def test_no_usable_row():
    with pytest.raises(
        ValueError,
        match=r"(?s)expected at least one usable row.*0 of 1 rows.*identical completions",
    ):
        load_pairs([{**GOOD, "rejected": GOOD["chosen"]}], CHAT)


def test_rows_of_another_type_in_an_iterable():
    _, report = load_pairs([GOOD, ["q"], "q", None], CHAT)
    assert report.dropped == {"not an object": 3}


# -- sources

ROWS = [{**GOOD, "prompt": f"{i} + {i}?"} for i in range(3)]
LINES = dumped(*ROWS)
BOM = b"\xef\xbb\xbf"
FILES = {  # name, content, where of the rows after the path
    "jsonl": ("a.jsonl", LINES, [":1", ":2", ":3"]),
    "ndjson": ("a.ndjson", LINES, [":1", ":2", ":3"]),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(LINES), [":1", ":2", ":3"]),
    "no-last-newline": ("a.jsonl", LINES.rstrip(), [":1", ":2", ":3"]),
    "bom": ("a.jsonl", BOM + LINES, [":1", ":2", ":3"]),
    "bom-alone": ("a.jsonl", BOM + b"\n" + LINES, [":2", ":3", ":4"]),
    "crlf": ("a.jsonl", LINES.replace(b"\n", b"\r\n"), [":1", ":2", ":3"]),
    "blank-lines": ("a.jsonl", b"\n" + LINES.replace(b"\n", b"\n \t\r\n"), [":2", ":4", ":6"]),
    "json": ("a.json", json.dumps(ROWS, indent=2).encode(), [":row 0", ":row 1", ":row 2"]),
    "json-bom": ("a.json", BOM + json.dumps(ROWS).encode(), [":row 0", ":row 1", ":row 2"]),
    "json.gz": (
        "a.json.gz",
        gzip.compress(json.dumps(ROWS).encode()),
        [":row 0", ":row 1", ":row 2"],
    ),
    "json-lines": ("a.json", LINES, [":1", ":2", ":3"]),
    "json-lines.gz": ("a.json.gz", gzip.compress(LINES), [":1", ":2", ":3"]),
}


@pytest.fixture(scope="module")
def loaded():
    return [ids_of(p) for p in load_pairs(ROWS, CHAT)[0]]


@pytest.mark.parametrize("kind", FILES)
def test_files(tmp_path, loaded, kind):
    name, content, where = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    for source in (path, str(path)):
        pairs, report = load_pairs(source, CHAT, strict=True)
        assert [ids_of(p) for p in pairs] == loaded
        assert [p.row.where for p in pairs] == [f"{path}{x}" for x in where]
        assert (report.seen, report.kept) == (3, 3)


def test_json_of_one_row(tmp_path, loaded):
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS[0], indent=2).encode())
    assert [ids_of(p) for p in load_pairs(tmp_path / "a.json", CHAT)[0]] == loaded[:1]


def test_parquet(tmp_path, loaded):
    rows = [
        {
            "conversations": [{"from": "human", "value": ROWS[i]["prompt"]}],
            "chosen": bot("the sun"),
            "rejected": bot("the moon"),
        }
        for i in range(3)
    ]
    rows[1]["conversations"][0]["weight"] = 1.0  # which makes it None in the others
    rows[2]["tools"] = []
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(rows[::-1]).schema), path)
    del rows[1]["conversations"][0]["weight"]
    pairs, _ = load_pairs(path, CHAT)
    assert [ids_of(p) for p in pairs] == loaded
    assert [p.row.where for p in pairs] == [f"{path}:row {i}" for i in range(3)]


def test_parquet_of_many_batches(tmp_path):
    rows = [{**GOOD, "prompt": str(i)} for i in range(600)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs, _ = load_pairs(tmp_path / "a.parquet", PLAIN)
    assert [p.row.prompt for p in pairs] == [str(i) for i in range(600)]
    assert pairs[-1].row.where.endswith("row 599")


def test_parquet_with_text_that_is_not_utf8(tmp_path):
    columns = {k: [row[k] for row in ROWS] for k in GOOD}
    broken = pa.array([b"the sun", b"\xff\xfe", b"the sun"])
    columns["chosen"] = pa.Array.from_buffers(pa.utf8(), 3, broken.buffers())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    pairs, report = load_pairs(tmp_path / "a.parquet", CHAT)
    assert [p.index for p in pairs] == [0, 2] and report.dropped == {"broken text": 1}
    with pytest.raises(RowProblem, match=r"a\.parquet:row 1: broken text"):
        load_pairs(tmp_path / "a.parquet", CHAT, strict=True)


def test_folder(tmp_path, loaded):
    (tmp_path / "b.jsonl").write_bytes(dumped(*ROWS[1:]))
    (tmp_path / "a.json").write_bytes(json.dumps(ROWS[:1]).encode())
    (tmp_path / "README.md").write_text("not data")
    pairs, _ = load_pairs(tmp_path, CHAT, strict=True)
    assert [ids_of(p) for p in pairs] == loaded and [p.index for p in pairs] == [0, 1, 2]
    assert [p.row.where for p in pairs] == [
        f"{tmp_path}/{x}" for x in ("a.json:row 0", "b.jsonl:1", "b.jsonl:2")
    ]


DATASET = datasets.Dataset.from_list(ROWS)
OBJECTS = {
    "list": lambda _: ROWS,
    "tuple": lambda _: tuple(ROWS),
    "generator": lambda _: iter(ROWS),
    "dataset": lambda _: DATASET,
    "iterable-dataset": lambda _: DATASET.to_iterable_dataset(),
    "dataset-dict": lambda _: datasets.DatasetDict(test=DATASET, train=DATASET.select([0])),
    "dict": lambda _: {"test": ROWS, "train": []},
    "saved": lambda path: (DATASET.save_to_disk(path), path)[1],
    "saved-dict": lambda path: (datasets.DatasetDict(test=DATASET).save_to_disk(path), path)[1],
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects(tmp_path, loaded, kind):
    pairs, _ = load_pairs(OBJECTS[kind](tmp_path / "saved"), CHAT, split="test", strict=True)
    assert [ids_of(p) for p in pairs] == loaded
    assert [p.row.where for p in pairs] == ["row 0", "row 1", "row 2"]


def test_limit():
    def rows():
        yield from ROWS
        raise AssertionError("looked at a row beyond the limit")

    pairs, report = load_pairs(rows(), CHAT, limit=3)
    assert len(pairs) == report.seen == 3


def corrupt_parquet(path):
    pq.write_table(pa.table({k: [f"{i} {v}" for i in range(5000)] for k, v in GOOD.items()}), path)
    content = path.read_bytes()
    return content[:5000] + b"\xff" * 3000 + content[8000:]


SOURCES = {  # name, content (None: no file), what the error says
    "empty": ("a.jsonl", b"", "found none: 0 of 0 rows"),
    "blank": ("a.jsonl", b"\n\n", "found none: 0 of 0 rows"),
    "empty-list": ("a.json", b"[]", "found none: 0 of 0 rows"),
    "empty-json": ("a.json", b"", "found none: 0 of 0 rows"),
    "scalar": ("a.json", b"5", r"a\.json: expected a list of rows, got int"),
    "broken-list": (
        "a.json",
        b"[\n" + LINES.replace(b"\n", b",\n") + b"]",
        r"a\.json: broken JSON.*line [45]",  # of the comma, or of what follows it
    ),
    "cut-list": (
        "a.json",
        json.dumps(ROWS, indent=2).encode()[:-20],
        r"a\.json: broken JSON.*line",
    ),
    "deep-list": ("a.json", b"[" * 99999 + b"]" * 99999, r"a\.json: broken JSON"),
    "empty-parquet": ("a.parquet", b"", r"a\.parquet: expected a parquet file"),
    "lines-parquet": ("a.parquet", LINES, r"a\.parquet: expected a parquet file"),
    "corrupt-parquet": ("a.parquet", corrupt_parquet, r"a\.parquet: expected a parquet file"),
    "plain-gz": ("a.jsonl.gz", LINES, r"a\.jsonl\.gz:1: broken gzip"),
    "plain-json.gz": ("a.json.gz", LINES, r"a\.json\.gz: cannot be read"),
    "cut-json.gz": (
        "a.json.gz",
        gzip.compress(json.dumps(ROWS).encode())[:-9],
        r"a\.json\.gz: cannot be read",
    ),
    "suffix": ("a.csv", b"", r"expected a file ending in \.jsonl.*, got .*a\.csv"),
    "missing": ("a.jsonl", None, r"no such file: .*a\.jsonl"),
    "missing-folder": ("a", None, "no such file: .*a"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_sources_that_cannot_be_read(tmp_path, kind):
    name, content, message = SOURCES[kind]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content(path) if callable(content) else content)
    with pytest.raises(
        FileNotFoundError if content is None else ValueError, match=f"(?s){message}"
    ):
        load_pairs(path, CHAT)


def test_truncated_gzip(tmp_path):
    path, rows = (
        tmp_path / "a.jsonl.gz",
        [{**GOOD, "prompt": str(random.Random(i).random())} for i in range(3000)],
    )
    path.write_bytes(gzip.compress(dumped(*rows))[:-4000])
    pairs, report = load_pairs(path, PLAIN)
    assert report.dropped == {"broken gzip": 1} and 1000 < report.kept < 3000
    assert [p.row.prompt for p in pairs] == [row["prompt"] for row in rows[: report.kept]]
    with pytest.raises(RowProblem, match=rf"a\.jsonl\.gz:{report.kept + 1}: broken gzip"):
        load_pairs(path, PLAIN, strict=True)


def test_other_sources_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="expected files ending in"):
        load_pairs(tmp_path, CHAT)
    with pytest.raises(ValueError, match=r"split: expected one of \['test'\], got 'train'"):
        load_pairs({"test": ROWS}, CHAT)
    with pytest.raises(
        TypeError, match="expected a path, a dataset or an iterable of rows, got int"
    ):
        load_pairs(5, CHAT)


# -- token ids


def test_chat_ids():
    ((pair,), _) = load_pairs([GOOD], CHAT)
    prompt = "<|im_start|>user\nwhat is better?<|im_end|>\n<|im_start|>assistant\n"
    assert [CHAT.decode(x) for x in ids_of(pair)] == [prompt, f"the sun{END}\n", f"the moon{END}\n"]
    for side in ("chosen", "rejected"):
        whole = CHAT(f"{prompt}{GOOD[side]}{END}\n")["input_ids"]
        assert [*pair.prompt_ids, *getattr(pair, f"{side}_ids")] == whole
    assert {x.dtype for x in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)} == {
        np.dtype(np.int32)
    }


def test_plain_ids_end_once():
    eos = PLAIN.eos_token_id
    rows = [
        {"prompt": "the fox", "chosen": " is", "rejected": " was"},
        {"prompt": "the fox", "chosen": f" is{END}", "rejected": " was"},
    ]
    for pair in load_pairs(rows, PLAIN)[0]:
        whole = [*pair.prompt_ids, *pair.chosen_ids]
        assert whole == [*PLAIN("the fox is")["input_ids"], eos] and whole.count(eos) == 1
        assert PLAIN.decode(pair.rejected_ids) == f" was{END}"


def test_plain_ids_of_a_tokenizer_that_ends_texts():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{PAD} $A {END}", special_tokens=[(PAD, 0), (END, 1)]
    )
    ((pair,), _) = load_pairs([GOOD], tokenizer)
    assert [tokenizer.decode(x) for x in ids_of(pair)] == [
        f"{PAD}what is better?",
        f"the sun{END}",
        f"the moon{END}",
    ]


def test_messages_on_request_or_not():
    ((pair,), _) = load_pairs([GOOD], CHAT, EncodeOptions(chat=False))
    assert [CHAT.decode(x) for x in ids_of(pair)] == [
        "what is better?",
        f"the sun{END}",
        f"the moon{END}",
    ]
    with pytest.raises(ValueError, match=r"chat_template: row 0 holds messages.*no chat template"):
        load_pairs([{**GOOD, "prompt": [usr("q")]}], PLAIN)
    with pytest.raises(ValueError, match=r"chat_template: row 0 holds messages.*no chat template"):
        load_pairs([GOOD], PLAIN, EncodeOptions(chat=True))


def test_plain_text_needs_an_end():
    tokenizer = tiny_tokenizer(chat=False)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with an end-of-sequence token"):
        load_pairs([GOOD], tokenizer)


def merging(*merges):
    letters = sorted(set("".join(a + b for a, b in merges)) | set("abcxyz"))
    vocab = {
        token: i
        for i, token in enumerate([PAD, END, "<|im_start|>", *letters, *(a + b for a, b in merges)])
    }
    bpe = Tokenizer(models.BPE(vocab, list(merges)))
    bpe.decoder = decoders.Fuse()
    return wrapped(bpe)


def test_split_where_merges_cross_the_boundary():
    tokenizer = merging(("a", "b"))
    ((pair,), _) = load_pairs([{"prompt": "xya", "chosen": "b", "rejected": "c"}], tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(x) for x in ids_of(pair)]
    assert tokens == [["x", "y"], ["ab", END], ["a", "c", END]]
    ((pair,), _) = load_pairs([{"prompt": "xya", "chosen": "ba", "rejected": "bc"}], tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(x) for x in ids_of(pair)]
    assert tokens == [["x", "y"], ["ab", "a", END], ["ab", "c", END]]


def test_completions_that_begin_alike_keep_their_beginning():
    tokenizer = merging(("a", "b"))
    ((pair,), _) = load_pairs([{"prompt": "x", "chosen": "yya", "rejected": "yyc"}], tokenizer)
    tokens = [tokenizer.convert_ids_to_tokens(x) for x in ids_of(pair)]
    assert tokens == [["x"], ["y", "y", "a", END], ["y", "y", "c", END]]


def test_truncation_keeps_the_start():
    whole = load_pairs([GOOD], CHAT)[0][0]
    n = len(whole.prompt_ids)
    for extra in (1, 2, len(whole.rejected_ids) - 1):
        if whole.chosen_ids[:extra].tolist() == whole.rejected_ids[:extra].tolist():
            with pytest.raises(RowProblem, match="identical completions: after truncation"):
                load_pairs([GOOD], CHAT, EncodeOptions(n + extra), strict=True)
            continue
        ((pair,), report) = load_pairs([GOOD], CHAT, EncodeOptions(n + extra))
        assert ids_of(pair) == [
            whole.prompt_ids.tolist(),
            whole.chosen_ids[:extra].tolist(),
            whole.rejected_ids[:extra].tolist(),
        ]
        assert pair.truncated and report.truncated == 1
    longest = n + max(len(whole.chosen_ids), len(whole.rejected_ids))
    for max_length in (longest, None):
        ((pair,), report) = load_pairs([GOOD], CHAT, EncodeOptions(max_length))
        assert ids_of(pair) == ids_of(whole) and not pair.truncated and report.truncated == 0
    with pytest.raises(RowProblem, match=f"prompt too long: {n} tokens, max_length is {n}"):
        load_pairs([GOOD], CHAT, EncodeOptions(n), strict=True)


@pytest.mark.parametrize("value", [1, 0, -5, 2.5, "64", True])
def test_bad_max_length(value):
    with pytest.raises(ValueError, match="max_length: expected an integer >= 2 or None"):
        EncodeOptions(value)


def test_prompt_that_ends_with_the_assistant_goes_on():
    messages = [usr("q"), bot("the sun")]
    assert (
        prompt_text(CHAT, messages)
        == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nthe sun"
    )
    assert prompt_text(CHAT, messages[:1]).endswith("<|im_end|>\n<|im_start|>assistant\n")


CROSSING = tiny_tokenizer(chat=False, crossing=True)
pieces = st.one_of(
    st.text(max_size=12), st.sampled_from(["once upon a", " time", "\n\n", " ", END, "é", "🙂", "‏"])
)
texts = st.lists(pieces, min_size=1, max_size=4).map("".join)


@settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    texts, texts, texts, st.integers(2, 40) | st.none(), st.sampled_from([CHAT, PLAIN, CROSSING])
)
def test_any_text(prompt, chosen, rejected, max_length, tokenizer):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    try:
        parsed = parse_row(row, chat=tokenizer is CHAT)
        pair = encode(parsed, tokenizer, max_length)
    except RowProblem as problem:
        assert problem.reason in (
            "empty completion",
            "empty prompt",
            "identical completions",
            "prompt too long",
        )
        assume(False)
    if parsed.chat:
        before = f"<|im_start|>user\n{prompt}{END}\n<|im_start|>assistant\n"
        wholes = [tokenizer(f"{before}{x}{END}\n")["input_ids"] for x in (chosen, rejected)]
        alone = tokenizer(before)["input_ids"]
    else:
        wholes = [tokenizer(prompt + x)["input_ids"] for x in (chosen, rejected)]
        wholes = [
            x if x[-1] == tokenizer.eos_token_id else [*x, tokenizer.eos_token_id] for x in wholes
        ]
        alone = tokenizer(prompt)["input_ids"]
    ids, n = ids_of(pair), len(pair.prompt_ids)
    assert [ids[0] + ids[1], ids[0] + ids[2]] == [x[:max_length] for x in wholes]
    assert pair.truncated == (max_length is not None and max(map(len, wholes)) > max_length)
    assert n >= 1 and ids[1] and ids[2] and ids[1] != ids[2]
    assert alone[:n] == ids[0]
    assert len({tuple(x[n : n + 1]) for x in (alone, *wholes)}) > 1, "the prompt could be longer"


# -- packs and batches


def example(rng, i=0, longest=30, **columns):
    def ids():
        return np.array(
            [rng.randrange(3, 99) for _ in range(rng.randint(1, longest))], dtype=np.int32
        )

    return {"index": i, **{name: ids() for name in COLUMNS}, **columns}


def first_fit(sizes, budget):
    rooms = []
    for size in sizes:
        at = next((i for i, room in enumerate(rooms) if room >= size), None)
        if at is None:
            rooms.append(budget)
            at = len(rooms) - 1
        rooms[at] -= size
    return len(rooms)


@pytest.mark.parametrize("seed, budget", [(0, 130), (1, 130), (2, 300), (3, 10**9)])
def test_packs(seed, budget):
    rng = random.Random(seed)
    examples = [example(rng, i) for i in range(200)]
    sizes = [
        2 * len(x["prompt_ids"]) + len(x["chosen_ids"]) + len(x["rejected_ids"]) - 2
        for x in examples
    ]
    assert [pair_tokens(x) for x in examples] == sizes
    packs = pack_pairs(examples, budget)
    assert sorted(x["index"] for pack in packs for x in pack) == list(range(200))
    assert all(x is examples[x["index"]] for pack in packs for x in pack)
    used = [sum(sizes[x["index"]] for x in pack) for pack in packs]
    assert max(used) <= budget
    assert math.ceil(sum(sizes) / budget) <= len(packs) <= first_fit(sizes, budget)
    again = pack_pairs(examples, budget)
    assert [[x["index"] for x in pack] for pack in again] == [
        [x["index"] for x in pack] for pack in packs
    ]


def test_packs_by_hand():
    sizes = [10, 4, 6, 5, 5, 9]
    examples = [
        {"prompt_ids": [1], "chosen_ids": [1] * (n - 1), "rejected_ids": [1], "n": n} for n in sizes
    ]
    assert [pair_tokens(x) for x in examples] == sizes
    assert [[x["n"] for x in pack] for pack in pack_pairs(examples, 10)] == [
        [10],
        [4, 6],
        [5, 5],
        [9],
    ]
    assert pack_pairs([], 10) == []
    with pytest.raises(
        ValueError, match="token_budget: expected at least the longest pair's 10 tokens, got 9"
    ):
        pack_pairs(examples, 9)


@pytest.mark.parametrize("budget", [300, 900])
def test_copies_of_a_row_lie_in_different_packs(budget):
    """At no cost in packs, as long as there are other rows to fill them with."""
    rng = random.Random(4)
    sets = [[example(rng, i) for i in range(60)], [example(rng, i) for i in range(60, 200)]]
    mixed, _ = Mixture(("a", "b"), (2.5, 1)).mixed(sets)
    packs = pack_pairs(mixed, budget)
    assert sorted(id(x) for pack in packs for x in pack) == sorted(map(id, mixed))
    assert max(sum(map(pair_tokens, pack)) for pack in packs) <= budget
    assert all(len({x["index"] for x in pack}) == len(pack) for pack in packs)
    # equal rows that no weight has made are packed as ever
    equal = pack_pairs([dict(x) for x in mixed], budget)
    assert any(len({x["index"] for x in pack}) < len(pack) for pack in equal)
    assert len(packs) <= len(equal) + 1


def test_packing_is_quick():
    rng = random.Random(0)
    examples = [
        {
            "prompt_ids": range(rng.randint(10, 900)),
            "chosen_ids": range(99),
            "rejected_ids": range(99),
        }
        for _ in range(20000)
    ]
    start = time.process_time()
    packs = pack_pairs(examples, 16384)
    assert time.process_time() - start < 5
    assert sum(map(pair_tokens, examples)) / (16384 * len(packs)) > 0.99


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("multiple", [None, 8])
def test_scored_rows_predict_their_targets(packing, multiple):
    rng = random.Random(1)
    pairs = [example(rng, i, 12) for i in range(5)] + [example(rng, 5, 1)]
    batch = PairCollator(pad_token_id=77, packing=packing, pad_to_multiple_of=multiple)(pairs)
    want, inputs = [], []
    for side in ("chosen", "rejected"):
        for x in pairs:
            sequence = [*x["prompt_ids"], *x[f"{side}_ids"]]
            inputs.append(sequence[:-1])
            want += [
                (sequence[t - 1], t - 1, sequence[t])
                for t in range(len(x["prompt_ids"]), len(sequence))
            ]
    ids = batch["input_ids"]
    if packing:
        assert batch.keys() == {
            "input_ids",
            "position_ids",
            "scored",
            "target",
            "lengths",
            "num_tokens",
        }
        assert ids.tolist() == [[t for x in inputs for t in x]]
        assert batch["position_ids"].tolist() == [[i for x in inputs for i in range(len(x))]]
        positions = batch["position_ids"]
    else:
        assert batch.keys() == {
            "input_ids",
            "attention_mask",
            "scored",
            "target",
            "lengths",
            "num_tokens",
        }
        width = max(map(len, inputs))
        width += -width % (multiple or 1)
        assert ids.tolist() == [x + [77] * (width - len(x)) for x in inputs]
        assert batch["attention_mask"].tolist() == [
            [1] * len(x) + [0] * (width - len(x)) for x in inputs
        ]
        positions = torch.arange(width).expand(ids.shape)
    hidden = torch.stack([ids, positions], -1).flatten(
        0, 1
    )  # what a model that knows only token and position gives
    rows = hidden[batch["scored"]].tolist()
    assert [
        (*row, target) for row, target in zip(rows, batch["target"].tolist(), strict=True)
    ] == want
    assert batch["num_tokens"] == sum(map(len, inputs)) == sum(map(pair_tokens, pairs))
    assert batch["lengths"].tolist() == [
        len(x[f"{s}_ids"]) for s in ("chosen", "rejected") for x in pairs
    ]
    assert {batch[k].dtype for k in ("input_ids", "scored", "target")} == {torch.int64}


def test_optional_columns():
    rng = random.Random(2)
    pairs = [example(rng, i, 6) for i in range(3)]
    for i, x in enumerate(pairs):
        for side in ("chosen", "rejected"):
            n = len(x[f"{side}_ids"])
            x[f"{side}_token_rewards"] = np.full(n, i + (side == "rejected") / 2, np.float64)
            x[f"ref_{side}_logps"] = -1e-17 - 3 * i - (side == "rejected")
    batch = PairCollator()(pairs)
    order = [(x, side) for side in ("chosen", "rejected") for x in pairs]
    assert batch["token_rewards"].dtype == np.float32 and batch["ref_logps"].dtype == np.float64
    assert batch["token_rewards"].tolist() == [r for x, s in order for r in x[f"{s}_token_rewards"]]
    assert batch["ref_logps"].tolist() == [x[f"ref_{s}_logps"] for x, s in order]
    for x, side in order:
        x[f"ref_{side}_token_logps"] = np.full(len(x[f"{side}_ids"]), -0.5, np.float32)
    batch = PairCollator(packing=True)(pairs)
    assert (
        batch["ref_logps"].dtype == np.float32 and batch["ref_logps"].shape == batch["target"].shape
    )
    del (
        pairs[1]["rejected_token_rewards"],
        pairs[2]["ref_chosen_token_logps"],
        pairs[2]["ref_rejected_logps"],
    )
    assert not {"token_rewards", "ref_logps"} & PairCollator()(pairs).keys()


@pytest.mark.parametrize("packing", [False, True])
def test_packs_count_as_their_members(packing):
    pairs = [example(random.Random(3), i) for i in range(4)]
    flat, nested = (
        PairCollator(packing=packing)(pairs),
        PairCollator(packing=packing)([pairs[:3], pairs[3:]]),
    )
    assert flat.keys() == nested.keys()
    assert all(np.array_equal(flat[k], nested[k]) for k in flat)


@pytest.mark.parametrize("per_token", [False, True])
def test_first_pairs(per_token):
    rng = random.Random(4)
    pairs = [example(rng, i, 5) for i in range(4)]
    for x in pairs:
        for side in ("chosen", "rejected"):
            x[f"{side}_token_rewards"] = np.array([rng.random() for _ in x[f"{side}_ids"]])
            tokens = np.array([rng.random() for _ in x[f"{side}_ids"]])
            x |= (
                {f"ref_{side}_token_logps": tokens}
                if per_token
                else {f"ref_{side}_logps": tokens.sum()}
            )
    batch = PairCollator()(pairs)
    found, want = first_pairs(batch, 3), PairCollator()(pairs[:3])
    for name in ("target", "lengths", "token_rewards", "ref_logps"):
        assert np.array_equal(found[name], want[name]), name
    before = [x["input_ids"].flatten()[x["scored"]].tolist() for x in (found, want)]
    assert before[0] == before[1]
    assert all(found[k] is batch[k] for k in ("input_ids", "attention_mask"))


# -- real data


def qwen(**options):
    return AutoTokenizer.from_pretrained(shared_data("tok", "qwen2.5"), **options)


@pytest.mark.parametrize(
    "files, kept, truncated, dropped",
    [
        (
            ["ultrafeedback_train.jsonl", "ultrafeedback_eval.jsonl"],
            1193,
            1,
            {"identical completions": 5, "empty completion": 2},
        ),
        (["hh_harmless_test.jsonl.gz"], 2303, 0, {"prompts differ": 5, "empty completion": 4}),
        (["sharegpt_demo.json"], 298, 6, {"prompt too long": 2}),
    ],
    ids=["ultrafeedback", "hh", "sharegpt"],
)
def test_real_files(files, kept, truncated, dropped):
    tokenizer, found, start, rows = qwen(), {}, time.process_time(), 0
    counts = np.zeros(2, int)
    for name in files:
        pairs, report = load_pairs(shared_data("prefs", name), tokenizer, EncodeOptions(2048))
        counts += (report.kept, report.truncated)
        rows += report.seen
        for reason, count in report.dropped.items():
            found[reason] = found.get(reason, 0) + count
    assert (counts.tolist(), found) == ([kept, truncated], dropped)
    assert (time.process_time() - start) / rows < 0.05
    for pair in pairs[:: len(pairs) // 50]:
        assert tokenizer.decode(pair.prompt_ids).endswith("<|im_start|>assistant\n")
        assert pair.truncated or tokenizer.decode(pair.chosen_ids).endswith("<|im_end|>\n")


TEMPLATES = ["gemma", "gemma3", "llama3", "llama3_1", "llama3_training", "phi3", "qwen2_5", "qwen3"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_real_templates(name):
    template = shared_data("tok", "templates", f"{name}.jinja").read_text()
    tokenizer = qwen(chat_template=template, bos_token="<|endoftext|>")
    for file in ("ultrafeedback_eval.jsonl", "hh_harmless_test.jsonl.gz", "sharegpt_demo.json"):
        pairs, report = load_pairs(
            shared_data("prefs", file), tokenizer, EncodeOptions(2048), limit=25
        )
        assert report.dropped.keys() <= {"chat template"} and (
            name == "gemma" or not report.dropped
        )
        for pair in pairs[::5]:
            messages = [*pair.row.prompt, *pair.row.chosen]
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
            whole = tokenizer(whole, add_special_tokens=False)["input_ids"][:2048]
            assert [*pair.prompt_ids, *pair.chosen_ids] == whole
            assert pair.truncated or pair.row.chosen[-1]["content"].strip() in tokenizer.decode(
                pair.chosen_ids
            )


def test_real_merges_cross_the_boundary():
    tokenizer = AutoTokenizer.from_pretrained(shared_data("lm", "tinystories-656k"))
    row = Preference("Once upon a", " time", " day")
    pair = encode(row, tokenizer)
    alone = tokenizer(row.prompt)["input_ids"]
    alone = alone[:-1] if alone[-1] == tokenizer.eos_token_id else alone
    assert len(pair.prompt_ids) < len(alone), (
        "the prompt's last token is part of another in what follows"
    )
    for side in ("chosen", "rejected"):
        whole = [*pair.prompt_ids, *getattr(pair, f"{side}_ids")]
        assert tokenizer.decode(whole, skip_special_tokens=True).strip() == row.prompt + getattr(
            row, side
        )
        assert whole.count(tokenizer.eos_token_id) == 1 and whole[-1] == tokenizer.eos_token_id
