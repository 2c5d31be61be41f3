"""Texts that are tokenized in pieces: the tokens are those of the whole texts."""

import random

import pytest
from tiny import CHATML, END, shared_data, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from treg.data.cuts import CutTexts, cutting_tokens

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
