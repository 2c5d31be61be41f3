"""Token rewards and reference log-probs against dense logits; stops, restarts and processes;
annotated files.
"""

import copy
import json
import time
from dataclasses import asdict, replace

import numpy as np
import peft
import processes
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import END, run_once, seeded, shared_data, tiny_llama, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import treg.rewards.annotate
from treg.data import EncodeOptions, EncodeWork, RowProblem, load_pairs
from treg.data.annotated import (
    is_annotated,
    merge_annotated,
    model_fingerprint,
    read_annotated,
    read_meta,
    tokenizer_fingerprint,
    write_annotated,
)
from treg.data.encode import _Encoder
from treg.data.examples import ExampleLoader
from treg.heads.attention import BranchMask
from treg.rewards import Context, ContrastivePrompts, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.parts import Parts
from treg.rewards.response import ResponsePairs
from treg.rewards.scorer import Scorer

SIDES = ("chosen", "rejected")
CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat=False)
MODEL = tiny_llama(len(CHAT))
SHORT = ContrastivePrompts(
    "{{ messages[-1].content }} -> {{ 'better' if better else 'worse' }}", "<answer>"
)
SMALL = AnnotateOptions(EncodeOptions(256), SHORT, tokens_per_batch=512)
WORDS = [
    "the",
    "fox",
    "sun",
    "moon",
    "owl",
    "wood",
    "is",
    "was",
    "old",
    "little",
    "happy",
    "short",
    "42",
    "said",
]


def rows(n, seed=0):
    rng = np.random.default_rng(seed)

    def words(lo, hi):
        return " ".join(rng.choice(WORDS, rng.integers(lo, hi)))

    return [
        {"prompt": words(1, 12) + "?", "chosen": words(1, 20), "rejected": words(21, 25)}
        for _ in range(n)
    ]


def run(tmp_path, options=SMALL, data=None, model=MODEL, tokenizer=CHAT, name="a.parquet", **more):
    report = annotate(
        model,
        tokenizer,
        rows(5) if data is None else data,
        tmp_path / name,
        options,
        progress=False,
        **more,
    )
    return report, *read_annotated(tmp_path / name)


def contrastive(model, prompts, pairs=()):
    """The contrastive source over a model."""
    context = Context(model, CHAT, tokens_per_batch=512, pairs=pairs)
    return load_source("contrastive", {"prompts": prompts}, context)


