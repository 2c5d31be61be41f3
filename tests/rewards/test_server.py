"""A model that a server has: the file that a model here makes; faults of servers; stops."""

import asyncio
import copy
import dataclasses
import email.utils
import json
import logging
import re
import threading
import time

import peft
import pytest
import torch
from judges import judge
from stand_in import DROP, StandIn, ok, refused, wait_until
from tiny import seeded, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

import treg.rewards.annotate
from treg.data import EncodeOptions
from treg.data.annotated import read_annotated, read_meta
from treg.data.examples import ExampleLoader
from treg.rewards import Context, ContrastivePrompts, load_source
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.rewards.scorer import Scorer
from treg.rewards.server import ServedModel, ServedScorer, ServerError, ServerOptions, check_sources
from treg.rewards.server.http import Connection
from treg.rewards.server.options import root_of, shown

CHAT = tiny_tokenizer()
MODEL = tiny_llama(len(CHAT))
SHORT = ContrastivePrompts(
    "{{ messages[-1].content }} -> {{ 'better' if better else 'worse' }}", "<answer>"
)
SMALL = AnnotateOptions(EncodeOptions(256), SHORT, per_token=True)
ROWS = [
    {
        "prompt": f"what is {i} + {i}?",
        "chosen": f"the answer is {2 * i}.",
        "rejected": f"the old owl said {i} and the fox was happy",
    }
    for i in range(7)
]
PAIRS = [([5, 6, 7], [8, 9]), ([5, 6], [7]), ([3], [4, 5, 6, 7])]
DIALECTS = {"vllm": ("vllm", "echo"), "echo": ("echo",), "sglang": ("sglang",)}


async def at_once(seconds):
    """In the place of asyncio.sleep."""


def options(server, **more):
    urls = [server.url] if isinstance(server, StandIn) else server
    return ServerOptions(urls, **{"model": "tiny", "retries": 3, "timeout": 20.0} | more)


def served(server, sleep=at_once, **more):
    given = options(server, **more)
    return ServedModel(given, CHAT, connection=Connection(given, sleep=sleep, jitter=lambda: 0.0))


@pytest.fixture
def start():
    """Starts servers and models, which end with the test."""
    ended = []

    def make(server=None, sleep=at_once, asked=None, **more):
        if server is None:
            server = StandIn(MODEL, tokenizer=CHAT, **more)
            ended.append(server)
        model = served(server, sleep, **asked or {})
        ended.append(model)
        return server, model

    yield make
    for x in reversed(ended):
        x.close()


def score(model, rows=PAIRS):
    return model.scorer(lambda tokens: None).score(rows)


def here(rows=PAIRS):
    scorer = Scorer(MODEL, CHAT, tokens_per_batch=512, share_prefix=False)
    with torch.inference_mode():
        return scorer.score(rows)


