"""A batch is a function of (seed, step, row of the global batch), whatever workers, processes and resumption do."""

from __future__ import annotations

import io
import json
import wave

import pytest
import torch
from made import Letters, png, texts, wav, write, write_parquet
from PIL import Image

from mmssl.data import decoding
from mmssl.data.columns import Decoder
from mmssl.data.loader import Loader, read
from mmssl.decode_settings import AudioDecode, ImageDecode, TextDecode
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import Data

ROWS, BATCH, BLOCK = 103, 8, 20
PER_EPOCH = ROWS // BATCH
KINDS = ("map", "stream")


def make_spec(where, kind="map", **changes):
    settings = {
        "source": str(where),
        "streaming": kind == "stream",
        "shuffle_buffer": BLOCK,
        "readers": 4,
        "text": TextDecode(length=8),
        "image": ImageDecode(size=4),
        "audio": AudioDecode(rate=8000, seconds=0.05),
        "max_bad": 0.2,
    }
    return Data(**settings | changes)


def make(spec, needs=("text",), batch_size=BATCH, seed=1, **arguments):
    return Loader({"": spec}, needs, batch_size=batch_size, seed=seed, tokenizers={"text": Letters()}, **arguments)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


def ids_of(batches):
    return torch.cat([batch["id"] for batch in batches])


def letters(batch):
    return ["".join(map(chr, ids)).strip("\0") for ids in batch["text"].tolist()]


@pytest.fixture
def rows(tmp_path):
    """Pictures of which every 17th is broken, texts, and ramps as sounds whose first sample tells the window."""
    columns = texts(ROWS) | {
        "image": [{"bytes": b"broken" if n % 17 == 5 else png(n), "path": None} for n in range(ROWS)],
        "audio": [{"bytes": wav(n / ROWS, samples=300 + 10 * n), "path": None} for n in range(ROWS)],
    }
    return write_parquet(tmp_path / "data" / "train.parquet", columns)


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_is_a_new_permutation_without_repetition(rows, kind):
    ids = [ids_of(make(make_spec(rows, kind)).batches(e * PER_EPOCH, (e + 1) * PER_EPOCH)) for e in range(3)]
    for epoch in ids:
        assert len(set(epoch.tolist())) == PER_EPOCH * BATCH
        assert not torch.equal(epoch, epoch.sort().values)
    assert not torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[1], ids[2])
    assert not torch.equal(ids[0], ids_of(make(make_spec(rows, kind), seed=2).batches(0, PER_EPOCH)))


