"""Streams from a server: ranges of files are asked for once, and failing answers are waited for, with a limit."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
from test_streams import BATCH, PER_EPOCH, ROWS, assert_equal, joined, load, make_files, size_of

from mmssl.data import ranges
from mmssl.data.sources import open_source
from mmssl.errors import DataError
from mmssl.recipe import Data


class Answers(BaseHTTPRequestHandler):
    """Files below a folder, by ranges; what `server.faults` holds comes before a good answer.

    `server.refusals` holds statuses for some paths, whatever is asked, of which the last one stays; 0 refuses nothing,
    and 302 refers to the same path again.
    Of paths in `server.halves` one answer breaks off.
    """

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        refusal = self.server.refusals.get(self.path)
        status = refusal.pop(0) if refusal and len(refusal) > 1 else (refusal or [0])[0]
        if status == 302:
            self.server.asked.append((self.path, 0, 0))
            self.send_response(status)
            self.send_header("Location", self.path)
            self.end_headers()
            return
        if status:
            self.send_error(status)
            return
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        fault = self.server.faults.pop(0) if body and asked and self.server.faults else None
        if isinstance(fault, int):
            self.send_error(fault)
            return
        if fault == "slow":
            time.sleep(1)
        start, stop = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        part = content[start:stop]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
        self.end_headers()
        if body:
            self.server.asked.append((self.path, start, len(part)))
            broken = fault == "broken" or self.server.halves.pop(self.path, False)
            self.wfile.write(part[: len(part) // 2] if broken else part)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "FIRST_WAIT", 0.01)
    monkeypatch.setattr("datasets.config.STREAMING_READ_RETRY_INTERVAL", 0.01)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.folder, server.faults, server.asked = tmp_path / "files", [], []
    server.refusals, server.halves = {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def address(server, kind, files=8):
    return f"http://127.0.0.1:{server.server_port}/part-{{000..{files - 1:03d}}}.{kind}"


def sent(server):
    return sum(size for _, _, size in server.asked)


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_at_addresses_are_those_on_disk(kind, server):
    make_files(kind, server.folder, files=8)
    here = list(load(server.folder).batches(0, PER_EPOCH))
    for shares in (1, 4):
        there = joined(address(server, kind), shares, 0, PER_EPOCH)
        assert [sorted(batch["text"].tolist()) for batch in there] == [sorted(b["text"].tolist()) for b in here]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_every_byte_is_asked_for_once_an_epoch_and_none_before_the_step_again(kind, server, tmp_path):
    make_files(kind, server.folder, files=8)
    size = size_of(server.folder, kind)
    for shares in (1, 2, 4):
        loaders = [load(address(server, kind), share, shares, directory=tmp_path / "run") for share in range(shares)]
        server.asked.clear()
        whole = [list(loader.batches(0, PER_EPOCH)) for loader in loaders]
        slack = 8 * 2**16 * (kind == "parquet" and shares > 1)  # footers, where looking through is another's
        assert 0.98 * size < sent(server) < 1.02 * size + slack
    server.asked.clear()
    rest = list(load(address(server, kind), 3, 4, directory=tmp_path / "run").batches(PER_EPOCH - 3, PER_EPOCH))
    assert_equal(rest, whole[3][-3:])
    heads = [size for path, start, size in server.asked if start == 0 and path.endswith("000.tar")]
    ours = {"/part-006.tar", "/part-007.tar"}
    if kind == "tar":  # the first shard is opened for its columns, before any reader
        assert {path for path, start, _ in server.asked if start} <= ours
        assert len(heads) <= 2


@pytest.mark.long
def test_an_index_of_webdataset_tells_how_many_rows_there_are(server):
    make_files("tar", server.folder, files=8)
    assert load(address(server, "tar")).steps_per_epoch is None
    shards = [{"url": f"part-{n:03d}.tar", "nsamples": ROWS // 8} for n in range(8)]
    (server.folder / "index.json").write_text(json.dumps({"wids_version": 1, "shardlist": shards}))
    loader = load(address(server, "tar"))
    assert loader.steps_per_epoch == PER_EPOCH
    assert sorted(i for batch in loader.batches(0, PER_EPOCH) for i in batch["id"].tolist()) == list(range(ROWS))
    (server.folder / "index.json").unlink()
    (server.folder / "sizes.json").write_text(json.dumps({f"part-{n:03d}.tar": ROWS // 8 + 2 for n in range(8)}))
    with pytest.raises(DataError, match=r"part-00\d\.tar ended after 40 rows, it had 42 before"):
        list(load(address(server, "tar")).batches(0, PER_EPOCH + 1))


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_the_run_waits_for_a_server_that_fails_and_says_so(kind, server, caplog):
    make_files(kind, server.folder, files=8)
    expected = list(load(address(server, kind)).batches(0, PER_EPOCH))
    loader = load(address(server, kind))
    server.faults += [503, "broken", 500, "slow", 429, "broken"]
    assert_equal(list(loader.batches(0, PER_EPOCH)), expected)
    assert not server.faults
    said = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert any("of 8" in line and f"127.0.0.1:{server.server_port}/part-" in line for line in said)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_rows_in_order_wait_for_a_server_that_breaks_off(kind, server):
    make_files(kind, server.folder, files=2)
    given = Data(source=address(server, kind, files=2), streaming=True)
    expected = [row["cls"] for row in open_source(given).rows()]
    source = open_source(given)
    server.halves |= {f"/part-001.{kind}": True}
    assert list(source.values("cls")) == expected
    assert not server.halves
    server.refusals |= {f"/part-001.{kind}": [503]}
    with pytest.raises(DataError, match="the server failed 8 times in a row"):
        list(source.values("cls"))


@pytest.mark.long
def test_a_server_that_goes_on_failing_ends_the_run_in_one_sentence(server):
    make_files("parquet", server.folder, files=8)
    loader = load(address(server, "parquet"))
    batches = loader.batches(0, PER_EPOCH)
    next(batches)
    server.faults += [503] * 1000
    with pytest.raises(
        DataError, match=r"part-\d+.parquet: the server failed 8 times in a row .*503.* --resume"
    ) as error:
        list(batches)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_references_without_end_are_one_sentence_and_not_tried_again(server, caplog, streaming, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    server.refusals["/a.csv"] = [302]
    source = f"http://127.0.0.1:{server.server_port}/a.csv"
    says = r"a\.csv: .*the server refers from one address to the next without end; give that of the file itself$"
    with pytest.raises(DataError, match=says):
        open_source(Data(source=source, streaming=streaming))
    assert not caplog.messages


@pytest.mark.long
def test_a_server_that_falls_silent_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(ranges, "SILENCE", 0.3)
    make_files("parquet", server.folder, files=8)
    loader = load(address(server, "parquet"))
    server.faults += ["slow"] * 3
    assert len(list(loader.batches(0, BATCH))) == BATCH


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_server_that_fails_while_a_stream_is_opened_is_asked_again(kind, server):
    make_files(kind, server.folder, files=8)
    expected = list(load(address(server, kind)).batches(0, 2))
    server.refusals |= {f"/part-000.{kind}": [503, 0], f"/part-003.{kind}": [500, 500, 0]}
    assert_equal(list(load(address(server, kind)).batches(0, 2)), expected)


@pytest.mark.parametrize(("number", "status"), [("000", 403), ("003", 404)])
@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_server_that_refuses_is_one_sentence_with_what_it_answers(kind, number, status, server):
    make_files(kind, server.folder, files=8)
    server.refusals[f"/part-{number}.{kind}"] = [status]
    with pytest.raises(DataError, match=rf"part-{number}\.{kind}: the server answers {status} "):
        load(address(server, kind))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_an_address_that_is_no_longer_valid_midway_is_one_sentence(kind, server):
    make_files(kind, server.folder, files=8)
    server.refusals["/index.json"] = [403]  # of a store that does not say what it lacks
    batches = load(address(server, kind)).batches(0, PER_EPOCH)
    server.refusals |= {f"/part-{number:03d}.{kind}": [403] for number in range(8)}
    with pytest.raises(DataError, match=rf"part-\d+\.{kind}: cannot be read: the server answers 403 Forbidden"):
        list(batches)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_download_that_breaks_off_is_made_again(kind, server, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for place in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(f"datasets.config.{place}", tmp_path / place)
    make_files(kind, server.folder, files=2)
    seen = Counter()

    def once(*arguments, real=datasets.DownloadManager.download, **keywords):
        server.halves |= {f"/part-001.{kind}": True} if not seen[kind] else {}
        seen[kind] += 1
        return real(*arguments, **keywords)

    monkeypatch.setattr(datasets.DownloadManager, "download", once)
    assert len(open_source(Data(source=address(server, kind, files=2)))) == ROWS
    assert seen[kind] > 1
