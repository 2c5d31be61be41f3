"""Readers of formats that others made: offsets against the marked text, or by hand."""

import gzip
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
from tiny import shared_data, tiny_tokenizer, usr
from token_bytes import characters_held
from transformers import GPT2Tokenizer

from treg.data import EncodeOptions, RowProblem
from treg.evaluate.documents import Mark
from treg.evaluate.place import responses, token_marks
from treg.evaluate.readers import read_marked
from treg.evaluate.readers.pairs import different_words
from treg.evaluate.readers.tags import TagsOptions, untagged


def read(rows, form, **options):
    found, _ = read_marked(rows, form, options, strict=True)
    return found


def marked(answer):
    return [answer.answer[x.start : x.end] for x in answer.marks]


# -- FineGrainedRLHF

FINE = {
    "question": "who?",
    "passages": [["Fox", "It is red.", "It runs."], ["Owl", "Old."]],
    "prediction 1": "the old owl",
    "prediction 2": "the fox",
    "prediction 3": " the old owl ",
    "prediction 4": "nobody",
    "feedback": {"errors": [{"error type": "Irrelevant", "start": 4, "end": 7}]},
    "preference": [2, 1, 1, 0, 1, 2],
}


def test_a_row_of_feedback_by_hand():
    first, second = read([FINE], "finegrained")
    assert first.prompt == ("Fox\nIt is red. It runs.\n\nOwl\nOld.\n\nQuestion: who?\nAnswer:\n")
    assert first.marks == (Mark(4, 7, "Irrelevant"),) and first.judged
    assert second.answer == "the fox" and not second.judged and second.preferred
    assert first.pair == second.pair and first.preferred is False
    assert first.document == second.document == first.where


def test_comparisons_of_feedback():
    """All that are strict: the third prediction is the first one but for blanks."""
    found = read([FINE], "finegrained", pairs="all")
    assert [(x.answer, x.judged, x.preferred) for x in found] == [
        ("the old owl", True, False),
        ("the fox", False, True),
        ("the old owl", False, True),
        ("nobody", False, False),
    ]
    assert [x.pair for x in found] == ["row 0 1:2", "row 0 1:2", "row 0 1:4", "row 0 1:4"]
    (alone,) = read([FINE], "finegrained", pairs="none")
    assert alone.pair is None and alone.preferred is None
    (alone,) = read([FINE | {"preference": [0] * 6}], "finegrained")
    assert alone.pair is None


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"feedback": {}}, "no feedback: expected feedback.errors"),
        ({"feedback": {"errors": [{"start": 4, "end": 70}]}}, r"bad span: feedback.errors\[0\]"),
        ({"prediction 1": ""}, "empty text: prediction 1"),
        ({"passages": "x"}, "no passages: expected a list"),
        ({"passages": [[]]}, r"passages\[0\]: expected \[title"),
        ({"preference": [3, 0, 0]}, "no preference: expected 0, 1 or 2, got 3"),
        ({"preference": "1"}, "expected a list of 6 numbers"),
        ({"question": None}, "no column 'question'"),
    ],
)
def test_feedback_that_is_refused(more, match):
    with pytest.raises(RowProblem, match=match):
        read([FINE | more], "finegrained")


def test_all_real_feedback():
    """Every span comes through, and every token that it marks holds some of its text."""
    file = shared_data("credit", "finegrained-rlhf", "dev_feedback.json")
    rows = json.loads(file.read_text())
    found, report = read_marked(file, "finegrained", {"pairs": "none"}, strict=True)
    assert report.kept == 500 and sum(len(x.marks) for x in found) == 1373
    labels = Counter(mark.label for x in found for mark in x.marks)
    assert labels["Irrelevant"] == 909 and labels["Wrong-Grounding"] == 163
    for answer, row in zip(found, rows, strict=True):
        wanted = [row["prediction 1"][x["start"] : x["end"]] for x in row["feedback"]["errors"]]
        assert marked(answer) == wanted
    paired, _ = read_marked(file, "finegrained", {"pairs": "all"}, strict=True)
    pairs = Counter(x.pair for x in paired if x.pair)
    assert set(pairs.values()) == {2}
    some = found[:40]
    tokenizer = GPT2Tokenizer.from_pretrained(shared_data("tok", "gpt2"))
    for answer, response in zip(some, responses(some, tokenizer, EncodeOptions(4096)), strict=True):
        inside = {i for mark in answer.marks for i in range(mark.start, mark.end)}
        held = characters_held(response, answer.answer)
        assert token_marks(response, answer).wrong.tolist() == [bool(x & inside) for x in held]


