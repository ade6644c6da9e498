"""lm-eval with our model, and with its own `hf` on the same base: same tasks, same numbers."""

import json

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
pytest.importorskip("torch", reason="compared with `hf`, which needs torch")

from safemoe_jax.errors import UserError  # noqa: E402
from safemoe_jax.serving.harness import SafeMoELM  # noqa: E402

CHOICES = """
task: tiny_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "Which animal {{does}}?"
doc_to_choice: [" the cat", " a dog does so"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = """
task: tiny_texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{does}}:"
doc_to_target: "x"
generation_kwargs: {until: ["a", "<|im_end|>"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def results(bundle_path, tmp_path_factory):
    """Of all three tasks, by our model on the base alone and by `hf` on the base."""
    directory = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    words = ["purrs", "barks", "sleeps", "digs", "runs", "é日", "hunts"]
    rows = [
        {"does": " ".join(rng.choice(words, 3)), "answer": int(rng.integers(2)), "text": "w " * n}
        for n in rng.integers(3, 400, 12).tolist()
    ]
    data = directory / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choices", CHOICES), ("texts", TEXTS), ("answers", ANSWERS)):
        (directory / f"{name}.yaml").write_text(task.replace("DATA", str(data)))
    tasks = lm_eval.tasks.TaskManager(include_path=str(directory), include_defaults=False)

    def evaluate(model, **arguments):
        return lm_eval.simple_evaluate(
            model,
            model_args=arguments,
            tasks=["tiny_choices", "tiny_texts", "tiny_answers"],
            task_manager=tasks,
            log_samples=True,
            bootstrap_iters=0,
        )

    base = bundle_path.parent / "base"
    return (
        evaluate("safemoe", bundle=str(bundle_path), routing="base"),
        evaluate("hf", pretrained=str(base), device="cpu", dtype="float32", max_length=512),
        evaluate("safemoe", bundle=str(bundle_path)),
    )


def responses(result, task):
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in samples]


def test_log_likelihoods_and_accuracy_are_those_of_hf(results):
    ours, theirs, _ = results
    for metric in ("acc,none", "acc_norm,none"):
        assert ours["results"]["tiny_choices"][metric] == theirs["results"]["tiny_choices"][metric]
    for mine, other, routed in zip(
        *(responses(result, "tiny_choices") for result in results), strict=True
    ):
        for (score, greedy), (expected, is_greedy), (otherwise, _) in zip(
            mine, other, routed, strict=True
        ):
            assert abs(float(score) - float(expected)) < 1e-3
            assert str(greedy) == str(is_greedy)
            assert abs(float(otherwise) - float(score)) > 1e-2


def test_texts_longer_than_the_base_takes_are_scored_as_by_hf(results):
    for mine, other in zip(
        *(responses(result, "tiny_texts") for result in results[:2]), strict=True
    ):
        np.testing.assert_allclose(
            np.array(mine, np.float64), np.array(other, np.float64), rtol=0, atol=1e-3
        )


def test_greedy_answers_are_those_of_hf(results):
    ours, theirs, gated = (responses(result, "tiny_answers") for result in results)
    assert ours == theirs
    assert gated != ours


def test_what_is_ungated_or_unknown_is_refused(bundle_path):
    with pytest.raises(UserError, match="routing is 'cats'; choose of router, base"):
        SafeMoELM(str(bundle_path), routing="cats")
    with pytest.raises(UserError, match="unknown model argument gates"):
        SafeMoELM(str(bundle_path), gates="1")
