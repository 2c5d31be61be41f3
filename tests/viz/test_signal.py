"""What the page says over all tokens: the signal, the texts of tokens, folded prompts, charts."""

import re
from collections import defaultdict

import numpy as np
import pytest

from treg.viz import PairView, Side
from treg.viz.by_token import disagreement, rms_of, standing_out, token_table
from treg.viz.charts import BINS, histogram, line_chart, nice_ticks, scatter
from treg.viz.curves import Panel
from treg.viz.page import _short_path, short_paths
from treg.viz.prompts import folded, template_texts
from treg.viz.signal import correlation_interval, detection_of, signal_of, verdict, wilson
from treg.viz.tokens import limit_of, numbers_of

WORDS = ["a", " b", "c", "\n"]


def random_pairs(count, rng, size=0.3, gap=0.0):
    """Pairs of random tokens; the last of each response is special, every fourth is marked."""

    def side(shift):
        n = int(rng.integers(2, 9))
        rewards = np.clip(rng.normal(shift, size, n), -0.5, 0.5)
        implicit = 0.4 * rewards + rng.normal(0, 0.2, n)
        pieces = [WORDS[i] for i in rng.integers(0, len(WORDS), n)]
        return Side(pieces, rewards.tolist(), implicit.tolist(), [n - 1], list(range(0, n, 4)))

    return [PairView(f"f:{i}", "p", side(gap), side(-gap)) for i in range(count)]


def flat(pairs):
    """(pair, side, token, piece, reward, implicit, special, marked) of every token."""
    found = []
    for n, pair in enumerate(pairs):
        for s, side in enumerate((pair.chosen, pair.rejected)):
            for t, piece in enumerate(side.pieces):
                row = (n, s, t, piece, side.rewards[t], side.implicit[t])
                found.append((*row, t in side.special, t in side.marked))
    return found


class TestSignal:
    def test_sizes_and_first_tokens(self):
        pairs = random_pairs(40, np.random.default_rng(0))
        found, tokens = signal_of(numbers_of(pairs)), flat(pairs)
        sizes = [abs(x[4]) for x in tokens]
        assert found["mean_abs"] == pytest.approx(np.mean(sizes))
        assert found["median_abs"] == pytest.approx(np.median(sizes))
        assert found["max_abs"] == max(sizes)
        assert found["small"] == pytest.approx(np.mean([x < 0.01 for x in sizes]))
        first = sum(abs(x[4]) for x in tokens if x[2] == 0)
        assert found["first_mass"] == pytest.approx(first / sum(sizes))
        assert found["first_tokens"] == pytest.approx(80 / len(tokens))

    def test_who_knows_the_label(self):
        pairs = random_pairs(50, np.random.default_rng(1), gap=0.1)
        found = signal_of(numbers_of(pairs))
        right = sum(np.mean(p.chosen.rewards) > np.mean(p.rejected.rewards) for p in pairs)
        policy = sum(sum(p.chosen.implicit) > sum(p.rejected.implicit) for p in pairs)
        assert (found["rewards_right"], found["rewards_told"]) == (right, 50)
        assert (found["policy_right"], found["policy_told"]) == (policy, 50)
        assert (found["rewards_low"], found["rewards_high"]) == wilson(right, 50)

    def test_wilson_solves_its_equation(self):
        """The ends are the shares p from which the observed one is z standard deviations away."""
        for successes, trials in ((0, 7), (3, 10), (40, 40), (55, 90)):
            for p in wilson(successes, trials):
                if 0 < p < 1:
                    distance = abs(successes / trials - p) / np.sqrt(p * (1 - p) / trials)
                    assert distance == pytest.approx(1.959964)

    def test_equal_means_are_not_told(self):
        side = Side(["a"], [0.1], [0.0])
        found = signal_of(numbers_of([PairView("f", "p", side, side)]))
        assert "rewards_told" not in found and "policy_told" not in found

    def test_interval_of_the_correlation(self):
        """As the bootstrap that computes each correlation from the redrawn tokens themselves."""
        pairs = random_pairs(30, np.random.default_rng(2))
        low, high = correlation_interval(numbers_of(pairs))
        rng, drawn = np.random.default_rng(3), []
        for _ in range(2000):
            tokens = []
            for n in rng.integers(0, 30, 30):
                for side in (pairs[n].chosen, pairs[n].rejected):
                    tokens += zip(side.rewards, side.implicit, strict=True)
            drawn.append(np.corrcoef(np.array(tokens).T)[0, 1])
        assert (low, high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.04)
        assert correlation_interval(numbers_of(pairs[:4])) is None

    def test_detection_is_the_share_of_ordered_tokens(self):
        pairs = random_pairs(12, np.random.default_rng(4))
        found = detection_of(pairs, numbers_of(pairs))
        text = [x for x in flat(pairs) if not x[6]]
        for kind, column in (("rewards", 4), ("implicit", 5)):
            wrong = [-x[column] for x in text if x[7]]
            others = [-x[column] for x in text if not x[7]]
            ordered = [(a > b) + 0.5 * (a == b) for a in wrong for b in others]
            assert found[kind] == pytest.approx(np.mean(ordered))
        assert (found["marked"], found["tokens"]) == (len(wrong), len(text))
        unmarked = [PairView("f", "p", Side(["a"], [0.1]), Side(["b"], [0.2]))]
        assert detection_of(unmarked, numbers_of(unmarked)) == {}

    def test_verdict(self):
        def said(**options):
            pairs = random_pairs(60, np.random.default_rng(5), **options)
            return " ".join(verdict(signal_of(numbers_of(pairs)), 0.25))

        weak = random_pairs(60, np.random.default_rng(5), size=0.004)
        change = 25 * np.sqrt(np.mean([x[4] ** 2 for x in flat(weak)]))
        expected = (
            f"Almost no signal: at alpha 0.25 the rewards change the gradient by {change:.2g} %"
        )
        assert expected in said(size=0.004)
        assert "do not tell chosen from rejected" in said(size=0.3)
        assert "contradict the labels" in said(size=0.1, gap=-0.2)
        assert said(size=0.1, gap=0.3) == ""


