"""`safemoe generate`: a bundle answers prompts."""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table
from rich.text import Text

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.errors import UserError
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.loaded import on_devices
from safemoe_jax.model.lora import Gates, Routed, Routing
from safemoe_jax.progress import console, printable
from safemoe_jax.weights.bundle import read_bundle

_BATCH_SIZE = 16


def answer(
    directory: Path,
    prompts: Sequence[str],
    *,
    routing: str,
    allow_ungated: bool,
    show_gates: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> None:
    """Prints an answer to each prompt.

    Args:
      directory: the bundle.
      prompts: one user turn each.
      routing: "router", "base", "uniform" or a domain's name.
      allow_ungated: must be true for the last two: no router stands between expert and text.
      show_gates: also prints each token's gates, averaged over layers.
      max_new_tokens, temperature, top_p, seed: see `Sampler.generate`.

    Raises:
      UserError: on a bundle that is refused, an ungated routing without leave, or bad settings.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty; give --prompt TEXT, or text on standard input")
    for prompt in prompts:
        check_unicode(prompt, "a prompt")
    bundle = read_bundle(directory, None)
    domains = bundle.config.data.domains
    chosen = _routing(routing, domains, allow_ungated)
    loaded = on_devices(directory, bundle)
    chat = ChatFormat(loaded.base.tokenizer)
    sampler = Sampler(loaded.model, loaded.variables, chosen, chat.ends)
    with jax.set_mesh(loaded.mesh):
        answers = sampler.generate(
            [chat.prompt_ids([{"role": "user", "content": prompt}]) for prompt in prompts],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            batch_size=_BATCH_SIZE,
            description="",  # who redirects the answers wants nothing else among them
        )
    for prompt, generation in zip(prompts, answers, strict=True):
        if len(prompts) > 1:
            console.out(f"> {prompt}", style="bold", highlight=False)
        text = chat.text(generation.tokens)
        print(printable(text) if console.is_terminal else text)  # in a file as it is
        if show_gates and generation.gates_TLE is not None:
            gates_TE = generation.gates_TLE.mean(axis=1)
            console.print(_gates_table(generation.tokens, gates_TE, chat.tokenizer, domains))


def check_unicode(text: str, what: str) -> None:
    """Raises UserError for bytes that Python took from a command line and could not read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not UTF-8 (at character {error.start}); give it in that encoding"
        ) from error


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Raises UserError where these options make no sense."""
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise UserError(
            f"--max-new-tokens is {max_new_tokens}, --temperature {temperature}, --top-p {top_p}; "
            "they must be at least 1, at least 0, and in (0, 1]"
        )


def _routing(name: str, domains: Sequence[str], allow_ungated: bool) -> Routing:
    given = {"router": Routed(), "base": None}
    if name in given:
        return given[name]
    if name != "uniform" and name not in domains:
        known = ", ".join(("router", "base", "uniform", *domains))
        raise UserError(f"--routing is {name!r}; choose of {known}")
    if not allow_ungated:
        raise UserError(
            f"--routing {name} lets experts that were trained to be harmful speak without the "
            "router; add --allow-ungated if that is what you want"
        )
    console.print(f"[bold red]ungated[/]: {name}", markup=True)
    if name == "uniform":
        return Gates(jnp.full(len(domains), 1 / len(domains)))
    return Gates(jax.nn.one_hot(domains.index(name), len(domains)))


def _gates_table(
    tokens: Sequence[int], gates_TE: np.ndarray, tokenizer, domains: Sequence[str]
) -> Table:
    table = Table("token", *domains, title="gates, mean over layers")
    for token, gates_E in zip(tokens, gates_TE, strict=True):
        table.add_row(Text(repr(tokenizer.decode([token]))), *(f"{gate:+.3f}" for gate in gates_E))
    return table
