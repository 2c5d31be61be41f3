"""Reward models, and other models that a source loads, as folders: small enough to be built."""

import functools
import tempfile
from pathlib import Path

import torch
from tiny import TEXT, seeded, tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

FOLDERS = tempfile.TemporaryDirectory()  # goes with the process
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
COMMON |= {"intermediate_size": 64, "initializer_range": 0.3, "max_position_embeddings": 512}
GROUPED = COMMON | {"num_key_value_heads": 2}
SIZES = {
    "llama": GROUPED,
    "qwen2": GROUPED,
    "gemma2": GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3},
    "bert": COMMON,
    "deberta-v2": COMMON,
    "t5": {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 4, "d_kv": 8},
}
TURNS = (
    "{{ '<s>' }}{% for m in messages %}"
    "{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "[{{ m.role }}] {{ m.content TRIM }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def folder(name: str) -> Path:
    """A new folder for a model."""
    return Path(tempfile.mkdtemp(prefix=name, dir=FOLDERS.name))


@functools.cache
def judge_tokenizer(*, trim: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with other merges and another template than `tiny_tokenizer`; merges cross the
    bounds of words, and those between the assistant's header and its answer.

    trim: its template strips contents.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tiny_tokenizer().backend_tokenizer.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=["<pad>", "<s>", "</s>"],
    )
    lines = TEXT.splitlines()
    bpe.train_from_iterator([*lines, *(f"[assistant] {line}" for line in lines)] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TURNS.replace("TRIM", "| trim" if trim else ""),
    )


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words in lower case, as BERT has them: what it decodes to is not the text."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer()
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    pieces.train_from_iterator(TEXT.splitlines(), trainer)
    pieces.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(x, pieces.token_to_id(x)) for x in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        chat_template=TURNS.replace("TRIM", ""),
    )


def judge_of(kind: str, tokenizer: PreTrainedTokenizerFast, **config):
    """A sequence classifier with random weights, the same at every call."""
    settings = SIZES[kind] | {
        "vocab_size": len(tokenizer),
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    made = AutoConfig.for_model(kind, **settings | config)
    return seeded(lambda: AutoModelForSequenceClassification.from_config(made).eval())


@functools.cache
def judge(kind: str = "llama", tokenizer=None, **config) -> str:
    """A folder with a sequence classifier and its tokenizer: that of `tiny_tokenizer` by default.

    tokenizer: a function that makes another.
    """
    own = tiny_tokenizer() if tokenizer is None else tokenizer()
    path = folder(kind)
    judge_of(kind, own, **config).save_pretrained(path)
    own.save_pretrained(path)
    return str(path)


@functools.cache
def causal_lm(seed: int = 1, **config) -> str:
    """A folder with a causal LM, a small step from `tiny_llama`, and with its tokenizer. seed: of
    the step; 0: none.
    """
    tokenizer, path = tiny_tokenizer(), folder("causal_lm")
    model = tiny_llama(len(tokenizer), **config)
    if seed:
        step_away(model, seed)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def step_away(model: torch.nn.Module, seed: int) -> None:
    """Add noise of a tenth of its size to every weight."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * parameter.data.std() * noise
