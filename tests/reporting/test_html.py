import re
import shutil
import subprocess

import pytest

from mechsub.api import write_report
from mechsub.reporting.html import format_interval, format_number


@pytest.fixture
def page(tiny_run):
    return (tiny_run.path / "report/index.html").read_text()


def test_the_page_stands_alone(page):
    assert not re.findall(r"""(?:src|href)=["'](?!#)[^"']+""", page)
    assert "@import" not in page and "<script" not in page


def test_every_condition_and_every_finding_is_on_it(tiny_run, page):
    for condition in tiny_run.conditions:
        assert f"<b>{condition}</b>" in page
    for finding in tiny_run.findings.itertuples():
        assert format_number(finding.estimate) in page
    assert str(tiny_run.recipe.members) in page and "verdict" in page


def test_every_panel_of_a_faceted_figure_holds_its_own_condition(tiny_run, page):
    figure = page[page.index('id="alignment_training"') :]
    svg = figure[: figure.index("</svg>")]
    assert all(f">{condition}<" in svg for condition in tiny_run.conditions)
    assert "undefined" not in page and "NaN" not in svg


def test_the_report_is_rebuilt_from_results_alone(tiny_run, page):
    path = tiny_run.path / "report/index.html"
    path.unlink()
    assert write_report(tiny_run.path).read_text() == page


def test_numbers_read_as_numbers():
    assert format_number(-0.1234) == "−0.123"
    assert format_number(float("nan")) == "–"
    assert format_interval(0.1, 0.2) == "[0.100, 0.200]"
    assert format_interval(float("nan"), 0.2) == ""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium on the PATH")
def test_a_browser_draws_it(tiny_run, tmp_path):
    picture = tmp_path / "report.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,1800", f"--screenshot={picture}"]
    subprocess.run(
        [*command, (tiny_run.path / "report/index.html").absolute().as_uri()], check=True, capture_output=True, timeout=120
    )
    assert picture.stat().st_size > 50_000
