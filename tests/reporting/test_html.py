import json
import re
import shutil
import subprocess

import pytest
from markupsafe import escape

from mechsub.api import write_report
from mechsub.reporting.page import format_interval
from mechsub.results import read_result
from mechsub.statistics.intervals import format_number


@pytest.fixture
def page(tiny_run):
    return (tiny_run.path / "report/index.html").read_text()


def without_scripts(page):
    return re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_stands_alone(page):
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", without_scripts(page))
    assert "@import" not in without_scripts(page)
    assert len(page) < 5_000_000


def test_without_scripts_every_figure_and_verdict_is_still_there(tiny_run, page):
    still = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    figures = re.findall(r'<figure id="(\w+)">.*?<svg.*?</svg>.*?<figcaption>(.+?)</figcaption>', still, flags=re.DOTALL)
    results = [read_result(path) for path in (tiny_run.path / "results").glob("*.h5")]
    assert {name for name, _ in figures} == {figure.name for result in results for figure in result.figures}
    for name, caption in figures:
        assert "n = 3" in caption and "null" in caption.lower(), name
    for finding in tiny_run.findings.query("verdict != ''").itertuples():
        assert str(escape(finding.rule)) in still
    assert "what would have counted for" not in still and "two one-sided t tests put it inside ±0.05" in still


def test_the_page_ends_with_what_made_it(tiny_run, page):
    end = without_scripts(page)[-6000:]
    for version in (f"torch {tiny_run.directory.header['versions']['torch']}", "Python", "seed 0", "cores"):
        assert version.lower() in end.lower()
    assert "hidden_widths:" in end


def test_the_interactive_figures_hold_the_numbers_of_the_results(tiny_run, page):
    figure = page[page.index('<figure id="members">') :]
    spec = json.loads(re.search(r'class="spec">(.*?)</script>', figure, flags=re.DOTALL)[1])
    column = spec["datasets"]["columns"].index("final_score")
    shown = sorted(row[column] for row in spec["datasets"]["rows"])
    assert shown == pytest.approx(sorted(tiny_run.results["behaviour"].final_score.values.flat))


def test_every_condition_and_every_finding_is_on_it(tiny_run, page):
    for condition in tiny_run.conditions:
        assert f"<b>{condition}</b>" in page
    for finding in tiny_run.findings.itertuples():
        assert format_number(finding.estimate) in page
    assert str(tiny_run.recipe.members) in page and "verdict" in page


def test_the_first_screen_has_one_row_an_analysis_and_links_to_it(tiny_run, page):
    table = re.search(r'<section class="card" id="mechanisms">.*?</section>', page, flags=re.DOTALL)[0]
    judged = tiny_run.findings.query("verdict != ''").groupby("analysis", sort=False).first()
    for analysis, quantity in judged.quantity.drop("behaviour").items():
        assert f'<a href="#{analysis}"><b>{quantity.replace("_", " ")}</b>' in table
        assert f'<h2 id="{analysis}">' in page
        found = tiny_run.findings.query("quantity == @quantity and verdict != ''").drop_duplicates(["condition", "trait"])
        for finding in found.itertuples():
            row = table[table.index(f'"#{analysis}"') :]
            row = row[: row.index("</tr>")]
            cell = row[row.index(f'data-label="{finding.condition}"') :].split("</td>")[0]
            assert finding.verdict in cell and format_number(finding.estimate) in cell


def test_every_panel_of_a_faceted_figure_holds_its_own_condition(tiny_run, page):
    figure = page[page.index('id="alignment_training"') :]
    svg = figure[: figure.index("</svg>")]
    assert all(f">{condition}<" in svg for condition in tiny_run.conditions)
    assert "undefined" not in svg and "NaN" not in svg


def test_no_two_pictures_share_a_gradient_or_a_clip(page):
    still = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    names = re.findall(r' id="([^"]+)"', still)
    assert len(names) == len(set(names))
    assert set(re.findall(r"url\(#([^)]+)\)", still)) <= set(names)


def test_the_report_is_rebuilt_from_results_alone(tiny_run, page):
    path = tiny_run.path / "report/index.html"
    path.unlink()
    assert write_report(tiny_run.path).read_text() == page


def test_numbers_read_as_numbers():
    assert format_number(-0.1234) == "−0.123"
    assert format_number(float("nan")) == "–"
    assert format_interval(0.1, 0.2) == "[0.100, 0.200]"
    assert format_interval(float("nan"), 0.2) == ""


needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium on the PATH")


def browse(page, tmp_path, *options):
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", *options, page.absolute().as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


@needs_chromium
@pytest.mark.parametrize(
    "options", [["--window-size=1200,1800"], ["--window-size=390,1800"], ["--blink-settings=preferredColorScheme=0"]]
)
def test_a_browser_draws_it(tiny_run, tmp_path, options):
    picture = tmp_path / "report.png"
    browse(tiny_run.path / "report/index.html", tmp_path, f"--screenshot={picture}", *options)
    assert picture.stat().st_size > 30_000


CLICK = """
<script>
window.addEventListener("error", (event) => document.body.setAttribute("data-error", event.message));
window.addEventListener("unhandledrejection", (event) => document.body.setAttribute("data-error", String(event.reason)));
window.addEventListener("load", () => {
  for (const button of document.querySelectorAll(".tools button")) if (button.textContent === "Explore") button.click();
});
</script>
"""


@needs_chromium
def test_a_browser_makes_every_figure_live(tiny_run, page, tmp_path):
    clicking = tmp_path / "clicking.html"
    clicking.write_text(page.replace("<main>", f"{CLICK}<main>", 1))
    found = browse(clicking, tmp_path, "--virtual-time-budget=30000", "--dump-dom")
    assert "data-error" not in found.split("</script>", 1)[1][:200] and 'data-error="' not in found
    assert found.count('data-live="yes"') == page.count("<figure id=")
    assert found.count("Save SVG</button>") == found.count("Copy numbers</button>") == page.count("<figure id=")
    live = re.findall(r'<div class="live[^>]*>.*?<svg', found, flags=re.DOTALL)
    assert len(live) == page.count("<figure id=")