# -- values
# -


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("forced", [False, True])
def test_log_probs_are_those_of_the_model(start, dialect, forced):
    asked = {"dialect": dialect} if forced else {}
    _, model = start(dialects=DIALECTS[dialect], asked=asked)
    assert [x.name for x in model.dialects] == [dialect]
    seen = []
    found = model.scorer(seen.append).score(PAIRS)
    for a, b in zip(found, here(), strict=True):
        assert a.dtype == torch.float32 and a.device.type == "cpu"
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert sorted(seen) == sorted(len(x) + len(y) - 1 for x, y in PAIRS)
    assert model.longest == 2046 and model.said()["length"] == 2048


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_file_is_that_of_the_model(tmp_path, start, dialect):
    _, model = start(dialects=DIALECTS[dialect])
    reports = [
        annotate(x, CHAT, ROWS, tmp_path / name, SMALL, progress=False)
        for x, name in ((model, "s.parquet"), (MODEL, "l.parquet"))
    ]
    (far, far_meta), (near, near_meta) = (
        read_annotated(tmp_path / x) for x in ("s.parquet", "l.parquet")
    )
    assert reports[0] == reports[1] and len(far) == 7
    for a, b in zip(far, near, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if "logps" in name or "rewards" in name:
                x, y = (torch.tensor(v, dtype=torch.float64) for v in (value, b[name]))
                torch.testing.assert_close(x, y, atol=1e-4, rtol=0)
            elif name not in ("treg", "treg_checksum"):
                assert str(value) == str(b[name])
    assert far_meta["settings"]["engine"] == "server"
    assert far_meta["fingerprint"]["model"] == "served tiny"
    for name in ("tokenizer", "pairs"):
        assert far_meta["fingerprint"][name] == near_meta["fingerprint"][name]


def test_rows_that_begin_alike_follow_one_another(start):
    server, model = start(asked={"concurrency": 1})
    rows = [([1, 2, 3], [4]), ([9, 9, 9], [4]), ([1, 2, 3], [5]), ([9, 9, 8], [4])]
    before = len(server.prompts())
    found = score(model, rows)
    sent = server.prompts()[before:]
    assert sent == sorted(x + y for x, y in rows)
    for a, b in zip(found, here(rows), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_replicas_share_the_requests(start):
    first, second = (StandIn(MODEL, tokenizer=CHAT) for _ in range(2))
    with first, second:
        _, model = start([first.url, second.url])
        rows = [([i, i + 1, i + 2], [3 + j]) for i in range(3, 11) for j in range(2)]
        before = [len(x.prompts()) for x in (first, second)]
        for a, b in zip(score(model, rows), here(rows), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        sent = [x.prompts()[n:] for x, n in zip((first, second), before, strict=True)]
        assert [len(x) for x in sent] == [8, 8]
        begun = [{tuple(prompt[:3]) for prompt in x} for x in sent]
        assert not begun[0] & begun[1]  # a beginning goes to one of them


def test_replicas_must_have_one_model(start):
    other = StandIn(tiny_llama(len(CHAT), initializer_range=0.2), tokenizer=CHAT)
    message = pytest.raises(ValueError, match=r"expected replicas of one model, got .* differ")
    with other, StandIn(MODEL, tokenizer=CHAT) as first, message:
        start([first.url, other.url])


# -- what a server is asked first
# -


def test_a_model_that_the_server_does_not_have(start):
    with pytest.raises(ValueError, match=r"model: expected one that .* has \(a, b\), got 'tiny'"):
        start(names=("a", "b"))


def test_a_server_without_a_list_of_models(start):
    def none(server, path, body, number):
        return refused(404, "Not Found") if path == "/v1/models" else None

    _, model = start(fault=none)
    assert model.length is None and model.longest == 2**31


def test_the_length_is_the_least_that_is_said(start):
    def llama(server, path, body, number):
        if path == "/v1/models":
            return ok({"data": [{"id": "tiny", "meta": {"n_ctx_train": 900}}]})
        props = {"default_generation_settings": {"n_ctx": 700}}
        return ok(props) if path == "/props" else None

    _, model = start(fault=llama)
    assert model.length == 700
    _, model = start(fault=llama, asked={"length": 600})
    assert model.length == 600 and model.longest == 598


def test_a_server_that_gives_log_probs_of_what_it_makes_alone(start):
    """As llama.cpp's, which passes over `echo`."""

    def without(answer, body):
        answer["choices"][0]["logprobs"] = {"token_logprobs": [-1.0], "tokens": ["a"]}

    message = (
        "expected a server that gives log-probs of the token ids of a prompt.*vllm: expected "
        "prompt_logprobs.*sglang: Not Found; echo: expected token_logprobs of .* got 1"
    )
    with pytest.raises(ValueError, match=message):
        start(dialects=("echo",), change=without)


@pytest.mark.parametrize("status", [422, 500])
def test_a_server_that_takes_texts_alone(start, status):
    """As llama-cpp-python's, which says so with 500."""
    waits = Waits()

    def texts(server, path, body, number):
        return refused(status, "Input should be a valid string") if "prompt" in body else None

    with pytest.raises(ValueError, match=r"echo: .*Input should be a valid string"):
        start(dialects=("echo",), fault=texts, sleep=waits)
    assert waits == [1.0] * (2 if status == 500 else 0)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_log_probs_of_the_wrong_places(start, dialect):
    with pytest.raises(ValueError, match=r"expected the log-prob .* as when the server made it"):
        start(dialects=DIALECTS[dialect], shift=1)


def test_a_server_that_does_not_say_what_it_makes(start):
    def silent(answer, body):
        answer["choices"][0].pop("token_ids")
        answer["choices"][0]["logprobs"] = None

    with pytest.raises(ValueError, match="expected a server that says which token it makes"):
        start(change=silent)


def test_a_token_that_has_no_text_of_its_own_is_passed_over(start):
    """Without ids the texts say which token is made; one that is half a letter says nothing."""
    seen = []

    def unclear(answer, body):
        logprobs = answer["choices"][0]["logprobs"]
        seen.append(len(body["prompt"]))
        if len(seen) < 4:
            logprobs["tokens"][-1] = "\ufffd"

    start(dialects=("echo",), change=unclear, asked={"dialect": "echo"})
    assert seen[1] > seen[2] > seen[3]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_that_adds_a_token(start, dialect):
    with pytest.raises(ValueError, match="the server adds tokens to it"):
        start(dialects=DIALECTS[dialect], bos=1)


def test_another_tokenizer(start):
    other = seeded(lambda: tiny_tokenizer(crossing=True))
    message = pytest.raises(ValueError, match="tokenizer: expected the one of the server")
    with StandIn(MODEL, tokenizer=other) as server, message:
        start(server)


def test_a_server_that_does_not_tokenize(start, caplog):
    def none(server, path, body, number):
        return refused(404, "Not Found") if path == "/tokenize" else None

    with caplog.at_level(logging.WARNING):
        start(fault=none)
    assert caplog.text.count("does not say how it tokenizes") == 1


# -- answers that are not one log-prob for each token
# -


def tail(answer):
    """The places of an answer that hold log-probs, whatever its dialect, as (container, key)."""
    if "meta_info" in answer:
        return [(x, 0) for x in answer["meta_info"]["input_token_logprobs"]]
    choice = answer["choices"][0]
    if "prompt_logprobs" in choice:
        entries = choice["prompt_logprobs"]
        return [(next(iter(x.values())) if x else {}, "logprob") for x in entries]
    numbers = choice["logprobs"]["token_logprobs"]
    return [(numbers, i) for i in range(len(numbers) - 1)]


def set_last(value):
    def change(answer):
        holder, key = tail(answer)[-1]
        holder[key] = value

    return change


def one_less(answer):
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"][:] = []
    elif "prompt_logprobs" in answer["choices"][0]:
        answer["choices"][0]["prompt_logprobs"].pop()
    else:
        del answer["choices"][0]["logprobs"]["token_logprobs"][-2:]


def other_ids(answer):
    if "meta_info" in answer:
        answer["meta_info"]["input_token_logprobs"][-1][1] += 1
    elif "prompt_logprobs" in answer["choices"][0]:
        entry = answer["choices"][0]["prompt_logprobs"][-1]
        entry["0"] = entry.pop(next(iter(entry)))
    else:
        answer["choices"][0]["prompt_token_ids"] = [0, 0]


def other_count(answer):
    counts = answer.get("meta_info", answer.get("usage"))
    counts["prompt_tokens"] -= 1


def nothing(answer):
    answer.clear()


def no_list(answer):
    answer.update(choices=[], meta_info=[])


WRONG = {
    "null": (set_last(None), "expected a log-prob of token 1 of the completion, got None"),
    "text": (set_last("-1"), "expected a log-prob of token 1 of the completion, got '-1'"),
    "true": (set_last(True), "expected a log-prob of token 1 of the completion, got True"),
    "nan": (set_last(float("nan")), "expected log-probs, numbers <= 0, got nan"),
    "logit": (set_last(3.5), "expected log-probs, numbers <= 0, got 3.5"),
    "infinite": (set_last(float("inf")), "expected log-probs, numbers <= 0, got inf"),
    "fewer": (one_less, "expected (prompt_|token_)?log-?probs of .*got (0|4)"),
    "ids": (other_ids, "of the ids that were sent|expected the log-prob of 9 at place 4, got 0"),
    "count": (other_count, "expected a prompt of 5 tokens, as it was sent, got one of 4"),
    "nothing": (nothing, "expected (one choice|meta_info)"),
    "no list": (no_list, "expected (one choice|meta_info)"),
}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_answers_are_refused(start, dialect, wrong):
    change, message = WRONG[wrong]
    server, model = start(dialects=DIALECTS[dialect])
    server.change = lambda answer, body: change(answer)
    with pytest.raises(ValueError, match=f"5 tokens were sent: .*{message}"):
        score(model, PAIRS[:1])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_prompt_that_is_cut(start, dialect):
    server, model = start(dialects=DIALECTS[dialect])
    server.cut = 4
    with pytest.raises(ValueError, match="the server cuts it"):
        score(model, PAIRS[:1])


def test_roundings_above_zero_are_zero(start):
    server, model = start()
    server.change = lambda answer, body: set_last(1e-6)(answer)
    assert score(model, PAIRS[:1])[0][-1] == 0.0


# -- rows that a server does not take
# -


def kept_and_dropped(report):
    return report.kept, {reason: len(found) for reason, found in report.dropped.items()}


def dropped(report):
    return json.dumps(report.stored(), default=str)


@pytest.mark.parametrize("said", [True, False], ids=["length said", "not said"])
def test_rows_that_are_too_long(tmp_path, start, said):
    """A row that does not fit is left out, whether that is known before or is said of it."""
    data = [*ROWS[:3], ROWS[0] | {"chosen": "the fox and the owl " * 20}]
    server, _ = start(length=90)
    hidden = lambda *args: refused(404, "") if args[1] == "/v1/models" else None  # noqa: E731
    server.fault = None if said else hidden
    _, model = start(server)
    before = len(server.prompts())
    report = annotate(model, CHAT, data, tmp_path / "a.parquet", SMALL, progress=False)
    assert report.kept == 3
    refusals = [x for x in server.prompts()[before:] if x and len(x) + 1 > 90]
    if said:
        assert "too long" in dropped(report) and not refusals
    else:
        assert "refused by the server" in dropped(report) and refusals
        assert "the context is 90 tokens" in dropped(report)
    examples, _ = read_annotated(tmp_path / "a.parquet")
    alone, _ = expected_file(tmp_path, data[:3])
    for a, b in zip(examples, alone, strict=True):
        for side in ("chosen", "rejected"):
            assert a[f"ref_{side}_logps"] == pytest.approx(b[f"ref_{side}_logps"], abs=1e-4)


def expected_file(tmp_path, data):
    annotate(MODEL, CHAT, data, tmp_path / "here.parquet", SMALL, progress=False)
    return read_annotated(tmp_path / "here.parquet")


def test_a_token_that_never_comes(tmp_path, start):
    """vLLM writes -9999 for a log-prob that JSON cannot hold."""
    server, model = start()
    ids = CHAT("the answer is 4.", add_special_tokens=False)["input_ids"]

    def never(answer, body):
        if any(body["prompt"][i : i + len(ids)] == ids for i in range(len(body["prompt"]))):
            set_last(-9999.0)(answer)

    server.change = never
    report = annotate(model, CHAT, ROWS, tmp_path / "a.parquet", SMALL, progress=False)
    assert report.kept == 6 and "has the log-prob -9999.0" in dropped(report)


def test_every_row_is_refused(tmp_path, start):
    server, model = start()
    server.fault = lambda *args: refused(400, "no") if args[2] else None
    with pytest.raises(ValueError, match="expected a pair that can be annotated"):
        annotate(model, CHAT, ROWS, tmp_path / "a.parquet", SMALL, progress=False)


def test_a_model_that_is_gone_ends_the_run(start):
    server, model = start()
    server.fault = lambda *args: refused(404, "the model does not exist")
    with pytest.raises(ServerError, match="404: the model does not exist"):
        score(model)


# -- faults that pass, and faults that do not
# -


class Waits(list):
    """The seconds that were to be waited."""

    async def __call__(self, seconds):
        self.append(seconds)


def failing(times, fault):
    """Each prompt meets the fault so many times, then an answer."""
    met: dict[str, int] = {}

    def found(server, path, body, number):
        key = json.dumps([path, body])
        met[key] = met.get(key, 0) + 1
        return fault if body and met[key] <= times else None

    return found


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_a_fault_that_passes(start, status, caplog):
    waits = Waits()
    server, model = start(sleep=waits)
    server.fault = failing(2, refused(status, "busy"))
    with caplog.at_level(logging.WARNING):
        found = score(model, PAIRS[:1])
    torch.testing.assert_close(found[0], here()[0], atol=1e-5, rtol=0)
    assert waits == [1.0, 2.0]
    assert f"{status}: busy; sent again in 1 s" in caplog.text


def test_a_connection_that_is_dropped(start):
    waits = Waits()
    server, model = start(sleep=waits)
    server.fault = failing(2, DROP)
    torch.testing.assert_close(score(model)[1], here()[1], atol=1e-5, rtol=0)
    assert len(waits) == 6


def test_a_slow_answer(start):
    waits, late = Waits(), threading.Event()
    server, model = start(sleep=waits, asked={"timeout": 0.2, "retries": 2})
    met = []

    def slow(server, path, body, number):
        met.append(path)
        if len(met) == 1:
            late.wait(5)

    server.fault = slow
    torch.testing.assert_close(score(model, PAIRS[:1])[0], here()[0], atol=1e-5, rtol=0)
    late.set()
    assert waits == [1.0] and len(met) == 2


def test_it_waits_as_long_as_the_server_says(start):
    waits = Waits()
    server, model = start(sleep=waits)
    date = email.utils.formatdate(time.time() + 40, usegmt=True)
    # seconds, a date, the past, nonsense, longer than anybody waits
    told = iter(["7", date, "-3", "soon", "99999"])

    def busy(server, path, body, number):
        header = next(told, None)
        return header and (429, {"Retry-After": header}, b"")

    server.fault = busy
    with pytest.raises(ServerError, match="429: no word; sent 4 times"):
        score(model, PAIRS[:1])
    assert waits[0] == 7.0 and 30 < waits[1] <= 40 and waits[2] == 4.0
    told = iter(["soon", "99999"])
    waits.clear()
    score(model, PAIRS[:1])
    assert waits == [1.0, 600.0]


def test_waits_grow_to_a_minute_and_differ():
    given = ServerOptions(["http://localhost:1"], "tiny", retries=9)
    connection = Connection(given, jitter=lambda: 0.0)
    assert [connection._wait(i, None) for i in (0, 1, 5, 6, 9)] == [1.0, 2.0, 32.0, 60.0, 60.0]
    assert Connection(given, jitter=lambda: 1.0)._wait(1, None) == 1.0
    assert 1.0 < Connection(given)._wait(1, None) <= 2.0


LASTING = {
    "busy": (refused(503, "still busy"), "503: still busy; sent 4 times", 4),
    "dropped": (DROP, "RemoteProtocolError.*; sent 4 times.*the same command goes on", 4),
    "key": (refused(401, "no key"), "401: no key; no key was sent", 1),
    "forbidden": (refused(403, "no"), "403: no; no key was sent", 1),
    "leads": ((302, {"Location": "http://u:p@x/y"}, b""), "it leads to http://x/y; give that", 1),
    "missing": (refused(501, "never"), "501: never", 1),
    "method": (refused(405, "never"), "405: never", 1),
    "page": (
        (200, {"Content-Type": "text/html"}, b"<html>a proxy</html>"),
        "expected JSON, got text/html: '<html>a proxy</html>'",
        1,
    ),
    "half": ((200, {}, b'{"choices": ['), "expected JSON, got nothing", 1),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_lasts(start, fault):
    answer, message, times = LASTING[fault]
    server, model = start()
    before = len(server.asked)
    server.fault = lambda *args: answer
    with pytest.raises(ServerError, match=message):
        score(model, PAIRS[:1])
    assert len(server.asked) - before == times


def test_nobody_answers(start):
    with StandIn(MODEL) as server:
        url = server.url
    with pytest.raises(ServerError, match=r"ConnectError.*sent 4 times"):
        start([url])


def test_the_first_that_fails_for_good_stops_the_others(start):
    """Of 40 rows, two at a time: the third has no answer, and what has not begun is not sent."""
    server, model = start(asked={"concurrency": 2})
    before, third = len(server.asked), []

    def fault(server, path, body, number):
        third.append(number)
        return refused(401, "enough") if len(third) == 3 else None

    server.fault = fault
    with pytest.raises(ServerError, match="enough"):
        score(model, [([3, 4, i], [5]) for i in range(3, 43)])
    time.sleep(0.05)
    count = len(server.asked) - before
    time.sleep(0.05)
    assert server.under_way == 0 and len(server.asked) - before == count < 10
    server.fault = None
    assert len(score(model)) == 3  # the connection is still good


@pytest.mark.parametrize("bound", [1, 3])
def test_the_bound_of_requests_is_held_and_used(start, bound):
    server, model = start(asked={"concurrency": bound})
    full = threading.Event()

    def wait(server, path, body, number):
        if server.under_way == bound:
            full.set()
        full.wait(10)

    server.most = 0
    server.fault = wait
    assert len(score(model, [([3, 4, i], [5]) for i in range(3, 23)])) == 20
    assert server.most == bound


# -- the key
# -


def test_the_key_is_sent_and_kept_nowhere(tmp_path, start, caplog):
    with StandIn(MODEL, tokenizer=CHAT) as server, caplog.at_level(logging.DEBUG):
        url = server.url.replace("//", "//me:secret@") + "/v1?token=secret"
        _, model = start([url], asked={"key": "secret-key"})
        annotate(model, CHAT, ROWS[:2], tmp_path / "a.parquet", SMALL, progress=False)
        assert {x[2].get("Authorization") for x in server.asked} <= {
            "Bearer secret-key",
            "Basic bWU6c2VjcmV0",
        }
    assert b"secret" not in (tmp_path / "a.parquet").read_bytes()
    assert read_meta(tmp_path / "a.parquet")["server"]["url"] == [server.url]


def test_no_key_is_sent_where_there_is_none(start):
    server, _ = start()
    assert all("Authorization" not in headers for _, _, headers in server.asked)


@pytest.mark.parametrize(
    "url, root",
    [
        ("http://h:1", "http://h:1"),
        ("http://h:1/", "http://h:1"),
        ("http://h:1/v1", "http://h:1"),
        ("https://h/a/v1/", "https://h/a"),
        ("https://u:p@h/v1?x=1", "https://u:p@h"),
    ],
)
def test_urls(url, root):
    assert root_of(url) == root
    assert shown(root) == root.replace("u:p@", "")


BAD = {
    "urls": ({"urls": "http://h"}, "urls: expected a list of URLs"),
    "none": ({"urls": []}, "urls: expected a list of URLs"),
    "twice": ({"urls": ["http://h", "http://h/v1"]}, "urls: expected different servers"),
    "scheme": ({"urls": ["h:8000"]}, "server: expected a URL such as"),
    "concurrency": ({"concurrency": 0}, "concurrency: expected a whole number >= 1, got 0"),
    "retries": ({"retries": -1}, "retries: expected a whole number >= 0, got -1"),
    "timeout": ({"timeout": 0}, "timeout: expected seconds > 0, got 0"),
    "length": ({"length": 2}, "length: expected a whole number >= 3, got 2"),
    "dialect": ({"dialect": "tgi"}, "dialect: expected one of vllm, sglang, echo, got 'tgi'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_options(bad):
    changed, message = BAD[bad]
    with pytest.raises(ValueError, match=re.escape(message)):
        ServerOptions(**{"urls": ["http://h"], "model": "tiny"} | changed)


# -- what needs a model here
# -


@pytest.mark.parametrize(
    "name, given",
    [
        ("implicit", {"model": "x"}),
        ("entropy", {}),
        ("shuffled", {"of": "entropy"}),
        ("several", {"sources": ["surprise", "entropy"]}),
        ("messagewise", {"of": "implicit", "of_options": {"model": "x"}}),
    ],
)
def test_sources_that_need_the_model_are_refused(name, given):
    with pytest.raises(
        ValueError, match=r"rewards: .* got '(implicit|entropy)'.* without --server"
    ):
        check_sources(name, given)


@pytest.mark.parametrize("name", ["contrastive", "surprise", "edits", "several", "shuffled"])
def test_sources_that_a_server_is_enough_for(name):
    check_sources(name, {})


def test_a_source_of_ones_own_that_needs_the_model(start):
    _, model = start()
    context = Context(model, CHAT)
    with pytest.raises(ValueError, match="dtype: expected a model that runs here, got 'tiny'"):
        load_source("implicit", {"model": "gpt2"}, context)
    assert not hasattr(model, "generate")
    with pytest.raises(ValueError, match="outputs: expected none of a served model, got entropy"):
        context.scorer.statistics([([1], [2])], ("entropy",))


def test_a_reward_model_runs_here_beside_it(tmp_path, start):
    _, model = start()
    folder = judge()
    given = AnnotateOptions(
        EncodeOptions(256), rewards="redistribution", rewards_options={"model": folder}
    )
    for x, name in ((model, "a.parquet"), (MODEL, "here.parquet")):
        annotate(x, CHAT, ROWS, tmp_path / name, given, progress=False)
    far, near = (read_annotated(tmp_path / x)[0] for x in ("a.parquet", "here.parquet"))
    for a, b in zip(far, near, strict=True):
        assert (a["chosen_token_rewards"] == b["chosen_token_rewards"]).all()
        assert a["ref_chosen_logps"] == pytest.approx(b["ref_chosen_logps"], abs=1e-4)


# -- stops and restarts
# -


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(treg.rewards.annotate, "PART_PAIRS", 2)


def write(tmp_path, model, name="a.parquet", data=ROWS, given=SMALL):
    return annotate(model, CHAT, data, tmp_path / name, given, progress=False)


def interrupted(tmp_path, server, model, after):
    """Ctrl-C while a server works."""
    met = []

    def stop(tokens):
        met.append(tokens)
        if len(met) == after:
            raise KeyboardInterrupt

    scorer = ServedScorer(model, on_tokens=stop)
    model.scorer = lambda on_tokens: scorer
    with pytest.raises(KeyboardInterrupt, match="of 7 pairs are finished and kept"):
        write(tmp_path, model)
    del model.scorer
    wait_until(lambda: server.under_way == 0)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, start, small_parts):
    server, model = start()
    write(tmp_path, model, "whole.parquet")
    whole = (tmp_path / "whole.parquet").read_bytes()
    interrupted(tmp_path, server, model, 30)
    parts = list((tmp_path / "a.parquet.parts").glob("part-*.parquet"))
    assert parts and not (tmp_path / "a.parquet").exists()
    before = len(server.prompts())
    write(tmp_path, model)
    assert (tmp_path / "a.parquet").read_bytes() == whole
    assert not (tmp_path / "a.parquet.parts").exists()
    # what was finished is not asked again
    assert len(server.prompts()) - before < len(server.prompts()) / 2


def rounded(change):
    """A server whose log-probs differ by change nats, here and there."""

    def changed(answer, body):
        for place, entry in enumerate(answer["choices"][0]["prompt_logprobs"]):
            for own in (entry or {}).values():
                own["logprob"] -= change * (place % 2)

    return changed


def test_another_address_of_the_same_model_goes_on(tmp_path, start, small_parts):
    """Elsewhere, on another version, with other roundings: the file says where it was begun."""
    server, model = start()
    interrupted(tmp_path, server, model, 30)
    begun = json.loads((tmp_path / "a.parquet.parts/manifest.json").read_text())["server"]
    other, again = start(change=rounded(0.1), length=1000, dialects=("vllm", "sglang", "echo"))
    write(tmp_path, again)
    meta = read_meta(tmp_path / "a.parquet")
    assert meta["server"] == begun and begun["url"] == [server.url] != [other.url]
    # and a file that is there is the other's as well
    assert write(tmp_path, again).kept == 7


def test_another_model_under_the_name_does_not(tmp_path, start, small_parts):
    server, model = start()
    interrupted(tmp_path, server, model, 30)
    _, other = start(change=rounded(0.4))
    message = "expected the model 'tiny' that it was made with, got one whose log-probs .* differ"
    with pytest.raises(ValueError, match=message):
        write(tmp_path, other)
    write(tmp_path, model)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, other)


def test_another_name_and_a_model_here_are_others(tmp_path, start, small_parts):
    server, model = start(names=("tiny", "other"))
    interrupted(tmp_path, server, model, 30)
    _, other = start(server, asked={"model": "other"})
    with pytest.raises(ValueError, match="made with model 'served tiny', now it is 'served other'"):
        write(tmp_path, other)
    with pytest.raises(ValueError, match="made with engine 'server', now it is None"):
        write(tmp_path, MODEL)
    _, elsewhere = start(names=("other",), change=rounded(0.4), asked={"model": "other"})
    with pytest.raises(ValueError, match="made with model 'served tiny', now it is 'served other'"):
        write(tmp_path, elsewhere)
    write(tmp_path, MODEL, "here.parquet")
    with pytest.raises(ValueError, match="made with engine None, now it is 'server'"):
        write(tmp_path, model, "here.parquet")


def test_how_much_is_under_way_is_no_matter(tmp_path, start, small_parts):
    server, model = start()
    write(tmp_path, model, "whole.parquet")
    interrupted(tmp_path, server, model, 30)
    _, again = start(server, asked={"concurrency": 3, "retries": 1})
    write(tmp_path, again, given=dataclasses.replace(SMALL, tokens_per_batch=7))
    found = [(tmp_path / x).read_bytes() for x in ("whole.parquet", "a.parquet")]
    assert found[0] == found[1]


# -- training on it
# -


def loaded(path, model=MODEL, tokenizer=CHAT, **more):
    given = dict(max_length=None, streams={"token_rewards": "alpha=0"})
    return ExampleLoader(tokenizer, model, **given | more)(str(path), "train")


def test_training_starts_from_the_model_that_was_served(tmp_path, start, caplog):
    path = tmp_path / "a.parquet"
    write(tmp_path, start()[1])
    with caplog.at_level(logging.INFO):
        assert len(loaded(path)) == 7
    assert "annotated by the model 'tiny' of a server; its log-probs of a text" in caplog.text
    assert not [x for x in caplog.records if x.levelno >= logging.WARNING]
    other = tiny_llama(len(CHAT), initializer_range=0.2)
    message = "by the model 'tiny' of a server, whose log-probs .* differ by .*ignore_fingerprint"
    with pytest.raises(ValueError, match=message):
        loaded(path, other)
    assert len(loaded(path, other, check_fingerprint=False)) == 7
    with pytest.raises(ValueError, match="expected data annotated with this tokenizer"):
        loaded(path, tokenizer=tiny_tokenizer(chat=False))


def test_a_model_that_cannot_be_run_yet_is_taken_with_a_warning(tmp_path, start, caplog):
    write(tmp_path, start()[1])
    with torch.device("meta"):
        model = LlamaForCausalLM(MODEL.config)
    assert len(loaded(tmp_path / "a.parquet", model)) == 7
    assert "cannot be compared with the model that trains (ValueError: its weights" in caplog.text


def test_adapters_and_dropout_of_training_are_left_out(tmp_path, start):
    """And are as they were."""
    write(tmp_path, start()[1])
    model = seeded(
        lambda: peft.get_peft_model(
            copy.deepcopy(MODEL), peft.LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.5)
        )
    )
    model.train()
    assert len(loaded(tmp_path / "a.parquet", model, adapters=False)) == 7
    assert all(x.training for x in model.modules()) and model.active_adapters
    with pytest.raises(ValueError, match="whose log-probs of a text differ"):
        loaded(tmp_path / "a.parquet", model, adapters=True)


def test_files_of_two_servers_go_together(tmp_path, start):
    for name in "ab":
        _, model = start()
        write(tmp_path, model, f"{name}.parquet")
    examples, meta = read_annotated([str(tmp_path / f"{x}.parquet") for x in "ab"])
    assert len(examples) == 14 and meta["server"] == {"model": "tiny"}


def test_a_caller_with_a_loop_of_its_own(start):
    """As a notebook has."""
    _, model = start()

    async def cell():
        return score(model)

    assert len(asyncio.run(cell())) == 3


def test_a_connection_that_was_closed_opens_again(start):
    _, model = start()
    model.close()
    model.close()
    assert len(score(model)) == 3
