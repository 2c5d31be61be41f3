"""treg demo: the whole path on a small world of known truth."""

from treg.cli.options import DemoOptions, parse

TEXT = """\
The whole path on a small world with known truth: annotate, train DPO and T-REG, sample, check,
inspect. No download: a tiny chat model comes with the package."""


def run(argv: list[str]) -> None:
    (options,) = parse("demo", argv, (DemoOptions,), TEXT)
    from treg.demo.run import run as run_demo

    run_demo(**vars(options))
