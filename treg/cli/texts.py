"""What a page of help says of its command."""

ANNOTATE = """\
Let a source of token rewards score each response, and keep its numbers and the reference's
log-probs in a parquet file. Forward only. Run again after a stop: it goes on from what is finished.
The default source asks the model twice to rewrite a response, so that it is better and so that it
is worse (contrastive prompts). --rewards NAME --help shows the options of another source.

  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet \\
    --rewards my_package.my_module:MySource --rewards.my_option 3
  treg annotate --server http://HOST:8000 --model SERVED_NAME --tokenizer FOLDER \\
    --data prefs.jsonl --output annotated.parquet
  accelerate launch -m treg annotate --model MODEL --data HUB/NAME --output annotated.parquet"""

TRAIN = """\
Train a causal LM on preference pairs. The data may be annotated (treg annotate) or raw: raw data
are annotated first, into the output folder. Run again after a stop: it goes on from the last whole
checkpoint. alpha=0 is the plain objective (DPO, SimPO, ...), which needs no token rewards: raw data
are then annotated only if --rewards names a source.

  treg train --model MODEL --data prefs.jsonl --output_dir out --learning_rate 5e-7 --beta 0.01
  treg train --model MODEL --data prefs.jsonl --output_dir out --use_peft --packing
  treg train --model MODEL --data a.jsonl b.parquet --data_weights 1 0.5 --output_dir out
  accelerate launch -m treg train --config run.yaml"""

INSPECT = """\
Show annotated pairs token by token on one self-contained HTML page, with a trained model's implicit
rewards beside the token rewards, and the curves of its training.

  treg inspect --data annotated.parquet --tokenizer MODEL
  treg inspect --data out/annotated.parquet --model out --output page.html --terminal"""

EVALUATE = """\
Measure how well token rewards agree with marks on the tokens: error spans, first wrong steps,
minimal pairs. A row for each score, and for baselines that a source must beat, with intervals.
--format NAME --help shows the options of a format, --rewards NAME --help those of a source.

  treg evaluate-credit --data marked.jsonl --format spans --model MODEL
  treg evaluate-credit --data marked.jsonl --format spans --model MODEL --rewards several \\
    --rewards.sources contrastive entropy --json out.json --plots out.html
  treg evaluate-credit --data prefs.jsonl --format spans --annotated a.parquet --tokenizer MODEL"""

DEMO = """\
The whole path on a small world with known truth: annotate, train DPO and T-REG, sample, check,
inspect. No download: a tiny chat model comes with the package."""

DOCTOR = "Print versions and devices, and compare the loss and its gradients with float64."

MERGE = """\
Write the whole model of an adapter: the weights of its base with the adapter in them, with the
tokenizer. The log-probs are compared with those of the adapter on its base.

  treg merge --adapter out --output out-merged"""

CONFIG = """\
Print a configuration for `accelerate launch`.

  treg config fsdp2 > fsdp2.yaml
  accelerate launch --config_file fsdp2.yaml --num_processes 8 -m treg train ..."""
