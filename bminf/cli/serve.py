"""`bminf serve`: a model behind OpenAI's protocol, for the tools that speak it, and a page."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bminf.cli import flags, models
from bminf.cli.chat import LENGTH
from bminf.cli.session import Session, find
from bminf.errors import ArgumentError

if TYPE_CHECKING:
    from bminf.server.texts import Texts

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")

_KEY = "BMINF_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of this verb."""
    flags.add_model(parser)
    add = parser.add_argument
    add("--max-batch-size", type=flags.positive, metavar="N",
        help="texts of --max-length that memory is set aside for, and more that are shorter; "
        "default: 1")  # fmt: skip
    flags.add_template(parser)
    add("--host", default="127.0.0.1",
        help="the address to listen on; default: 127.0.0.1, this machine alone")  # fmt: skip
    add("--port", type=flags.port, default=8000, metavar="N", help="default: 8000; 0 is a free one")
    add("--api-key", metavar="KEY",
        help=f"what clients have to give; default: ${_KEY}, or none")  # fmt: skip
    add("--served-name", metavar="NAME",
        help="of the model, as clients ask for it; default: the name of its folder")  # fmt: skip
    add("--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="a site whose pages browsers may let in; may be given several times")  # fmt: skip
    add("--max-waiting", type=flags.positive, default=256, metavar="N",
        help="answers that may wait; beyond, requests are refused; default: 256")  # fmt: skip
    # Another one than that of generate: of the server's engine, also for models of transformers.
    add("--deterministic", action="store_true", dest="shares_deterministically",
        help="answers that do not depend on others under way, not even in their last bits; "
        "slower")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; returns 0, and for Ctrl-C 130."""
    models.require(PACKAGES)
    template, key = flags.template_of(arguments), _key(arguments)
    with find(arguments) as session:
        # Only here: --help is to be quick.
        from bminf.server.app import ServerSettings
        from bminf.server.running import Server

        settings = ServerSettings(_name(arguments), key, tuple(arguments.cors_origin))
        server = Server(
            _loader(session, template, arguments.shares_deterministically), settings,
            arguments.host, arguments.port, arguments.max_waiting,
        )  # fmt: skip
        _tell(f"bminf: listening on {server.url} (OpenAI: {server.url}/v1); loading the model")
        server.serve_until_told()
    return 130 if server.stop_signal == signal.SIGINT else 0


def _loader(session: Session, template: str | None, deterministic: bool) -> Callable[[], Texts]:
    def load() -> Texts:
        session.load(LENGTH)
        texts = session.served(template, deterministic)
        _tell(f"{session.plan}\nbminf: ready; a text has at most {texts.max_length} tokens")
        return texts

    return load


def _key(arguments: argparse.Namespace) -> str | None:
    key: str | None = arguments.api_key or os.environ.get(_KEY)
    if key is not None and (not key.isascii() or not key.isprintable() or key != key.strip()):
        raise ArgumentError("--api-key: give letters and digits of ASCII, which a header can hold")
    return key


def _name(arguments: argparse.Namespace) -> str:
    given: str = arguments.served_name or arguments.model
    is_hub_id = not Path(given).expanduser().exists()
    return given if arguments.served_name or is_hub_id else Path(given).expanduser().resolve().name


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
