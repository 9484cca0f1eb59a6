"""The report fits a telephone: nothing is wider than the screen but what can be moved on its own."""

import html
import os
import re
import shutil
import subprocess

import pytest
from test_page import made

from mmssl.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FRAME = """<!doctype html><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><p>...</p>
<script>document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument.documentElement
  document.querySelector("p").textContent = `wide ${{page.scrollWidth}}`
}}</script>"""


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH to render the page with")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path, width):
    (tmp_path / "a_run_of_a_rather_long_name_that_has_no_place_to_be_broken_at").mkdir()
    page = write_report(made(next(tmp_path.iterdir()))).read_text(encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [BROWSER, "--headless=new", "--hide-scrollbars", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # which it has for no superuser
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.findall(r"wide (\d+)", done.stdout)[-1:] == [str(width)], done.stderr


@pytest.mark.long
def test_tables_pictures_and_listings_stand_in_what_can_be_moved(tmp_path):
    """What can be told without a browser."""
    page = write_report(made(tmp_path)).read_text(encoding="utf-8")
    assert 'name="viewport" content="width=device-width' in page
    for tag in ("<table", "<img"):
        before = page.split(tag)[:-1]
        assert before
        assert all(re.search(r'<div class="wide"[^>]*>$', part) for part in before), tag
    for rule in (".wide { overflow-x: auto }", "overflow-x: auto; font-size: 13px", "overflow-wrap: anywhere"):
        assert rule in page
