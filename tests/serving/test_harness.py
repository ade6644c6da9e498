"""What lm-eval makes of a bundle, beside what its own model `hf` makes of the same weights."""

import functools
import importlib.metadata
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from toys import toy_variables

from safemoe_jax.config import freeze, read_config
from safemoe_jax.errors import UserError
from safemoe_jax.export import export_transformers
from safemoe_jax.fetch import file_digest
from safemoe_jax.inference.engine import decode_step, prefill
from safemoe_jax.model.lora import Routed
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import write_bundle

pytest.importorskip("lm_eval", reason="lm-eval comes with the extra parity")
pytest.importorskip("torch", reason="torch comes with the extra parity")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from portable_reference import module

from safemoe_jax.serving import harness

TASKS = Path(__file__).parent / "tasks"
# Shorter than the texts of the tasks: contexts are cut, and whole texts read in windows.
MAX_LENGTH = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/, bundle/ with drawn experts and router, torch/, its export, and pooling/, a bundle of
    the same whose router pools over the prompt."""
    home = tmp_path_factory.mktemp("harness")
    tiny.write_base(home / "base")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, config.model.param_dtype)
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    trained = {name: drawn[name] for name in ("experts", "router")}
    pooling = freeze(read_config(home / "tiny.py", ["--config.router.granularity=sequence"]))
    common = {"base": base, "provenance": {"corpus": "none"}, **trained}
    write_bundle(home / "bundle", config=config, **common)
    write_bundle(home / "pooling", config=pooling, **common)
    export_transformers(home / "bundle", home / "torch", allow_ungated=True)
    return home


@pytest.fixture(scope="module")
def models(home):
    """(ours, lm-eval's own) by routing: the base alone, and the gated model in torch."""
    common = {"max_length": MAX_LENGTH, "batch_size": 4}
    gated, tokenizer = module(home / "torch").load(home / "torch")
    theirs = {
        "base": HFLM(str(home / "base"), dtype="float32", device="cpu", **common),
        "router": HFLM(gated, tokenizer=tokenizer, **common),
    }
    return {
        routing: (harness.SafeMoELM(str(home / "bundle"), routing=routing, **common), other)
        for routing, other in theirs.items()
    }


@pytest.fixture
def evaluate(monkeypatch):
    """Runs the tasks of tests/serving/tasks with a model -> results, what was answered by task."""
    monkeypatch.chdir(TASKS.parents[2])  # as the tasks say where their file is
    # What it says of the machine takes longer than what it computes.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    tasks = lm_eval.tasks.TaskManager(include_path=str(TASKS), include_defaults=False)

    def evaluate(model):
        found = lm_eval.simple_evaluate(
            model, tasks=tasks.all_tasks, task_manager=tasks, limit=6, bootstrap_iters=0
        )
        rows = {
            task: [row["filtered_resps"] for row in rows] for task, rows in found["samples"].items()
        }
        return found, rows

    return evaluate


def test_results_are_those_of_the_same_weights_in_torch(models, evaluate, home):
    texts = {}
    for routing, (ours, theirs) in models.items():
        (found, rows), (expected, expected_rows) = evaluate(ours), evaluate(theirs)
        for task, metric in (("facts", "acc"), ("facts_answers", "exact_match")):
            metrics = found["results"][task], expected["results"][task]
            assert metrics[0][f"{metric},none"] == metrics[1][f"{metric},none"]
        assert rows["facts_answers"] == expected_rows["facts_answers"]
        scores, likeliest = np.moveaxis(np.array(rows["facts"], float), -1, 0)
        expected_scores, expected_likeliest = np.moveaxis(
            np.array(expected_rows["facts"], float), -1, 0
        )
        assert scores.shape == (6, 4)
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(likeliest, expected_likeliest)
        texts[routing] = np.array(rows["facts_texts"])
        np.testing.assert_allclose(
            texts[routing], np.array(expected_rows["facts_texts"]), rtol=0, atol=1e-3
        )
        assert found["config"]["bundle_sha256"] == file_digest(home / "bundle" / "manifest.json")
        assert found["config"]["routing"] == routing
    assert np.abs(texts["base"] - texts["router"]).max() > 1.0


def test_an_answer_ends_before_its_first_stop_string(models):
    def said(model, **settings):
        settings = {"max_gen_toks": 12, **settings}
        instance = Instance("generate_until", {}, ("Cats are", settings), 0)
        return model.generate_until([instance])

    ours, theirs = models["router"]
    (whole,) = said(ours)
    assert said(theirs) == [whole]
    stop = whole[5:7]
    assert said(ours, until=[stop, "never"]) == [whole[: whole.find(stop)]]
    assert said(theirs, until=[stop, "never"]) == [whole[: whole.find(stop)]]
    assert said(ours, do_sample=False, temperature=0.0) == [whole]  # as gsm8k and ifeval say it
    drawn = dict(do_sample=True, temperature=5.0)
    assert said(ours, **drawn) == said(ours, **drawn) != [whole]
    with pytest.raises(UserError, match="have top_k, which is unknown; there are until, max_gen_"):
        said(ours, top_k=3)
    with pytest.raises(UserError, match="max_gen_toks is 24; with max_length 24 it must be 1 to 2"):
        said(ours, max_gen_toks=24)


def test_a_context_is_the_prompt_over_which_a_router_pools(home):
    ours = harness.SafeMoELM(str(home / "pooling"))
    text = ("Cats like", " to sleep.")
    ((score, _),) = ours.loglikelihood([Instance("loglikelihood", {}, text, 0)], disable_tqdm=True)

    model, variables = ours._loaded.model, ours._loaded.variables
    context, continuation = (np.array(ours.tok_encode(part))[None] for part in text)
    cache = model.empty_cache(1, context.size + continuation.size)
    length_B = np.array([context.size])
    read = jax.jit(functools.partial(prefill, model, routing=Routed()))
    say = jax.jit(functools.partial(decode_step, model, routing=Routed()))
    cache, logits_BV = read(variables, tokens_BT=context, length_B=length_B, cache=cache)
    expected = 0.0
    for token in continuation[0]:
        expected += float(jax.nn.log_softmax(logits_BV)[0, token])
        cache, logits_BV, _ = say(variables, token_B=token[None], cache=cache)
    assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"routing": "uniform"}, "routing is 'uniform'; choose of router, base"),
        ({"dtype": "float32"}, "--model_args has dtype, which is unknown; there are bundle, routi"),
        ({"max_length": 513}, "max_length is 513; this base reads 2 to 512 tokens"),
    ],
)
def test_a_model_argument_that_makes_no_sense(home, argument, message):
    with pytest.raises(UserError, match=re.escape(message)):
        harness.SafeMoELM(str(home / "bundle"), **argument)


def test_lm_evals_command_knows_the_model(monkeypatch, capsys):
    """By the entry point, which lm-eval will read, and by our command, until it does."""
    (entry,) = importlib.metadata.entry_points(group="lm_eval.models", name="safemoe")
    assert entry.load() is harness.SafeMoELM

    def command():
        assert get_model("safemoe") is harness.SafeMoELM
        assert get_model("hf") is HFLM
        raise UserError("no such bundle")

    monkeypatch.setattr(harness, "cli_evaluate", command)
    with pytest.raises(SystemExit, match=r"^2$"):
        harness.main()
    assert capsys.readouterr().err == "safemoe: no such bundle\n"
