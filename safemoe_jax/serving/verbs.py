"""The arguments of `safemoe generate`, `chat` and `serve`; JAX is imported once they are read."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_sampling(sub: argparse.ArgumentParser) -> None:
    """The bundle, and how answers are drawn from it."""
    sub.add_argument("--bundle", type=Path, required=True, help="directory of a trained SafeMoE")
    sub.add_argument("--max-new-tokens", type=int, default=256, help="longest answer; default: 256")
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument(
        "--top-p", type=float, default=1.0, help="share of probability kept; default: 1, all"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")


def _sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_p", "seed")
    }


def add_generate(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--prompt", action="append", metavar="TEXT", help="may be repeated; default: standard input"
    )
    add_sampling(sub)
    sub.add_argument(
        "--gates", action="store_true", help="print the mean gate per expert and token"
    )
    sub.add_argument(
        "--routing",
        default="router",
        metavar="router|base|uniform|DOMAIN",
        help="what mixes the experts; uniform and a single domain are ungated",
    )
    sub.add_argument(
        "--allow-ungated",
        action="store_true",
        help="permit what the router does not gate; experts were trained to be harmful",
    )


def generate(arguments: argparse.Namespace) -> None:
    from safemoe_jax.generate import answer

    answer(
        arguments.bundle,
        arguments.prompt or [_standard_input()],
        routing=arguments.routing,
        allow_ungated=arguments.allow_ungated,
        show_gates=arguments.gates,
        **_sampling(arguments),
    )


def _standard_input() -> str:
    from safemoe_jax.errors import UserError

    if sys.stdin.isatty():
        print("type the prompt; Ctrl-D in a line of its own ends it", file=sys.stderr)
    try:
        return sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"standard input is not {error.encoding} ({error.reason}, byte {error.start}); give "
            "text in that encoding"
        ) from error


def add_chat(sub: argparse.ArgumentParser) -> None:
    add_sampling(sub)
    sub.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")


def chat(arguments: argparse.Namespace) -> None:
    from safemoe_jax.serving import terminal

    terminal.chat(
        arguments.bundle,
        system=arguments.system,
        **_sampling(arguments),
    )


def add_serve(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--bundle", type=Path, required=True, help="directory of a trained SafeMoE")
    sub.add_argument(
        "--host",
        default="127.0.0.1",
        help="default: 127.0.0.1; any address but loopback needs a key in SAFEMOE_API_KEY",
    )
    sub.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    sub.add_argument("--name", default="safemoe", help="of the model, as clients give it")
    sub.add_argument("--slots", type=int, default=8, help="answers decoded at once; default: 8")
    sub.add_argument(
        "--max-queue", type=int, default=64, help="answers that may wait for a slot; default: 64"
    )
    sub.add_argument(
        "--max-length", type=int, default=2048, help="tokens of prompt and answer; default: 2048"
    )
    sub.add_argument(
        "--max-tokens", type=int, default=1024, help="tokens of an answer; default: 1024"
    )


def serve(arguments: argparse.Namespace) -> None:
    from safemoe_jax.serving import server
    from safemoe_jax.serving.service import Limits

    server.serve(
        arguments.bundle,
        host=arguments.host,
        port=arguments.port,
        name=arguments.name,
        limits=Limits(
            slots=arguments.slots,
            max_queue=arguments.max_queue,
            max_length=arguments.max_length,
            max_tokens=arguments.max_tokens,
        ),
    )
