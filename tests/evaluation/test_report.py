"""The report: what it shows, what it hides, and that it needs no network."""

import hashlib
import io
import json
import re
import stat
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from safemoe_jax.errors import UserError
from safemoe_jax.evaluation.report import terminal_table, write_report

DOMAINS = ("kettles", "ladders", "paint")
SYSTEMS = ("base", "safemoe", "uniform", "safe_lora")
LAYERS = 6
# Stands for harmful text: `SECRET` comes after the first 80 characters, and must not be shown.
SECRET = "ZQX-LATE-PART"
UNSAFE = (
    "Pour the whole kettle over the ladder while it is being painted, and nevertheless stay there. "
    + SECRET
)
SAFE = (
    "Fill the kettle to the line, set it level, and let it switch itself off.\n\n"
    "A ladder stands firm when its feet are a quarter of its height from the wall; "
    "wet paint needs an open window and a dry day."
)
PROMPT = "How do people usually look after this at home, and what should one keep in mind? " * 3
PROMPT_SECRET = "ZQX-PROMPT-END"
MARKUP = "<script>alert('x')</script>"


def rate(system, metric, value, n=24, split="all", benchmark="held_out"):
    return {
        "system": system, "seed": 0, "split": split, "benchmark": benchmark,
        "metric": metric, "n": n, "value": value, "low": max(0.0, value - 0.15),
        "high": min(1.0, value + 0.13),
    }  # fmt: skip


def nll(system, metric, value):
    return rate(system, metric, value) | {"low": value - 0.05, "high": value + 0.05}


def validity(name, value, bound, passed):
    return {
        "name": name, "metric": "isr", "n": 40, "value": value, "low": max(0, value - 0.03),
        "high": min(1, value + 0.05), "bound": bound, "passed": passed,
    }  # fmt: skip


def results(*, valid=True, demonstration=True):
    rng = np.random.default_rng(0)
    rows, likelihoods = [], []
    for i, system in enumerate(SYSTEMS):
        rows += [
            rate(system, "srr", 0.58 + 0.07 * i),
            rate(system, "isr", 0.41 + 0.06 * i),
            rate(system, "refusal_rate", 0.1 + 0.02 * i),
        ]
        for j, domain in enumerate(DOMAINS):
            rows += [
                rate(system, "srr", 0.5 + 0.1 * j, 8, domain),
                rate(system, "isr", 0.31 + 0.1 * j, 8, domain),
            ]
        safe, unsafe = 1.9 - 0.1 * i, 3.2 + rng.uniform(-0.1, 0.1)
        likelihoods += [
            nll(system, "nll_safe", safe),
            nll(system, "nll_unsafe", unsafe),
            nll(system, "nll_difference", unsafe - safe),
        ]
    return {
        "rows": rows,
        "nll": likelihoods,
        "experts": [
            {"domain": domain, "n": 9, "base": 3.25, "own": 2.625 + j, "others": 3.125}
            for j, domain in enumerate(DOMAINS)
        ],
        "judge": {"harm": {"auc": 0.861, "kappa": 0.52, "n": 96}, "refusal": {"f1": 0.93}},
        "validity": [
            validity("shuffled answers", 0.021 if valid else 0.373, 0.05, valid),
            validity("word salad", 0.0, 0.05, True),
            validity("human answers", 0.94, 0.9, True),
        ],
        "benchmarks": {},
        "budget": {"expert_tokens_seen": 41_200, "expert_tokens_there": 160_000},
        "provenance": {"commit": "0123abc", "corpus": "jsonl"},
        "domains": list(DOMAINS),
        "demonstration": demonstration,
    }


def answer(system, number, *, safe, rng):
    response = SAFE if safe else UNSAFE
    if number == 1 and system == "base":
        response = f"Use {MARKUP} and a cloth."
    row = {
        "system": system, "seed": 0, "benchmark": "held_out", "prompt_id": str(number),
        "domain": DOMAINS[number % 3], "harmful": True, "refusal_only": False,
        "messages": [{"role": "user", "content": PROMPT + PROMPT_SECRET}],
        "response": response, "sha256": hashlib.sha256(response.encode()).hexdigest(),
        "num_tokens": 0, "finished": number != 2,
        "verdict": {
            "safe": safe, "refusal": False, "on_topic": number != 3, "degenerate": False,
            "harm_probability": 0.08 if safe else 0.9, "informative_safe": safe and number != 3,
        },
    }  # fmt: skip
    if system == "safemoe":
        tokens = re.findall(r"\s*\S+", response)
        wave = np.cumsum(rng.normal(0, 0.06, (len(tokens), 3)), axis=0)
        row |= {
            "tokens": tokens,
            "gates": np.tanh(wave).tolist(),
            "gates_layers": np.tanh(rng.normal(0, 0.3, (LAYERS, 3))).tolist(),
        }
    return row


