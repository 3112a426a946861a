"""The command line: parse, call, show. `lorakit --help` and `--version` answer without importing torch."""

from __future__ import annotations

import os
import sys


def main(args: list[str] | None = None) -> None:
    """Run `lorakit ARGS` and exit: 0 done, 1 the job failed, 2 the call was wrong."""
    # Idle OpenMP threads sleep instead of spinning: as fast on a quiet machine, and many times faster on a busy one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """The same, returning the exit code."""
    import click

    from ..errors import ConfigError, LorakitError
    from .app import app

    try:
        result = app(args, prog_name="lorakit", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return 2
    except ConfigError as error:
        print(f"lorakit: {error}", file=sys.stderr)
        return 2
    except LorakitError as error:
        print(f"lorakit: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, click.Abort):
        print("lorakit: stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