# -- tags

TAGGED = {
    "plain": ("a <err>b c</err> d", "a b c d", [Mark(2, 5)]),
    "two": ("<err>a</err> <err>b</err>", "a b", [Mark(0, 1), Mark(2, 3)]),
    "beside": ("<err>a</err><err>b</err>", "ab", [Mark(0, 1), Mark(1, 2)]),
    "label": ('x<err type="fact">🦊</err>y', "x🦊y", [Mark(1, 2, "fact")]),
    "quotes": ("<err id='3' type='a > b'>x</err>", "x", [Mark(0, 1, "a > b")]),
    "entities": ("a &lt;b&gt; <err>&amp;</err>", "a &lt;b&gt; &amp;", [Mark(12, 17)]),
    "other tags": ("<b>a</b> 1 < 2 <error>x</error>", "<b>a</b> 1 < 2 <error>x</error>", []),
    "lines": ("a\r\n<err>b\nc</err>", "a\r\nb\nc", [Mark(3, 6)]),
    "right": ("<ok>a</ok> <err>b</err>", "a b", [Mark(0, 1, wrong=False), Mark(2, 3)]),
    "blanks": ("<err >a</err >", "a", [Mark(0, 1)]),
}
TAGS = TagsOptions(right_tags=["ok"])


@pytest.mark.parametrize("case", TAGGED)
def test_tags_by_hand(case):
    given, text, marks = TAGGED[case]
    assert untagged(given, TAGS) == (text, marks, 0)


def test_tags_that_close_themselves_are_around_nothing():
    assert untagged('a<err/> <err type="x"/>b<err id="/" />', TAGS) == ("a b", [], 3)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a <err>b <err>c</err></err>", "nested tags: answer: <err> within <err> at character 9"),
        ("a <err>b <ok>c</ok></err>", "nested tags: answer: <ok> within <err>"),
        ("a <err>b", "unclosed tag: answer: <err> is not closed"),
        ("a </err>b", "unopened tag: answer: </err> closes no tag at character 2"),
        ("<err>a</ok></err>", "unopened tag"),
        ("<err type=fact>a</err>", "bad tag: .*attributes written name=.value."),
        ("<err></err>", "empty answer"),
    ],
)
def test_tags_that_are_refused(text, match):
    with pytest.raises(RowProblem, match=match):
        read([{"answer": text}], "tags", right_tags=["ok"])


def test_rows_of_tags():
    row = {"prompt": "q", "answer": 'a <x kind="k">b</x><x></x> <err>c</err>', "id": 3}
    rows, options = [row], {"tags": ["x"], "attribute": "kind"}
    (answer,), report = read_marked(rows, "tags", options)
    assert answer.answer == "a b <err>c</err>" and answer.marks == (Mark(2, 3, "k"),)
    assert report.noted == {"a mark of nothing": 1} and answer.document == "#3"
    pair = {"prompt": [usr("q")], "chosen": "fine", "rejected": "<err>bad</err>"}
    chosen, rejected = read([pair], "tags")
    assert rejected.marks == (Mark(0, 3),) and rejected.side == "rejected" and chosen.preferred
    for tags in ([], ["<err>"], ["a", "a"]):
        with pytest.raises(ValueError, match=r"format.tags: expected names without brackets"):
            read_marked(rows, "tags", {"tags": tags})


# -- steps

STEPS = {"id": "gsm8k-0", "generator": "m", "problem": "1+1?", "final_answer_correct": False}


def test_the_first_wrong_step():
    """Steps before it are right; those after it, and the blanks between, are judged by nobody."""
    row = STEPS | {"steps": ["one", "two two", "three"], "label": 1}
    (answer,) = read([row], "steps")
    assert answer.prompt == "1+1?" and answer.answer == "one\n\ntwo two\n\nthree"
    assert answer.steps == ((0, 3), (5, 12), (14, 19)) and answer.first_wrong == 1
    assert answer.marks == (Mark(0, 3, wrong=False), Mark(5, 12))
    assert answer.unjudged == ((12, 19),) and answer.document == "#gsm8k-0"
    (answer,) = read([row | {"label": -1}], "steps", separator=" ")
    assert answer.first_wrong is None and len(answer.marks) == 3 and not answer.unjudged
    assert answer.answer == "one two two three" and answer.steps[2] == (12, 17)


