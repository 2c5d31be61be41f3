"""The demo end to end, small; and the parts of it that measure."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from treg.data.annotated import write_annotated
from treg.demo import run as demo
from treg.demo.detection import ALL, REWARD, SURPRISE, detection
from treg.demo.worlds import WORLDS
from treg.evaluate import auroc


@pytest.mark.parametrize("world", WORLDS)
def test_demo(world, tmp_path, monkeypatch, capsys):
    place = WORLDS[world]
    monkeypatch.setattr(place, "HELD_OUT_PAIRS", 6)
    monkeypatch.setattr(place, "SAMPLES", 1)
    asked = place.prompts
    monkeypatch.setattr(place, "prompts", lambda split: asked(split)[:16])
    results = demo.run(str(tmp_path), seeds=2, pairs=20, world=world)
    text = capsys.readouterr().out
    assert results["world"] == world
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    for found in results["auroc"].values():
        assert all(x > 0.8 for x in found[REWARD].values())
        assert (found[SURPRISE][ALL] > 0.99) == (world == "plain")
        assert world == "plain" or found[SURPRISE]["rumour"] < 0.3
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
    rows = place.preference_rows(1, 6, "test")
    assert len(pairs) == 6 and "AUROC of −r̂" in page
    # how far right and wrong values have moved is on it too
    assert "good" in page and "bad" in page
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            wrong = [text[a:b] for a, b in row[f"wrong_{side}"]]
            marked = [pair[side]["pieces"][t] for t in pair[side]["marked"]]
            assert "".join(marked).split() == wrong
    assert "held-out.jsonl:1" in page and all(m in page for m in demo.METHODS)


def test_detection_is_the_auroc_of_the_marked_tokens(tmp_path):
    """Against scores and marks that are gathered word by word."""
    place = WORLDS["rumours"]
    tokenizer = AutoTokenizer.from_pretrained(place.MODEL)
    rows = place.preference_rows(5, 8, "test")
    rng, examples = np.random.default_rng(0), []
    known: dict[str, list] = {REWARD: [], SURPRISE: [], "kind": []}
    for index, row in enumerate(rows):
        example = {"index": index, "where": f"row {index}", "prompt_ids": [1, 2]}
        for side in ("chosen", "rejected"):
            text = row[side][0]["content"]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            rewards = rng.normal(size=len(ids) + 1).astype(np.float32) / 9
            logps = -rng.random(len(ids) + 1).astype(np.float32)
            example |= {
                f"{side}_ids": [*ids, tokenizer.eos_token_id],
                f"{side}_token_rewards": rewards,
                f"ref_{side}_token_logps": logps,
                f"ref_{side}_logps": float(logps.astype(np.float64).sum()),
            }
            at = 0
            for i, token in enumerate(ids):
                end = at + len(tokenizer.decode([token]))
                kind = ""
                for mark in row[f"{side}_marks"]:
                    if at < mark["end"] and end > mark["start"]:
                        kind = f"{mark['label']} {'wrong' if mark['value'] < 0 else 'right'}"
                known["kind"].append(kind)
                known[REWARD].append(-rewards[i])
                known[SURPRISE].append(-logps[i])
                at = end
        examples.append(example)
    file = tmp_path / "a.parquet"
    write_annotated(file, examples, {}, per_token=True)
    kinds = np.array(known["kind"])
    wrong = np.char.endswith(kinds, "wrong")
    for name, found in detection(file, rows, tokenizer).items():
        scores = np.array(known[name])
        assert found[ALL] == pytest.approx(auroc(scores, wrong))
        for kind in place.KINDS:
            own = np.char.startswith(kinds, kind)
            assert found[kind] == pytest.approx(auroc(scores[own], wrong[own]))


@pytest.mark.parametrize("bad", [{"seeds": 0}, {"pairs": 0}])
def test_refused(bad, tmp_path):
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected a positive integer, got 0"):
        demo.run(str(tmp_path), **bad)


def test_refuses_another_world(tmp_path):
    with pytest.raises(ValueError, match="world: expected one of rumours, plain, got 'flat'"):
        demo.run(str(tmp_path), world="flat")


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
