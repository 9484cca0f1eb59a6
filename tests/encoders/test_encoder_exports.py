"""Exports load in the backbone's own library, in a process where mmssl cannot be imported, with equal outputs."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmssl.encoders import create, export_clip_pair
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "reg_tokens": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
}
TEXTS = ["a red square", "a blue circle on a green ground"]

LOADER = """
import json, sys
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "mmssl":
            raise ImportError("mmssl is not here")

sys.meta_path.insert(0, Block())
import torch, torchvision
from safetensors.torch import load_file, save_file

root = Path(sys.argv[1])
inputs = load_file(root / "inputs.safetensors")
found = {}

def read(name, file="preprocessing.json"):
    return json.loads((root / name / file).read_text())

def normalize(x, recipe):
    mean, std = (torch.tensor(recipe[key])[:, None, None] for key in ("mean", "std"))
    return (x.float() / 255 - mean) / std

def from_torchvision(name):
    config = read(name, "config.json")
    net = torchvision.models.get_model(config["builder"], **config["kwargs"])
    report = net.load_state_dict(load_file(root / name / "model.safetensors"), strict=False)
    assert not report.unexpected_keys, report
    assert {key.partition(".")[0] for key in report.missing_keys} == {config["without"]}, report
    setattr(net, config["without"], torch.nn.Identity())
    if "note" in config:
        assert config["note"].endswith("model.avgpool = torch.nn.AdaptiveAvgPool3d(1)")
        net.avgpool = torch.nn.AdaptiveAvgPool3d(1)
    return net.eval()
"""

CLIPS_LOADER = (
    LOADER
    + """
with torch.no_grad():
    for name, clips in inputs.items():
        clips = normalize(clips, read(name)).transpose(1, 2)
        found[name] = from_torchvision(name)(clips)

save_file({key: value.contiguous() for key, value in found.items()}, root / "found.safetensors")
"""
)

LOADER += """
import open_clip, timm, torchaudio
from transformers import AutoModel, AutoTokenizer

texts = json.loads((root / "texts.json").read_text())

with torch.no_grad():
    net = timm.create_model(f"local-dir:{root}/timm_image", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(net)
    assert list(data["mean"]) == [0.1, 0.2, 0.3] and list(data["std"]) == [0.4, 0.5, 0.6], data
    found["timm_image"] = net(normalize(inputs["image"], data))
    found["timm_image_large"] = net(normalize(inputs["large"], data))

    recipe = read("timm_audio")
    mel = torchaudio.transforms.MelSpectrogram(
        recipe["rate"], recipe["n_fft"], None, recipe["hop"], recipe["f_min"], recipe["f_max"], n_mels=recipe["mels"]
    )
    assert recipe["log"] == "ln"
    level = (torch.log(mel(inputs["audio"]) + recipe["eps"]) - recipe["mean"]) / recipe["std"]
    found["timm_audio"] = timm.create_model(f"local-dir:{root}/timm_audio", pretrained=True).eval()(level[:, None])

    net = timm.create_model(f"local-dir:{root}/timm_video", pretrained=True).eval()
    frames = normalize(inputs["video"], read("timm_video"))
    found["timm_video"] = torch.stack([net(frame) for frame in frames.unbind(1)]).mean(0)

    found["torchvision_image"] = from_torchvision("torchvision_image")(
        normalize(inputs["image"], read("torchvision_image"))
    )
    clips = normalize(inputs["video"], read("torchvision_video")).transpose(1, 2)
    found["torchvision_video"] = from_torchvision("torchvision_video")(clips)

    net = AutoModel.from_pretrained(root / "bert").eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "bert")
    batch = tokenizer(texts, padding="max_length", max_length=12, return_tensors="pt")
    tokens, mask = net(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(2)
    assert read("bert")["pool"] == "mean"
    found["bert"] = (tokens * mask).sum(1) / mask.sum(1)

    for name in ("clip_image", "clip_text", "clip_pair"):
        clip = open_clip.create_model(f"local-dir:{root}/{name}", require_pretrained=True).eval()
        data = open_clip.get_model_preprocess_cfg(clip)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{root}/{name}")
        if name != "clip_text":
            found[f"{name}_image"] = clip.encode_image(normalize(inputs["image"], data))
        if name != "clip_image":
            found[f"{name}_text"] = clip.encode_text(tokenizer(texts))
        found[f"{name}_scale"] = clip.logit_scale
    found["clip_pair_bias"] = clip.logit_bias

save_file({key: value.contiguous() for key, value in found.items()}, root / "found.safetensors")
"""


def randomize(encoder):
    """Weights away from their initial values: class tokens, norms, running statistics, biases."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in encoder.backbone.native.net.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.add_(noise * 0.1 * (value.abs().mean() + 0.1)) if "var" not in name else value.add_(noise)
    return encoder.eval()


def load_apart(program, root):
    """Run it where there is no mmssl."""
    # -I: neither the current directory nor PYTHONPATH; mmssl is blocked besides, should it be installed.
    command = [sys.executable, "-I", "-c", program, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    inputs = {
        "image": torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),
        "large": torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8),
        "video": torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8),
        "audio": torch.randn(2, 8000) * 0.1,
    }
    save_file(inputs, root / "inputs.safetensors")
    (root / "texts.json").write_text(json.dumps(TEXTS))
    tokenizer = Tokenizer.train(TEXTS * 4, 120)
    constants = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    build = {
        "timm_image": ("timm/vit_tiny_patch16_224", "image", VIT | constants),
        "timm_audio": ("timm/resnet18", "audio", {"mels": 32, "f_min": 20.0, "hop": 200}),
        "timm_video": ("timm/vit_tiny_patch16_224", "video", VIT | {"reg_tokens": 0}),
        "torchvision_image": ("torchvision/resnet18", "image", {"zero_init_residual": True} | constants),
        "torchvision_video": ("torchvision/mc3_18", "video", {}),
        "bert": ("transformers/bert", "text", BERT | {"tokenizer": tokenizer}),
        "clip_image": ("open_clip/ViT-B-32", "image", CLIP | constants),
        "clip_text": ("open_clip/ViT-B-32", "text", CLIP | {"tokenizer": tokenizer}),
    }
    encoders = {name: randomize(create(model, kind, **kwargs)) for name, (model, kind, kwargs) in build.items()}
    for name, encoder in encoders.items():
        encoder.export(root / name)
    export_clip_pair(encoders["clip_image"], encoders["clip_text"], root / "clip_pair", 1.25, torch.tensor(-3.0))
    load_apart(LOADER, root)
    ids, masks = zip(*(tokenizer(text, 12) for text in TEXTS), strict=True)
    return root, encoders, inputs, (torch.stack(ids), torch.stack(masks)), load_file(root / "found.safetensors")


