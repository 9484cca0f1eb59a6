"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmssl.encoders import create
from mmssl.recipe import Optimizer, Schedule, Training
from mmssl.training.optim import lr_factor, make_optimizer, parameter_groups, set_lr, set_weight_decay


def test_cosine_equals_transformers() -> None:
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=50)
    for step in range(50):
        assert lr_factor(Training(steps=50), step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warmup_rises_linearly_and_linear_decay_ends_at_final() -> None:
    training = Training(steps=24, schedule=Schedule(name="linear", warmup=4, final=0.1))
    factors = [lr_factor(training, step) for step in range(25)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[14] == pytest.approx(0.55)
    assert factors[24] == pytest.approx(0.1)
    assert lr_factor(Training(steps=24, schedule=Schedule(name="constant", warmup=2)), 20) == 1.0


def test_multistep_equals_torch() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[15, 30, 45], gamma=0.2)
    training = Training(steps=50, schedule=Schedule(name="multistep", milestones=(15, 30, 45), gamma=0.2))
    for step in range(50):
        assert lr_factor(training, step) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_inverse_square_root_is_t5s() -> None:
    """1 / sqrt(max(n, k)) with k steps of warm-up (Raffel et al. 2020, section 3.1.2), here in shares of its peak."""
    training = Training(steps=1000, schedule=Schedule(name="inverse_sqrt", warmup=100))
    for step in (100, 101, 400, 999):
        assert lr_factor(training, step) == pytest.approx(step**-0.5 / 100**-0.5)
    assert lr_factor(training, 49) == pytest.approx(50 / 101)


def test_a_schedule_in_epochs_is_the_same_in_steps() -> None:
    schedule = Schedule(name="multistep", warmup=0.5, milestones=(2, 3))
    in_epochs = Training(epochs=4, schedule=schedule).in_steps(10)
    assert in_epochs.steps == 40
    in_steps = Training(steps=40, schedule=Schedule(name="multistep", warmup=5, milestones=(20, 30)))
    assert [lr_factor(in_epochs, n) for n in range(40)] == [lr_factor(in_steps, n) for n in range(40)]
    assert Training(epochs=0.01).in_steps(10).steps == 1
    with pytest.raises(ValueError, match="needs data of known size"):
        Training(epochs=1).in_steps(None)


def test_nesterov_is_torchs() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), Optimizer(name="sgd", nesterov=True))
    assert all(group["nesterov"] for group in optimizer.param_groups)


def test_biases_and_norms_are_not_decayed_and_scales_multiply() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    module[0].weight.lr_scale = 0.5
    groups = parameter_groups(module, 0.1)
    assert {(g["weight_decay"], g["lr_scale"], len(g["params"])) for g in groups} == {(0.1, 0.5, 1), (0.0, 1.0, 3)}
    optimizer = make_optimizer(module, Optimizer(lr=1.0, weight_decay=0.1))
    set_lr(optimizer, 0.4)
    assert {g["lr"] for g in optimizer.param_groups} == {0.2, 0.4}


def test_a_constant_learning_rate_stays_at_the_peak() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    for p in module[1].parameters():
        p.lr_constant = True
    optimizer = make_optimizer(module, Optimizer(name="sgd", lr=0.8, weight_decay=0.1))
    set_lr(optimizer, 0.2)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in module[0].parameters()} == {0.2}
    assert {rates[id(p)] for p in module[1].parameters()} == {0.8}
    assert {g["weight_decay"] for g in optimizer.param_groups if g["lr"] == 0.8} == {0.1, 0.0}


