"""Answers through sources, an annotated file and baselines: their numbers, and who is refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("pyarrow")

from tiny import tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import read_annotated
from treg.evaluate.columns import (
    BaselineColumns,
    FileColumns,
    SourceColumns,
    with_own_names,
)
from treg.evaluate.documents import MarkedAnswer
from treg.evaluate.scoring import MOST_ANSWERS, Placed, cut, progress, score_answers
from treg.rewards import Context, NoReference, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.response import ResponsePairs
from treg.rewards.shaping import parse_steps

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [
    {
        "prompt": "what is better?",
        "chosen": "the old owl said: it is 42. The sun",
        "rejected": "the sun and the moon are said to be happy",
    },
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
    {"prompt": "the owl?", "chosen": "happy", "rejected": "the user is happy"},
]


def placed(rows=ROWS):
    """Both answers of each row; every third token that an answer says is marked as wrong."""
    pairs, _ = load_pairs(rows, TOKENIZER, EncodeOptions(256))
    found = []
    for pair, both in zip(pairs, ResponsePairs(pairs, TOKENIZER), strict=True):
        for response in both:
            answer = MarkedAnswer(
                where=response.where,
                document=f"row {pair.index}",
                prompt=pair.row.prompt,
                answer=response.text,
                pair=f"pair {pair.index}",
                preferred=response.side == "chosen",
                index=pair.index,
                side=response.side,
            )
            count = len(response.ids)
            content = np.zeros(count, bool)
            content[response.judged] = True
            wrong = content & (np.arange(count) % 3 == 0)
            marks = SimpleNamespace(
                content=content,
                judged=content,
                wrong=wrong,
                right=np.zeros(count, bool),
                labels={"third": wrong},
                steps=np.full(count, -1),
            )
            found.append(Placed(answer, response, marks))
    return found


def context(model=MODEL, **more):
    return Context(model, TOKENIZER, tokens_per_batch=2048, **more)


def dense(response):
    """Log-probs and entropies of each token, in float64, from dense logits."""
    ids = torch.tensor([[*response.prompt_ids, *response.ids]]).long()
    with torch.no_grad():
        logps = MODEL(ids).logits[0].double().log_softmax(-1)[len(response.prompt_ids) - 1 : -1]
    targets = torch.from_numpy(response.ids).long()
    return logps.gather(1, targets[:, None])[:, 0].numpy(), -(logps.exp() * logps).sum(-1).numpy()


def test_baselines():
    run = context()
    given = placed()
    scored, report = score_answers(given, [BaselineColumns(run, 0)], run)
    assert (report.seen, report.kept) == (6, 6)
    for item, found in zip(given, scored, strict=True):
        response, said = item.response, item.marks.content
        logps, entropy = dense(response)
        scores = found.scores
        assert scores["surprise"] == pytest.approx(logps[said], abs=1e-4)
        assert scores["entropy"] == pytest.approx(-entropy[said], abs=1e-4)
        assert (scores["surprise_by_word"] <= scores["surprise"]).all()
        n = said.sum()
        assert scores["position"] == pytest.approx(-np.arange(n) / n)
        assert -scores["length"].sum() == len(response.text)
        assert (found.wrong == item.marks.wrong[said]).all() and found.judged is None
        assert (found.document, found.preferred) == (
            item.answer.document,
            response.side == "chosen",
        )
    # by word: "owl" and ":" are one
    text = np.array(given[0].response.pieces)[given[0].marks.content].tolist()
    start, end = "".join(text).index("said:"), "".join(text).index(" it")
    ends = np.cumsum([len(x) for x in text])
    inside = (ends > start) & (ends <= end)
    assert inside.sum() >= 2
    word = scored[0].scores["surprise_by_word"][inside]
    assert (word == scored[0].scores["surprise"][inside].min()).all()


def test_random_numbers_are_the_seed_s():
    run = context(NoReference("rewards", torch.device("cpu"), "give --model"))
    first, same, other = (
        score_answers(placed(), [BaselineColumns(run, seed)], run)[0] for seed in (0, 0, 1)
    )
    assert set(first[0].scores) == {"position", "length", "random"}
    assert (first[0].scores["random"] == same[0].scores["random"]).all()
    assert (first[0].scores["random"] != other[0].scores["random"]).any()


def test_a_source_after_shaping_shares_the_forward_passes():
    seen = []
    run = context(on_tokens=seen.append)
    source = load_source("surprise", {}, run)
    columns = [
        SourceColumns("surprise", source, parse_steps(["scale=2"])),
        BaselineColumns(run, 0),
    ]
    named = with_own_names([("rewards", columns[0]), ("baseline", columns[1])])
    assert named[0].names == ("surprise (rewards)",)
    assert named[1].names[:2] == ("surprise (baseline)", "surprise_by_word")
    scored, _ = score_answers(placed(), named, run)
    with_both = sum(seen)
    for found in scored:
        twice = found.scores["surprise (rewards)"]
        assert twice == pytest.approx(2 * found.scores["surprise (baseline)"])
    seen.clear()
    alone = context(on_tokens=seen.append)
    score_answers(placed(), [BaselineColumns(alone, 0)], alone)
    assert with_both == sum(seen) > 0


def test_streams_of_several_sources():
    run = context()
    options = {"sources": ["surprise", "fixed=constant"]}
    columns = SourceColumns("several", load_source("several", options, run))
    assert columns.names == ("surprise", "fixed")
    scored, _ = score_answers(placed(), [columns], run)
    assert (scored[0].scores["fixed"] == 0.5).all()


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    path = tmp_path_factory.mktemp("annotated") / "a.parquet"
    options = AnnotateOptions(EncodeOptions(256), per_token=True, rewards="surprise")
    annotate(MODEL, TOKENIZER, ROWS[:2], path, options, progress=False)
    return read_annotated(path)


def test_streams_of_a_file(annotated):
    """They are what the source gives, and surprise is known without a model."""
    file = FileColumns(*annotated, "a.parquet")
    run = context(NoReference("rewards", torch.device("cpu"), "give --model"))
    baselines = BaselineColumns(run, 0, file)
    assert baselines.names == ("surprise", "surprise_by_word", "position", "length", "random")
    scored, report = score_answers(placed(), [file, baselines], run)
    assert report.dropped == {"not in the annotated file": 2} and len(scored) == 4
    for found in scored:
        assert found.scores["token_rewards"] == pytest.approx(found.scores["surprise"])
    other, _ = score_answers(placed()[:4], [BaselineColumns(context(), 0)], context())
    for found, expected in zip(scored, other, strict=True):
        for name in ("surprise", "surprise_by_word"):
            assert found.scores[name] == pytest.approx(expected.scores[name], abs=1e-4)


def test_a_file_of_other_rows_is_refused(annotated):
    file = FileColumns(*annotated, "a.parquet")
    run = context(NoReference("rewards", torch.device("cpu"), "give --model"))
    rows = [ROWS[0] | {"rejected": "the sun and the moon are said to be sad"}, *ROWS[1:]]
    given = placed(rows)
    given[2] = replace(given[2], answer=replace(given[2].answer, index=None))
    _, report = score_answers(given, [file], run)
    assert report.dropped == {
        "other tokens in the annotated file": 1,
        "cannot be joined to the annotated file": 1,
        "not in the annotated file": 2,
    }
    (detail,) = report.examples["other tokens in the annotated file"]
    assert "rejected_ids: from token" in detail and "happy" in detail and "sad" in detail
    with pytest.raises(ValueError, match="other tokens in the annotated file"):
        score_answers(given[1:2], [file], run, strict=True)
    with pytest.raises(ValueError, match="expected an answer that can be scored, found none"):
        score_answers(given[1:2], [file], run)
    with pytest.raises(ValueError, match="streams: expected some of token_rewards, which"):
        FileColumns(*annotated, "a.parquet", ["token_reward"])


def test_an_answer_that_one_refuses_is_left_out_for_all():
    short = tiny_llama(len(TOKENIZER), max_position_embeddings=40)
    run = context(short)
    rows = [*ROWS, {"prompt": "the owl?", "chosen": "the sun. " * 12, "rejected": "no"}]
    given = placed(rows)
    lengths = [item.tokens - 1 for item in given]
    baselines = BaselineColumns(run, 0)
    scored, report = score_answers(given, [baselines], run)
    fitting = sum(x <= 40 for x in lengths)
    assert fitting < len(lengths)
    assert len(scored) == report.kept == fitting
    assert report.dropped == {"pair too long": len(lengths) - fitting}


def test_parts():
    """The longest documents first, each together; few answers are cut all the same."""
    given = placed()
    numbers = range(len(given))
    parts = cut(list(numbers), given, 10**6)
    assert sorted(i for part in parts for i in part) == list(numbers)
    documents = [given[i].answer.document for part in parts for i in part]
    assert len(list(dict.fromkeys(documents))) == 3 and documents[::2] == documents[1::2]
    assert cut([0, 1], given, 1) == [[0], [1]]
    many = [given[0]] * 1000
    assert max(map(len, cut(list(range(1000)), many, 10**9))) == MOST_ANSWERS


def test_the_bar_counts_answers():
    bar = progress(True)
    run = context(on_tokens=bar.tokens)
    score_answers(placed(), [BaselineColumns(run, 0)], run, bar=bar)
    assert "6 of 6 answers" in str(bar.bar) and bar.bar.n == sum(x.tokens for x in placed())


def test_batches_change_roundings_alone():
    run = context()
    whole, _ = score_answers(placed(), [BaselineColumns(run, 0)], run)
    for i, item in enumerate(placed()):
        one = context()
        (found,), _ = score_answers([item], [BaselineColumns(one, 0)], one)
        assert found.scores["surprise"] == pytest.approx(whole[i].scores["surprise"], abs=1e-4)
