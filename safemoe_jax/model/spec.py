"""The shape of a base transformer: what a weight file says, and no more.

`FAMILIES` is the one table of what the families of bases do differently; no family has code of its
own. `docs/recipes/add_a_base_model.md` says how a row is added.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

# How a layer attends: to all earlier tokens, to those in its window, or to all without rotation.
Kind = Literal["global", "local", "unrotated"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What is the same for all bases of a family, whatever their size.

    Attributes:
      architecture: its class in `transformers`, as config.json names it.
      gguf: its `general.architecture` in GGUF files; None where another family has that name.
      activation: of the gate in the MLP; "gelu" is the approximation by tanh.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether each head of queries and keys is normed before it is rotated.
      post_norms: whether attention's and MLP's outputs are normed before they are added.
      zero_centered_norms: whether a norm's scale is 1 plus the weight.
      scaled_embedding: whether embeddings are multiplied by sqrt(D).
      fused: whether checkpoints keep q, k and v, and gate and up, in one tensor each.
      gguf_pairs: whether GGUF files keep rotated pairs of q and k side by side.
      gguf_pattern: the layers' kinds, which GGUF files do not say; see `ModelSpec.pattern`.
      gguf_local_rope_theta: `ModelSpec.local_rope_theta` where a GGUF file does not say it.
      spaces: what its SentencePiece tokenizer does with them, which GGUF files do not say: one more
        is put before each part of a text between special tokens ("prepended"), or none ("kept").
    """

    architecture: str
    gguf: str | None
    activation: Literal["silu", "gelu"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    zero_centered_norms: bool = False
    scaled_embedding: bool = False
    fused: bool = False
    gguf_pairs: bool = False
    gguf_pattern: tuple[Kind, ...] = ("global",)
    gguf_local_rope_theta: float | None = None
    spaces: Literal["prepended", "kept"] = "prepended"


_GEMMA: dict[str, Any] = dict(
    activation="gelu",
    post_norms=True,
    zero_centered_norms=True,
    scaled_embedding=True,
    spaces="kept",
)

# By `model_type` in `transformers`. GGUF files of Mistral's models say that they are llama.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", gguf="llama", gguf_pairs=True),
    "mistral": Family("MistralForCausalLM", gguf=None, gguf_pairs=True),
    "qwen2": Family("Qwen2ForCausalLM", gguf="qwen2", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", gguf="qwen3", qk_norm=True),
    "gemma2": Family(
        "Gemma2ForCausalLM", gguf="gemma2", gguf_pattern=("local", "global"), **_GEMMA
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gguf="gemma3",
        qk_norm=True,
        gguf_pattern=("local",) * 5 + ("global",),
        gguf_local_rope_theta=10_000.0,
        **_GEMMA,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        gguf="smollm3",
        gguf_pairs=True,
        gguf_pattern=("global",) * 3 + ("unrotated",),
    ),
    "phi3": Family("Phi3ForCausalLM", gguf="phi3", fused=True),
}


_POSITIVE_OR_NONE = ("local_rope_theta", "query_scalar", "attention_softcap", "logit_softcap")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies were lowered for longer sequences.

    Attributes:
      factor: what frequencies are divided by; Llama 3 divides the low ones alone.
      low_freq_factor: frequencies with fewer turns than this in `original_positions` are divided;
        0 divides all.
      high_freq_factor: those with more turns than this are not; in between it goes smoothly.
      original_positions: longest sequence before the lowering; 0 where all are divided.
    """

    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: int = 0


class LayerKind(NamedTuple):
    """How a layer attends.

    Attributes:
      window: how many tokens a token sees, itself included; None for all before it.
      rope_theta: base of the rotary frequencies; None where nothing is rotated.
      rope_scaling: of these frequencies.
    """

    window: int | None
    rope_theta: float | None
    rope_scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder of one of the families.

    Shape letters used in the whole package:
      B batch, T tokens, S segments, D model, N query heads, K key/value heads, H head dim, F mlp,
      V vocabulary, E experts, R rank, L layers.

    Attributes:
      vocab_size: V.
      embed_dim: D.
      num_layers: L.
      num_heads: N.
      num_kv_heads: K, a divisor of N.
      head_dim: H.
      mlp_dim: F.
      rope_theta: base of the rotary frequencies.
      norm_eps: epsilon inside RMSNorm.
      tie_embeddings: true where the output head is the embedding, transposed.
      max_positions: longest sequence the base was trained on, in tokens.
      family: a key of `FAMILIES`.
      pattern: the layers' kinds from the first on, repeated to L.
      window: how many tokens a token of a local layer sees, itself included.
      local_rope_theta: rope_theta of local layers; None where it is that of all.
      rope_scaling: of the frequencies of layers that are not local.
      query_scalar: scores are divided by its square root; None for H.
      attention_softcap: scores x become c * tanh(x / c); None where they stay.
      logit_softcap: the same of the output logits.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int
    family: str = "llama"
    pattern: tuple[Kind, ...] = ("global",)
    window: int | None = None
    local_rope_theta: float | None = None
    rope_scaling: RopeScaling | None = None
    query_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        """Raises TypeError, naming the field: a damaged file may say anything."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise TypeError(f"{field.name} is {value!r}, no whole number from 1")
            if field.name in ("rope_theta", "norm_eps") and not _is_positive(value):
                raise TypeError(f"{field.name} is {value!r}, no number above 0")
            if field.name in _POSITIVE_OR_NONE and value is not None and not _is_positive(value):
                raise TypeError(f"{field.name} is {value!r}, no number above 0")
        if self.family not in FAMILIES or not self.pattern:
            raise TypeError(f"family is {self.family!r} and pattern {self.pattern!r}")
        if "local" in self.pattern and (type(self.window) is not int or self.window < 1):
            raise TypeError(f"window is {self.window!r}, no whole number from 1")

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that there are, in the order of their first layers."""
        kinds = {
            "global": LayerKind(None, self.rope_theta, self.rope_scaling),
            "local": LayerKind(
                self.window,
                self.local_rope_theta or self.rope_theta,
                None if self.local_rope_theta else self.rope_scaling,
            ),
            "unrotated": LayerKind(None, None, None),
        }
        return tuple(kinds[name] for name in dict.fromkeys(self.pattern[: self.num_layers]))

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """For each layer the index of its kind in `layer_kinds`."""
        names = [self.pattern[i % len(self.pattern)] for i in range(self.num_layers)]
        order = list(dict.fromkeys(self.pattern[: self.num_layers]))
        return tuple(order.index(name) for name in names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelSpec":
        """What `dataclasses.asdict` made of a spec, through JSON as well.

        Raises:
          TypeError, KeyError: on values that are of no spec.
        """
        scaling = values["rope_scaling"] and RopeScaling(**values["rope_scaling"])
        return cls(**{**values, "pattern": tuple(values["pattern"]), "rope_scaling": scaling})


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def shortest_pattern(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    """The shortest pattern that, repeated, gives these layers' kinds."""
    return next(
        kinds[:period]
        for period in range(1, len(kinds) + 1)
        if all(kind == kinds[i % period] for i, kind in enumerate(kinds))
    )