def dense(model, context, completion):
    """Log-probs [tokens], float64, of a completion after a context: one sequence, dense logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *completion]])).logits[0]
    at = torch.arange(len(context) - 1, len(context) + len(completion) - 1)
    return (
        logits[at]
        .double()
        .log_softmax(-1)[torch.arange(len(completion)), torch.tensor([*map(int, completion)])]
    )


def expected(model, tokenizer, prompt, response, ids, prompt_ids, prompts):
    """Rewards and log-probs of one response. response: the text that is judged; ids: its tokens."""
    found = []
    for better in (True, False):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        request = prompts.render(messages, better=better)
        text = f"{request}\n\n{prompts.prefill}"
        if tokenizer.chat_template:
            text = f"<|im_start|>user\n{request}{END}\n<|im_start|>assistant\n{prompts.prefill}"
        found.append(dense(model, tokenizer(text)["input_ids"], ids))
    rewards = (found[0] - found[1]).sigmoid() - 0.5
    ids = list(ids)
    if tokenizer.eos_token_id in ids:
        rewards[ids.index(tokenizer.eos_token_id) :] = 0
    return rewards, dense(model, prompt_ids, ids)


def check(
    examples, data, model, tokenizer, prompts, per_token=False, max_length=256, tolerance=1e-5
):
    for x in examples:
        row = data[x["index"]]
        for side in SIDES:
            ids = x[f"{side}_ids"]
            text = row[side]
            if max(len(x["prompt_ids"]) + len(x[f"{s}_ids"]) for s in SIDES) == max_length:
                text = tokenizer.decode(
                    [t for t in ids if t not in tokenizer.all_special_ids]
                ).rstrip("\n")
            rewards, logps = expected(
                model, tokenizer, row["prompt"], text, ids, x["prompt_ids"], prompts
            )
            np.testing.assert_allclose(x[f"{side}_token_rewards"], rewards, rtol=0, atol=tolerance)
            assert x[f"{side}_token_rewards"].dtype == np.float32
            np.testing.assert_allclose(x[f"ref_{side}_logps"], logps.sum(), rtol=tolerance)
            assert (f"ref_{side}_token_logps" in x) == per_token
            if per_token:
                np.testing.assert_allclose(
                    x[f"ref_{side}_token_logps"], logps, rtol=tolerance, atol=tolerance
                )


def warnings(caplog):
    return [
        r.getMessage()
        for r in caplog.records
        if r.name.startswith("treg") and r.levelname == "WARNING"
    ]


# -- values
# -


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("tokens_per_batch", [1, 700, 10**6])
@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_values(tmp_path, tokenizer, share, tokens_per_batch, caplog):
    data, per_token = rows(6), tokens_per_batch == 700
    options = replace(
        SMALL, tokens_per_batch=tokens_per_batch, share_prefix=share, per_token=per_token
    )
    report, examples, meta = run(tmp_path, options, data, tokenizer=tokenizer)
    assert [x["index"] for x in examples] == list(range(6)) and report.kept == 6
    assert [x["where"] for x in examples] == [f"row {i}" for i in range(6)]
    pairs, _ = load_pairs(data, tokenizer, options.encode)
    for x, pair in zip(examples, pairs, strict=True):
        assert all(
            x[k].tolist() == getattr(pair, k).tolist()
            for k in ("prompt_ids", "chosen_ids", "rejected_ids")
        )
    check(examples, data, MODEL, tokenizer, SHORT, per_token)
    sizes = np.concatenate([np.abs(x["chosen_token_rewards"]) for x in examples])
    assert sizes.max() > 0.2, "rewards that are all small would test nothing"
    assert meta["settings"]["share_prefix"] == share and meta["report"]["kept"] == 6
    assert not warnings(caplog)


def test_default_prompts(tmp_path):
    data = rows(2)
    options = AnnotateOptions()
    _, examples, _ = run(tmp_path, options, data)
    check(examples, data, MODEL, CHAT, options.prompts)


@pytest.mark.parametrize(
    "tokenizer, ends", [(CHAT, [END, "\n"]), (PLAIN, [END])], ids=["chat", "plain"]
)
def test_what_ends_a_response_gets_no_reward(tmp_path, tokenizer, ends):
    data = [{"prompt": "the fox", "chosen": " is old", "rejected": " was\n\n"}]
    data = (
        data
        if tokenizer is PLAIN
        else [{"prompt": "the fox", "chosen": " is old", "rejected": "was"}]
    )
    _, (x,), _ = run(tmp_path, data=data, tokenizer=tokenizer)
    for side in SIDES:
        assert [tokenizer.decode(t) for t in x[f"{side}_ids"][-len(ends) :]] == ends
        assert not x[f"{side}_token_rewards"][-len(ends) :].any()
        assert x[f"{side}_token_rewards"][: -len(ends)].all()


@pytest.mark.parametrize("tokenizer", [CHAT, PLAIN], ids=["chat", "plain"])
def test_truncated_responses_are_judged_as_truncated(tmp_path, tokenizer):
    data = [
        {"prompt": "the fox?", "chosen": "is old and happy", "rejected": "is " + "the sun " * 40}
    ]
    options = replace(SMALL, encode=EncodeOptions(40))
    report, (x,), _ = run(tmp_path, options, data, tokenizer=tokenizer)
    assert report.truncated == 1 and len(x["prompt_ids"]) + len(x["rejected_ids"]) == 40
    assert x["rejected_token_rewards"][-1] != 0 and x["chosen_token_rewards"][-1] == 0
    check([x], data, MODEL, tokenizer, SHORT, max_length=40)


def test_system_turns_and_template_kwargs_reach_the_requests(tmp_path):
    prompts = ContrastivePrompts(
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{{ better }}", ""
    )
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "the fox?"}]
    data = [
        {
            "prompt": turns,
            "chosen": "is old",
            "rejected": "was",
            "chat_template_kwargs": {"style": "short"},
        }
    ]
    _, (x,), _ = run(tmp_path, replace(SMALL, prompts=prompts), data)
    start = (
        f"<|im_start|>style\nshort{END}\n"
        "<|im_start|>user\nsystem:be kind;user:the fox?;assistant:is old;"
    )
    better, worse = (
        dense(
            MODEL,
            CHAT(f"{start}{better}{END}\n<|im_start|>assistant\n")["input_ids"],
            x["chosen_ids"],
        )
        for better in (True, False)
    )
    want = (better - worse).sigmoid() - 0.5
    np.testing.assert_allclose(x["chosen_token_rewards"][:-2], want[:-2], rtol=0, atol=1e-5)


def test_batching_changes_nothing(tmp_path):
    data, found = rows(12, seed=1), []
    for i, (tokens, share) in enumerate(
        [(1, True), (1500, True), (10**6, True), (1, False), (10**6, False)]
    ):
        options = replace(SMALL, tokens_per_batch=tokens, share_prefix=share)
        found.append(run(tmp_path, options, data, name=f"{i}.parquet")[1])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            for side in SIDES:
                np.testing.assert_allclose(
                    a[f"{side}_token_rewards"], b[f"{side}_token_rewards"], rtol=0, atol=1e-5
                )
                np.testing.assert_allclose(
                    a[f"ref_{side}_logps"], b[f"ref_{side}_logps"], rtol=1e-5
                )


# -- models
# -

V = len(CHAT)
SIZES = dict(
    hidden_size=32, num_hidden_layers=2, vocab_size=V, bos_token_id=None, eos_token_id=None
)


def mamba():
    return seeded(
        lambda: MambaForCausalLM(MambaConfig(**SIZES, state_size=4, initializer_range=0.3)).eval()
    )


def windowed():
    """Attends to fewer tokens than the common beginning has."""
    config = MistralConfig(
        **SIZES,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=16,
        initializer_range=0.3,
    )
    return seeded(lambda: MistralForCausalLM(config).eval())


def gpt2():
    config = GPT2Config(**SIZES, n_positions=300, num_attention_heads=4, initializer_range=0.3)
    return seeded(lambda: GPT2LMHeadModel(config).eval())


@pytest.mark.parametrize("make, warns", [(mamba, True), (windowed, False), (gpt2, False)])
def test_other_models(tmp_path, make, warns, caplog):
    data, model = rows(4, seed=2), make()
    _, examples, _ = run(tmp_path, replace(SMALL, tokens_per_batch=900), data, model=model)
    check(examples, data, model, CHAT, SHORT, tolerance=2e-5)
    assert ["is not shared" in message for message in warnings(caplog)] == [True] * warns


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_attention_that_is_wrong_is_not_used(tmp_path, monkeypatch, caplog, broken):
    attend = BranchMask.attend

    def wrong(mask, function, module, query, key, value, **kwargs):
        if broken == "raises":
            raise NotImplementedError("no such attention")
        return attend(mask, function, module, query, key, value.flip(2), **kwargs)

    monkeypatch.setattr(BranchMask, "attend", wrong)
    data = rows(4, seed=3)
    _, examples, _ = run(tmp_path, data=data)
    check(examples, data, MODEL, CHAT, SHORT)
    (message,) = warnings(caplog)
    assert "what rows begin with is not shared" in message


def test_model_in_training_with_adapters(tmp_path):
    model = peft.get_peft_model(
        copy.deepcopy(MODEL), peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.5)
    )
    data = rows(2)
    _, examples, _ = run(tmp_path, data=data, model=model.train())
    check(examples, data, MODEL, CHAT, SHORT)


@pytest.mark.parametrize(
    "prompt, chosen",
    [("the sun?", "is old " * 15), ("the sun " * 40, "is old")],
    ids=["request", "prompt"],
)
def test_too_long_for_the_model(tmp_path, prompt, chosen):
    model, options, prompts = tiny_llama(V, max_position_embeddings=70), SMALL, SHORT
    data = [
        {"prompt": "the fox", "chosen": "is", "rejected": "was"},
        {"prompt": "it", "chosen": "1", "rejected": "2"},
        {"prompt": prompt, "chosen": chosen, "rejected": "was"},
    ]
    pair = load_pairs(data, CHAT)[0][2]
    assert (len(pair.prompt_ids) + len(pair.chosen_ids) < 70) == (prompt == "the sun?")
    report, examples, meta = run(tmp_path, options, data, model=model)
    assert [x["index"] for x in examples] == [0, 1] and (report.seen, report.kept) == (3, 2)
    assert (
        report.dropped == {"contrastive prompt too long": 1}
        and meta["report"]["dropped"] == report.dropped
    )
    assert report.examples["contrastive prompt too long"][0].startswith(
        "row 2: contrastive prompt too long: "
    )
    check(examples, data, model, CHAT, prompts)
    with pytest.raises(
        RowProblem,
        match=r"row 2: contrastive prompt too long: \d+ tokens, the model has 70 positions",
    ):
        run(tmp_path, options, data, model=model, name="b.parquet", strict=True)
    with pytest.raises(ValueError, match=r"found none: 0 of 1"):
        run(tmp_path, options, data[2:], model=model, name="c.parquet")


def test_exactly_as_long_as_the_model(tmp_path):
    data = rows(1)
    _, (x,), _ = run(tmp_path, data=data)
    texts = [
        f"<|im_start|>user\n{data[0]['rejected']} -> {how}{END}\n<|im_start|>assistant\n<answer>"
        for how in ("better", "worse")
    ]
    need = max(len(CHAT(text)["input_ids"]) for text in texts) + len(x["rejected_ids"]) - 1
    report, *_ = run(
        tmp_path, data=data, model=tiny_llama(V, max_position_embeddings=need), name="b.parquet"
    )
    assert report.kept == 1
    with pytest.raises(ValueError, match=f"{need} tokens, the model has {need - 1} positions"):
        run(
            tmp_path,
            data=data,
            model=tiny_llama(V, max_position_embeddings=need - 1),
            name="c.parquet",
        )


# -- stops and restarts
# -

WORKER = """
import json, os, sys, time
import torch
import treg.rewards.annotate
from tiny import tiny_llama, tiny_tokenizer
from treg.data import EncodeOptions
from treg.rewards import ContrastivePrompts
torch.set_num_threads(1)
output, seconds, late, rows, prompts = json.loads(sys.argv[1])
treg.rewards.annotate.PART_PAIRS = 4
tokenizer = tiny_tokenizer()
model = tiny_llama(len(tokenizer))
model.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
if os.environ.get("RANK") == "1":
    parts = treg.rewards.annotate._annotate_parts
    treg.rewards.annotate._annotate_parts = lambda *args: (time.sleep(late), parts(*args))[1]
    read = treg.rewards.annotate.read_meta
    treg.rewards.annotate.read_meta = lambda file: (time.sleep(late), read(file))[1]
