"""What each command does."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from treg.annotate import AnnotateOptions, annotate, process_state
from treg.cli.doctor import devices, self_test, versions
from treg.cli.options import (
    AnnotateOnlyOptions,
    DemoOptions,
    InspectOptions,
    JudgeOptions,
    ModelOptions,
    RowOptions,
    TrainOptions,
    parse,
)
from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import is_annotated, read_annotated, tokenizer_fingerprint
from treg.files import last_checkpoint, locked, replacing
from treg.rewards import ContrastivePrompts
from treg.trainer import TRegConfig, TRegTrainer
from treg.views import pair_views
from treg.viz import plot_curves, print_pairs, write_page

# what may change between the parts of one run, by the beginning of its name: it does not change the numbers
FREE = (
    *("output_dir", "log", "save", "eval", "report_to", "run_name", "disable_tqdm", "push_to", "hub", "dataloader"),
    *("memory_budget", "ignore_fingerprint", "load_best", "metric_for", "greater_is", "project", "trackio", "include"),
    *("do_", "resume", "prediction", "torch_empty", "batch_eval", "strict", "tokens_per_batch", "no_share_prefix"),
)
# what a page says of a run
FACTS = ("loss_type", "beta", "alpha", "gamma", "learning_rate", "num_train_epochs", "max_steps", "use_peft", "seed",
         "per_device_train_batch_size", "gradient_accumulation_steps", "ref_model")  # fmt: skip


def _check_folder(path: str) -> None:
    """A path that is no folder would be looked up on the hub, and what the hub says of it is no help."""
    if not Path(path).is_dir() and (path.count("/") != 1 or path.startswith(("/", ".", "~"))) and "/" in path:
        raise ValueError(f"model: no such folder: {path}")


def _load_tokenizer(path: str, chat_template: str | None = None) -> Any:
    _check_folder(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    if chat_template is not None:
        tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
    return tokenizer


def _load_model(path: str, dtype: str, device: Any = None, attn_implementation: str | None = None) -> Any:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype: expected auto, float32, bfloat16 or float16, got {dtype!r}")
    _check_folder(path)
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **more)
    return model if device is None else model.to(device)


def _annotate_options(judge: JudgeOptions, max_length: int | None, per_token: bool) -> AnnotateOptions:
    prompts = ContrastivePrompts() if judge.prompts is None else ContrastivePrompts.load(judge.prompts)
    return AnnotateOptions(EncodeOptions(max_length), prompts, judge.tokens_per_batch, per_token,
                           not judge.no_share_prefix)  # fmt: skip


def run_annotate(argv: list[str]) -> None:
    text = """\
Score each response under two contrastive prompts (rewrite it better, rewrite it worse), and keep token rewards and
reference log-probs in a parquet file. Forward only. Run again after a stop: it goes on from what is finished.

  treg annotate --model MODEL --data prefs.jsonl --output annotated.parquet
  accelerate launch -m treg annotate --model MODEL --data HUB/NAME --output annotated.parquet"""
    kinds = (ModelOptions, RowOptions, AnnotateOnlyOptions, JudgeOptions)
    m, rows, own, judge = parse("annotate", argv, kinds, text)

    options = _annotate_options(judge, own.max_length, own.per_token)
    tokenizer = _load_tokenizer(m.tokenizer or m.model, m.chat_template)
    model = _load_model(m.model, m.dtype or "auto", process_state().device, m.attn_implementation)
    report = annotate(model, tokenizer, rows.data, own.output, options, split=rows.split, strict=rows.strict,
                      limit=rows.limit)  # fmt: skip
    _say(report, f"wrote {own.output}")


def run_train(argv: list[str]) -> None:
    text = """\