def test_adamw_takes_one_fused_pass_and_equals_the_plain_one() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(module)
    optimizer = make_optimizer(module, Optimizer(lr=0.1, weight_decay=0.1))
    assert optimizer.defaults["fused"]
    plain = torch.optim.AdamW(parameter_groups(twin, 0.1), lr=0.1, betas=Optimizer().betas, foreach=False)
    x = torch.randn(2, 4, 8, 8)
    for _ in range(3):
        for network, by in ((module, optimizer), (twin, plain)):
            by.zero_grad()
            network(x).square().sum().backward()
            by.step()
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_lars_does_not_adapt_what_is_not_decayed() -> None:
    """You et al.: the trust ratio belongs to weights; biases take the plain step (SimCLR's exclusion)."""
    module = nn.Linear(4, 4)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = make_optimizer(module, Optimizer(name="lars", lr=1.0, weight_decay=1e-4, momentum=0.0))
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(before["bias"] - module.bias, torch.ones(4))
    ratio = before["weight"].norm() / (torch.ones(4, 4) + 1e-4 * before["weight"]).norm()
    step = before["weight"] - module.weight
    assert torch.allclose(step, 0.001 * ratio * (torch.ones(4, 4) + 1e-4 * before["weight"]), rtol=1e-3)


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_weight_that_decays_by_zero_is_adapted_and_a_bias_is_not(name: str) -> None:
    """The trust ratio belongs to weights whatever their decay: the step does not grow with the gradient (LARS)."""
    steps = {}
    for scale in (1.0, 100.0):
        torch.manual_seed(0)
        module = nn.Linear(4, 4)
        before = {key: p.detach().clone() for key, p in module.named_parameters()}
        optimizer = make_optimizer(module, Optimizer(name=name, lr=1.0, weight_decay=0.0, momentum=0.0, eps=1e-12))
        for p in module.parameters():
            p.grad = torch.full_like(p, scale)
        optimizer.step()
        steps[scale] = {key: before[key] - p.detach() for key, p in module.named_parameters()}
        trust = {"lars": 0.001, "lamb": 1.0}[name]
        torch.testing.assert_close(steps[scale]["weight"].norm(), trust * before["weight"].norm())
    torch.testing.assert_close(steps[1.0]["weight"], steps[100.0]["weight"])
    if name == "lars":
        torch.testing.assert_close(100 * steps[1.0]["bias"], steps[100.0]["bias"])


@pytest.mark.parametrize(
    ("model", "arguments", "spared"),
    [
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 1, "embed_dim": 24}, {"pos_embed", "cls_token"}),
        (
            "timm/swin_tiny_patch4_window7_224",
            {"img_size": 56, "window_size": 7, "depths": (1, 1), "embed_dim": 12, "num_heads": (1, 2)},
            {f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(2)},
        ),
        ("timm/test_resnet", {}, set()),
    ],
)
def test_what_timm_leaves_out_of_weight_decay_is_left_out(model: str, arguments: dict, spared: set) -> None:
    encoder = create(model, "image", **arguments)
    module = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(3, 3)})
    decayed = {id(p) for group in parameter_groups(module, 0.1) if group["weight_decay"] for p in group["params"]}
    matrices = {name for name, p in encoder.backbone.net.named_parameters() if p.ndim > 1}
    left_out = {name for name, p in encoder.backbone.net.named_parameters() if p.ndim > 1 and id(p) not in decayed}
    assert left_out == spared < matrices
    assert id(module["head"].weight) in decayed


def test_all_parameters_are_decayed_where_the_recipe_says_so() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    (group,) = make_optimizer(module, Optimizer(name="sgd", weight_decay=0.1, decay="all")).param_groups
    assert (len(group["params"]), group["weight_decay"]) == (4, 0.1)


def test_lamb_is_alberts() -> None:
    """You et al. 2019 without bias correction: the norm of a weight over that of its Adam step scales the step."""
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    b1, b2, eps, lr, decay = 0.8, 0.9, 1e-3, 0.3, 0.2
    optimizer = make_optimizer(module, Optimizer(name="lamb", lr=lr, weight_decay=decay, betas=(b1, b2), eps=eps))
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    m, v = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for _ in range(3):
        for name, p in module.named_parameters():
            p.grad = 10 * torch.randn_like(p)  # longer than 1: nothing clips it
            m[name] = b1 * m[name] + (1 - b1) * p.grad
            v[name] = b2 * v[name] + (1 - b2) * p.grad**2
            step, own = m[name] / (v[name].sqrt() + eps), expected[name]
            if name == "weight":
                step = step + decay * own
                step = step * own.norm() / step.norm()
            expected[name] = own - lr * step
        optimizer.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars", "lamb"])
def test_weight_decay_follows_a_cosine_and_leaves_biases_alone(name: str) -> None:
    module = nn.Linear(2, 3)
    settings = Optimizer(name=name, weight_decay=0.0, weight_decay_end=0.4)
    optimizer = make_optimizer(module, settings)
    for progress, expected in ((0.0, 0.0), (1 / 3, 0.1), (0.5, 0.2), (1.0, 0.4)):
        set_weight_decay(optimizer, settings, progress)
        decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays == {2: pytest.approx(expected), 1: 0.0}
    set_weight_decay(optimizer, Optimizer(name=name, weight_decay=0.3), 0.5)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.4, 0.0}
