"""Tokenizers rebuilt from GGUF metadata against `transformers`' own; all of it without torch.

The vocabularies are trained here on the texts that are then cut, by the `tokenizers` package.
"""

import dataclasses
import importlib.util
import json
import runpy
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers
from toys import SPEC
from transformers import Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer

from safemoe_jax.errors import UserError
from safemoe_jax.model.spec import ModelSpec
from safemoe_jax.weights.gguf import Metadata
from safemoe_jax.weights.gguf_tokenizer import PRE_TOKENIZERS, read_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden"
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
NORMAL, CONTROL, OWN, BYTE = (
    gguf.TokenType.NORMAL,
    gguf.TokenType.CONTROL,
    gguf.TokenType.USER_DEFINED,
    gguf.TokenType.BYTE,
)
TEXTS = [
    *json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8")),
    "<|endoftext|>a <|endoftext|> b<|endoftext|>\n<tool>x</tool> <tool> <|endoftext|",
    f"{SPACE}already{SPACE}{SPACE}written",
    "\u1e9b\u0323 \uac00\u1100\u1161 \U0001f468\u200d\U0001f469\u200d\U0001f467 \u0e33 \ufeffx",
    "if x:\n\t\tif y :\n    \t return  {'k' :1}   \r\n\r\n\r\n",
]


def spec_of(family: str) -> ModelSpec:
    return dataclasses.replace(SPEC, family=family)


def metadata(kind, tokens, types, **more):
    named = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return Metadata(
        {
            "tokenizer.ggml.model": kind,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [int(of) for of in types],
            **named,
        }
    )


def transformers_backend(architecture, values):
    """What `transformers` makes of the same metadata."""
    names = {
        "model": "tokenizer_type",
        "pre": "pre_tokenizer_type",
        "bos_token_id": "bos_token_id",
        "unknown_token_id": "unk_token_id",
    }
    given = {
        names.get(key.removeprefix("tokenizer.ggml."), key.removeprefix("tokenizer.ggml.")): value
        for key, value in values.items()
    }
    return convert_gguf_tokenizer(architecture, given)[0]


def same(found, expected):
    for text in TEXTS:
        ids = found(text, add_special_tokens=False)["input_ids"]
        assert ids == expected.encode(text, add_special_tokens=False).ids, text
        assert found.decode(ids) == expected.decode(ids, skip_special_tokens=False), text


