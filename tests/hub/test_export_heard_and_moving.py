"""Classifiers of clips and sounds leave as those of pictures do, and the lines of README.md give the same outputs."""

import json
import re

import pytest
import torch
import transformers

import mmssl
from mmssl.adaptation.probes.finetune import Supervised
from mmssl.adaptation.targets.classes import Classes
from mmssl.hub import export_classifier
from mmssl.hub.classifier import Classifier
from mmssl.hub.space import pooled_lines
from mmssl.recipe import Data

NAMES = ["Größe", "blade, or so", "fire"]
TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = {**TINY, "image_size": 16, "patch_size": 8}
CLIPS = {**PATCHES, "num_frames": 4}
TUBES = {"image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8]}
WAVES = {**TINY, "conv_dim": [8, 8], "conv_kernel": [10, 8], "conv_stride": [5, 4], "num_conv_pos_embeddings": 4}
WAVES |= {"num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2}
BANKS = {**TINY, "num_mel_bins": 16, "max_length": 40, "patch_size": 8}
VIT = {"img_size": [16, 24], "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
# Model, arguments, what is said of the head where it is apart, and the class of transformers.
VIDEO = {
    "frames": ("timm/test_resnet", {}, "", None),
    "changes": ("timm/test_resnet", {"difference": True}, "", None),
    "loudest-frame": ("timm/test_resnet", {"temporal": "max"}, "pooled by their maximum", None),
    "r3d": ("torchvision/r3d_18", {"difference": True}, "", None),
    "vit-frames": ("transformers/vit", PATCHES, "", "ViTForImageClassification"),
    "vit-other-size": ("transformers/vit", PATCHES | {"image_size": 24}, "", "ViTForImageClassification"),
    "vivit": ("transformers/vivit", TINY | TUBES, "", "VivitForVideoClassification"),
    "timesformer": ("transformers/timesformer", CLIPS, "", "TimesformerForVideoClassification"),
    "videomae-changes": ("transformers/videomae", CLIPS | {"difference": True}, "a norm of its own before its", None),
    "videomae": ("transformers/videomae", CLIPS, "a norm of its own before its classifier", None),
    "videomae-first": ("transformers/videomae", CLIPS | {"use_mean_pooling": False}, "something else", None),
}
AUDIO = {
    "log-mel": ("timm/test_resnet", {"mels": 32}, "", None),
    "db": ("torchvision/resnet18", {"log": "db", "f_max": 4000.0, "mels": 32}, "", None),
    "patches": ("timm/vit_tiny_patch16_224", VIT | {"mels": 16}, "", None),
    "wav2vec2": ("transformers/wav2vec2", WAVES, "", "Wav2Vec2ForSequenceClassification"),
    "hubert": ("transformers/hubert", WAVES | {"feat_extract_norm": "layer"}, "", "HubertForSequenceClassification"),
    "wavlm-as-it-is": ("transformers/wavlm", WAVES | {"normalize": False}, "", "WavLMForSequenceClassification"),
    "ast": ("transformers/audio-spectrogram-transformer", BANKS, "a norm of its own before its classifier", None),
}
HEAVY = ("r3d", "db")


def classifier_of(modality, model, options) -> Classifier:
    torch.manual_seed(0)
    encoder = mmssl.encoder(model, modality=modality, **options).eval()
    how = {"video": {"size": 16, "frames": 4}, "audio": {"seconds": 0.21, "rate": 16000}}[modality]
    encoder.decoding = Data(source="files", **{modality: how})
    target = Classes(NAMES)
    objective = Supervised(encoder, target, (torch.zeros(3), torch.ones(3)))
    torch.nn.init.normal_(objective.head.weight)
    objective.center.normal_()
    objective.spread.fill_(0.5)
    return Classifier(objective.eval(), encoder.decoding, "label", None)


def rows_of(modality):
    if modality == "video":
        return torch.randint(256, (2, 4, 3, 16, 16), dtype=torch.uint8)
    return torch.rand(2, 3360) - 0.5


def parameters(cases, modality):
    return [pytest.param(modality, *cases[k], marks=[pytest.mark.long] * (k in HEAVY), id=k) for k in cases]


@pytest.mark.parametrize(
    ("modality", "model", "options", "why", "kind"), [*parameters(VIDEO, "video"), *parameters(AUDIO, "audio")]
)
def test_the_lines_give_the_same_outputs(modality, model, options, why, kind, tmp_path, monkeypatch):
    classifier = classifier_of(modality, model, options)
    out = export_classifier(classifier, tmp_path / "native")
    text = (out / "README.md").read_text(encoding="utf-8")
    assert why in text
    assert ("The head is a file of its own" in text) == (out / "head.safetensors").exists() == bool(why)
    assert ("Sounds shorter than 0.21 s" in text) == (modality == "audio")
    assert json.loads((out / "names.json").read_text(encoding="utf-8")) == NAMES
    if kind:
        config = transformers.AutoConfig.from_pretrained(out / modality)
        assert (config.architectures, list(config.id2label.values())) == ([kind], NAMES)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "mmssl" not in program
    rows, names = rows_of(modality), {}
    monkeypatch.chdir(out)
    exec(program, names)
    with torch.no_grad():
        expected = classifier.objective.predict({modality: rows})["outputs"]
    torch.testing.assert_close(names["outputs"](rows), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("modality", "cases"), [("video", VIDEO), ("audio", AUDIO)])
def test_what_a_network_reads_is_said_as_its_library_takes_it(modality, cases, tmp_path):
    for name in {"videomae", "vivit", "timesformer", "frames", "wav2vec2", "ast"} & cases.keys():
        encoder = classifier_of(modality, *cases[name][:2]).encoder
        encoder.export(tmp_path / name)
        said = json.loads((tmp_path / name / "preprocessing.json").read_text())["input"]
        assert ("(B, T, 3, H, W)" in said) == (name in ("videomae", "vivit", "timesformer"))
        _, lines, pooled = pooled_lines(encoder, "model")
        assert (lines, pooled.startswith("model(x")) == ([], True)


@pytest.mark.parametrize("name", ["vivit", "timesformer", "videomae", "dinov2", "siglip_vision_model"])
def test_the_librarys_image_processor_makes_what_the_network_reads(name, tmp_path):
    pictures = {key: value for key, value in PATCHES.items() if key != "intermediate_size"}
    options = VIDEO[name][1] if name in VIDEO else pictures
    encoder = mmssl.encoder(f"transformers/{name}", modality="video" if name in VIDEO else "image", **options).eval()
    encoder.export(tmp_path)
    frames = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    made = processor([frame.permute(1, 2, 0).numpy() for frame in frames], return_tensors="pt")["pixel_values"]
    read = encoder.prepare(frames[None])[0].transpose(1, 2) if name in VIDEO else encoder.prepare(frames)[0]
    torch.testing.assert_close(made, read, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm-as-it-is", "ast"])
def test_the_librarys_feature_extractor_makes_what_the_network_hears(name, tmp_path):
    model, options, *_ = AUDIO[name]
    encoder = classifier_of("audio", model, options).encoder
    encoder.export(tmp_path)
    sound = torch.rand(3360) - 0.5
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path)
    made = extractor(sound.numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
    heard = encoder.prepare(sound[None])[0]
    torch.testing.assert_close(made, heard[:, 0].mT if name == "ast" else heard, atol=1e-5, rtol=1e-5)
    if name == "wavlm-as-it-is":
        assert not mmssl.encoder(model, modality="audio", pretrained=f"local-dir:{tmp_path}").normalize


def test_sounds_leave_without_a_warning_about_colors(tmp_path, caplog):
    classifier_of("audio", *AUDIO["log-mel"][:2]).encoder.export(tmp_path)
    assert not caplog.records
