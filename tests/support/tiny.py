"""Tokenizers and models small enough to be built in code, and where the real data lies."""

from pathlib import Path
from typing import Any

import torch
from surroundings import environment as environment
from surroundings import shared_data as shared_data
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from treg.data.annotated import stream_columns, write_annotated

TEXT = (
    "Once upon a time there was a little fox who lived in a wood. "
    "The fox asked the old owl: what is better, the sun or the\n"
    "moon? The owl said that the answer is 42. "
    '"Rewrite the answer of the assistant," said the user, "and keep it short."\n'
    "Here is a conversation: the system says hello, the assistant answers, the user is happy. "
    "3 + 4 = 7; f(x) = x - 1.\n"
)
END, PAD = "<|im_end|>", "<|pad|>"
CHATML = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if style is defined %}<|im_start|>style\n{{ style }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def msg(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def usr(content: Any, **more: Any) -> dict[str, Any]:
    return msg("user", content, **more)


def bot(content: Any, **more: Any) -> dict[str, Any]:
    return msg("assistant", content, **more)


def tiny_tokenizer(chat: bool = True, *, crossing: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens. chat: with the template CHATML. crossing: its merges cross the
    bounds of words.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not crossing)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=alphabet,
        show_progress=False,
        special_tokens=[PAD, END, "<|im_start|>"],
    )
    bpe.train_from_iterator(TEXT.splitlines() * 4, trainer)
    return wrapped(bpe, CHATML if chat else None)


def wrapped(tokenizer: Tokenizer, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<|im_start|>"],
        chat_template=chat_template,
    )


def with_template(template: str) -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with another chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(vocab: int, **config: Any) -> LlamaForCausalLM:
    """Random weights, large enough that log-probs differ by whole nats. The same at every call."""
    config = (
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
        | config
    )
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **config)).eval())


def seeded(make, seed: int = 0):
    """What make() gives when the random state is that of the seed."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make()


def file_with_weights(path: Path) -> Path:
    """An annotated file of one pair with token rewards and token weights."""
    row = {"index": 0, "where": "f:0", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    streams = ("token_rewards", "token_weights")
    for stream in streams:
        row |= {name: [1.0] for name in stream_columns(stream)}
    meta = {"streams": {stream: {} for stream in streams}}
    write_annotated(path, [row], meta, streams=streams, reference=False)
    return path


def run_once(rows) -> int:
    """Tokens that a model needs for rows (context, completion) in one call: the last ones predict
    nothing, and what rows begin with counts once.
    """
    sequences = [(*context, *completion)[:-1] for context, completion in rows]
    return len({x[:n] for x in sequences for n in range(1, len(x) + 1)})