def byte_level(pre, **more):
    """Metadata of a byte-level tokenizer, trained with the cut that it names."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = PRE_TOKENIZERS[pre]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    trained.train_from_iterator(TEXTS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<|endoftext|>", "<tool>", "</tool>"]
    types = [NORMAL] * len(model["vocab"]) + [CONTROL, OWN, OWN]
    merges = [" ".join(merge) for merge in model["merges"]]
    ends = {
        "bos_token_id": tokens.index("<|endoftext|>"),
        "eos_token_id": tokens.index("<|endoftext|>"),
    }
    return metadata("gpt2", tokens, types, pre=pre, merges=merges, **ends | more)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "tekken", "deepseek-r1-qwen"])
def test_byte_level(pre):
    values = byte_level(pre)
    expected = transformers_backend("llama", values)
    found = read_tokenizer(values, spec_of("llama"))
    if pre == "deepseek-r1-qwen":
        # That conversion forgets that these models' text is composed first; see the next test.
        found.backend_tokenizer.normalizer = None
    same(found, expected)
    assert found.decode(found("  a\n", add_special_tokens=False)["input_ids"]) == "  a\n"


def test_qwens_own_tokenizer():
    values = byte_level("qwen2")
    tokens = values["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in values["tokenizer.ggml.merges"]]
    own = Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        unk_token=None,
        eos_token="<|endoftext|>",
        pad_token=None,
    )
    own.add_tokens([AddedToken(token, normalized=False) for token in ("<tool>", "</tool>")])
    same(read_tokenizer(values, spec_of("qwen2")), own.backend_tokenizer)


def sentencepiece(gemma: bool, **more):
    """Metadata of SentencePiece's BPE: bytes, then pieces by falling score, then characters."""
    trained = Tokenizer(models.BPE())
    written = [text.replace(" ", SPACE) for text in TEXTS]
    trained.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}*[^{SPACE}]*"), "isolated")
    trained.train_from_iterator(written, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    pieces = [token for token in sorted(model["vocab"], key=model["vocab"].get) if len(token) > 1]
    # Some characters are left to the bytes.
    characters = sorted({x for x in "".join(written) if ord(x) < 0x2600} | {SPACE})
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    own = ["<|endoftext|>", "<tool>", "</tool>"] + (["  ", "    "] if gemma else [])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = [x for x in pieces if x not in own and (not gemma or x.strip(SPACE))]
    tokens = [*special, *own, *bytes_, *pieces, *characters]
    types = [CONTROL] * (len(special) + 1) + [OWN] * (len(own) - 1) + [BYTE] * 256
    types[special.index("<unk>")] = gguf.TokenType.UNKNOWN
    types += [NORMAL] * (len(tokens) - len(types))
    if gemma:
        types[len(special) + 3 : len(special) + 5] = [NORMAL, NORMAL]
    scores = [0.0] * (len(special) + len(own) + 256)
    scores += [-float(rank) for rank in range(len(pieces) + len(characters))]
    begin = special.index("<bos>" if gemma else "<s>")
    ids = {
        "bos_token_id": begin,
        "eos_token_id": special.index("<eos>" if gemma else "</s>"),
        "unknown_token_id": special.index("<unk>"),
    }
    return metadata("llama", tokens, types, scores=scores, **ids | more)


# The conversion takes Llama's for a newer way to write spaces. As Llama 2's and Mistral's published
# tokenizers do it, it does with Phi-3's.
@pytest.mark.parametrize(
    ("family", "architecture"),
    [("llama", "phi3"), ("phi3", "phi3"), ("gemma2", "gemma2"), ("gemma3_text", "gemma3")],
)
def test_sentencepiece(family, architecture):
    values = sentencepiece(gemma=family.startswith("gemma"))
    found = read_tokenizer(values, spec_of(family))
    same(found, transformers_backend(architecture, values))
    beginning = values["tokenizer.ggml.bos_token_id"]
    assert found("a")["input_ids"][0] == beginning  # unless the file says otherwise
    values["tokenizer.ggml.add_bos_token"] = False
    assert read_tokenizer(values, spec_of(family))("a")["input_ids"][0] != beginning


def test_sentencepiece_without_a_space_in_front():
    tokenizers = [
        read_tokenizer(sentencepiece(False, add_space_prefix=prefix), spec_of("llama"))
        for prefix in (True, False)
    ]
    ids = [one(" lazy dog", add_special_tokens=False)["input_ids"] for one in tokenizers]
    assert ids[0] != ids[1]
    assert tokenizers[1].decode(ids[1]) == " lazy dog"


def test_unigram():
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(SPACE)
    special = ["<pad>", "</s>", "<unk>"]
    trained.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=300, show_progress=False, special_tokens=special, unk_token="<unk>"
        ),
    )
    vocabulary = json.loads(trained.to_str())["model"]["vocab"]
    tokens, scores = zip(*vocabulary, strict=True)
    values = metadata(
        "t5",
        list(tokens),
        [CONTROL, CONTROL, gguf.TokenType.UNKNOWN] + [NORMAL] * (len(tokens) - 3),
        scores=list(scores),
        eos_token_id=1,
        unknown_token_id=2,
        padding_token_id=0,
        add_bos_token=False,
        add_eos_token=True,
    )
    found, expected = read_tokenizer(values, SPEC), transformers_backend("t5", values)
    same(found, expected)
    for text in TEXTS:
        assert found(text)["input_ids"] == expected.encode(text).ids


def test_what_is_not_known_is_named():
    values = byte_level("gpt-2")
    for key, message in (
        ("pre", "pre-tokenizer 'odd' is not supported"),
        ("model", "tokenizer 'odd' is not supported"),
    ):
        with pytest.raises(UserError, match=message):
            read_tokenizer(Metadata(values | {f"tokenizer.ggml.{key}": "odd"}), SPEC)


def test_smollm2_ids_equal_those_of_transformers(smollm, smollm_path):
    texts = json.loads((GOLDEN / "texts.json").read_text(encoding="utf-8"))
    golden = json.loads((GOLDEN / "ids.json").read_text())
    found = [smollm.tokenizer(text)["input_ids"] for text in texts]
    assert found == golden
    for text, ids in zip(texts, found, strict=True):
        assert smollm.tokenizer.decode(ids) == text
    if importlib.util.find_spec("torch"):
        reference = runpy.run_path(str(GOLDEN / "make.py"))["gguf_tokenizer"](smollm_path)
        assert found == [reference.encode(text).ids for text in texts]