@pytest.mark.long
@pytest.mark.parametrize(
    ("found", "name", "source"),
    [
        ("timm_image", "timm_image", "image"),
        ("timm_image_large", "timm_image", "large"),
        ("timm_audio", "timm_audio", "audio"),
        ("timm_video", "timm_video", "video"),
        ("torchvision_image", "torchvision_image", "image"),
        ("torchvision_video", "torchvision_video", "video"),
        ("bert", "bert", "text"),
        ("clip_image_image", "clip_image", "image"),
        ("clip_text_text", "clip_text", "text"),
        ("clip_pair_image", "clip_image", "image"),
        ("clip_pair_text", "clip_text", "text"),
    ],
)
def test_the_library_computes_what_the_encoder_does(exported, found, name, source):
    _, encoders, inputs, text, outputs = exported
    given = text if source == "text" else (inputs[source],)
    with torch.no_grad():
        expected = encoders[name](*given).pooled
    assert expected.std() > 1e-3
    torch.testing.assert_close(outputs[found], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        ("r3d_18", {}, (4, 32, 32)),
        ("r2plus1d_18", {}, (4, 32, 32)),
        ("s3d", {}, (8, 32, 32)),
        ("swin3d_t", {}, (4, 32, 32)),
        ("mvit_v1_b", {"patch_embed_stride": [8, 28, 28]}, (16, 224, 224)),
        ("mvit_v2_s", {"patch_embed_stride": [8, 28, 28]}, (16, 224, 224)),
    ],
)
def test_torchvision_computes_what_the_encoder_of_clips_does(name, kwargs, shape, tmp_path):
    torch.manual_seed(0)
    encoder = randomize(create(f"torchvision/{name}", "video", **kwargs))
    frames, height, width = shape
    clips = torch.randint(0, 256, (2, frames, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        expected = encoder(clips).pooled
    encoder.export(tmp_path / name)
    save_file({name: clips}, tmp_path / "inputs.safetensors")
    load_apart(CLIPS_LOADER, tmp_path)
    assert expected.std() > 1e-3
    found = load_file(tmp_path / "found.safetensors")[name]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    # And back from the exported directory, with what the constructor was given.
    again = create(f"torchvision/{name}", "video", pretrained=f"local-dir:{tmp_path / name}").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(clips).pooled, expected)


@pytest.mark.long
def test_a_pair_gives_each_tower_back(exported):
    root, encoders, inputs, text, _ = exported
    weights = f"local-dir:{root / 'clip_pair'}"
    tokenizer = Tokenizer.load(root / "clip_pair")
    image = create("open_clip/ViT-B-32", "image", pretrained=weights).eval()
    words = create("open_clip/ViT-B-32", "text", tokenizer=tokenizer, pretrained=weights).eval()
    torch.testing.assert_close(image(inputs["image"]).pooled, encoders["clip_image"](inputs["image"]).pooled)
    torch.testing.assert_close(words(*text).pooled, encoders["clip_text"](*text).pooled)


@pytest.mark.long
def test_a_pair_carries_scale_and_bias_and_a_lone_tower_says_what_is_random(exported):
    root, _, _, _, outputs = exported
    assert outputs["clip_pair_scale"].item() == 1.25
    assert outputs["clip_pair_bias"].item() == -3.0
    config = json.loads((root / "clip_image" / "open_clip_config.json").read_text())
    assert config["untrained"] == "text tower and logit scale"
    assert "untrained" not in json.loads((root / "clip_pair" / "open_clip_config.json").read_text())


def test_towers_that_make_no_clip_are_refused(tmp_path):
    image = create("open_clip/ViT-B-32", "image", **CLIP)
    text = create("open_clip/ViT-B-32", "text", tokenizer=Tokenizer.open_clip("ViT-B-32"), **CLIP | {"embed_dim": 8})
    with pytest.raises(RecipeError, match="embed_dim is 16 and 8"):
        export_clip_pair(image, text, tmp_path)
    with pytest.raises(RecipeError, match="both open_clip"):
        export_clip_pair(create("timm/resnet18", "image"), text, tmp_path)
    assert not list(tmp_path.iterdir())
