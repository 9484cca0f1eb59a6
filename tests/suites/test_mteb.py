"""A run in `mteb`: its classification scores are scikit-learn's on the features that mmssl gives, and nothing mixes."""

import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

import mmssl
from mmssl.adaptation.pairs import encode_side, network_of
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.suites.mteb import MtebEncoder

TEXTS = [f"{'good' if i % 2 else 'bad'} thing number {i % 7}" for i in range(32)]
BERT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def mteb():
    return pytest.importorskip("mteb", reason="mteb is not installed: pip install 'mmssl[suites]'")


@pytest.fixture(scope="module")
def encoders():
    torch.manual_seed(0)
    text = mmssl.encoder("transformers/bert", modality="text", tokenizer=Tokenizer.train(TEXTS, 300), **BERT)
    return {"image": mmssl.encoder("timm/test_resnet", modality="image"), "text": text}


def pictures(rows):
    random = np.random.default_rng(0)
    tints = [np.array([(i // 2 % 2) * 90, 0, 0]) for i in range(rows)]
    noisy = [(120 + tint + random.normal(0, 40, (16, 20, 3))).clip(0, 255).astype(np.uint8) for tint in tints]
    return [Image.fromarray(one) for one in noisy]


def local_task(modality, cells):
    """A task whose rows are here: even ones to learn from, odd ones for the test."""
    from mteb.abstasks import AbsTaskClassification
    from mteb.abstasks.task_metadata import TaskMetadata

    class Local(AbsTaskClassification):
        metadata = TaskMetadata(
            name=f"Local{modality.title()}",
            description="Of the test.",
            reference="https://example.org",
            dataset={"path": "local/local", "revision": "1"},
            type="Classification" if modality == "text" else "ImageClassification",
            category="t2c" if modality == "text" else "i2c",
            modalities=[modality],
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="accuracy",
        )
        input_column_name = modality
        n_experiments, samples_per_label = 1, 100

        def load_data(self, **_):
            labels = [i // 2 % 2 for i in range(len(cells))]
            rows = datasets.Dataset.from_dict({modality: cells, "label": labels})
            parts = {"train": rows.select(range(0, len(cells), 2)), "test": rows.select(range(1, len(cells), 2))}
            self.dataset, self.data_loaded = datasets.DatasetDict(parts), True

    return Local()


@pytest.mark.long
@pytest.mark.parametrize("modality", ["text", "image"])
def test_scores_are_those_of_a_regression_on_pooled_features(mteb, encoders, modality, tmp_path):
    texts = [f"{'good' if i // 2 % 2 else 'bad'} thing {i % 7}" for i in range(32)]
    cells, settings = (texts, {"length": 12}) if modality == "text" else (pictures(32), {"size": 16})
    task = local_task(modality, cells)
    model = MtebEncoder(encoders[modality], name="me/mine", read={modality: settings})
    cache = mteb.ResultCache(tmp_path)
    result = mteb.evaluate(model, task, cache=cache, encode_kwargs={"batch_size": 5}, show_progress_bar=False)
    own = encoders[modality].eval()
    with torch.no_grad():
        x = own(own.read(cells, **settings)).pooled.numpy()
    y = np.array([i // 2 % 2 for i in range(len(cells))])
    fitted = LogisticRegression(max_iter=100, random_state=task.seed).fit(x[::2], y[::2])
    (scores,) = result.task_results[0].scores["test"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(y[1::2], fitted.predict(x[1::2])), abs=1e-9)
    assert result.model_name == "me/mine"


def test_two_networks_have_results_of_their_own(mteb, encoders):
    torch.manual_seed(1)
    other = mmssl.encoder("timm/test_resnet", modality="image")
    metas = [MtebEncoder(one, name="me/mine").mteb_model_meta for one in (encoders["image"], encoders["image"], other)]
    assert metas[0].revision == metas[1].revision != metas[2].revision
    read = MtebEncoder(other, read={"image": {"size": 24}}).mteb_model_meta
    assert read.experiment_kwargs == {"image_size": 24}
    assert read.name == "mmssl/timm-test_resnet"


def test_vectors_of_two_modalities_are_those_of_their_space(mteb, encoders):
    torch.manual_seed(2)
    task = mmssl.objective("contrastive", encoders, width=8)
    model = MtebEncoder(task, read={"image": {"size": 16}})
    assert isinstance(model, mteb.models.EncoderProtocol)
    assert model.mteb_model_meta.modalities == ["image", "text"]
    about = SimpleNamespace(name="Both", modalities=["image", "text"])
    shown, said = pictures(6), TEXTS[:6]
    batches = [{"image": shown[:4]}, {"image": shown[4:]}]
    x, y = model.encode(batches, task_metadata=about), model.encode([{"text": said}], task_metadata=about)
    network = network_of(task)
    inputs = {"image": encoders["image"].read(shown, size=16), "text": encoders["text"].read(said)}
    task.eval()
    with torch.no_grad():
        for side, found in zip(network.modalities, (x, y), strict=True):
            batch = {side: inputs[side].x}
            if inputs[side].valid is not None:
                batch[f"{side}_mask"] = inputs[side].valid
            _, vectors = encode_side(network, network.modalities.index(side), batch)
            assert np.allclose(found, vectors.numpy(), atol=1e-6)
    both = model.encode([{"image": shown, "text": said}], task_metadata=about)
    assert np.allclose(both, x + y, atol=1e-6)
    cosines = x @ y.T
    assert np.allclose(model.similarity(x, 3 * torch.from_numpy(y)), cosines, atol=1e-5)
    assert np.allclose(model.similarity_pairwise(x, y), np.diag(cosines), atol=1e-5)
    alone = model.encode([{"image": shown}], task_metadata=SimpleNamespace(name="One", modalities=["image"]))
    assert alone.shape == (6, encoders["image"].dim)


def test_sounds_of_any_decoder(mteb):
    encoder = mmssl.encoder("timm/test_resnet", modality="audio", rate=8000)

    class Decoder:
        def __getitem__(self, key):
            return {"array": np.sin(np.arange(4000) / 9).astype(np.float32), "sampling_rate": 8000}[key]

    model = MtebEncoder(encoder, read={"audio": {"rate": 8000, "seconds": 0.5}})
    found = model.encode([{"audio": [Decoder()]}], task_metadata=SimpleNamespace(name="x", modalities=["audio"]))
    given = encoder.read([(Decoder()["array"], 8000)], rate=8000, seconds=0.5)
    with torch.no_grad():
        assert np.allclose(found, encoder.eval()(given).pooled.numpy(), atol=1e-6)


def test_what_does_not_fit_is_one_sentence(mteb, encoders):
    with pytest.raises(RecipeError, match="mteb keeps results under organization/name"):
        MtebEncoder(encoders["image"], name="mine")
    with pytest.raises(RecipeError, match="read: there is no encoder of text; there are those of image"):
        MtebEncoder(encoders["image"], read={"text": {"length": 9}})
    model = MtebEncoder(encoders["image"])
    with pytest.raises(RecipeError, match="x gives text, and this network reads image"):
        model.encode([{"text": ["a"]}], task_metadata=SimpleNamespace(name="x", modalities=["text"]))
    with pytest.raises(RecipeError, match="compares image and text, for which this network has no common space"):
        model.encode([], task_metadata=SimpleNamespace(name="x", modalities=["image", "text"]))


def test_without_mteb_the_way_out_is_named(encoders, monkeypatch):
    monkeypatch.setitem(sys.modules, "mteb", None)
    monkeypatch.setitem(sys.modules, "mteb.models", None)
    with pytest.raises(RecipeError, match=r"mteb is not installed: pip install 'mmssl\[suites\]'"):
        MtebEncoder(encoders["image"])
