"""The command line: treg demo | annotate | train | inspect | evaluate-credit | merge | config |
doctor.

Every command takes its options from the command line and from a YAML file (--config), of which the
command line wins. Exit codes: 0 done, 1 failed, 2 bad usage or input, 130 interrupted.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence

from treg.cli import missing

USAGE = """\
treg: token-level preference optimization (T-REG, DPO and relatives).

  treg demo                                                      the whole path on a small world
  treg annotate --model M --data prefs.jsonl --output a.parquet  token rewards of a preference file
  treg train    --model M --data a.parquet --output_dir out      train; raw data are annotated first
  treg inspect  --data a.parquet --model out --output page.html  what was rewarded, token by token
  treg evaluate-credit --data marked.jsonl --format spans --model M    token rewards against marks
  treg merge    --adapter out --output whole                     adapters into their model's weights
  treg config   fsdp2                                            print a configuration of accelerate
  treg doctor                                                    versions, devices, a self-test

Any command: --help, and --config FILE.yaml with the same option names (the command line wins).
On several GPUs: accelerate launch -m treg annotate ..., accelerate launch -m treg train ...
"""
COMMANDS = (
    *("demo", "annotate", "train", "inspect", "evaluate-credit", "merge", "config", "doctor"),
)
HELP = {"-h", "--help", "--help_all"}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else EXIT_USAGE
    name, rest = argv[0], argv[1:]
    if name in ("-V", "--version"):
        import treg

        print(f"treg {treg.__version__}")
        return 0
    if name not in COMMANDS:
        from treg.rewards.names import nearest

        print(f"treg: no command {name!r}{nearest(name, COMMANDS)}\n\n{USAGE}", file=sys.stderr)
        return EXIT_USAGE
    try:
        if HELP.intersection(rest):  # before anything that is long to load
            from treg.cli.options import help_text

            print(help_text(name, rest), end="")
            raise SystemExit(0)
        module = name.replace("-", "_")
        return importlib.import_module(f"treg.cli.{module}").run(rest) or 0  # loads transformers
    except KeyboardInterrupt as stop:
        kept = f"; {stop}" if str(stop) else ""
        print(
            f"\ntreg {name}: interrupted{kept}; the same command goes on from what is finished",
            file=sys.stderr,
        )
        return EXIT_INTERRUPTED
    except (ValueError, TypeError, OSError) as error:  # what the library says about its inputs
        said = isinstance(error, OSError) or _raised_in(error).partition(".")[0] == "treg"
        if not said:  # a fault beneath it, which the message alone does not explain
            traceback.print_exc()
        print(f"treg {name}: error: {error}", file=sys.stderr)
        return EXIT_USAGE if said else EXIT_FAILED
    except (ImportError, RuntimeError) as error:
        said = missing.advice(error)
        if said is None:
            raise
        print(f"treg {name}: error: {said}", file=sys.stderr)
        return EXIT_FAILED


def _raised_in(error: BaseException) -> str:
    """The name of the module."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__name__"]