class TestByToken:
    def test_means_by_text(self):
        pairs = random_pairs(30, np.random.default_rng(6))
        table = token_table(pairs, numbers_of(pairs))
        rows = defaultdict(list)
        for token in flat(pairs):
            if not token[6]:
                rows[token[3]].append(token)
        columns = table["columns"]
        assert table["texts"] == len(rows)
        assert columns["piece"] == sorted(rows, key=lambda piece: (-len(rows[piece]), piece))
        for i, piece in enumerate(columns["piece"]):
            mine = rows[piece]
            sides = [[x for x in mine if x[1] == side] for side in (0, 1)]
            counts = [columns[name][i] for name in ("count", "chosen", "rejected")]
            assert counts == [len(mine), len(sides[0]), len(sides[1])]
            for name, side in zip(("mean_chosen", "mean_rejected"), sides, strict=True):
                assert columns[name][i] == pytest.approx(np.mean([x[4] for x in side]), rel=1e-4)
            mean = np.mean([x[5] for x in mine])
            assert columns["mean_implicit"][i] == pytest.approx(mean, rel=1e-4)
            opposite = np.mean([x[4] * x[5] < 0 for x in mine])
            assert columns["opposite"][i] == pytest.approx(opposite, rel=1e-4)

    def test_numbers_that_are_not_there_leave_no_column(self):
        pairs = [PairView("f", "p", Side(["a"], [0.1]), Side(["b"]))]
        columns = token_table(pairs, numbers_of(pairs))["columns"]
        assert columns["mean_chosen"] == [0.1, None]
        assert not columns.keys() & {"mean_rejected", "mean_implicit", "opposite"}

    def test_tokens_that_stand_out(self):
        pairs = random_pairs(20, np.random.default_rng(7))
        tokens = flat(pairs)
        rms = {
            "rewards": np.sqrt(np.mean([x[4] ** 2 for x in tokens])),
            "implicit": np.sqrt(np.mean([x[5] ** 2 for x in tokens])),
        }
        assert rms_of([np.array([x[4] for x in tokens])]) == pytest.approx(rms["rewards"])
        found = standing_out(numbers_of(pairs), rms)

        def apart(x):
            return -x[4] * x[5] / (rms["rewards"] * rms["implicit"])

        for name, score in (("disagree", apart), ("highest", lambda x: x[4])):
            want = sorted((x for x in tokens if score(x) > 0), key=score, reverse=True)[:40]
            assert found[name] == [list(x[:3]) for x in want]
        assert disagreement(np.array([0.5, -0.5]), rms)[0] == 0


class TestLimit:
    def test_no_far_number_and_no_zero_decides(self):
        small = np.full(200, 0.004)
        assert limit_of([small, np.array([0.5]), np.zeros(1000)]) == 0.004
        assert limit_of([np.array([0.0041])]) == 0.0041
        assert limit_of([np.array([0.01234])]) == 0.013
        assert limit_of([np.zeros(3)]) == limit_of([]) == 1.0