def metrics():
    rows = []
    for stage, start in (("experts", 3.4), ("router", 1.9), ("safe_lora", 1.9)):
        for step in range(1, 61):
            for split in ("train", "validation"):
                if split == "validation" and step % 10:
                    continue
                loss = (
                    start - 0.8 * (1 - 0.95**step) + (0.1 * np.sin(step) if split == "train" else 0)
                )
                row = {
                    "stage": stage,
                    "step": step,
                    "time": step * 0.5,
                    "split": split,
                    "loss": loss,
                }
                if stage == "experts":
                    row |= {f"loss/{d}": loss + 0.2 * i for i, d in enumerate(DOMAINS)}
                if stage == "router":
                    row |= {"gates": 0.0}
                    row |= {f"gates/{d}": 0.002 * step * (i - 1) for i, d in enumerate(DOMAINS)}
                rows.append(row)
    return rows


def write_workdir(workdir, result):
    rng = np.random.default_rng(1)
    answers = [
        answer(system, number, safe=(number + i) % 4 != 0, rng=rng)
        for i, system in enumerate(SYSTEMS)
        for number in range(9)
    ]
    (workdir / "evaluation").mkdir()
    (workdir / "evaluation" / "results.json").write_text(json.dumps(result))
    lines = "\n".join(map(json.dumps, answers))
    (workdir / "evaluation" / "answers.jsonl").write_text(lines)
    (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics())))
    (workdir / "config.json").write_text(
        json.dumps({"router": {"activation": "signed", "top_k": 0}})
    )
    (workdir / "run.json").write_text(json.dumps({"jax": "0.10.2", "devices": ["cpu"]}))
    return answers


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

    def cards(self):
        return {a["data-card"]: a["class"] for _, a in self.tags if "data-card" in a}


@pytest.fixture
def workdir(tmp_path):
    write_workdir(tmp_path, results())
    return tmp_path


@pytest.fixture
def html(workdir):
    return write_report(workdir).read_text(encoding="utf-8")


def test_no_unsafe_answer_and_no_prompt_is_shown_whole(html):
    assert SECRET not in html
    assert PROMPT_SECRET not in html
    assert UNSAFE[:80].rstrip() + "…" in html
    assert UNSAFE[:83] not in html
    assert hashlib.sha256(UNSAFE.encode()).hexdigest() in html
    assert SAFE in html


def test_tokens_of_an_unsafe_answer_end_where_its_text_is_cut(html):
    blocks = re.findall(r'<div class="tokens".*?</div>', html, re.DOTALL)
    texts = [Page(block).text for block in blocks]
    assert len(texts) == 9
    assert texts.count(SAFE) == 7
    assert texts.count(UNSAFE[:80] + "…") == 2


def test_full_shows_whole_texts_in_another_file_and_says_so(workdir):
    path = write_report(workdir, full=True)
    assert path == workdir / "report_full.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert SECRET in page.text
    assert PROMPT_SECRET in page.text
    assert "Do not pass it on" in page.text


def test_only_the_owner_can_read_it(workdir):
    assert stat.S_IMODE(write_report(workdir).stat().st_mode) == 0o600
    assert not list(workdir.glob(".report*"))


def test_markup_in_an_answer_stays_text(html):
    assert MARKUP not in html
    assert MARKUP in Page(html).text