options = treg.rewards.annotate.AnnotateOptions(
    EncodeOptions(256), ContrastivePrompts(**prompts), tokens_per_batch=512
)
treg.rewards.annotate.annotate(model, tokenizer, rows, output, options, progress=False)
"""


def worker(output, seconds=0.0, late=0.0, **env):
    args = json.dumps([str(output), seconds, late, rows(26, seed=4), asdict(SHORT)])
    script = output.with_name("worker.py")
    script.write_text(WORKER)
    return processes.start(script, args, env={"TOKENIZERS_PARALLELISM": "false"} | env)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(treg.rewards.annotate, "PART_PAIRS", 4)


@pytest.fixture
def whole(tmp_path, small_parts):
    """The file of a run that nothing interrupts."""
    run(tmp_path, data=rows(26, seed=4), name="whole.parquet")
    return tmp_path / "whole.parquet"


def same(a, b):
    a, b = pq.read_table(a), pq.read_table(b)
    assert a.schema.equals(b.schema, check_metadata=True)
    assert a.column("index").to_pylist() == b.column("index").to_pylist()
    for name in a.column_names:
        x, y = a.column(name).combine_chunks(), b.column(name).combine_chunks()
        x, y = (z.values if pa.types.is_list(z.type) else z for z in (x, y))
        if pa.types.is_floating(x.type):
            assert x.to_numpy().tobytes() == y.to_numpy().tobytes(), name
    return a.equals(b, check_metadata=True)


def test_a_killed_run_goes_on(tmp_path, monkeypatch, whole):
    output = tmp_path / "a.parquet"
    parts = tmp_path / "a.parquet.parts"
    process = worker(output, seconds=0.1)
    try:
        deadline = time.monotonic() + 300
        while not list(parts.glob("part-*.parquet.sha256")):
            assert not process.ended() and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    done = sorted(parts.glob("part-*.parquet.sha256"))
    assert 1 <= len(done) < 7 and not output.exists()
    (parts / "part-00006.parquet.1.tmp").write_bytes(b"half")
    (tmp_path / "a.parquet.treg-1.tmp").write_bytes(b"half")
    made, make = [], treg.rewards.annotate.annotate_pairs
    monkeypatch.setattr(
        treg.rewards.annotate,
        "annotate_pairs",
        lambda *args, **kw: made.append(args) or make(*args, **kw),
    )
    run(tmp_path, data=rows(26, seed=4))
    assert len(made) == 7 - len(done)
    assert same(output, whole) and not parts.exists()
    assert pq.read_table(output).column("index").to_pylist() == list(range(26))


class Stop(Exception):
    pass


def stopped(tmp_path, monkeypatch, after=2, name="a.parquet", **more):
    """A run that raises when it writes the part after some; gives its folder."""
    write, left = treg.rewards.annotate.write_annotated, [after]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        write(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(treg.rewards.annotate, "write_annotated", counted)
        with pytest.raises(Stop):
            run(tmp_path, name=name, **{"data": rows(26, seed=4)} | more)
    folder = tmp_path / f"{name}.parts"
    assert len(list(folder.glob("part-*.parquet"))) == after
    return folder


def test_a_run_that_goes_on_does_not_encode_its_rows_again(tmp_path, monkeypatch, small_parts):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(10)))
    folder = stopped(tmp_path, monkeypatch, data=data)
    (kept,) = (folder / "_rows").glob("*.rows")
    encoded, encode = [], _Encoder.encoded
    monkeypatch.setattr(
        _Encoder, "encoded", lambda self, rows: encoded.extend(rows) or encode(self, rows)
    )
    report, examples, _ = run(tmp_path, data=data)
    assert not encoded and report.kept == len(examples) == 10
    assert not folder.exists()
    # nothing is kept beside a file that is there
    run(tmp_path, data=data)
    assert len(encoded) == 10 and not folder.exists()
    # a folder of one's own stays
    (tmp_path / "a.parquet").unlink()
    run(tmp_path, data=data, work=EncodeWork(cache=tmp_path / "mine"))
    assert kept.name in [x.name for x in (tmp_path / "mine").iterdir()] and not folder.exists()


OTHER = {
    "model": dict(model=tiny_llama(V, initializer_range=0.2)),
    "tokenizer": dict(tokenizer=seeded(tiny_tokenizer)),
    "data": dict(data=rows(26, seed=5)),
    "fewer-rows": dict(data=rows(25, seed=4)),
    "per_token": dict(options=replace(SMALL, per_token=True)),
    "prompts": dict(options=replace(SMALL, prompts=replace(SHORT, prefill="<a>"))),
    "max_length": dict(options=replace(SMALL, encode=EncodeOptions(255))),
}
OTHER["tokenizer"]["tokenizer"].chat_template += " "
NAMES = {"data": "pairs", "fewer-rows": "pairs", "max_length": "encode"}


@pytest.mark.parametrize("changed", OTHER)
def test_what_was_made_otherwise_is_refused(tmp_path, monkeypatch, small_parts, changed):
    folder, data = stopped(tmp_path, monkeypatch), rows(26, seed=4)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    name = NAMES.get(changed, changed)
    message = f"a.parquet.*: made with {name} .*, now it is .*; give another output, or remove"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"data": data} | OTHER[changed])
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    run(tmp_path, data=data)
    before = (tmp_path / "a.parquet").read_bytes()
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **{"data": data} | OTHER[changed])
    assert (tmp_path / "a.parquet").read_bytes() == before


@pytest.mark.parametrize("changed", [{"tokens_per_batch": 128}, {"share_prefix": False}])
def test_smaller_batches_go_on(tmp_path, monkeypatch, small_parts, whole, changed):
    """After running out of memory: the finished parts stay, the numbers are the same but for
    roundings.
    """
    folder = stopped(tmp_path, monkeypatch)
    parts = {file: file.stat().st_mtime_ns for file in folder.glob("part-*")}
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", lambda self: None)
        _, examples, _ = run(tmp_path, replace(SMALL, **changed), rows(26, seed=4))
    assert all(file.stat().st_mtime_ns == time for file, time in parts.items())
    for x, y in zip(examples, read_annotated(whole)[0], strict=True):
        for name in (
            "chosen_token_rewards",
            "rejected_token_rewards",
            "ref_chosen_logps",
            "ref_rejected_logps",
        ):
            np.testing.assert_allclose(x[name], y[name], rtol=1e-5, atol=1e-5)
    run(
        tmp_path, replace(SMALL, **changed), rows(26, seed=4)
    )  # and the output is complete for both
    run(tmp_path, SMALL, rows(26, seed=4))


def test_two_runs_on_one_output(tmp_path, monkeypatch, small_parts):
    def second(*args, **kwargs):
        with pytest.raises(ValueError, match="another run is at work on it; wait for it"):
            run(tmp_path, data=rows(26, seed=4))
        raise Stop

    monkeypatch.setattr(treg.rewards.annotate, "annotate_pairs", second)
    with pytest.raises(Stop):
        run(tmp_path, data=rows(26, seed=4))


def test_adapters_at_work_are_another_model():
    model = peft.get_peft_model(
        copy.deepcopy(MODEL), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    assert (
        model_fingerprint(model)
        == model_fingerprint(MODEL)
        == model_fingerprint(MODEL, adapters=True)
    )
    assert model_fingerprint(model, adapters=True) != model_fingerprint(MODEL)


def test_positions_stay_in_the_table(tmp_path):
    """A row with a long beginning and one with a long response share a batch; padding must not go
    beyond the table.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    data = [
        {"prompt": "fox " * 150, "chosen": "owl", "rejected": "sun"},
        {"prompt": "owl?", "chosen": "moon " * 40, "rejected": "wood " * 40},
    ]
    prompts = ContrastivePrompts(
        "{% for m in messages %}{{ m.content }} {% endfor %}{{ 'better' if better else 'no' }}"
    )
    options = AnnotateOptions(EncodeOptions(None), prompts, tokens_per_batch=10**6)
    pairs, _ = load_pairs(data, CHAT)

    def build(positions):
        config = GPT2Config(
            vocab_size=V,
            n_embd=32,
            n_layer=2,
            n_head=2,
            n_positions=positions,
            bos_token_id=None,
            eos_token_id=None,
        )
        return seeded(lambda: GPT2LMHeadModel(config).eval())

    source = contrastive(build(1024), prompts)
    need = max(
        len(context) + len(response.ids) - 1
        for responses in ResponsePairs(pairs, CHAT)
        for response in responses
        for context in source.contexts(response)
    )
    report, *_ = run(tmp_path, options, data, model=build(need))
    assert report.kept == 2


