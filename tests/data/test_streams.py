"""Streams: whoever reads, the rows are the same, every byte is read once, and nothing that was read is read again."""

from __future__ import annotations

import io
import json
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from made import Letters, png, texts, write, write_arrow, write_csv, write_jsonl, write_parquet

from mmssl.data import shared
from mmssl.data.loader import Loader
from mmssl.data.ranges import Ranges
from mmssl.data.shared import Division, SharedStream
from mmssl.data.sources import open_source
from mmssl.data.stream_index import Index
from mmssl.decode_settings import TextDecode
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.recipe import Data
from mmssl.runs import DATA, check_data

ROWS, READERS, BATCH = 320, 8, 16
PER_EPOCH = ROWS // BATCH


def column(n):
    """A text of 1,000 letters, so that rows are what files hold."""
    return f"row {n} ".ljust(1000, "abcdefgh"[n % 8])


def write_tar(path, numbers, missing=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            for extension, content in {"cls": b"%d" % (n % 3), "txt": column(n).encode()}.items():
                if not (extension == "txt" and n in missing):
                    member = tarfile.TarInfo(f"{n:05d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def make_files(kind, folder, files=4, missing=()):
    """ROWS rows in files of a kind."""
    each = ROWS // files
    for number in range(files):
        numbers = range(number * each, (number + 1) * each)
        columns = {"text": [None if n in missing else column(n) for n in numbers], "cls": [n % 3 for n in numbers]}
        path = folder / f"part-{number:03d}.{kind}"
        if kind == "tar":
            write_tar(path, numbers, missing)
        elif kind == "parquet":
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=10, compression="none")
        elif kind == "txt":
            write(path, "\n\n".join(column(n) for n in numbers if n not in missing) + "\n")
        else:
            {"jsonl": write_jsonl, "csv": write_csv, "arrow": write_arrow}[kind](path, columns)
    return folder


KINDS = ("tar", "parquet", "jsonl", "txt", "arrow", "csv")


def spec_of(where, **changes):
    settings = {"source": str(where), "streaming": True, "shuffle_buffer": 40, "readers": READERS, "max_bad": 0.0}
    return Data(**settings | {"text": TextDecode(length=8)} | changes)


def load(where, share=0, shares=1, batch_size=BATCH, directory=None, workers=0, **changes):
    arguments = {"share": share, "shares": shares, "directory": directory, "workers": workers}
    return Loader(
        {"": spec_of(where, **changes)},
        ("text",),
        batch_size=batch_size,
        seed=3,
        tokenizers={"text": Letters()},
        **arguments,
    )


def joined(where, shares, start, stop, **arguments):
    """Batches of the whole batch's rows, out of those of `shares` processes."""
    parts = [list(load(where, share, shares, **arguments).batches(start, stop)) for share in range(shares)]
    return [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def words(batches):
    return ["".join(map(chr, ids)).strip() for batch in batches for ids in batch["text"].tolist()]


@pytest.fixture
def read_bytes(monkeypatch):
    """Ranges of files that were read: name of file, start, stop."""
    found = []

    def counted(self, start, stop, real=Ranges._bytes):
        found.append((self.file, start, stop))
        return real(self, start, stop)

    monkeypatch.setattr(Ranges, "_bytes", counted)
    return found


def size_of(folder, kind):
    """Bytes of the files, of tables those of the column that is read."""
    files = list(folder.iterdir())
    if kind != "parquet":
        return sum(file.stat().st_size for file in files)
    footers = [pyarrow.parquet.read_metadata(file) for file in files]
    groups = [footer.row_group(group) for footer in footers for group in range(footer.num_row_groups)]
    return sum(group.column(0).total_compressed_size for group in groups)


def total(found):
    return sum(stop - start for _, start, stop in found)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_readers_read_what_reading_from_first_to_last_does(kind, tmp_path):
    make_files(kind, tmp_path, missing=() if kind == "csv" else (3, 100, 319))
    source = open_source(spec_of(tmp_path)).select(["text" if kind != "tar" else "txt"])
    stream = SharedStream(source, source.columns, readers=4, batch_size=8, index=Index(None, []))
    assert [row for reader in stream.readers for _, row in reader.read(0)] == list(
        source.present(source.columns).rows()
    )
    if kind != "csv":
        numbered = [number for reader in stream.readers for number, _ in reader.read(0)]
        assert numbered == list(range(stream.rows))
        assert stream.rows == (ROWS if kind == "txt" else ROWS - 3) - 3 * (kind == "txt")
        for reader in stream.readers:
            whole = list(reader.read(0))
            for start in (1, 7, 40, len(whole) - 1):
                assert list(reader.read(start)) == whole[start:]


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_processes_gives_the_same_run(kind, tmp_path):
    make_files(kind, tmp_path)
    stop = 2 * PER_EPOCH + 3
    whole = list(load(tmp_path).batches(0, stop))
    assert sorted(words(whole[:PER_EPOCH])) == sorted(column(n)[:8].strip() for n in range(ROWS))
    assert words(whole[:PER_EPOCH]) != words(whole[PER_EPOCH : 2 * PER_EPOCH])
    for shares in (2, 4):
        assert_equal(joined(tmp_path, shares, 0, stop), whole)
    for start in (3, PER_EPOCH - 1, PER_EPOCH + 4):
        assert_equal(list(load(tmp_path).batches(start, stop)), whole[start:])


@pytest.mark.parametrize("batch_size", [4, 6, 8, 20, 48])
def test_batches_of_any_size_take_turns(batch_size, tmp_path):
    make_files("parquet", tmp_path)
    per_epoch = ROWS // batch_size
    whole = list(load(tmp_path, batch_size=batch_size).batches(0, 2 * per_epoch))
    for epoch in range(2):
        ids = torch.cat([batch["id"] for batch in whole[epoch * per_epoch : (epoch + 1) * per_epoch]])
        assert len(ids.unique()) == per_epoch * batch_size
    assert_equal(joined(tmp_path, 2, 0, 2 * per_epoch, batch_size=batch_size), whole)
    assert_equal(list(load(tmp_path, batch_size=batch_size).batches(5, 2 * per_epoch)), whole[5:])


@pytest.mark.parametrize("rows", [64, 103, 1000])
def test_what_readers_give_is_what_they_have(rows):
    for readers in (1, 4, 6, 16, 64):
        for batch_size in (1, 6, 8, 48, 64):
            division = Division.of(readers, batch_size)
            sizes, steps = division.sizes(rows), division.steps(rows)
            assert sum(sizes) == rows
            assert steps == rows // batch_size
            given = [0] * readers
            for step in range(steps):
                for row in range(batch_size):
                    given[division.reader(step, row)] += 1
                assert given == [division.given(reader, step + 1) for reader in range(readers)]
            assert all(one <= size for one, size in zip(given, sizes, strict=True))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_bytes_of_all_processes_are_the_data_once(kind, tmp_path, read_bytes):
    make_files(kind, tmp_path / "data")
    size = size_of(tmp_path / "data", kind)
    for shares in (1, 2, 4):
        loaders = [load(tmp_path / "data", share, shares) for share in range(shares)]
        read_bytes.clear()
        own = []
        for loader in loaders:
            assert len(list(loader.batches(0, PER_EPOCH))) == PER_EPOCH
            own.append(total(read_bytes))
            read_bytes.clear()
        assert 0.98 * size < sum(own) < 1.02 * size, (shares, own, size)
        assert max(own) < 1.05 * size / shares


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_resuming_goes_where_it_was(kind, tmp_path, read_bytes):
    make_files(kind, tmp_path / "data")
    size = size_of(tmp_path / "data", kind)
    whole = list(load(tmp_path / "data", directory=tmp_path / "run").batches(0, PER_EPOCH))
    read_bytes.clear()
    again = load(tmp_path / "data", directory=tmp_path / "run")
    assert {Path(file).name for file, _, _ in read_bytes} <= {"part-000.tar"}  # its columns; what files hold is known
    read_bytes.clear()
    rest = list(again.batches(PER_EPOCH - 3, PER_EPOCH))
    assert_equal(rest, whole[-3:])
    footers = 4 * 2**16 * (kind == "parquet")
    assert total(read_bytes) < 0.35 * size + footers  # three batches of twenty, in blocks and parts of files


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_run_goes_on_with_workers_and_on_other_numbers_of_processes(kind, tmp_path):
    make_files(kind, tmp_path / "data")
    where, directory = tmp_path / "data", tmp_path / "run"
    whole = list(load(where).batches(0, 24))
    found = list(load(where, directory=directory, workers=2).batches(0, 6))
    found += joined(where, 2, 6, 12, directory=directory, workers=1)
    found += joined(where, 4, 12, 18, directory=directory)
    found += list(load(where, directory=directory, workers=1).batches(18, 24))
    assert_equal(found, whole)


def test_what_cannot_be_shared_is_refused_or_said(tmp_path):
    make_files("parquet", tmp_path)
    with pytest.raises(RecipeError, match=r"8 readers cannot be divided among 16 processes; choose data.readers"):
        load(tmp_path, shares=16)
    with pytest.raises(RecipeError, match=r"4 readers .* among 8 processes \(4 readers in place of .* has 4 files\)"):
        load(make_files("csv", tmp_path / "csv"), shares=8)
    few = write_parquet(tmp_path / "few" / "train.parquet", texts(40))
    loader = load(few, readers=64)
    assert "  2 readers in place of data.readers = 64, for" in "\n".join(loader.found())
    assert "a stream of 40 rows for 2 readers" in loader.found()[0]
    assert loader.digests()[""].startswith("a stream of 40 rows for 2 readers, ")  # runs of other ones are refused
    with pytest.raises(DataError, match="has 40 usable rows, fewer than the batch of 41"):
        load(few, batch_size=41)
    with pytest.raises(DataError, match="has 80 usable rows for one of its readers, fewer than it gives a batch"):
        list(load(tmp_path / "csv", batch_size=4 * 81, readers=4).batches(0, 1))
    empty = write_parquet(tmp_path / "empty" / "train.parquet", {"text": [None] * 20})
    with pytest.raises(DataError, match="has no row with text"):
        load(empty)


def test_a_limit_cuts_a_stream(tmp_path):
    make_files("jsonl", tmp_path)
    loader = load(tmp_path, limit=100)
    assert loader.steps_per_epoch == 6
    ids = torch.cat([batch["id"] for batch in loader.batches(0, 6)])
    assert set(ids.tolist()) <= set(range(100))
    assert len(set(ids.tolist())) == 96
    csv = load(make_files("csv", tmp_path / "csv"), limit=100)
    assert set(torch.cat([batch["id"] for batch in csv.batches(0, 20)]).tolist()) <= set(range(100))


def test_a_file_that_changed_since_it_was_looked_through_is_refused(tmp_path):
    make_files("tar", tmp_path)
    loader = load(tmp_path)
    write_tar(tmp_path / "part-003.tar", range(240, 260))
    with pytest.raises(DataError, match=r"part-003\.tar ended after 20 rows, it had 80 before|cannot be read"):
        list(loader.batches(0, PER_EPOCH))


def test_an_index_forgets_files_that_changed_and_lines_that_broke_off(tmp_path):
    file, path = write(tmp_path / "a.tar", "one"), tmp_path / "streams.jsonl"
    index = Index(path, ["text"])
    index.keep(str(file), 10, [(0, 0), (5, 512)])
    index.learn("http://server/b.tar", 250, 9)
    index.learn("http://server/b.tar", 251, 10)  # near the other
    index.end("http://server/b.tar", 400)
    with path.open("a") as broken:
        broken.write('{"file": "http://server/b.tar", "row"')
    again = Index(path, ["text"])
    assert again[str(file)].places == [(0, 0), (5, 512)]
    assert again[str(file)].found
    assert again["http://server/b.tar"].places == [(0, 0), (250, 9)]
    assert again["http://server/b.tar"].rows == 400
    assert not again["http://server/b.tar"].found
    assert Index(path, ["image"])[str(file)].rows is None
    write(file, "another")
    assert Index(path, ["text"])[str(file)].rows is None


def test_members_of_long_names_and_folders_are_found(tmp_path, monkeypatch):
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            folder = tarfile.TarInfo("set")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for n in range(40):
                name = f"set/{'x' * (150 if n % 2 else 3)}{n:03d}"
                for extension, content in {"png": png(n), "txt": b"row %d" % n}.items():
                    member = tarfile.TarInfo(f"{name}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        source = open_source(spec_of(tmp_path / "a.tar")).select(["png", "txt"])
        monkeypatch.setattr(shared, "FEWEST_ROWS", 1)
        stream = SharedStream(source, source.columns, readers=8, batch_size=8, index=Index(None, []))
        rows = [
            row["txt"]
            for reader in stream.readers
            for start in (0, 3)
            for _, row in islice(reader.read(start), 3, None)
        ]
        expected = [f"row {n}" for part in range(8) for n in (*range(5 * part + 3, 5 * part + 5),)]
        assert rows == expected


def test_classes_stay_what_they_are_in_every_part(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "kind": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(64)], "kind": [n % 2 for n in range(64)]})
    data.cast(features).to_parquet(tmp_path / "train.parquet", batch_size=10)
    spec = spec_of(tmp_path, columns={"label": "kind"}, readers=4)
    loader = Loader({"": spec}, ("text", "label"), batch_size=8, seed=0, tokenizers={"text": Letters()})
    for batch in loader.batches(0, 8):
        assert torch.equal(batch["label"], batch["id"] % 2)


def test_streams_of_the_run_are_kept_beside_it(tmp_path):
    make_files("jsonl", tmp_path / "data")
    load(tmp_path / "data", directory=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "streams.jsonl").read_text().splitlines()]
    assert sum(record["rows"] for record in records) == ROWS


