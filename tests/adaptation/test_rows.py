"""Which rows are read, how often, and in what form they come; what is kept of their features."""

import io

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import mmssl
from mmssl.adaptation.cache import FeatureCache
from mmssl.adaptation.rows import BatchSplit, Reads, SourceSplit, open_rows, open_splits
from mmssl.data.decoding import SHARED
from mmssl.data.sources import TableSource
from mmssl.data.stream import StreamSource
from mmssl.data.toy import ToySource
from mmssl.decode_settings import ImageDecode
from mmssl.encoders import reinitialized
from mmssl.errors import DataError, RecipeError
from mmssl.recipe import Data

SIZE = 16
DATA = Data(source="x", image=ImageDecode(size=SIZE))
TOY = Data(source="toy", limit=200, image=ImageDecode(size=SIZE))
READS = Reads(("image",), {})


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(7)
    return mmssl.encoder("timm/test_resnet", modality="image").eval()


@pytest.fixture
def encoded(monkeypatch):
    """Rows that every encoder was asked for, one entry a pass."""
    from mmssl.encoders.image import ImageEncoder

    asked, checked = [], ImageEncoder.checked

    def counted(self, x, *more, **named):
        asked.append(len(x))
        return checked(self, x, *more, **named)

    monkeypatch.setattr(ImageEncoder, "checked", counted)
    return asked


@pytest.fixture
def rendered(monkeypatch):
    """Pictures of the toy world that were rendered: (split, row)."""
    seen, cell = [], ToySource.cell

    def counted(self, scene, i, column):
        if column == "image":
            seen.append((self.split, i))
        return cell(self, scene, i, column)

    monkeypatch.setattr(ToySource, "cell", counted)
    SHARED.clear()  # what other tests have read
    return seen


def pictures(rows: int, seed: int = 0) -> tuple[list[dict], list[str]]:
    """Noise, dark or light."""
    random = np.random.default_rng(seed)
    cells, labels = [], []
    for row in range(rows):
        file = io.BytesIO()
        pixels = random.integers(0, 120, (SIZE, SIZE, 3)) + 100 * (row % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
        labels.append(("dark", "light")[row % 2])
    return cells, labels


def dataset(cells, labels, **more) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"image": cells, "label": labels, **more})
    return rows.cast_column("image", datasets.Image())


def batches(cells, labels, size: int = 7) -> list[dict[str, torch.Tensor]]:
    x = torch.stack([torch.from_numpy(np.array(Image.open(io.BytesIO(cell["bytes"])))) for cell in cells])
    rows = {"image": x.permute(0, 3, 1, 2).contiguous(), "label": torch.tensor([int(n == "light") for n in labels])}
    return [{key: value[i : i + size] for key, value in rows.items()} for i in range(0, len(labels), size)]


@pytest.mark.long
@pytest.mark.parametrize("probe", ["knn", "finetune"])
def test_few_shots_are_drawn_before_anything_is_decoded(small, rendered, probe):
    options = {"steps": 1, "lr": (1e-3,), "decay": (1.0,)} if probe == "finetune" else {"k": (1,)}
    table = mmssl.adapt(small, TOY, label="color", probe=probe, shots=2, seeds=2, limit=200, **options)
    train, test = ({i for split, i in rendered if split == name} for name in ("train", "test"))
    # Two draws of two rows for each of eight colors, which may have rows in common.
    assert 16 < len(train) <= 32
    assert test == set(range(200))
    assert (table.train_rows, table.test_rows) == (200, 200)


def test_each_row_is_decoded_once_for_all_encoders(small, rendered, encoded):
    mmssl.adapt(small, TOY, label="shape", seeds=3, batch_size=100)
    assert sorted(rendered) == [(split, i) for split in ("test", "train") for i in range(200)]
    assert encoded == [100] * 4 * 4  # four encoders, two batches of two splits


@pytest.mark.long
def test_sources_streams_and_batches_give_one_table(small):
    train, test = pictures(60), pictures(40, 1)
    common = {"label": "label", "seeds": 1, "data": DATA}
    for probe, options in (
        ("ridge", {}),
        ("finetune", {"steps": 6, "lr": (1e-3,), "decay": (1.0,), "batch_rows": 16}),
        ("knn", {"shots": 9, "k": (3,)}),
    ):
        whole = mmssl.adapt(small, dataset(*train), dataset(*test), probe=probe, **common, **options)
        stream = mmssl.adapt(
            small,
            dataset(*train).to_iterable_dataset(),
            dataset(*test).to_iterable_dataset(),
            probe=probe,
            **common,
            **options,
        )
        memory = mmssl.adapt(small, batches(*train), batches(*test), probe=probe, **common, **options)
        once = mmssl.adapt(small, iter(batches(*train)), iter(batches(*test)), probe=probe, **common, **options)
        assert whole.rows == stream.rows == memory.rows == once.rows
        assert whole.score > 0.75 or probe == "finetune"


