"""The command line as its user meets it: exit codes, one line on stderr, what --help costs."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny
from toys import toy_variables

from safemoe_jax import cli, evaluating, generate, run
from safemoe_jax.config import freeze, read_config
from safemoe_jax.errors import Unreachable
from safemoe_jax.inference.sampler import Generation
from safemoe_jax.model.transformer import Transformer
from safemoe_jax.training.observer import Diverged
from safemoe_jax.weights.base import load_base
from safemoe_jax.weights.bundle import write_bundle
from safemoe_jax.workdir import Workdir

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/ corpus.jsonl tiny.py, and a bundle/ that was drawn, not trained."""
    home = tmp_path_factory.mktemp("cli")
    tiny.write_base(home / "base")
    tiny.write_corpus(home / "corpus.jsonl")
    tiny.write_experiment(home / "tiny.py", home / "base", home / "corpus.jsonl")
    config = freeze(read_config(home / "tiny.py", []))
    base = load_base(config.model.source, config.model.param_dtype)
    drawn = toy_variables(Transformer.from_config(config, base.spec))
    write_bundle(
        home / "bundle",
        base=base,
        config=config,
        experts=drawn["experts"],
        router=drawn["router"],
        provenance={"corpus": "none"},
    )
    return home


@pytest.fixture
def safemoe(capsys):
    """Runs a command line -> exit code, stdout, stderr."""

    def safemoe(*argv):
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return safemoe


@pytest.fixture
def mistake(safemoe):
    """Runs a command line that must fail with code 2 and one line -> that line."""

    def mistake(*argv):
        code, _, err = safemoe(*argv)
        assert code == 2
        assert err.startswith("safemoe: ")
        assert err.count("\n") == 1, err
        return err.removeprefix("safemoe: ").rstrip("\n")

    return mistake


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the following arguments are required: VERB; see `safemoe --help`"),
        (["fly"], r"argument VERB: invalid choice: 'fly' .*; see `safemoe --help`"),
        (["run"], "the following arguments are required: --config; see `safemoe run --help`"),
        (["data", "--config", "x", "--show", "many"], "argument --show: invalid int value: 'many'"),
        (["sweep"], "the following arguments are required: FILE; see `safemoe sweep --help`"),
        (["sweep", "x.py", "--backend", "moon"], "argument --backend: invalid choice: 'moon'"),
        (["sweep", "x.py"], "x.py is no file; the shipped experiments are in experiments/"),
        (
            ["run", "--config", "x", "--profile", "0:2"],
            "argument --profile: '0:2' is no FIRST:LAST with 1 <= FIRST <= LAST",
        ),
        (["run", "--config", "x", "--log", "csv"], "argument --log: invalid choice: 'csv'"),
        (["generate"], "the following arguments are required: --bundle"),
        (["generate", "--bundle", "x", "--gate"], "unknown argument '--gate'; see `safemoe gen"),
    ],
)
def test_a_mistyped_command(mistake, argv, message):
    assert re.match(message, mistake(*argv))


