"""Serving engines themselves, against the model here. They run where the environment names them:

    TREG_TEST_MODEL       folder of a model, with its tokenizer
    TREG_TEST_VLLM        the program vllm, which serves that folder in float32
    TREG_TEST_LLAMA_CPP   a Python that has llama-cpp-python
    TREG_TEST_GGUF        the same weights as a GGUF file; quantised ones where the folder has what
                          they stand for

`pytest -m server -s tests/rewards/test_real_servers.py` prints how far the log-probs are apart.
"""

import os
import socket
import subprocess
from pathlib import Path

import httpx2 as httpx
import pytest
import torch
from stand_in import wait_until
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import read_annotated
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.scorer import Scorer
from treg.rewards.server import ServedModel, ServerOptions

pytestmark = pytest.mark.server
ROOT = Path(__file__).resolve().parents[2]
ROWS = [
    {
        "prompt": "What is the capital of France, and what is it known for?",
        "chosen": "The capital of France is Paris. It is known for the Eiffel Tower and Louvre.",
        "rejected": "The capital of France is Rome, which is known for its beaches.",
    },
    {
        "prompt": "Name two prime numbers above ten.",
        "chosen": "11 and 13 are prime: neither has a divisor but 1 and itself.",
        "rejected": "Twelve and fifteen.",
    },
]


def given(name):
    if name not in os.environ:
        pytest.skip(f"{name} names nothing")
    return os.environ[name]


def command(engine, port):
    if engine == "vllm":
        folder = given("TREG_TEST_MODEL")
        return [
            *(given("TREG_TEST_VLLM"), "serve", folder, "--served-model-name", "served"),
            *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"),
            *("--port", str(port)),
        ]
    script = ROOT / "examples" / "serve_gguf.py"
    file = given("TREG_TEST_GGUF")
    return [given("TREG_TEST_LLAMA_CPP"), str(script), file, "--port", str(port)]


@pytest.fixture(params=["vllm", "llama_cpp"])
def engine(request, tmp_path):
    """The name of an engine and the address at which it has been started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env["VLLM_CPU_KVCACHE_SPACE"] = "2"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command(request.param, port), env=env, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"

    def ready():
        assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        try:
            return httpx.get(f"{url}/v1/models").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(ready, 300)
        yield request.param, url
    finally:
        process.terminate()
        process.wait(30)


def differences(first, second):
    return torch.cat([(a.double() - b.double()).abs() for a, b in zip(first, second, strict=True)])


def test_log_probs_and_rewards_are_those_of_the_model_here(engine, tmp_path):
    """Within twice of what the model here differs by from itself in another precision: in float64
    from a float32 engine; in bfloat16, with its 8 bits, from one that rounds activations to 8 bits.
    """
    name, url = engine
    folder = given("TREG_TEST_MODEL")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model_name = "served" if name == "vllm" else Path(given("TREG_TEST_GGUF")).stem
    served = ServedModel(ServerOptions([url], model_name), tokenizer)
    pairs, _ = load_pairs(ROWS, tokenizer, EncodeOptions(512))
    rows = [
        (x.prompt_ids.tolist(), ids.tolist())
        for x in pairs
        for ids in (x.chosen_ids, x.rejected_ids)
    ]

    def here(dtype):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        scorer = Scorer(model, tokenizer, tokens_per_batch=1, share_prefix=False)
        with torch.inference_mode():
            return model, scorer.score(rows)

    model, own = here(torch.float32)
    _, other = here(torch.float64 if name == "vllm" else torch.bfloat16)
    found = served.scorer(lambda tokens: None).score(rows)
    apart, rounding = differences(found, own), differences(own, other)
    print(
        f"\n{name}: {len(apart)} tokens, log-probs differ by {apart.mean():.2e} on average, "
        f"{apart.max():.2e} at most; here by {rounding.mean():.2e}, {rounding.max():.2e}"
    )
    options = AnnotateOptions(EncodeOptions(512))
    files = [tmp_path / "served.parquet", tmp_path / "here.parquet"]
    for x, file in zip((served, model), files, strict=True):
        annotate(x, tokenizer, ROWS, file, options, progress=False)
    served.close()
    far, near = (read_annotated(file)[0] for file in files)
    sides = ("chosen_token_rewards", "rejected_token_rewards")
    values = [[torch.tensor(x[side]) for x in found for side in sides] for found in (far, near)]
    rewards_apart = differences(*values)
    print(
        f"{name}: rewards differ by {rewards_apart.mean():.2e}, {rewards_apart.max():.2e} at most"
    )
    # a few roundings of float32 more or less, in the order of sums
    assert apart.mean() <= 2 * rounding.mean() + 1e-5
    # sigmoid of a difference of two: half of the slope 1/4 at most
    assert rewards_apart.mean() <= rounding.mean() + 1e-5