@pytest.mark.quick(1)
@pytest.mark.parametrize("probe", ["ridge", "finetune"])
def test_rows_that_cannot_be_decoded_are_left_out_and_said(small, probe):
    cells, labels = pictures(60)
    good = [row for row in range(60) if row not in (4, 11, 31)]
    broken = [cell if row in good else {"bytes": b"no picture", "path": None} for row, cell in enumerate(cells)]
    test = dataset(*pictures(40, 1))
    options = {"steps": 3, "lr": (1e-3,), "decay": (1.0,)} if probe == "finetune" else {}
    common = {"label": "label", "probe": probe, "seeds": 1, "data": DATA, **options}
    with pytest.raises(DataError, match=r"more than max_bad = 0.01: .* raise max_bad to 0.\d+ \(--set max_bad=0.\d+\)"):
        mmssl.adapt(small, dataset(broken, labels), test, **common)
    with pytest.raises(RecipeError, match="max_bad = 2: expected a share"):
        mmssl.adapt(small, dataset(broken, labels), test, **common, max_bad=2)
    some = mmssl.adapt(small, dataset(broken, labels), test, **common, max_bad=0.1)
    clean = mmssl.adapt(small, dataset([cells[row] for row in good], [labels[row] for row in good]), test, **common)
    assert "3 undecodable rows left out" in some.warnings
    assert some.rows == clean.rows


@pytest.mark.parametrize("form", ["source", "stream", "batches"])
def test_rows_are_picked_by_their_numbers(form):
    cells, labels = pictures(20)
    if form == "batches":
        split = BatchSplit(batches(cells, labels, 6), READS)
    else:
        cells[5] = {"bytes": None, "path": None} if form == "stream" else cells[5]
        rows = dataset(cells, labels)

        source = StreamSource(rows.to_iterable_dataset(), "x") if form == "stream" else TableSource(rows)
        split = SourceSplit(DATA, source, "here", READS)
    whole = {int(i): x for batch in split.read() for i, x in zip(batch["id"], batch["image"], strict=True)}
    picks = [[0, 3], [4, 7, 12], [19]]
    for pick, batch in zip(picks, split.read(picks), strict=True):
        assert batch["id"].tolist() == pick
        if form != "stream":
            assert all(torch.equal(x, whole[i]) for i, x in zip(pick, batch["image"], strict=True))
    anywhere = split.random_access([3, 12, 7])
    (mixed,) = anywhere.read([[12, 3, 12, 7]])
    assert mixed["id"].tolist() == [12, 3, 12, 7]
    assert torch.equal(mixed["image"][0], mixed["image"][2])
    assert not torch.equal(mixed["image"][0], mixed["image"][1])


def test_limits_hold_for_batches_too(small):
    cells = pictures(60)
    table = mmssl.adapt(small, batches(*cells), batches(*pictures(40, 1)), seeds=1, limit=30, probe="ridge")
    assert (table.train_rows, table.test_rows) == (30, 30)
    with pytest.raises(DataError, match="there are no rows"):
        mmssl.adapt(small, [], probe="ridge")
    with pytest.raises(DataError, match="'label' should be a tensor, found list; number the classes"):
        mmssl.adapt(small, [{"image": batches(*cells)[0]["image"], "label": ["a"] * 7}], probe="ridge")
    with pytest.raises(RecipeError, match="should be a name, and its options arguments: probe='knn', k="):
        mmssl.adapt(small, batches(*cells), probe={"probe": "knn", "k": [5]})
    assert mmssl.adapt(small, batches(*cells), probe="knn", seeds=1, temperature=float("inf")).rows
    with pytest.raises(RecipeError, match=r"probe knn: k = \[0\] should be .*greater than or equal to 1"):
        mmssl.adapt(small, batches(*cells), probe="knn", k=[0])
    with pytest.raises(DataError, match="give a source, a data set or batches"):
        mmssl.adapt(small, probe="ridge")
    with pytest.raises(DataError, match="give both in one form"):
        mmssl.adapt(small, batches(*cells), dataset(*cells), probe="ridge")


