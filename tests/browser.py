"""What a headless Chromium says of a page, for tests that skip where there is none."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
from pathlib import Path

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
MISSING = "no Chromium on the PATH to render the page with"
QUIET = ("--headless=new", "--hide-scrollbars", "--disable-quic", "--no-first-run", "--disable-background-networking")
FRAME = """<!doctype html><iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><p>...</p>
<script>document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument.documentElement
  document.querySelector("p").textContent = `wide ${{page.scrollWidth}}`
}}</script>"""


def scroll_width(page: str, width: int, folder: Path) -> int | None:
    """How wide a page is on a screen of that many pixels; None where the browser does not tell."""
    assert BROWSER is not None
    frame = folder / "frame.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [BROWSER, *QUIET, f"--user-data-dir={folder}/profile", "--dump-dom"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # which it has for no superuser
    done = subprocess.run([*command, frame.as_uri()], capture_output=True, text=True, timeout=120)
    found = re.findall(r"wide (\d+)", done.stdout)
    return int(found[-1]) if found else None
