"""Marks of people: which tokens a span of characters reaches, in every form in which it comes."""

import json

import numpy as np
import pytest
import torch
from tiny import shared_data, tiny_llama, tiny_tokenizer, wrapped
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.annotated import read_annotated
from treg.rewards import Context, load_source, make_options
from treg.rewards.annotate import AnnotateOptions, annotate, annotate_pairs
from treg.rewards.response import ResponsePairs

CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat=False)
MODEL = tiny_llama(len(CHAT))
TEXT = "the old owl said: it is 42."


def responses(row, tokenizer=CHAT, max_length=256):
    row = {"prompt": "the fox?", "chosen": TEXT, "rejected": "was", "rejected_spans": []} | row
    pairs, _ = load_pairs([row], tokenizer, EncodeOptions(max_length))
    return ResponsePairs(pairs, tokenizer)[0]


def make(**options):
    return load_source("spans", options, Context(MODEL, CHAT))


def marked(spans, text=TEXT, tokenizer=CHAT, max_length=256, **options):
    """The chosen response and its token rewards."""
    row = {"chosen": text, "chosen_spans": spans}
    chosen, _ = responses(row, tokenizer, max_length)
    source = make(**options)
    assert source.check(chosen) is None
    (found,) = source.score([chosen])
    return chosen, found["token_rewards"]


def said(response, rewards, value):
    """The text of the tokens that have a value."""
    at = torch.nonzero(rewards == value)[:, 0].tolist()
    return response.tokenizer.decode(response.ids[at])


