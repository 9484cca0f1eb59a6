"""Fine-tuning: it learns what frozen features lack, on a copy, with the learning rates it says."""

import pytest
import torch

from mmssl import encoder as create
from mmssl.adaptation.probes._trained import Shuffled
from mmssl.adaptation.probes.base import RawRows
from mmssl.adaptation.probes.finetune import Finetune, scale_by_depth
from mmssl.adaptation.rows import BatchSplit, Reads
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.values import Values
from mmssl.training.optim import parameter_groups


def tinted(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, a little redder or a little bluer."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    tint = torch.tensor([[20.0, 0, -20], [-20, 0, 20]])[labels]
    noise = 60 * torch.randn(rows, 3, 16, 16, generator=random)
    return (128 + tint[:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def raw(encoder, x: torch.Tensor) -> RawRows:
    """Pictures in batches of uneven sizes, as rows."""
    batches = [{"image": part} for part in x.split([5, len(x) - 5])]
    return RawRows(encoder, BatchSplit(batches, Reads(("image",), {})), torch.arange(len(x)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return create("timm/test_resnet", modality="image")


def test_it_learns_separable_classes_and_leaves_the_encoder_alone(small):
    x, labels = tinted(96, 0)
    y, truth = tinted(64, 1)
    small.train()
    state = {key: value.clone() for key, value in small.state_dict().items()}
    probe = Finetune(steps=30, batch_rows=16, lr=(3e-3,), decay=(1.0,))
    train, test = raw(small, x), raw(small, y)
    (answers,) = probe.predict(Classes(range(2)), train, labels, test, probe.settings(), 0)
    (again,) = probe.predict(Classes(range(2)), train, labels, test, probe.settings(), 0)
    assert (answers.argmax(1) == truth).float().mean() > 0.9
    torch.testing.assert_close(answers.sum(1), torch.ones(64))
    assert torch.equal(answers, again)
    assert small.training
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    assert not any(hasattr(p, "lr_scale") for p in small.parameters())


def test_a_decay_of_zero_trains_the_head_alone(small):
    x, labels = tinted(32, 0)
    small.eval()
    probe = Finetune(steps=3, batch_rows=8)
    objective = probe.train(Classes(range(2)), raw(small, x), labels, {"lr": 0.1, "decay": 0.0}, 0)
    after = dict(objective.encoder("image").named_parameters())
    assert all(torch.equal(value, after[key].cpu()) for key, value in small.named_parameters())
    assert objective.head.weight.abs().max() > 0.2


def test_the_head_is_one_linear_map_of_features_in_units_of_the_first_step(small):
    x, labels = tinted(32, 0)
    small.eval()
    target = Values(1)
    objective = Finetune(steps=2, batch_rows=32).train(
        target, raw(small, x), 100.0 + labels[:, None], {"lr": 0.01, "decay": 0.0}, 0
    )
    objective.train()  # statistics of BatchNorm are those of the batch, as in training
    with torch.no_grad():
        features = objective.encoder("image")(x.to(objective.center.device)).pooled
        seen = (features - objective.center) / objective.spread
        torch.testing.assert_close(seen.mean(0), torch.zeros_like(seen[0]), atol=1e-4, rtol=0)
        torch.testing.assert_close(seen.square().mean(), torch.ones_like(objective.spread))
        weight, bias = objective.linear()
        outputs = objective.answer({"image": x.to(objective.center.device)}).cpu()
    torch.testing.assert_close(features.cpu() @ weight.T + bias, outputs)
    assert (outputs - 100.5).abs().max() < 5


def scales(encoder, decay: float) -> dict[str, float]:
    scale_by_depth(encoder, decay)
    return {name.removeprefix("backbone.net."): p.lr_scale for name, p in encoder.named_parameters()}


def test_layer_wise_rates_follow_the_rule_of_mae():
    found = scales(create("timm/test_vit", modality="image", img_size=32, patch_size=8), 0.5)
    blocks = 6
    assert found["pos_embed"] == found["patch_embed.proj.weight"] == 0.5 ** (blocks + 1)
    for i in range(blocks):
        assert found[f"blocks.{i}.attn.qkv.weight"] == 0.5 ** (blocks - i)
    assert found["norm.weight"] == 1.0


@pytest.mark.parametrize("model", ["timm/resnet18", "torchvision/resnet18", "timm/test_resnet"])
def test_layer_wise_rates_never_fall_toward_the_head(model):
    found = list(scales(create(model, modality="image"), 0.5).values())
    assert found == sorted(found)
    assert len(set(found)) > 4
    assert found[-1] == 0.5


def test_the_optimizer_gets_the_rates(small):
    scale_by_depth(small, 0.5)
    groups = parameter_groups(small, 0.05)
    assert {group["lr_scale"] for group in groups} == {p.lr_scale for p in small.parameters()}


def test_shuffled_rows_come_once_an_epoch_and_in_a_new_order():
    rows = raw(None, torch.arange(10).view(10, 1, 1, 1).expand(-1, 3, 2, 2))
    loader = Shuffled(rows, 10.0 * torch.arange(10)[:, None], batch_size=4, seed=0)
    batches = list(loader.batches(0, 5))
    assert all(torch.equal(batch["image"][:, 0, 0, 0] * 10.0, batch["label"][:, 0]) for batch in batches)
    seen = torch.cat([batch["id"] for batch in batches]).tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.cat([batch["id"] for batch in loader.batches(3, 5)]).tolist() == seen[12:]
