"""Time of `treg annotate` on a CPU, rows to file, against the bare forwards that it needs.

    python benchmarks/bars_annotate.py --model FOLDER --data rows.jsonl [--limit 8] [--rounds 3]
        [--max_length 384] [--out benchmarks/results/cpu/annotate.json]

The forwards are the layers of the model over the batches that annotation ran, the cache of shared
beginnings among them, and the dense logits of the scored tokens: no softmax, no reading of rows, no
templates, no tokens, no file. Both take turns in one process, and both times are those in which the
process itself was running, of all its threads, so that other work on the machine counts little.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from loss_head_measure import environment
from transformers import AutoModelForCausalLM, AutoTokenizer

import treg.rewards.scorer as scorer
from treg.data import EncodeOptions
from treg.rewards.annotate import AnnotateOptions, annotate

CACHES = ("cache", "past_key_values")


class Recorder:
    """The inputs of the layers, call by call, and the rows that the head has had after each."""

    def __init__(self, backbone: Any):
        self.calls: list[tuple[dict[str, Any], int]] = []
        self.hook = backbone.register_forward_pre_hook(self._call, with_kwargs=True)
        self.head = scorer.linear_logprobs
        scorer.linear_logprobs = self._rows

    def _call(self, module: Any, args: tuple, inputs: dict[str, Any]) -> None:
        kept = {k: v for k, v in inputs.items() if k not in CACHES}
        name = next((x for x in CACHES if inputs.get(x) is not None), None)
        self.calls.append((kept | ({"continues": name} if name else {}), 0))

    def _rows(self, rows: torch.Tensor, *args: Any, **operands: Any) -> Any:
        inputs, _ = self.calls.pop()
        self.calls.append((inputs, len(rows)))
        return self.head(rows, *args, **operands)

    def stop(self) -> None:
        self.hook.remove()
        scorer.linear_logprobs = self.head


@torch.inference_mode()
def forwards(model: Any, calls: list[tuple[dict[str, Any], int]]) -> None:
    backbone, weight = model.base_model, model.get_output_embeddings().weight
    cache = None
    for inputs, rows in calls:
        inputs = dict(inputs)
        name = inputs.pop("continues", None)
        if name is not None:
            cache.batch_repeat_interleave(2)
            inputs[name] = cache
        found = backbone(**inputs)
        cache = next((getattr(found, x) for x in CACHES if getattr(found, x, None)), None)
        if rows:
            hidden = found.last_hidden_state.flatten(0, 1)[:rows]
            torch.nn.functional.linear(hidden, weight)


def seconds(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    options = AnnotateOptions(EncodeOptions(args.max_length))

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "a.parquet"
            annotate(model, tokenizer, args.data, output, options, limit=args.limit, progress=False)

    recorder = Recorder(model.base_model)
    run()  # warm; what is tried once, is tried here too
    recorder.stop()
    found: dict[str, list[float]] = {"annotate": [], "forwards": []}
    for _ in range(args.rounds):
        found["annotate"].append(seconds(run))
        found["forwards"].append(seconds(lambda: forwards(model, recorder.calls)))
        print({name: round(x[-1], 1) for name, x in found.items()}, flush=True)
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"annotate / forwards: {statistics.median(ratios):.3f} of {sorted(ratios)}")
    if args.out is not None:
        given = {"model": Path(args.model).name, "limit": args.limit, "max_length": args.max_length}
        record = {"environment": environment(), "seconds": found, "ratios": ratios}
        args.out.write_text(json.dumps(given | record, indent=1) + "\n")


if __name__ == "__main__":
    main()
