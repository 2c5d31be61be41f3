"""Annotation of demo pairs by the demo's chat model, with and without sharing the common beginning
of the requests.
"""

import cpu_look
import pytest
import torch

transformers = pytest.importorskip("transformers")

from treg.data import load_pairs  # noqa: E402
from treg.demo import world  # noqa: E402
from treg.demo.world import MODEL  # noqa: E402
from treg.rewards import Context, load_source  # noqa: E402
from treg.rewards.annotate import annotate_pairs  # noqa: E402

took: dict[bool, float] = {}  # seconds on a CPU, with and without sharing
PAIRS, ROUNDS = (32, 3) if torch.cuda.is_available() else (4, 1)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
def test_annotate(benchmark, share):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        cpu_look.size_or_skip(cpu_look.session(), "annotate")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).to(device)
    pairs, _ = load_pairs(world.preference_rows(0, PAIRS, "train"), tokenizer)
    seen = []
    context = Context(
        model,
        tokenizer,
        tokens_per_batch=8192,
        share_prefix=share,
        on_tokens=seen.append,
    )
    source = load_source("contrastive", {}, context)
    with torch.inference_mode():
        annotate_pairs(source, context, pairs)  # warm; sharing is tried in the first call only
        seen.clear()
        rows, problems = benchmark.pedantic(
            annotate_pairs, args=(source, context, pairs), rounds=ROUNDS
        )
    assert len(rows) == PAIRS and not problems
    benchmark.extra_info["tokens through the model"] = sum(seen) // ROUNDS
    if device == "cpu":
        took[share] = benchmark.stats.stats.median
        if len(took) == 2:
            cpu_look.session().notes.append(
                f"annotation of {PAIRS} pairs with the common beginning run once: "
                f"{took[True] / took[False]:.2f} of the time without, one call each"
            )
