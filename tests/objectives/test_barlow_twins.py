"""Barlow Twins: the cross-correlation of two views against the identity."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.training.optim import parameter_groups

ROWS, WIDTH = 12, 5


def _task(**hyper):
    return create("barlow_twins", tiny_encoders(), **({"hidden": 9, "width": WIDTH} | hyper))


def _embeddings(rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    z = torch.randn(rows, 2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (z * torch.arange(1, width + 1) + 3).requires_grad_()


def _by_hand(z: torch.Tensor, weight: float) -> torch.Tensor:
    """The paper's algorithm 1, with PyTorch's BatchNorm and a mask in place of views of the matrix."""
    first, second = (F.batch_norm(z[:, i], None, None, training=True) for i in (0, 1))
    matrix = first.T @ second / len(z)
    identity = torch.eye(z.shape[-1], dtype=z.dtype)
    return ((matrix - identity) ** 2 * torch.where(identity == 1, 1.0, weight)).sum()


def test_loss_and_gradient_are_those_of_the_paper():
    z, again = _embeddings(), _embeddings()
    losses = _task(redundancy=0.07).loss({"z": z}, {})
    expected = _by_hand(again, 0.07)
    torch.testing.assert_close(losses["loss"], expected)
    torch.testing.assert_close(losses["diagonal"] + 0.07 * losses["off_diagonal"], expected)
    losses["loss"].backward()
    expected.backward()
    assert again.grad.abs().max() > 1e-3
    torch.testing.assert_close(z.grad, again.grad)


@pytest.mark.long
def test_identical_white_views():
    """Nothing is left on the diagonal; chance correlations beside it have variance 1 / N."""
    rows, width = 4000, 40
    z = torch.randn(rows, 1, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(-1, 2, -1)
    losses = _task(width=width).loss({"z": z}, {})
    assert losses["diagonal"] < 1e-8
    assert losses["off_diagonal"] == pytest.approx(width * (width - 1) / rows, rel=0.1)
    assert losses["ranking"] == 1


def test_views_may_be_swapped_and_scaled_but_not_rotated():
    task, z = _task(), _embeddings().detach()
    loss = task.loss({"z": z}, {})["loss"]
    torch.testing.assert_close(task.loss({"z": z.flip(1)}, {})["loss"], loss)
    torch.testing.assert_close(
        task.loss({"z": z * torch.tensor([2.0, 3.0])[:, None] + 1}, {})["loss"], loss, rtol=1e-4, atol=1e-4
    )
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, dtype=torch.float64)).Q
    assert (task.loss({"z": z @ turn}, {})["loss"] - loss).abs() > 1e-3


def test_collapse_costs_the_whole_diagonal_and_repetition_the_rest():
    task = _task()
    collapsed = torch.ones(ROWS, 2, WIDTH, dtype=torch.float64)
    losses = task.loss({"z": collapsed}, {})
    assert losses["loss"] == task.chance(ROWS).loss == WIDTH
    assert losses["spread"] == 0
    assert losses["ranking"] == task.chance(ROWS).metrics["ranking"]
    repeated = _embeddings().detach()[:, :1, :1].expand(-1, 2, WIDTH)
    losses = task.loss({"z": repeated}, {})
    assert losses["diagonal"] < 1e-8
    assert losses["off_diagonal"] == pytest.approx(WIDTH * (WIDTH - 1), rel=1e-4)


@pytest.mark.parametrize("encoder", ["image", "audio"])
def test_embeddings_of_both_modalities(encoder):
    task = _task(encoder=encoder)
    assert task.needs == (encoder,)
    inputs = task.transform(tiny_batch(5), Draws(0, 0, 5))
    assert task.predict(inputs)["z"].shape == (5, 2, WIDTH)
    panels = task.preview(inputs, {"z": torch.eye(5)[:, None].expand(5, 2, 5)})
    assert all(torch.equal(a, b) for a, b in zip(panels[1].cells, panels[2].cells, strict=True))


MODELS = {
    "timm/test_resnet": {},
    "timm/test_vit": {},
    "torchvision/shufflenet_v2_x0_5": {},
    "open_clip/ViT-B-32": {
        "embed_dim": 16,
        "vision_cfg": {"layers": 1, "width": 32, "head_width": 16, "image_size": 64, "patch_size": 16},
        "text_cfg": {"layers": 1, "width": 32, "heads": 2},
    },
}


@pytest.mark.quick(2)
@pytest.mark.parametrize("model", MODELS)
def test_any_image_encoder(model):
    encoder = create_encoder(model, modality="image", **MODELS[model])
    task = create("barlow_twins", {"image": encoder}, hidden=8, width=4)
    inputs = task.transform({"image": torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)}, Draws(0, 0, 3))
    losses = task(inputs)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())


def test_published_settings_of_the_views():
    first, second = _task().views.settings
    assert (first.blur, first.solarize, second.blur, second.solarize) == (1.0, 0.0, 0.1, 0.2)
    assert (first.strength, first.saturation) == (0.5, 0.4)


def test_biases_and_norms_may_learn_slower():
    scales = {(g["weight_decay"] > 0, g["lr_scale"]) for g in parameter_groups(_task(bias_lr=0.024), 0.1)}
    assert {(True, 1.0), (False, 0.024)} <= scales
    assert (False, 0.024) not in {(g["weight_decay"] > 0, g["lr_scale"]) for g in parameter_groups(_task(), 0.1)}


def test_refuses_other_modalities():
    with pytest.raises(RecipeError, match="reads text"):
        _task(encoder="text")