def test_positions_that_depend_on_other_rows_are_not_shared(caplog):
    from transformers import Phi3Config, Phi3ForCausalLM

    factors = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [9.0] * 4,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 100,
    }
    model = seeded(
        lambda: Phi3ForCausalLM(
            Phi3Config(
                vocab_size=V,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=800,
                original_max_position_embeddings=100,
                rope_parameters=factors,
                initializer_range=0.3,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=None,
            )
        ).eval()
    )
    pairs, _ = load_pairs([{"prompt": "owl?", "chosen": "moon", "rejected": "sun"}], CHAT)
    source = contrastive(model, SHORT)
    source.score(ResponsePairs(pairs, CHAT)[0])
    assert source.context.scorer.share is False
    (message,) = warnings(caplog)
    assert "rope_type is 'longrope'" in message


def test_sharing_is_judged_on_the_longest_pair(monkeypatch):
    """And on the shortest, of those that the model's positions hold."""
    shared = Scorer._shared

    def wrong_if_long(scorer, rows, outputs):
        found = shared(scorer, rows, outputs)
        if max(len(context) + len(completion) for context, completion in rows) > 50:
            found[0]["logprobs"] += 10
        return found

    monkeypatch.setattr(Scorer, "_shared", wrong_if_long)
    data = [{"prompt": "owl?", "chosen": "moon " * n, "rejected": "sun"} for n in (200, 30, 2)]
    pairs = load_pairs(data, CHAT)[0]
    model = tiny_llama(V, max_position_embeddings=100)
    for known, found in ((pairs[2:], True), (pairs[1:], False), (pairs, False)):
        source = contrastive(model, SHORT, ResponsePairs(known, CHAT))
        assert source.context.scorer.share is None  # not tried yet
        source.score(ResponsePairs(pairs, CHAT)[2])
        assert source.context.scorer.share == found