@pytest.mark.long
def test_another_probe_of_the_same_rows_encodes_nothing(small, encoded, tmp_path):
    common = {"train": TOY, "label": "shape", "seeds": 2, "cache": tmp_path / "kept"}
    first = mmssl.adapt(small, probe="ridge", layers=True, **common)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    assert len(files) == 3 * 2  # three encoders, two splits
    assert encoded
    encoded.clear()
    again = mmssl.adapt(small, probe="ridge", layers=True, **common)
    other = mmssl.adapt(small, probe="logistic", c=(0.01,), **common)  # pooled features stand beside the depths
    values = mmssl.adapt(small, probe="ridge", **{**common, "label": "position"})
    assert encoded == []
    assert again == first
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "kept").iterdir()}
    afresh = {**common, "cache": None}
    assert other == mmssl.adapt(small, probe="logistic", c=(0.01,), **afresh)
    assert values == mmssl.adapt(small, probe="ridge", **{**afresh, "label": "position"})
    assert encoded


def test_tokens_are_found_again_where_they_are_few(small, encoded, tmp_path, monkeypatch):
    cache, split = FeatureCache(tmp_path), SourceSplit(DATA, TableSource(dataset(*pictures(20))), "here", READS)

    def tokens(layers):
        encoded.clear()
        (found,), read = cache.tokens([small], split, np.arange(20), layers=layers, batch_size=8)
        assert read.tolist() == list(range(20))
        (batch,) = found["pooled"][torch.tensor([7, 3])].read([torch.tensor([1, 0])])
        return batch["tokens"], list(found), sum(encoded)

    with monkeypatch.context() as patch:
        patch.setattr("mmssl.adaptation.cache.KEPT_BYTES", 100)
        before, _, _ = tokens(layers=True)
    assert not list(tmp_path.iterdir())
    assert tokens(layers=True)[2] == 20
    again, depths, passed = tokens(layers=True)
    assert (passed, len(depths) > 1) == (0, True)
    assert torch.equal(again, before)
    again, depths, passed = tokens(layers=False)  # of the same file
    assert (passed, depths) == (0, ["pooled"])
    assert torch.equal(again, before)
    cache.features([small], split, np.arange(20), layers=False, batch_size=8)  # which are another file
    assert len(list(tmp_path.iterdir())) == 2


def test_features_are_found_by_all_that_they_depend_on(small, encoded, tmp_path):
    rows, labels = pictures(30)
    cache = FeatureCache(tmp_path)

    def features(encoder=small, cells=rows, data=DATA, ids=range(30), layers=False):
        encoded.clear()
        split = SourceSplit(data, TableSource(dataset(cells, labels)), "here", READS)
        (found,), read = cache.features([encoder], split, np.array(ids), layers=layers, batch_size=64)
        assert read.tolist() == list(ids)
        return found["pooled"], sum(encoded)

    before, passed = features()
    assert passed == 30
    assert features()[1] == 0
    assert torch.equal(features()[0], before)
    # Labels and other columns have no part in it.
    labels.reverse()
    assert features()[1] == 0
    changed = [rows[1], *rows[1:]]
    assert features(cells=changed)[1] == 30
    assert features(data=DATA.model_copy(update={"image": ImageDecode(size=24)}))[1] == 30
    assert features(ids=range(29))[1] == 29
    assert features(layers=True)[1] == 30
    other = reinitialized(small, 3)
    assert features(other)[1] == 30
    with torch.no_grad():
        next(other.parameters())[0] += 1e-3
    assert features(other)[1] == 30
    statistics = next(m for m in other.modules() if isinstance(m, torch.nn.BatchNorm2d))
    statistics.running_mean += 1e-3
    assert features(other)[1] == 30
    assert features()[1] == 0