Train a causal LM on preference pairs. The data may be annotated (treg annotate) or raw: raw data are annotated first,
into the output folder. Run again after a stop: it goes on from the last whole checkpoint.
alpha=0 is the plain objective (DPO, SimPO, ...), which needs no token rewards.

  treg train --model MODEL --data prefs.jsonl --output_dir out --learning_rate 5e-7 --beta 0.01 --bf16
  treg train --model MODEL --data prefs.jsonl --output_dir out --use_peft --learning_rate 5e-6 --packing
  accelerate launch -m treg train --config run.yaml"""
    kinds = (ModelOptions, RowOptions, TrainOptions, JudgeOptions, TRegConfig)
    m, rows, own, judge, config = parse("train", argv, kinds, text)
    if own.eval_data is not None and config.eval_strategy == "no":
        raise ValueError("eval_data: expected --eval_strategy steps or epoch beside it, got 'no'")
    if config.use_liger_kernel and config.device.type == "cpu":
        raise ValueError("use_liger_kernel: expected a GPU, got a CPU; Liger's layers are Triton kernels")
    out = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        if process_state().is_main_process:
            stack.enter_context(locked(out))
        _train(out, m, rows, own, judge, config)


def _train(
    out: Path, m: ModelOptions, rows: RowOptions, own: TrainOptions, judge: JudgeOptions, config: TRegConfig
) -> None:
    settings = {**vars(m), **vars(rows), **vars(own), **vars(judge), **config.to_dict()}
    settings = {k: x for k, x in settings.items() if not k.startswith(FREE) or k == "eval_data"}
    _claim_run(out, settings | {"processes": process_state().num_processes})
    if _finished(out):
        _say(f"{out} holds a finished run of these settings: nothing to do")
        return

    tokenizer = _load_tokenizer(m.tokenizer or m.model, m.chat_template)
    dtype = m.dtype or "float32"
    model = _load_model(m.model, dtype, attn_implementation=m.attn_implementation)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"model: expected a whole model, got {m.model}, which holds adapters; merge them "
            "(PeftModel.merge_and_unload) and train from what that saves"
        )
    reference = None
    if own.ref_model is not None:
        reference = _load_model(own.ref_model, dtype, attn_implementation=m.attn_implementation)

    def prepared(source: str | None, name: str, split: str) -> str | list | None:
        """The data as the trainer takes them; raw ones are annotated first where token rewards are needed."""
        if source is None:
            return None
        if is_annotated(source):
            if rows.limit is not None:
                raise ValueError(f"limit: expected none with annotated data, got {rows.limit}; annotate fewer rows")
            return source
        if not config.alpha:
            pairs, report = load_pairs(source, tokenizer, EncodeOptions(config.max_length), split=split,
                                       strict=rows.strict, limit=rows.limit)  # fmt: skip
            _say(f"{name}: {report}")
            return [pair.example for pair in pairs]
        judging, output = model if reference is None else reference, out / f"{name}.parquet"
        options, device = _annotate_options(judge, config.max_length, per_token=True), process_state().device
        # as training will see the reference
        with torch.autocast(device.type, torch.bfloat16 if config.bf16 else torch.float16, config.bf16 or config.fp16):
            report = annotate(judging.to(device), tokenizer, source, output, options, split=split, strict=rows.strict,
                              limit=rows.limit)  # fmt: skip
        _say(f"{name}: {report}")
        return str(output)

    train_data = prepared(rows.data, "annotated", rows.split)
    eval_data = prepared(own.eval_data, "annotated-eval", own.eval_split)
    peft_config = None
    if own.use_peft:
        from peft import LoraConfig

        layers = own.lora_target_modules or "all-linear"
        peft_config = LoraConfig(r=own.lora_r, lora_alpha=own.lora_alpha, lora_dropout=own.lora_dropout,
                                 target_modules=layers, task_type="CAUSAL_LM")  # fmt: skip
    elif reference is None and isinstance(train_data, list) and not config.loss_options.objective.reference_free:
        reference = _load_model(m.model, dtype, attn_implementation=m.attn_implementation)
    trainer = TRegTrainer(model, reference, config, train_data, eval_data, tokenizer, peft_config)
    reference = None  # the trainer keeps it if it is needed
    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        _say(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    trainer.create_model_card(finetuned_from=m.model, dataset=rows.data)
    if trainer.is_world_process_zero() and _drawable(trainer.state.log_history):
        plot_curves({out.name: trainer.state.log_history}, out / "curves.png")
    trainer.save_state()
    _say(f"wrote {out}: the model, its card, trainer_state.json, curves.png")


def _finished(out: Path) -> bool:
    """Whether the run in out was trained to its end and saved: its state is what is saved last."""
    file, checkpoint = out / "trainer_state.json", last_checkpoint(out)
    if not file.exists() or checkpoint is None:
        return False
    state = json.loads(file.read_text())
    return state["global_step"] >= state["max_steps"]


def _claim_run(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a run beside it; a folder that holds checkpoints of other settings is refused."""
    settings = json.loads(json.dumps(settings, default=str))
    file, started = out / "treg_run.json", last_checkpoint(out) is not None
    before = json.loads(file.read_text()) if file.exists() else None
    if started and before is not None:
        for name in settings.keys() & before.keys():
            if settings[name] != before[name]:
                raise ValueError(
                    f"{name}: {out} holds a run with {before[name]!r}, now it is {settings[name]!r}; give another "
                    "output_dir, or remove that one"
                )
    if process_state().is_main_process and before != settings:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    process_state().wait_for_everyone()


