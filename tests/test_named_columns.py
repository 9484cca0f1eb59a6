"""Every verb that takes rows of the user's own is told which column holds what, in the words of the errors that ask."""

import sys

import pytest

import mmssl
from mmssl import cli
from mmssl.cli_options import overrides
from mmssl.recipe import data_section


def call(monkeypatch, *arguments: str) -> int:
    """Exit code of `mmssl ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mmssl", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("before", ["", "data."])
@pytest.mark.parametrize("verb", ["adapt x", "embed x rows --to y.npz", "predict x rows --to y.csv"])
def test_every_verb_that_reads_rows_is_told_their_columns(monkeypatch, capsys, verb, before):
    heard = {}
    monkeypatch.setattr(mmssl, verb.split()[0], lambda *args, **options: heard.update(options))
    assert call(monkeypatch, *verb.split(), "--set", f"{before}columns.video=clip") == 0
    assert heard["columns"] == {"video": "clip"}
    assert data_section("rows", overrides([f"{before}columns.video=clip"], "data.")).columns == {"video": "clip"}
    if verb.startswith("adapt"):
        assert call(monkeypatch, *verb.split(), "--set", "k=[3]") == 0
        assert heard["k"] == [3]
    else:
        assert call(monkeypatch, *verb.split(), "--set", "k=3") == 2
        assert "--set k: expected columns.KEY=COLUMN, such as --set columns.image=img" in capsys.readouterr().err
