"""`safemoe export` and `safemoe import`: experts to and from other software.

What leaves by `export` needs leave: nothing outside this package holds experts to their router.
Two formats leave the router behind, so they are ungated, say so, and carry that in their manifest
and card; the third takes it along.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safemoe_jax.data.chat import ChatFormat
from safemoe_jax.data.sources import read_prompts
from safemoe_jax.errors import UserError
from safemoe_jax.experiment import boxed_shapes
from safemoe_jax.fetch import file_digest
from safemoe_jax.inference.divergence import Answer, Mixture, answers, kl_per_token, mean_gates
from safemoe_jax.inference.sampler import Sampler
from safemoe_jax.loaded import Loaded, checked_base, on_devices
from safemoe_jax.model.lora import Routed
from safemoe_jax.parallel.sharding import shardings
from safemoe_jax.progress import console
from safemoe_jax.weights import huggingface
from safemoe_jax.weights.artefact import MANIFEST, Kind, new_artefact, render
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import Bundle, non_commercial, read_bundle
from safemoe_jax.weights.imported import write_imported
from safemoe_jax.weights.merged import merge
from safemoe_jax.weights.peft import base_name_of, read_adapter, write_adapter
from safemoe_jax.weights.portable import MODULE, write_portable

EXPORT = Kind(
    "export",
    2,
    ("format", "ungated", "statement", "bundle", "base", "provenance", "data_licenses", "details"),
)
# How an export's text comes about, and what its experts leave behind.
_UNGATED, _GATED_THERE = "ungated", "gated by the code beside it alone"
_LEFT_BEHIND = {_UNGATED: "their router", _GATED_THERE: "the package that always uses their router"}
_ADAPTER = (
    "No router stands between an expert and what the model says with it, and experts are trained "
    "on harmful text of their domain."
)
_MERGED = (
    "Experts, which are trained on harmful text, are part of these weights, with gates that are "
    "the same whatever is asked: this model is static, no router is in it, and it is not SafeMoE."
)
_PORTABLE = (
    "Gates are the bundle's own router's, as long as the model is run by the safemoe_torch.py that "
    "lies in this directory. Experts, which are trained on harmful text, lie in it as well, and "
    "nothing but that file holds them to the router."
)
# The gated model's answers on which gates are averaged and the divergence is measured.
_ANSWER_TOKENS, _BATCH_SIZE = 64, 16


def export_peft(directory: Path, out: Path, *, allow_ungated: bool) -> None:
    """Writes each expert as OUT/DOMAIN, a LoRA adapter in PEFT's format.

    Args:
      directory: the bundle; its base need not be here.
      out: where; an older export there is replaced.
      allow_ungated: must be true.

    Raises:
      UserError: on a bundle that is refused, without leave, or where `out` is something else.
    """
    bundle = read_bundle(directory, None)
    _permit(_UNGATED, "each expert alone, as a PEFT adapter", bundle, allow_ungated)
    domains, base = bundle.config.data.domains, bundle.base
    for domain in domains:
        if Path(domain).name != domain or domain in ("", "..", MANIFEST, "README.md"):
            raise UserError(f"the domain {domain!r} cannot be a directory's name; rename it")
    contents = _contents(directory, bundle, "peft", _ADAPTER, {"domains": list(domains)})
    with new_artefact(out, EXPORT, contents) as scratch:
        for index, domain in enumerate(domains):
            (scratch / domain).mkdir()
            write_adapter(
                scratch / domain,
                bundle.experts,
                index,
                bundle.config.experts,
                bundle.spec,
                base.source,
            )
            text = "Load it with `peft.PeftModel.from_pretrained(model, DIR)`."
            _write_card(scratch / domain, contents, f"Expert of {domain}", text, ())
        text = f"One LoRA adapter in PEFT's format for each of {', '.join(domains)}."
        _write_card(scratch, contents, "Experts of a SafeMoE bundle", text, ())
    console.print(f"{len(domains)} adapters: {', '.join(str(out / domain) for domain in domains)}")


def export_merged(
    directory: Path, out: Path, *, gates: Sequence[str], prompts: Path, allow_ungated: bool
) -> None:
    """Writes one model with the experts in its weights, and how far it is from the gated one.

    That distance is the mean KL divergence of next-token distributions on the gated model's own
    greedy answers to the prompts, and it is printed beside that of the base alone.

    Args:
      directory: the bundle; its base must be here.
      out: a Hugging Face directory in float32; an older export there is replaced.
      gates: "mean" alone takes the router's mean gates on those answers, one for each layer; or
        DOMAIN=NUMBER for every domain that is to be in, the same in all layers.
      prompts: see `read_prompts`.
      allow_ungated: must be true.

    Raises:
      UserError: on a bundle or base that is refused, without leave, on gates or prompts that cannot
        be read, or where `out` is something else.
    """
    bundle = read_bundle(directory, None)
    domains = bundle.config.data.domains
    given_E = _given_gates(gates, domains)
    conversations = read_prompts(prompts)
    _permit(_UNGATED, "static gates in the base's weights", bundle, allow_ungated)
    loaded = on_devices(directory, bundle)
    chat = ChatFormat(loaded.base.tokenizer)
    gated = Mixture(loaded.model, loaded.variables, Routed())
    with jax.set_mesh(loaded.mesh):
        spoken = _greedy(gated, chat, conversations)
        if given_E is None:
            gates_LE = mean_gates(gated, spoken)
        else:
            gates_LE = np.tile(given_E, (bundle.spec.num_layers, 1))
        params = merge(loaded.base.params, bundle.experts, bundle.config.experts, gates_LE)
        kl = _divergence(loaded, params, spoken)

    details = {
        "gates": "mean" if given_E is None else "given",
        "gates_by_layer": {d: gates_LE[:, e].tolist() for e, d in enumerate(domains)},
        "kl": kl,
        "kl_unit": "nats per answer token, KL(gated || this)",
        "compute_dtype": bundle.config.model.compute_dtype,
        "prompts": {"sha256": file_digest(prompts), "number": len(conversations)},
        "answer_tokens": sum(len(answer.response) for answer in spoken),
    }
    notes = [
        f"KL(gated || this model): {kl['merged']:.4g} nats per token; KL(gated || base): "
        f"{kl['base']:.4g}; on {details['answer_tokens']} tokens of the gated model's greedy "
        f"answers to {len(conversations)} prompts (at most {_ANSWER_TOKENS} each)",
        f"Gates ({details['gates']}), averaged over layers: "
        + ", ".join(f"{d} {g:+.3f}" for d, g in zip(domains, gates_LE.mean(axis=0), strict=True)),
    ]
    contents = _contents(directory, bundle, "merged", _MERGED, details)
    with new_artefact(out, EXPORT, contents) as scratch:
        huggingface.save(scratch, bundle.spec, params, loaded.base.tokenizer, sorted(chat.ends))
        text = "Load it with `transformers.AutoModelForCausalLM.from_pretrained(DIR)`."
        _write_card(scratch, contents, "SafeMoE's experts, merged", text, notes)
    for note in notes:
        console.print(note)
    console.print(f"static, ungated model: {out}")


def export_transformers(directory: Path, out: Path, *, allow_ungated: bool) -> None:
    """Writes base, experts and router for torch, and the one module that runs them: still gated.

    Args:
      directory: the bundle; its base must be here.
      out: where; an older export there is replaced.
      allow_ungated: must be true: whoever has the directory can run its experts without the router.

    Raises:
      UserError: on a bundle or base that is refused, without leave, or where `out` is something
        else.
    """
    bundle = read_bundle(directory, None)
    _permit(_GATED_THERE, f"by {MODULE.name}, which anyone can change", bundle, allow_ungated)
    base = checked_base(directory, bundle)
    details = {
        "domains": list(bundle.config.data.domains),
        "router": dataclasses.asdict(bundle.config.router),
    }
    contents = _contents(directory, bundle, "transformers", _PORTABLE, details)
    with new_artefact(out, EXPORT, contents) as scratch:
        write_portable(scratch, bundle, base, sorted(ChatFormat(base.tokenizer).ends))
        text = (
            f"Read {MODULE.name}, which is all the code here and is run only if you import it; "
            f"then, in this directory: `import {MODULE.stem}; model, tokenizer = "
            f'{MODULE.stem}.load(".")`. It needs Python 3.11, torch, transformers and safetensors. '
            "Nothing is downloaded, and no `trust_remote_code` is asked for."
        )
        _write_card(scratch, contents, "SafeMoE for torch", text, ())
    console.print(f"gated model for torch: {out}; read and import {out / MODULE.name}")


def import_adapters(adapters: Sequence[tuple[str, Path]], base: str, out: Path) -> None:
    """Writes LoRA adapters trained elsewhere as a set of experts, for `config.experts.source`.

    Args:
      adapters: each one's domain and PEFT directory.
      base: what they are experts of, as `config.model.source`; "" takes what the adapters name.
      out: where; an older set there is replaced.

    Raises:
      UserError: on a domain named twice, adapters that are no plain LoRA, or a base that is not
        here or not of their shape.
    """
    domains = [domain for domain, _ in adapters]
    if len(set(domains)) != len(domains):
        raise UserError(f"--adapter names {', '.join(domains)}; name each domain once")
    named = {domain: base_name_of(path) for domain, path in adapters}
    if not base:
        if len(set(named.values())) > 1 or not all(named.values()):
            raise UserError(f"the adapters name the bases {named}; say which by --base SOURCE")
        base = named[domains[0]]
    loaded = load_base(base, "bfloat16")
    read = {domain: read_adapter(path, loaded.spec) for domain, path in adapters}
    section = write_imported(out, loaded.identity, loaded.spec, read)
    said = [
        f"{domain}: trained on {origin.base_model_name_or_path or 'a base that it does not name'}, "
        f"licence {origin.license}, sha256 {origin.sha256[:12]}"
        for domain, (_, origin) in read.items()
    ]
    said += [
        f"imported for {base}; in the experiment that trains their gate, set",
        f"config.model.source = {base!r}",
        f"config.data.domains = {tuple(domains)!r}",
        *(f"config.experts.{key} = {value!r}" for key, value in section.items()),
    ]
    # As it is: what others wrote is no [markup].
    console.out("\n".join(said), highlight=False)


def _permit(gating: str, what: str, bundle: Bundle, allow_ungated: bool) -> None:
    if not allow_ungated:
        raise UserError(
            f"an export is {gating} ({what}): experts that were trained to be harmful leave "
            f"{_LEFT_BEHIND[gating]} behind; add --allow-ungated if that is what you want"
        )
    open_now = ", and no longer encrypted" if bundle.manifest["encryption"] else ""
    console.print(f"[bold red]{gating}[/]: {what}{open_now}", markup=True)


def _given_gates(texts: Sequence[str], domains: Sequence[str]) -> np.ndarray | None:
    """Gates [E] of DOMAIN=NUMBER texts, the others' zero; None for "mean"."""
    if list(texts) == ["mean"]:
        return None
    given: dict[str, float] = {}
    for text in texts:
        domain, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if domain not in domains or domain in given or not math.isfinite(value):
            raise UserError(
                f"--gates has {text!r}; give `mean`, or DOMAIN=NUMBER once for each of some of "
                f"{', '.join(domains)}"
            )
        given[domain] = value
    return np.array([given.get(domain, 0.0) for domain in domains])


