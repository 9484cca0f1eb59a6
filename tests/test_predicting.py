"""What fine-tuning trained is kept, and its answers for new rows are those that its table was made of."""

import csv
import json
import re
import shutil

import datasets
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import r2_score

import mmssl
from mmssl.adaptation.probes._unfinished import Trained
from mmssl.errors import DataError, MmsslError, RecipeError, RunError
from mmssl.hub import load_classifier
from mmssl.hub.classifier import save_classifier
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
QUICK = {"probe": "finetune", "baseline": False, "seeds": 1, "steps": 16, "batch_rows": 16, "decay": (1.0,)}
SIZE = Data(source="files", image={"size": 16})


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """48 pictures of which the red, the dark or both can be told, and one that cannot be read."""
    root = tmp_path_factory.mktemp("predict")
    generator = np.random.default_rng(0)
    for split, rows in (("train", 48), ("test", 25)):
        (root / split).mkdir()
        for i in range(rows):
            tint = np.array([(i % 2) * 100, 0, 0]) - (i % 3 == 0) * 60
            picture = (120 + tint + generator.normal(0, 30, (16, 16, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(root / split / f"{i:02}.png")
    (root / "test" / "07.png").write_bytes(b"\x89PNG no more")
    return root


def rows(root, split):
    """As a data set with a column for each kind of target."""
    paths = sorted((root / split).glob("*.png"))
    numbers = range(len(paths))
    return datasets.Dataset.from_dict(
        {
            "image": [str(path) for path in paths],
            "kind": ["red" if i % 2 else "gray, or so" for i in numbers],
            "many": [["red"] * (i % 2) + ["dark"] * (i % 3 == 0) for i in numbers],
            "value": [0.5 + 10.0 * (i % 2) for i in numbers],
            "answer": [f"row {i}" for i in numbers],
        }
    )


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return mmssl.encoder("timm/test_resnet", modality="image")


@pytest.fixture(scope="module")
def saved(root, encoder, tmp_path_factory):
    """Label -> folder of its classifier, and its table."""
    found = {}
    for label in ("kind", "many", "value"):
        folder = tmp_path_factory.mktemp("saved") / label
        given = rows(root, "train"), rows(root, "test")
        chosen = {"lr": (1e-3, 5e-3), "seeds": 2} if label == "kind" else {"lr": (5e-3,)}
        table = mmssl.adapt(encoder, *given, data=SIZE, label=label, save=folder, **(QUICK | chosen))
        found[label] = folder, table
    return found


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved["kind"][0], tmp_path / "classifier")


def read(path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_answers_are_those_of_the_table(saved, root, tmp_path, caplog):
    folder, table = saved["kind"]
    assert {path.name for path in folder.iterdir()} == {"README.md", "classifier.json", "model.safetensors"}
    file = mmssl.predict(folder, rows(root, "test"), tmp_path / "x.csv", scores=True, batch_size=7)
    assert "1 of 25 rows cannot be read and have no line" in caplog.text
    lines = read(file)
    assert list(lines[0]) == [
        *("id", "image", "kind", "many", "value", "answer_", "answer", "probability"),
        *("probability_gray, or so", "probability_red"),
    ]
    assert [int(line["id"]) for line in lines] == [i for i in range(25) if i != 7]
    right = np.mean([line["answer"] == line["kind"] for line in lines])
    assert right == table.rows[0].runs["accuracy"][0] > 0.6
    for line in lines:
        assert float(line["probability"]) == float(line[f"probability_{line['answer']}"]) >= 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_files_of_a_folder_and_the_same_in_every_format(saved, root, tmp_path):
    folder, _ = saved["kind"]
    files = [mmssl.predict(folder, root / "train", tmp_path / f"x.{kind}") for kind in ("csv", "parquet", "npz")]
    lines, table, arrays = read(files[0]), pyarrow.parquet.read_table(files[1]).to_pydict(), np.load(files[2])
    assert [line["answer"] for line in lines] == table["answer"] == arrays["answer"].tolist()
    assert [line["image"] for line in lines] == [str(path) for path in sorted((root / "train").glob("*.png"))]
    assert np.array_equal(np.array([line["probability"] for line in lines], np.float32), arrays["probability"])
    with pytest.raises(RunError, match="is there already"):
        mmssl.predict(folder, root / "train", files[0])


def test_several_labels(saved, root, tmp_path):
    folder, table = saved["many"]
    file = mmssl.predict(folder, rows(root, "test"), tmp_path / "x.parquet", scores=True)
    found = pyarrow.parquet.read_table(file).to_pydict()
    equal = [set(a) == set(b) for a, b in zip(found["answer"], found["many"], strict=True)]
    assert np.mean(equal) == table.rows[0].runs["subset_accuracy"][0]
    for name in ("red", "dark"):
        assert [p > 0.5 for p in found[f"probability_{name}"]] == [name in answer for answer in found["answer"]]
    assert "probability" not in found
    lines = read(mmssl.predict(folder, rows(root, "test"), tmp_path / "x.csv"))
    assert [json.loads(line["answer"]) for line in lines] == found["answer"]


def test_values_are_in_their_units(saved, root, tmp_path):
    folder, table = saved["value"]
    file = mmssl.predict(folder, rows(root, "test"), tmp_path / "x.parquet")
    found = pyarrow.parquet.read_table(file).to_pydict()
    score = table.rows[0].runs["r2"][0]
    assert r2_score(found["value"], found["answer"]) == pytest.approx(score, abs=1e-5)
    assert np.mean(found["answer"]) == pytest.approx(5.5, abs=3)
    with pytest.raises(RecipeError, match="holds values, which have no probabilities"):
        mmssl.predict(folder, rows(root, "test"), tmp_path / "y.csv", scores=True)


@pytest.mark.long
def test_texts_keep_their_tokenizer(tmp_path):
    texts = [f"{'good' if i % 2 else 'bad'} thing number {i % 7}" for i in range(40)]
    data = datasets.Dataset.from_dict({"words": texts, "label": [i % 2 for i in range(40)]})
    torch.manual_seed(0)
    encoder = mmssl.encoder("transformers/bert", modality="text", tokenizer=Tokenizer.train(texts, 300), **BERT)
    how = Data(source="files", text={"length": 12})
    table = mmssl.adapt(encoder, data, data=how, columns={"text": "words"}, save=tmp_path / "it", lr=(3e-3,), **QUICK)
    assert (tmp_path / "it" / "tokenizers" / "encoder" / "tokenizer.json").is_file()
    loaded = load_classifier(tmp_path / "it")
    assert loaded.encoder.tokenizer == encoder.tokenizer
    assert (loaded.decoding.text.length, loaded.decoding.columns) == (12, {"text": "words"})
    file = mmssl.predict(tmp_path / "it", data, tmp_path / "x.parquet")
    found = pyarrow.parquet.read_table(file).to_pydict()
    assert set(found["answer"]) <= {0, 1}
    with torch.no_grad():
        ids = loaded.encoder.read(texts)
        chances = loaded.answer({"text": ids.x, "text_mask": ids.valid})
    assert torch.equal(chances.argmax(1), torch.tensor(found["answer"]))
    assert table.score > 0.5


def test_the_folder_says_what_it_is(saved):
    folder, table = saved["kind"]
    text = (folder / "README.md").read_text()
    assert "`timm/test_resnet`" in text
    assert "`gray, or so`, `red`" in text
    assert "mmssl predict kind DATA" in text
    assert "24 test rows" in text
    assert str(folder.parent) not in text + (folder / "classifier.json").read_text()
    loaded = load_classifier(folder)
    assert loaded.table == table
    assert loaded.target.names == ("gray, or so", "red")
    assert loaded.encoder.reading().image.size == 16


def test_what_cannot_be_saved_is_said_before_anything_is_trained(encoder, root, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine.txt").write_text("mine")
    data = rows(root, "train")
    with pytest.raises(RunError, match="is there already; name another folder"):
        mmssl.adapt(encoder, data, label="kind", probe="finetune", save=tmp_path / "used")
    with pytest.raises(RecipeError, match="save keeps what finetune, segmentation and detection trained, and not knn"):
        mmssl.adapt(encoder, data, label="kind", save=tmp_path / "new")
    batches = [{"image": torch.zeros(8, 3, 16, 16, dtype=torch.uint8), "label": torch.arange(8) % 2}] * 2
    with pytest.raises(RecipeError, match="batches do not say how rows are decoded"):
        mmssl.adapt(encoder, batches, save=tmp_path / "new", lr=(1e-3,), **(QUICK | {"steps": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["used"]


def test_a_disk_that_refuses_leaves_nothing(saved, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    classifier = load_classifier(saved["kind"][0])
    monkeypatch.setattr("mmssl.hub.classifier.save_file", full)
    with pytest.raises(RunError, match="cannot be written: No space left"):
        save_classifier(tmp_path / "x", Trained(classifier.objective, None), classifier.table, SIZE)
    assert not list(tmp_path.iterdir())


def change(folder, *keys, to):
    tree = json.loads((folder / "classifier.json").read_text())
    node = tree
    for key in keys[:-1]:
        node = node[key]
    if to is None:
        del node[keys[-1]]
    else:
        node[keys[-1]] = to
    (folder / "classifier.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("keys", "to", "said"),
    [
        (("encoder", "modality"), "os.path", "may run any code"),
        (("encoder", "model"), "timm/no_such_net", "no_such_net"),
        (("encoder", "model"), ["timm"], "model and modality name the network"),
        (("encoder", "pretrained"), "local-dir:/etc", "its weights are in"),
        (("encoder", "checkpoint_path"), "/etc/passwd", "read other files"),
        (("encoder", "drop_path_rate"), 10**12, "more than model.safetensors has weights for"),
        (("target", "name"), "os.path", "target 'os.path' is none of"),
        (("target", "name"), ["classes"], "is none of"),
        (("target", "names"), "ab", "should be a list of names"),
        (("target", "names"), [["a"], "b"], "should be a list of names"),
        (("target", "names"), ["a", "b", "c"], "head.weight has shape"),
        (("target", "names"), None, "no classifier can be built"),
        (("decoding", "image", "size"), -3, "size"),
        (("decoding", "shell"), "rm", "shell"),
        (("table", "rows"), [], "table: the table has no rows"),
        (("label",), None, "label"),
    ],
)
def test_hostile_folders_are_one_sentence(folder, keys, to, said):
    change(folder, *keys, to=to)
    with pytest.raises(MmsslError, match=re.escape(said)) as caught:
        load_classifier(folder)
    assert "classifier" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_width_that_no_head_has(saved, tmp_path):
    folder = shutil.copytree(saved["value"][0], tmp_path / "classifier")
    change(folder, "target", "width", to=10**11)
    with pytest.raises(RunError, match=r"more than model.safetensors has weights for"):
        load_classifier(folder)


def test_damaged_folders(folder, tmp_path):
    with pytest.raises(RunError, match=r"holds no classifier, for classifier.json is missing; mmssl adapt RUN"):
        mmssl.predict(tmp_path / "nothing", folder, tmp_path / "x.csv")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        load_classifier(folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file({name: value for name, value in tensors.items() if name != "head.bias"}, weights)
    with pytest.raises(RunError, match="1 tensors missing"):
        load_classifier(folder)
    weights.unlink()
    with pytest.raises(RunError, match=r"not a whole classifier: model.safetensors is missing"):
        load_classifier(folder)
    weights.symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="link that leaves the folder"):
        load_classifier(folder)
    (folder / "classifier.json").write_text("[" * 100_000)
    with pytest.raises(RunError, match="link that leaves"):
        load_classifier(folder)
    weights.unlink()
    weights.write_bytes(whole)
    with pytest.raises(RunError, match=r"classifier.json is damaged"):
        load_classifier(folder)


def test_nothing_half_written(saved, root, tmp_path):
    broken = datasets.Dataset.from_dict({"image": [str(tmp_path / "none.png")] * 3})
    with pytest.raises(DataError):
        mmssl.predict(saved["kind"][0], broken, tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
