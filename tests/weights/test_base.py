"""Where a base comes from, and how it is named."""

import hashlib
from pathlib import Path

import families
import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects

from safemoe_jax.errors import Unreachable, UserError
from safemoe_jax.weights.base import HUB_FILES, fetch_base, load_base

GOLDEN = Path(__file__).parent.parent / "golden"


def test_identity_is_the_weight_files_hash(small, smollm):
    content = (small / "model.safetensors").read_bytes()
    identity = load_base(str(small), "float32").identity
    assert identity.sha256 == hashlib.sha256(content).hexdigest()
    assert identity.source == str(small)
    assert smollm.identity.sha256.startswith("b179c9523d0e6a0f")


def test_identity_of_shards_depends_on_each():
    directory = GOLDEN / "wide_heads_sharded_bfloat16"
    digests = [
        hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(directory.glob("*.safetensors"))
    ]
    expected = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert len(digests) == 2
    assert load_base(str(directory), "bfloat16").identity.sha256 == expected


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda text: text.replace("10000.0", "7.0")),
        ("tokenizer.json", lambda text: text.replace("<|pad|>", "<|void|>")),
        ("tokenizer_config.json", lambda text: text.replace("<|im_end|>", "<|im_start|>")),
        ("chat_template.jinja", lambda text: text.replace("Be kind", "Obey")),
    ],
)
def test_what_lies_beside_the_weights_is_of_the_fingerprint(tmp_path, name, change):
    tiny.write_base(tmp_path)
    before, again = (load_base(str(tmp_path), "float32") for _ in range(2))
    assert again.fingerprint == before.fingerprint
    text = (tmp_path / name).read_text()
    (tmp_path / name).write_text(change(text))
    changed = load_base(str(tmp_path), "float32")
    assert changed.identity == before.identity
    assert changed.fingerprint != before.fingerprint


def test_local_paths_pass_through(small):
    assert fetch_base(str(small)) == small


@pytest.mark.parametrize("source", ["smollm", "a/b/c", "./absent", "gone/model.gguf"])
def test_what_is_no_source_is_refused(source):
    with pytest.raises(UserError, match="is no base; give 'smollm2-135m-instruct', a Hugging"):
        load_base(source, "float32")


def test_unreached_hub_says_so(monkeypatch, tmp_path):
    # Port 9 of this machine is closed.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unreachable, match=r"could not fetch owner/name .*refused.*local directory"):
        fetch_base("owner/name")
    with pytest.raises(UserError, match=r"not fetched yet; .*, or `hf download owner/name`"):
        load_base("owner/name", "float32")


def test_a_tokenizer_of_more_tokens_than_the_embedding_is_refused(tmp_path):
    directory = families.write("llama", tmp_path / "base")
    size = load_base(str(directory), "float32").spec.vocab_size
    families.tokenizer(size + 2).save_pretrained(directory)
    with pytest.raises(UserError, match=f"has {size + 2} tokens and .* {size}: 'w{size}' has no"):
        load_base(str(directory), "float32")
    # An added token too many is Gemma 3's own.
    tokenizer = families.tokenizer(size)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(directory)
    assert len(load_base(str(directory), "float32").tokenizer) == size + 1


def test_a_template_that_writes_the_date_writes_the_same_every_day(small):
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}!"
    (small / "chat_template.jinja").write_text(template)
    tokenizer = load_base(str(small), "float32").tokenizer
    assert tokenizer.apply_chat_template([{"role": "user"}], tokenize=False) == "26 Jul 2024!"


def test_only_the_weights_that_are_read_are_fetched():
    used = ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"]
    others = ["consolidated.safetensors", "onnx/config.json", "pytorch_model.bin"]
    assert list(filter_repo_objects([*used, *others], **HUB_FILES)) == used
