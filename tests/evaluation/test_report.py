"""The report: what it shows, what it hides, and that it needs no network."""

import hashlib
import itertools
import json
import re
import shutil
import stat
from html.parser import HTMLParser

import demo_report
import numpy as np
import pytest
from demo_report import DOMAINS, MARKUP, PROMPT_SECRET, SAFE, SECRET, UNSAFE

from safemoe_jax import cli
from safemoe_jax.errors import UserError
from safemoe_jax.evaluation import statistics, summary
from safemoe_jax.evaluation.comparisons import verdict
from safemoe_jax.evaluation.report import write_report

SYSTEMS = ("base", "safemoe", "uniform", "safe_lora", "random_router", "benign_experts")


@pytest.fixture(autouse=True, scope="module")
def few_resamples():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(statistics, "RESAMPLES", 199)
        # statsmodels collects garbage in each correction, nine tenths of a summary's time here.
        monkeypatch.setattr("gc.collect", lambda *_: 0)
        yield


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two runs of six systems, and their report beside the first."""
    runs = demo_report.write_runs(
        tmp_path_factory.mktemp("runs"), seeds=(0, 1), systems=SYSTEMS, per_domain=8, per_set=24
    )
    write_report(runs)
    return runs


@pytest.fixture
def runs(drawn, tmp_path):
    """The same, to be changed."""
    return [shutil.copytree(run, tmp_path / run.name) for run in drawn]


@pytest.fixture(scope="module")
def html(drawn):
    return (drawn[0] / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def numbers(drawn):
    return json.loads((drawn[0] / "report.json").read_text(encoding="utf-8"))


class Page(HTMLParser):
    """What a browser would make of the page: visible text, tags, and what it would load."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.loads, self.pieces, self._hidden = [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.loads += [v for k, v in attributes if k in ("src", "href", "action", "srcset")]
        self._hidden = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.pieces.append(data)

    @property
    def text(self):
        return "".join(self.pieces)

    @property
    def words(self):
        return " ".join(" ".join(self.pieces).split())


def tab(html, name):
    """What one tab says."""
    return Page(part(html, name)).words


def part(html, name):
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL).group()


def data(html):
    return json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.DOTALL)[1])


def shown(numbers, system, benchmark="held_out"):
    return [
        answer
        for prompt in numbers["answers"]
        for answer in prompt["answers"]
        if answer["system"] == system and prompt["benchmark"] == benchmark
    ]


def test_no_unsafe_answer_and_no_prompt_is_shown_whole(drawn, html, numbers):
    tables = [(drawn[0] / f"report.{kind}").read_text() for kind in ("md", "tex")]
    for text in (html, json.dumps(numbers), *tables):
        assert SECRET not in text
        assert PROMPT_SECRET not in text
        assert UNSAFE[:83] not in text
    hidden = [answer for answer in shown(numbers, "base") if not answer["safe"]]
    texts = {answer["sha256"]: answer["text"] for answer in hidden}
    assert texts.pop(hashlib.sha256(UNSAFE.encode()).hexdigest()) == UNSAFE[:80].rstrip() + "…"
    assert list(texts.values()) == [f"Use {MARKUP} and a cloth."]  # it is shorter than that
    assert SAFE[2].format("kettles") in {answer["text"] for answer in shown(numbers, "base")}


def test_tokens_of_an_unsafe_answer_end_where_its_text_is_cut(html, numbers):
    blocks = re.findall(r'<div class="tokens".*?</div>', html, re.DOTALL)
    texts = [Page(block).text for block in blocks]
    assert len(texts) == len(numbers["gated"]) == 4 * len(DOMAINS)
    unsafe = [text for text in texts if text.startswith(UNSAFE[:20])]
    assert unsafe and set(unsafe) == {UNSAFE[:80] + "…"}
    for answer in numbers["gated"]:
        assert len(answer["tokens"]) == len(answer["gates"])


