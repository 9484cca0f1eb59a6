"""Run directories as a run leaves them, with tiny random networks and nothing trained."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import mmssl
from mmssl.adaptation.probes._unfinished import Trained
from mmssl.adaptation.probes.finetune import Supervised
from mmssl.adaptation.table import Table
from mmssl.adaptation.targets.classes import Classes
from mmssl.build import build_objective
from mmssl.hub import load
from mmssl.hub.classifier import save_classifier
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data, Recipe, validate
from mmssl.run_directory import Run
from mmssl.training.checkpoint import tensors

VIT = {
    "model": "timm/vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 16,
    "depth": 1,
    "num_heads": 2,
}
BERT = {
    "model": "transformers/bert",
    "tokenizer": "train:300",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
CLIP = {
    "model": "open_clip/ViT-B-32",
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1},
    "text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 1},
}
TEXTS = ["a red circle on a table", "two small blue squares", "the green triangle is large"] * 3
ROTATION = {"encoders": {"image": VIT}, "objective": {"name": "rotation"}, "data": {"source": "toy"}}
PAIRS = {
    "encoders": {"image": VIT, "text": BERT},
    "objective": {"name": "contrastive", "width": 8},
    "data": {"source": "toy", "text": {"length": 16}},
}
PROBES = {
    "rows": [
        {
            "encoder": name,
            "part": part,
            "metrics": {"accuracy": accuracy, "balanced_accuracy": accuracy},
            "spread": spread,
            "interval": {"accuracy": [accuracy - 0.1, accuracy + 0.1]},
        }
        for name, part, accuracy, spread in [
            ("pretrained", "pooled", 0.5, {}),
            ("random", "pooled", 0.25, {"accuracy": 0.01}),
            ("constant", "", 0.125, {}),
        ]
    ],
    "metrics": [
        {"name": "accuracy", "title": "accuracy", "percent": True},
        {"name": "balanced_accuracy", "title": "balanced", "percent": True},
    ],
    "probe": "knn",
    "target": "classes",
    "label": "shape",
    "encoder": "image",
    "train_rows": 80,
    "test_rows": 20,
    "counts": {"classes": 8},
    "shots": None,
    "test": "a fifth of toy",
    "validation": "a fifth of the training rows",
    "seeds": [0, 1, 2],
    "warnings": [],
}


def make_run(directory: Path, tree: dict, probes: dict | None = PROBES) -> Run:
    """Write a run directory of that recipe and read it back."""
    directory.mkdir(parents=True)
    recipe = validate({"training": {"steps": 20, "batch_size": 8}, **tree}, "recipe")
    (directory / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    save_file(initial_weights(directory, recipe), directory / "model.safetensors", metadata={"format": "pt"})
    records = [{"step": step, "loss": 1.5 - step / 100, "accuracy": 0.25 + step / 100, "lr": 1e-3} for step in (10, 20)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if probes:
        (directory / "probes.json").write_text(json.dumps([probes]))
    (directory / "figures").mkdir()
    (directory / "figures" / "history.png").write_bytes(b"\x89PNG")
    state = directory / "state" / "step_00000020"
    state.mkdir(parents=True)
    (state / "optimizer.safetensors").write_bytes(b"secret")
    (directory / "errors.jsonl").write_text('{"file": "/home/somebody/private.png"}\n')
    return load(directory)


def initial_weights(directory: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Random weights of a recipe; tokenizers are trained into the directory."""
    tokenizers = {}
    for name, arguments in recipe.encoders.items():
        if "tokenizer" in arguments:
            tokenizers[name] = Tokenizer.train(TEXTS, 300)
            tokenizers[name].save(directory / "tokenizers" / name)
    torch.manual_seed(7)
    return {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in tensors(build_objective(recipe, tokenizers, where="recipe")).items()
    }


def outputs(run: Run) -> dict[str, torch.Tensor]:
    """What the encoders say about fixed inputs."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "image": (torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8),),
        "text": (torch.randint(5, 20, (2, 16), generator=generator), torch.ones(2, 16, dtype=torch.bool)),
    }
    with torch.no_grad():
        return {name: encoder.eval()(*inputs[encoder.modality]).pooled for name, encoder in run.encoders.items()}


def make_classifier(
    folder: Path,
    encoder: dict = VIT | {"modality": "image"},
    names: tuple[str, ...] = ("a", "b"),
    probes: dict = PROBES,
) -> Path:
    """What fine-tuning leaves, of a network that was not trained."""
    torch.manual_seed(0)
    own = {"tokenizer": Tokenizer.train(TEXTS, 300)} if encoder["modality"] == "text" else {}
    target = Classes(names=names)
    plain = torch.zeros(target.width), torch.ones(target.width)
    objective = Supervised(mmssl.encoder(**encoder | own), target, plain)
    objective.spread.fill_(1.0)
    how = Data(source="files", image={"size": 32}, text={"length": 16})
    return save_classifier(folder, Trained(objective, None), Table.from_json(probes), how)
