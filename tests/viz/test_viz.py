"""The views for people: token pieces of every kind of tokenizer, statistics, and a page in which no
text can act.
"""

import base64
import hashlib
import io
import itertools
import json
import os
import random
import re
import shutil
import struct
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from treg.viz import PairView, Side, agreement, plot_curves, print_pairs, token_pieces, write_page
from treg.viz.curves import LEGEND, PANEL, panels_of

TEXT = [
    "The quick brown fox jumps over the lazy dog. Don't stop!  Two spaces, \n\n a tab\t.",
    "Größe, naïve café — 你好世界 こんにちは 안녕하세요",
    "السلام عليكم كيف حالك שלום עולם",
    "emoji 👋🏽 👨‍👩‍👧‍👦 ❤️ 🇩🇪 done",
]
HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "--><svg onload=\"document.title='owned'\">",
    "javascript:document.title='owned'",
    "\" onclick='x' autofocus onfocus=\"document.title='owned'\"",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; \u2028 \u2029 \x00 \ud800 \x1b[31m \u202eabc",
]
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


def byte_level():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return fast(tokenizer)


def merges_across_words():
    """Merges that join words, and the end of one character with the start of the next."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    return fast(tokenizer)


def metaspace():
    tokenizers = pytest.importorskip("tokenizers")
    known = [
        "<unk>",
        "<|end|>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "▁the",
        "▁fox",
        "e",
        "n",
        "é",
        "你",
        ",",
    ]
    model = tokenizers.models.BPE(
        {token: i for i, token in enumerate(known)},
        [],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    return fast(tokenizer)


def fast(tokenizer):
    transformers = pytest.importorskip("transformers")
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    out.add_tokens(["[added]", " spaced added"])
    return out


def slow():
    transformers = pytest.importorskip("transformers")
    return transformers.ByT5Tokenizer()


def real(name):
    transformers = pytest.importorskip("transformers")
    from tiny import shared_data

    merges = shared_data("tok", name, "merges.txt")
    if name == "qwen2.5":
        return transformers.AutoTokenizer.from_pretrained(merges.parent)
    return transformers.GPT2Tokenizer(str(merges.with_name("vocab.json")), str(merges))


MAKERS = {
    "byte-level": byte_level,
    "across-words": merges_across_words,
    "metaspace": metaspace,
    "slow": slow,
    "gpt2": lambda: real("gpt2"),
    "qwen2.5": lambda: real("qwen2.5"),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def tokenizer(request):
    return MAKERS[request.param]()


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class TestTokenPieces:
    def test_pieces_join_to_the_decoded_text(self, tokenizer):
        rng = random.Random(0)
        for count in (0, 1, 2, 3, 7, 63, 64, 65, 200):
            for _ in range(5):
                ids = [rng.randrange(len(tokenizer)) for _ in range(count)]
                pieces = token_pieces(ids, tokenizer)
                assert len(pieces) == count
                assert "".join(pieces) == decode(tokenizer, ids)

    def test_text_cut_anywhere(self, tokenizer):
        ids = tokenizer(" ".join(TEXT), add_special_tokens=False).input_ids
        whole = token_pieces(ids, tokenizer)
        assert "".join(whole) == decode(tokenizer, ids)
        far = (
            40 if "<0xF0>" in tokenizer.get_vocab() else 4
        )  # a run of byte tokens is good or bad as a whole
        for end in range(far, len(ids), 5):
            pieces = token_pieces(ids[:end], tokenizer)
            assert "".join(pieces) == decode(tokenizer, ids[:end])
            assert pieces[: end - far] == whole[: end - far]

    def test_a_character_stands_at_the_token_that_completes_it(self):
        tokenizer = byte_level()
        ids = [
            tokenizer.convert_tokens_to_ids(c) for c in ("a", "ð", "Ł", "Ĳ", "Ģ", "b")
        ]  # a F0 9F 90 80 b
        assert token_pieces(ids, tokenizer) == ["a", "", "", "", "🐀", "b"]
        assert token_pieces(ids[:3], tokenizer) == ["a", "\ufffd", ""]
        assert token_pieces([*ids[:3], ids[-1]], tokenizer) == ["a", "\ufffd", "", "b"]

    def test_byte_fallback(self):
        tokenizer = metaspace()
        ids = tokenizer.convert_tokens_to_ids(
            ["▁the", "<0xF0>", "<0x9F>", "<0x90>", "<0x80>", "▁fox"]
        )
        assert token_pieces(ids, tokenizer) == ["the", "", "", "", "🐀", " fox"]
        long = tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in ("🐀" * 60).encode()])
        assert token_pieces(long, tokenizer) == ["", "", "", "🐀"] * 60

    def test_special_and_added_tokens(self):
        tokenizer = byte_level()
        ids = tokenizer("fox[added] dog spaced added<|end|>").input_ids
        side = Side.from_ids(ids, tokenizer)
        assert {"[added]", " spaced added", "<|end|>"} <= set(side.pieces)
        assert list(side.special) == [side.pieces.index("<|end|>")]

    def test_numbers_of_any_kind(self):
        tokenizer = byte_level()
        ids = tokenizer("the lazy dog").input_ids
        assert token_pieces(np.array(ids), tokenizer) == token_pieces(ids, tokenizer)

    def test_windows_do_not_change_pieces(self):
        tokenizer = byte_level()
        ids = tokenizer(" ".join(TEXT * 3)).input_ids
        text = decode(tokenizer, ids)
        prefixes = [decode(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
        complete = [n for n, prefix in enumerate(prefixes) if text.startswith(prefix)]
        pieces = token_pieces(ids, tokenizer)
        for a, b in itertools.pairwise(complete):
            assert "".join(pieces[a:b]) == text[len(prefixes[a]) : len(prefixes[b])]


def pair(
    rewards=(0.2, -0.4),
    implicit=(0.1, 0.2),
    where="data.jsonl:1",
    prompt="Why?",
    pieces=("a", " b"),
):
    def side(k):
        return Side(
            list(pieces),
            None if rewards is None else [r * k for r in rewards],
            None if implicit is None else list(implicit),
        )

    return PairView(where, prompt, side(1), side(-1))


class TestAgreement:
    def test_by_hand(self):
        one = PairView(
            "f:1",
            "p",
            Side(["a", "b", "c"], [0.5, -0.25, 0.0], [1.0, 2.0, 3.0]),
            Side(["d"], [0.25], [4.0]),
        )
        got = agreement([one])
        assert {k: got[k] for k in ("pairs", "tokens", "agree", "disagree", "ties")} == {
            "pairs": 1,
            "tokens": 4,
            "agree": 2,
            "disagree": 1,
            "ties": 1,
        }
        assert got["sign_agreement"] == pytest.approx(2 / 3)
        # deviations (3, -3, -1, 1) / 8 and (-3, -1, 1, 3) / 2: products sum to -4 / 16, squares to
        # 20 / 64 and 20 / 4
        assert got["pearson"] == pytest.approx(-0.25 / np.sqrt(20 / 64 * 5))
        assert got["spearman"] == pytest.approx(
            -0.2
        )  # ranks 4 1 2 3 and 1 2 3 4: 1 - 6 * 12 / (4 * 15)
        assert got["mean_reward_chosen"] == pytest.approx(0.25 / 3)
        assert got["mean_reward_rejected"] == 0.25
        assert got["large_rewards"] == 0.75

    def test_spearman_with_ties(self):
        # ranks 1.5 1.5 3 4 and 1 3 3 3: deviations (-1 -1 .5 1.5), (-1.5 .5 .5 .5), products 2,
        # squares 4.5 and 3
        one = PairView(
            "f:1", "p", Side(list("abcd"), [0.1, 0.1, 0.2, 0.4], [-1.0, 7.0, 7.0, 7.0]), Side([])
        )
        assert agreement([one])["spearman"] == pytest.approx(2 / np.sqrt(4.5 * 3))

    def test_absent_is_not_zero(self):
        assert set(agreement([pair(rewards=None)])) == {"pairs", "tokens"}
        means = {"mean_reward_chosen", "mean_reward_rejected", "large_rewards"}
        assert set(agreement([pair(implicit=None)])) == {"pairs", "tokens", *means}
        constant = agreement([pair(implicit=(0.1, 0.1))])
        assert (
            "pearson" not in constant
            and "spearman" not in constant
            and constant["sign_agreement"] == 0.5
        )
        zeros = agreement([pair(implicit=(0.0, 0.0))])
        assert zeros["ties"] == 4 and "sign_agreement" not in zeros

    @pytest.mark.parametrize(
        "bad, message",
        [
            (
                dict(rewards=(0.1, float("nan"))),
                r"pairs\[1\] \(f:9\): chosen.rewards: got nan at token 1, ' b'",
            ),
            (
                dict(implicit=(float("-inf"), 0.1)),
                r"pairs\[1\] \(f:9\): chosen.implicit: got -inf at token 0, 'a'",
            ),
            (
                dict(rewards=(0.1,)),
                r"pairs\[1\] \(f:9\): chosen.rewards: expected 2 numbers, one per piece, got \[1\]",
            ),
        ],
    )
    def test_bad_numbers(self, bad, message, tmp_path):
        pairs = [pair(), pair(where="f:9", **bad)]
        for call in (
            agreement,
            print_pairs,
            lambda p: write_page(tmp_path / "p.html", p, title="t", settings={}),
        ):
            with pytest.raises(ValueError, match=message):
                call(pairs)
        assert not list(tmp_path.iterdir())

    def test_no_pairs(self, tmp_path):
        for call in (
            agreement,
            print_pairs,
            lambda p: write_page(tmp_path / "p.html", p, title="t", settings={}),
        ):
            with pytest.raises(ValueError, match="pairs: expected at least one"):
                call([])


class Page(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.raw, self.text = [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        tag, attrs = self.elements[-1] if self.elements else ("", {})
        if tag in ("script", "style") and data.strip():
            self.raw.append((tag, attrs, data))
        else:
            self.text.append(data)

    def data(self):
        return json.loads(next(text for _, attrs, text in self.raw if attrs.get("id") == "data"))

    def tags(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


HISTORY = {
    "dpo/0": [
        {"step": 10, "loss": 0.69, "epoch": 0.1},
        {"step": 20, "loss": 0.6},
        {"step": 20, "train_runtime": 3.0},
    ],
    "dpo/1": [
        {"step": 10, "loss": 0.7},
        {"step": 20, "loss": float("nan")},
        {"step": 30, "loss": 0.5},
    ],
    "treg $x": [
        {"step": 10, "loss": 0.68, "treg/alignment": 0.1},
        {"step": 20, "treg/alignment": 0.2, "once": 1.0},
        {"eval_loss": 3.0},
    ],
}


# of the second run no token was marked as good
SHIFTS = {
    "dpo": [
        {"step": s, "loss": 1 / s, "shift/good": -0.1 * s, "shift/bad": -0.2 * s}
        | {"shift/bad_rejected": -0.3 * s, "shift/unmarked": 0.0, "eval_shift/good": 0.1 * s}
        for s in (1, 2)
    ],
    "treg": [{"step": s, "loss": 1 / s, "shift/bad": -0.4 * s} for s in (1, 2)],
}


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    pytest.importorskip("jinja2")
    pairs = [
        pair(where=f"data.jsonl:{n}", rewards=(0.1 * n, -0.05 * n), implicit=(0.3, 0.1 - 0.1 * n))
        for n in range(4)
    ]
    pairs += [
        PairView(
            text,
            text,
            Side([text, "\n", " "], [0.1, 0.0, -0.2], [0.3, 0.0, 0.1], [0]),
            Side([text], [-0.5], None),
        )
        for text in HOSTILE
    ]
    path = tmp_path_factory.mktemp("page") / "page.html"
    tables = [(HOSTILE[0], ["method", HOSTILE[1]], [["dpo", 0.71234], [HOSTILE[1], -3]])]
    settings = {HOSTILE[1]: HOSTILE[4], "β": "0.1", "text": HOSTILE[5]}
    write_page(path, pairs, title=HOSTILE[0], settings=settings, tables=tables, notes=HOSTILE)
    return path, pairs


class TestPage:
    def test_every_pair_is_listed_and_its_data_come_back(self, page_path):
        path, pairs = page_path
        page = Page(path)
        for got, want in zip(page.data()["pairs"], pairs, strict=True):
            assert (got["where"], got["prompt"]) == (want.where, [want.prompt])
            for name in ("chosen", "rejected"):
                side = getattr(want, name)
                assert got[name]["pieces"] == side.pieces
                assert got[name].get("rewards") == pytest.approx(side.rewards, rel=1e-4)
                assert ("implicit" in got[name]) == (side.implicit is not None)
        # |rewards|: 0.05 to 0.3, each twice, and of each hostile pair 0.1, 0.2 and 0.5
        sizes = [0.1, 0.05, 0.2, 0.1, 0.3, 0.15] * 2 + [0.1, 0.2, 0.5] * len(HOSTILE)
        limits = page.data()["limits"]["rewards"]
        assert limits["1"] == 0.5
        for quantile in ("0.8", "0.9", "0.95", "0.99"):
            exact = np.quantile(sizes, float(quantile))
            assert exact <= limits[quantile] * (1 + 1e-9) < exact * 1.1

    def test_hostile_text_makes_no_element_and_no_attribute(self, page_path):
        path, _ = page_path
        page = Page(path)
        html = path.read_text(encoding="utf-8")
        assert len(page.tags("script")) == html.count("<script") == 3
        assert not page.tags("img") and not page.tags("b") and not page.tags("a")
        assert len(page.tags("svg")) == 3  # the charts
        names = {name for _, attrs in page.elements for name in attrs}
        assert not [
            name for name in names if name.startswith("on") or name in ("style", "autofocus")
        ]
        assert not names & {"href", "src", "srcset", "action"}
        payload = next(text for _, attrs, text in page.raw if attrs.get("id") == "data")
        assert not set("<>&\u2028\u2029") & set(payload) and payload.isascii()
        outside = "".join(page.text)
        assert "49" not in outside.split("{{ 7 * 7 }}")[-1][:20] and "{{ 7 * 7 }}" in outside
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", html)
        assert "⟨U+202E⟩" in outside and "⟨U+001B⟩" in outside

    def test_policy_allows_the_script_of_the_page_only(self, page_path):
        page = Page(page_path[0])
        policy = next(
            a["content"]
            for a in page.tags("meta")
            if a.get("http-equiv") == "Content-Security-Policy"
        )
        rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
        assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
        for tag, rule in (("script", "script-src"), ("style", "style-src")):
            (text,) = [
                text for name, attrs, text in page.raw if name == tag and "type" not in attrs
            ]
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert rules[rule] == f"'sha256-{digest}'"

    def test_structure(self, page_path):
        page = Page(page_path[0])
        assert page.tags("html")[0]["lang"] == "en"
        assert len(page.tags("h1")) == 1 and len(page.tags("noscript")) == 1
        kinds = [a["value"] for a in page.tags("option")]
        assert kinds == ["rewards", "implicit", "product"]
        labelled = {a["aria-controls"] for a in page.tags("button") if a.get("role") == "tab"}
        assert labelled == {"overview", "tokens", "pair-list"}
        assert {a["id"] for a in page.tags("section")} == labelled
        assert "0.712" in page.text and "−3" in page.text

    @pytest.mark.parametrize(
        "without, keys",
        [
            (dict(rewards=None), {"margin"}),
            (dict(implicit=None), {"mean_chosen", "mean_rejected", "gap"}),
            (dict(rewards=None, implicit=None), set()),
        ],
    )
    def test_absent_numbers_leave_no_column(self, tmp_path, without, keys):
        pytest.importorskip("jinja2")
        write_page(tmp_path / "p.html", [pair(**without)], title="t", settings={})
        page = Page(tmp_path / "p.html")
        assert "product" not in page.data()["limits"]
        columns = {"margin", "mean_chosen", "mean_rejected", "gap", "agreement", "disagreement"}
        assert page.data()["pairs"][0].keys() & columns == keys

    def test_another_stream_has_its_own_name_and_no_comparison(self, tmp_path):
        pytest.importorskip("jinja2")
        shown = [replace(pair(), stream="token_weights")]
        write_page(tmp_path / "p.html", shown, title="t", settings={})
        page = Page(tmp_path / "p.html")
        keys = page.data()["pairs"][0].keys()
        assert {"margin", "gap"} <= keys and not {"agreement", "disagreement"} & keys
        assert page.data()["limits"].keys() == {"rewards", "implicit"}
        html = (tmp_path / "p.html").read_text(encoding="utf-8")
        assert "mean token_weights, chosen" in html
        for word in ("r̂", "token reward", "contrastive", "orrelation", "mean_product", "same sign"):
            assert word not in re.sub("<script>.*?</script>", "", html, flags=re.DOTALL), word
        assert agreement(shown).keys() == {
            *("pairs", "tokens", "mean_reward_chosen", "mean_reward_rejected")
        }

    def test_numbers_of_each_pair_and_only_those_that_it_has(self, tmp_path):
        pytest.importorskip("jinja2")
        pairs = [pair(), pair(rewards=None), pair(implicit=None), pair(rewards=None, implicit=None)]
        write_page(tmp_path / "p.html", pairs, title="t", settings={})
        means = {"mean_chosen": -0.1, "mean_rejected": 0.1, "gap": -0.2}
        # rewards (.2, -.4) and (-.2, .4), implicit (.1, .2) twice: products of opposite signs are
        # .08 and .02 of four tokens; the root mean squares over the pairs are sqrt(.1), sqrt(.025)
        apart = (0.08 + 0.02) / 4 / np.sqrt(0.1 * 0.025)
        wanted = [
            means | {"margin": 0.0, "agreement": 0.5, "disagreement": pytest.approx(apart, 1e-4)},
            {"margin": 0.0},
            means,
            {},
        ]
        numbers = {"margin", "mean_chosen", "mean_rejected", "gap", "agreement", "disagreement"}
        for row, want in zip(Page(tmp_path / "p.html").data()["pairs"], wanted, strict=True):
            found = {key: row[key] for key in numbers & row.keys()}
            assert found == pytest.approx(want) and row["tokens"] == 4

    def test_the_file_is_replaced_whole(self, tmp_path, monkeypatch):
        pytest.importorskip("jinja2")
        path = tmp_path / "p.html"
        path.write_text("old")

        def fail(*_):
            raise OSError("disk")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
            patch.setattr(os, "replace", fail)
            write_page(path, [pair()], title="t", settings={})
        assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
        write_page(path, [pair()], title="t", settings={})
        assert path.read_text().startswith("<!DOCTYPE html>") and list(tmp_path.iterdir()) == [path]

    def test_opening_lines_that_all_prompts_share_are_left_out_of_the_list(self, tmp_path):
        pytest.importorskip("jinja2")
        prompts = ["system\nbe kind\nuser\nWhy?", "system\nbe kind\nuser\nWhere?"]
        write_page(tmp_path / "p.html", [pair(prompt=p) for p in prompts], title="t", settings={})
        shown = [row["snippet"] for row in Page(tmp_path / "p.html").data()["pairs"]]
        assert shown == ["Why?", "Where?"]

    def test_ragged_table(self, tmp_path):
        pytest.importorskip("jinja2")
        with pytest.raises(ValueError, match="tables: 'scores': expected 2 cells"):
            write_page(
                tmp_path / "p.html",
                [pair()],
                title="t",
                settings={},
                tables=[("scores", ["a", "b"], [["1"]])],
            )


def png_size(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    return struct.unpack(">II", content[16:24])


class TestCurves:
    def test_a_panel_for_each_quantity(self, tmp_path):
        pytest.importorskip("matplotlib")
        plot_curves(HISTORY, tmp_path / "curves.png")
        assert png_size((tmp_path / "curves.png").read_bytes()) == (2 * PANEL[0], PANEL[1] + LEGEND)
        many = {
            "run": [
                {"step": s, "a": s, "b": 1.0, "c": 2, "loss": 1 / s, "epoch": s} for s in (1, 2)
            ]
        }
        plot_curves(many, out := io.BytesIO(), dark=True)
        assert png_size(out.getvalue()) == (3 * PANEL[0], 2 * PANEL[1] + LEGEND)
        once = {"run": [{"step": 1, "loss": 1.0}]}  # drawn, where there is nothing else
        plot_curves(once, out := io.BytesIO())
        assert png_size(out.getvalue()) == (PANEL[0], PANEL[1] + LEGEND)

    def test_embedded(self, tmp_path):
        pytest.importorskip("jinja2")
        write_page(tmp_path / "p.html", [pair()], title="t", settings={}, history=HISTORY)
        page = Page(tmp_path / "p.html")
        charts = [a["aria-label"] for a in page.tags("svg")][-2:]
        assert charts == [f"{x} over the optimizer steps" for x in ("loss", "treg/alignment")]
        lines = [a["class"] for a in page.tags("path") if a["class"].startswith("line")]
        # two seeds of one method share a colour
        assert lines == ["line run0 dash0", "line run0 dash0", "line run1 dash0", "line run1 dash0"]
        assert "dpo (2 seeds)" in page.text and "treg $x" in page.text

    def test_good_and_bad_tokens_have_a_panel_together(self, tmp_path):
        panels = panels_of(SHIFTS)
        shift, rejected = "shift of good and bad tokens", "shift in rejected answers"
        assert list(panels) == ["loss", shift, rejected, "shift/unmarked", f"eval_{shift}"]
        assert panels["loss"].bad is None and panels["shift/unmarked"].bad is None
        assert panels[shift].lines == {"dpo": [(1, -0.1), (2, -0.2)]}
        assert panels[shift].bad == {"dpo": [(1, -0.2), (2, -0.4)], "treg": [(1, -0.4), (2, -0.8)]}
        assert panels[rejected].lines == {} and list(panels[rejected].bad) == ["dpo"]
        assert panels[f"eval_{shift}"].bad == {}

    def test_shifts_of_tokens_on_the_page(self, tmp_path):
        """Bad tokens dashed, and a line at 0 though every number is below it."""
        pytest.importorskip("jinja2")
        write_page(tmp_path / "p.html", [pair()], title="t", settings={}, history=SHIFTS)
        page = Page(tmp_path / "p.html")
        charts = [
            a["aria-label"].removesuffix(" over the optimizer steps") for a in page.tags("svg")
        ]
        assert charts[-3:] == ["loss", "shift of good and bad tokens", "shift in rejected answers"]
        paths = [(a["class"], a["d"]) for a in page.tags("path")]
        lines = [name for name, _ in paths if name.startswith("line")]
        assert lines == [
            *("line run0 dash0", "line run1 dash0"),
            *("line run0 dash0", "line run0 bad", "line run1 bad"),
            "line run0 bad",
        ]
        zeros = [d for name, d in paths if name == "axis" and "V" not in d]
        assert zeros == ["M46 10.0H370"] * 2
        assert page.text.count("log π − log π_ref, nats; solid good, dashed bad") == 2

    def test_shifts_of_tokens_in_the_picture(self, monkeypatch):
        figure = pytest.importorskip("matplotlib.figure")
        saved = []
        monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: saved.append(self))
        plot_curves(SHIFTS, io.BytesIO())
        axes = {x.get_title("left"): x for x in saved[0].axes}
        shift = axes["shift of good and bad tokens"]
        drawn = [x for x in shift.lines if len(x.get_xdata()) == 2]
        styles = [(x.get_color(), x.get_linestyle(), list(x.get_ydata())) for x in drawn]
        blue, orange = "#0072b2", "#e69f00"
        assert styles[:3] == [
            (blue, "-", [-0.1, -0.2]),
            (blue, "--", [-0.2, -0.4]),
            (orange, "--", [-0.4, -0.8]),
        ]
        assert styles[3][2] == [0.0, 0.0] and shift.get_ylim()[1] >= 0
        assert [x.get_text() for x in shift.get_legend().get_texts()] == ["good", "bad"]
        assert axes["loss"].get_legend() is None
        (legend,) = saved[0].legends
        assert [x.get_linestyle() for x in legend.get_lines()] == ["-", "-"]

    def test_nothing_to_draw(self):
        pytest.importorskip("matplotlib")
        for history in ({}, {"run": []}, {"run": [{"step": 1, "epoch": 2.0}, {"loss": 1.0}]}):
            with pytest.raises(ValueError, match="history: expected a number beside a 'step'"):
                plot_curves(history, io.BytesIO())


class TestTerminal:
    def render(self, pairs, colours="truecolor", **options):
        rich = pytest.importorskip("rich.console")
        console = rich.Console(
            file=io.StringIO(), width=120, force_terminal=True, color_system=colours
        )
        print_pairs(pairs, console, **options)
        return console.file.getvalue()

    def test_colours_numbers_and_limit(self):
        out = self.render(
            [pair(where=f"data.jsonl:{n}", rewards=(0.5, -0.4)) for n in range(4)], limit=2
        )
        assert "data.jsonl:1" in out and "data.jsonl:2" not in out and "4 pairs, 2 above" in out
        assert "48;2;98;169;232" in out and "48;2;242;149;63" in out
        assert "sum rewards +0.100" in out and re.search(r"sign agreement +0\.5", out)

    def test_what_is_not_scored_stands_between(self):
        side = Side(["the ", "fox"], [0.0, 0.0], others={0: "[A]", 1: "[user]", 2: "[B]"})
        out = self.render([PairView("data.jsonl:1", "Why?", side, Side(["no"], [0.0]))])
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
        assert "[A]the [user]fox[B]" in plain

    @pytest.mark.parametrize("colours", ["standard", "256", "truecolor"])
    def test_the_sign_shows_with_few_colours(self, colours):
        """Whatever the size of the rewards: the scale is that of the data."""
        for size in (0.5, 0.004):
            rewards = [share * size for share in (-1, -0.5, -0.25, 0.25, 0.5, 1)]
            side = Side(list("abcdef"), rewards)
            out = self.render([PairView("data.jsonl:1", "Why?", side, side)], colours)
            styles = re.findall(r"\x1b\[30;([0-9;]+)m", out.partition("agreement")[0])
            assert len(styles) == 12 and len(set(styles)) == 6
            assert f"{size:+.3g}" in out

    def test_text_cannot_send_control_characters(self):
        hostile = "[red]\x1b]0;owned\x07\x1b[2J\u202e\r"
        out = self.render([PairView(hostile, hostile, Side([hostile]), Side([hostile]))])
        assert not re.search("\x1b(?!\\[[0-9;]*m)|[\x07\r\u202e]", out)
        assert "[red]⟨U+001B⟩" in out


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
class TestBrowser:
    def dom(self, path, fragment, tmp_path):
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        command += ["--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}#{fragment}"]
        done = subprocess.run(command, capture_output=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        (tmp_path / "dom.html").write_bytes(done.stdout)
        return Page(tmp_path / "dom.html")

    def test_opens_sorts_and_colours(self, page_path, tmp_path):
        path, pairs = page_path
        hash_ = "pair-3&sort=-mean_chosen&color=implicit&scale=0.2"
        page = self.dom(path, hash_, tmp_path)
        data = page.data()["pairs"]
        want = sorted(range(len(pairs)), key=lambda n: -data[n]["mean_chosen"])
        assert [a["id"] for a in page.tags("tbody") if "id" in a] == [f"row-{n + 1}" for n in want]
        assert [a["aria-sort"] for a in page.tags("th") if "aria-sort" in a] == ["descending"]
        opened = [a["aria-expanded"] for a in page.tags("button") if "aria-expanded" in a]
        assert opened.count("true") == 1
        tokens = [a for a in page.tags("span") if "tok" in a.get("class", "").split()]
        # implicit rewards 0.3 and 0.1 - 0.2 on a scale that ends at 0.2, on both sides
        assert [a["class"] for a in tokens] == ["tok up", "tok down"] * 2
        assert [a["style"] for a in tokens] == ["--v: 1.000;", "--v: 0.500;"] * 2

    def test_hostile_text_stays_text(self, page_path, tmp_path):
        path, pairs = page_path
        opened = "&".join(f"pair-{n + 1}" for n in range(len(pairs)))
        page = self.dom(path, opened, tmp_path)
        assert len(page.tags("script")) == 3 and not page.tags("img") and len(page.tags("svg")) == 3
        assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]
        assert len([a for a in page.tags("button") if a.get("aria-expanded") == "true"]) == len(
            pairs
        )
        assert "owned" not in [text.strip() for text in page.text]  # the title, had any of them run
        text = "".join(page.text)
        for hostile in HOSTILE[:4]:
            assert text.count(hostile) >= 4  # in the list, as the prompt and as two tokens


def test_what_is_not_scored_has_no_numbers():
    """It is shown as text, between the tokens where it stands, and is in no statistics."""
    tokenizer = byte_level()
    ids = [tokenizer(x)["input_ids"] for x in ("The quick", " brown", " fox", " jumps")]
    scored = np.concatenate([np.full(len(x), i in (0, 2)) for i, x in enumerate(ids)])
    rewards = np.where(scored, np.linspace(0.1, 0.3, len(scored)), 99.0)
    side = Side.from_ids([i for x in ids for i in x], tokenizer, rewards.tolist(), None, scored)
    first, second = len(ids[0]), len(ids[0]) + len(ids[2])
    assert "".join(side.pieces) == "The quick fox" and len(side.pieces) == second
    assert side.others == {first: " brown", second: " jumps"}
    other = Side(["no"], [0.0])
    found = agreement([PairView("a:1", "p", side, other)])
    assert found["tokens"] == second + 1
    assert found["mean_reward_chosen"] == pytest.approx(rewards[scored].mean())
    # without marks every token is scored
    assert Side.from_ids([i for x in ids for i in x], tokenizer).others == {}
