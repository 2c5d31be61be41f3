"""Tokenizers without offsets: their tokens are placed by what they decode to."""

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from tests.support.tiny import CHATML, bot, usr
from treg.data import EncodeOptions, RowProblem, load_pairs
from treg.data.pieces import text_places

BLANK = "▁"
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = {
    "prompt": [usr("q?")],
    "chosen": [bot("a é b"), usr("again?"), bot("the  fox\n")],
    "rejected": [bot("zz")],
}
ROWS = {  # of messages where there is a template
    "blanks": {"prompt": "quest ", "chosen": "ab  ", "rejected": "c"},
    "leading blank": {"prompt": " quest", "chosen": " ab", "rejected": " c d"},
    "newline": {"prompt": "quest\n", "chosen": "é 東", "rejected": "c"},
    "own ends": {"prompt": "<s>quest", "chosen": "ab</s>", "rejected": "c"},
    "turns": TURNS,
}


def fast_tokenizer():
    """Letters, a blank before the text and in the place of each blank, the rest as bytes; with
    beginning and end of sequence.
    """
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "[/INST]": 4}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    for char in BLANK + "abcdefghijklmnopqrstuvwxyz?":
        vocab[char] = len(vocab)
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    replace = normalizers.Replace(" ", BLANK)
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), replace])
    fuse = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*fuse, decoders.Strip(" ", 1, 0)])
    ends = [("<s>", 1), ("</s>", 2)]
    bpe.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["[INST]", "[/INST]"],
    )


class Slow(transformers.PreTrainedTokenizer):
    """The same ids as `fast_tokenizer`, without offsets. keeps: whether its decoder keeps the blank
    before the text; drops: whether it drops blanks at both ends.
    """

    def __init__(self, keeps, drops, **more):
        self.inner = fast_tokenizer().backend_tokenizer
        self.keeps, self.drops = keeps, drops
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more)

    @property
    def vocab_size(self):
        return self.inner.get_vocab_size()

    def get_vocab(self):
        return self.inner.get_vocab()

    def _tokenize(self, text, **more):
        return self.inner.encode(text, add_special_tokens=False).tokens

    def _convert_token_to_id(self, token):
        return self.inner.token_to_id(token)

    def _convert_id_to_token(self, index):
        return self.inner.id_to_token(index)

    def build_inputs_with_special_tokens(self, ids, more=None):
        return [1, *ids, 2]

    def convert_tokens_to_string(self, tokens):
        text = self.inner.decoder.decode(tokens)
        if self.keeps and tokens and tokens[0].startswith(BLANK):
            text = " " + text
        return text.strip(" ") if self.drops else text


SLOW = [(False, False), (True, False), (False, True)]


@pytest.mark.parametrize("keeps, drops", SLOW)
@pytest.mark.parametrize("name", ROWS)
def test_masks_are_those_of_the_fast_tokenizer(name, keeps, drops):
    fast = fast_tokenizer()
    slow = Slow(keeps, drops, additional_special_tokens=["[INST]", "[/INST]"])
    fast.chat_template = slow.chat_template = LLAMA if name == "turns" else None
    ((want,), _) = load_pairs([ROWS[name]], fast, strict=True)
    ((pair,), _) = load_pairs([ROWS[name]], slow, strict=True)
    assert pair.prompt_ids.tolist() == want.prompt_ids.tolist()
    for side in ("chosen", "rejected"):
        assert getattr(pair, f"{side}_ids").tolist() == getattr(want, f"{side}_ids").tolist()
        found, expected = pair.answers[side], want.answers[side]
        assert found.scored.tolist() == expected.scored.tolist()
        assert found.content.tolist() == expected.content.tolist() and found.content.any()


def test_bytes_of_byt5_by_hand():
    """One token a byte, and an end of sequence that takes the blanks around it."""
    tokenizer = transformers.ByT5Tokenizer()
    row = {"prompt": "quest ", "chosen": "a é", "rejected": "c"}
    ((pair,), _) = load_pairs([row], tokenizer, strict=True)
    assert pair.prompt_ids.tolist() == [x + 3 for x in b"quest "]
    assert pair.chosen_ids.tolist() == [*(x + 3 for x in "a é".encode()), 1]
    answer = pair.answers["chosen"]
    assert answer.scored.all() and answer.content.tolist() == [True] * 4 + [False]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }} {{ eos_token }} {% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ((pair,), _) = load_pairs([TURNS], tokenizer, EncodeOptions(None), strict=True)
    said = [*"a é b".encode(), *b"the  fox\n"]
    answer = pair.answers["chosen"]
    # the blanks before an end of sequence are in no token
    assert pair.chosen_ids[answer.content].tolist() == [x + 3 for x in said[:-1]]
    assert pair.chosen_ids[answer.scored].tolist() == [
        *(x + 3 for x in "a é b".encode()),
        1,
        *(x + 3 for x in b"the  fox"),
        1,
    ]


PLACES = {
    "as it is": (["ab", "", " c"], "ab c", [(0, 2), (2, 2), (2, 4)]),
    "a blank of the decoder": ([" ab", " c"], "ab c", [(0, 2), (2, 4)]),
    "the first blank dropped": (["ab", " c"], " ab c", [(1, 3), (3, 5)]),
    "blanks merged": (["ab", " c"], "ab \n c\n", [(0, 2), (2, 6)]),
    "blanks dropped": (["ab", "c"], "ab\tc ", [(0, 2), (3, 4)]),
    "a blank alone": (["ab", " ", "c"], "abc", [(0, 2), (2, 2), (2, 3)]),
    "another text": (["ab", "d"], "abc", None),
    "less": (["ab"], "abc", None),
    "more": (["abc", "d"], "abc", None),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_of_tokens(case):
    pieces, text, places = PLACES[case]
    assert text_places(pieces, text) == places


def test_a_row_without_places_is_counted_and_not_the_end():
    class Lower(transformers.ByT5Tokenizer):
        def _tokenize(self, text):
            return super()._tokenize(text.lower())

    tokenizer = Lower()
    tokenizer.chat_template = CHATML
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "Q", "chosen": "a", "rejected": "b"},
    ]
    pairs, report = load_pairs(rows, tokenizer)
    assert len(pairs) == 1 and report.dropped == {"tokens unplaced": 1}
    with pytest.raises(RowProblem, match=r"row 1.*tokens unplaced"):
        load_pairs(rows, tokenizer, strict=True)
