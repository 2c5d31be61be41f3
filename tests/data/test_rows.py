"""Rows as people write them: each column is read or refused by name."""

import dataclasses
import json
from sys import modules as sys_modules

import datasets
import pandas
import pytest

from tests.support.tiny import CHATML, bot, msg, tiny_tokenizer, usr
from treg.data import EncodeOptions, RowProblem, load_pairs, parse_row
from treg.data.names import parse_columns

CHAT = tiny_tokenizer()
PLAIN = tiny_tokenizer(chat=False)


def sys(content):
    return msg("system", content)


ANSWERS = {"chosen": "the sun", "rejected": "the moon"}
ENDS = [bot("the sun")], [bot("the moon")]
READ = {  # columns beside the answers, and the prompt that they are
    "question": ({"question": "q"}, [usr("q")]),
    "query": ({"query": "q"}, [usr("q")]),
    "orca": ({"system": "s", "question": "q"}, [sys("s"), usr("q")]),
    "orca-empty-system": ({"system": "", "question": "q"}, [usr("q")]),
    "system-prompt": ({"system_prompt": "s", "prompt": "q"}, [sys("s"), usr("q")]),
    "system-and-messages": ({"system": "s", "prompt": [usr("q")]}, [sys("s"), usr("q")]),
    "alpaca": ({"instruction": "Do", "input": "this", "system": ""}, [usr("Do\nthis")]),
    "alpaca-no-input": ({"instruction": "Do", "input": ""}, [usr("Do")]),
    "input-alone": ({"system": "s", "input": "q"}, [sys("s"), usr("q")]),
    "history": (
        {"instruction": "q", "history": [["a", "b"], ["c", "d"]], "system": "s"},
        [sys("s"), usr("a"), bot("b"), usr("c"), bot("d"), usr("q")],
    ),
    "history-json": ({"prompt": "q", "history": '[["a", "b"]]'}, [usr("a"), bot("b"), usr("q")]),
    "history-messages": (
        {"prompt": "q", "history": [usr("a"), bot("b")]},
        [usr("a"), bot("b"), usr("q")],
    ),
    "json-prompt": ({"prompt": json.dumps([sys("s"), usr("q")])}, [sys("s"), usr("q")]),
    "json-sharegpt": (
        {"conversations": json.dumps([{"from": "Human", "value": "q"}])},
        [usr("q")],
    ),
    "roles": ({"prompt": [msg("Human", "q"), msg("gpt", "a"), msg("human", "r")]}, None),
    "hh-stripped": (
        {"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"},
        [usr("a"), bot("b"), usr("c")],
    ),
    "crlf": ({"prompt": "\r\n\r\nHuman: hi\r\n\r\nAssistant:"}, [usr("hi")]),
    "about": (
        {"prompt": "q", "prompt_id": "x y", "source": "a b", "chosen_model": "m n", "score": 1.5},
        [usr("q")],
    ),
    "exchanges": (
        {"conversation": [{"input": "a", "output": "b"}, {"input": "q", "output": None}]},
        [usr("a"), bot("b"), usr("q")],
    ),
    "exchanges-of-history": (
        {"prompt": "q", "history": [{"input": "a", "output": "b"}]},
        [usr("a"), bot("b"), usr("q")],
    ),
    "json-of-one-message": ({"prompt": json.dumps(usr("q"))}, [usr("q")]),
    "json-object-that-is-no-message": (
        {"prompt": '{"from": "0x1f", "value": 3}'},
        [usr('{"from": "0x1f", "value": 3}')],
    ),
    "list-that-is-json-no-messages": ({"prompt": '[{"a": 1}]'}, [usr('[{"a": 1}]')]),
}


@pytest.mark.parametrize("form", READ)
def test_columns_that_are_read(form):
    columns, prompt = READ[form]
    if form == "roles":
        prompt = [usr("q"), bot("a"), usr("r")]
    row = parse_row({**columns, **ANSWERS}, chat=True)
    assert (row.prompt, row.chosen, row.rejected) == (prompt, *ENDS)


def test_answers_as_strings_of_json():
    call = msg("assistant", None, tool_calls=[{"function": {"name": "f", "arguments": {}}}])
    del call["content"]
    for one, read in ((bot("x"), bot("x")), (call, call | {"content": ""})):
        for form in ([one], one):
            row = {"prompt": "q", "chosen": json.dumps(form), "rejected": json.dumps([bot("y")])}
            assert parse_row(row, chat=True).chosen == [read]


