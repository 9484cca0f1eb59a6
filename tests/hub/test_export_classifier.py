"""A saved classifier leaves as its library's own class, or as network and head, with equal outputs."""

import json
import re
import subprocess
import sys

import pytest
import timm
import torch
import transformers
from small_runs import BERT, TEXTS, VIT

import mmssl
from mmssl.adaptation.probes.finetune import Supervised
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.labels import Labels
from mmssl.adaptation.targets.values import Values
from mmssl.errors import RunError
from mmssl.hub import export_classifier
from mmssl.hub.classifier import Classifier
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

SMALL = {key: value for key, value in BERT.items() if key not in ("model", "tokenizer")}
PATCHES = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
APART = "The head is a file of its own, for "
CASES = {
    "timm-resnet": ("timm/test_resnet", {}, ""),
    "timm-vit": (VIT["model"], {key: value for key, value in VIT.items() if key != "model"}, ""),
    "torchvision": ("torchvision/resnet18", {}, ""),
    "torchvision-layers": ("torchvision/mobilenet_v3_small", {}, "MobileNetV3 is not one linear layer"),
    "vit": ("transformers/vit", PATCHES, ""),
    "dinov2": ("transformers/dinov2", PATCHES, ""),
    "convnext": ("transformers/convnext", {"hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1]}, ""),
    "siglip": ("transformers/siglip_vision_model", PATCHES, "has no class for transformers/siglip_vision_model"),
    "open_clip": (
        "open_clip/ViT-B-32",
        {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}},
        "open_clip has no class for classifiers",
    ),
    "bert-first": ("transformers/bert", SMALL | {"pool": "first"}, ""),
    "roberta-first": ("transformers/roberta", SMALL | {"pool": "first"}, ""),
    "bert-mean": ("transformers/bert", SMALL, "the mean of the tokens, and BertForSequenceClassification does not"),
    "modernbert-first": ("transformers/modernbert", SMALL | {"pool": "first"}, "has a layer of its own"),
}
HEAVY = ("open_clip", "siglip", "torchvision")
SENTENCES = ["two small blue squares", "a red circle on a table, and the green triangle"]


def classifier_of(model, options, target, size=32) -> Classifier:
    """Random weights in the encoder and the head."""
    torch.manual_seed(0)
    reads = "text" if options.keys() & {"hidden_size"} and "image_size" not in options else "image"
    if reads == "text":
        options = options | {"tokenizer": Tokenizer.train(TEXTS, 300)}
    how = {"text": {"length": 12}} if reads == "text" else {"image": {"size": size}}
    encoder = mmssl.encoder(model, modality=reads, **options).eval()
    encoder.decoding = Data(source="files", **how)
    width = target.width
    objective = Supervised(encoder, target, (torch.arange(float(width)), 2 * torch.ones(width)))
    if target.names:
        objective.shift.zero_()
        objective.scale.fill_(1)
    torch.nn.init.normal_(objective.head.weight)
    objective.center.normal_()
    objective.spread.fill_(0.5)
    return Classifier(objective.eval(), encoder.decoding, "kind", None)


def inputs_of(classifier):
    """What the exported lines take, and the answers of the classifier, before the softmax."""
    encoder, objective = classifier.encoder, classifier.objective
    if encoder.modality == "text":
        given = encoder.read(SENTENCES)
        batch = {"text": given.x, "text_mask": given.valid}
    else:
        batch = {"image": torch.randint(256, (2, *encoder.input_size()), dtype=torch.uint8)}
    with torch.no_grad():
        outputs = objective.predict(batch)["outputs"] * objective.scale + objective.shift
    return (SENTENCES if encoder.modality == "text" else batch["image"]), outputs


def program_of(folder) -> str:
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "mmssl" not in program
    assert len([line for line in program.splitlines() if line.strip()]) <= 16
    return program


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.long] if case in HEAVY else []) for case in CASES],
)
def test_the_lines_give_the_same_outputs(case, tmp_path, monkeypatch):
    model, options, why = CASES[case]
    classifier = classifier_of(model, options, Classes(["gray, or so", "red", "blue"]))
    out = export_classifier(classifier, tmp_path / "native")
    text = (out / "README.md").read_text()
    assert why in text
    assert (APART in text) == (out / "head.safetensors").exists() == bool(why)
    given, expected = inputs_of(classifier)
    monkeypatch.chdir(out)
    names = {}
    exec(program_of(out), names)
    torch.testing.assert_close(names["outputs"](given), expected, atol=1e-5, rtol=1e-5)
    assert json.loads((out / "names.json").read_text()) == ["gray, or so", "red", "blue"]


