"""The report in headless Chromium, as a reader would use it: by pointer and by keyboard."""

import json
import os
import shutil

import demo_report
import pytest
from playwright.sync_api import expect, sync_playwright

from safemoe_jax.evaluation import statistics
from safemoe_jax.evaluation.report import draw, write_report

TABS = (
    "headline", "systems", "domains", "attacks", "routing", "training", "answers", "judges",
    "provenance",
)  # fmt: skip
_QUIET = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    if chromium is None:
        message = "no Chromium on PATH (Debian: apt-get install chromium)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=[*_QUIET, *sandbox], timeout=300_000
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(statistics, "RESAMPLES", 199)
        monkeypatch.setattr("gc.collect", lambda *_: 0)  # see test_report.py
        runs = demo_report.write_runs(
            tmp_path_factory.mktemp("runs"),
            seeds=(0, 1),
            systems=("base", "safemoe", "uniform", "safe_lora", "random_router"),
            per_domain=8,
            per_set=24,
        )
        return write_report(runs)


@pytest.fixture
def page(browser, path):
    """The page, just opened; whatever it says or asks for without need fails the test."""
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    context.set_default_timeout(120_000)
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    context.close()


def drawn(page):
    """Names of the plots on view; each has a picture with a size."""
    plots = page.locator(".plot:visible").all()
    for plot in plots:
        box = plot.locator(".main-svg").first.bounding_box()
        assert box["width"] > 100 and box["height"] > 100
    return [plot.get_attribute("data-figure") for plot in plots]


def test_every_tab_is_drawn_and_only_one_is_seen(page):
    seen = set()
    for name in TABS:
        page.locator(f"#tab-{name}").click()
        expect(page.locator("[role=tabpanel]:visible")).to_have_attribute("id", name)
        assert page.locator(f"#{name} h2").first.is_visible()
        for details in page.locator(f"#{name} details:not([open]):has(.plot) > summary").all():
            details.click()
        seen |= set(drawn(page))
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 1300, f"{name} is wider than the window"
    page.locator("#tab-routing").click()
    page.select_option("[data-shows=routed]", "errands")
    seen |= set(drawn(page))
    assert seen == set(page.evaluate("Object.keys(data.figures)"))


def test_tabs_are_walked_by_the_keyboard_and_kept_in_the_address(page, path):
    page.keyboard.press("Tab")
    expect(page.locator("#tab-headline")).to_be_focused()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tab-systems")).to_be_focused()
    expect(page.locator("#systems")).to_be_visible()
    page.keyboard.press("End")
    expect(page.locator("#provenance")).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#headline")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith("#provenance")
    page.goto(f"{path.as_uri()}#judges")
    expect(page.locator("#judges")).to_be_visible()
    expect(page.locator("#tab-judges")).to_have_attribute("aria-selected", "true")


def test_answers_are_filtered_and_shown_as_text(page):
    page.locator("#tab-answers").click()
    entries = page.locator("#list details")
    everything = page.locator("#found").inner_text()
    assert entries.count() == 25
    page.locator("#more").click()
    assert entries.count() == 50
    page.select_option("[name=benchmark]", "held_out")
    page.select_option("[name=domain]", "kettles")
    assert page.locator("#found").inner_text() != everything
    assert set(page.locator("#list .domain").all_inner_texts()) == {"kettles\nheld out"}
    page.select_option("[name=outcome]", "unsafe")
    for entry in entries.all():
        mark = entry.locator('.mark[title^="SafeMoE"]')
        assert mark.get_attribute("class") == "mark bad"
    page.select_option("[name=outcome]", "")
    page.locator("[name=words]").fill("<script>")
    expect(entries).to_have_count(1)
    assert demo_report.MARKUP in entries.inner_text()
    page.locator("[name=system][value=base]").uncheck()
    expect(page.locator("#found")).to_contain_text("nothing fits")
    assert demo_report.SECRET not in page.content()


def test_without_texts_the_rest_is_drawn(page, path, tmp_path):
    summary = json.loads((path.parent / "report.json").read_text())
    (tmp_path / "report.json").write_text(json.dumps({**summary, "answers": [], "gated": []}))
    page.goto(draw(tmp_path / "report.json", tmp_path).as_uri())
    for name in TABS:
        if name != "answers":
            page.locator(f"#tab-{name}").click()
            expect(page.locator("[role=tabpanel]:visible")).to_have_attribute("id", name)
    assert not page.locator("#tab-answers").count()


def test_an_unsafe_answer_shows_its_hash_and_80_characters(page):
    page.locator("#tab-answers").click()
    page.select_option("[name=outcome]", "unsafe")
    card = page.locator("#list article.ours").first
    assert "judged unsafe" in card.inner_text()
    assert len(card.locator(".answer").inner_text()) <= 81
    assert len(card.locator(".hash").inner_text()) == len("sha256 ") + 64


def test_gates_are_read_by_the_arrow_keys(page):
    page.locator("#tab-routing").click()
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    tip = page.locator("#tip")
    first = tip.inner_text()
    assert "kettles" in first
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() != first
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    token = page.locator(".tokens span").first
    before = token.get_attribute("style")
    page.select_option("#expert", "6")
    assert token.get_attribute("style") != before


def test_the_theme_changes_and_plots_follow(page):
    ink = "getComputedStyle(document.querySelector('.plot .xtitle')).fill"
    page.locator("#theme").click()
    dark = page.evaluate(ink)
    page.locator("#theme").click()
    assert page.evaluate(ink) != dark


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser, path, scheme):
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(path.as_uri())
    for name in TABS:
        page.locator(f"#tab-{name}").click()
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
    context.close()