class TestPaths:
    def test_no_absolute_path_is_left(self, tmp_path, monkeypatch):
        root = str(tmp_path)
        places = [f"{root}/x/a.jsonl:1", f"{root}/y/a.jsonl:2", "rel/b.jsonl:3", "org/name:row 4"]
        assert short_paths(places) == ["x/a.jsonl:1", "y/a.jsonl:2", *places[2:]]
        assert short_paths([f"{root}/x/a.jsonl:7"]) == ["a.jsonl:7"]
        monkeypatch.chdir(tmp_path)
        assert _short_path(f"{root}/out/model") == "out/model"
        assert _short_path("/usr/share/model/") == "model"
        assert _short_path("org/name") == "org/name"


class TestPrompts:
    def tokenizer(self, template):
        from tiny import tiny_tokenizer

        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        return tokenizer

    TEMPLATE = (
        "{% if messages[0].role != 'system' %}<s>system\nBe kind.</s>\n{% endif %}"
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )

    def test_what_the_template_writes_is_folded(self):
        pytest.importorskip("transformers")
        tokenizer = self.tokenizer(self.TEMPLATE)
        texts = template_texts(tokenizer)
        user, answer = {"role": "user"}, {"role": "assistant", "content": "Hm."}
        for messages, contents in (
            ([user | {"content": "Why?"}], ["", "Why?", ""]),
            (
                [{"role": "system", "content": "Be brief."}, user | {"content": "Why?"}],
                ["", "Be brief.", "Why?", ""],
            ),
            (
                [user | {"content": "Why?"}, answer, user | {"content": "So?"}],
                ["", "Why?", "Hm.", "So?", ""],
            ),
        ):
            prompt = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            parts = folded(prompt, texts)
            assert "".join(parts) == prompt and parts[::2] == contents

    def test_nothing_to_fold(self):
        pytest.importorskip("transformers")
        assert template_texts(self.tokenizer(None)) == []
        assert template_texts(self.tokenizer("{{ raise_exception('no') }}")) == []
        assert folded("text", []) == ["text"]


def chart_labels(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


class TestCharts:
    def test_histogram(self):
        """Heights are the logarithms of the shares that numpy counts."""
        rng = np.random.default_rng(8)
        values = np.concatenate([rng.normal(0, 0.1, 500), [3.0, -7.0]])
        svg = histogram({"chosen": values}, 0.3, "token reward")
        heights = [float(y) for y in re.findall(r"V([\d.]+)", svg)]
        inside = np.histogram(np.clip(values, -0.3, 0.3), np.linspace(-0.3, 0.3, BINS + 1))[0]
        assert len(heights) == BINS + 1
        top, foot = 10, 198  # of the axes
        for y, count in zip(heights, inside.tolist(), strict=False):
            share = (foot - y) / (foot - top) * 3.12 - 3  # the axis goes from -3 to 0.12
            assert share == pytest.approx(np.log10(count / 502) if count else -3, abs=0.002)
        assert {"≤ −0.3", "≥ 0.3", "token reward"} <= set(chart_labels(svg))

    def test_scatter_draws_some_of_many_and_all_of_few(self):
        x, y = np.random.default_rng(9).normal(size=(2, 5000))
        svg = scatter({"chosen": (x, y), "rejected": (x[:0], y[:0])}, (1, 1), ("x", "y"))
        dots = re.search(r'class="dots chosen" d="([^"]*)"', svg)[1]
        assert dots.count("M") == 2000
        few = scatter({"chosen": (x[:9], y[:9])}, (1, 1), ("x", "y"))
        places = re.findall(r"M([\d.]+) ([\d.]+)h0", few)
        want = [
            (208 + min(max(a, -1), 1) * 162, 104 - min(max(b, -1), 1) * 94)
            for a, b in zip(x[:9], y[:9], strict=True)
        ]
        assert np.array(places, float) == pytest.approx(np.array(want), abs=0.06)

    def test_lines_have_gaps_where_numbers_are_missing(self):
        lines = {"run": [(1, 0.0), (2, float("nan")), (3, 1.0), (4, 0.5)]}
        path = re.search(
            r'class="line run0 dash0" d="([^"]*)"', line_chart("loss", Panel(lines), {"run": 0})
        )
        assert path[1] == "M46.0 198.0h0M262.0 10.0h0L370.0 104.0"

    def test_names_are_text(self):
        svg = line_chart("<b>\u202e", Panel({"run": [(1, 1.0)]}), {"run": 0})
        assert "<b>" not in svg and "&lt;b&gt;⟨U+202E⟩" in svg

    def test_ticks(self):
        assert [x for x, _ in nice_ticks(-0.7, 0.9)] == [-0.5, 0.0, 0.5]
        assert [x for x, _ in nice_ticks(3, 9)] == [4, 6, 8]
        assert nice_ticks(0, 0.00012)[-1] == (0.0001, "0.0001")