@pytest.mark.parametrize("known", [0, 1, 2])
def test_sharing_is_tried_once(known, monkeypatch):
    pairs, tried = ResponsePairs(load_pairs(rows(2), CHAT)[0], CHAT), []
    try_sharing = Scorer._try_sharing

    def counted(scorer, rows):
        tried.append(rows)
        try_sharing(scorer, rows)

    monkeypatch.setattr(Scorer, "_try_sharing", counted)
    source = contrastive(MODEL, SHORT, ResponsePairs(pairs.pairs[:known], CHAT))
    source.score(pairs[0])
    source.context.reference(pairs[1])
    assert len(tried) == 1 and source.context.scorer.share
    if known:  # every process tries it on the same rows
        ids = {tuple(x.ids) for i in range(known) for x in pairs[i]}
        assert {tuple(completion) for _, completion in tried[0]} == ids


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("tokens", [1, 60, 16384])
def test_what_rows_begin_with_is_run_once(tokens, implementation):
    """To the same values, for any size of a batch."""
    model, seen = copy.deepcopy(MODEL), []
    model.set_attn_implementation(implementation)
    context = Context(model, CHAT, tokens_per_batch=tokens, on_tokens=seen.append)
    random = np.random.default_rng(0)
    rows = []
    for beginning in (random.integers(1, V, n).tolist() for n in (30, 20)):
        for more in (3, 5, 0):
            begun = beginning + random.integers(1, V, more).tolist()
            rows += [(begun, random.integers(1, V, n).tolist()) for n in (1, 7)]
    random.shuffle(rows)
    found = context.scorer.score(rows)
    for (begun, completion), logps in zip(rows, found, strict=True):
        expected = dense(model, begun, completion)
        torch.testing.assert_close(logps.double(), expected, rtol=0, atol=1e-5)
    whole = sum(len(begun) + len(completion) - 1 for begun, completion in rows)
    longest = max(len(begun) + len(completion) - 1 for begun, completion in rows)
    assert run_once(rows) <= sum(seen) <= whole and max(seen) <= max(tokens, longest)
    if tokens == 16384:
        assert sum(seen) == run_once(rows) and len(seen) == 1
    assert context.scorer.share and context.scorer.score([]) == []
    off = Context(model, CHAT, share_prefix=False, on_tokens=seen.append).scorer
    seen.clear()
    off.score(rows)
    assert sum(seen) == whole