RATED = {
    "numbers": {"steps": ["a", "b", "c", "d"], "ratings": [1, 0, -1, None]},
    "objects": {
        "steps": [{"text": x, "rating": y} for x, y in (("a", 1), ("b", 0), ("c", -1), ("d", None))]
    },
    "labels": {"steps": ["a", "b", "c", "d"], "labels": [1.0, 0.0, -1.0, None]},
    "PRM800K": {
        "question": {"problem": "1+1?", "ground_truth_answer": "2"},
        "label": {
            "steps": [
                {
                    "completions": [{"text": "z", "rating": -1}, {"text": "a", "rating": 1}],
                    "human_completion": None,
                    "chosen_completion": 1,
                },
                {"completions": [{"text": "b", "rating": 0}], "chosen_completion": 0},
                {"completions": [{"text": "c", "rating": -1}], "chosen_completion": None},
                {"completions": [{"text": "d", "rating": None}], "chosen_completion": 0},
            ]
        },
    },
}


@pytest.mark.parametrize("form", RATED)
def test_ratings_of_steps(form):
    row = {"problem": "1+1?"} | RATED[form] if form != "PRM800K" else RATED[form]
    (answer,) = read([row], "steps")
    assert answer.prompt == "1+1?" and answer.answer == "a\n\nb\n\nc\n\nd"
    assert answer.marks == (Mark(0, 1, wrong=False), Mark(6, 7))
    assert answer.first_wrong == 2 and answer.unjudged == ((7, 10),)


def test_a_step_that_a_person_wrote():
    step = {
        "completions": [{"text": "z", "rating": -1}],
        "human_completion": {"text": "h", "rating": None},
        "chosen_completion": None,
    }
    (answer,) = read([{"question": {"problem": "q"}, "label": {"steps": [step]}}], "steps")
    assert answer.answer == "h" and answer.marks == (Mark(0, 1, wrong=False),)


def test_other_scales():
    for ratings in ([True, False], ["+", "-"]):
        (answer,) = read([{"problem": "q", "steps": ["a", "b"], "ratings": ratings}], "steps")
        assert answer.first_wrong == 1 and answer.marks[0].wrong is False
    for ratings in ([1, 0], [1.0, 0.0], [1, 0.0, None]):
        rows = [{"problem": "q", "steps": ["a", "b", "c"][: len(ratings)], "ratings": ratings}]
        (answer,) = read(rows, "steps", threshold=0.5)
        assert answer.first_wrong == 1
        with pytest.raises(ValueError, match=r"set threshold to 0.5"):
            read(rows, "steps")
    with pytest.raises(ValueError, match=r"format.threshold: expected a finite number"):
        read(rows, "steps", threshold=float("nan"))


def test_objects_without_ratings_have_the_label_of_their_row():
    row = {"problem": "q", "steps": [{"text": "a"}, {"text": "b"}], "label": 1}
    (answer,) = read([row], "steps")
    assert answer.first_wrong == 1 and answer.marks == (Mark(0, 1, wrong=False), Mark(3, 4))


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"label": 3}, r"no label: label: expected .* from 0 to 1, or -1 .*got 3"),
        ({"label": None}, "no label"),
        ({"label": True}, "no label"),
        ({"steps": []}, "no steps: steps: expected a list of texts"),
        ({"steps": ["a", None]}, r"steps\[1\]: expected text, got None"),
        ({"steps": ["a", " "]}, r"empty text: steps\[1\]"),
        ({"ratings": [1]}, "expected one for each of the 2 steps"),
        ({"ratings": [1, "good"]}, "step 1: expected a number, True or False"),
        ({"ratings": [1, [0]]}, "step 1: expected a number, True or False"),
        ({"problem": None, "question": "q", "query": "r"}, "two columns of one meaning"),
    ],
)
def test_steps_that_are_refused(more, match):
    with pytest.raises(RowProblem, match=match):
        read([STEPS | {"steps": ["a", "b"], "label": 0} | more], "steps")


def test_steps_become_tokens():
    steps = ["the old owl.", "it is 42.", "the fox."]
    tokenizer = tiny_tokenizer()
    (answer,) = read([{"problem": "q", "steps": steps, "label": 1}], "steps")
    (response,) = responses([answer], tokenizer)
    found = token_marks(response, answer)
    for number, step in enumerate(steps):
        assert tokenizer.decode(response.ids[found.steps == number]).strip() == step
    assert not found.judged[found.steps == 2].any() and found.content[found.steps == 2].all()
    # blanks after the first wrong step are no tokens that somebody found right
    last = np.flatnonzero(found.steps == 1)[-1]
    assert not found.judged[last + 1 :].any() and found.judged[: last + 1].sum() > 2


