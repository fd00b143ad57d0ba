"""Reports in a real browser: nothing is fetched, nothing overflows, and the numbers are those of metrics.json."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from chromium import CHROMIUM
from playwright.sync_api import Browser, Page, sync_playwright

from llmc.report.page import compare_runs, write_report

SIZES = {"desktop": (1280, 900), "phone": (375, 812)}

# Of every text on the page with its own background: the least contrast, and where.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const style = getComputedStyle(element);
    const seen = style.fontSize !== "0px" && element.getClientRects().length && !element.closest(".top, svg, .skip");
    if (!own || !seen) continue;
    const [a, b] = [light(parse(style.color)), light(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 120)];
  }
  return worst;
}"""

# The share of a canvas that is painted on, read from a copy: Chromium complains of a canvas that is read often.
PAINTED = """(canvas) => {
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", {willReadFrequently: true});
  copy.drawImage(canvas, 0, 0);
  const data = copy.getImageData(0, 0, canvas.width, canvas.height).data;
  return data.filter((value, index) => index % 4 === 3 && value > 0).length / (data.length / 4);
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(made, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    long = Path(shutil.copytree(made["plain"].folder, folder / "quarot-gptq-w4a4-of-another-day"))
    return {
        "run": write_report(made["rtn"].folder, folder / "run.html"),
        "plain": write_report(made["plain"].folder, folder / "plain.html"),
        "comparison": compare_runs([made["rtn"].folder, made["gptq"].folder], folder / "both.html"),
        "several": compare_runs([made["rtn"].folder, made["gptq"].folder, long], folder / "several.html"),
    }


@pytest.fixture
def look(browser, pages) -> Iterator[Callable[..., Page]]:
    """Opens a page; afterwards nothing must have been asked for or complained about."""
    contexts, troubles = [], []

    def opened(name: str, size: str = "desktop", theme: str = "light") -> Page:
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        contexts.append(context)
        page, url = context.new_page(), pages[name].as_uri()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: request.url == url or troubles.append(request.url))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert troubles == []


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["run", "plain", "comparison", "several"])
def test_nothing_overflows_and_everything_can_be_read(look, name, size, theme):
    page = look(name, size, theme)
    for tab in [None, *page.query_selector_all("[role=tab]")]:
        if tab is not None:
            tab.click()
        assert page.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
    ratio, where = page.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    wanted = {"light": lambda value: value > 200, "dark": lambda value: value < 60}[theme]
    assert wanted(page.evaluate("Number(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"))


@pytest.mark.parametrize("name", ["run", "comparison"])
def test_structure_for_those_who_do_not_see_it(look, name):
    page = look(name)
    assert page.evaluate("[...document.querySelectorAll('table')].every((table) => table.caption)")
    assert page.evaluate("[...document.querySelectorAll('main svg, canvas')].every((one) => one.ariaLabel)")
    assert page.evaluate(
        "[...document.querySelectorAll('button')].every((one) => one.ariaLabel || one.textContent.trim())"
    )
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((one) => Number(one.tagName[1]))")
    assert levels.count(1) == 1 and all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size") == len(
        page.query_selector_all("[id]")
    )


def figures(page: Page) -> dict[str, str]:
    return {
        one.query_selector("dt").inner_text(): one.query_selector(".value").inner_text()
        for one in page.query_selector_all(".figures > div")
    }


def cells(page: Page, key: str) -> dict[str, list[float]]:
    rows = page.evaluate(
        "(key) => [...document.querySelectorAll(`#heat-${key} tbody tr`)]"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))",
        key,
    )
    return {row[0]: [float(text.split()[0].replace(",", "")) for text in row[1:-1]] for row in rows}


def test_the_numbers_are_those_of_the_metrics(look, made):
    page, metrics = look("run"), made["rtn"].metrics
    shown = figures(page)
    ppl = {one["position"]: one["value"] for one in metrics["evaluation"]}
    assert float(shown["Perplexity"]) == pytest.approx(ppl["fake_quant"], rel=1e-4)
    before = page.inner_text(".figures .from").removeprefix("from ")
    assert float(before) == pytest.approx(ppl["pretrain"], rel=1e-4)
    assert float(shown["Bits per weight"]) == pytest.approx(metrics["bits_per_weight"], rel=1e-3)
    table = page.evaluate("[...document.querySelectorAll('#evaluation td.n')].map((cell) => Number(cell.textContent))")
    assert table == pytest.approx([one["value"] for one in metrics["evaluation"]], rel=1e-5)
    for key, get in {
        "error": lambda note: note["error"],
        "sqnr": lambda note: note["sqnr_db"],
        "cosine": lambda note: note["cosine"],
        "kurtosis": lambda note: note["weight"]["kurtosis"]["tensor"],
        "bits": lambda note: note["bits"],
    }.items():
        wanted = {
            name: pytest.approx([get(row["layers"][name]) for row in metrics["blocks"]], rel=2e-3)
            for name in metrics["blocks"][0]["layers"]
        }
        assert cells(page, key) == wanted


def test_without_statistics_the_page_says_so(look):
    page = look("plain")
    assert page.query_selector("#activations") is None and page.query_selector("canvas") is None
    assert "No statistics of activations" in page.inner_text(".missing")


def test_readouts(look, made):
    page, row = look("run"), made["rtn"].metrics["blocks"][2]
    page.hover("#heat-error tbody tr:nth-child(2) td:nth-child(4)")
    told = page.inner_text("#tip").splitlines()
    assert told[0] == "block 2, self_attn.k_proj"
    assert float(told[1]) == pytest.approx(row["layers"]["self_attn.k_proj"]["error"], rel=1e-3)
    page.hover("#layers .chart .hover:nth-of-type(3)")
    told = page.inner_text("#tip").splitlines()
    assert told[0] == "block 2" and float(told[1].split()[-1]) == pytest.approx(row["error"], rel=1e-3)
    page.mouse.move(2, 2)
    assert page.is_hidden("#tip")


def test_tabs_by_pointer_and_by_key(look):
    page = look("run")
    page.click("#tab-heat-sqnr")
    assert page.is_visible("#heat-sqnr table") and page.is_hidden("#heat-error")
    page.keyboard.press("ArrowRight")
    assert page.is_visible("#heat-cosine table") and page.get_attribute("#tab-heat-cosine", "aria-selected") == "true"


def test_the_switch_of_colours(look):
    page = look("run", theme="dark")
    colour = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(colour)
    page.click("#theme")
    assert page.get_attribute("#theme", "aria-label") == "Colours: light" and page.evaluate(colour) != dark
    page.click("#theme")
    assert page.evaluate(colour) == dark


def test_surfaces_are_drawn_and_tell_their_values(look):
    page = look("run")
    canvas = page.locator("canvas.surface").first
    canvas.scroll_into_view_if_needed()
    for _ in range(100):  # wait_for_function needs eval(), which the page forbids
        if canvas.evaluate(PAINTED) > 0.1:
            break
        page.wait_for_timeout(50)
    else:
        pytest.fail("nothing is drawn")
    page.click("[data-view=map]")
    box = canvas.bounding_box()
    # The ridge that was put into channel 9 of 64; the map leaves 4 pixels above and 22 below.
    page.mouse.move(box["x"] + box["width"] * 9.5 / 64, box["y"] + 4 + (box["height"] - 26) * 0.5)
    told = page.inner_text("#tip").splitlines()
    assert told[0] == "channels 9" and float(told[2].split()[-1]) > 5
    page.mouse.move(box["x"] + box["width"] * 12.5 / 64, box["y"] + 4 + (box["height"] - 26) * 0.5)
    assert float(page.inner_text("#tip").splitlines()[2].split()[-1]) < 1.1


def test_the_best_of_a_comparison_is_marked(look, made):
    page, metrics = look("comparison"), [made[name].metrics for name in ("rtn", "gptq")]
    rows = page.evaluate(
        "Object.fromEntries([...document.querySelectorAll('#numbers tbody tr')]"
        ".map((row) => [row.cells[0].firstChild.textContent, "
        "[...row.cells].slice(1).map((cell) => [cell.firstChild.textContent, cell.classList.contains('best')])]))"
    )

    def mean(one):
        return fmean(10 ** (-note["sqnr_db"] / 10) for row in one["blocks"] for note in row["layers"].values())

    wanted = {
        "Perplexity on text (fake_quant)": [one["evaluation"][1]["value"] for one in metrics],
        "Bits per weight in the quantized layers": [one["bits_per_weight"] for one in metrics],
        "Mean relative error of the layers": [mean(one) for one in metrics],
        "Relative error behind the last block": [one["blocks"][-1]["error"] for one in metrics],
    }
    for name, values in wanted.items():
        assert [float(text) for text, _ in rows[name]] == pytest.approx(values, rel=1e-3), name
        assert [best for _, best in rows[name]] == [value == min(values) for value in values], name
    assert not any(best for _, best in rows["Perplexity on text (pretrain)"])
    keys = page.evaluate("[...document.querySelectorAll('#configuration tbody th')].map((cell) => cell.textContent)")
    assert "quant.method" in keys and "quant.weight.bit" in keys and "quant.weight.group_size" not in keys
    page.hover("#blocks .hover:nth-of-type(1)")
    assert [line.split(":")[0] for line in page.inner_text("#tip").splitlines()] == ["block 0", "rtn", "gptq"]


def test_it_can_be_printed(look):
    page = look("run", theme="dark")
    page.emulate_media(media="print")
    assert page.is_visible("#heat-sqnr") and page.is_hidden(".top") and page.is_hidden(".copy")