def test_full_shows_whole_texts_in_another_file_and_says_so(runs):
    path = write_report(runs, texts="whole")
    assert path == runs[0] / "report_full.html"
    html = path.read_text(encoding="utf-8")
    assert SECRET in html
    assert PROMPT_SECRET in html
    assert "Do not pass it on" in tab(html, "headline")
    assert SECRET not in (runs[0] / "report.json").read_text()


def test_without_texts_the_numbers_stay(runs, numbers):
    path = write_report(runs, texts="none")
    found = json.loads((runs[0] / "report.json").read_text())
    assert {**found, "answers": [], "gated": []} == {**numbers, "answers": [], "gated": []}
    for text in (path.read_text(encoding="utf-8"), json.dumps(found)):
        assert not re.search(r"Fill the|Wet kettles|Pour the whole|rather not say", text)
    assert 'id="tab-answers"' not in path.read_text(encoding="utf-8")


def test_only_the_owner_can_read_it(drawn):
    for name in ("report.html", "report.json", "report.md", "report.tex"):
        assert stat.S_IMODE((drawn[0] / name).stat().st_mode) == 0o600
    assert not list(drawn[0].glob(".report*"))


def test_what_any_judge_finds_unsafe_is_cut(runs):
    path = runs[0] / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        own = row["response"].startswith("Fill")
        row["verdicts"] = {"wildguard": {"safe": not own, "refusal": None}}
    path.write_text("\n".join(map(json.dumps, rows)))
    found = summary.summarize(runs)
    texts = {answer["text"] for answer in shown(found, "safemoe")}
    whole = {text for text in texts if text.startswith("Fill") and not text.endswith("…")}
    assert not whole
    assert any(text.startswith("Wet") and text.endswith(".") for text in texts)
    for answer in found["gated"]:
        if answer["tokens"][0] == "Fill":
            assert len("".join(answer["tokens"])) <= 80


def test_a_copy_of_a_remote_run_is_named_as_the_remote_one(runs):
    found = summary.summarize(runs[:1], texts="none", place="gs://bucket/pyrit/7")
    assert (found["name"], found["runs"][0]["workdir"]) == ("pyrit/7", "7")


def test_an_answer_of_which_nobody_says_that_it_is_safe_is_cut(runs):
    path = runs[0] / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["verdict"]["safe"] = None
    path.write_text("\n".join(map(json.dumps, rows)))
    assert all(answer["hidden"] for answer in shown(summary.summarize(runs), "base"))


def test_markup_in_an_answer_stays_text(html, numbers):
    assert MARKUP not in html
    assert MARKUP in json.dumps(data(html)["answers"])


def test_nothing_is_loaded_from_a_network(html):
    page = Page(html)
    assert page.loads
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert "@import" not in html.split("</style>")[0]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_every_plot_of_the_page_has_its_figure_and_the_other_way_round(html):
    named = [a["data-figure"] for _, a in Page(html).tags if "data-figure" in a]
    assert sorted(named) == sorted(data(html)["figures"])
    assert len(named) == len(set(named)) > 10


def test_the_headline_says_what_is_shown_and_what_is_not(html, numbers):
    row = next(
        row
        for row in numbers["differences"]
        if (row["benchmark"], row["metric"], row["second"], row["split"])
        == ("other_origin", "isr", "base", "all")
    )
    text = tab(html, "headline")
    assert f"{100 * row['value']:+.1f} points {verdict(row)} ; 95 % interval" in text
    assert f"{row['n']} prompts in {row['groups']} groups, 2 training seeds" in text
    claims = re.findall(r'<th scope="row">(.*?)</th>', part(html, "headline"))
    assert len(claims) == len(numbers["claims"]) == 12
    # Of three thesis systems only one was run.
    (thesis,) = (c for c in numbers["claims"] if c["text"].startswith("Harmful knowledge"))
    assert thesis["holds"] is None


def test_the_count_of_evaluations_is_printed(html, runs):
    text = tab(html, "headline")
    assert "held-out prompts of the corpus 3" in text  # the second run's count, the higher one
    assert "errands 2" in text
    path = runs[1] / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    results["test_evaluations"]["intact"] = False
    path.write_text(json.dumps(results))
    page = write_report(runs, runs[0] / "again").read_text()
    assert "changed by hand" in tab(page, "headline")