BROKEN = {
    "Python's list": ("[{'content': 'x', 'role': 'assistant'}]", "broken JSON"),
    "Python's object": ("{'role': 'assistant', 'content': 'x'}", "broken JSON"),
    "newline within": ('[{"role": "assistant", "content": "x\n"}]', "broken JSON"),
    "some are messages": ('[{"role": "assistant", "content": "x"}, {"name": "f"}]', "mixed types"),
    "a user's": ('[{"role": "user", "content": "x"}]', "prompts differ"),
    "one side alone": ('[{"role": "assistant", "content": "x"}]', "mixed types"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_messages_as_text_are_never_an_answer(case):
    text, reason = BROKEN[case]
    other = "y" if case == "one side alone" else text.replace("x", "y")
    with pytest.raises(RowProblem) as problem:
        parse_row({"prompt": "q", "chosen": text, "rejected": other}, chat=True)
    assert problem.value.reason == reason


REFUSED = {
    "context-of-the-prompt": (
        {"prompt": "q", "prompt_context": "a text"},
        "unknown column 'prompt_context'",
        "it holds text",
    ),
    "list-of-texts": ({"prompt": "q", "documents": ["a text"]}, "unknown column 'documents'", ""),
    "object-of-texts": (
        {"prompt": "q", "context": {"text": "a text"}},
        "unknown column 'context'",
        "",
    ),
    "hh-after-text": (
        {"prompt": "Be kind.\n\nHuman: q\n\nAssistant:"},
        "a dialogue after other text",
        "Be kind",
    ),
    "unknown": ({"prompt": "q", "context": "a text"}, "unknown column 'context'", "--columns"),
    "unknown-messages": (
        {"prompt": "q", "thread": [usr("a")]},
        "unknown column 'thread'",
        "messages",
    ),
    "several-unknown": (
        {"prompt": "q", "labelling_prompt": [sys("rate")], "raw_response": "a", "order": ["x"]},
        "unknown column 'labelling_prompt'",
        "or leave out all that nothing reads with --columns labelling_prompt=,raw_response=",
    ),
    "objects-of-texts": (
        {"prompt": "q", "documents": [{"title": "t", "text": "a text"}]},
        "unknown column 'documents'",
        "",
    ),
    "exchanges-that-nobody-reads": (
        {"prompt": "q", "thread": [{"input": "a", "output": "b"}]},
        "unknown column 'thread'",
        "messages",
    ),
    "answered-exchange": (
        {"conversation": [{"input": "q", "output": "a"}]},
        "answered already",
        "the last input of the prompt has an output",
    ),
    "exchange-of-number": ({"conversation": [{"input": 3}]}, "mixed types", "prompt[0].input"),
    "no-prompt": ({"body": "a text"}, "unknown column 'body'", "--columns NEW=body"),
    "nothing": ({}, "no prompt", "--columns prompt=NAME"),
    "two-prompts": (
        {"prompt": "q", "question": "r"},
        "two columns of one meaning",
        "prompt and question",
    ),
    "two-systems": (
        {"prompt": [sys("a"), usr("q")], "system": "b"},
        "two columns of one meaning",
        "system",
    ),
    "images": ({"prompt": "q", "images": ["a.png"]}, "not text", "'images' is not read"),
    "python-messages": (
        {"prompt": "[{'role': 'user', 'content': 'q'}]"},
        "broken JSON",
        "as Python writes them",
    ),
    "history-numbers": ({"prompt": "q", "history": [1]}, "mixed types", "history[0]"),
    "system-number": ({"prompt": "q", "system": 3}, "mixed types", "system is int"),
    "input-beside-messages": ({"prompt": [usr("q")], "input": "x"}, "mixed types", "input"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_columns_that_are_refused(form):
    columns, reason, detail = REFUSED[form]
    with pytest.raises(RowProblem) as problem:
        parse_row({**columns, **ANSWERS}, chat=True)
    assert problem.value.reason == reason and detail in problem.value.detail


def test_a_system_column_needs_a_chat_template():
    with pytest.raises(RowProblem, match=r"turns beside plain text.*--columns system="):
        parse_row({"prompt": "q", "system": "s", **ANSWERS}, chat=False)


def test_columns_are_renamed_and_left_out():
    row = {"body": "q", "context": "c", "good": "x", "bad": "y"}
    given = "prompt=body,context=,chosen=good,rejected=bad"
    read = parse_row(row, chat=True, columns=parse_columns(given))
    assert (read.prompt, read.chosen, read.rejected) == ([usr("q")], [bot("x")], [bot("y")])
    # a column that is named wins over another of the same meaning, which nobody reads then
    both = {"prompt": "p", "question": "q", **ANSWERS}
    assert parse_row(both, chat=True, columns={"prompt": "question"}).prompt == [usr("q")]
    with pytest.raises(RowProblem, match="unknown column 'question'"):
        parse_row(both, chat=True, columns={"prompt": "prompt"})
    with pytest.raises(RowProblem, match="no column 'nothing': the columns are body"):
        parse_row(row, chat=True, columns={"prompt": "nothing"})
    pairs, _ = load_pairs([row], CHAT, EncodeOptions(columns=given.split(",")))
    assert pairs[0].row == dataclasses.replace(read, where="row 0")


@pytest.mark.parametrize("given", ["prompt", "prompt=a,prompt=b", ["=a"], {"a": 3}])
def test_columns_that_cannot_be_named_so(given):
    with pytest.raises(ValueError, match="columns: expected"):
        EncodeOptions(columns=given)


def test_known_columns_are_passed_on():
    row = {"prompt": "q", "revision": "a text", **ANSWERS}
    pairs, _ = load_pairs([row], CHAT, known=("revision",))
    assert pairs[0].row.columns == {"revision": "a text"}


def test_crlf_dialogues():
    head = "\r\n\r\nHuman: hi\r\n\r\nAssistant:"
    row = {"chosen": f"{head} I think so too", "rejected": f"{head} I think not"}
    read = parse_row(row, chat=True)
    assert read.prompt == [usr("hi")] and read.chosen == [bot("I think so too")]


def test_one_rule_for_blanks():
    """Text and messages of the same words have the same tokens."""
    text = {"prompt": "q", "chosen": "  x\n", "rejected": "y"}
    messages = {"prompt": [usr("q")], "chosen": [bot("  x\n")], "rejected": [bot("y")]}
    pairs, _ = load_pairs([text, messages], CHAT)
    assert pairs[0].chosen_ids.tolist() == pairs[1].chosen_ids.tolist()


def test_nulls_of_arrow_go_and_those_that_were_written_stay(tmp_path):
    def rows():
        call = [{"function": {"name": "f", "arguments": {"city": "Oslo", "day": None}}}]
        other = [{"function": {"name": "f", "arguments": {"ticker": "X"}}}]
        return [
            {
                "prompt": [usr("q")],
                "chosen": [bot("", tool_calls=call)],
                "rejected": [bot("", tool_calls=other)],
            }
        ]

    def arguments(read):
        calls = [getattr(read, side)[0]["tool_calls"][0]["function"] for side in ANSWERS]
        return [call["arguments"] for call in calls]

    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TOOLS
    written = load_pairs(path, tokenizer)[0][0].row
    assert arguments(written) == [{"city": "Oslo", "day": None}, {"ticker": "X"}]
    # Arrow gives both calls all three keys
    arrow = load_pairs(datasets.Dataset.from_list(rows()), tokenizer)[0][0].row
    assert arguments(arrow) == [{"city": "Oslo"}, {"ticker": "X"}]
    # a pair that differs in a null that was written is no pair of equals
    (row,) = rows()
    row["rejected"] = [bot("", tool_calls=[{"function": {"name": "f", "arguments": {"day": 1}}}])]
    row["chosen"] = [bot("", tool_calls=[{"function": {"name": "f", "arguments": {}}}])]
    assert load_pairs([row], tokenizer)[1].kept == 1


TOOLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}"
    "{{ c.function.arguments | tojson }}</call>{% endfor %}",
)


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "frame"])
def test_formatted_datasets(kind):
    rows = [{"prompt": [usr("q")], "chosen": [bot("x")], "rejected": [bot("y")]}] * 2
    data = datasets.Dataset.from_list(rows)
    data = pandas.DataFrame(rows) if kind == "frame" else data.with_format(kind)
    pairs, report = load_pairs(data, CHAT)
    assert report.kept == 2 and pairs[0].row.prompt == [usr("q")]