def test_parts_of_another_size_are_refused(tmp_path, monkeypatch, small_parts):
    stopped(tmp_path, monkeypatch)
    monkeypatch.setattr(treg.rewards.annotate, "PART_PAIRS", 5)
    with pytest.raises(ValueError, match="made with part_pairs 4, now it is 5"):
        run(tmp_path, data=rows(26, seed=4))


def test_a_complete_output_is_not_made_again(tmp_path, whole):
    before, report = whole.read_bytes(), read_meta(whole)["report"]
    model, calls = copy.deepcopy(MODEL), []
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    again, *_ = run(tmp_path, data=rows(26, seed=4), model=model, name="whole.parquet")
    assert not calls and whole.read_bytes() == before
    assert json.loads(json.dumps(again.stored())) == report
    run(tmp_path, data=rows(26, seed=4), model=model, name="b.parquet")
    assert calls


@pytest.mark.parametrize("content", [b"", b"not parquet", None], ids=["empty", "text", "other"])
def test_an_output_that_is_no_annotated_file_is_refused(tmp_path, content):
    path = tmp_path / "a.parquet"
    path.write_bytes(content) if content is not None else pq.write_table(pa.table({"x": [1]}), path)
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"a\.parquet: not written by `treg annotate`; give another output"
    ):
        run(tmp_path)
    assert path.read_bytes() == before


def test_output_must_be_parquet(tmp_path):
    with pytest.raises(
        ValueError, match=r"output: expected a path that ends in \.parquet, got .*a\.jsonl"
    ):
        run(tmp_path, name="a.jsonl")


def test_a_run_that_is_killed_while_it_cleans_up(tmp_path, monkeypatch, whole):
    """Whatever is left of the parts when the output is there is not taken for parts of another
    run.
    """
    folder = tmp_path / "a.parquet.parts"

    def half(self):
        (self.folder / "manifest.json").unlink()
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", half)
        with pytest.raises(Stop):
            run(tmp_path, data=rows(26, seed=4))
    assert len(list(folder.glob("part-*.parquet"))) == 7 and same(tmp_path / "a.parquet", whole)
    (tmp_path / "a.parquet").unlink()
    other = tiny_llama(V, initializer_range=0.2)
    run(tmp_path, data=rows(26, seed=4), model=other)
    run(tmp_path, data=rows(26, seed=4), model=other, name="b.parquet")
    assert same(tmp_path / "a.parquet", tmp_path / "b.parquet") and not folder.exists()


def test_left_over_parts_of_a_complete_output_are_removed(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(Parts, "remove", lambda self: None)
        run(tmp_path, data=rows(26, seed=4))
    assert (tmp_path / "a.parquet.parts").exists()
    run(tmp_path, data=rows(26, seed=4))
    assert same(tmp_path / "a.parquet", whole) and not (tmp_path / "a.parquet.parts").exists()


def test_two_processes(tmp_path, whole):
    """One of them counts what is left to do when the other could long have begun, and reads what
    became of the parts when the other could long have removed them.
    """
    output = tmp_path / "a.parquet"
    env = {"ACCELERATE_USE_CPU": "true"}
    ranks = [worker(output, late=1.0, **env, **rank) for rank in processes.ranks_env(2)]
    processes.wait_for_all(ranks, 90)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].said() + ranks[1].said()
    assert same(output, whole) and not (tmp_path / "a.parquet.parts").exists()


def test_problems_survive_a_stop(tmp_path, monkeypatch, small_parts):
    model = tiny_llama(V, max_position_embeddings=120)
    data = rows(26, seed=4)
    for i in (3, 11):
        data[i] = {**data[i], "chosen": "the sun " * 40}
    stopped(tmp_path, monkeypatch, data=data, model=model)
    report, examples, meta = run(tmp_path, data=data, model=model)
    assert report.dropped == meta["report"]["dropped"] == {"contrastive prompt too long": 2}
    assert [x["index"] for x in examples] == [i for i in range(26) if i not in (3, 11)]
    assert (report.seen, report.kept) == (26, 24)


