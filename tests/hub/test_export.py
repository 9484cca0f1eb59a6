"""Native files load with the lines that are printed beside them, in a process that cannot import mmssl."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import BERT, CLIP, PAIRS, ROTATION, VIT, make_run

from mmssl.errors import RunError
from mmssl.hub import export
from mmssl.hub.export import fill, plan

SHUFFLENET = {"model": "torchvision/shufflenet_v2_x0_5", "modality": "image"}
DINO = {
    **{"model": "transformers/dinov2", "modality": "image", "image_size": 64, "patch_size": 8},
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
}
CONVNEXT = {"model": "torchvision/convnext_tiny", "modality": "image"}
STRANGER = """
import sys
sys.modules["mmssl"] = None
import torch
inputs = torch.load("inputs.pt")
{lines}
torch.save(outputs, "outputs.pt")
"""


def loading_lines(readme: Path) -> dict[str, str]:
    """Directory -> the Python that README.md gives for it."""
    return dict(re.findall(r"## (\S+)\n\n```python\n(.*?)\n```", readme.read_text(), re.DOTALL))


def run_elsewhere(folder: Path, uses: dict[str, str], inputs: dict) -> dict[str, torch.Tensor]:
    """Execute the README's lines in `folder`, each followed by the line that uses `model`."""
    lines = loading_lines(folder / "README.md")
    assert lines.keys() == uses.keys()
    body = ["outputs = {}", "torch.set_grad_enabled(False)"]
    for name, use in uses.items():
        body += [lines[name], "model.eval()", f"outputs[{name!r}] = {use}"]
    torch.save(inputs, folder / "inputs.pt")
    script = STRANGER.format(lines="\n".join(body))
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "MISSING" not in result.stderr  # of layers that were not trained
    return torch.load(folder / "outputs.pt")


def test_a_network_without_pooler_is_loaded_without_and_written_without_a_bar(tmp_path, capfd) -> None:
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": {"image": DINO, "text": BERT}})
    lines = {native.directory: native.loading(native.directory) for native in plan(run)}
    assert 'AutoModel.from_pretrained("text", add_pooling_layer=False)' in lines["text"]
    assert "add_pooling_layer" not in lines["image"]
    capfd.readouterr()
    export(run, tmp_path / "native")
    assert capfd.readouterr().err == ""


