#!/usr/bin/env python3
"""Download models from the hub ahead of a benchmark, so that no run waits for the network.

Progress goes to stderr, one line per model to stdout; complete models are left as they are.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aegaeon.errors import AegaeonError, CheckpointError
from aegaeon.models.checkpoint import plan_load
from aegaeon.models.hub import pull
from aegaeon.models.hub_ids import directory_name

EPILOG = """\
A model Org/Name lands in DIR/Org__Name. An interrupted download goes on at the next call.
example: predownload_models.py --models "Qwen/Qwen3-0.6B,Qwen/Qwen3-1.7B" --local-root models
exit codes: 0 all models are there and whole, 1 some are not, 2 wrong usage"""


def fetch(hub_id: str, local_root: Path) -> str:
    """Make sure that `hub_id` is whole in `local_root` and return what was done, in words.

    Raises ModelNotFound, UnsupportedModel, CheckpointError (also of what was there already).
    """
    was_there = (local_root / directory_name(hub_id)).is_dir()
    path = pull(hub_id, local_root)
    try:
        plan = plan_load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} (or remove {path} and run this again)") from None
    done = "already there" if was_there else "downloaded"
    return f"{done}: {path} ({plan.parameters / 1e6:.0f} M parameters)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description="Download models from the Hugging Face hub.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", required=True, metavar="ID,ID", help="hub ids, Org/Name")
    parser.add_argument("--local-root", required=True, type=Path, metavar="DIR", help="where to")
    options = parser.parse_args(arguments)
    hub_ids = list(dict.fromkeys(part.strip() for part in options.models.split(",")))
    if not all(hub_ids):
        parser.error("--models must be hub ids, separated by commas")
    failures = 0
    for hub_id in hub_ids:
        try:
            print(f"{hub_id} {fetch(hub_id, options.local_root)}", flush=True)
        except AegaeonError as error:
            failures += 1
            print(f"error: {hub_id}: {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print("stopped; run the same command again to go on", file=sys.stderr)
            return 128 + signal.SIGINT
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
