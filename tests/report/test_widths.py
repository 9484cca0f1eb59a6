"""The report fits a telephone: nothing is wider than the screen but what can be moved on its own."""

import re

import pytest
from browser import BROWSER, MISSING, scroll_width
from test_page import made

from mmssl.report.page import write_report


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason=MISSING)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_does_not_scroll_sideways(tmp_path, width):
    (tmp_path / "a_run_of_a_rather_long_name_that_has_no_place_to_be_broken_at").mkdir()
    page = write_report(made(next(tmp_path.iterdir()))).read_text(encoding="utf-8")
    assert scroll_width(page, width, tmp_path) == width


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
