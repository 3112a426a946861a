"""The command line: parse the arguments, call the library, print the result.

`--help` and `--version` do not import torch.
"""

from __future__ import annotations

import os
import sys

INTERRUPTED = 130  # the shells' code for a process that Ctrl-C ended


def main(args: list[str] | None = None) -> None:
    """Run `lorakit ARGS` and exit with `run`'s code."""
    # Let idle OpenMP threads spin only briefly before they sleep. Endless spinning (the default) is many times slower
    # on a busy machine; sleeping at once makes a training step of the embedded model 1.3 times as long on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run `lorakit ARGS`. Returns 0 for success, 1 if the job failed, 2 for a usage error, 130 for Ctrl-C."""
    from ..errors import ConfigError, LorakitError
    from .shared.starting import starting

    try:
        # On a terminal something appears at once, also where the imports take a second; elsewhere a verb says it.
        with starting("loading", quiet=not sys.stderr.isatty()):
            from .app import app
    except ModuleNotFoundError as error:  # an incomplete installation gets a message instead of a traceback
        name = (error.name or "").partition(".")[0]
        if name in ("", "lorakit"):
            raise
        print(
            f"lorakit: the required library '{name}' is not installed\n  pip install lorakit installs it",
            file=sys.stderr,
        )
        return 1
    try:
        app(args, prog_name="lorakit")  # typer prints usage errors itself, with the nearest option, and exits with 2
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer's for Ctrl-C
            print("lorakit: stopped", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except LorakitError as error:
        from ..train.config import TrainConfig
        from .shared.spoken import in_flags

        print(f"lorakit: {in_flags(str(error), TrainConfig.model_fields)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("lorakit: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # no space, no permission: the message names the file
        print(f"lorakit: {error}", file=sys.stderr)
        return 1
    return 0