@pytest.mark.long
def test_lines_of_the_readme_load_every_library(tmp_path) -> None:
    encoders = {"image": VIT, "shufflenet": SHUFFLENET, "convnext": CONVNEXT, "dino": DINO, "text": BERT}
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": encoders})
    export(run, tmp_path / "native")
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(5, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    got = run_elsewhere(
        tmp_path / "native",
        {
            "image": "model(inputs['image'])",
            "shufflenet": "model(inputs['large'])",
            "convnext": "model(inputs['large'])",
            "dino": "model(inputs['large']).pooler_output",
            "text": "model(inputs['ids']).last_hidden_state.mean(1)",
        },
        {"image": image[..., :32, :32], "large": image, "ids": ids},
    )
    with torch.no_grad():
        expected = {
            "image": run.encoders["image"].backbone(image[..., :32, :32]).pooled,
            "shufflenet": run.encoders["shufflenet"].backbone(image).pooled,
            "convnext": run.encoders["convnext"].backbone(image).pooled,
            "dino": run.encoders["dino"].backbone(image).pooled,
            "text": run.encoders["text"](ids).pooled,
        }
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.long
def test_both_towers_of_a_clip_are_one_model(tmp_path) -> None:
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": {"text": CLIP, "image": CLIP}})
    assert [native.directory for native in plan(run)] == ["text_image"]
    assert "is not in it" in plan(run)[0].loading("somewhere")  # two projections
    export(run, tmp_path / "native")
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids, mask = zip(*(run.encoders["text"].tokenizer(text, 16) for text in ("a red circle", "two")), strict=True)
    got = run_elsewhere(
        tmp_path / "native",
        {"text_image": "[model.encode_image(inputs['image']), model.encode_text(tokenizer(['a red circle', 'two']))]"},
        {"image": image},
    )["text_image"]
    with torch.no_grad():
        expected = [
            run.encoders["image"].backbone(image).pooled,
            run.encoders["text"](torch.stack(ids), torch.stack(mask)).pooled,
        ]
    for mine, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("form", ["clip", "siglip"])
def test_towers_without_projections_are_a_whole_clip(tmp_path, form) -> None:
    """open_clip's logits, with scale and bias, are those that the task was trained with."""
    objective = {"name": "combine", "tasks": {"match": {"name": "contrastive", "form": form, "width": None}}}
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": {"image": CLIP, "text": CLIP}, "objective": objective})
    task = run.objective.tasks["match"]
    with torch.no_grad():
        task.logit_scale.fill_(1.25)
        if form == "siglip":
            task.logit_bias.fill_(-3.5)
    export(run, tmp_path / "native")
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(run.encoders["image"].spec[key])[:, None, None] for key in ("mean", "std"))
    got = run_elsewhere(
        tmp_path / "native",
        {"image_text": "model.get_logits(inputs['image'], tokenizer(['a red circle', 'two']))[0]"},
        {"image": (image - mean) / std},
    )["image_text"]
    ids, mask = zip(*(run.encoders["text"].tokenizer(text, 16) for text in ("a red circle", "two")), strict=True)
    with torch.no_grad():
        z = task.predict({"a": image, "b": torch.stack(ids), "b_valid": torch.stack(mask)})
        expected = math.exp(1.25) * z["a"] @ z["b"].T + (-3.5 if form == "siglip" else 0)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "encoders",
    [
        {"image": CLIP, "text": BERT},
        {"image": CLIP, "text": {**CLIP, "model": "open_clip/ViT-B-16"}},
        {"image": CLIP, "text": {**CLIP, "embed_dim": 8}},
        {"image": CLIP, "other": {**CLIP, "modality": "image"}, "text": BERT},
    ],
    ids=["bert", "models", "widths", "images"],
)
def test_only_towers_of_one_clip_are_joined(tmp_path, encoders) -> None:
    run = make_run(tmp_path / "run", {**PAIRS, "encoders": encoders})
    natives = plan(run)
    assert [native.directory for native in natives] == list(encoders)
    assert "only its image tower was trained" in natives[0].loading("somewhere")


def test_export_replaces_its_own_directory_only(tmp_path) -> None:
    run = make_run(tmp_path / "run", ROTATION)
    out = tmp_path / "deep" / "native"
    assert export(run, out) == out
    (out / "image" / "config.json").unlink()
    export(run, out)
    assert (out / "image" / "config.json").is_file()
    assert list(out.parent.iterdir()) == [out]
    (out / "mine.txt").write_text("keep")
    with pytest.raises(RunError, match="choose another directory"):
        export(run, out)
    assert (out / "mine.txt").read_text() == "keep"
    with pytest.raises(RunError, match="choose another directory"):
        export(run, run.directory)


def test_names_that_leave_the_directory(tmp_path) -> None:
    run = make_run(tmp_path / "run", ROTATION)
    run.encoders = {"/tmp/elsewhere": run.encoders["image"]}
    with pytest.raises(RunError, match="cannot name a directory"):
        export(run, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_an_encoder_without_native_form_is_said(tmp_path, monkeypatch) -> None:
    run = make_run(tmp_path / "run", ROTATION)

    def refuse(_: Path) -> None:
        raise TypeError("Odd has no native form")

    monkeypatch.setattr(run.encoders["image"], "export", refuse)
    with pytest.raises(RunError, match="'image' cannot be exported: Odd has no native form"):
        export(run, tmp_path / "native")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_fill_keeps_the_old_when_interrupted(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# mark")

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(out, interrupted, {"README.md"}, "# mark")
    assert [path.name for path in out.iterdir()] == ["README.md"]
    assert list(tmp_path.iterdir()) == [out]
