"""The demo end to end, small; and the parts of it that measure."""

import json
import re

import numpy as np
import pytest
import torch

from treg.demo import run as demo
from treg.demo.make_model import auroc


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 6)
    monkeypatch.setattr(demo, "SAMPLES", 1)
    asked = demo.world.prompts
    monkeypatch.setattr(demo.world, "prompts", lambda split: asked(split)[:16])
    results = demo.run(str(tmp_path), seeds=2, pairs=20)
    text = capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    assert all(found["-rhat"] > 0.8 for found in results["auroc"].values())
    assert [(x["method"], x["seed"]) for x in results["runs"]] == [
        (m, s) for s in range(2) for m in demo.METHODS
    ]
    header, rows = results["table"]
    assert [row[0] for row in rows] == ["before", *demo.METHODS] and {len(row) for row in rows} == {
        len(header)
    }
    wrong = [x["wrong facts"] for x in results["runs"] if x["method"] == "T-REG"]
    assert (
        rows[2][1] == f"{np.mean(wrong):.1%} ({np.std(wrong, ddof=1):.1%})" and rows[2][1] in text
    )
    # the methods differ in what they are trained on, not in what they see
    by_method = {m: [x for x in results["runs"] if x["method"] == m] for m in demo.METHODS}
    assert (
        by_method["DPO"][0]["margin"]
        != by_method["T-REG"][0]["margin"]
        != by_method[demo.CONTROL][0]["margin"]
    )
    page = (tmp_path / "report.html").read_text()
    # the marked tokens are the wrong values of the world
    pairs = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])["pairs"]
    rows = demo.world.preference_rows(1, 6, "test")
    assert len(pairs) == 6 and "AUROC of −r̂" in page
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            wrong = [text[a:b] for a, b in row[f"wrong_{side}"]]
            marked = [pair[side]["pieces"][t] for t in pair[side]["marked"]]
            assert "".join(marked).split() == wrong
    assert "held-out.jsonl:1" in page and all(m in page for m in demo.METHODS)


@pytest.mark.parametrize("bad", [{"seeds": 0}, {"pairs": 0}])
def test_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a positive integer, got 0"):
        demo.run(str(tmp_path), **bad)


def test_auroc_is_the_share_of_ordered_pairs():
    scores, positive = torch.randint(0, 9, (200,)).double(), torch.rand(200) < 0.3
    pairs = [
        (a > b) + 0.5 * (a == b)
        for a in scores[positive].tolist()
        for b in scores[~positive].tolist()
    ]
    assert auroc(scores.numpy(), positive.numpy()) == pytest.approx(np.mean(pairs))


def test_shuffled_rewards_stay_in_their_response():
    class Tokenizer:
        all_special_ids = (7,)

    ids = np.array([3, 4, 5, 6, 8, 9, 2, 7])
    rewards = np.arange(8, dtype=np.float32)
    example = {
        f"{side}_{name}": x
        for side in ("chosen", "rejected")
        for name, x in (("ids", ids), ("token_rewards", rewards + 10 * (side == "chosen")))
    }
    (mixed,) = demo.shuffled([example], Tokenizer, seed=0)
    for side in ("chosen", "rejected"):
        before, after = example[f"{side}_token_rewards"], mixed[f"{side}_token_rewards"]
        assert (
            sorted(before) == sorted(after) and after[-1] == before[-1] and (before != after).any()
        )
    assert (example["rejected_token_rewards"] == rewards).all()