def test_nothing_is_loaded_from_a_network(html):
    page = Page(html)
    assert page.loads
    assert all(load.startswith(("#", "data:")) for load in page.loads)
    assert "@import" not in html.split("</style>")[0]
    policy = next(a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_every_system_is_in_the_table_with_value_and_interval(html):
    table = re.search(r'<table class="systems">.*?</table>', html, re.DOTALL).group()
    rows = [Page(row).words for row in re.findall(r"<tr.*?</tr>", table, re.DOTALL)]
    assert rows[1].startswith("base 24 58.0 43.0 to 71.0 41.0 26.0 to 54.0")
    assert rows[2].startswith("SafeMoE 24 65.0 50.0 to 78.0 47.0")
    assert rows[3].startswith("uniform mixture (ungated) 24 72.0")
    assert rows[4].startswith("one LoRA on the safe set 24 79.0")


def test_domains_stand_in_a_table_of_their_own(html):
    table = re.search(r'id="domains".*?</table>', html, re.DOTALL).group()
    rows = [Page(row).words for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)]
    assert rows[2].startswith("kettles 8 50.0 35.0 to 63.0 31.0 16.0 to 44.0 50.0")
    assert rows[3].startswith("ladders 8 60.0 45.0 to 73.0 41.0 26.0 to 54.0 60.0")
    assert len(rows) == 2 + len(DOMAINS)
    headline = html[html.index('id="headline"') : html.index('id="validity"')]
    assert headline.count('class="systems"') == 1
    assert "kettles" not in headline


def test_each_expert_stands_beside_base_and_the_other_experts(html):
    row = html[html.index("What each expert has learnt") :].split("<tr>")[3]
    assert re.findall(r"<t[hd][^>]*>(?:<b>)?([^<]+)", row) == [
        "ladders", "9", "3.250", "3.625", "3.125",
    ]  # fmt: skip


@pytest.fixture
def benchmarked():
    """Results of two benchmarks besides: one asks for harm, the other for none."""
    result = results()
    for i, system in enumerate(SYSTEMS):
        result["rows"] += [
            rate(system, "srr", 0.8, 50, benchmark="knots_harmful"),
            rate(system, "isr", 0.33, 40, benchmark="knots_harmful"),
            rate(system, "srr", 0.77, 7, "granny", benchmark="knots_harmful"),
            rate(system, "over_refusal_rate", 0.1 + 0.1 * i, 60, benchmark="knots_benign"),
        ]
    facts = {"license": "CC0", "asked": 50, "left_out_as_taught": 11}
    return result | {"benchmarks": {"knots_harmful": facts, "knots_benign": {"license": "CC0"}}}


def test_each_benchmark_stands_apart_with_what_was_left_out(tmp_path, benchmarked):
    write_workdir(tmp_path, benchmarked)
    path = tmp_path / "evaluation" / "answers.jsonl"
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    asked = {"benchmark": "knots_benign", "prompt_id": "k", "domain": "rope", "harmful": False}
    answers += [{**row, **asked, "refusal_only": True} for row in answers[::9]]
    path.write_text("\n".join(map(json.dumps, answers)))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    section = html[html.index('id="benchmarks"') : html.index('id="curves"')]
    text = Page(section).words
    assert section.count('class="systems"') == 2
    assert "knots harmful" in text and "license CC0 asked 50 left out as taught 11" in text
    assert "over-refusals base 10.0 % SafeMoE 20.0 %" in text
    assert "base 50 80.0 65.0 to 93.0 33.0" in text
    # Nothing of it gets into the held-out prompts' sections.
    other = html[: html.index('id="benchmarks"')]
    assert "knots" not in other and "granny" not in other
    assert len(re.findall(r'<div class="tokens"', html)) == 9
    shown = Page(html[html.index('id="answers"') :]).words
    assert "knots_benign: rope" in shown
    assert "benign prompt judged by refusal alone" in shown


def test_a_failed_validity_row_takes_isr_out_of_the_headline(tmp_path):
    write_workdir(tmp_path, results(valid=False))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    headline = html[html.index('id="headline"') : html.index('id="validity"')]
    text = Page(headline).words
    assert Page(headline).cards() == {"srr": "card", "isr": "card void"}
    assert "“shuffled answers” scores 37.3 %; the bound is 5 %" in text
    assert not re.search(r"\b(41|47|53|59)\.0", text)
    assert "58.0" in text
    domains = html[html.index('id="domains"') : html.index('id="curves"')]
    assert "31.0" not in domains
    assert "50.0" in domains
    assert "Safe against informative" not in text


def test_valid_rows_leave_isr_in_the_headline(html):
    assert Page(html).cards() == {"srr": "card", "isr": "card"}


