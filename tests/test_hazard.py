"""Every way to ungated text or weights is refused, or announced and recorded (docs/security.md).

What belongs to one room is tested there: the server's fields in serving, exports in test_export,
the rules of data in data, what a report hides in evaluation. Here are the rest, and nets for new
ways.
"""

import ast
import base64
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from toys import toy_variables

import safemoe_jax
from safemoe_jax import cli, generate
from safemoe_jax.config import freeze, read_config
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.systems import SYSTEMS, is_ungated
from safemoe_jax.export import export_merged, export_peft, export_transformers
from safemoe_jax.fetch import file_digest
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.serving.protocol import ChatBody, CompletionBody
from safemoe_jax.weights import encryption
from safemoe_jax.weights.artefact import manifest_digest
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import model_card, read_bundle, write_bundle

ROOT = Path(safemoe_jax.__file__).parents[1]
KEY, OTHER_KEY = (base64.b64encode(bytes([i]) * 32).decode() for i in (1, 2))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a bundle of drawn weights: made(name, seed) -> its directory."""
    home = tmp_path_factory.mktemp("hazard")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, config.model.param_dtype)

    def made(name, seed=0):
        drawn = toy_variables(Transformer.from_config(config, base.spec), seed)
        trained = {part: drawn[part] for part in ("experts", "router")}
        provenance = {"corpus": "none"}
        write_bundle(home / name, base=base, config=config, provenance=provenance, **trained)
        return home / name

    return made


@pytest.fixture(scope="module")
def plain(made):
    return made("plain")


@pytest.fixture(scope="module")
def sealed(made):
    """The same, encrypted with KEY, and one of other weights: (bundle, other)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(encryption.KEY_VARIABLE, KEY)
        return made("sealed"), made("other", seed=1)


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv(encryption.KEY_VARIABLE, KEY)


@functools.cache
def syntax():
    """Every node of the package's syntax trees, with its file."""
    package = ROOT / "safemoe_jax"
    return [
        (str(path.relative_to(package)), node)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
    ]


def edited(bundle, to, change):
    """A copy whose manifest was changed by somebody who also writes its new sha256s."""
    shutil.copytree(bundle, to)
    manifest = json.loads((to / "manifest.json").read_text())
    change(manifest)
    manifest["files"] = {name: file_digest(to / name) for name in manifest["files"]}
    manifest["sha256"] = manifest_digest(manifest)
    (to / "manifest.json").write_text(json.dumps(manifest))
    return to


# nets: a new way to ungated text or weights is seen here before it is used


def test_gates_are_set_by_hand_only_where_leave_is_asked_or_systems_are_compared():
    makers = {"Gates", "merge", "write_adapter", "fixed_gates"}
    found = {
        (path, node.func.id)
        for path, node in syntax()
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in makers
    }
    assert found == {
        ("model/transformer.py", "Gates"),  # turns a router's output into the same form
        ("generate.py", "Gates"),  # _routing asks for leave
        ("export.py", "merge"),  # _permit asks for leave
        ("export.py", "write_adapter"),
        ("controls.py", "Gates"),  # announced by `evaluate`, recorded in results.json
        ("controls.py", "fixed_gates"),
    }


def test_expert_weights_are_written_through_the_door_that_encrypts():
    """Elsewhere files of weights are made by exports alone, which must be open."""
    writers = {p for p, n in syntax() if isinstance(n, ast.Attribute) and n.attr == "save_file"}
    assert writers == {"weights/peft.py", "weights/huggingface.py", "weights/portable.py"}


def test_no_field_of_a_request_reaches_the_gates():
    common = {"model", "temperature", "top_p", "seed", "stop", "n", "stream", "stream_options"}
    common |= {"gates", "max_tokens"}  # gates are a bool: to see them
    assert ChatBody.model_fields.keys() == common | {"messages", "max_completion_tokens"}
    assert CompletionBody.model_fields.keys() == common | {"prompt"}


@pytest.mark.parametrize("verb", sorted(set(cli.VERBS) - {"generate", "export"}))
def test_no_other_verb_takes_leave(verb, capsys):
    with pytest.raises(SystemExit):
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert "--allow-ungated" not in out
    assert "--routing" not in out


def test_nothing_uploads():
    names = {"upload_file", "upload_folder", "push_to_hub", "create_repo", "create_commit"}
    assert not names & cli.VERBS.keys()
    used = {node.attr for _, node in syntax() if isinstance(node, ast.Attribute)}
    assert not names & used
    assert "runs/" in (ROOT / ".gitignore").read_text().splitlines()


def test_which_systems_are_ungated():
    assert {name for name in SYSTEMS if is_ungated(name)} == {
        "uniform", "negated", "random_router", "shuffled_router", "constant_gates", "best_expert",
        "harmful_gates",
    }  # fmt: skip


# the Python API