# -- folders


def folder_of(tmp_path, *names):
    for i, name in enumerate(names):
        row = {"prompt": f"q{i}", "chosen": "x", "rejected": "y"}
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    return tmp_path


def prompts(folder, split):
    pairs, _ = load_pairs(folder, CHAT, split=split)
    return [pair.row.prompt[0]["content"] for pair in pairs]


def test_a_folder_has_the_splits_of_its_names(tmp_path):
    folder = folder_of(tmp_path, "train-00.jsonl", "train-01.jsonl", "test.jsonl", "a.val.jsonl")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".hidden.jsonl").write_text("no data")
    assert prompts(folder, "train") == ["q0", "q1"]
    assert prompts(folder, "test") == prompts(folder, "eval") == ["q2"]
    assert prompts(folder, "validation") == prompts(folder, "dev") == ["q3"]
    with pytest.raises(ValueError, match=r"got 'nonsense'; there are .*test: test\.jsonl"):
        prompts(folder, "nonsense")


def test_a_folder_without_splits_is_one(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "contest.jsonl")
    assert prompts(folder, "train") == ["q0", "q1"]
    with pytest.raises(ValueError, match=r"got 'test'; there are train: a\.jsonl, contest\.jsonl"):
        prompts(folder, "test")


def test_a_folder_of_which_some_have_no_split(tmp_path):
    folder = folder_of(tmp_path, "a.jsonl", "test.jsonl")
    with pytest.raises(ValueError, match=r"of no split: a\.jsonl"):
        prompts(folder, "train")
    assert prompts(folder, "test") == ["q1"]