@pytest.mark.parametrize("value", [0, -1, 2.5, None])
def test_bad_tokens_per_batch(value):
    with pytest.raises(ValueError, match="tokens_per_batch: expected a positive integer"):
        AnnotateOptions(tokens_per_batch=value)


def test_limit_and_split(tmp_path):
    report, examples, _ = run(tmp_path, data={"test": rows(5)}, split="test", limit=2)
    assert report.seen == len(examples) == 2


# -- fingerprints
# -


def test_model_fingerprint():
    model = copy.deepcopy(MODEL)
    found = model_fingerprint(model)
    assert found == model_fingerprint(copy.deepcopy(MODEL).bfloat16()) == model_fingerprint(MODEL)
    for config in (
        peft.LoraConfig(target_modules=["q_proj", "down_proj"]),
        peft.LoraConfig(target_modules="all-linear", use_dora=True, modules_to_save=["lm_head"]),
        peft.LoraConfig(target_modules=["v_proj"], trainable_token_indices=[1, 2]),
        peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(target_modules=["v_proj"]),
    ):
        assert model_fingerprint(peft.get_peft_model(copy.deepcopy(MODEL), config)) == found
    assert model_fingerprint(tiny_llama(V, tie_word_embeddings=True)) != found
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.arange(20)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert model_fingerprint(model) != found


def test_tokenizer_fingerprint():
    found = tokenizer_fingerprint(CHAT)
    assert found == tokenizer_fingerprint(tiny_tokenizer()) != tokenizer_fingerprint(PLAIN)
    for changed in (tiny_tokenizer(), tiny_tokenizer(crossing=True), tiny_tokenizer()):
        if changed.vocab_size == CHAT.vocab_size:
            changed.chat_template += " "
        assert tokenizer_fingerprint(changed) != found
    more = tiny_tokenizer()
    more.add_tokens(["<more>"])
    assert tokenizer_fingerprint(more) != found
    other = tiny_tokenizer()
    other.eos_token = other.pad_token
    assert tokenizer_fingerprint(other) != found


def test_fingerprints_are_checked_when_examples_are_loaded(tmp_path):
    run(tmp_path)
    path = str(tmp_path / "a.parquet")
    options = dict(max_length=None, streams={"token_rewards": "alpha=0"})
    assert len(ExampleLoader(CHAT, MODEL, **options)(path, "train")) == 5
    for what, args in {
        "tokenizer": (PLAIN, MODEL),
        "model": (CHAT, tiny_llama(V, initializer_range=0.2)),
    }.items():
        with pytest.raises(ValueError, match=f"expected data annotated with this {what}"):
            ExampleLoader(*args, **options)(path, "train")
        assert len(ExampleLoader(*args, **options, check_fingerprint=False)(path, "train")) == 5
    # a file of another program may say nothing of what made it
    write_annotated(path, [annotated()], {})
    with pytest.raises(ValueError, match=r"a\.parquet: .* \(\w+\), got none; .*ignore_fingerprint"):
        ExampleLoader(CHAT, MODEL, **options)(path, "train")
    assert ExampleLoader(CHAT, MODEL, **options, check_fingerprint=False)(path, "train")


# -- annotated files
# -


def annotated(index=0, **changed):
    return {
        "index": index,
        "where": f"f:{index}",
        "prompt_ids": [1, 2],
        "chosen_ids": [3, 4, 5],
        "rejected_ids": [6],
        "chosen_token_rewards": [0.5, -0.25, 0.0],
        "rejected_token_rewards": [0.125],
        "ref_chosen_logps": -3.5,
        "ref_rejected_logps": -1.0,
        "ref_chosen_token_logps": [-1.0, -2.0, -0.5],
        "ref_rejected_token_logps": [-1.0],
    } | changed


@pytest.mark.parametrize("per_token", [False, True])
def test_written_and_read(tmp_path, per_token):
    path, parts = tmp_path / "a.parquet", [tmp_path / f"{i}.parquet" for i in range(3)]
    for part, order in zip(parts, ([2, 0], [], [1]), strict=True):
        write_annotated(part, [annotated(i) for i in order], {"part": 1}, per_token=per_token)
    merge_annotated(parts, path, {"fingerprint": "é"})
    examples, meta = read_annotated(path)
    assert (
        meta == read_meta(path) == {"fingerprint": "é"}
        and is_annotated(path)
        and is_annotated(str(path))
    )
    want = [
        {k: v for k, v in annotated(i).items() if per_token or "token_logps" not in k}
        for i in range(3)
    ]
    assert [
        {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in x.items()} for x in examples
    ] == want
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "0.parquet",
        "1.parquet",
        "2.parquet",
        "a.parquet",
    ]


