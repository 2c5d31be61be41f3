"""What the reference says of responses: computed once, for whoever asks."""

import pytest
import torch
from tiny import run_once, tiny_llama, tiny_tokenizer

from treg.data import EncodeOptions, load_pairs
from treg.rewards import Context
from treg.rewards.annotate import annotate_pairs
from treg.rewards.response import ResponsePairs

TOKENIZER = tiny_tokenizer()
MODEL = tiny_llama(len(TOKENIZER))
ROWS = [
    {"prompt": "what is better?", "chosen": "the old owl", "rejected": "the sun and the moon"},
    {"prompt": "the fox?", "chosen": "it is 42, said the owl", "rejected": "no"},
]


def pairs():
    return load_pairs(ROWS, TOKENIZER, EncodeOptions(256))[0]


def responses():
    return [response for pair in ResponsePairs(pairs(), TOKENIZER) for response in pair]


def tokens(given):
    """Tokens of one forward over responses."""
    return run_once((x.prompt_ids.tolist(), x.ids.tolist()) for x in given)


def counted(**more):
    """A context, and the tokens of each of its forwards."""
    seen = []
    return Context(MODEL, TOKENIZER, on_tokens=seen.append, **more), seen


def dense(response):
    """Log-probs [T] and entropies [T] in float64, from dense logits."""
    ids = torch.tensor([[*response.prompt_ids, *response.ids]]).long()
    with torch.no_grad():
        logps = MODEL(ids).logits[0].double().log_softmax(-1)
    logps = logps[len(response.prompt_ids) - 1 : -1]
    targets = torch.from_numpy(response.ids).long()
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def test_values():
    context, _ = counted(tokens_per_batch=64)
    context.want("entropy")
    given = responses()
    for response, found in zip(given, context.reference(given), strict=True):
        logps, entropy = dense(response)
        torch.testing.assert_close(found["logprobs"].double(), logps, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["entropy"].double(), entropy, rtol=1e-5, atol=1e-5)
        assert not found["logprobs"].requires_grad


def test_entropy_leaves_the_bits_of_the_log_probs():
    scorer, given = counted()[0].scorer, responses()
    rows = [(x.prompt_ids.tolist(), x.ids.tolist()) for x in given]
    with torch.no_grad():
        plain, more = scorer.score(rows), scorer.statistics(rows, ("entropy", "is_top1"))
    assert all(torch.equal(a, b["logprobs"]) for a, b in zip(plain, more, strict=True))
    assert all(x.keys() == {"logprobs", "entropy", "is_top1"} for x in more)


def test_each_response_once():
    context, seen = counted()
    given = responses()
    context.reference(given[:2])
    assert sum(seen) == tokens(given[:2])
    again = context.reference(given)
    both = tokens(given[:2]) + tokens(given[2:])
    assert sum(seen) == both
    assert context.reference(given)[0]["logprobs"] is again[0]["logprobs"]
    assert sum(seen) == both
    context.want("entropy")  # too late to be one pass, but never wrong
    assert context.reference(given)[0].keys() == {"logprobs", "entropy"}
    assert sum(seen) == both + tokens(given)


def test_what_is_kept_goes_with_the_responses():
    context, _ = counted()
    given = responses()
    context.reference(given)
    assert len(context._kept) == len(given)
    del given
    assert len(context._kept) == 0


class Asks:
    """A source that gives the reference's log-probs, and another that gives its entropies."""

    streams = ("token_rewards",)

    def __init__(self, context, name):
        self.context, self.name = context, name
        if name != "logprobs":
            context.want(name)

    def check(self, response):
        return self.context.too_long(response)

    def score(self, given):
        return [{"token_rewards": x[self.name].clone()} for x in self.context.reference(given)]


class Both:
    streams = ("a", "b")

    def __init__(self, context):
        self.inner = {"a": Asks(context, "logprobs"), "b": Asks(context, "entropy")}

    def check(self, response):
        return self.inner["a"].check(response)

    def score(self, given):
        found = {name: source.score(given) for name, source in self.inner.items()}
        return [
            {name: found[name][i]["token_rewards"] for name in found} for i in range(len(given))
        ]


@pytest.mark.parametrize("reference", [True, False])
def test_sources_and_the_reference_columns_share_one_forward(reference):
    context, seen = counted()
    source = Both(context)
    rows, problems = annotate_pairs(
        source, context, pairs(), reference=reference, per_token=reference
    )
    assert not problems and sum(seen) == tokens(responses())
    for row in rows:
        assert ("ref_chosen_logps" in row) == reference
        if reference:
            assert row["chosen_a"].tolist() == row["ref_chosen_token_logps"].tolist()
            assert row["ref_chosen_logps"] == row["chosen_a"].astype("float64").sum()


def test_what_does_not_fit_the_reference():
    given = responses()
    longest = max(len(x.prompt_ids) + len(x.ids) - 1 for x in given)
    fits, _ = counted()
    assert fits.too_long(*given) is None
    short = Context(tiny_llama(len(TOKENIZER), max_position_embeddings=longest - 1), TOKENIZER)
    problem = short.too_long(*given)
    assert problem.reason == "pair too long"
    assert problem.detail.startswith(f"{longest} tokens, the model has {longest - 1} positions")
