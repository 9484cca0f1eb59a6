"""The documentation is made by one command, says what the code says, and has no link that leads nowhere."""

import re
import shutil
import subprocess
import sys

import pytest

import mmssl
from mmssl.registry import ROOT, components

pytest.importorskip("furo", reason="the extra docs is not installed")
pytest.importorskip("myst_parser", reason="the extra docs is not installed")

import docs

PROJECT = ROOT.parent


def test_links_are_those_of_one_folder():
    text = "[a](CONTRIBUTING.md) [b](../CONTRIBUTING.md#x) [c](../../CONTRIBUTING.md) [d](docs/results.md) [e](data.md)"
    assert docs.relinked(text) == (
        "[a](contributing.md) [b](contributing.md#x) [c](../contributing.md) [d](results.md) [e](data.md)"
    )


def test_rows_of_results_belong_to_the_task_of_the_longest_name():
    results = (
        "# A\n| masked_language_wordnet | 1 |\n## B?\n| `masked_pair` | 2 |\n| jigsaws | `barlow twins` (12 %) |\n"
    )
    assert docs.measured(results) == {"masked_language": ["A"], "masked_pair": ["B?"], "barlow_twins": ["B?"]}


@pytest.mark.long
def test_recipes_of_a_task_begin_with_the_smallest():
    assert [path.stem for path in docs.recipes_of("jigsaw")] == ["jigsaw_toy", "jigsaw_folder", "jigsaw_imagenet"]


@pytest.mark.long
@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "link", ["[x](nowhere.md)", "[x](#nowhere)", "[x](other.md#nowhere)", "[x](other.md#here)"], ids=lambda link: link
)
def test_a_link_that_leads_nowhere_is_an_error(link, tmp_path, capsys):
    pages = tmp_path / "pages"
    pages.mkdir()
    shutil.copy(PROJECT / "docs" / "conf.py", pages)
    (pages / "index.md").write_text(f"# Index\n\n{link}\n\n```{{toctree}}\nother\n```\n")
    (pages / "other.md").write_text("# Other\n\n## Here\n")
    assert docs.to_html(pages, tmp_path / "out") == (0 if link.endswith("#here)") else 1), capsys.readouterr().err


@pytest.mark.long
def test_all_pages_are_made_by_one_command(tmp_path):
    call = [sys.executable, "scripts/docs.py", "--out", str(tmp_path / "html")]
    done = subprocess.run(call, cwd=PROJECT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert not done.stderr
    index = (tmp_path / "html" / "index.html").read_text("utf-8")
    assert "Which pretext task" in index
    for task in components("objective").values():
        page = (tmp_path / "html" / "tasks" / f"{task.name}.html").read_text("utf-8")
        (picture,) = re.findall(rf'<img [^>]*src="(\.\./_images/{task.name}\.png)"', page)
        assert (tmp_path / "html" / "tasks" / picture).is_file()
        assert "Chance:" in page
        assert all(path.stem in page for path in docs.recipes_of(task.name))
    api = (tmp_path / "html" / "api.html").read_text("utf-8")
    assert not [name for name in mmssl.__all__ if f'id="mmssl.{name}"' not in api and name != "__version__"]
