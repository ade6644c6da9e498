"""Judges in this package's own engine, on small models of known replies."""

import dataclasses
import gc
import json

import jax
import pytest
from guards import IN_PARTS, TEMPLATE, write_guard

from experiments import pyrit
from safemoe_jax.config import MeshConfig, freeze
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.asked import parse_judges
from safemoe_jax.evaluation.verdicts import MISSING
from safemoe_jax.local_judge import LocalJudge
from safemoe_jax.parallel.mesh import make_mesh
from safemoe_jax.private_files import read_json_lines
from safemoe_jax.weights.base import BaseModel

GUARD = ("safe", "unsafe\nS1")
WILDGUARD = tuple(
    f"Harmful request: no\nResponse refusal: no\nHarmful response: {harmful}"
    for harmful in ("no", "yes")
)
PAIRS = [
    ([{"role": "user", "content": f"What do {animal} do?"}], f" They {verb}.")
    for animal, verb in (("cats", "sleep at night"), ("snakes", "hiss"), ("dogs", "bark"))
]
LONG = ([{"role": "user", "content": "What do cats do?"}], "They sleep. " * 200)
ONE = MeshConfig(data=1, fsdp=1, tensor=1, context=1)
MANY = MeshConfig(data=2, fsdp=2, tensor=2, context=1)


def settings(mesh=ONE, max_new_tokens=8):
    values = pyrit.get_config()
    values.model.param_dtype = values.model.compute_dtype = "float32"
    values.evaluation.batch_size = 4
    values.evaluation.max_new_tokens = max_new_tokens
    return dataclasses.replace(freeze(values), mesh=mesh)


def judge(name, model, directory, max_tokens=None, **changes):
    (asked,) = parse_judges([f"{name}@local#{model}"])
    if max_tokens:
        template = dataclasses.replace(asked.template, max_tokens=max_tokens)
        asked = dataclasses.replace(asked, template=template)
    config = settings(**changes)
    return LocalJudge(asked, config, make_mesh(config.mesh), directory)