def test_every_system_is_in_its_benchmarks_table_with_value_and_interval(html, numbers):
    block = re.search(r'data-option="held_out">.*?</table>', part(html, "systems"), re.DOTALL)
    rows = [Page(row).words for row in re.findall(r"<tr.*?</tr>", block.group(), re.DOTALL)]
    assert len(rows) == 1 + len(SYSTEMS)
    share = next(
        row
        for row in numbers["shares"]
        if (row["benchmark"], row["metric"], row["system"], row["split"])
        == ("held_out", "isr", "safemoe", "all")
    )
    value, low, high = (100 * share[key] for key in ("value", "low", "high"))
    assert rows[2].startswith(f"SafeMoE 121,170 {value:.1f} {low:.1f} to {high:.1f}")


def test_no_domain_is_called_a_test(html, numbers):
    alone = [row for row in numbers["differences"] if row["split"] != "all"]
    assert {row["benchmark"] for row in alone} == {"held_out", "left_out"}
    assert {row["p"] for row in alone} == {None}
    text = tab(html, "domains")
    assert "No difference of one domain alone is a test" in text
    for name in ("domains-held_out", "domains-left_out"):
        traces = data(html)["figures"][name]["data"]
        assert {trace["name"] for trace in traces} <= {
            "one domain, no test",
            "no difference shown",
        }


def test_attacks_and_likelihoods_stand_beside_base(html):
    text = tab(html, "attacks")
    assert "the answer begins with a compliant prefix" in text
    assert "SafeMoE less base, points" in text
    rows = re.search(r'class="experts".*?</table>', part(html, "attacks"), re.DOTALL).group()
    assert "ladders 8 3.200 2.690 3.100" in Page(rows).words


def test_gates_are_the_mean_over_seeds(html, runs):
    figure = data(html)["figures"]["layers-held_out"]["data"][0]
    rows = [
        row
        for run in runs
        for row in json.loads((run / "evaluation" / "results.json").read_text())["router"]
        if (row["system"], row["benchmark"]) == ("safemoe", "held_out")
    ]
    expected = np.mean([row["gates_LE"] for row in rows], axis=0)
    np.testing.assert_allclose(figure["z"], expected, atol=1e-4)
    assert figure["x"] == list(DOMAINS)
    shares = data(html)["figures"]["argmax-held_out"]["data"][0]["z"]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1.0, atol=1e-3)


def test_curves_hold_each_stage_split_and_domain(html):
    figures = data(html)["figures"]
    lines = {
        name: {(line.get("name"), line.get("meta")) for line in figure["data"]}
        for name, figure in figures.items()
        if name.startswith("curves-")
    }
    both = ("train", "validation")
    assert lines["curves-experts-loss"] == {(n, s) for n in ("all", *DOMAINS) for s in both}
    assert lines["curves-router-loss"] == {("all", split) for split in both}
    assert lines["curves-router-gates"] == {(n, s) for n in DOMAINS for s in both}


def test_a_judges_reliability_has_three_digits(html):
    text = tab(html, "judges")
    assert "harm, held out, AUC 0.861" in text
    assert "0.8612" not in text
    assert "kappa 0.491" not in text  # that is in the table of agreement
    assert "Calibration" in text
    assert "Embedded judge only." in tab(html, "headline")


def test_further_judges_are_named_with_what_they_say_and_how_they_agree(runs):
    path = runs[0] / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    row = {"system": "base", "benchmark": "held_out", "split": "all", "metric": "srr"}
    judge = {"name": "wildguard", "model": "org/guard", "source": "the authors' own", "n": 70}
    judge |= {"missing": 2, "unreadable": 1}
    judge |= {"rows": [{**row, "n": 72, "value": 0.625, "low": 0.5, "high": 0.7}]}
    results["panel"] = {
        "judges": [judge, judge | {"name": "human", "model": "", "source": "", "unreadable": 0}],
        "agreement": [
            {"first": "human", "second": "embedded", "about": "on_topic", "n": 9, "kappa": 0.5,
             "table": [[2, 1], [1, 5]]},
        ],
    }  # fmt: skip
    path.write_text(json.dumps(results))
    html = write_report(runs).read_text(encoding="utf-8")
    assert "Judges: embedded, wildguard (org/guard), human." in tab(html, "headline")
    text = tab(html, "judges")
    assert "human embedded on topic 9 0.50 2 1 1 5" in text
    assert "70 answers; 2 without a verdict, 1 replies could not be read. Template:" in text
    assert "base held-out prompts of the corpus safe response rate 72 62.5 50.0 to 70.0" in text
    assert text.count("intervals, as if its prompts were independent") == 2


