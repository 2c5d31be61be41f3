"""RED: what a reward model says of the beginnings of an answer, carried over to the policy's
tokens.
"""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from beginnings import alone, expected
from judges import folder, judge, judge_of, judge_tokenizer, word_tokenizer
from surroundings import shared_data
from tiny import tiny_llama, tiny_tokenizer
from tokenizers.normalizers import NFC
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2TokenizerFast

from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.annotated import read_annotated
from treg.rewards import Context, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.base import score_checked
from treg.rewards.redistribution import carried_over, token_ends
from treg.rewards.response import ResponsePairs

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
TEXTS = (
    "🦊 The owl said déjà 🦊🦊 old, 東京! é̂ 42",  # characters of many tokens, combining marks
    "it is better, said the old owl in a wood where the sun is",
)
# combining marks, and signs that are joined
MARKS = "🦊\u0301東 👩\u200d👩\u200d👧 é e\u0301\u0302"
ANSWERS = [{"prompt": "what is better?", "chosen": TEXTS[0], "rejected": TEXTS[1]}]
TURNS = {
    "prompt": [{"role": "user", "content": "the fox?"}],
    "chosen": [
        {"role": "assistant", "content": "the owl"},
        {"role": "tool", "content": "42 owl"},
        {"role": "assistant", "content": "it is 東京"},
    ],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def responses(rows=ANSWERS, tokenizer=TOKENIZER, max_length=512):
    pairs, _ = load_pairs(rows, tokenizer, EncodeOptions(max_length))
    return [response for pair in ResponsePairs(pairs, tokenizer) for response in pair]


def source(model, *, context=None, **options):
    return load_source(
        "redistribution", {"model": model} | options, context or Context(MODEL, TOKENIZER)
    )


def rewards(made, given):
    assert [made.check(response) for response in given] == [None] * len(given)
    return [found["token_rewards"].double().numpy() for found in made.score(given)]


def same(found, wanted, tolerance=1e-5):
    scale = max(1.0, np.abs(wanted).max())
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("tokenizer", [None, judge_tokenizer], ids=["same", "other"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_every_token_gets_what_its_beginning_adds(kind, tokenizer):
    path = judge(kind, tokenizer)
    for found, response in zip(rewards(source(path), responses()), responses(), strict=True):
        wanted, whole, empty = expected(path, response)
        same(found, wanted)
        same(found.sum(), whole - empty)
        assert len(set(found)) > len(found) / 3  # the numbers are those of a model that looks


@pytest.mark.parametrize("beta_c", [1.0, 0.5, 0.0])
def test_the_sum_is_kept(beta_c):
    """To the rounding of the stream, whatever the two tokenizers do to a character."""
    made = source(judge("llama", judge_tokenizer), beta_c=beta_c)
    given = responses([{"prompt": "e\u0302?", "chosen": MARKS, "rejected": TEXTS[0]}])
    for response, found in zip(given, rewards(made, given), strict=True):
        reading = made.reading(response)
        (scores,) = made.reward_model.of_beginnings([reading.ids])
        whole, empty = scores[-1], scores[reading.first - 1]
        total = beta_c * (whole - empty) + (1 - beta_c) * whole
        assert abs(found.sum() - total) <= 1e-6 * max(np.abs(found).sum(), abs(total))


@pytest.mark.parametrize("beta_c", [0.0, 0.3])
def test_the_mix_of_both_rewards(beta_c):
    path = judge("llama", judge_tokenizer)
    (response, _) = responses()
    wanted, _, _ = expected(path, response, beta_c=beta_c)
    (found,) = rewards(source(path, beta_c=beta_c), [response])
    same(found, wanted)
    if beta_c == 0:  # R(x, y) where the answer ends, and nothing elsewhere
        assert np.flatnonzero(found).tolist() == [response.content]


TINIEST = {"hidden_size": 2, "num_hidden_layers": 0, "rms_norm_eps": 0.0}
TINIEST |= {"num_attention_heads": 1, "num_key_value_heads": 1}


def test_numbers_by_hand():
    """R after a token is a number of that token alone: a model without layers, of which the norm
    leaves unit vectors as they are.
    """
    model = judge_of("llama", TOKENIZER, **TINIEST)
    value = (torch.arange(len(TOKENIZER)) * 37 % 101) / 101
    rows = torch.stack([value, (1 - value**2).sqrt()], 1)
    model.model.embed_tokens.weight.data = rows
    model.score.weight.data = torch.tensor([[0.5**0.5, 0.0]])
    path = folder("by_hand")
    model.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    (response, _) = responses([{"prompt": "a?", "chosen": "xyz", "rejected": "q"}])
    # x, y, z, <|im_end|> and the end of line after it, which comes after what ends the answer
    x, y, z, end, line = response.ids.tolist()
    before = response.prompt_ids[-1]
    v = {i: (i * 37 % 101) / 101 for i in (before, x, y, z, end, line)}
    wanted = [v[x] - v[before], v[y] - v[x], v[z] - v[y], v[line] - v[z], 0.0]
    (found,) = rewards(source(str(path)), [response])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    (found,) = rewards(source(str(path), beta_c=0.25), [response])
    wanted = np.array(wanted) / 4 + [0, 0, 0, 0.75 * v[line], 0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


# scores, held, ends, end -> rewards
CARRIED = {
    "one to one": ([1, 2, 4, 8], [[0, 1], [1, 2], [2, 2]], [1, 2, 2], 2, [1, 2, 4]),
    "the judge's token holds two": ([1, 2, 4], [[0, 2], [2, 2]], [1, 2, 2], 2, [0, 1, 2]),
    "the policy's token holds two": ([1, 2, 4, 8], [[0, 1], [1, 2], [2, 2]], [2, 2], 1, [3, 4]),
    "a character of two tokens": ([1, 2, 4, 8], [[0, 0], [0, 1], [1, 2]], [0, 1, 2], 2, [0, 3, 4]),
    "they overlap": ([0, 3, 5], [[0, 2], [2, 4]], [1, 3, 4], 2, [0, 3, 2]),
    "no end": ([1, 2, 4], [[0, 1], [1, 1]], [1], 0, [3]),
    "nothing is held": ([1, 2], [[0, 0]], [0, 0], 0, [1, 0]),
    "nothing is read": ([1], np.zeros((0, 2)), [0, 0], 1, [0, 0]),
}


@pytest.mark.parametrize("case", CARRIED)
def test_carried_over(case):
    scores, held, ends, end, wanted = CARRIED[case]
    found = carried_over(np.array(scores, float), np.asarray(held), np.array(ends), end)
    assert found.tolist() == wanted
    assert found.sum() == scores[-1] - scores[0]


def test_where_tokens_end():
    # a token outside the text, one with half a character, its rest with what follows, one that the
    # tokenizer leaves without a blank
    offsets = [(0, 0), (0, 2), (1, 2), (1, 3), (4, 5), (0, 0)]
    reach, ends = token_ends(offsets)
    assert reach.tolist() == [0, 2, 2, 3, 5, 5]
    assert ends.tolist() == [0, 1, 1, 3, 5, 5]


# -- what the reward model reads


def test_plain_text():
    """Rows and tokenizers without turns, and a reward model that adds its own special tokens."""
    plain = tiny_tokenizer(chat=False)
    given = responses([{"prompt": "the fox? ", "chosen": TEXTS[0], "rejected": "no"}], plain)
    path = judge("llama", judge_tokenizer)
    for found, response in zip(rewards(source(path), given), given, strict=True):
        assert isinstance(response.prompt, str)
        same(found, expected(path, response)[0])
    made = source(judge("bert", word_tokenizer), prefixes="separate")
    reading = made.reading(given[1])
    words = made.reward_model.tokenizer.convert_ids_to_tokens(reading.ids)
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
    assert reading.held.tolist()[-2:] == [[*reading.held[-2]], [2, 2]]


def test_messages():
    """The tokens of an assistant's message add up to what the reward model says before the next one
    less what it said before: how that changes over what the tool returns is the call's.
    """
    path = judge("llama", judge_tokenizer)
    made, (response, _) = source(path), responses([TURNS])
    (found,) = rewards(made, [response])
    reading = made.reading(response)
    (scores,) = made.reward_model.of_beginnings([reading.ids])
    tokenizer = made.reward_model.tokenizer
    said = [tokenizer.decode(reading.ids[:n]) for n in range(len(reading.ids) + 1)]

    def after(text):
        return scores[next(n for n, x in enumerate(said) if x.endswith(text)) - 1]

    sums = [found[response.messages == i].sum() for i in range(2)]
    before = scores[reading.first - 1]
    assert sums[0] == pytest.approx(after("42 owl</s>[assistant] ") - before, abs=1e-5)
    assert sums[1] == 0
    inside = (response.messages == 2) & (np.arange(len(found)) < response.content)
    last = after("[assistant] it is 東京")
    assert found[inside].sum() == pytest.approx(last - after("owl</s>[assistant] "), abs=1e-5)
    assert found[response.content :].sum() == pytest.approx(scores[-1] - last, abs=1e-5)


@pytest.mark.parametrize("text", ["  the owl  \n", "\n\n🦊", "x"])
@pytest.mark.parametrize("trim", [True, False])
def test_blanks_around_an_answer(text, trim):
    """The judge's template drops them or keeps them: the policy's tokens of blanks that nobody has
    read get 0, and the sum is kept.
    """

    def tokenizer():
        return judge_tokenizer(trim=trim)

    made = source(judge("llama", tokenizer))
    prompt = [{"role": "user", "content": "the fox?"}]
    row = {"prompt": prompt, "chosen": [{"role": "assistant", "content": text}]}
    row |= {"rejected": [{"role": "assistant", "content": "no"}]}
    (response, _) = responses([row])
    assert response.text == text
    (found,) = rewards(made, [response])
    reading = made.reading(response)
    (scores,) = made.reward_model.of_beginnings([reading.ids])
    same(found.sum(), scores[-1] - scores[reading.first - 1])
    kept = text.strip() if trim else text
    assert made.reward_model.tokenizer.decode(reading.ids).endswith(f"[assistant] {kept}</s>")
    if trim:
        blank = [i for i, (a, b) in enumerate(response.spans) if b > a and not text[a:b].strip()]
        assert not found[blank].any()


def test_an_answer_that_was_cut():
    path = judge("llama", judge_tokenizer)
    whole, _ = responses([{"prompt": "what is better?", "chosen": TEXTS[0], "rejected": "no"}])
    length = len(whole.prompt_ids) + 16
    cut, _ = responses(
        [{"prompt": "what is better?", "chosen": TEXTS[0], "rejected": "no"}], max_length=length
    )
    assert cut.content == len(cut.ids) == 16
    made = source(path)
    (found,) = rewards(made, [cut])
    reading = made.reading(cut)
    said = made.reward_model.tokenizer.decode(reading.ids)
    assert said.endswith(f"[assistant] {cut.text}</s>") and TEXTS[0] not in said
    (scores,) = made.reward_model.of_beginnings([reading.ids])
    same(found.sum(), scores[-1] - scores[reading.first - 1])
    assert found[-1] != 0  # what ends the turn goes to the last token


def test_an_empty_answer():
    response, _ = responses([{"prompt": "the fox?", "chosen": "no", "rejected": "yes"}])
    end = response.ids[response.content :]
    empty = replace(response, text="", completion="", ids=end, content=0)
    path = judge("llama", judge_tokenizer)
    (found,) = rewards(source(path), [empty])
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    head = "<s>[user] the fox?</s>[assistant] "
    (before, after) = (
        alone(model, judge_tokenizer()(text)["input_ids"]) for text in (head, f"{head}</s>")
    )
    same(found, [after - before, *[0.0] * (len(end) - 1)])


def test_an_answer_that_stands_in_the_prompt_too():
    """It is looked for where another answer would stand."""
    path = judge("llama", judge_tokenizer)
    (response, _) = responses([{"prompt": "a owl? no", "chosen": "a", "rejected": "no"}])
    same(rewards(source(path), [response])[0], expected(path, response)[0])


def test_a_token_on_both_sides_of_the_beginning():
    """It is the answer's: R(x, empty) is R before it."""
    path = judge("llama", judge_tokenizer)
    (response, _) = responses([{"prompt": "x", "chosen": "the owl", "rejected": "no"}])
    made = source(path)
    reading = made.reading(response)
    tokens = [made.reward_model.tokenizer.decode([i]) for i in reading.ids]
    assert tokens[reading.first - 1 : reading.first + 2] == ["]", " the ", "owl"]
    assert reading.held.tolist() == [[0, 4], [4, 7], [7, 7]]
    same(rewards(made, [response])[0], expected(path, response)[0])


def test_tools_and_options_of_the_template_are_passed_on():
    made = source(judge())
    tools = [{"name": "clock"}]
    (response, _) = responses(
        [ANSWERS[0] | {"tools": tools, "chat_template_kwargs": {"style": "s"}}]
    )
    said = TOKENIZER.decode(made.reading(response).ids)
    assert json.dumps(tools) in said and "<|im_start|>style\ns" in said


# -- how it is read


@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
@pytest.mark.parametrize("prefixes", ["together", "separate"])
def test_padding(pad, prefixes):
    """Of a model whose padding ends turns as well, whose own forward then reads the token before,
    and of one that has none and runs one row at a time.
    """
    tokenizer = judge_tokenizer()
    token = None if pad is None else tokenizer.convert_tokens_to_ids(pad)
    path = judge("llama", judge_tokenizer, pad_token_id=token)
    for found, response in zip(
        rewards(source(path, prefixes=prefixes), responses()), responses(), strict=True
    ):
        same(found, expected(path, response)[0])


def test_the_padding_token_is_in_the_settings():
    """The same weights read an earlier position of texts that end in their padding token."""
    path, other = judge("llama", judge_tokenizer), folder("other_pad")
    shutil.copytree(path, other, dirs_exist_ok=True)
    config = json.loads((other / "config.json").read_text())
    config["pad_token_id"] = judge_tokenizer().eos_token_id
    (other / "config.json").write_text(json.dumps(config))
    one, other = source(path), source(str(other))
    assert one.reward_model.fingerprint == other.reward_model.fingerprint
    assert not np.allclose(rewards(one, responses())[0], rewards(other, responses())[0])
    assert one.settings() != other.settings()


@pytest.mark.parametrize("tokens", [1, 60, 4096])
def test_batching_changes_roundings_only(tokens):
    seen = []
    context = Context(MODEL, TOKENIZER, tokens_per_batch=tokens, on_tokens=seen.append)
    made, given = source(judge(), context=context), responses([*ANSWERS, TURNS])
    found = rewards(made, given)
    for a, b in zip(found, rewards(source(judge()), given), strict=True):
        same(a, b)
    seen.clear()
    made.score(given)
    assert sum(seen) == sum(len(made.reading(x).ids) for x in given)


@pytest.mark.parametrize("kind", ["bert", "deberta-v2"])
def test_models_that_look_ahead(kind):
    path = judge(kind, word_tokenizer)
    with pytest.raises(ValueError, match=r"rewards\.prefixes: expected .*, got .*Classification "):
        source(path)
    made = source(path, prefixes="separate")
    given = responses([{"prompt": "the fox?", "chosen": "The old owl, déjà", "rejected": "no"}])
    for response, found in zip(given, rewards(made, given), strict=True):
        reading = made.reading(response)
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
        ends = range(reading.first, len(reading.ids) + 1)
        scores = np.array([alone(model, reading.ids[:end]) for end in ends])
        end = response.content
        same(found, carried_over(scores, reading.held, response.spans[:, 1], end))
        # words are found by their places, which their tokens do not spell
        for (a, b), token in zip(reading.held, reading.ids[reading.first :], strict=True):
            if b > a and response.text[a:b].strip().isascii():
                word = made.reward_model.tokenizer.decode([token]).removeprefix("##")
                assert response.text[a:b].strip().lower() == word


@pytest.mark.parametrize("leak", ["later tokens", "nothing is a number"])
def test_a_head_that_cannot_be_read_together_is_seen(leak):
    made = source(judge())

    def spoil(module, inputs, output):
        hidden = output[0]
        spoilt = (
            hidden + hidden.mean(1, keepdim=True) if leak == "later tokens" else hidden * np.nan
        )
        output["last_hidden_state"] = spoilt
        return output

    made.reward_model.model.base_model.register_forward_hook(spoil)
    with pytest.raises(
        ValueError, match=r"rewards\.prefixes: expected .* LlamaForSequence.* differ"
    ):
        made.score(responses())


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_steps(step):
    """R is read at every step and at the end, and is linear in between."""
    made = source(judge(), prefixes="separate", step=step)
    (response, _) = responses()
    (found,) = rewards(made, [response])
    reading = made.reading(response)
    model = made.reward_model.model
    first, last = reading.first, len(reading.ids)
    ends = [n for n in range(first, last) if (n - first) % step == 0] + [last]
    scores = [alone(model, reading.ids[:end]) for end in ends]
    filled = []
    for (a, b), (u, v) in zip(itertools.pairwise(ends), itertools.pairwise(scores), strict=True):
        filled += [u + (v - u) * (n - a) / (b - a) for n in range(a, b)]
    filled = np.array([*filled, scores[-1]])
    same(found, carried_over(filled, reading.held, response.spans[:, 1], response.content))
    same(found.sum(), scores[-1] - scores[0])


def test_separate_beginnings_of_one_answer_at_a_time(monkeypatch):
    """Those of all answers of a part together would be millions of tokens."""
    made, given, seen = source(judge(), prefixes="separate"), responses([*ANSWERS, TURNS]), []
    of_texts = made.reward_model.of_texts
    monkeypatch.setattr(
        made.reward_model, "of_texts", lambda rows: seen.append(rows) or of_texts(rows)
    )
    rewards(made, given)
    readings = [made.reading(x) for x in given]
    wanted = [[x.ids[:n] for n in range(x.first, len(x.ids) + 1)] for x in readings]
    assert seen == wanted


@pytest.mark.parametrize(("label", "index"), [("1", 1), ("good", 2), (0, 0)])
def test_labels(label, index):
    names = (("bad", 0), ("fair", 1), ("good", 2))
    path = judge("llama", judge_tokenizer, num_labels=3)
    model = AutoModelForSequenceClassification.from_pretrained(path)
    model.config.id2label = {i: name for name, i in names}
    model.config.label2id = dict(names)
    model.config.save_pretrained(path)
    (response, _) = responses()
    made = source(path, label=label)
    assert made.settings()["label"] == index
    same(rewards(made, [response])[0], expected(path, response, label=index)[0])


def test_dtypes():
    path = judge()
    exact = rewards(source(path), responses())
    made = source(path, dtype="bfloat16")
    assert made.settings()["dtype"] == "torch.bfloat16"
    for found, wanted in zip(rewards(made, responses()), exact, strict=True):
        assert 0 < np.abs(found - wanted).max() < 0.05 * np.abs(wanted).max()


# -- what is refused


def broken(kind, tokenizer=None, **config):
    """A folder with another model's weights, without a tokenizer where none is given."""
    path = folder("broken")
    judge_of(kind, TOKENIZER, **config).save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)


def a_causal_lm():
    path = folder("causal")
    MODEL.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return str(path)


REFUSED = {
    "no folder": (lambda: "no/such/folder", {}, r"rewards\.model: no such folder: no/such/folder"),
    "two labels": (
        lambda: judge("llama", None, num_labels=2),
        {},
        r"rewards\.label: expected one of the labels 0 'LABEL_0', 1 'LABEL_1', .* got none",
    ),
    "another label": (judge, {"label": "good"}, r"rewards\.label: .* 0 'LABEL_0', got 'good'"),
    "a label too many": (judge, {"label": "1"}, r"rewards\.label: .* 0 'LABEL_0', got '1'"),
    "no head": (a_causal_lm, {}, r"rewards\.model: .* sequence classifier .* lacks score\.weight"),
    "encoder-decoder": (
        lambda: broken("t5", TOKENIZER),
        {"prefixes": "separate"},
        r"rewards\.model: expected a decoder or an encoder alone, got .* \(model_type 't5'\)",
    ),
    "no tokenizer": (lambda: broken("llama"), {}, r"rewards\.model: expected .* with a tokenizer"),
    "no such tokenizer": (judge, {"tokenizer": "./none"}, r"rewards\.tokenizer: no such folder"),
    "prefixes": (
        judge,
        {"prefixes": "apart"},
        "prefixes: expected one of together, separate, got 'apart'",
    ),
    "step": (judge, {"step": 2}, "step: expected 1 with prefixes 'together', .* got 2"),
    "no step": (judge, {"step": 0}, "step: expected a positive integer, got 0"),
    "half a step": (judge, {"step": 1.5}, r"step: expected an integer, got 1\.5"),
    "beta_c": (judge, {"beta_c": 1.5}, r"beta_c: expected a number in \[0, 1\], got 1\.5"),
    "beta_c is nan": (judge, {"beta_c": float("nan")}, "beta_c: expected a number in"),
    "dtype": (judge, {"dtype": "int8"}, "dtype: expected auto, float32, .* got 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    path, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        source(path(), **options)


def test_a_model_is_needed():
    with pytest.raises(ValueError, match=r"rewards\.model: expected a value"):
        load_source("redistribution", {}, Context(MODEL, TOKENIZER))


def test_a_slow_tokenizer_is_refused(monkeypatch):
    class Slow:
        is_fast = False

    monkeypatch.setattr("treg.rewards.reward_model.load_tokenizer", lambda *_: Slow())
    with pytest.raises(ValueError, match=r"rewards\.model: expected a fast tokenizer.* got Slow"):
        source(judge())


def test_messages_need_a_template():
    path = judge("llama", lambda: tiny_tokenizer(chat=False))
    with pytest.raises(
        ValueError, match="row 0 holds messages, and the reward model's tokenizer has"
    ):
        source(path).check(responses()[0])


def test_another_models_tokenizer():
    made = source(judge("llama", None), tokenizer=judge("gpt2", judge_tokenizer))
    with pytest.raises(ValueError, match=r"rewards\.tokenizer: expected ids below \d+, .* got \d+"):
        for response in responses():
            made.check(response)


PROBLEMS = {
    "template": (
        {"prompt": [{"role": "critic", "content": "x"}], "chosen": "yes", "rejected": "no"},
        "row 0: chat template: .*no critics",
    ),
    "another form": (
        {"prompt": "the fox?", "chosen": "e\u0302 owl", "rejected": "no"},
        "row 0: answer not found: its text differs from what its tokens say: .* form NFC",
    ),
    "another text": (None, "row 0: answer not found: its text differs"),
    "too long": (ANSWERS[0], r"row 0: answer too long for the reward model: \d+ tokens, .* 30 pos"),
}


@pytest.mark.parametrize("case", PROBLEMS)
def test_rows_that_are_refused(case):
    row, message = PROBLEMS[case]
    positions = 30 if case == "too long" else 512
    made = source(judge("llama", judge_tokenizer, max_position_embeddings=positions))
    if case == "another form":
        composing = tiny_tokenizer()
        composing.backend_tokenizer.normalizer = NFC()
        response = responses([row], composing)[0]
    elif row is None:
        response = replace(responses()[0], text="another", completion="another")
    else:
        response = responses([row])[0]
    problem = made.check(response)
    assert isinstance(problem, RowProblem)
    with pytest.raises(RowProblem, match=message):
        raise problem


def test_a_template_that_changes_the_answer():
    def tokenizer():
        own = tiny_tokenizer()
        own.chat_template = own.chat_template.replace("m.content", "m.content | upper")
        return own

    problem = source(judge("llama", tokenizer)).check(responses()[0])
    assert isinstance(problem, RowProblem) and problem.reason == "answer not found"


# -- with the rest


def test_a_file(tmp_path):
    path, output = judge("llama", judge_tokenizer), tmp_path / "a.parquet"
    options = AnnotateOptions(rewards="redistribution", rewards_options={"model": path})
    annotate(MODEL, TOKENIZER, ANSWERS, output, options, progress=False)
    (example,), meta = read_annotated(output)
    for response in responses():
        same(example[f"{response.side}_token_rewards"], expected(path, response)[0])
    settings = meta["streams"]["token_rewards"]["settings"]
    assert settings["beta_c"] == 1.0 and settings["prefixes"] == "together"
    other = replace(options, rewards_options={"model": judge("qwen2", judge_tokenizer)})
    with pytest.raises(ValueError, match=r"made with .*, now it is"):
        annotate(MODEL, TOKENIZER, ANSWERS, output, other, progress=False)
    score_checked(source(path), responses())


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "lora"])
def test_what_trl_trains(tmp_path, adapters):
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import RewardConfig, RewardTrainer

    base, output = judge("qwen2", judge_tokenizer), tmp_path / "reward"
    rows = [
        {side: [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for side, text in (("chosen", TEXTS[0]), ("rejected", TEXTS[1]))
    ]
    trainer = RewardTrainer(
        base,
        args=RewardConfig(
            str(output), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, bf16=False
        ),
        train_dataset=Dataset.from_list([rows[0] | rows[1]] * 16),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(task_type="SEQ_CLS", r=4) if adapters else None,
    )
    trainer.train()
    trainer.save_model()
    made = source(str(output))
    assert made.reward_model.fingerprint != source(base).reward_model.fingerprint
    model = AutoModelForSequenceClassification.from_pretrained(
        base if adapters else output, num_labels=1
    )
    if adapters:
        model = PeftModel.from_pretrained(model, output)
    for response, found in zip(responses(), rewards(made, responses()), strict=True):
        reading = made.reading(response)
        ends = range(reading.first, len(reading.ids) + 1)
        scores = np.array([alone(model.eval(), reading.ids[:end]) for end in ends])
        wanted = carried_over(scores, reading.held, response.spans[:, 1], response.content)
        same(found, wanted)


@pytest.mark.slow
def test_real_tokenizers_and_answers():
    """GPT-2's tokens for the policy, Qwen2.5's and its template for the judge."""
    policy = GPT2TokenizerFast.from_pretrained(shared_data("tok", "gpt2"))
    policy.chat_template = tiny_tokenizer().chat_template
    with open(shared_data("prefs", "ultrafeedback_eval.jsonl")) as file:
        rows = [json.loads(line) for line in itertools.islice(file, 6)]
    given = responses(rows, policy, max_length=400)

    def tokenizer():
        return AutoTokenizer.from_pretrained(shared_data("tok", "qwen2.5"))

    made = source(judge("qwen2", tokenizer, max_position_embeddings=4096))
    assert len(given) > 6
    for response, found in zip(given, rewards(made, given), strict=True):
        reading = made.reading(response)
        (scores,) = made.reward_model.of_beginnings([reading.ids])
        total = scores[-1] - scores[reading.first - 1]
        assert found.sum() == pytest.approx(total, abs=1e-5 * np.abs(found).sum())
        said = made.reward_model.tokenizer.decode(reading.ids[reading.first :])
        assert said.strip().startswith(response.text.strip()[:20])