def test_damaged_files_are_computed_anew(small, encoded, tmp_path):
    split = BatchSplit(batches(*pictures(20)), READS)

    def features():
        encoded.clear()
        (found,), _ = FeatureCache(tmp_path).features([small], split, np.arange(20), layers=False, batch_size=20)
        return found["pooled"], len(encoded)

    expected, _ = features()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    for damage in ("half", "empty", "bit", "other"):
        if damage == "half":
            path.write_bytes(whole[: len(whole) // 2])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "bit":
            path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
        else:
            save_file(tensors, path)
        found, passes = features()
        assert (passes, torch.equal(found, expected)) == (1, True), damage
        assert features()[1] == 0
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_files_of_a_folder_are_known_by_when_they_changed(small, encoded, tmp_path):
    for row, cell in enumerate(pictures(24)[0]):
        folder = tmp_path / "data" / ("dark", "light")[row % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{row}.png").write_bytes(cell["bytes"])
    common = {"label": "label", "probe": "ridge", "seeds": 1, "data": DATA, "cache": tmp_path / "kept"}
    first = mmssl.adapt(small, tmp_path / "data", **common)
    encoded.clear()
    assert mmssl.adapt(small, tmp_path / "data", **common) == first
    assert encoded == []
    (tmp_path / "data" / "dark" / "0.png").write_bytes(pictures(1, 5)[0][0]["bytes"])
    mmssl.adapt(small, tmp_path / "data", **common)
    assert encoded


def test_the_rows_of_a_stream_are_never_kept(small, encoded, tmp_path):
    rows = dataset(*pictures(40)).to_iterable_dataset()
    for _ in range(2):
        mmssl.adapt(small, rows, label="label", probe="ridge", seeds=1, data=DATA, cache=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert len(encoded) == 4


def named(names, labels, seed=0):
    """Ten pictures, the same for one seed, with a ClassLabel."""
    cells, _ = pictures(len(labels), seed)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": cells, "label": labels}, features=features)


def test_classes_are_compared_by_name_and_minus_one_is_none(small):
    animals = [["cat", "dog"][i % 2] for i in range(10)]
    train = named(["cat", "dog"], [["cat", "dog"].index(a) for a in animals])
    test = named(["dog", "cat"], [["dog", "cat"].index(a) for a in animals])
    table = mmssl.adapt(small, train, test, k=(1,), baseline=False, data=DATA)
    assert table.rows[0].metrics["accuracy"] == 1
    some = named(["cat", "dog"], [-1 if i < 4 else i % 2 for i in range(10)])
    table = mmssl.adapt(small, some, test, k=(1,), baseline=False, data=DATA)
    assert (table.train_rows, table.test_rows) == (6, 10)
    assert any("4 of 10 rows" in warning for warning in table.warnings)


def test_lists_of_classes_are_compared_by_name():
    def split(names, labels):
        feature = datasets.Sequence(datasets.ClassLabel(names=names))
        rows = datasets.Dataset.from_dict({"tags": labels}, features=datasets.Features({"tags": feature}))
        return SourceSplit(DATA, TableSource(rows), "rows", READS)

    assert split(["cat", "dog"], [[0], [0, 1], []]).cells("tags") == [["cat"], ["cat", "dog"], []]
    assert split(["dog", "cat"], [[1, -1], [1, 0], None]).cells("tags") == [["cat"], ["cat", "dog"], None]


def test_names_on_one_side_alone_are_refused(small):
    train = named(["cat", "dog"], [i % 2 for i in range(10)])
    for labels in ([i % 2 for i in range(10)],):
        numbers = train.cast_column("label", datasets.Value("int64"))
        with pytest.raises(DataError, match="names in some rows and whole numbers in others"):
            mmssl.adapt(small, train, numbers, baseline=False, data=DATA)
        strings = numbers.remove_columns("label").add_column("label", [str(label) for label in labels])
        with pytest.raises(DataError, match="names in some rows and whole numbers in others"):
            mmssl.adapt(small, strings, numbers, baseline=False, data=DATA)


def test_probes_see_squeezed_pictures_whole_and_in_their_shape():
    squeezed = ImageDecode(size=32, fit="squeeze")
    assert squeezed.for_probes == ImageDecode(size=16)
    assert squeezed.model_copy(update={"probe_size": 12}).for_probes == ImageDecode(size=12)
    assert ImageDecode(size=32, fit="pad").for_probes == ImageDecode(size=32, fit="pad")
    given = TOY.model_copy(update={"image": squeezed})
    train, _ = open_splits(given, None, READS, learns=False)
    (batch, *_) = train.read(batch_size=4)
    assert batch["image"].shape[1:] == (3, 16, 16)
    assert "image_aspect" not in batch
    with pytest.raises(DataError, match="is squeezed to a square; decode it with fit: crop"):
        BatchSplit([batch | {"image_aspect": torch.ones(4)}], READS)


def test_rows_without_labels_say_how_to_name_some(tmp_path):
    (tmp_path / "rows.csv").write_text("text,kind\na,x\nb,y\n")
    split = open_rows(str(tmp_path / "rows.csv"), Reads(("text",), {}), None, None, None, "train")
    with pytest.raises(DataError, match=r"no column 'label'; it has: text, kind; name one with label \(--label\)"):
        split.cells("label")
    with pytest.raises(DataError, match=r"no column 'kinds' \(did you mean 'kind'\?\); it has: text, kind$"):
        split.cells("kinds")