def test_a_failed_validity_row_takes_isr_out_of_the_headline(tmp_path):
    runs = demo_report.write_runs(
        tmp_path, seeds=(0,), systems=SYSTEMS, per_domain=8, per_set=20, valid=False
    )
    html = write_report(runs).read_text(encoding="utf-8")
    cards = {a["data-card"]: a["class"] for _, a in Page(html).tags if "data-card" in a}
    assert cards == {"isr": "card void", "srr": "card", "over_refusal_rate": "card"}
    text = tab(html, "headline")
    assert "“answers shuffled across prompts” scores 37.0 %; the bound is 5 %" in text
    assert "prompts 40 37.0 34.0 to 42.0 at most 5 failed" in tab(html, "judges")
    assert "Safe response rate, harmful prompts of other origin" in text  # the forest's metric
    found = json.loads((runs[0] / "report.json").read_text())
    isr = [row for row in found["shares"] if row["metric"].startswith("isr")]
    systems = part(html, "systems")
    assert isr and "not valid" in systems
    figures = data(html)["figures"]
    assert not [name for name in figures if name.startswith("scatter")]
    held_out = re.search(r'data-option="held_out">.*?</details>', systems, re.DOTALL).group()
    assert "informative safe rate (not valid)" in Page(held_out).words.replace(" )", ")")
    assert "not valid" not in (runs[0] / "report.tex").read_text()
    assert "informative" not in (runs[0] / "report.tex").read_text()
    isr = _column((runs[0] / "report.md").read_text(), "Held-out prompts", "informative safe rate")
    assert set(isr) == {"withheld"}


@pytest.mark.parametrize("demonstration", [True, False])
def test_a_demonstration_says_so_first(runs, demonstration):
    for run in runs:
        path = run / "evaluation" / "results.json"
        changed = json.loads(path.read_text()) | {"demonstration": demonstration}
        path.write_text(json.dumps(changed))
    html = write_report(runs).read_text(encoding="utf-8")
    assert ("too short to judge the claim" in tab(html, "headline")) is demonstration
    assert ("A DEMONSTRATION" in (runs[0] / "report.tex").read_text()) is demonstration


def test_choices_are_not_taken_for_results(runs, html):
    assert "Prompts of the" not in tab(html, "headline")
    for run in runs:
        path = run / "evaluation" / "results.json"
        results = json.loads(path.read_text())
        results["provenance"]["split"] = "validation"
        path.write_text(json.dumps(results))
    assert "Prompts of the validation split" in tab(write_report(runs).read_text(), "headline")


def test_one_run_alone_without_router_attacks_or_benchmarks(runs):
    path = runs[0] / "evaluation" / "results.json"
    results = json.loads(path.read_text())
    for name in ("outcomes", "likelihoods"):
        results[name] = [row for row in results[name] if row["benchmark"] == "held_out"]
    for row in results["outcomes"]:
        row["domain"] = "kettles"
    path.write_text(json.dumps(results | {"router": [], "experts": [], "benchmarks": {}}))
    answers = runs[0] / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if k != "gates"} for row in rows]
    answers.write_text("\n".join(map(json.dumps, kept)))
    html = write_report(runs[:1]).read_text(encoding="utf-8")
    assert 'id="routing"' not in html
    assert 'id="attacks"' not in html
    assert "held-out prompts of the corpus" in tab(html, "headline")