def test_functions_that_answer_or_export_need_leave(plain, tmp_path):
    settings = dict(show_gates=False, max_new_tokens=2, temperature=0.0, top_p=1.0, seed=0)
    for routing in ("uniform", *tiny.DOMAINS):
        with pytest.raises(UserError, match="add --allow-ungated"):
            generate.answer(plain, ["a"], routing=routing, allow_ungated=False, **settings)
    (tmp_path / "prompts").write_text("a")
    with pytest.raises(UserError, match="add --allow-ungated"):
        export_peft(plain, tmp_path / "out", allow_ungated=False)
    given = dict(gates=["cats=1"], prompts=tmp_path / "prompts")
    with pytest.raises(UserError, match="add --allow-ungated"):
        export_merged(plain, tmp_path / "out", **given, allow_ungated=False)
    assert not (tmp_path / "out").exists()


# an edited manifest, swapped files


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["config"]["router"].update(activation="sigmoid"),  # of the same shapes
        lambda m: m["config"]["router"].update(temperature=1e-3),
        lambda m: m["config"]["experts"].update(alpha=40.0),
        lambda m: m["config"]["data"].update(domains=["dogs", "cats"]),
        lambda m: m.update(data_licenses={}),
    ],
)
def test_an_edited_manifest_is_refused(plain, tmp_path, change):
    bundle = shutil.copytree(plain, tmp_path / "edited")
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="was changed since it was written"):
        read_bundle(bundle, None)


def test_where_the_base_lies_may_be_edited(plain, tmp_path):
    bundle = shutil.copytree(plain, tmp_path / "moved")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["base"]["source"] = "elsewhere"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert read_bundle(bundle, None).base.source == "elsewhere"


def test_what_lies_beside_the_bases_weights_does_not_change_an_answer(plain, tmp_path):
    """Who points to the same weights elsewhere brings neither a template nor another config."""
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    base = shutil.copytree(plain.parent / "base", tmp_path / "base")
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["base"]["source"] = str(base)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    (base / "chat_template.jinja").write_text("Obey.{{ messages[0]['content'] }}")
    loaded = generate.on_devices(bundle, read_bundle(bundle, None))
    assert "Obey" not in loaded.base.tokenizer.chat_template
    assert loaded.base.tokenizer.chat_template == tiny.TEMPLATE
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1.0
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was changed since bundle"):
        generate.on_devices(bundle, read_bundle(bundle, None))
    with pytest.raises(UserError, match="was changed since bundle"):
        export_transformers(bundle, tmp_path / "out", allow_ungated=True)
    shutil.copy(plain.parent / "base" / "config.json", base)
    export_transformers(bundle, tmp_path / "out", allow_ungated=True)
    template = (tmp_path / "out" / "base" / "chat_template.jinja").read_text()
    assert template == tiny.TEMPLATE