def test_splits_of_several_kinds_are_not_mixed(tmp_path):
    folder = folder_of(tmp_path, "train_sft.jsonl", "train_prefs-0.jsonl", "train_prefs-1.jsonl")
    assert prompts(folder, "train_prefs") == ["q1", "q2"]
    for split in ("train", "my training set"):
        with pytest.raises(ValueError, match=r"train: train_prefs-0\.jsonl"):
            prompts(folder, split)


def test_what_is_no_file_is_refused(tmp_path):
    import os

    with pytest.raises(ValueError, match="expected a path or a name, got ''"):
        load_pairs("", CHAT)
    os.mkfifo(tmp_path / "a.jsonl")
    for source in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match=r"regular file|neither"):
            load_pairs(source, CHAT)


def test_a_line_that_is_no_row_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr("treg.data.reading.LONGEST_LINE", 200)
    row = json.dumps({"prompt": "q", "chosen": "x", "rejected": "y"})
    (tmp_path / "a.jsonl").write_text(f"{row}\n{'[' * 900}\n{row}\n{' ' * 200}\n{row}")
    pairs, report = load_pairs(tmp_path / "a.jsonl", CHAT)
    assert [pair.row.where[-2:] for pair in pairs] == [":1", ":3", ":5"]
    assert report.dropped == {"row too long": 2}


# -- what messages show


def test_text_from_data_is_shown_as_it_can_be():
    row = {"prompt": "q", "chosen": "x", "rejected": "y", "a\ud800\x1b[31m": "text"}
    _, report = load_pairs([row, {"prompt": "q", **ANSWERS}], CHAT)
    text = str(report)
    assert text.encode() and "\x1b" not in text and "\\ud800\\x1b" in text


def test_rows_are_counted_as_they_are_read(monkeypatch):
    monkeypatch.setattr(sys_modules["treg.data.encode"], "ROWS_TOGETHER", 2)
    told = []
    row = {"prompt": "q", **ANSWERS}
    load_pairs([row, {}, row, row, row], CHAT, on_rows=told.append)
    assert told == [2, 2, 1]


@pytest.mark.parametrize("prompt", ["", "r"])
def test_dialogues_bring_their_prompt(prompt):
    """Also beside an empty prompt, and beside one that is their last question."""
    before = [sys("s"), usr("q"), bot("a"), usr("r")]
    row = {"prompt": prompt, "chosen": [*before, bot("x")], "rejected": [*before, bot("y")]}
    read = parse_row(row, chat=True)
    assert (read.prompt, read.chosen, read.rejected) == (before, [bot("x")], [bot("y")])


KEYS = ({"id": 1}, {"message_id": "a", "timestamp": "now"}, {"weight": 0, "train": False})


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("form", ["dialogues", "with prompt", "last question"])
def test_what_is_about_a_message_makes_no_other_prompt(form, keys):
    """Such as its id: templates do not read it."""
    before = [usr("a"), bot("b"), usr("q")]
    other = [message | keys for message in before]
    row = {"chosen": [*before, bot("x")], "rejected": [*other, bot("y", **keys)]}
    if form != "dialogues":
        row["prompt"] = other if form == "with prompt" else other[-1:]
    read = parse_row(row, chat=True)
    assert [(x["role"], x["content"]) for x in read.prompt] == [
        ("user", "a"),
        ("assistant", "b"),
        ("user", "q"),
    ]
    assert read.chosen[0]["content"] == "x" and read.rejected[0]["content"] == "y"
    row["rejected"][-1]["content"] = "x"
    with pytest.raises(RowProblem, match="identical completions"):
        parse_row(row, chat=True)


@pytest.mark.parametrize("keys", [{"name": "Ann"}, {"tool_call_id": "a"}, {"content": "c"}])
def test_what_a_template_may_read_makes_another_prompt(keys):
    row = {"chosen": [usr("q"), bot("x")], "rejected": [usr("q") | keys, bot("y")]}
    with pytest.raises(RowProblem, match="prompts differ"):
        parse_row(row, chat=True)


def test_a_conversation_of_exchanges_that_repeats_an_answer_is_a_copy():
    dialogues = {side: [usr("q"), bot(x)] for side, x in ANSWERS.items()}
    row = {"prompt": "q", **dialogues, "conversation": [{"input": "q", "output": "the moon"}]}
    assert parse_row(row, chat=True).prompt == [usr("q")]
    row["conversation"][0]["output"] = "the wood"
    with pytest.raises(RowProblem, match="two columns of one meaning"):
        parse_row(row, chat=True)
