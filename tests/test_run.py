"""The whole pipeline on a tiny base and corpus, through the command line."""

import contextlib
import hashlib
import io
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import tiny
from guards import write_guard
from judge_server import completion, serve

from safemoe_jax import cli, evaluating, stages
from safemoe_jax.config import freeze, read_config
from safemoe_jax.data import splits
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.card import measured
from safemoe_jax.evaluation.verdicts import Verdict
from safemoe_jax.experiment import Experiment
from safemoe_jax.fetch import cache_dir
from safemoe_jax.local_judge import LocalJudge
from safemoe_jax.private_files import read_json_lines
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import read_bundle


class StubJudge:
    """Finds every answer safe."""

    name = "stub"

    def __init__(self):
        self.reliability = {"harm": {"AUC": 0.5}}

    def judge(self, pairs):
        return [Verdict(True, False, True, False, 0.1)] * len(pairs)

    def measure(self, held_out):
        self.reliability["harm"]["held-out answers"] = len(held_out)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A finished run, by the embedded judge, in home/run.

    What is fetched comes from the user's cache; nothing about the tiny base goes into it.
    """
    home = tmp_path_factory.mktemp("run")
    (home / "cache").mkdir()
    (cache_dir() / "wheels").mkdir(exist_ok=True)
    (home / "cache" / "wheels").symlink_to(cache_dir() / "wheels")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SAFEMOE_CACHE", str(home / "cache"))
        # A part of the judge's rows is enough to see it fitted, and much faster.
        load = evaluating.load_judge_rows
        monkeypatch.setattr(evaluating, "load_judge_rows", lambda *given: load(*given)[::4])
        yield _finished(home)


def _finished(home):
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert safemoe(home, "run", "--log", "tensorboard", "--profile", "2:3") == 0
    (home / "said").write_text(said.getvalue())
    return home


def safemoe(home, verb, *overrides, workdir="run"):
    return cli.main(
        [verb, "--config", str(home / "tiny.py"), "--workdir", str(home / workdir), *overrides]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(home):
    return json.loads((home / "run" / "evaluation" / "results.json").read_text())


def mode(path):
    return path.stat().st_mode & 0o777


def test_what_a_run_leaves_behind(home):
    left = {path.name for path in (home / "run").iterdir()}
    assert left == {
        "bundle",
        "config.json",
        "data",
        "evaluation",
        "lock",
        "metrics.jsonl",
        "report.html",
        "report.json",
        "report.md",
        "report.tex",
        "run.json",
        "tensorboard",
    }  # no experts/ and no router/: what they held is in the bundle
    assert mode(home / "run") == 0o700
    assert {path.name for path in (home / "run" / "evaluation").iterdir()} == {
        "answers.jsonl",
        "generated.jsonl",
        "likelihoods.jsonl",
        "results.json",
    }
    assert mode(home / "run" / "evaluation" / "answers.jsonl") == 0o600


def test_both_stages_were_trained_and_written_down(home):
    rows = lines(home / "run" / "metrics.jsonl")
    for stage in ("experts", "router"):
        mine = [row for row in rows if row["stage"] == stage]
        assert [row["step"] for row in mine if row["split"] == "train"] == [1, 2, 3, 4]
        assert [row["step"] for row in mine if row["split"] == "validation"] == [2, 4]
    assert {"loss/cats", "loss/dogs"} <= rows[0].keys()
    gates = {f"{name}/{domain}" for name in ("gates", "gates_std") for domain in ("cats", "dogs")}
    assert gates <= [row for row in rows if row["split"] == "train"][-1].keys()


def test_both_stages_are_in_tensorboard_with_a_trace(home):
    for stage in ("experts", "router"):
        shown = home / "run" / "tensorboard" / stage
        assert len(list(shown.glob("events.out.tfevents.*"))) == 1
        (trace,) = shown.glob("plugins/profile/*/*.xplane.pb")
        assert trace.stat().st_size > 1000
        assert f"profile: a trace of {stage} is in {shown}" in (home / "said").read_text()
    assert mode(shown) == 0o700


def test_the_bundle_is_the_runs(home):
    bundle = read_bundle(home / "run" / "bundle", load_base(str(home / "base"), "float32"))
    assert bundle.config.data.domains == tiny.DOMAINS
    for name in ("q", "down"):
        group = "attention" if name == "q" else "mlp"
        b_LERO = bundle.experts["layers"][group][name]["b"]
        assert b_LERO.shape[:3] == (2, 2, 2)
        assert np.abs(b_LERO).max(axis=(0, 2, 3)).min() > 0.0  # every expert has learnt something
    assert np.abs(bundle.router["layers"]["router"]["kernel"]).max() > 0.0
    assert bundle.manifest["provenance"]["router_step"] in (2, 4)


def test_answers_and_results_agree(home):
    answers = lines(home / "run" / "evaluation" / "answers.jsonl")
    assert [(row["system"], row["domain"]) for row in answers] == [
        (system, domain)
        for system in ("base", "safemoe")
        for domain in ("cats",) * 2 + ("dogs",) * 2
    ]
    for row in answers:
        assert row["sha256"] == hashlib.sha256(row["response"].encode()).hexdigest()
        assert row["messages"][-1]["content"].endswith(row["domain"])
        assert row["num_tokens"] <= 8
        assert ("gates" in row) == (row["system"] == "safemoe")
        if row["system"] == "safemoe":
            assert len(row["tokens"]) == len(row["gates"]) == row["num_tokens"]
            assert {len(gates) for gates in row["gates"]} == {2}
            assert np.shape(row["gates_layers"]) == (2, 2)
            np.testing.assert_allclose(
                np.mean(row["gates"], axis=0), np.mean(row["gates_layers"], axis=0), atol=1e-3
            )

    found = results(home)
    for system in ("base", "safemoe"):
        verdicts = [row["verdict"] for row in answers if row["system"] == system]
        (srr,) = (
            row
            for row in found["rows"]
            if (row["system"], row["split"], row["metric"]) == (system, "all", "srr")
        )
        assert srr["n"] == 4
        assert srr["value"] == np.mean([verdict["safe"] for verdict in verdicts])
        assert srr["low"] <= srr["value"] <= srr["high"]
    nll = {(row["system"], row["metric"]): row["value"] for row in found["nll"]}
    for system in ("base", "safemoe"):
        difference = nll[system, "nll_unsafe"] - nll[system, "nll_safe"]
        assert nll[system, "nll_difference"] == pytest.approx(difference)
    assert [row["domain"] for row in found["experts"]] == list(tiny.DOMAINS)
    assert found["domains"] == list(tiny.DOMAINS)
    assert found["judge"]["name"] == "embedded"
    assert len(found["validity"]) == 5


def test_no_text_of_the_data_or_of_an_answer_is_said_or_logged(home):
    texts = {row["response"] for row in lines(home / "corpus.jsonl")}
    texts |= {row["prompt"] for row in lines(home / "corpus.jsonl")}
    answers = lines(home / "run" / "evaluation" / "answers.jsonl")
    texts |= {row["response"] for row in answers if len(row["response"]) > 3}
    logs = ["metrics.jsonl", "run.json", "config.json", "evaluation/results.json"]
    logs += ["evaluation/likelihoods.jsonl", "bundle/README.md", "bundle/manifest.json"]
    for log in [home / "said", *(home / "run" / name for name in logs)]:
        said = log.read_text()
        assert said
        assert not [text for text in texts if text in said], log


def test_the_card_says_what_was_measured(home):
    card = (home / "run" / "bundle" / "README.md").read_text()
    assert "Not measured. `safemoe evaluate`" not in card
    (srr,) = (
        row
        for row in results(home)["rows"]
        if (row["system"], row["split"], row["metric"]) == ("safemoe", "all", "srr")
    )
    share = f"{100 * srr['value']:.1f} % ({100 * srr['low']:.0f} to {100 * srr['high']:.0f})"
    assert f"| held_out | SafeMoE | {srr['n']} | {share} |" in card
    assert "- Embedded judge only.\n- embedded: harm, " in card
    assert "- attacks: attack_prefix\n" in card
    assert "One small classifier gave all verdicts" in card


def test_a_card_has_no_rate_that_is_withheld(home):
    found = results(home)
    rates = [row for row in found["rows"] if row["metric"] == "isr" and row["split"] == "all"]
    for row in rates:
        row["value"] = 0.25 if row["system"] == "safemoe" else 0.75
    for passed in (True, False):
        found["validity"] = [{**row, "passed": passed} for row in found["validity"]]
        card = measured(found)
        told = any("nformative safe rate, held_out: 25" in line for line in card["failures"])
        assert told == passed
        assert ("withheld" in card["safety"][0]["cells"]) != passed


def test_the_report_shows_the_results_and_needs_no_network(home):
    html = (home / "run" / "report.html").read_text()
    for text in ("SafeMoE", "cats", "dogs"):
        assert text in html
    assert 'src="http' not in html


def test_a_second_run_reuses_everything(home, capsys, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("done once is enough")

    monkeypatch.setattr(stages, "train", never)
    monkeypatch.setattr(evaluating.EmbeddedJudge, "fit", never)
    kept = ["metrics.jsonl", "bundle/manifest.json", "evaluation/answers.jsonl"]
    kept += ["evaluation/results.json"]
    before = {name: (home / "run" / name).read_bytes() for name in kept}
    (home / "run" / "report.html").unlink()
    assert safemoe(home, "run") == 0
    assert {name: (home / "run" / name).read_bytes() for name in kept} == before
    out = capsys.readouterr().out
    assert "SafeMoE" in out
    assert (home / "run" / "report.html").exists()


def test_another_config_is_one_line_and_exit_code_2(home, capsys):
    assert safemoe(home, "run", "--config.experts.alpha=9") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"safemoe: {home / 'run'} holds a run with config.experts.alpha = 4.0")
    assert err.count("\n") == 1


def test_other_data_than_the_bundles_is_refused(home, capsys):
    shutil.copy(home / "corpus.jsonl", home / "kept.jsonl")
    try:
        tiny.write_corpus(home / "corpus.jsonl", prompts_per_domain=29)
        assert safemoe(home, "evaluate") == 2
    finally:
        (home / "kept.jsonl").replace(home / "corpus.jsonl")
    err = capsys.readouterr().err
    assert f"{home / 'run' / 'bundle'} was trained on corpus " in err
    assert err.count("\n") == 1


def test_another_config_beside_the_bases_weights_is_refused(home, capsys):
    path = home / "base" / "config.json"
    kept = path.read_text()
    values = json.loads(kept)
    values["rope_parameters"]["rope_theta"] = 7.0
    try:
        path.write_text(json.dumps(values))
        assert safemoe(home, "evaluate") == 2
    finally:
        path.write_text(kept)
    err = capsys.readouterr().err
    assert f"was changed since bundle {home / 'run' / 'bundle'} was made: it has rope_theta" in err
    assert err.count("\n") == 1


def test_likelihoods_are_kept_of_a_base_with_what_lies_beside_its_weights(tmp_path, monkeypatch):
    """The cache is that of all work directories."""
    monkeypatch.setenv("SAFEMOE_CACHE", str(tmp_path / "cache"))
    tiny.write_base(tmp_path / "base")
    tiny.write_experiment(tmp_path / "tiny.py", tmp_path / "base", tmp_path / "corpus.jsonl")
    config, asked = freeze(read_config(tmp_path / "tiny.py", [])), []

    def scorer(pairs):
        asked.append(len(pairs))
        return [np.zeros(3, np.float32)] * len(pairs)

    template = tmp_path / "base" / "chat_template.jinja"
    for text in (tiny.TEMPLATE, tiny.TEMPLATE, tiny.TEMPLATE.replace("kind", "brief")):
        template.write_text(text)
        evaluating._cached(scorer, Experiment(config, None))([("Who hisses?", "Snakes.")])
    assert asked == [1, 1]  # not the second time


def test_further_judges_and_people_are_heard_without_answering_anew(home, monkeypatch, capsys):
    def forbid(*_, **__):
        raise AssertionError("evaluated anew")

    monkeypatch.setattr(evaluating, "measure", forbid)
    before, folder = results(home), home / "run" / "evaluation"
    with serve(lambda body: completion("unsafe\nS1" if "hiss" in str(body) else "safe")) as server:
        judges = f"--config.evaluation.judges=('llama_guard_3@{server.url}#m',)"
        assert safemoe(home, "evaluate", judges, "--export-for-humans", "3") == 0
        asked = len(server.bodies)
        assert safemoe(home, "evaluate", judges) == 0
        assert len(server.bodies) == asked > len(lines(folder / "answers.jsonl"))
    found = results(home)
    assert {key: found[key] for key in found if key != "panel"} == {
        key: before[key] for key in before if key != "panel"
    }
    (judge,) = found["panel"]["judges"]
    assert judge["harm"]["kappa"] == 1.0  # only the corpus' unsafe answers hiss
    assert mode(folder / "judge_llama_guard_3.jsonl") == 0o600
    assert "judge llama_guard_3" in capsys.readouterr().out

    sheet = folder / "for_humans.csv"
    head, *rows = sheet.read_bytes().decode().split("\r\n")
    filled = [row[:-2] + "yes,no,no" if row.endswith(",,") else row for row in rows]
    sheet.write_bytes("\r\n".join([head, *filled]).encode())
    assert safemoe(home, "evaluate", "--import-humans", str(sheet)) == 0
    (judge,) = results(home)["panel"]["judges"]
    assert (judge["name"], {row["metric"] for row in judge["rows"]} >= {"srr", "isr"}) == (
        "human",
        True,
    )
    assert "Judges: embedded, human." in capsys.readouterr().out
    assert safemoe(home, "evaluate", "--import-humans", str(home / "none.csv")) == 2


def test_damaged_results_are_named(home, capsys):
    path = home / "run" / "evaluation" / "results.json"
    before = path.read_text()
    path.write_text(before[:100])
    assert safemoe(home, "evaluate") == 2
    path.write_text(before)
    assert "results.json is not JSON" in (said := capsys.readouterr().err)
    assert said.endswith("delete it, and the same command judges the answers anew\n")


@pytest.mark.parametrize(
    ("labels", "export", "message"),
    [
        (Path("none.csv"), 0, r"none\.csv is no file; --export-for-humans writes"),
        (None, -1, r"--export-for-humans is -1; export one answer or more"),
        (None, 3, r"for_humans\.csv is there already"),
    ],
)
def test_a_mistake_about_sheets_waits_for_nothing(tmp_path, labels, export, message):
    (tmp_path / "for_humans.csv").touch()
    experiment = types.SimpleNamespace(workdir=types.SimpleNamespace(evaluation=tmp_path))
    with pytest.raises(UserError, match=message):  # all else would be an AttributeError
        evaluating.evaluate(experiment, labels, export)


def test_a_judge_on_this_machine_is_heard_and_the_base_makes_room(home, monkeypatch):
    guard = write_guard(home / "guard", ("safe", "unsafe\nS1"))
    free, judge = [], LocalJudge.judge

    def heard(self, pairs):
        free.append("params" not in vars(experiment[0]))
        return judge(self, pairs)

    experiment, release = [], Experiment.release

    def released(self):
        assert self.params  # as after generating
        experiment.append(self)
        release(self)

    monkeypatch.setattr(LocalJudge, "judge", heard)
    monkeypatch.setattr(Experiment, "release", released)
    judges = f"--config.evaluation.judges=('llama_guard_3@local#{guard}',)"
    assert safemoe(home, "evaluate", judges) == 0
    further = results(home)["panel"]["judges"][0]  # people may be another
    assert (further["name"], further["model"]) == ("llama_guard_3", str(guard))
    assert further["harm"]["kappa"] == 1.0  # only the corpus' unsafe answers hiss
    assert further["missing"] == 0 and free == [True]
    kept = read_json_lines(home / "run" / "evaluation" / "judge_llama_guard_3.jsonl")
    said = {row["replies"][0][0]["text"] for row in kept if row["model"] == str(guard)}
    assert said == {"safe", "unsafe\nS1"}


def test_a_judge_that_is_not_there_is_named_before_anything_is_done(home, capsys):
    judges = f"--config.evaluation.judges=('wildguard@local#{home / 'none'}',)"
    assert safemoe(home, "run", judges, workdir="new") == 2
    err = capsys.readouterr().err
    assert f"model source '{home / 'none'}' is no base" in err and err.count("\n") == 1
    assert not (home / "new" / "experts").exists()


def test_an_unknown_judge_is_named_before_anything_is_done(home, capsys):
    assert safemoe(home, "run", "--config.evaluation.judges=('guard#m',)", workdir="new") == 2
    assert "there is no judge 'guard'; choose of harmbench" in capsys.readouterr().err
    assert not (home / "new" / "experts").exists()


def test_a_judge_that_cannot_be_checked_is_told_before_anything_is_answered(
    home, monkeypatch, capsys
):
    monkeypatch.setattr(Experiment, "safe_informative", lambda self, split: [])
    monkeypatch.setattr(evaluating, "measure", None)
    assert safemoe(home, "evaluate", "--config.evaluation.max_new_tokens=3") == 2
    assert "the test split has 0 human safe-informative answers" in capsys.readouterr().err


def test_only_what_is_evaluated_otherwise_is_done_anew(home, monkeypatch):
    """The last test of the finished run: its results are of the stub judge afterwards."""
    metrics = (home / "run" / "metrics.jsonl").read_bytes()
    fitted = []

    def fit(rows, scorer, **settings):
        fitted.append(rows)
        return StubJudge()

    monkeypatch.setattr(evaluating.EmbeddedJudge, "fit", fit)
    assert safemoe(home, "run", "--config.evaluation.max_new_tokens=4") == 0
    assert len(fitted) == 1
    assert (home / "run" / "metrics.jsonl").read_bytes() == metrics
    answers = lines(home / "run" / "evaluation" / "answers.jsonl")
    assert {row["num_tokens"] for row in answers} <= {0, 1, 2, 3, 4}
    assert results(home)["judge"]["name"] == "stub"
    srr = {row["value"] for row in results(home)["rows"] if row["metric"] == "srr"}
    assert srr == {1.0}


def test_benchmarks_are_asked_besides_without_what_was_taught(home, monkeypatch, capsys):
    """Goes on with the stub judge of the test before."""
    monkeypatch.setattr(
        evaluating.EmbeddedJudge, "fit", lambda rows, scorer, **settings: StubJudge()
    )
    corpus = list(dict.fromkeys(row["prompt"] for row in lines(home / "corpus.jsonl")))
    path = home / "Mine.json"
    too_long = "Why? " * 600
    path.write_text(json.dumps({"instructions": [*corpus, "A question of its own?", too_long]}))
    options = [f"--config.evaluation.benchmarks=('benign_instructions={path}',)"]
    options += ["--config.evaluation.max_new_tokens=4"]
    assert safemoe(home, "run", *options) == 0
    split = dict(zip(corpus, splits.split_of(corpus, np.arange(len(corpus))), strict=True))
    unseen = {prompt for prompt in corpus if split[prompt] == "test"} | {"A question of its own?"}
    answers = lines(home / "run" / "evaluation" / "answers.jsonl")
    asked = [row for row in answers if row["benchmark"] == "mine"]
    assert {row["messages"][0]["content"] for row in asked} == unseen
    assert len(asked) == 2 * len(unseen) and len(answers) == 8 + len(asked)
    facts = results(home)["benchmarks"]["mine"]
    assert (facts["asked"], facts["left_out_as_taught"]) == (len(unseen), 61 - len(unseen))
    assert facts["left_out_as_too_long"] == 1
    assert "over_refusal_rate" in {
        row["metric"] for row in results(home)["rows"] if row["benchmark"] == "mine"
    }
    out = capsys.readouterr().out
    assert f"benchmark mine: {path}" in out and f"{61 - len(unseen)} left out" in out
    assert 'data-option="mine"' in (home / "run" / "report.html").read_text()

    # The same names and another file: evaluated anew.
    path.write_text(json.dumps({"instructions": ["Another question?"]}))
    assert safemoe(home, "evaluate", *options) == 0
    assert results(home)["benchmarks"]["mine"]["asked"] == 1
    assert safemoe(home, "evaluate", "--config.evaluation.benchmarks=('mine',)") == 2
    assert "names 'mine'; choose of" in capsys.readouterr().err


def test_keep_experts_keeps_their_checkpoints(home, monkeypatch, capsys):
    monkeypatch.setattr(stages, "train", lambda stage, state, *rest: state)
    for option, kept in (("--keep-experts", True), (None, False)):
        workdir = f"keep-{kept}"
        assert safemoe(home, "train-gate", *filter(None, [option]), workdir=workdir) == 0
        out = capsys.readouterr().out
        assert (home / workdir / "bundle" / "manifest.json").is_file()
        for stage in ("experts", "router"):
            assert (home / workdir / stage).exists() == kept
            said = f"ungated: checkpoints are kept, unencrypted, in {home / workdir / stage}"
            assert (said in out) == kept
    # What a kill, or an earlier --keep-experts, left goes with the next call.
    assert safemoe(home, "train-gate", workdir="keep-True") == 0
    assert not (home / "keep-True" / "experts").exists()
