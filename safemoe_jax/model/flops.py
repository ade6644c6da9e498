"""FLOPs of a step by the model's arithmetic: of every place in its rows, and none twice.

Padding counts as tokens do, and the head also where there is no loss (a step may leave both out);
what is recomputed does not count.

Source: model FLOPs utilization, arXiv 2204.02311, appendix B.
"""

import dataclasses
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict

from safemoe_jax.model.quantization import Quantized
from safemoe_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds of a forward pass, for each token.

    Attributes:
      layers: of the base's kernels.
      head: of the vocabulary's logits.
      expert: of one expert.
      experts: of all.
      router: of the router, wherever it is applied.
      attention_width: layers times heads times head width.
    """

    layers: int
    head: int
    expert: int
    experts: int
    router: int
    attention_width: int

    @classmethod
    def of(cls, model: Transformer, shapes: dict[str, Any]) -> "MultiplyAdds":
        """Counts by the shapes of the model's three collections."""
        spec, layers = model.spec, flatten_dict(shapes["params"]["layers"])
        shared = spec.num_layers if model.router.scope == "shared" else 1
        return cls(
            layers=sum(num_params(leaf) for path, leaf in layers.items() if path[-1] == "kernel"),
            head=spec.vocab_size * spec.embed_dim,
            expert=num_params(shapes["experts"]) // model.num_experts,
            experts=num_params(shapes["experts"]),
            router=num_params(shapes["router"]) * shared,
            attention_width=spec.num_layers * spec.num_heads * spec.head_dim,
        )

    @property
    def matmuls(self) -> int:
        """Of the base."""
        return self.layers + self.head

    def attention(self, length: int) -> int:
        """Scores and values of one token among a row's earlier ones, half of them on average."""
        return length * self.attention_width

    def train_step(self, trained: Literal["experts", "router"], rows: int, length: int) -> float:
        """FLOPs of a train step on rows of `length` tokens.

        A frozen weight costs a matmul forward and one backward; what is trained, one more.
        """
        if trained == "experts":  # a row goes through its own expert
            per_token = 2 * self.matmuls + 3 * self.expert
        else:
            per_token = 2 * (self.matmuls + self.experts) + 3 * self.router
        return 2 * rows * length * (per_token + 3 * self.attention(length))


def num_params(tree: Any) -> int:
    """Numbers in a tree of arrays or shapes; of a quantized matrix its weights."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return sum(leaf.size for leaf in leaves)
