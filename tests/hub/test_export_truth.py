"""An export says what the network was trained with, and takes along what it needs to search."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from small_runs import BERT, CLIP, PAIRS, ROTATION, VIT, make_run

import mmssl
from mmssl.hub import export

SQUARE = {"source": "toy", "image": {"size": 48}}


def test_timm_knows_the_size_and_the_origin(tmp_path) -> None:
    constants = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    tree = {"encoders": {"image": {"model": "timm/test_resnet", **constants}}, "license": "cc-by-4.0"}
    run = make_run(tmp_path / "run", {**ROTATION, **tree, "data": SQUARE})
    export(run, tmp_path / "native")
    model = timm.create_model(f"local-dir:{tmp_path}/native/image", pretrained=True).eval()
    found = timm.data.resolve_model_data_config(model)
    assert found["input_size"] == (3, 48, 48)
    assert [list(found[key]) for key in ("mean", "std")] == [*constants.values()]
    assert (found["interpolation"], found["crop_pct"], found["crop_mode"]) == ("bicubic", 1.0, "center")
    config = json.loads((tmp_path / "native" / "image" / "config.json").read_text())["pretrained_cfg"]
    assert config["license"] == "cc-by-4.0"
    assert "tag" not in config
    assert "trained with mmssl, started from: random weights" in config["notes"]
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC)
    encoder = run.encoders["image"]
    mine = encoder.normalize(encoder.read(picture).x)[0]
    apart = {
        part: float((timm.data.create_transform(**{**found, "crop_pct": part})(picture) - mine).abs().mean())
        for part in (1.0, 0.95)
    }
    assert apart[1.0] < 0.02 < apart[0.95]


@pytest.mark.parametrize("pretrained", [False, True])
def test_an_encoder_of_no_run_has_no_borrowed_license(tmp_path, pretrained) -> None:
    encoder = mmssl.encoder("timm/test_resnet", modality="image")
    encoder.export(tmp_path / "first")
    if pretrained:
        encoder = mmssl.encoder("timm/test_resnet", modality="image", pretrained=f"local-dir:{tmp_path}/first")
        encoder.export(tmp_path / "first")
    config = json.loads((tmp_path / "first" / "config.json").read_text())["pretrained_cfg"]
    assert not {"tag", "license", "origin_url"} & config.keys()
    start = "first" if pretrained else "random weights"  # and not where on this machine that is
    assert config["notes"] == [f"trained with mmssl, started from: {start}"]


def test_texts_and_sounds(tmp_path) -> None:
    from transformers import AutoTokenizer

    run = make_run(tmp_path / "run", PAIRS)
    export(run, tmp_path / "native")
    assert AutoTokenizer.from_pretrained(tmp_path / "native" / "text").model_max_length == 16
    about = json.loads((tmp_path / "native" / "text" / "preprocessing.json").read_text())
    assert about["decoding"]["length"] == 16
    assert about["origin"] == {"task": "contrastive", "started_from": "random weights"}
    sounds = {"image": VIT, "audio": {"model": "timm/test_resnet", "rate": 8000, "mels": 32}}
    objective = {"name": "contrastive", "width": 8, "b": "audio"}
    data = {"source": "toy", "audio": {"rate": 8000, "seconds": 1.5}}
    run = make_run(tmp_path / "sounds", {"encoders": sounds, "objective": objective, "data": data})
    export(run, tmp_path / "heard")
    about = json.loads((tmp_path / "heard" / "audio" / "preprocessing.json").read_text())
    assert (about["rate"], about["mels"], about["decoding"]["seconds"]) == (8000, 32, 1.5)
    config = json.loads((tmp_path / "heard" / "audio" / "config.json").read_text())["pretrained_cfg"]
    spectrogram = run.encoders["audio"].spectrogram(torch.zeros(1, 12_000))
    assert config["input_size"] == [1, *spectrogram.shape[1:]]


STRANGER = """
import sys
sys.modules["mmssl"] = None
{lines}
inputs = torch.load("inputs.pt")
with torch.no_grad():
    torch.save(embed_image(inputs["image"]) @ embed_text(inputs["texts"]).T, "outputs.pt")
"""
TEXTS = ["a red circle", "two"]


@pytest.mark.long
@pytest.mark.parametrize(
    "encoders", [{"image": VIT, "text": BERT}, {"image": CLIP, "text": CLIP}], ids=["apart", "clip"]
)
def test_towers_search_without_mmssl(tmp_path, encoders) -> None:
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": encoders})
    folder = export(run, tmp_path / "native")
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text = run.encoders["text"].read(TEXTS)
    with torch.no_grad():
        z = run.objective.predict({"a": image, "b": text.x, "b_valid": text.valid})
    normalize = run.encoders["image"].normalize
    torch.save({"image": normalize(image), "texts": TEXTS}, folder / "inputs.pt")
    section = (folder / "README.md").read_text().partition("## One space for image and text")[2]
    lines = re.search(r"```python\n(.*?)\n```", section, re.DOTALL)[1]
    assert len([line for line in lines.splitlines() if line.strip()]) <= 30
    script = STRANGER.format(lines=lines)
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folder / "outputs.pt"), z["a"] @ z["b"].T, atol=1e-5, rtol=1e-4)


def test_projections_are_those_of_the_task(tmp_path) -> None:
    from safetensors.torch import load_file

    run = make_run(tmp_path / "run", PAIRS)
    maps = load_file(Path(export(run, tmp_path / "native")) / "projections.safetensors")
    assert torch.equal(maps["image_text.image.weight"], run.objective.project_a.weight)
    assert torch.equal(maps["image_text.text.weight"], run.objective.project_b.weight)
    run = make_run(tmp_path / "turns", ROTATION)
    assert not (export(run, tmp_path / "alone") / "projections.safetensors").exists()