def test_names_and_kinds_of_problem(tmp_path, monkeypatch):
    model, options, _ = CASES["vit"]
    kinds = {
        "single_label_classification": Classes(["a", "b"]),
        "multi_label_classification": Labels(["a", "b"]),
        "regression": Values(2),
    }
    for kind, target in kinds.items():
        classifier = classifier_of(model, options, target, size=40)  # another size than the network was built for
        out = export_classifier(classifier, tmp_path / kind)
        config = transformers.AutoConfig.from_pretrained(out / "image")
        assert config.problem_type == kind
        assert [config.id2label[i] for i in range(2)] == (["0", "1"] if kind == "regression" else ["a", "b"])
        assert config.architectures == ["ViTForImageClassification"]
        monkeypatch.chdir(out)
        names = {}
        exec(program_of(out), names)
        given, expected = inputs_of(classifier)
        torch.testing.assert_close(names["outputs"](given), expected, atol=1e-5, rtol=1e-5)
    out = export_classifier(classifier_of(*CASES["timm-resnet"][:2], Classes(["a", "b"])), tmp_path / "timm")
    assert json.loads((out / "image" / "config.json").read_text())["label_names"] == ["a", "b"]
    assert timm.create_model(f"local-dir:{out}/image", pretrained=True).num_classes == 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", ["timm-resnet", "torchvision", "vit"])
def test_an_encoder_starts_from_an_exported_classifier(case, tmp_path):
    model, options, _ = CASES[case]
    classifier = classifier_of(model, options, Classes(["a", "b"]))
    out = export_classifier(classifier, tmp_path / "native")
    again = mmssl.encoder(model, modality="image", pretrained=f"local-dir:{out}/image").eval()
    given, _ = inputs_of(classifier)
    with torch.no_grad():
        torch.testing.assert_close(again(given).pooled, classifier.encoder(given).pooled)


def test_over_its_own_and_nothing_else(tmp_path):
    classifier = classifier_of(*CASES["timm-resnet"][:2], Classes(["a", "b"]))
    export_classifier(classifier, export_classifier(classifier, tmp_path / "native"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="was not written by this command"):
        export_classifier(classifier, tmp_path / "mine")
    sounds = mmssl.encoder("timm/test_resnet", modality="audio", rate=8000, mels=32)
    sounds.spec["model"] = "mine/net"
    objective = Supervised(sounds, Classes(["a", "b"]), (torch.zeros(2), torch.ones(2)))
    with pytest.raises(RunError, match=r"its network is one of timm, .* mine/net of audio; mmssl predict uses it"):
        export_classifier(Classifier(objective, Data(source="files"), "kind", None), tmp_path / "sounds")


STRANGER = """
import sys
sys.modules["mmssl"] = None
{program}
given, expected = torch.load("inputs.pt", weights_only=False)
torch.testing.assert_close(outputs(given), expected, atol=1e-5, rtol=1e-5)
"""


@pytest.mark.long
@pytest.mark.parametrize("case", ["bert-first", "dinov2"])
def test_without_mmssl(case, tmp_path):
    classifier = classifier_of(*CASES[case][:2], Classes(["a", "b"]))
    out = export_classifier(classifier, tmp_path / "native")
    torch.save(inputs_of(classifier), out / "inputs.pt")
    script = STRANGER.format(program=program_of(out))
    done = subprocess.run([sys.executable, "-c", script], cwd=out, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