# -- minimal pairs

WORDS = {
    "replaced": ("The cats run.", "The cats runs.", ["run"], ["runs"]),
    "inserted": ("She will go.", "She will go with.", [], ["with"]),
    "left out": ("He did not go home.", "He did go home.", ["not"], ["go"]),
    "left out at the end": ("He put it there.", "He put it.", ["there"], ["it"]),
    "moved": ("a b c", "b a c", None, None),
    "apostrophe": ("They don't know.", "They doesn't know.", ["don't"], ["doesn't"]),
    "punctuation": ("Is it?", "Is it!", ["?"], ["!"]),
    "accents": ("cafe\u0301 ici", "cafe ici", ["cafe\u0301"], ["cafe"]),
    "vowel signs": ("वह पढ़ता है", "वह पढ़ती है", ["पढ़ता"], ["पढ़ती"]),
    "slash": ("x and/or y", "x and/nor y", ["or"], ["nor"]),
}


@pytest.mark.parametrize("case", WORDS)
def test_words_that_differ(case):
    good, bad, right, wrong = WORDS[case]
    found = different_words(good, bad)
    if right is None:
        assert [len(x) for x in found] == [1, 1]
        return
    assert [good[a:b] for a, b in found[0]] == right
    assert [bad[a:b] for a, b in found[1]] == wrong


def test_a_row_of_a_pair():
    row = {"sentence_good": "The cats run.", "sentence_bad": "The cats runs.", "UID": "u"}
    good, bad = read([row], "pairs")
    assert good.marks == (Mark(9, 12, "u", wrong=False),) and bad.marks == (Mark(9, 13, "u"),)
    assert good.preferred and not bad.preferred and good.pair == bad.pair
    assert good.prompt == "" and good.document == bad.document
    other = {"a": "The cats run.", "b": "The cats runs.", "prompt": [usr("q")], "kind": 3}
    good, _ = read([other], "pairs", good="a", bad="b", label="kind")
    assert good.prompt == [usr("q")] and good.marks[0].label == "3"
    for more, match in (
        ({"sentence_bad": "The cats run."}, "identical sentences"),
        ({"sentence_bad": "The  cats run."}, "same words: .* in blanks alone"),
        ({"sentence_bad": None}, "no column 'sentence_bad'"),
        ({"sentence_bad": ["x"]}, "mixed types: sentence_bad: expected text"),
    ):
        with pytest.raises(RowProblem, match=match):
            read([row | more], "pairs")


def test_folders_and_zip_files_of_pairs(tmp_path):
    row = {"sentence_good": "The cats run.", "sentence_bad": "The cats runs."}
    for name in ("b_test", "a_train"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row | {"UID": name}) + "\n")
    packed = tmp_path / "all.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("b_test", "a_train"):
            file.write(tmp_path / f"{name}.jsonl", f"data/{name}.jsonl")
        file.writestr("data/README.md", "x")
    for source in (tmp_path, packed):
        found = read(source, "pairs")
        assert [x.marks[0].label for x in found[::2]] == ["a_train", "b_test"]
        assert [x.index for x in found] == [0, 0, 1, 1]
    assert found[2].where.removeprefix(str(packed)) == "/".join(["", "data", "b_test.jsonl:1"])
    broken = tmp_path / "broken.zip"
    broken.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="expected a zip file"):
        read(broken, "pairs")
    with zipfile.ZipFile(broken, "w") as file:
        file.writestr("a.txt", "x")
    with pytest.raises(ValueError, match="expected files ending in"):
        read(broken, "pairs")


def test_all_real_minimal_pairs():
    """Of each paradigm the marked words, against those that BLiMP names where it does."""
    file = shared_data("credit", "BLiMP.zip")
    found, report = read_marked(file, "pairs", limit=3000)
    assert report.kept + report.dropped.get("identical sentences", 0) == 3000
    named = 0
    for bad in found[1::2]:
        assert bad.marks and all(mark.wrong for mark in bad.marks)
        if bad.row["one_prefix_method"]:
            start = len(bad.row["one_prefix_prefix"]) + 1
            assert bad.answer[start:].startswith(bad.row["one_prefix_word_bad"])
            assert bad.marks[0].start == start, bad
            named += 1
    assert named > 500


@pytest.mark.slow
def test_every_paradigm_of_minimal_pairs():
    found, report = read_marked(shared_data("credit", "BLiMP.zip"), "pairs")
    assert report.seen == 67_000 and report.dropped == {"identical sentences": 7}
    assert len({mark.label for x in found for mark in x.marks}) == 67


