"""`pytest benchmarks/` on a CPU: calibrated before anything runs, narrow tables, ratios at the
end.
"""

import cpu_look
import pytest
from loss_head_cases import DEVICE

COLUMNS = ["median", "iqr", "rounds"]
# the most telling first: what time is too short for is at the end
ORDER = ("bench_loss_head", "bench_cpu_bars", "bench_linear_kl", "bench_trl", "bench_annotate")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(ORDER) if name in item.nodeid), -1)

    items.sort(key=place)  # stable


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    if looked_at(terminalreporter.config) and cpu_look.session.cache_info().currsize:
        terminalreporter.section("what treg gains on this CPU")
        for line in cpu_look.digest(cpu_look.session()):
            terminalreporter.write_line(line)
