"""`pytest benchmarks/` on a CPU: calibrated before anything runs, narrow tables, ratios at the
end.
"""

import cpu_look
import pytest
from loss_head_cases import DEVICE

COLUMNS = ["median", "iqr", "rounds"]
PARTS = {  # of cpu_plan, by module
    "bench_cpu_bars": "memory",
    "bench_linear_kl": "linear_kl",
    "bench_trl": "trl",
    "bench_annotate": "annotate",
    "bench_end_to_end": "end_to_end",
}


def looked_at(config: pytest.Config) -> bool:
    """Whether benchmarks run here and now on a CPU."""
    return DEVICE == "cpu" and not config.getoption("benchmark_skip", False)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    given = " ".join(config.invocation_params.args)
    if hasattr(config.option, "benchmark_columns") and "--benchmark-columns" not in given:
        config.option.benchmark_columns = COLUMNS
    if hasattr(config.option, "benchmark_sort") and "--benchmark-sort" not in given:
        config.option.benchmark_sort = "median"


def pytest_report_header(config: pytest.Config) -> list[str]:
    return cpu_look.header(cpu_look.session()) if looked_at(config) else []


def name_of(item: pytest.Item) -> str:
    """Of the plan's item that a test belongs to."""
    return PARTS.get(item.path.stem) or item.callspec.params["case"].name


@pytest.hookimpl(trylast=True)  # -k and -m have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if looked_at(config):
        session = cpu_look.session()
        session.run_only(map(name_of, items))
        items.sort(key=lambda item: session.order.index(name_of(item)))  # stable


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    waiting = cpu_look.session().waiting if looked_at(config) else []
    return [f"last, as too long for their share of the time: {', '.join(waiting)}"] * bool(waiting)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    if looked_at(terminalreporter.config) and cpu_look.session.cache_info().currsize:
        terminalreporter.section("what treg gains on this CPU")
        for line in cpu_look.digest(cpu_look.session()):
            terminalreporter.write_line(line)
