"""Texts that are tokenized in pieces: the tokens are those of the whole texts."""

import random

import pytest
from tiny import CHATML, END, bot, shared_data, tiny_tokenizer, usr
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from treg.data import EncodeOptions, RowProblem, encode, load_pairs
from treg.data.cuts import CutTexts, cutting_tokens
from treg.data.rows import parse_row

PIECES = [
    *("<|im_start|>", END, "<|im_", "start|>", "<|pad|>", "user\n", "assistant\n", " ", "\n\n"),
    *("a", "1.5", "é東🙂", "<", "|>", "'s", "  fox", "▁", "\r\n", "Once upon a time"),
]


def metaspace(**token):
    """Words of characters, with a mark of the beginning of a text; the added token as given."""
    letters = {x: i for i, x in enumerate(sorted({*"".join(PIECES), "▁", "?"}))}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True, **token), END])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML)


def qwen():
    return AutoTokenizer.from_pretrained(shared_data("tok", "qwen2.5"))


@pytest.mark.parametrize(
    "make",
    [tiny_tokenizer, lambda: tiny_tokenizer(crossing=True), metaspace, qwen],
    ids=["bytes", "crossing", "metaspace", "qwen"],
)
def test_tokens_are_those_of_the_whole_texts(make):
    tokenizer, chance = make(), random.Random(0)
    tokens = cutting_tokens(tokenizer)
    assert {"<|im_start|>", END} <= set(tokens)
    groups = []
    for _ in range(150):
        shared, *own = ("".join(chance.choices(PIECES, k=chance.randrange(12))) for _ in range(4))
        groups.append([shared + x for x in own])
    cut = CutTexts(groups, tokens)
    options = {"add_special_tokens": False, "return_offsets_mapping": True}
    pieces = tokenizer(cut.pieces, **options)
    found = list(cut.joined(pieces["input_ids"], pieces["offset_mapping"]))
    texts = [x for group in groups for x in group]
    whole = tokenizer(texts, **options)
    assert found == list(zip(whole["input_ids"], whole["offset_mapping"], strict=True))
    assert sum(map(len, cut.pieces)) < sum(map(len, texts))  # some were cut


def test_no_cut_at_a_token_that_reaches_beyond_itself():
    tokenizer = tiny_tokenizer()
    # the longer one is taken where it stands, the one with lstrip takes the blanks before it
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>user"]})
    assert cutting_tokens(tokenizer) == (END,)
    assert cutting_tokens(metaspace(lstrip=True)) == (END,)
    assert cutting_tokens(tiny_tokenizer(chat=False)) == ()


ROW = {"prompt": [usr("q")], "chosen": [bot("yes")], "rejected": [bot("no")]}


def ids_of(tokenizer, row=ROW, max_length=None):
    pair = encode(parse_row(row, "row 0", chat=True), tokenizer, max_length)
    return [x.tolist() for x in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


def test_what_changes_in_a_tokenizer_is_seen():
    split, tokenizer = tiny_tokenizer(), tiny_tokenizer()
    split.split_special_tokens = True
    before = ids_of(tokenizer)
    tokenizer.split_special_tokens = True
    assert ids_of(tokenizer) == ids_of(split) != before
    # a prompt that only tokens which were added since make short enough
    tokenizer = tiny_tokenizer()
    row = {**ROW, "prompt": [usr("z" * 1000)]}
    with pytest.raises(RowProblem, match="prompt too long"):
        ids_of(tokenizer, row, 20)
    tokenizer.add_tokens(["z" * 500])
    assert ids_of(tokenizer, row, 20)[0].count(len(tokenizer) - 1) == 2


@pytest.mark.parametrize("prompt", [[usr("q")], "q"], ids=["messages", "text"])
def test_a_template_for_tools_alone_serves_rows_with_tools(prompt):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    template = "{{ tools | length }}" + CHATML
    text = prompt == "q"
    row = {**ROW, "prompt": prompt, "tools": tools}
    if text:
        row |= {"chosen": "yes", "rejected": "no"}
    found = []
    for templates in ({"tool_use": template}, {"tool_use": template, "default": CHATML}):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = templates
        pairs, _ = load_pairs([row], tokenizer, EncodeOptions())
        found.append([x.tolist() for x in (pairs[0].prompt_ids, pairs[0].chosen_ids)])
    assert found[0] == found[1]
