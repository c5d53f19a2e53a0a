"""--tp: the ranks that compute a model together. The verb is run again on each of them, which
torchrun starts; rank 0 prints, the others compute with it."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys

from bminf.cli import flags
from bminf.cli.session import find
from bminf.errors import ArgumentError

_OF_SIGNALS = 128  # that shells add to the number of one


def add_ranks(parser: argparse.ArgumentParser) -> None:
    """Declares --tp."""
    parser.add_argument("--tp", type=flags.positive, metavar="N",
        help="compute on N ranks, each on a GPU of its own (built-in models); the limit is that of "
        "each")  # fmt: skip


def are_to_be_started(arguments: argparse.Namespace) -> bool:
    """Whether this process is to start the ranks, and is none of them.

    Raises ArgumentError where torchrun has started another number of them.
    """
    from bminf.layers.rendezvous import place_in

    size = place_in(os.environ).size
    if "RANK" in os.environ and arguments.tp not in (None, size):
        raise ArgumentError(f"--tp {arguments.tp}, but torchrun has started {size} ranks")
    return "RANK" not in os.environ and (arguments.tp or 1) > 1


def start(arguments: argparse.Namespace) -> int:
    """Run the verb on all ranks of this machine; the exit code of the first that failed, or that
    of a signal which has ended all of them.   Raises KeyboardInterrupt for Ctrl-C."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    from bminf.layers.rendezvous import threads_of

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_of(arguments.tp)))
    # It would tell of each rank that failed, which rank 0 does in a line.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    ranks = ["--standalone", "--nproc-per-node", str(arguments.tp), "--no-python"]
    try:
        main([*ranks, sys.executable, "-m", "bminf", *arguments.argv])
    except ChildFailedError as error:
        codes = [failure.exitcode for _, failure in sorted(error.failures.items())]
        return max(int(codes[0]), 1)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return _OF_SIGNALS + int(error.sigval)
    return 0


def is_other() -> bool:
    """Whether this is a rank that prints nothing."""
    from bminf.layers.rendezvous import place_in

    return place_in(os.environ).rank > 0


def follow(arguments: argparse.Namespace) -> int:
    """Compute with rank 0 until it is done; returns 0."""
    with find(arguments) as session:
        session.load(None)
        session.follow()
    return 0