def parts_of_readers(readers=4):
    """Numbers of the rows of each: consecutive, and equally many to one."""
    sizes = [ROWS // readers + (reader < ROWS % readers) for reader in range(readers)]
    return [range(sum(sizes[:reader]), sum(sizes[: reader + 1])) for reader in range(readers)]


def test_a_stream_is_permuted_in_blocks_of_each_reader(rows):
    parts, length = parts_of_readers(), BLOCK // 4
    for epoch in range(2):
        ids = ids_of(make(make_spec(rows, "stream")).batches(epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH))
        given = ids.view(PER_EPOCH, 4, 2).transpose(0, 1).flatten(1).tolist()  # two rows of each batch are a reader's
        for part, own in zip(parts, given, strict=True):
            blocks = [own[start : start + length] for start in range(0, len(own), length)]
            for number, block in enumerate(blocks[:-1]):
                assert sorted(block) == list(part[number * length : (number + 1) * length])
        assert any(block != sorted(block) for block in blocks)
        within = [
            [row - start for row in own[:length]] for own, start in zip(given, (p[0] for p in parts), strict=True)
        ]
        assert within[0] != within[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_carries_its_own_content(rows, kind):
    for batch in make(make_spec(rows, kind)).batches(0, 2 * PER_EPOCH):
        assert letters(batch) == [f"row {n}" for n in batch["id"].tolist()]


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_resumption_changes_nothing(rows, kind):
    needs = ("image", "text")
    stop = 2 * PER_EPOCH + 2
    whole = list(make(make_spec(rows, kind), needs).batches(0, stop))
    for start in (5, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 3, stop - 1):
        assert_equal(list(make(make_spec(rows, kind), needs).batches(start, stop)), whole[start:])
    again = make(make_spec(rows, kind), needs)
    live = again.batches(0, stop)
    first = [next(live) for _ in range(4)]
    assert_equal(list(again.batches(2, 6)), whole[2:6])  # a second reading does not disturb the first
    assert_equal(first + list(live), whole)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", KINDS)
def test_processes_share_the_batch(rows, kind):
    needs = ("image", "text", "audio")
    whole = list(make(make_spec(rows, kind), needs).batches(0, PER_EPOCH + 2))
    for shares in (2, 4):
        parts = [
            list(make(make_spec(rows, kind), needs, share=share, shares=shares).batches(0, PER_EPOCH + 2))
            for share in range(shares)
        ]
        joined = [
            {key: torch.cat([part[key] for part in step]) for key in step[0]} for step in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(rows, tmp_path, kind):
    needs = ("image", "text", "audio")
    runs = []
    for workers in (0, 2):
        directory = tmp_path / str(workers)
        loader = make(make_spec(rows, kind), needs, workers=workers, directory=directory)
        runs.append((list(loader.batches(3, PER_EPOCH + 4)), (directory / "errors.jsonl").read_text()))
    assert_equal(runs[1][0], runs[0][0])
    assert runs[1][1] == runs[0][1]


def test_windows_are_drawn_per_row_and_step(rows):
    # A ramp for a sound: its first sample is where the window begins.
    columns = {"audio": [{"bytes": sound(torch.arange(4000) / 4000), "path": None}] * 16}
    spec = make_spec(write_parquet(rows.parent / "ramps" / "a.parquet", columns))
    batches = list(make(spec, ("audio",)).batches(0, 4))
    assert len(set(torch.cat([batch["audio"][:, 0] for batch in batches]).tolist())) == 32
    assert_equal(list(make(spec, ("audio",)).batches(2, 4)), batches[2:])
    halves = [make(spec, ("audio",), share=share, shares=2).batches(0, 4) for share in range(2)]
    for whole, *parts in zip(batches, *halves, strict=True):
        assert torch.equal(torch.cat([part["audio"] for part in parts]), whole["audio"])
    for start, expected in (("first", 0.0), ("middle", 0.45)):
        changed = spec.model_copy(update={"start": start})
        for batch in (*make(changed, ("audio",)).batches(0, 1), *read(changed, ["audio"])):
            assert torch.allclose(batch["audio"][:, 0], torch.tensor(expected), atol=1e-3)


def sound(samples):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((samples * 32767).short().numpy().tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_an_undecodable_row_is_replaced_by_the_next_and_written_down(rows, tmp_path, kind):
    errors = tmp_path / "run" / "errors.jsonl"
    plain = list(make(make_spec(rows, kind)).batches(0, PER_EPOCH))
    batches = list(make(make_spec(rows, kind), ("image",), directory=errors.parent).batches(0, PER_EPOCH))
    ends = {part[start : start + 5][-1]: part[start] for part in parts_of_readers() for start in range(0, len(part), 5)}
    lost = []
    for step, (before, batch) in enumerate(zip(plain, batches, strict=True)):
        for was, now in zip(before["id"].tolist(), batch["id"].tolist(), strict=True):
            if was % 17 == 5:
                # The next in the table, the next in the block of the reader.
                assert now == (ends[was] if kind == "stream" and was in ends else was + 1)
                lost.append((step + 1, was))  # steps are counted from 1, as in the records
            else:
                assert now == was
        assert (batch["image"] == batch["id"][:, None, None, None]).all()
    records = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [(record["step"], record["id"]) for record in records] == lost
    assert all(record["source"] == str(rows) and "image" in record["reason"] for record in records)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_undecodable_rows_stop_the_run(rows, tmp_path, kind, workers):
    columns = {"image": [{"bytes": b"broken", "path": None}] * ROWS}
    path = write_parquet(tmp_path / "bad" / "train.parquet", columns)
    errors = tmp_path / "errors.jsonl"
    loader = make(make_spec(path, kind), ("image",), batch_size=20, directory=tmp_path, workers=workers)
    with pytest.raises(DataError) as error:
        list(loader.batches(0, 5))
    words = str(error.value)
    assert words.startswith(f"{path}: none of 20 rows can be decoded: row ")
    assert words.count("row ") == 3
    assert words.endswith(f"all of them are in {errors}")
    assert len(errors.read_text().splitlines()) == 20
    # Nor is there a way around it by allowing everything.
    with pytest.raises(DataError, match="cannot be decoded, nor can those after it"):
        list(make(make_spec(path, kind, max_bad=1.0), ("image",)).batches(0, 1))


def test_the_share_that_is_allowed_is_allowed(rows):
    # 6 of 103 are broken.
    with pytest.raises(DataError, match=r"more than data.max_bad = 0\.0:"):
        list(make(make_spec(rows, max_bad=0.0), ("image",)).batches(0, PER_EPOCH))
    list(make(make_spec(rows, max_bad=0.03), ("image",)).batches(0, 20 * PER_EPOCH))
    with pytest.raises(DataError, match=r"more than data.max_bad = 0\.01:"):
        list(make(make_spec(rows, max_bad=0.01), ("image",)).batches(0, 20 * PER_EPOCH))


def test_rows_without_a_needed_cell_are_left_out_of_a_table(tmp_path, caplog):
    columns = texts(20) | {"image": [None if n % 2 else {"bytes": png(n), "path": None} for n in range(20)]}
    path = write_parquet(tmp_path / "a.parquet", columns)
    ids = ids_of(make(make_spec(path), ("image",), batch_size=5).batches(0, 2))
    assert sorted(ids.tolist()) == list(range(0, 20, 2))
    assert "10 of 20 rows have no image and are left out" in caplog.text
    assert ids_of(read(make_spec(path), ["image"])).tolist() == list(range(0, 20, 2))
    assert len(ids_of(make(make_spec(path)).batches(0, 2))) == 16
    nothing = write_parquet(tmp_path / "b.parquet", {"image": [None] * 3})
    with pytest.raises(DataError, match="has no row with image"):
        make(make_spec(nothing), ("image",))


def test_several_sources_keep_to_themselves(rows, tmp_path):
    other = write_parquet(tmp_path / "other" / "train.parquet", texts(50, first=500))
    specs = {"a": make_spec(rows), "b": make_spec(other, "stream"), "c": make_spec(rows)}
    needs = ("a/text", "b/text", "b/text_mask", "b/id", "c/image")
    loader = Loader(specs, needs, batch_size=BATCH, seed=1, tokenizers={"text": Letters()})
    batches = list(loader.batches(0, 9))
    assert set(batches[0]) == {"a/id", "a/text", "a/text_mask", "b/id", "b/text", "b/text_mask", "c/id", "c/image"}
    assert all(
        letters({"text": batch["b/text"]}) == [f"row {500 + n}" for n in batch["b/id"].tolist()] for batch in batches
    )
    assert not torch.equal(batches[0]["a/id"], batches[0]["c/id"])
    assert loader.steps_per_epoch == PER_EPOCH
    for needs, words in (
        (("a/text", "b/text"), "data.c: nothing is needed of this source"),
        (("a/text", "b/text", "cc/text"), r"'cc/text' is needed, and data has no source of that name"),
        (("text",), "'text' is needed, and data has no source of that name"),
    ):
        with pytest.raises(RecipeError, match=words):
            Loader(specs, needs, batch_size=BATCH, seed=1, tokenizers={"text": Letters()})


@pytest.mark.parametrize("name", ["", "pairs"])
def test_squeezed_pictures_come_with_their_aspect(tmp_path, name):
    def cell(n):
        stream = io.BytesIO()
        Image.new("RGB", (4 + n, 8)).save(stream, "png")
        return {"bytes": b"broken" if n == 3 else stream.getvalue(), "path": None}

    where = write_parquet(tmp_path / "data" / "train.parquet", {"image": [cell(n) for n in range(30)]})
    spec, prefix = make_spec(where, image=ImageDecode(size=6, fit="squeeze")), f"{name}/" if name else ""
    loader = Loader({name: spec}, (f"{prefix}image",), batch_size=6, seed=0)
    for batch in loader.batches(0, 5):
        ids, aspect = batch[f"{prefix}id"], batch[f"{prefix}image_aspect"]
        assert batch[f"{prefix}image"].shape == (6, 3, 6, 6)
        assert aspect.dtype == torch.float32
        torch.testing.assert_close(aspect, (4 + ids) / 8)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_class_numbers(rows, kind):
    for batch in make(make_spec(rows, kind, columns={"label": "kind"}), ("text", "label")).batches(0, 3):
        assert torch.equal(batch["label"], batch["id"] % 3)
    with pytest.raises(DataError, match=r"no column 'label'.*data\.columns\.label"):
        make(make_spec(rows, kind), ("text", "label"))


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_rows_are_refused(rows, kind):
    with pytest.raises(
        DataError,
        match=r"has 103 usable rows, fewer than the batch of 104; .*\(--set .*=103\)$",
    ):
        list(make(make_spec(rows, kind), batch_size=104).batches(0, 1))
    with pytest.raises(RecipeError, match="a batch of 8 rows cannot be divided among 3 processes"):
        make(make_spec(rows, kind), shares=3)
    assert len(list(make(make_spec(rows, kind), batch_size=103).batches(0, 3))) == 3


def test_a_missing_column_is_found_when_built(rows):
    with pytest.raises(DataError, match=r"no column 'video'.*it has: text, kind, image, audio"):
        make(make_spec(rows), ("video",))


def test_global_random_numbers_are_left_alone(rows):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    list(make(make_spec(rows), ("audio",)).batches(0, 2))
    assert torch.equal(torch.rand(3), expected)


class Counting(Letters):
    calls = 0

    def __call__(self, text, length):
        type(self).calls += 1
        return super().__call__(text, length)


def test_a_small_source_is_decoded_once(rows, monkeypatch):
    Counting.calls = 0
    loader = Loader({"": make_spec(rows)}, ("text",), batch_size=BATCH, seed=1, tokenizers={"text": Counting()})
    batches = list(loader.batches(0, 5 * PER_EPOCH))
    assert Counting.calls <= ROWS
    batches[0]["text"].zero_()  # what a task does to its batch stays there
    again = list(loader.batches(0, 5 * PER_EPOCH))
    assert letters(again[0]) == [f"row {n}" for n in again[0]["id"].tolist()]
    monkeypatch.setattr(decoding, "KEPT_BYTES", 1000)
    Counting.calls = 0
    loader = Loader({"": make_spec(rows)}, ("text",), batch_size=BATCH, seed=1, tokenizers={"text": Counting()})
    assert_equal(list(loader.batches(0, 5 * PER_EPOCH)), again)
    assert Counting.calls == 5 * PER_EPOCH * BATCH


def test_rows_that_say_what_they_are_are_decoded_once_for_all_who_read_them(monkeypatch):
    calls, decode = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, *args: calls.append(args) or decode(self, *args))
    decoding.SHARED.clear()
    spec = Data(source="toy", limit=7, image=ImageDecode(size=17))
    (first,) = read(spec, ["image"])
    kept = first["image"].clone()
    first["image"].zero_()  # what a reader does to its batch stays there
    (again,) = read(spec.model_copy(update={"limit": 9}), ["image"])
    assert torch.equal(again["image"][:7], kept)
    assert len(calls) == 9
    for other in ({"image": ImageDecode(size=16)}, {"split": "test"}):  # other pixels
        (batch,) = read(spec.model_copy(update=other), ["image"])
        assert batch["image"].shape != kept.shape or not torch.equal(batch["image"], kept)
    assert len(calls) == 23


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_read_gives_every_row_once(rows, kind, workers, caplog):
    tokenizers = {"text": Letters()}
    batches = list(
        read(
            make_spec(rows, kind),
            ["image", "text"],
            label="kind",
            tokenizers=tokenizers,
            batch_size=20,
            workers=workers,
        )
    )
    assert ids_of(batches).tolist() == [n for n in range(ROWS) if n % 17 != 5]
    assert len(batches) == 6
    for batch in batches:
        assert torch.equal(batch["label"], batch["id"] % 3)
        assert letters(batch) == [f"row {n}" for n in batch["id"].tolist()]
        assert (batch["image"] == batch["id"][:, None, None, None]).all()
    assert "6 undecodable rows left out: row 5: " in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_read_checks_before_it_decodes(rows, kind):
    spec = make_spec(rows, kind)
    classes = torch.cat([batch["label"] for batch in read(spec, [], label="kind", classes=("c", "b", "a"))])
    assert torch.equal(classes, 2 - torch.arange(ROWS) % 3)
    with pytest.raises(DataError, match="label 'c' in column 'kind' is none of the classes given"):
        read(spec, ["text"], label="kind", classes=("a", "b"), tokenizers={"text": Letters()})
    with pytest.raises(DataError, match="no column 'knd' for the label"):
        read(spec, [], label="knd")
    with pytest.raises(DataError, match=r"6 of \d+ rows cannot be decoded"):
        list(read(make_spec(rows, kind, max_bad=0.0), ["image"]))


def test_a_folder_of_pictures(tmp_path):
    for n in range(12):
        write(tmp_path / "ab"[n % 2] / f"{n:02d}.png", png(n))
    batches = list(make(make_spec(tmp_path), ("image", "label"), batch_size=6).batches(0, 2))
    assert sorted(ids_of(batches).tolist()) == list(range(12))
    for batch in batches:
        assert torch.equal(batch["image"][:, 0, 0, 0] % 2, batch["label"])