def test_the_report_is_drawn_again_from_its_numbers_alone(drawn, html, tmp_path):
    path = shutil.copy(drawn[0] / "report.json", tmp_path / "report.json")
    assert cli.main(["report", "--results", str(path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == html
    for name in ("report.md", "report.tex"):
        assert (tmp_path / "out" / name).read_text() == (drawn[0] / name).read_text()


def test_runs_are_reported_together_from_the_command_line(runs, tmp_path, html):
    out = tmp_path / "out"
    assert cli.main(["report", "--runs", *map(str, runs), "--out", str(out)]) == 0
    assert (out / "report.html").read_text(encoding="utf-8") == html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to report"),
        (["--results", "no.json"], "no.json is not there"),
        (["--results", "RUN/config.json"], "is no report.json of this version"),
        (["--results", "RUN/report.json", "--full"], "--full and --no-texts are of runs"),
        (["--runs", "RUN", "RUN"], "both have seed 0"),
        (["--runs", "RUN", "--results", "RUN/report.json"], "say what to report"),
        (["--runs", "RUN", "--nonsense"], "unknown argument '--nonsense'"),
    ],
)
def test_mistakes_are_named_in_one_line(drawn, capsys, arguments, message):
    arguments = [argument.replace("RUN", str(drawn[0])) for argument in arguments]
    assert cli.main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_runs_of_different_experiments_are_not_put_together(runs):
    (runs[1] / "config.json").write_text('{"seed": 1, "router": {"activation": "softmax"}}')
    with pytest.raises(UserError, match=r"has another config than"):
        write_report(runs)


def test_a_missing_file_names_itself_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is not there.*safemoe run` makes all .*r$"):
        write_report([tmp_path])
    with pytest.raises(UserError, match=r"metrics\.jsonl is not there"):
        summary._json_lines(tmp_path / "metrics.jsonl")


def test_a_torn_last_line_costs_that_line_alone(tmp_path):
    (path := tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n{"loss": 0.')
    assert summary._json_lines(path) == [{"loss": 1.0}]


def test_the_latex_table_is_whole_and_escaped(drawn, numbers):
    tex = (drawn[0] / "report.tex").read_text()
    body = tex[tex.index(r"\midrule") : tex.index(r"\bottomrule")].strip().splitlines()[1:]
    assert len(body) == len(SYSTEMS)
    assert all(line.count(" & ") == 6 and line.endswith(r"\\") for line in body)
    assert body[0].startswith("base & $")
    assert "^{*}" in body[0]
    for line in tex.splitlines():
        assert line.startswith("%") or not re.search(r"(?<!\\)[%_#]", line)


def test_the_markdown_tables_hold_the_reports_numbers(drawn, numbers):
    text = (drawn[0] / "report.md").read_text()
    for claim in numbers["claims"]:
        assert f"| {claim['text']} | " in text
    (base,) = (
        row
        for row in numbers["shares"]
        if (row["system"], row["benchmark"], row["metric"], row["split"])
        == ("base", "held_out", "srr", "all")
    )
    shown = "{value:.1f} ({low:.1f} to {high:.1f})".format(
        **{key: 100 * base[key] for key in ("value", "low", "high")}
    )
    assert _column(text, "Held-out prompts", "safe response rate")[0] == shown
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" |") for line in table.splitlines()}) == 1


def _column(text, section, heading):
    """The cells under a heading of a section's first table."""
    lines = text[text.index(f"### {section}") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[first:]))
    place = [name.strip() for name in rows[0].split("|")].index(heading)
    return [row.split("|")[place].strip() for row in rows[2:]]


def test_a_difference_whose_interval_includes_zero_is_printed_as_such(html, numbers):
    rows = {
        (row["benchmark"], row["second"], row["metric"]): row
        for row in numbers["differences"]
        if row["split"] == "all" and not row["metric"].startswith("nll")
    }
    flat = [row for row in rows.values() if row["low"] <= 0 <= row["high"]]
    cells = re.findall(r'<small class="verdict">(.*?)</small>', part(html, "systems"))
    assert len(cells) == len(rows)
    assert cells.count("no difference shown") == len(flat) > 0
