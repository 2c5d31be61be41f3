"""A GGUF file behind HTTP, for `treg annotate --server`.

    python examples/serve_gguf.py MODEL.gguf [--port 8080] [--context 2048] [--threads N]

llama.cpp's own server gives log-probs of the tokens that it makes, and none of a prompt;
llama-cpp-python's takes no token ids. The library llama-cpp-python itself has the logits of every
token: this file serves them in vLLM's form, one request at a time. The logits of a whole context
lie in memory, 4 bytes for each token of the context and of the vocabulary.

Needs the package llama-cpp-python, and nothing of treg.
"""

import argparse
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


class Engine:
    """A model, and what is answered to the requests that `treg annotate` sends."""

    def __init__(self, file: Path, context: int, threads: int | None):
        self.name = file.stem
        self.context = context
        self.free = threading.Lock()
        self.model = llama_cpp.Llama(
            str(file), n_ctx=context, n_threads=threads, logits_all=True, verbose=False
        )

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        """The state of HTTP, and the JSON."""
        if path == "/v1/models":
            return 200, {"data": [{"id": self.name, "max_model_len": self.context}]}
        if path == "/version":
            return 200, {"version": f"llama-cpp-python {llama_cpp.__version__}"}
        if body is None or path not in ("/tokenize", "/v1/completions"):
            return 404, {"error": "not found"}
        if path == "/tokenize":
            text = body["prompt"].encode()
            return 200, {"tokens": self.model.tokenize(text, add_bos=False, special=True)}
        ids = body["prompt"]
        if body["model"] != self.name:
            return 404, {"error": f"no model {body['model']!r}, but {self.name!r}"}
        if not isinstance(ids, list) or not all(isinstance(x, int) for x in ids) or not ids:
            return 400, {"error": "expected token ids as the prompt"}
        if len(ids) + 1 > self.context:
            return 400, {"error": f"{len(ids)} tokens; the context has {self.context}"}
        if min(ids) < 0 or max(ids) >= self.model.n_vocab():
            return 400, {"error": f"expected ids from 0 to {self.model.n_vocab() - 1}"}
        return 200, self.scored(ids)

    def scored(self, ids: list[int]) -> dict[str, Any]:
        """The log-prob of each token after those before it, and the token that may follow."""
        with self.free:
            self.model.reset()
            self.model.eval(ids)
            logits = self.model.scores[: len(ids)].astype(np.float32)
        largest = logits.max(-1, keepdims=True)
        norms = np.log(np.exp(logits - largest).sum(-1, dtype=np.float64)) + largest[:, 0]
        own = logits[np.arange(len(ids) - 1), ids[1:]] - norms[:-1]
        made = int(logits[-1].argmax())
        choice = {
            "index": 0,
            "prompt_token_ids": ids,
            "token_ids": [made],
            "logprobs": {"token_logprobs": [float(logits[-1, made] - norms[-1])]},
            "prompt_logprobs": [
                None,
                *({str(i): {"logprob": float(x)}} for i, x in zip(ids[1:], own, strict=True)),
            ],
        }
        return {"choices": [choice], "usage": {"prompt_tokens": len(ids)}}


class Handler(BaseHTTPRequestHandler):
    """HTTP around an engine."""

    engine: Engine
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer leaves in one piece

    def reply(self, body: dict[str, Any] | None) -> None:
        status, found = self.engine.answer(self.path, body)
        content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args()
    Handler.engine = Engine(given.file, given.context, given.threads)
    server = ThreadingHTTPServer(("127.0.0.1", given.port), Handler)
    print(f"http://127.0.0.1:{given.port} has {Handler.engine.name}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
