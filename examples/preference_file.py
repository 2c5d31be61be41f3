r"""From a preference file to a trained model and a page, in Python: what `treg annotate`, `train`
and `inspect` do.

    python examples/preference_file.py prefs.jsonl --model MODEL \
        [--output out] [--limit 200] [--max_length 512]
    python examples/preference_file.py prefs.jsonl --tokenizer TOKENIZER

The second is a dry run of the data with a tiny random Llama. Needs the extra `train`. Run it again
after a stop: annotation and training go on from what is finished.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from treg.data import EncodeOptions
from treg.data.annotated import read_annotated
from treg.files import last_checkpoint
from treg.rewards.annotate import AnnotateOptions, annotate
from treg.trainer import TRegConfig, TRegTrainer
from treg.viz import write_page
from treg.viz.views import pair_views


def tiny_llama(tokenizer) -> LlamaForCausalLM:
    """Two layers of 32 and random weights: rewards mean nothing, but every row takes the whole
    path.
    """
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--output", type=Path, default=Path("out"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    if not (args.model or args.tokenizer):
        parser.error("give --model, or --tokenizer for a tiny random model")

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    else:
        model = tiny_llama(tokenizer)
    annotated = args.output / "annotated.parquet"
    args.output.mkdir(parents=True, exist_ok=True)
    options = AnnotateOptions(EncodeOptions(args.max_length), per_token=True)
    print(annotate(model, tokenizer, args.data, annotated, options, limit=args.limit))

    config = TRegConfig(
        str(args.output),
        beta=0.1,
        alpha=0.25,
        learning_rate=1e-4,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        packing=True,
        save_steps=5,
        logging_steps=1,
        report_to="none",
    )
    trainer = TRegTrainer(model, None, config, str(annotated), processing_class=tokenizer)
    checkpoint = last_checkpoint(args.output)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model()

    examples, _ = read_annotated(annotated)
    pairs = pair_views(examples[:20], tokenizer, policy=trainer.model, beta=config.beta)
    settings = {"data": args.data, "beta": str(config.beta), "alpha": str(config.alpha)}
    write_page(
        args.output / "page.html",
        pairs,
        title="Token rewards",
        settings=settings,
        history={"training": trainer.state.log_history},
    )
    print(f"wrote {args.output}: annotated.parquet, the model, page.html")


if __name__ == "__main__":
    main()
