"""What documents say exists (verbs, flags, config keys, messages), and the site builds."""

import ast
import contextlib
import dataclasses
import io
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import pyrit
from safemoe_jax import cli
from safemoe_jax.config import freeze, read_config
from safemoe_jax.evaluation.report import markdown
from safemoe_jax.evaluation.summary import read_summary
from safemoe_jax.experiment import check_layout
from safemoe_jax.model.quantization import PARAM_DTYPES
from safemoe_jax.weights.base import read_spec

ROOT = Path(__file__).parents[1]
# The log tells of the past.
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "docs" / "log.md"})
# Commands are indented by four, or between backticks; a backslash continues a line.
COMMAND = re.compile(r"(?:^    (?:\S*/)?|`(?:\S*/)?)safemoe ([a-z][a-z-]*)([^`\n]*)", re.MULTILINE)
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*(?:\.[a-z_]+)*")


def text_of(path):
    return re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def options():
    """Options of each verb, as its --help names them."""
    found = {}
    for verb in cli.VERBS:
        with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit):
            cli.main([verb, "--help"])
        found[verb] = set(OPTION.findall(said.getvalue()))
    return found


def test_the_headlines_tables_are_its_reports():
    tables = markdown(read_summary(ROOT / "docs" / "headline" / "report.json"))
    text = (ROOT / "docs" / "headline.md").read_text(encoding="utf-8")
    assert text.endswith(f"\n{tables}")


def is_key(option):
    """Whether --config.a.b names a value or a section of an experiment."""
    values = pyrit.get_config()
    for part in option.split(".")[1:]:
        if part not in values:
            return False
        values = values[part]
    return True


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_documents_exist(path, options):
    launchers = "".join(file.read_text() for file in sorted((ROOT / "launch").iterdir()))
    for verb, rest in COMMAND.findall(text_of(path)):
        assert verb in options, f"safemoe {verb}"
        for option in OPTION.findall(rest):
            assert option in options[verb] or is_key(option), f"safemoe {verb} {option}"
    for option in re.findall(rf"`({OPTION.pattern})", text_of(path)):
        known = set().union(*options.values())
        assert option in known or is_key(option) or option in launchers, option


def documented():
    """Command lines of documents and launchers, the shipped experiment of each, its overrides."""
    for path in [*DOCUMENTS, *(ROOT / "launch").glob("*_run.*")]:
        for line in re.sub(r"\\\n#?\s*", " ", path.read_text(encoding="utf-8")).splitlines():
            if found := re.search(r"--config[ =]+(experiments/\w+\.py)", line):
                overrides = re.findall(r"--config\.[\w.]+=(?:\"[^\"]*\"|[^\s`'\"])+", line)
                # What stands for a name of the reader's own is no value.
                known = [one.replace('"', "") for one in overrides if "NAME" not in one]
                yield line.strip(), found[1], tuple(known)


@pytest.mark.parametrize(
    "line, experiment, overrides", sorted(set(documented())), ids=lambda part: str(part)[:60]
)
def test_a_documented_experiment_is_one_that_its_mesh_can_cut(line, experiment, overrides):
    config = freeze(read_config(ROOT / experiment, overrides))
    rests = PARAM_DTYPES[config.model.param_dtype]
    check_layout(config, read_spec(config.model.source), rests)
    if slice_ := re.search(r"v5litepod-(\d+)", line):
        assert math.prod(dataclasses.astuple(config.mesh)) == int(slice_[1])


def test_commands_are_found(options):
    """The net has no hole: it finds commands, in lines of their own and within others."""
    found = [(verb, rest) for path in DOCUMENTS for verb, rest in COMMAND.findall(text_of(path))]
    assert {verb for verb, _ in found} >= {"run", "serve", "export", "sweep", "plan", "generate"}
    assert {name for _, name, _ in documented()} >= {
        "experiments/quickstart.py",
        "experiments/llama31_8b.py",
    }
    (rest,) = {rest for verb, rest in found if verb == "export" and "merged" in rest}
    assert {"--format", "--allow-ungated", "--gates", "--prompts"} <= set(OPTION.findall(rest))
    assert is_key("--config.train.router.steps") and not is_key("--config.train.gate")


def test_every_verb_is_in_the_readme():
    table = re.findall(r"^\| `([a-z-]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table == list(cli.VERBS)


def test_every_message_of_the_faq_is_one_of_the_package():
    said = []
    for path in (ROOT / "safemoe_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                said.append("".join(part if isinstance(part, str) else "…" for part in parts))
    quoted = re.findall(r"^### `([^`]+)`$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    assert len(quoted) > 20
    for message in quoted:
        assert any(message in text for text in said), message


def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {str(path.relative_to(tmp_path / "site")) for path in tmp_path.rglob("*.html")}
    assert {"index.html", "faq/index.html", "reference/training/index.html"} <= pages
    notebook = (tmp_path / "site" / "notebooks" / "first_steps" / "index.html").read_text()
    assert '<table id="T_gates"' in notebook
    reference = (tmp_path / "site" / "reference" / "training" / "index.html").read_text()
    assert 'id="safemoe_jax.training.steps.expert_train_step"' in reference
    for page in pages:
        html = (tmp_path / "site" / page).read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|link)[^>]*(?:src|href)=\"https?://", html), page


def test_every_page_is_in_the_navigation():
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text()))
    notebooks = [path.with_suffix(".md") for path in ROOT.glob("docs/**/*.ipynb")]
    pages = [*ROOT.glob("docs/**/*.md"), *notebooks]
    assert named == {str(path.relative_to(ROOT / "docs")) for path in pages}
