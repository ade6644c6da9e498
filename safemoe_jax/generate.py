"""`safemoe generate`: a bundle answers prompts."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.table import Table
from rich.text import Text

from safemoe_jax.config import MeshConfig
from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import boxed_shapes
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.model.lora import Gates, Routed, Routing
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.progress import console, printable
from safemoe_jax.weights.base import BaseModel, load_base
from safemoe_jax.weights.bundle import Bundle, check_base, read_bundle
from safemoe_jax.weights.huggingface import read_tokenizer

_BATCH_SIZE = 16


class Loaded(NamedTuple):
    """A bundle on its base, on this machine's devices; `variables` are all three collections."""

    base: BaseModel
    model: Transformer
    mesh: Mesh
    variables: dict[str, Any]


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


def checked_base(directory: Path, bundle: Bundle) -> BaseModel:
    """A bundle's base, with the bundle's own tokenizer.

    Of the base only the weights are used: their sha256 says nothing of the config and the template
    that lie beside them, so shape and tokenizer are the bundle's own.

    Raises:
      UserError: where the base that is there is not the bundle's.
    """
    base = load_base(bundle.base.source, bundle.config.model.param_dtype)
    check_base(directory, bundle, base)
    return dataclasses.replace(base, tokenizer=read_tokenizer(directory))


def on_devices(directory: Path, bundle: Bundle) -> Loaded:
    """Puts a bundle and its base where they run.

    Raises:
      UserError: as `checked_base`.
    """
    base = checked_base(directory, bundle)
    # It may have been trained on devices of another kind.
    model = Transformer.from_config(bundle.config, base.spec, rests=base.rests, attention="auto")
    mesh = _mesh(bundle.config.mesh)
    where = shardings(mesh, boxed_shapes(model))
    trained = {"experts": bundle.experts, "router": bundle.router}
    placed = jax.device_put(trained, {name: where[name] for name in trained})
    placed["params"] = base.placed(where["params"])
    return Loaded(base, model, mesh, placed)


def _mesh(trained_on: MeshConfig) -> Mesh:
    """The mesh of the training run where this machine has it, else one device."""
    if math.prod(dataclasses.astuple(trained_on)) <= len(jax.devices()):
        return make_mesh(trained_on)
    return make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1))


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
