"""A frozen encoder: what it computes never changes, and the loop, the optimizer and fine-tuning know of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mmssl
from mmssl import recipe
from mmssl.adaptation.probes.base import RawRows
from mmssl.adaptation.probes.finetune import Finetune
from mmssl.adaptation.rows import BatchSplit, Reads
from mmssl.adaptation.targets.classes import Classes
from mmssl.build import build
from mmssl.encoders import create, reinitialized
from mmssl.errors import RecipeError
from mmssl.hub.export import export
from mmssl.recipe import Optimizer
from mmssl.registry import ROOT
from mmssl.training.loop import fit
from mmssl.training.optim import make_optimizer, parameter_groups

LIT = ROOT.parent / "recipes" / "correspondence" / "contrastive_lit_toy.yaml"


def bits(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def test_it_takes_no_gradient_and_stays_in_evaluation_mode():
    torch.manual_seed(0)
    encoder = create("timm/test_resnet", "image", frozen=True, drop_rate=0.5)
    assert encoder.frozen
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    before, expected = bits(encoder), encoder(images).pooled
    whole = torch.nn.ModuleDict({"image": encoder, "head": torch.nn.Dropout()}).train()
    assert whole["head"].training
    assert not any(module.training for module in encoder.modules())
    found = encoder(images).pooled
    assert not found.requires_grad
    assert torch.equal(found, expected)
    # BatchNorm in training mode would have counted the batch.
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    learning = create("timm/test_resnet", "image").train()
    learning(images)
    assert any(not torch.equal(value, before[key]) for key, value in learning.state_dict().items() if "running" in key)


def test_it_can_learn_again():
    encoder = create("timm/test_resnet", "image", frozen=True).freeze(False).train()
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    assert all(module.training for module in encoder.modules())


def test_the_optimizer_has_none_of_it():
    objective, _ = build(recipe.load(LIT))
    frozen = {id(parameter) for parameter in objective.encoders["image"].parameters()}
    learning = {id(parameter) for parameter in objective.parameters()} - frozen
    groups = parameter_groups(objective, 0.1)
    assert {id(parameter) for group in groups for parameter in group["params"]} == learning
    for name in ("adamw", "sgd", "lars"):
        optimizer = make_optimizer(objective, Optimizer(name=name))
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert held == learning


@pytest.mark.quick(1)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_run_leaves_it_bit_by_bit_as_it_was(accumulate):
    loaded = recipe.load(LIT, {"training.steps": 4, "training.accumulate": accumulate, "training.optimizer.lr": 0.1})
    objective, loader = build(loaded)
    image, text = (objective.encoders[name] for name in ("image", "text"))
    before, other = bits(image), bits(text)
    fit(objective, loader, loaded.training, quiet=True)
    assert all(torch.equal(value, before[key]) for key, value in image.state_dict().items())
    assert not all(torch.equal(value, other[key]) for key, value in text.state_dict().items())


@pytest.mark.long
def test_it_is_probed_exported_and_read_back(tmp_path: Path):
    run = mmssl.run(LIT, set={"training.steps": 2, "training.batch_size": 8}, out=tmp_path / "run", quiet=True)
    again = mmssl.load(tmp_path / "run")
    assert again.encoders["image"].frozen
    assert not again.encoders["text"].frozen
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(run.encoders["image"](images).pooled, again.encoders["image"](images).pooled)
    assert (export(again, tmp_path / "native") / "image" / "model.safetensors").is_file()
    assert not reinitialized(again.encoders["image"], 0).frozen


def test_fine_tuning_trains_a_copy_of_it():
    encoder = create("timm/test_resnet", "image", frozen=True)
    before = bits(encoder)
    images, labels = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 2
    probe = Finetune(steps=3, batch_rows=8)
    rows = RawRows(encoder, BatchSplit([{"image": images}], Reads(("image",), {})), torch.arange(len(images)))
    trained = probe.train(Classes(range(2)), rows, labels, {"lr": 1e-2, "decay": 1.0}, 0)
    tuned = trained.encoder("image")
    weights = dict(encoder.named_parameters())
    assert all(not torch.equal(value, weights[key]) for key, value in tuned.named_parameters())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert encoder.frozen


def test_anything_but_yes_and_no_is_refused():
    with pytest.raises(RecipeError, match="frozen = 'backbone' should be true or false"):
        create("timm/test_resnet", "image", frozen="backbone")
