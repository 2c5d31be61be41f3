"""treg annotate --server: options, stops, several processes."""

import json

import processes
import pyarrow.parquet as pq
import pytest
import tiny
from stand_in import StandIn, refused, wait_until

from treg.cli import main
from treg.data.annotated import read_annotated, read_meta

CHAT = tiny.tiny_tokenizer()
MODEL = tiny.tiny_llama(len(CHAT))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer, a model and a file of preferences."""
    path = tmp_path_factory.mktemp("serving")
    CHAT.save_pretrained(path / "tokenizer")
    MODEL.save_pretrained(path / "model")
    CHAT.save_pretrained(path / "model")
    rows = [
        {
            "prompt": f"what is {i} + {i}?",
            "chosen": f"the answer is {2 * i}.",
            "rejected": f"the sun said {i}",
        }
        for i in range(20)
    ]
    (path / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def server():
    with StandIn(MODEL, tokenizer=CHAT, names=("some/model",)) as stand_in:
        yield stand_in


def command(folder, at, output, **more):
    given = {
        "server": at.url,
        "model": "some/model",
        "tokenizer": folder / "tokenizer",
        "data": folder / "prefs.jsonl",
        "output": output,
        "max_length": 256,
    } | more
    given = {name: value for name, value in given.items() if value is not None}
    return ["annotate", *(str(x) for name, value in given.items() for x in (f"--{name}", value))]


def test_from_a_file_to_a_file(folder, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TREG_SERVER_KEY", "secret-key")
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert main(command(folder, server, tmp_path / "a.parquet")) == 0
    assert "20 of 20 rows kept" in capsys.readouterr().out
    here = {"server": None, "model": folder / "model", "tokenizer": None}
    assert main(command(folder, server, tmp_path / "here.parquet", **here)) == 0
    found, near = (read_annotated(tmp_path / x)[0] for x in ("a.parquet", "here.parquet"))
    for a, b in zip(found, near, strict=True):
        for name in ("chosen_token_rewards", "ref_chosen_logps", "ref_rejected_logps"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)
    keys = {headers.get("Authorization") for _, _, headers in server.asked}
    assert keys == {"Bearer secret-key"}
    said = read_meta(tmp_path / "a.parquet")["server"]
    assert said["model"] == "some/model" and said["version"] == "0.0.1"
    assert b"secret" not in (tmp_path / "a.parquet").read_bytes()


def test_the_other_key(folder, server, tmp_path, monkeypatch):
    monkeypatch.delenv("TREG_SERVER_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    assert main(command(folder, server, tmp_path / "a.parquet", limit=2)) == 0
    assert {x[2].get("Authorization") for x in server.asked} == {"Bearer another"}


def test_the_name_is_a_folder_too(folder, tmp_path):
    """Then the tokenizer is that of the folder."""
    name = str(folder / "model")
    with StandIn(MODEL, tokenizer=CHAT, names=(name,)) as server:
        more = {"model": name, "tokenizer": None, "limit": 2}
        assert main(command(folder, server, tmp_path / "a.parquet", **more)) == 0


REFUSED = {
    "no tokenizer": ({"tokenizer": None}, "tokenizer: expected --tokenizer, a folder or hub name"),
    "dtype": ({"dtype": "bfloat16"}, "dtype: expected none with --server, got 'bfloat16'"),
    "attention": ({"attn_implementation": "sdpa"}, "attn_implementation: expected none with"),
    "bf16": ({"bf16": True}, "bf16: expected none with --server"),
    "fp16": ({"fp16": True}, "fp16: expected none with --server"),
    "batch": ({"tokens_per_batch": 64}, "tokens_per_batch: expected none with --server, got 64"),
    "share": ({"no_share_prefix": True}, "no_share_prefix: expected none with --server"),
    "implicit": (
        {"rewards": "implicit", "rewards.model": "x"},
        "such as contrastive or surprise, got 'implicit'",
    ),
    "entropy": ({"rewards": "entropy"}, "such as contrastive or surprise, got 'entropy'"),
    "url": ({"server": "localhost:8000"}, "server: expected a URL such as"),
    "dialect": ({"server_dialect": "tgi"}, "dialect: expected one of vllm, sglang, echo"),
    "concurrency": ({"server_concurrency": 0}, "concurrency: expected a whole number >= 1"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_refused_before_anything_is_sent(folder, server, tmp_path, refused, capsys):
    more, message = REFUSED[refused]
    assert main(command(folder, server, tmp_path / "a.parquet", **more)) == 2
    assert message in capsys.readouterr().err
    assert not server.asked and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", ["server_concurrency", "server_retries", "server_length", "server_dialect"]
)
def test_options_of_a_server_without_one(folder, server, tmp_path, option, capsys):
    value = "echo" if option == "server_dialect" else 7
    more = {"server": None, "model": folder / "model", "tokenizer": None, option: value}
    assert main(command(folder, server, tmp_path / "a.parquet", **more)) == 2
    assert f"{option}: expected it beside --server, got it alone" in capsys.readouterr().err


def test_what_a_server_says_is_one_line(folder, server, tmp_path, capsys):
    server.fault = lambda *args: refused(403, "not you")
    assert main(command(folder, server, tmp_path / "a.parquet")) == 2
    said = capsys.readouterr().err
    assert "403: not you; no key was sent" in said
    assert "Traceback" not in said
    server.fault = None
    assert main(command(folder, server, tmp_path / "a.parquet", model="other")) == 2
    assert "model: expected one that http://" in capsys.readouterr().err


def test_other_commands_have_no_server(folder, server, tmp_path, capsys):
    more = ["--model", str(folder / "model"), "--data", str(folder / "prefs.jsonl")]
    assert main(["train", "--server", server.url, *more]) == 2
    assert "unknown option --server" in capsys.readouterr().err


def rows_of(file):
    return pq.read_table(file).column("index").to_pylist()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bytes(folder, server, tmp_path):
    whole, output = tmp_path / "whole.parquet", tmp_path / "a.parquet"
    assert main(command(folder, server, whole)) == 0
    parts, count = tmp_path / "a.parquet.parts", len(server.asked)

    def hold(server, path, body, number):
        # so that the kill comes in the middle of the run, and of requests
        wait_until(lambda: not list(parts.glob("part-00001.parquet.sha256")) or killed)

    killed: list[bool] = []
    server.fault = hold
    process = processes.start("-m", "treg", *command(folder, server, output))
    try:
        wait_until(lambda: process.ended() or list(parts.glob("part-00001.parquet.sha256")), 100)
        wait_until(lambda: process.ended() or server.under_way)
        assert not process.ended(), process.said()
    finally:
        process.kill()
        killed.append(True)
    assert not output.exists() and len(server.asked) > count
    server.fault = None
    assert main(command(folder, server, output)) == 0
    assert output.read_bytes() == whole.read_bytes() and not parts.exists()


@pytest.mark.slow
def test_two_processes(folder, server, tmp_path):
    whole, output = tmp_path / "whole.parquet", tmp_path / "a.parquet"
    assert main(command(folder, server, whole)) == 0
    env = {"ACCELERATE_USE_CPU": "true"}
    processes.run("-m", "treg", *command(folder, server, output), ranks=2, env=env, timeout=120)
    assert output.read_bytes() == whole.read_bytes()
    assert rows_of(output) == list(range(20))
