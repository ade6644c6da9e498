"""The tokenizer that a GGUF file describes, without torch.

Byte-level BPE ("gpt2"), SentencePiece's BPE ("llama") and its unigram model ("t5"). Files hold the
vocabulary and, of byte-level BPE, the merges; how text is cut and how spaces are written follows
from names in the file, after `transformers`' tokenizers of the same models.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

# How byte-level tokenizers cut text before the merges; llama.cpp keeps the same table, by the same
# names.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
} | {
    name: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    for name, pattern in {
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "smaug-bpe": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "tekken": _TEKKEN,
    }.items()
}
# Their vocabularies have words that no merges lead to.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # text is composed (NFC) first


def read_tokenizer(metadata: Mapping[str, Any], spec: ModelSpec) -> PreTrainedTokenizerFast:
    """The tokenizer of a GGUF file, with its chat template and special tokens.

    Args:
      metadata: the file's key-value pairs; a key that it lacks raises `UserError`.
      spec: of the file's model.

    Raises:
      UserError: on another tokenizer model or an unknown pre-tokenizer.
    """
    kind, tokens = metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.tokens"]
    readers = {"gpt2": _byte_level, "llama": _sentencepiece_bpe, "t5": _unigram}
    if kind not in readers:
        raise UserError(
            f"tokenizer {kind!r} is not supported (known: {', '.join(readers)}); use the model's "
            "Hugging Face directory"
        )
    backend = readers[kind](metadata, spec)
    added = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    types = metadata["tokenizer.ggml.token_type"]
    backend.add_tokens(
        [
            AddedToken(token, special=of == gguf.TokenType.CONTROL, normalized=False)
            for token, of in zip(_spelled(tokens, spec), types, strict=True)
            if of in added
        ]
    )

    ids = {
        f"{role}_token": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    special = {role: tokens[i] for role, i in ids.items() if i is not None}
    # llama.cpp's rule for files that do not say it.
    begins = kind == "llama" or metadata.get("tokenizer.ggml.pre") in _WHOLE_WORDS
    around = {
        "bos_token": metadata.get("tokenizer.ggml.add_bos_token", begins),
        "eos_token": metadata.get("tokenizer.ggml.add_eos_token", False),
    }
    used = [role for role, added in around.items() if added and role in special]
    if used:
        bos, eos = ([special[role]] if role in used else [] for role in around)
        backend.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            special_tokens=[(special[role], ids[role]) for role in used],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=spec.max_positions,
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(metadata: Mapping[str, Any], spec: ModelSpec) -> Tokenizer:
    if (cut := metadata["tokenizer.ggml.pre"]) not in PRE_TOKENIZERS:
        raise UserError(
            f"pre-tokenizer {cut!r} is not supported (known: {', '.join(PRE_TOKENIZERS)}); use the "
            "model's Hugging Face directory"
        )
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=cut in _WHOLE_WORDS))
    if cut in _COMPOSED:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[cut]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(metadata: Mapping[str, Any], spec: ModelSpec) -> Tokenizer:
    tokens = _spelled(metadata["tokenizer.ggml.tokens"], spec)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if "tokenizer.ggml.merges" in metadata:
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    else:
        # Gemma's scores do not follow the order of its merges; that of its vocabulary does.
        scores = range(0, -len(tokens), -1)
        if spec.traits.spaces != "kept":
            scores = metadata["tokenizer.ggml.scores"]
        merges = _merges(tokens, vocabulary, scores)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    backend = Tokenizer(
        models.BPE(
            vocabulary,
            merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.normalizer = normalizers.Replace(" ", _SPACE)
    if spec.traits.spaces == "kept":
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif metadata.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), backend.normalizer])
        spaces.append(decoders.Strip(" ", left=1))
    backend.decoder = decoders.Sequence(spaces)
    return backend


def _unigram(metadata: Mapping[str, Any], spec: ModelSpec) -> Tokenizer:
    tokens, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores"))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 2)
    vocabulary = list(zip(tokens, map(float, scores), strict=True))
    backend = Tokenizer(models.Unigram(vocabulary, unknown, byte_fallback=False))
    if charsmap := metadata.get("tokenizer.ggml.precompiled_charsmap"):
        backend.normalizer = normalizers.Precompiled(bytes(charsmap))
    spaces: dict[str, Any] = dict(replacement=_SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**spaces)]
    )
    backend.decoder = decoders.Metaspace(**spaces)
    return backend


def _spelled(tokens: Sequence[str], spec: ModelSpec) -> list[str]:
    """Tokens as the model looks them up: Gemma's files hold runs of spaces as they are."""
    if spec.traits.spaces != "kept":
        return list(tokens)
    return [
        _SPACE * len(token) if " " in token and not token.strip() else token for token in tokens
    ]


def _merges(
    tokens: Sequence[str], vocabulary: Mapping[str, int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """The merges that lead to each token, best token first: files of SentencePiece hold none.

    Of a token's own, and of equal scores, those come first that `transformers` puts first.
    """
    found = []
    for token, score in zip(tokens, scores, strict=True):
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        own = [(a, b) for a, b in parts if a in vocabulary and b in vocabulary]
        own.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found += [(score, len(a), len(b), a, b) for a, b in own]
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [(a, b) for *_, a, b in found]