def test_runs_that_read_the_stream_otherwise_are_refused(tmp_path):
    make_files("parquet", tmp_path / "data")
    (tmp_path / DATA).write_text(json.dumps(load(tmp_path / "data").digests()))
    check_data(tmp_path, load(tmp_path / "data").digests())
    with pytest.raises(
        RunError, match="it has a stream of 320 rows for 4 readers and had a stream of 320 rows for 8 r"
    ):
        check_data(tmp_path, load(tmp_path / "data", readers=4).digests())
    (tmp_path / DATA).write_text(json.dumps({"": "a stream, 0123456789abcdef"}))  # of the time before readers
    with pytest.raises(RunError, match="it has a stream of 320 rows for 8 readers and had a stream;"):
        check_data(tmp_path, load(tmp_path / "data").digests())


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    {
        "cut in a header": ("tar", lambda path: cut(path, 6 * 2560 + 30), "breaks off within a header"),
        "cut in a member": ("tar", lambda path: cut(path, 6 * 2560 + 1600), "unexpected end of data"),
        "no byte in a tar": ("tar", lambda path: cut(path, 0), "empty file"),
        "cut parquet": ("parquet", lambda path: cut(path, 1000), "magic bytes"),
        "a column less": ("parquet", lambda path: write_parquet(path, {"cls": [1, 2]}), "has no column 'text', which"),
        "a cut line": ("jsonl", lambda path: cut(path, 1100), "JSON parse error"),
    }.values(),
)
def test_a_file_of_a_stream_that_is_damaged_is_named(kind, spoil, message, tmp_path):
    make_files(kind, tmp_path)
    spoil(tmp_path / f"part-002.{kind}")
    with pytest.raises(DataError, match=rf"part-002\.{kind}.*{message}"):
        list(load(tmp_path).batches(0, PER_EPOCH))


def test_a_first_shard_without_samples_is_passed_over(tmp_path):
    make_files("tar", tmp_path)
    write_tar(tmp_path / "part-000.tar", ())
    assert load(tmp_path).steps_per_epoch == PER_EPOCH * 3 // 4


def test_a_first_table_whose_column_is_empty_is_told(tmp_path):
    make_files("parquet", tmp_path)
    write_parquet(tmp_path / "part-000.parquet", {"text": [None] * 4, "cls": [1] * 4})
    with pytest.raises(DataError, match=r"part-001\.parquet: cannot be read: the first file has no value in a column"):
        list(load(tmp_path).batches(0, PER_EPOCH))
