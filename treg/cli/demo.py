"""treg demo: the whole path on a small world of known truth."""

from treg.cli.options import DemoOptions, parse


def run(argv: list[str]) -> None:
    text = (
        "The whole path on a small world with known truth: annotate, train DPO and T-REG, sample, check, inspect.\n"
        "No download: a tiny chat model comes with the package."
    )
    (o,) = parse("demo", argv, (DemoOptions,), text)
    from treg.demo.run import run as run_demo

    run_demo(**vars(o))