NAN, INF = float("nan"), float("inf")
BAD_ROWS = {
    "reward-nan": (
        dict(chosen_token_rewards=[NAN, 0, 0]),
        "expected 3 finite numbers in chosen_token_rewards",
    ),
    "reward-inf": (
        dict(rejected_token_rewards=[INF]),
        "expected 1 finite numbers in rejected_token_rewards",
    ),
    "reward-null": (dict(chosen_token_rewards=[None, 0, 0]), "chosen_token_rewards"),
    "rewards-fewer": (
        dict(chosen_token_rewards=[0.5]),
        "expected 3 finite numbers in chosen_token_rewards.* got 1",
    ),
    "rewards-none": (
        dict(chosen_token_rewards=None),
        "expected 3 finite numbers in chosen_token_rewards.* got 0",
    ),
    "logp-nan": (dict(ref_chosen_logps=NAN), "expected a finite ref_chosen_logps, got nan"),
    "logp-null": (dict(ref_rejected_logps=None), "expected a finite ref_rejected_logps, got None"),
    "logps-fewer": (
        dict(ref_chosen_token_logps=[-1.0]),
        "expected 3 finite numbers in ref_chosen_token_logps",
    ),
    "logps-inf": (
        dict(ref_rejected_token_logps=[-INF]),
        "expected 1 finite numbers in ref_rejected_token_logps",
    ),
    "no-prompt": (dict(prompt_ids=[]), "expected tokens in prompt_ids and chosen_ids, got none"),
    "no-completion": (
        dict(rejected_ids=[], rejected_token_rewards=[], ref_rejected_token_logps=[]),
        "expected tokens in prompt_ids and rejected_ids, got none",
    ),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_rows_that_do_not_agree(tmp_path, bad):
    changed, message = BAD_ROWS[bad]
    path = tmp_path / "a.parquet"
    write_annotated(path, [annotated(), annotated(7, **changed)], {}, per_token=True)
    with pytest.raises(ValueError, match=rf"a\.parquet: row 7: .*{message}"):
        read_annotated(path)


def test_files_that_are_not_annotated(tmp_path):
    path = tmp_path / "a.parquet"
    for content in (b"", b"not parquet", b"PAR1" + b"\xff" * 99 + b"\x63\0\0\0PAR1"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError,
            match=r"a\.parquet: expected a parquet file written by `treg annotate`, got: ",
        ):
            read_annotated(path)
        assert not is_annotated(path)
    with pytest.raises(FileNotFoundError, match=r"b\.parquet"):
        read_annotated(tmp_path / "b.parquet")
    assert not is_annotated(tmp_path / "b.parquet") and not is_annotated(5)
    write_annotated(path, [annotated()], {})
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None).drop(["treg"]), path)
    with pytest.raises(ValueError, match="got one without its metadata; run `treg annotate`"):
        read_annotated(path)
    assert not is_annotated(path)
    pq.write_table(table.drop(["chosen_token_rewards", "ref_rejected_logps"]), path)
    with pytest.raises(
        ValueError, match="got one without the columns chosen_token_rewards, ref_rejected_logps"
    ):
        read_annotated(path)
    write_annotated(path, [], {})
    with pytest.raises(ValueError, match=r"a\.parquet: expected at least one pair, found none"):
        read_annotated(path)


# -- real data
# -


@pytest.fixture(scope="module")
def real_vocabulary():
    return AutoTokenizer.from_pretrained(shared_data("tok", "qwen2.5")), tiny_llama(151936)


@pytest.mark.parametrize(
    "file", ["ultrafeedback_eval.jsonl", "hh_harmless_test.jsonl.gz", "sharegpt_demo.json"]
)
def test_real_files(tmp_path, file, real_vocabulary):
    tokenizer, model = real_vocabulary
    options = AnnotateOptions(EncodeOptions(120), tokens_per_batch=4096, per_token=True)
    report, examples, _ = run(
        tmp_path, options, shared_data("prefs", file), model, tokenizer, limit=10
    )
    assert report.seen == 10 and len(examples) == report.kept >= 4
    for x in examples:
        for side in SIDES:
            ids = x[f"{side}_ids"].tolist()
            end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else len(ids)
            assert (
                x[f"{side}_token_rewards"][:end].all()
                and not x[f"{side}_token_rewards"][end:].any()
            )
            np.testing.assert_allclose(
                x[f"ref_{side}_token_logps"].sum(dtype=float), x[f"ref_{side}_logps"], rtol=1e-6
            )
    x = min(examples, key=lambda x: len(x["prompt_ids"]))
    logps = dense(model, x["prompt_ids"], x["chosen_ids"])
    np.testing.assert_allclose(x["ref_chosen_token_logps"], logps, rtol=1e-4, atol=1e-4)


def test_real_model(tmp_path):
    folder = shared_data("lm", "tinystories-656k")
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    story = "Once upon a time, there was a little girl named Lily. She"
    words = ["big", "small", "red", "happy"]
    data = [
        {
            "prompt": f"{story} had a {w} dog. One",
            "chosen": " day, she went to the park.",
            "rejected": " park the to went she, day.",
        }
        for w in words
    ]
    _, examples, _ = run(
        tmp_path, AnnotateOptions(EncodeOptions(100), per_token=True), data, model, tokenizer
    )
    for x in examples:
        for side in SIDES:
            logps = dense(model, x["prompt_ids"], x[f"{side}_ids"])
            np.testing.assert_allclose(x[f"ref_{side}_token_logps"], logps, rtol=1e-4, atol=1e-4)
            assert (
                x[f"{side}_token_rewards"][-1] == 0
                and np.abs(x[f"{side}_token_rewards"][:-1]).max() > 1e-3
            )
        assert x["ref_chosen_logps"] > x["ref_rejected_logps"] + 5