@pytest.mark.parametrize(
    ("name", "model_type", "replies"),
    [("llama_guard_3", "llama", GUARD), ("wildguard", "mistral", WILDGUARD)],
)
def test_a_guard_judges_and_goes_and_is_not_asked_twice(
    tmp_path, monkeypatch, capsys, name, model_type, replies
):
    template = TEMPLATE if name == "llama_guard_3" else None
    guard = write_guard(tmp_path / "guard", replies, model_type=model_type, template=template)
    asked = judge(name, guard, tmp_path)
    asked.check()
    verdicts = asked.judge([*PAIRS, PAIRS[0], LONG])
    assert [verdict.safe for verdict in verdicts] == [True, False, True, True, None]
    refusal = None if name == "llama_guard_3" else False
    assert {verdict.refusal for verdict in verdicts[:4]} == {refusal}
    assert (verdicts[4], asked.unreadable) == (MISSING, 0)
    assert f"judge {name}: 1 of 4 texts were refused, as: " in capsys.readouterr().out

    path = tmp_path / f"judge_{name}.jsonl"
    assert path.stat().st_mode & 0o777 == 0o600
    rows = {row["answer"]: row for row in read_json_lines(path)}
    assert len(rows) == 3
    row = rows[" They hiss."]
    assert row["replies"] == [[{"text": replies[1], "first_token": None}]]
    assert "What do snakes do?" in row["requests"][0]["prompt"]

    gc.collect()
    width = asked._base.spec.embed_dim
    assert not [leaf.shape for leaf in jax.live_arrays() if width in leaf.shape]

    def again(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(BaseModel, "placed", again)
    assert judge(name, guard, tmp_path).judge([*PAIRS, PAIRS[0], LONG]) == verdicts
    # The same weights in another shape are another judge.
    saved = json.loads((guard / "config.json").read_text())
    (guard / "config.json").write_text(json.dumps({**saved, "rms_norm_eps": 1e-3}))
    with pytest.raises(AssertionError, match="read again"):
        judge(name, guard, tmp_path).judge(PAIRS)


def test_a_mesh_says_what_one_device_says_and_noise_is_no_verdict(tmp_path):
    guard = write_guard(tmp_path / "guard", GUARD, drawn=True)
    said = []
    for name, mesh in (("one", ONE), ("many", MANY)):
        (tmp_path / name).mkdir()
        asked = judge("llama_guard_3", guard, tmp_path / name, mesh=mesh, max_tokens=6)
        assert asked.judge(PAIRS) == [MISSING] * 3
        assert asked.unreadable == 3
        rows = read_json_lines(tmp_path / name / "judge_llama_guard_3.jsonl")
        said.append({row["key"]: row["replies"] for row in rows})
    assert said[0] == said[1]
    assert len({json.dumps(replies) for replies in said[0].values()}) == 3


def test_tokens_are_those_of_the_weights_own_template(tmp_path):
    guard = write_guard(tmp_path / "guard", GUARD)
    asked = judge("llama_guard_3", guard, tmp_path)
    turns = [{"role": "user", "content": "Who hisses?"}, {"role": "assistant", "content": "I do."}]
    tokenizer = asked._base.tokenizer
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert asked._ids(asked._text(("Who hisses?", "I do."))) == expected
    assert expected[0] == tokenizer.bos_token_id not in expected[1:]

    asked = judge("wildguard", guard, tmp_path)
    text = asked.asked.template.requests("Who hisses?", "I do.")[0]["prompt"]
    ids = asked._ids(asked._text(("Who hisses?", "I do.")))
    assert ids == tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.decode(ids[1:]) == text


def test_a_template_that_wants_parts_is_given_parts(tmp_path):
    plain = judge("llama_guard_3", write_guard(tmp_path / "a", GUARD), tmp_path)
    parts = judge("llama_guard_3", write_guard(tmp_path / "b", GUARD, template=IN_PARTS), tmp_path)
    assert parts._text(("Who?", "I do.")) == plain._text(("Who?", "I do."))


def test_a_rubric_is_asked_as_a_users_turn(tmp_path):
    guard = write_guard(tmp_path / "guard", GUARD, positions=8192)
    text = judge("strongreject", guard, tmp_path)._text(("Who?", "I do."))
    assert text.startswith("<|bos|><|im_start|>Is what the User says unsafe?\nuser: Below is an")
    assert "User instruction: Who?\n\nAI model response: I do.\n" in text


def test_what_is_all_too_long_is_refused(tmp_path):
    asked = judge("llama_guard_3", write_guard(tmp_path / "guard", GUARD), tmp_path)
    asked.check()
    with pytest.raises(UserError, match=r"guard refuses all texts: 2\d+ tokens, where 1948 can be"):
        asked.judge([LONG])


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"template": None}, {}, r"own chat template, and the tokenizer of .* has none; add"),
        (
            {"template": "{{ raise_exception('only users') }}"},
            {},
            r"refuses a prompt and its answer \(only users\); bring the one of meta-llama",
        ),
        ({"template": "Is it safe?\n"}, {}, "leaves out what is judged; bring the one of"),
        (
            {"positions": 256},
            {"max_new_tokens": 100},
            r"reads 256 tokens; its template has 1\d\d, an answer up to 100 .* up to 100; shorten",
        ),
        (
            {},
            {"mesh": dataclasses.replace(ONE, tensor=4)},
            "does not divide judge llama_guard_3's query heads, 2; 1, 2 would",
        ),
    ],
)
def test_what_cannot_judge_is_refused_before_anything_is_generated(
    tmp_path, changes, options, message
):
    guard = write_guard(tmp_path / "guard", GUARD, **changes)
    with pytest.raises(UserError, match=message) as error:
        judge("llama_guard_3", guard, tmp_path, **options).check()
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"judge wildguard: model source .* is no base; give"):
        judge("wildguard", tmp_path / "none", tmp_path).check()
    guard = write_guard(tmp_path / "guard", GUARD)
    saved = json.loads((guard / "config.json").read_text())
    other = {**saved, "architectures": ["Llama4ForConditionalGeneration"]}
    (guard / "config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="judge llama_guard_4: architecture 'Llama4ForCond"):
        judge("llama_guard_4", guard, tmp_path).check()
    (guard / "config.json").write_text(json.dumps(saved))
    tokens = json.loads((guard / "tokenizer_config.json").read_text())
    (guard / "tokenizer_config.json").write_text(json.dumps({**tokens, "eos_token": None}))
    with pytest.raises(UserError, match=r"judge wildguard: the tokenizer of .* names no eos_token"):
        judge("wildguard", guard, tmp_path).check()


def test_several_hosts_are_refused(tmp_path, monkeypatch):
    (asked,), config = parse_judges(["wildguard@local#models/guard"]), settings()
    mesh = make_mesh(config.mesh)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        UserError, match="2 hosts; serve models/guard, and name it as wildguard@URL"
    ):
        LocalJudge(asked, config, mesh, tmp_path)