# -- MQM

HEAD = "system\tdoc\tdoc_id\tseg_id\trater\tsource\ttarget\tcategory\tseverity"
LINES = [
    "A\td1\t1\t1\tr1\tEin Haus\tA <v>mouse</v> here\tAccuracy/Mistranslation\tMajor",
    "A\td1\t1\t1\tr1\tEin Haus\tA mouse <v>here</v>\tFluency/Style\tMinor",
    "A\td1\t1\t1\tr2\tEin Haus\tA <v>mouse here</v>\tAccuracy/Addition\tNeutral",
    "B\td1\t1\t1\tr1\tEin <v>Haus</v>\tAn\tAccuracy/Omission\tMajor",
    "B\td1\t2\t2\tr1\tGut\tGood\tNo-error\tNo-error",
]


def mqm(tmp_path, lines=LINES, head=HEAD, ending="\n", name="a.tsv"):
    file = tmp_path / name
    content = ending.join([head, *lines, ""]).encode()
    file.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return file


def test_lines_of_a_translation_are_one_answer(tmp_path):
    file = mqm(tmp_path)
    (first, second, third), report = read_marked(file, "mqm", {})
    assert first.answer == "A mouse here" and first.prompt == "Translate:\nEin Haus\n"
    assert first.marks == (
        Mark(2, 7, "Major/Accuracy/Mistranslation"),
        Mark(8, 12, "Minor/Fluency/Style"),
    )
    assert first.unjudged == ((2, 12),)  # a neutral mark: neither
    assert second.prompt == "Translate:\nEin Haus\n" and not second.marks
    assert third.answer == "Good" and not third.marks and third.judged
    assert report.noted == {"an error without marked characters": 1}
    assert first.document == second.document != third.document
    assert first.where == f"{file}:2" and third.index == 2
    by_doc = read(file, "mqm", document="doc", prompt="{source} = ")
    assert len({x.document for x in by_doc}) == 1 and by_doc[2].prompt == "Gut = "


def test_raters_and_severities(tmp_path):
    file = mqm(tmp_path)
    found, report = read_marked(file, "mqm", {"rater": "r2", "severities": ["neutral"]})
    assert [x.marks for x in found] == [(Mark(2, 12, "Neutral/Accuracy/Addition"),)]
    assert report.dropped == {"another rater": 2}
    (first, *_), _ = read_marked(file, "mqm", {"right": ["Minor/Fluency/Style"]})
    assert [x.wrong for x in first.marks] == [True, False]


def test_files_of_mqm_as_people_have_them(tmp_path):
    wanted = [x.marks for x in read(mqm(tmp_path), "mqm")]
    newer = HEAD.replace("doc_id\tseg_id", "docSegId\tglobalSegId")
    for file in (
        mqm(tmp_path, ending="\r\n", name="crlf.tsv"),
        mqm(tmp_path, name="z.tsv.gz"),
        mqm(tmp_path, head="\ufeff" + newer, name="bom.tsv"),
    ):
        assert [x.marks for x in read(file, "mqm")] == wanted
    quoted = mqm(tmp_path, ['A\td\t1\t1\tr\ts\t"a <v>b"</v> c\tx\tMajor'], name="quotes.tsv")
    assert marked(read(quoted, "mqm")[0]) == ['b"']


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("A\td\t1\t1\tr\ts\tt\tx", "number of columns: expected 9, .*got 8"),
        (LINES[0].replace("mouse", "cat"), "texts differ: .*'A mouse here' in line 3"),
        (LINES[1].replace("</v>", ""), "unclosed tag"),
        (LINES[1].replace("<v>here", "<v>a<v>here"), "nested tags"),
    ],
)
def test_lines_that_are_refused(tmp_path, line, match):
    with pytest.raises(RowProblem, match=match):
        read(mqm(tmp_path, [line, LINES[1], *LINES[4:]]), "mqm")


def test_what_is_no_file_of_mqm(tmp_path):
    with pytest.raises(ValueError, match=r"found none of the name rater.* seg_id or globalSegId"):
        read(mqm(tmp_path, head="system\tdoc\tsource"), "mqm")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.tsv", "mqm")
    with pytest.raises(TypeError, match="expected the path of a file"):
        read([{"system": "A"}], "mqm")
    for options in ({"prompt": "x"}, {"document": "line"}):
        with pytest.raises(ValueError, match="expected"):
            read_marked("x.tsv", "mqm", options)
