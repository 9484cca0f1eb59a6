"""Where scripts put what they measured: between two marks of the README."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def write_tables(name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`.

    Raises:
        ValueError: where the README lacks one of the marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = README.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{README} needs the marks {begin} and {end} around a place for these tables")
    README.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
