"""treg train: a causal LM on preference pairs, annotated or raw."""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch

from treg.cli.loading import annotate_options, drawable, load_model, load_tokenizer, say
from treg.cli.options import JudgeOptions, ModelOptions, RowOptions, TrainOptions, parse
from treg.data import EncodeOptions, load_pairs
from treg.data.annotated import is_annotated
from treg.files import last_checkpoint, locked, replacing
from treg.rewards.annotate import annotate, process_state
from treg.trainer import TRegConfig, TRegTrainer
from treg.viz import plot_curves

# what may change between the parts of one run, by the beginning of its name: it does not change the
# numbers
FREE = (
    *(
        "output_dir",
        "log",
        "save",
        "eval",
        "report_to",
        "run_name",
        "disable_tqdm",
        "push_to",
        "hub",
        "dataloader",
    ),
    *(
        "memory_budget",
        "ignore_fingerprint",
        "load_best",
        "metric_for",
        "greater_is",
        "project",
        "trackio",
        "include",
    ),
    *(
        "do_",
        "resume",
        "prediction",
        "torch_empty",
        "batch_eval",
        "strict",
        "tokens_per_batch",
        "no_share_prefix",
    ),
)


def run(argv: list[str]) -> None:
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
        raise ValueError(
            "use_liger_kernel: expected a GPU, got a CPU; Liger's layers are Triton kernels"
        )
    out = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        if process_state().is_main_process:
            stack.enter_context(locked(out))
        _train(out, m, rows, own, judge, config)


def _train(
    out: Path,
    m: ModelOptions,
    rows: RowOptions,
    own: TrainOptions,
    judge: JudgeOptions,
    config: TRegConfig,
) -> None:
    settings = {**vars(m), **vars(rows), **vars(own), **vars(judge), **config.to_dict()}
    settings = {k: x for k, x in settings.items() if not k.startswith(FREE) or k == "eval_data"}
    _claim_run(out, settings | {"processes": process_state().num_processes})
    if _finished(out):
        say(f"{out} holds a finished run of these settings: nothing to do")
        return

    tokenizer = load_tokenizer(m.tokenizer or m.model, m.chat_template)
    dtype = m.dtype or "float32"
    model = load_model(m.model, dtype, attn_implementation=m.attn_implementation)
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"model: expected a whole model, got {m.model}, which holds adapters; merge them "
            "(PeftModel.merge_and_unload) and train from what that saves"
        )
    reference = None
    if own.ref_model is not None:
        reference = load_model(own.ref_model, dtype, attn_implementation=m.attn_implementation)

    def prepared(source: str | None, name: str, split: str) -> str | list | None:
        """The data as the trainer takes them; raw ones are annotated first where token rewards are
        needed.
        """
        if source is None:
            return None
        if is_annotated(source):
            if rows.limit is not None:
                raise ValueError(
                    f"limit: expected none with annotated data, got {rows.limit}; annotate fewer rows"
                )
            return source
        if not config.alpha:
            pairs, report = load_pairs(
                source,
                tokenizer,
                EncodeOptions(config.max_length),
                split=split,
                strict=rows.strict,
                limit=rows.limit,
            )
            say(f"{name}: {report}")
            return [pair.example for pair in pairs]
        judging, output = model if reference is None else reference, out / f"{name}.parquet"
        options, device = (
            annotate_options(judge, config.max_length, per_token=True),
            process_state().device,
        )
        # as training will see the reference
        with torch.autocast(
            device.type,
            torch.bfloat16 if config.bf16 else torch.float16,
            config.bf16 or config.fp16,
        ):
            report = annotate(
                judging.to(device),
                tokenizer,
                source,
                output,
                options,
                split=split,
                strict=rows.strict,
                limit=rows.limit,
            )
        say(f"{name}: {report}")
        return str(output)

    train_data = prepared(rows.data, "annotated", rows.split)
    eval_data = prepared(own.eval_data, "annotated-eval", own.eval_split)
    peft_config = None
    if own.use_peft:
        from peft import LoraConfig

        layers = own.lora_target_modules or "all-linear"
        peft_config = LoraConfig(
            r=own.lora_r,
            lora_alpha=own.lora_alpha,
            lora_dropout=own.lora_dropout,
            target_modules=layers,
            task_type="CAUSAL_LM",
        )
    elif (
        reference is None
        and isinstance(train_data, list)
        and not config.loss_options.objective.reference_free
    ):
        reference = load_model(m.model, dtype, attn_implementation=m.attn_implementation)
    trainer = TRegTrainer(model, reference, config, train_data, eval_data, tokenizer, peft_config)
    reference = None  # the trainer keeps it if it is needed
    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()
    trainer.create_model_card(finetuned_from=m.model, dataset=rows.data)
    if trainer.is_world_process_zero() and drawable(trainer.state.log_history):
        plot_curves({out.name: trainer.state.log_history}, out / "curves.png")
    trainer.save_state()
    say(f"wrote {out}: the model, its card, trainer_state.json, curves.png")


def _finished(out: Path) -> bool:
    """Whether the run in out was trained to its end and saved: its state is what is saved last."""
    file, checkpoint = out / "trainer_state.json", last_checkpoint(out)
    if not file.exists() or checkpoint is None:
        return False
    state = json.loads(file.read_text())
    return state["global_step"] >= state["max_steps"]


def _claim_run(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a run beside it; a folder that holds checkpoints of other settings is
    refused.
    """
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