@pytest.mark.parametrize(
    "override, message",
    [
        (
            "--config.seedd=1",
            "unknown key config.seedd in --config.seedd=1; config has data, evaluation, experts, "
            "mesh, model, optimizer, router, seed, train",
        ),
        (
            "--config.mesh.rows=1",
            "unknown key config.mesh.rows in --config.mesh.rows=1; config.mesh has context, data, "
            "fsdp, tensor",
        ),
        ("--config.seed.x=1", "unknown key config.seed.x in --config.seed.x=1; config.seed has no"),
        ("--config.seed=abc", "--config.seed=abc does not fit: the value there is 0; give another"),
        ("--config.seed=1.5", "--config.seed=1.5 does not fit: the value there is 0; give another"),
        (
            "--config.mesh=8",
            "--config.mesh=8 names a section; set one of its keys: context, data, fsdp, tensor",
        ),
        ("--config.seed", "unknown argument '--config.seed'; values are changed by --config.KEY="),
        ("--bogus=1", "unknown argument '--bogus=1'; values are changed by --config.KEY=VALUE"),
        ("twice", "unknown argument 'twice'; values are changed by"),
        (
            "--config.router.activation=relu",
            "config.router.activation is 'relu'; choose one of 'softmax', 'softmax_null'",
        ),
        ("--config.experts.rank=0", "config.experts.rank is 0; it must be greater than 0"),
        ("--config.mesh.data=64", "config.mesh asks for data 64 x fsdp 1 x tensor 1 x context 1"),
        ("--config.data.path=/none", "config.data.path '/none' does not exist; name a .jsonl file"),
        ("--config.model.source=/none", "model source '/none' is no base; give "),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(mistake, home, tmp_path, override, message):
    line = mistake("train-experts", "--config", home / "tiny.py", "--workdir", tmp_path, override)
    assert line.startswith(message)


def test_a_trace_of_steps_that_there_are_not(mistake, home, tmp_path):
    argv = ["run", "--config", home / "tiny.py", "--workdir", tmp_path / "run"]
    message = "--profile begins at step 5, and the stages have 4 and 4 steps; choose earlier ones"
    assert mistake(*argv, "--profile", "5:6") == message
    assert not (tmp_path / "run").exists()


def test_overrides_reach_the_config(home):
    overrides = [
        "--config.seed=3",
        "--config.experts.alpha=8",
        "--config.data.domains=('dogs', 'cats')",
        "--config.evaluation.demonstration=true",
        "--config.evaluation.judges=('wildguard@http://here/v1#a/b',)",
    ]
    config = freeze(read_config(home / "tiny.py", overrides))
    assert config.seed == 3
    assert config.experts.alpha == 8.0
    assert config.data.domains == ("dogs", "cats")
    assert config.evaluation.demonstration is True
    assert config.evaluation.judges == ("wildguard@http://here/v1#a/b",)
    assert config.train == freeze(read_config(home / "tiny.py", [])).train


def test_sheets_for_people_reach_their_stage(safemoe, home, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluating, "evaluate", lambda _, *sheets: asked.append(sheets))
    argv = ("evaluate", "--config", home / "tiny.py", "--workdir", tmp_path)
    for sheets in ((), ("--export-for-humans", "7"), ("--import-humans", "labels.csv")):
        assert safemoe(*argv, *sheets) == (0, "", "")
    assert asked == [(None, 0), (None, 7), (Path("labels.csv"), 0)]


def test_a_config_file_that_is_none(mistake, tmp_path):
    path = tmp_path / "mine.py"
    where = ("fetch", "--workdir", tmp_path / "run", "--config", path)
    assert mistake(*where) == f"{path} is no file; the shipped experiments are in experiments/"
    path.write_text("def get_config(:")
    assert f"{path} cannot be read as an experiment (SyntaxError: " in mistake(*where)
    path.write_text("config = 1")
    assert f"{path} has no get_config(); an experiment file has" in mistake(*where)
    path.write_text("def get_config():\n    return {'seed': 0}")
    assert mistake(*where) == "missing key config.data; add it to the experiment file"


def test_a_workdir_that_is_locked_taken_or_not_writable(mistake, home, tmp_path):
    argv = ("fetch", "--config", home / "tiny.py", "--workdir")
    root = tmp_path / "run"
    with Workdir(root, freeze(read_config(home / "tiny.py", []))):
        assert mistake(*argv, root).startswith(f"another process is working in {root}; wait")
    line = mistake(*argv, root, "--config.seed=5")
    assert line.startswith(f"{root} holds a run with config.seed = 0, this one has 5; give another")
    (tmp_path / "file").write_text("")
    line = mistake(*argv, tmp_path / "file" / "run")
    assert line.startswith(f"cannot write to --workdir {tmp_path / 'file' / 'run'} (")


def test_what_is_no_ones_mistake_has_another_exit_code(safemoe, home, tmp_path, monkeypatch):
    argv = ("fetch", "--config", home / "tiny.py", "--workdir", tmp_path)
    assert safemoe(*argv)[0] == 0

    for error in (Diverged("loss is nan at step 3"), Unreachable("cannot write to gs://b")):

        def stop(experiment, error=error):
            raise error

        monkeypatch.setattr(run, "fetch", stop)
        assert safemoe(*argv) == (1, "", f"safemoe: {error}\n")

    def fail(experiment):
        raise RuntimeError("a fault of the package")

    monkeypatch.setattr(run, "fetch", fail)
    with pytest.raises(RuntimeError):  # keeps its traceback
        safemoe(*argv)


def test_a_verb_that_keeps_nothing_does_not_promise_to_go_on(safemoe, home, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "answer", stopped)
    argv = "generate", "--bundle", home / "bundle", "--prompt", "a"
    assert safemoe(*argv) == (75, "", "safemoe: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_training_exits_75(safemoe, home, tmp_path, monkeypatch, number):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "fetch", lambda experiment: os.kill(os.getpid(), number))
    code, _, err = safemoe("fetch", "--config", home / "tiny.py", "--workdir", tmp_path)
    assert code == 75
    assert err == "safemoe: interrupted; the same command goes on from what is done\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_help_of_every_verb_does_not_wait_for_jax():
    script = (
        "import sys\n"
        "from safemoe_jax.cli import VERBS, main\n"
        "for verb in [None, *VERBS]:\n"
        "    try:\n"
        "        main([verb, '--help'] if verb else ['--help'])\n"
        "    except SystemExit as exit:\n"
        "        assert exit.code == 0\n"
        "assert not {'jax', 'numpy', 'absl'} & sys.modules.keys()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    unwrapped = " ".join(done.stdout.split())
    for verb, text in cli.VERBS.items():
        assert f"usage: safemoe {verb}" in unwrapped
        assert text.split(";")[0] in unwrapped


def test_sigterm_then_ctrl_c_then_to_the_end(safemoe, home, tmp_path):
    steps = 200
    argv = ["train-experts", f"--config={home / 'tiny.py'}", f"--workdir={tmp_path}"]
    loop = {"steps": steps, "save_every": 1000, "validate_every": 1000}
    argv += [f"--config.train.experts.{key}={value}" for key, value in loop.items()]
    metrics = tmp_path / "metrics.jsonl"

    def trained():
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row["step"] for row in rows if row["split"] == "train"]

    def interrupt(pid, number, after):
        deadline = time.monotonic() + 200
        while len(trained()) < after and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid, number)

    said = (
        rf"safemoe: interrupted in experts after step \d+ of {steps}; saved, the same command goes "
        r"on from there\n"
    )
    command = [sys.executable, "-m", "safemoe_jax.cli", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        interrupt(process.pid, signal.SIGTERM, after=5)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert re.search(said + "$", err)
    first = trained()
    assert first == list(range(1, len(first) + 1))
    assert 5 <= len(first) < steps - 20

    # The same again in this process, which spares it the start of another one.
    thread = threading.Thread(
        target=interrupt, args=(os.getpid(), signal.SIGINT, len(first) + 5), daemon=True
    )
    thread.start()
    code, _, err = safemoe(*argv)
    thread.join()
    assert code == 75
    assert re.fullmatch(said, err)
    assert len(first) < len(trained()) < steps

    assert safemoe(*argv)[0] == 0
    assert trained() == list(range(1, steps + 1))


def test_a_failed_command_waits_for_no_thread_of_a_save_that_was_given_up():
    script = (
        "import threading\n"
        "from safemoe_jax import cli\n"
        "class Waits(threading.Thread):\n"
        "    __module__ = 'orbax.checkpoint'\n"
        "    def run(self):\n"
        "        threading.Event().wait()\n"
        "Waits().start()\n"
        "cli.main = lambda: print('said') or 1\n"
        "cli.entry()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"said\n")


# generate


def test_generate_answers_with_gates(safemoe, home):
    argv = ("generate", "--bundle", home / "bundle", "--max-new-tokens", 8, "--prompt", "Cats?")
    code, plain, err = safemoe(*argv)
    assert (code, err) == (0, "")
    assert "eta" not in plain  # what is piped is the answer alone
    assert len(plain) > 5
    code, out, _ = safemoe(*argv, "--gates")
    assert code == 0
    assert out.startswith(plain)
    assert "cats" in out
    assert len(re.findall(r"[+-]0\.\d{3}", out)) == 2 * 8  # two experts, eight tokens


def test_generate_prints_an_answer_as_it_is(safemoe, home, monkeypatch):
    answer = ":dog: [bold]x[/] [/]\tx:\r\n  " * 20
    base = load_base(str(home / "base"), "float32")

    def say(self, prompts, **settings):
        return [Generation(base.tokenizer.encode(answer), True, None) for _ in prompts]

    monkeypatch.setattr(generate.Sampler, "generate", say)
    code, out, _ = safemoe("generate", "--bundle", home / "bundle", "--prompt", "[/a]")
    assert (code, out) == (0, answer + "\n")
    argv = ("--prompt", "[/a]", "--prompt", "b")
    code, out, _ = safemoe("generate", "--bundle", home / "bundle", *argv)
    assert (code, out) == (0, f"> [/a]\n{answer}\n> b\n{answer}\n")


def test_a_prompt_that_is_no_text_is_said(mistake, home):
    prompt = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads a command line
    line = mistake("generate", "--bundle", home / "bundle", "--prompt", prompt)
    assert line == "a prompt is not UTF-8 (at character 3); give it in that encoding"


def test_a_report_of_what_is_none_is_said(mistake, tmp_path):
    (tmp_path / "file").write_text("{}")
    for wrong in (("--results", tmp_path), ("--runs", tmp_path / "file")):
        assert "--runs wants work directories, --results a report.json" in mistake("report", *wrong)
    shipped = Path(__file__).parents[1] / "docs" / "headline" / "report.json"
    line = mistake("report", "--results", shipped, "--out", tmp_path / "file")
    assert line == f"--out {tmp_path / 'file'} is a file, or lies in one; give a directory"


def test_what_the_router_does_not_gate_needs_leave(safemoe, mistake, home, monkeypatch):
    argv = ("generate", "--bundle", home / "bundle", "--prompt", "Cats?", "--routing")
    for routing in ("uniform", "dogs"):
        line = mistake(*argv, routing)
        assert line.startswith(f"--routing {routing} lets experts that were trained to be harmful")
        assert "--allow-ungated" in line
    assert mistake(*argv, "birds") == (
        "--routing is 'birds'; choose of router, base, uniform, cats, dogs"
    )
    used = []

    def say(self, prompts, **settings):
        used.append(self._routing)
        return [Generation([], True, None) for _ in prompts]

    monkeypatch.setattr(generate.Sampler, "generate", say)
    for routing, gates in (("uniform", [0.5, 0.5]), ("dogs", [0.0, 1.0])):
        code, out, _ = safemoe(*argv, routing, "--allow-ungated")
        assert code == 0
        assert out.startswith(f"ungated: {routing}\n")
        assert used[-1].gates.tolist() == gates
    assert safemoe(*argv, "base") == (0, "\n", "")
    assert used[-1] is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--prompt", ""), "a prompt is empty; give --prompt TEXT, or text on standard input"),
        (("--prompt", "a", "--prompt", " \n"), "a prompt is empty"),
        ((), "a prompt is empty"),
        (("--prompt", "a", "--temperature", "-1"), "--max-new-tokens is 256, --temperature -1.0"),
        (("--prompt", "a", "--temperature", "nan"), "--max-new-tokens is 256, --temperature nan"),
        (("--prompt", "a", "--top-p", "0"), "--max-new-tokens is 256, --temperature 0.0, --top-p"),
        (("--prompt", "a", "--max-new-tokens", "0"), "--max-new-tokens is 0"),
        (("--prompt", "a" * 500), "prompt 0 has 5"),
    ],
)
def test_generate_with_a_bad_setting(mistake, home, monkeypatch, tmp_path, argv, message):
    (tmp_path / "nothing").write_text("\n")
    with (tmp_path / "nothing").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert mistake("generate", "--bundle", home / "bundle", *argv).startswith(message)


def test_generate_reads_a_prompt_that_is_typed_and_no_bytes(safemoe, mistake, home, monkeypatch):
    argv = "generate", "--bundle", home / "bundle"
    typed = io.StringIO("")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    told = "type the prompt; Ctrl-D in a line of its own ends it\nsafemoe: a prompt is empty; "
    assert safemoe(*argv)[2].startswith(told)
    latin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", latin)
    assert mistake(*argv).startswith(
        "standard input is not utf-8 (unexpected end of data, byte 3);"
    )


def test_a_bundle_that_is_missing_or_was_changed(mistake, home, tmp_path):
    def line(bundle):
        return mistake("generate", "--bundle", bundle, "--prompt", "a")

    assert line(tmp_path).startswith(f"{tmp_path} is no bundle: it has no manifest.json; give")
    bundle = tmp_path / "bundle"
    assert line(bundle).startswith(f"{bundle} is no bundle: there is no such directory; give")
    bundle.symlink_to(home / "bundle")
    assert line(bundle).startswith(f"{bundle} is no bundle: it, or its manifest.json, is a symbol")
    bundle.unlink()
    subprocess.run(["cp", "-r", home / "bundle", bundle], check=True)
    content = bytearray((bundle / "router.safetensors").read_bytes())
    content[-1] ^= 1
    (bundle / "router.safetensors").write_bytes(content)
    assert line(bundle) == (
        f"{bundle}/router.safetensors was changed since it was written; delete {bundle}, and make "
        "or copy the bundle again"
    )