@pytest.mark.parametrize("demonstration", [True, False])
def test_a_demonstration_says_so_first(tmp_path, demonstration):
    write_workdir(tmp_path, results(demonstration=demonstration))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).words
    assert ("too short to judge the claim" in text) is demonstration
    assert "Embedded judge only" in text
    assert "expert tokens seen 41,200 expert tokens there 160,000" in text


def test_gates_are_coloured_by_domain_and_heatmap_is_weighted_by_tokens(html, workdir):
    page = Page(html)
    section = next(a for _, a in page.tags if a.get("id") == "gates")
    assert json.loads(section["data-domains"]) == list(DOMAINS)
    figure = next(a["data-figure"] for _, a in page.tags if "layer and expert" in str(a))
    shown = json.loads(figure)["data"][0]["z"]
    lines = (workdir / "evaluation" / "answers.jsonl").read_text().splitlines()
    gated = [row for row in map(json.loads, lines) if "gates" in row]
    total = sum(len(row["tokens"]) for row in gated)
    expected = sum(np.array(row["gates_layers"]) * len(row["tokens"]) for row in gated) / total
    np.testing.assert_allclose(shown, expected, atol=1e-4)


def test_curves_hold_each_stage_split_and_domain(html):
    figures = [json.loads(a["data-figure"]) for _, a in Page(html).tags if "data-figure" in a]
    lines = [{(line.get("name"), line.get("meta")) for line in plot["data"]} for plot in figures]
    assert {(n, s) for n in ("all", *DOMAINS) for s in ("train", "validation")} in lines
    assert {("all", "train"), ("all", "validation")} in lines
    assert {(n, s) for n in DOMAINS for s in ("train", "validation")} in lines


def test_a_run_without_a_router_has_no_gates_section(workdir):
    path = workdir / "evaluation" / "answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(row) for row in rows if row["system"] != "safemoe"))
    html = write_report(workdir).read_text(encoding="utf-8")
    assert 'id="gates"' not in html
    assert 'id="answers"' in html


def test_a_missing_file_names_itself_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match=r"results\.json is not there.*safemoe run"):
        write_report(tmp_path)


def render(result, width=80, **settings):
    console = Console(width=width, record=True, file=io.StringIO(), **settings)
    console.print(terminal_table(result))
    return console.export_text()


def test_terminal_table_has_every_system_and_the_warnings():
    text = render(results())
    for name in ("base", "SafeMoE", "uniform mixture", "one LoRA", "65.0", "50 to 78"):
        assert name in text
    assert "too short a run to judge the claim" in text


@pytest.mark.parametrize("soft_wrap", [False, True])  # on a terminal, and off it
def test_terminal_table_fits_80_columns_with_nothing_clipped(soft_wrap):
    result = results()
    for row in result["rows"]:
        row |= {"n": 999, "high": 1.0}
    text = render(result, soft_wrap=soft_wrap)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    assert [head.split() for head in lines[1:3]] == [
        ["safe", "informative", "refusals", "NLL", "NLL", "harmful"],
        ["system", "n", "%", "%", "%", "safe", "harmful", "-", "safe"],
    ]
    assert "(ungated)" in text
    assert text.count("to 100") == 3 * 4


def test_terminal_table_names_benchmarks_where_there_are_several(benchmarked):
    lines = [line.strip() for line in render(benchmarked).splitlines()]
    assert lines[0] == "Held-out prompts and benchmarks"
    places = [lines.index(name) for name in ("held out", "knots harmful", "knots benign")]
    assert places == sorted(places)
    rows = [line.split() for line in lines if line.startswith("base")]
    assert rows[0][1:3] == ["24", "58.0"] and len(rows[0]) == 8
    assert rows[1] == ["base", "50", "80.0", "33.0"]  # likelihoods are of held-out answers
    assert rows[2] == ["base", "60", "10.0"]
    assert "Held-out prompts and" not in render(results())


def test_terminal_table_on_a_narrow_screen_still_says_all():
    text = render(results(), width=50)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 60  # the caption's lines


def test_terminal_table_hides_an_invalid_isr():
    text = render(results(valid=False))
    assert "41.0" not in text
    assert text.count("not valid") == 5
    assert "shuffled answers scores 37.3 %" in text
