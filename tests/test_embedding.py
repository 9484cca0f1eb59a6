"""Features of a source in a file: those of the encoder, row by row beside the columns, whole or not there at all."""

import shutil
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

import mmssl
from mmssl import embedding, parts
from mmssl.errors import DataError, RecipeError, RunError
from mmssl.way_on import way_on

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **VIT).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 pictures in two classes, of which the fourth of each cannot be decoded."""
    root = tmp_path_factory.mktemp("embed") / "pictures"
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(10):
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    (root / "dog" / "3.png").write_bytes(b"\x89PNG no more")
    return root


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "BATCHES", 2)


def test_rows_are_those_of_the_encoder(encoder, folder, tmp_path, small_parts):
    file = mmssl.embed(encoder, folder, tmp_path / "x.parquet", batch_size=3)
    table = pyarrow.parquet.read_table(file).to_pydict()
    assert list(table) == ["id", "image", "label", "features"]
    assert table["id"] == [i for i in range(20) if i != 13]
    assert table["label"] == ["cat"] * 10 + ["dog"] * 9
    with torch.no_grad():
        expected = encoder(encoder.read(table["image"])).pooled
    torch.testing.assert_close(torch.tensor(table["features"]), expected, atol=1e-5, rtol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]


def test_rows_that_cannot_be_decoded_are_left_out_however_many(encoder, folder, tmp_path, caplog):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    for number in range(8):
        (mixed / "cat" / f"broken_{number}.png").write_bytes(b"\x89PNG no more")
    file = mmssl.embed(encoder, mixed, tmp_path / "x.parquet")
    assert len(pyarrow.parquet.read_table(file)) == 19
    assert "9 undecodable rows left out: row 10: " in caplog.text
    shutil.rmtree(mixed / "dog")
    for path in (mixed / "cat").glob("?.png"):
        path.unlink()
    with pytest.raises(DataError, match="none of 8 can be decoded"):
        mmssl.embed(encoder, mixed, tmp_path / "y.parquet")
    assert not list(tmp_path.glob("y*"))


def test_npz_holds_the_same_without_objects(encoder, folder, tmp_path, small_parts):
    data = datasets.Dataset.from_dict(
        {
            "image": [str(path) for path in sorted(folder.rglob("*.png")) if path.name != "3.png"],
            "features": [f"row {'x' * i}" for i in range(18)],
            "number": [None if i == 0 else i for i in range(18)],
            "many": [[i, i] for i in range(18)],
            "kind": [i % 2 for i in range(17)] + [-1],
        },
        features=datasets.Features(
            image=datasets.Value("string"),
            features=datasets.Value("string"),
            number=datasets.Value("int64"),
            many=datasets.Sequence(datasets.Value("int64")),
            kind=datasets.ClassLabel(names=["odd", "even"]),
        ),
    )
    files = [mmssl.embed(encoder, data, tmp_path / name, batch_size=4) for name in ("x.npz", "x.parquet")]
    with np.load(files[0]) as archive:
        arrays = dict(archive)
    table = pyarrow.parquet.read_table(files[1]).to_pydict()
    assert list(arrays) == list(table) == ["id", "image", "features_", "number", "many", "kind", "features"]
    assert arrays["features"].dtype == np.float32
    assert np.array_equal(arrays["features"], np.array(table["features"], dtype=np.float32))
    assert arrays["features_"].tolist() == table["features_"] == data["features"][:]
    assert np.isnan(arrays["number"][0])
    assert arrays["number"][1:].tolist() == table["number"][1:]
    assert arrays["many"][2] == "[2, 2]"
    assert table["kind"][-2:] == ["odd", None]
    assert arrays["kind"][-2:].tolist() == ["odd", ""]


def test_a_layer_a_limit_and_a_stream(encoder, folder, tmp_path):
    file = mmssl.embed(encoder, folder, tmp_path / "x.parquet", layer="blocks.0", limit=4)
    table = pyarrow.parquet.read_table(file).to_pydict()
    assert table["id"] == [0, 5, 10, 15]
    with torch.no_grad():
        expected = encoder.layers(*encoder.read(table["image"]))["blocks.0"].pooled
    torch.testing.assert_close(torch.tensor(table["features"]), expected, atol=1e-5, rtol=1e-5)
    paths = [str(path) for path in sorted(folder.rglob("*.png"))]
    stream = datasets.Dataset.from_dict({"image": [*paths[:3], None, *paths[3:8]], "n": [*range(9)]})
    file = mmssl.embed(encoder, stream.to_iterable_dataset(), tmp_path / "s.parquet", limit=6, batch_size=2)
    table = pyarrow.parquet.read_table(file).to_pydict()
    assert table["id"] == table["n"] == [0, 1, 2, 4, 5]
    with pytest.raises(RecipeError, match=r"no layer 'block.0'.*did you mean"):
        mmssl.embed(encoder, folder, tmp_path / "y.parquet", layer="block.0")


def test_a_file_that_is_there_stays(encoder, folder, tmp_path):
    file = tmp_path / "x.npz"
    file.write_bytes(b"mine")
    with pytest.raises(RunError, match=r"is there already.*--force"):
        mmssl.embed(encoder, folder, file)
    assert file.read_bytes() == b"mine"
    mmssl.embed(encoder, folder, file, force=True)
    assert np.load(file)["features"].shape == (19, 8)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"to": "x.csv"}, RecipeError, "written as .parquet or .npz"),
        ({"limit": 0}, RecipeError, "limit = 0: expected at least 1"),
        ({"data": [{"image": torch.zeros(1, 3, 16, 16)}]}, DataError, "embed reads a source or a data set"),
        ({"encoder": "text"}, RecipeError, "leave the name out"),
    ],
)
def test_requests_that_make_no_sense(encoder, folder, tmp_path, changes, error, said):
    given = {"data": folder, "to": "x.npz", **changes}
    with pytest.raises(error, match=said):
        mmssl.embed(encoder, given.pop("data"), tmp_path / given.pop("to"), **given)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_call_goes_on(encoder, folder, tmp_path, small_parts, monkeypatch):
    whole = mmssl.embed(encoder, folder, tmp_path / "whole.parquet", batch_size=3).read_bytes()
    extract, calls = embedding.extract, []

    def counting(*given, **options):
        calls.append(way_on())
        if len(calls) == 5:
            raise KeyboardInterrupt
        return extract(*given, **options)

    monkeypatch.setattr(embedding, "extract", counting)
    with pytest.raises(KeyboardInterrupt):
        mmssl.embed(encoder, folder, tmp_path / "x.parquet", batch_size=3)
    assert not (tmp_path / "x.parquet").exists()
    again = mmssl.embed(encoder, folder, tmp_path / "x.parquet", batch_size=3)
    assert calls == ["the same call goes on"] * (5 + 3)  # of seven batches the first four were in parts
    assert again.read_bytes() == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole.parquet", "x.parquet"}


def test_a_call_that_comes_to_nothing_leaves_nothing(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "extract", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        mmssl.embed(encoder, folder, tmp_path / "x.parquet", batch_size=3)
    assert not list(tmp_path.iterdir())


def test_parts_of_other_weights_are_not_used(encoder, folder, tmp_path, small_parts, monkeypatch):
    torch.manual_seed(1)
    other = mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **VIT).eval()
    whole = mmssl.embed(other, folder, tmp_path / "whole.parquet", batch_size=3).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(parts, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            mmssl.embed(encoder, folder, tmp_path / "x.parquet", batch_size=3)
    assert mmssl.embed(other, folder, tmp_path / "x.parquet", batch_size=3).read_bytes() == whole


SLOW = """
import time
import mmssl, torch
from mmssl import embedding as module, parts
extract = module.extract
parts.BATCHES = 1
def slowly(*given, **options):
    time.sleep(0.3)
    return extract(*given, **options)
module.extract = slowly
torch.manual_seed(0)
encoder = mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **{vit}).eval()
mmssl.embed(encoder, {folder!r}, {to!r}, batch_size=2)
"""


@pytest.mark.long
def test_a_killed_call_goes_on(encoder, folder, tmp_path, monkeypatch):
    to = tmp_path / "x.parquet"
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(vit=VIT, folder=str(folder), to=str(to))])
    made = tmp_path / ".x.parquet.parts"
    deadline = time.monotonic() + 120
    while len(list(made.glob("0*.parquet"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not to.exists()
    kept = len(list(made.glob("0*.parquet")))
    assert kept >= 3
    monkeypatch.setattr(parts, "BATCHES", 1)
    extract, calls = embedding.extract, []
    monkeypatch.setattr(embedding, "extract", lambda *a, **k: calls.append(1) or extract(*a, **k))
    mmssl.embed(encoder, folder, to, batch_size=2)
    assert len(calls) == 10 - kept
    assert pyarrow.parquet.read_table(to)["id"].to_pylist() == [i for i in range(20) if i != 13]
