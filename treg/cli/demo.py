"""treg demo: the whole path on a small world of known truth."""

from treg.cli.options import DemoOptions, parse


def run(argv: list[str]) -> None:
    (options,) = parse("demo", argv, (DemoOptions,))
    from treg.demo.run import run as run_demo

    run_demo(**vars(options))