FORMS = {
    "pair": [[4, 7]],
    "tuple": [(4, 7)],
    "number": [[4, 7, -0.5]],
    "label": [[4, 7, "wrong"]],
    "object": [{"start": 4, "end": 7, "text": "old"}],
    "object with a number": [{"start": 4, "end": 7, "value": -0.5, "label": None}],
    "object with a severity": [{"start": 4, "end": 7, "severity": "wrong"}],
    "FineGrainedRLHF": [{"error type": "wrong", "explanation": "", "start": 4, "end": 7}],
    "JSON": '[[4, 7, "wrong"]]',
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form(form):
    for options in ({}, {"inside": -9.0, "values": ["other=1", "wrong=-0.5"]}):
        labelled = "wrong" in str(FORMS[form])
        if options and not labelled:
            options = {"values": ["other=1"]}
        if labelled and not options:
            options = {"values": ["other=1", "*=-0.5"]}
        response, found = marked(FORMS[form], **options)
        assert said(response, found, -0.5).strip() == "old"
        assert (found != 0).sum() == (found == -0.5).sum() > 0


def test_by_hand():
    """the| old| owl| said|:| it| is| 42|. are tokens here, or more of them: each has the value of
    what it overlaps.
    """
    spans = [[0, 5, 0.25], [8, 11, -1.0], [9, 16, 1.0], [18, 20, 0.5], [19, 20, -0.5]]
    response, found = marked(spans, outside=0.125)
    # -1 and 1 both reach " owl", 0.5 and -0.5 both reach " it": the lower counts
    want = {0.25: "the old", -1.0: " owl", 1.0: " said", -0.5: " it", 0.125: ": is 42."}
    for value, text in want.items():
        assert said(response, found, value) == text
    assert not found[response.content :].any()


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_characters_of_several_tokens(tokenizer):
    text = "a 🦊東 x"
    response, found = marked([[2, 3]], text, tokenizer)
    at = torch.nonzero(found)[:, 0].tolist()
    assert len(at) > 1 and tokenizer.decode(response.ids[at]).strip() == "🦊"


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_blanks_around_the_answer_count_as_the_row_has_them(tokenizer):
    """They are the answer's, with a chat template and without."""
    text = "  the old owl \n"
    response, found = marked([[6, 9, 1.0], [13, 15, 2.0]], text, tokenizer)
    assert said(response, found, 1.0).strip() == "old"
    assert bool((found == 2.0).any())
    beyond = responses({"chosen": text, "chosen_spans": [[6, 17]]}, tokenizer)[0]
    assert "start < end <= 15" in make().check(beyond).detail  # the row's text has 15 characters


def test_answers_that_are_cut_keep_their_places():
    spans = [[4, 7, 1.0], [24, 26, 2.0]]
    whole, of_whole = marked(spans)
    assert said(whole, of_whole, 2.0).strip() == "42"
    length = len(whole.prompt_ids) + whole.content - 4
    cut, found = marked(spans, max_length=length)
    assert len(cut.ids) == whole.content - 4 and found.tolist() == of_whole[: len(cut.ids)].tolist()
    assert (found == 1.0).any() and not (found == 2.0).any()


def test_an_answer_of_several_messages_that_is_not_cut_though_its_pair_is():
    turns = [{"role": "assistant", "content": x} for x in ("the owl", "is old")]
    row = {
        "prompt": [{"role": "user", "content": "the fox?"}],
        "chosen": turns,
        "rejected": [{"role": "assistant", "content": "was " * 60}],
        "chosen_spans": [[8, 10]],  # "is": a newline joins the two
    }
    chosen, rejected = responses(row, max_length=60)
    assert len(rejected.ids) + len(rejected.prompt_ids) == 60
    (found,) = make().score([chosen])
    assert said(chosen, found["token_rewards"], -0.5) == "is"
    # cut in the middle of its own messages it is refused
    row["chosen"] = [{"role": "assistant", "content": x} for x in ("the owl", "is old " * 60)]
    problem = make().check(responses(row, max_length=60)[0])
    assert problem.reason == "spans cannot be placed"


PROBLEMS = {
    "missing": ({}, "no column 'chosen_spans'", "the other columns are rejected_spans"),
    "null": ({"chosen_spans": None}, "no column 'chosen_spans'", "the other columns are"),
    "json": ({"chosen_spans": "[[1, 2"}, "broken JSON", "chosen_spans: "),
    "text": (
        {"chosen_spans": '"a"'},
        "no spans",
        "chosen_spans: expected a list of spans, got str",
    ),
    "number": ({"chosen_spans": 3}, "no spans", "got int"),
    "beyond": (
        {"chosen_spans": [[0, 28]]},
        "bad span",
        "chosen_spans[0]: expected whole numbers 0 <= start < end <= 27, got [0, 28]",
    ),
    "negative": ({"chosen_spans": [[-1, 2]]}, "bad span", "got [-1, 2]"),
    "reversed": ({"chosen_spans": [[0, 1], [5, 4]]}, "bad span", "chosen_spans[1]: "),
    "empty": ({"chosen_spans": [[5, 5]]}, "bad span", "start < end"),
    "float": ({"chosen_spans": [[1.0, 2]]}, "bad span", "whole numbers"),
    "bool": ({"chosen_spans": [[False, 2]]}, "bad span", "whole numbers"),
    "flat": ({"chosen_spans": [1, 2]}, "bad span", "expected [start, end], [start, end, value] or"),
    "four": ({"chosen_spans": [[1, 2, 3, 4]]}, "bad span", "expected [start, end], [start, end, v"),
    "none": ({"chosen_spans": [[1, 2, None]]}, "bad span", "expected a number or a label"),
    "nan": (
        {"chosen_spans": [[1, 2, float("nan")]]},
        "bad span",
        "expected a finite number as its",
    ),
    "no end": ({"chosen_spans": [{"start": 1}]}, "bad span", "whole numbers"),
    "two labels": (
        {"chosen_spans": [{"start": 1, "end": 2, "label": "a", "type": "b"}]},
        "bad span",
        "expected one label, found label, type",
    ),
    "label": (
        {"chosen_spans": [[1, 2, "ok"], [1, 2, "no"]]},
        "unknown label",
        "chosen_spans[1]: expected one of ok as its label; add no=NUMBER, or '*=NUMBER' for all "
        "others, to --rewards.values, got [1, 2, 'no']",
    ),
    "severity": (
        {"chosen_spans": [{"start": 1, "end": 2, "severity": 3}]},
        "bad span",
        "expected text as its label",
    ),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_what_is_no_span_is_refused(case):
    row, reason, detail = PROBLEMS[case]
    problem = make(values=["ok=1"]).check(responses(row)[0])
    assert isinstance(problem, RowProblem) and problem.where == "row 0"
    assert problem.reason == reason and detail in problem.detail, problem.detail


def test_a_label_is_not_passed_over():
    problem = make().check(responses({"chosen_spans": [[1, 2, "bad"]]})[0])
    assert problem.reason == "unknown label" and "expected one of none as" in problem.detail
    response, found = marked([[0, 3, "a"], [4, 7, "b"]], values=["a=2", "*=0"])
    assert said(response, found, 2.0).strip() == "the" and (found != 0).sum() == (found == 2).sum()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "spans"}, "column: expected a name with {side} in it, got 'spans'"),
        ({"values": ["a"]}, "values: expected LABEL=NUMBER, got 'a'"),
        ({"values": ["a=b"]}, "values: expected LABEL=NUMBER, got 'a=b'"),
        ({"values": ["a=inf"]}, "values: expected LABEL=NUMBER, got 'a=inf'"),
        ({"inside": float("nan")}, "inside: expected a finite number"),
        ({"outside": float("nan")}, "outside: expected a finite number"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_options("spans", options)


def test_other_marks_make_another_file(tmp_path):
    row = {"prompt": "the fox?", "chosen": TEXT, "rejected": "was", "rejected_spans": []}
    options = AnnotateOptions(rewards="spans", rewards_options={"values": ["bad=-1"]})

    def run(spans):
        rows = [row | {"chosen_spans": spans}]
        annotate(MODEL, CHAT, rows, tmp_path / "a.parquet", options, progress=False)

    run([[4, 7, "bad"]])
    run([[4, 7, "bad"]])
    (example,), meta = read_annotated(tmp_path / "a.parquet")
    assert example["chosen_token_rewards"].min() == -1.0
    assert meta["streams"]["token_rewards"]["settings"]["values"] == {"bad": -1.0}
    with pytest.raises(ValueError, match=r"a\.parquet: made with token_rewards .*, now it is"):
        run([[4, 8, "bad"]])


def test_marks_of_fine_grained_rlhf():
    """Every answer of a real file, against the characters of each token."""
    path = shared_data("credit", "finegrained-rlhf", "dev_feedback.json")
    values = {"Irrelevant": -0.25, "Wrong-Grounding": -1.0, "Unverifiable": -0.5}
    values |= {"Redundant": -0.125, "Incoherent": -0.75}
    rows = [
        {
            "prompt": x["question"],
            "chosen": x["feedback"]["corrected-prediction"],
            "rejected": x["prediction 1"],
            "chosen_spans": [],
            "rejected_spans": x["feedback"]["errors"],
        }
        for x in json.loads(path.read_text())[:60]
    ]
    pairs, _ = load_pairs(rows, CHAT, EncodeOptions(None))
    source = make(values=[f"{label}={value}" for label, value in values.items()])
    found, problems = annotate_pairs(source, Context(MODEL, CHAT), pairs, reference=False)
    assert not problems and len(found) == len(pairs) > 40
    for row in found:
        text = rows[row["index"]]["rejected"]
        of_character = np.zeros(len(text))
        for span in rows[row["index"]]["rejected_spans"]:
            part = of_character[span["start"] : span["end"]]
            part[:] = np.minimum(part, values[span["error type"]])
        start, want = 0, []
        for token in row["rejected_ids"].tolist():
            piece = CHAT.decode([token])
            if piece.startswith("<|") or start >= len(text):
                want.append(0.0)
                continue
            assert "\ufffd" in piece or text.startswith(piece, start)
            length = len(piece) if "\ufffd" not in piece else 0
            want.append(of_character[start : start + max(length, 1)].min())
            start += length
            if (
                not length
                and CHAT.decode(row["rejected_ids"][: len(want)].tolist())[-1] != "\ufffd"
            ):
                start += 1  # the token that completes a character
        np.testing.assert_array_equal(row["rejected_token_rewards"], np.array(want, np.float32))
        assert not row["chosen_token_rewards"].any()


def test_a_token_of_a_blank_and_the_first_byte_of_a_character():
    """Tokenizers have such tokens: it holds a part of the character, which counts whole."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, "Ġð", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    bpe = Tokenizer(models.BPE({x: i for i, x in enumerate(vocabulary)}, [("Ġ", "ð")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = wrapped(bpe)
    response, found = marked([[2, 3]], "a 🦊 x", tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(response.ids.tolist())
    assert tokens[:4] == ["a", "Ġð", *tokens[2:4]] and tokens[5:7] == ["Ġ", "x"]
    assert torch.nonzero(found)[:, 0].tolist() == [1, 2, 3, 4]