def _drawable(history: list[dict[str, Any]]) -> bool:
    return any("loss" in x or "eval_loss" in x for x in history)


def run_inspect(argv: list[str]) -> None:
    text = """\
Show annotated pairs token by token on one self-contained HTML page, with a trained model's implicit rewards beside the
token rewards, and the curves of its training.

  treg inspect --data annotated.parquet --tokenizer MODEL
  treg inspect --data out/annotated.parquet --model out --output page.html --terminal"""
    (o,) = parse("inspect", argv, (InspectOptions,), text)

    if o.limit < 1:
        raise ValueError(f"limit: expected a positive number of pairs, got {o.limit}")
    examples, meta = read_annotated(o.data)
    examples = examples[: o.limit]
    if (o.tokenizer or o.model) is None:
        raise ValueError("tokenizer: expected --tokenizer or --model to decode the tokens, got neither")
    tokenizer = _load_tokenizer(o.tokenizer or o.model)
    if tokenizer_fingerprint(tokenizer) != meta["fingerprint"]["tokenizer"]:
        raise ValueError(f"tokenizer: {o.data} was annotated with another tokenizer or chat template; give --tokenizer")
    run = Path(o.run or o.model or ".")
    settings = json.loads((run / "treg_run.json").read_text()) if (run / "treg_run.json").exists() else {}
    history = _history(run) if o.run or o.model else []
    beta = o.beta if o.beta is not None else settings.get("beta", 0.1)
    reference = o.ref_model
    if o.model is not None and reference is None and "ref_chosen_token_logps" not in examples[0]:
        reference = settings.get("ref_model") or settings.get("model")  # what the run started from
    models = [None if x is None else _load_model(x, "auto", process_state().device) for x in (o.model, reference)]
    pairs = pair_views(examples, tokenizer, policy=models[0], reference=models[1], beta=beta)
    output = Path(o.output or Path(o.data).with_suffix(".html"))
    facts = {
        "data": o.data,
        "model": o.model or "none",
        **{k: settings[k] for k in FACTS if k in settings},
        "beta": beta,
    }
    facts = {k: str(v) for k, v in facts.items()}
    curves = {run.name: history} if _drawable(history) else None
    write_page(output, pairs, title=f"Token rewards: {Path(o.data).name}", settings=facts, history=curves)
    if o.curves:
        if curves is None:
            raise ValueError(f"curves: expected a training run with a log in {run}, found none; give it with --run")
        plot_curves(curves, o.curves)
    if o.terminal:
        print_pairs(pairs)
    _say(f"{len(pairs)} pairs", f"wrote {output}")


def _history(run: Path) -> list[dict[str, Any]]:
    """The log of a training run: of the whole, or of its last checkpoint."""
    folder = run if (run / "trainer_state.json").exists() else last_checkpoint(run)
    return [] if folder is None else json.loads((folder / "trainer_state.json").read_text())["log_history"]


def run_doctor(argv: list[str]) -> int:
    parse("doctor", argv, (), "Print versions and devices, and compare the loss and its gradients with float64.")

    for name, version in versions().items():
        print(f"{name:14} {version}")
    for device in devices():
        print(f"{'device':14} {device}")
    impl, errors, seconds = self_test()
    print(f"{'runs':14} impl={impl!r}")
    worst = max(errors.values())
    ok = worst < 1e-5
    print(f"{'self-test':14} {'ok' if ok else 'FAILED'}: relative errors against float64: "
          + ", ".join(f"{k} {v:.1e}" for k, v in errors.items()) + f"; {seconds:.1f} s")  # fmt: skip
    return 0 if ok else 1


def run_demo(argv: list[str]) -> None:
    text = ("The whole path on a small world with known truth: annotate, train DPO and T-REG, sample, check, inspect.\n"
            "No download: a tiny chat model comes with the package.")  # fmt: skip
    (o,) = parse("demo", argv, (DemoOptions,), text)
    from treg.demo.run import run

    run(**vars(o))


def _say(*parts: Any) -> None:
    """To the terminal, once under several processes."""
    if process_state().is_main_process:
        print(*parts, sep="\n")