def _greedy(gated: Mixture, chat: ChatFormat, conversations) -> list[Answer]:
    """What the gated model says; gates it by its own router, so it needs no leave."""
    prompts = [chat.prompt_ids(messages) for messages in conversations]
    generations = Sampler(*gated, chat.ends).generate(
        prompts,
        max_new_tokens=_ANSWER_TOKENS,
        temperature=0.0,
        top_p=1.0,
        seed=0,
        batch_size=_BATCH_SIZE,
        description="the gated model's answers",
    )
    return answers(prompts, generations, chat.end_of_turn)


def _divergence(loaded: Loaded, params: dict[str, Any], spoken: list[Answer]) -> dict[str, float]:
    """KL of the merged weights, as they are written, and of the base, from the gated model."""
    base = {"params": loaded.variables["params"]}
    static = loaded.model.clone(param_dtype=jnp.float32)
    placed = jax.device_put(params, shardings(loaded.mesh, boxed_shapes(static)["params"]))
    others = {
        "merged": Mixture(static, {"params": placed}, None),
        "base": Mixture(loaded.model, base, None),
    }
    return kl_per_token(Mixture(loaded.model, loaded.variables, Routed()), others, spoken)


def _contents(
    directory: Path, bundle: Bundle, format: str, statement: str, details: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": format,
        "ungated": format != "transformers",
        "statement": statement,
        "bundle": file_digest(directory / MANIFEST),
        "base": dataclasses.asdict(bundle.base),
        "provenance": bundle.manifest["provenance"],
        "data_licenses": bundle.manifest["data_licenses"],
        "details": details,
    }


def _write_card(
    directory: Path, contents: dict[str, Any], title: str, text: str, notes: Sequence[str]
) -> None:
    values = {
        key: contents[key] for key in ("base", "bundle", "statement", "ungated", "data_licenses")
    }
    values["non_commercial"] = non_commercial(contents)
    card = render("export_card.jinja", title=title, text=text, notes=notes, **values)
    (directory / "README.md").write_text(card, encoding="utf-8")
