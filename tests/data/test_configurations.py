"""A folder as a data set of the Hub: its README.md declares which files are which split."""

import pytest
from made import texts, write, write_csv, write_parquet

from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.recipe import Data

TWO = """configs:
- config_name: en
  data_files: [{split: train, path: en/a.*}, {split: test, path: ['en/b.parquet', '../*']}]
- config_name: fr
  data_dir: fr
"""


def texts_of(folder, split="train", **settings):
    source = open_source(Data(source=str(folder), split=split, **settings))
    return [source.row(i)["text"] for i in range(len(source))], " ".join(source.notes)


@pytest.fixture
def folder(tmp_path):
    write_parquet(tmp_path / "x.parquet", texts(1, 100))
    for n, name in enumerate(["en/a", "en/b", "fr/train", "fr/test", "other/c"]):
        write_parquet(tmp_path / f"set/{name}.parquet", texts(1, n))
    write(tmp_path / "set/README.md", f"---\n{TWO}---\n# Hello\n")
    return tmp_path / "set"


def test_files_are_those_of_the_configuration_and_none_outside_of_the_folder(folder):
    found, said = texts_of(folder, config="en")
    assert found == ["row 0"]
    assert "configuration 'en': train, test; 3 tables that it does not list are left out" in said
    assert texts_of(folder, "test", config="en")[0] == ["row 1"]
    assert [texts_of(folder, split, config="fr")[0] for split in ("train", "test")] == [["row 2"], ["row 3"]]


@pytest.mark.parametrize(
    ("config", "sentence"), [(None, r"several configurations \(en, fr\); name one"), ("de", "no configuration 'de'")]
)
def test_one_of_several_configurations_has_to_be_named(folder, config, sentence):
    with pytest.raises(DataError, match=sentence):
        open_source(Data(source=str(folder), config=config))


@pytest.mark.parametrize("head", ["", "---\nlicense: mit\n---\n", "---\nconfigs: [broken\n---\n"])
def test_without_declared_files_their_names_tell(folder, head):
    write(folder / "README.md", head)
    found, said = texts_of(folder, config="fr")
    assert len(found) == 4
    assert "data.config = fr is not used" in said


def test_declared_files_that_make_no_sense_are_one_sentence(folder):
    write(folder / "README.md", "---\nconfigs: [{data_files: [{split: train}]}]\n---\n")
    with pytest.raises(DataError, match=r"data_files that its README.md declares cannot be read"):
        open_source(Data(source=str(folder)))
    write_csv(folder / "en/a.csv", texts(1))
    write(folder / "README.md", "---\nconfigs: [{data_files: 'en/a.*'}]\n---\n")
    with pytest.raises(DataError, match=r"several kinds as configuration 'default'"):
        open_source(Data(source=str(folder)))
