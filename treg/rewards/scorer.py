"""Log-probs of completions after contexts, forward only, in batches of a bounded number of tokens.

A response is judged after two requests that agree up to their last words. Their common beginning,
which holds the prompt x and the response y, is run once, and its keys and values serve both
continuations: |x| + 3|y| + c tokens, c of requests, instead of 2|x| + 4|y| + 2c. A model that does
not give the same log-probs that way (checked on the longest and the shortest pair) is run without.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from treg.data import SIDES, Pair, common_prefix, prompt_text, text_of
from treg.heads import HeadSpec, check_sequences, install_head
from treg.ops import linear_logprobs
from treg.rewards import ContrastivePrompts

log = logging.getLogger(__name__)

# mean absolute difference, in nats, up to which log-probs with and without a shared beginning count
# as the same
SHARED_TOLERANCE = {
    torch.float32: 1e-3,
    torch.float64: 1e-3,
    torch.bfloat16: 0.05,
    torch.float16: 0.05,
}


class Scorer:
    """Log-probs of completions after contexts, in batches of a bounded number of tokens."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: ContrastivePrompts,
        *,
        tokens_per_batch: int,
        share_prefix: bool,
        on_tokens: Callable[[int], None] = lambda tokens: None,
    ):
        """model: a Hugging Face causal LM, on its device; it is put into eval mode. on_tokens:
        hears of progress.
        """
        self.spec: HeadSpec = install_head(model)
        check_sequences(self.spec)
        self.tokenizer, self.prompts = tokenizer, prompts
        self.tokens_per_batch, self.share, self.on_tokens = (
            tokens_per_batch,
            share_prefix,
            on_tokens,
        )
        model.eval()
        self.device = self.spec.projection.weight.device
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        config = model.config.get_text_config()
        self.longest = getattr(config, "max_position_embeddings", None) or 2**31

    def requests(self, pair: Pair, side: str) -> tuple[list[int], list[int]]:
        """Token ids of the two contexts in which a response is judged: better, worse."""
        row, ids = pair.row, getattr(pair, f"{side}_ids")
        text = text_of(getattr(row, side))
        if pair.truncated:
            text = self.tokenizer.decode(
                ids[: content_length(ids.tolist(), self.tokenizer)], skip_special_tokens=True
            )
        prompt = row.prompt if row.chat else [{"role": "user", "content": row.prompt}]
        messages = [*prompt, {"role": "assistant", "content": text}]
        for i, message in enumerate(messages):
            messages[i] = {"role": message["role"], "content": str(message.get("content") or "")}
        better, worse = (
            self._context(messages, row.template_kwargs, better) for better in (True, False)
        )
        return better, worse

    def _context(self, messages: list[dict], kwargs: dict, better: bool) -> list[int]:
        request = self.prompts.render(messages, better=better)
        if self.tokenizer.chat_template is not None:
            text = prompt_text(self.tokenizer, [{"role": "user", "content": request}], None, kwargs)
            return self.tokenizer(
                text + self.prompts.prefill, add_special_tokens=False, verbose=False
            )["input_ids"]
        ids = self.tokenizer(f"{request}\n\n{self.prompts.prefill}", verbose=False)["input_ids"]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    # -- the model
    # ------------------------------------------------------------------------------------------------

    def score(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[torch.Tensor]:
        """Log-probs [tokens of the completion], on the CPU, of each completion after its
        context.
        """
        found: list[Any] = [None] * len(rows)
        for batch in self._batches([(len(c) + len(y) - 1,) for c, y in rows]):
            inputs = [rows[i][0] + rows[i][1][:-1] for i in batch]
            ids, mask = self._padded(inputs, left=False)
            got = self._logprobs(
                ids, [rows[i][1] for i in batch], input_ids=ids, attention_mask=mask
            )
            for i, lp in zip(batch, got, strict=True):
                found[i] = lp
            self.on_tokens(int(mask.sum()))
        return found

    def judge(
        self, rows: Sequence[tuple[list[int], list[int], list[int]]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log-probs of each completion after its better and its worse context."""
        if not self.share:
            flat = self.score([(context, y) for *both, y in rows for context in both])
            return list(zip(flat[::2], flat[1::2], strict=True))
        found: list[Any] = [None] * len(rows)
        shared = [
            min(common_prefix(better, worse), len(better) - 1, len(worse) - 1)
            for better, worse, _ in rows
        ]
        tails = [
            [context[n:] + y[:-1] for context in both]
            for (*both, y), n in zip(rows, shared, strict=True)
        ]
        sizes = [(n, 2 * max(map(len, both))) for n, both in zip(shared, tails, strict=True)]
        for batch in self._batches(sizes):
            ids, mask = self._padded([rows[i][0][: shared[i]] for i in batch], left=True)
            position = (mask.cumsum(-1) - 1).clamp(min=0)
            cache = self.spec.backbone(
                input_ids=ids, attention_mask=mask, position_ids=position, use_cache=True
            ).past_key_values
            cache.batch_repeat_interleave(2)
            tail_ids, tail_mask = self._padded(
                [tail for i in batch for tail in tails[i]], left=False
            )
            start = mask.sum(-1, keepdim=True).repeat_interleave(2, 0)
            got = self._logprobs(
                tail_ids,
                [rows[i][2] for i in batch for _ in range(2)],
                input_ids=tail_ids,
                attention_mask=torch.cat([mask.repeat_interleave(2, 0), tail_mask], -1),
                # padding repeats the last position: further ones may be beyond the model's table
                position_ids=start + tail_mask.cumsum(-1) - 1,
                past_key_values=cache,
            )
            for k, i in enumerate(batch):
                found[i] = (got[2 * k], got[2 * k + 1])
            self.on_tokens(int(mask.sum() + tail_mask.sum()))
        return found

    def check_sharing(self, pairs: Sequence[Pair]) -> None:
        """Give up the shared beginning where log-probs are not the same with it; pairs are sorted,
        the longest first.

        Looked at: the longest pair that fits the model's context, since some models turn to other
        positions there (longrope), and the shortest.
        """
        longest = next(filter(None, map(self._judged, pairs)), None)
        for rows in (longest, self._judged(pairs[-1])):
            if rows is not None and self.share:
                self._check_sharing(rows)

    def _judged(self, pair: Pair) -> list[tuple[list[int], list[int], list[int]]] | None:
        """Better and worse context and completion of both responses; None if the model's context
        cannot hold them.
        """
        rows = [
            (*self.requests(pair, side), getattr(pair, f"{side}_ids").tolist()) for side in SIDES
        ]
        return (
            rows
            if max(len(c) + len(y) - 1 for *both, y in rows for c in both) <= self.longest
            else None
        )

    def _check_sharing(self, rows: list[tuple[list[int], list[int], list[int]]]) -> None:
        with torch.inference_mode():
            try:
                shared = self.judge(rows)
            except Exception as error:  # whatever a model without a usable cache raises
                log.warning(
                    "the common beginning of the two requests is not shared: %s: %s",
                    type(error).__name__,
                    error,
                )
                self.share = False
                return
            self.share = False
            apart = self.judge(rows)
        a, b = (torch.cat([lp for both in found for lp in both]) for found in (shared, apart))
        difference = (a - b).abs().mean().item()
        self.share = difference <= SHARED_TOLERANCE[self.spec.projection.weight.dtype]
        if not self.share:
            log.warning(
                "the common beginning of the two requests is not shared: log-probs differ by %.3g nats",
                difference,
            )

    def _logprobs(
        self, ids: torch.Tensor, completions: list[list[int]], **inputs: Any
    ) -> list[torch.Tensor]:
        """Log-probs of completions whose last tokens are predicted at the ends of the right-padded
        rows of ids.
        """
        ends = [len(y) for y in completions]
        last = inputs["attention_mask"][:, -ids.shape[1] :].sum(-1).tolist()
        width = ids.shape[1]
        scored = torch.cat(
            [
                torch.arange(i * width + stop - n, i * width + stop)
                for i, (stop, n) in enumerate(zip(last, ends, strict=True))
            ]
        )
        target = torch.tensor([t for y in completions for t in y])
        hidden = self.spec.hidden(**inputs)
        rows = hidden.reshape(-1, hidden.shape[-1])[scored.to(self.device)]
        target = target.to(self.device)
        logprobs = self.spec.through(
            lambda h, operands: linear_logprobs(h, target=target, **operands).logprobs, rows
        )
        return list(logprobs.cpu().split(ends))

    def _padded(self, rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask [rows, longest]."""
        ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
        padded = (
            pad_sequence(
                x, batch_first=True, padding_value=value, padding_side="left" if left else "right"
            )
            for x, value in ((ids, self.pad), ([torch.ones_like(x) for x in ids], 0))
        )
        ids, mask = (x.to(self.device) for x in padded)
        return ids, mask

    def _batches(self, sizes: list[tuple[int, ...]]) -> list[list[int]]:
        """Indices, the longest first, in batches that stay within tokens_per_batch with padding.

        sizes: of each row, the tokens of the parts that are padded apart.
        """
        batches: list[list[int]] = []
        width: list[int] = []
        for i in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), i)):
            wider = [max(pair) for pair in zip(width, sizes[i], strict=True)] if batches else []
            if batches and sum(wider) * (len(batches[-1]) + 1) <= self.tokens_per_batch:
                batches[-1].append(i)
                width = wider
            else:
                batches.append([i])
                width = list(sizes[i])
        return batches


def content_length(ids: list[int], tokenizer: Any) -> int:
    """Tokens of a response before what ends it: special tokens, and blanks after them."""
    special, end = set(tokenizer.all_special_ids), len(ids)
    while end and (ids[end - 1] in special or not tokenizer.decode([ids[end - 1]]).strip()):
        end -= 1
    return next((i for i in range(end, len(ids)) if ids[i] in special), len(ids))
