"""The arguments of `safemoe chat` and `safemoe serve`; JAX is imported once they are read."""

import argparse
from pathlib import Path


def add_sampling(sub: argparse.ArgumentParser) -> None:
    """The bundle, and how answers are drawn from it."""
    sub.add_argument("--bundle", type=Path, required=True, help="directory of a trained SafeMoE")
    sub.add_argument("--max-new-tokens", type=int, default=256)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)


def add_chat(sub: argparse.ArgumentParser) -> None:
    add_sampling(sub)
    sub.add_argument("--system", default="", metavar="TEXT", help="what the model is told first")


def chat(arguments: argparse.Namespace) -> None:
    from safemoe_jax.serving import terminal

    terminal.chat(
        arguments.bundle,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
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
