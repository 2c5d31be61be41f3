"""A serving engine of a few lines: a tiny model behind HTTP, in the dialects of real ones."""

import contextlib
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

DROP = "drop"  # of a fault: the connection is closed without a word
Fault = Callable[["StandIn", str, dict, int], "tuple[int, dict, bytes] | str | None"]


class StandIn:
    """Serves a model until `close`.

    Args:
        dialects: those that it speaks.
        names: of the model. length: tokens that its context holds, which it says.
        fault: is asked before each answer: None, (status, headers, body), or DROP.
        change: changes an answer to a prompt.
        bos: a token that it puts before every prompt. cut: of a prompt it reads the last so many
            tokens. shift: its log-probs are off by a token, as of a server with a fault.
        tokenizer: for /tokenize; None: it has none.
    """

    def __init__(
        self,
        model: Any,
        *,
        dialects: tuple[str, ...] = ("vllm", "echo"),
        names: tuple[str, ...] = ("tiny",),
        length: int | None = 2048,
        fault: Fault | None = None,
        change: Callable[[dict, dict], Any] | None = None,
        tokenizer: Any = None,
        **prompt: Any,
    ):
        self.model = model
        self.dialects = dialects
        self.names = names
        self.length = length
        self.fault = fault
        self.change = change
        self.tokenizer = tokenizer
        self.bos = prompt.pop("bos", None)
        self.cut = prompt.pop("cut", None)
        self.shift = prompt.pop("shift", 0)
        assert not prompt, prompt
        self.asked: list[tuple[str, dict, dict]] = []  # path, body, headers
        self.under_way = self.most = 0
        self._lock = threading.Lock()
        self._forward = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=lambda: self._server.serve_forever(0.01), daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "StandIn":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def prompts(self) -> list[list[int]]:
        """The ids of every prompt so far, those of the first questions too."""
        return [body.get("prompt", body.get("input_ids")) for path, body, _ in self.asked if body]

    def answer(self, path: str, body: dict, headers: dict) -> "tuple[int, dict, bytes] | str":
        with self._lock:
            self.asked.append((path, body, headers))
            number = len(self.asked)
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        try:
            found = self.fault and self.fault(self, path, body, number)
            return found or self._answer(path, body)
        finally:
            with self._lock:
                self.under_way -= 1

    def _answer(self, path: str, body: dict) -> tuple[int, dict, bytes]:
        if path == "/v1/models":
            entries = [{"id": name, "max_model_len": self.length} for name in self.names]
            return ok({"data": entries})
        if path == "/version":
            return ok({"version": "0.0.1"})
        if path == "/tokenize" and self.tokenizer is not None:
            special = body.get("add_special_tokens", True)
            ids = self.tokenizer(body["prompt"], add_special_tokens=special)["input_ids"]
            return ok({"tokens": ids})
        if path == "/v1/completions" and {"vllm", "echo"} & {*self.dialects}:
            if body["model"] not in self.names:
                return refused(404, f"no model {body['model']}")
            return self._scored(body, body["prompt"])
        if path == "/generate" and "sglang" in self.dialects:
            return self._scored(body, body["input_ids"])
        return refused(404, "Not Found")

    def _scored(self, body: dict, ids: list[int]) -> tuple[int, dict, bytes]:
        if self.bos is not None:
            ids = [self.bos, *ids]
        if self.cut is not None:
            ids = ids[-self.cut :]
        if self.length is not None and len(ids) + 1 > self.length:
            return refused(400, f"the context is {self.length} tokens, the prompt has {len(ids)}")
        if max(ids) >= self.model.config.vocab_size:
            return refused(400, "a token is out of the vocabulary")
        with torch.inference_mode(), self._forward:
            logits = self.model(torch.tensor([ids])).logits[0]
        logprobs = logits.float().log_softmax(-1)
        made = int(logprobs[-1].argmax())
        rows = torch.arange(len(ids) - 1) + self.shift
        own = [None, *logprobs[rows, torch.tensor(ids[1:], dtype=torch.int64)].tolist()]
        last = logprobs[-1, made].item()
        answer = self._said(body, ids, own, made, last)
        if self.change is not None:
            answer = self.change(answer, body) or answer
        return ok(answer)

    def _said(self, body: dict, ids: list[int], own: list, made: int, last: float) -> dict:
        if "input_ids" in body:
            start = body["logprob_start_len"]
            entries = [
                [None if i == start else own[i], ids[i], None] for i in range(start, len(ids))
            ]
            meta = {"input_token_logprobs": entries, "prompt_tokens": len(ids)}
            return {"text": "", "meta_info": meta | {"output_token_logprobs": [[last, made, None]]}}
        choice: dict[str, Any] = {"index": 0, "text": "", "logprobs": None}
        texts = self.tokenizer and [self.tokenizer.decode([made])]
        if "vllm" in self.dialects:
            if body.get("return_token_ids"):
                choice |= {"prompt_token_ids": ids, "token_ids": [made]}
            if body.get("prompt_logprobs") is not None:
                choice["prompt_logprobs"] = [
                    None if x is None else {str(i): {"logprob": x, "rank": 1}}
                    for i, x in zip(ids, own, strict=True)
                ]
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": [last], "tokens": texts}
        if body.get("echo") and "echo" in self.dialects:
            tokens = texts and [self.tokenizer.decode([i]) for i in ids] + texts
            choice["logprobs"] = {"token_logprobs": [*own, last], "tokens": tokens}
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


def ok(answer: Any) -> tuple[int, dict, bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def refused(status: int, message: str) -> tuple[int, dict, bytes]:
    body = json.dumps({"error": {"message": message, "code": status}})
    return status, {"Content-Type": "application/json"}, body.encode()


def _handler(stand_in: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept
        wbufsize = -1  # an answer is sent in one piece, or the other side waits 40 ms for it
        disable_nagle_algorithm = True

        def _reply(self, body: dict) -> None:
            found = stand_in.answer(self.path, body, dict(self.headers))
            if found == DROP:
                self.close_connection = True
                return
            status, headers, content = found
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            self._reply(json.loads(self.rfile.read(length)))

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # of a caller that has gone
                super().handle()

    return Handler


def wait_until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