def test_the_card_may_be_written_anew_and_nothing_else(plain, tmp_path):
    bundle = shutil.copytree(plain, tmp_path / "bundle")
    (bundle / "README.md").write_text("more")
    read_bundle(bundle, None)
    (bundle / "router.safetensors").write_bytes((bundle / "experts.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"router\.safetensors was changed since"):
        read_bundle(bundle, None)


# encryption


def test_an_encrypted_bundle_is_what_it_was_with_its_key_alone(plain, sealed, monkeypatch):
    bundle, _ = sealed
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["encryption"] == {
        "cipher": "AES-256-GCM",
        "key_id": encryption.key_id(base64.b64decode(KEY)),
        "files": ["experts.safetensors"],
    }
    assert KEY not in (bundle / "manifest.json").read_text()
    assert "**not encrypted**" in (plain / "README.md").read_text()
    assert "is encrypted (AES-256-GCM)" in (bundle / "README.md").read_text()
    stored = (bundle / "experts.safetensors").read_bytes()
    assert len(stored) == (plain / "experts.safetensors").stat().st_size + 12 + 16
    for leaf in jax.tree.leaves(read_bundle(plain, None).experts):
        assert leaf.tobytes()[:64] not in stored

    with pytest.raises(UserError, match=f"is encrypted; set {encryption.KEY_VARIABLE} to the key"):
        read_bundle(bundle, None)
    monkeypatch.setenv(encryption.KEY_VARIABLE, OTHER_KEY)
    with pytest.raises(UserError, match=f"is encrypted with {manifest['encryption']['key_id']}"):
        read_bundle(bundle, None)
    monkeypatch.setenv(encryption.KEY_VARIABLE, KEY)
    found, wanted = (read_bundle(path, None) for path in (bundle, plain))
    for part in ("experts", "router"):
        jax.tree.map(np.testing.assert_array_equal, getattr(found, part), getattr(wanted, part))


@pytest.mark.parametrize("change", [
    lambda bundle, other: shutil.copy(other / "router.safetensors", bundle),
    lambda bundle, other: shutil.copy(other / "experts.safetensors", bundle),
    lambda bundle, other: (bundle / "chat_template.jinja").write_text("Obey."),
    lambda bundle, other: (bundle / "experts.safetensors").write_bytes(b"short"),
    lambda bundle, other: None,  # the manifest alone
])  # fmt: skip
def test_who_has_no_key_cannot_put_anything_before_an_encrypted_expert(
    sealed, tmp_path, with_key, change
):
    """Not even with all sha256s written anew; without encryption that would be read."""
    bundle, other = sealed
    shutil.copytree(bundle, tmp_path / "b")
    change(tmp_path / "b", other)
    changed = edited(tmp_path / "b", tmp_path / "c", lambda m: m["config"].update(seed=7))
    with pytest.raises(UserError, match=r"'experts.safetensors' does not belong to this manifest"):
        read_bundle(changed, None)


def test_another_cipher_is_named(sealed, tmp_path, with_key):
    changed = edited(sealed[0], tmp_path / "b", lambda m: m["encryption"].update(cipher="ROT13"))
    with pytest.raises(UserError, match=r"'ROT13'.*, this package knows AES-256-GCM"):
        read_bundle(changed, None)


@pytest.mark.parametrize("text", ["", "secret", KEY[:-4], KEY + KEY, "ä" * 44])
def test_a_key_that_is_none_is_refused_before_anything_is_written(made, monkeypatch, text):
    monkeypatch.setenv(encryption.KEY_VARIABLE, text)
    with pytest.raises(
        UserError, match=f"has {len(text)} characters and is not the base64"
    ) as said:
        made("never")
    assert not text or text not in str(said.value)


def test_without_the_library_a_key_is_no_silent_nothing(monkeypatch, with_key):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[encryption\]'"):
        encryption.key_from_environment()


def test_an_export_of_an_encrypted_bundle_says_that_it_is_open(sealed, tmp_path, with_key, capsys):
    export_peft(sealed[0], tmp_path / "out", allow_ungated=True)
    said = capsys.readouterr().out
    assert said.startswith("ungated: each expert alone, as a PEFT adapter, and no longer encrypted")


# licences


@pytest.mark.parametrize("where", ["base", "corpus", "adapter"])
def test_marks_of_no_commercial_use_are_carried_over(plain, tmp_path, where):
    manifest = read_bundle(plain, None).manifest
    card = model_card(manifest, encrypted=False, measured=None)
    assert "commercial" not in card
    if where == "base":
        manifest["base"]["license"] = "cc-by-nc-4.0"
    elif where == "corpus":
        manifest["data_licenses"] = {"beavertails": "CC-BY-NC-4.0: no commercial use"}
    else:
        origin = {"license": "cc-by-nc-4.0", "sha256": "0", "base_model_name_or_path": ""}
        manifest["provenance"]["adapters"] = {"cats": origin}
    card = model_card(manifest, encrypted=False, measured=None)
    assert card.startswith("---\nbase_model: ")
    assert (
        "\nlicense: cc-by-nc-4.0\ntags: [safemoe, lora, safety, research, non-commercial]\n" in card
    )
    assert "\n**No commercial use**: " in card


# what runs when a bundle answers

_TRACED = """
import pickle, socket, sys
from pathlib import Path

seen = []
names = {"pickle.find_class", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}

def hook(event, arguments):
    if event in names:
        seen.append(event)
    if event == "open" and str(arguments[0]).endswith(("evil.py", ".bin")):
        seen.append(str(arguments[0]))

sys.addaudithook(hook)
from safemoe_jax import cli

code = cli.main(["generate", "--bundle", sys.argv[1], "--prompt", "Cats?", "--max-new-tokens", "3"])
found = list(seen)
# That the hook sees what it is here to see:
pickle.loads(pickle.dumps(Path("x")))
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
assert "pickle.find_class" in seen[len(found):] and "socket.connect" in seen[len(found):], seen
print("traced:", code, found)
"""


def test_answering_needs_no_network_no_pickle_and_no_code_of_others(made, plain, tmp_path):
    base = plain.parent / "base"
    sentinel = tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Evil: pass\n")
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name, kind in (("config.json", "AutoModel"), ("tokenizer_config.json", "AutoTokenizer")):
        values = json.loads((base / name).read_text())
        values["auto_map"] = {kind: "evil.Evil"}
        (base / name).write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-c", _TRACED, str(made("answering"))],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SAFEMOE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "traced: 0 []"
    assert not sentinel.exists()


def test_no_source_asks_for_pickle_or_for_code_of_others():
    for path, node in syntax():
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            refused = {"pickle", "dill", "cloudpickle", "joblib", "torch"}
            if path == "weights/safemoe_torch.py":  # copied into exports, and never imported here
                refused -= {"torch"}
            assert not refused & modules, path
        if isinstance(node, ast.Call):
            asked = {keyword.arg for keyword in node.keywords}
            assert not {"trust_remote_code", "allow_pickle"} & asked, path
