"""Inpainting: nothing seen of the hole, weights on the right side of its edge, two players with their own gradients."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import TinyImage, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.recipe import Optimizer
from mmssl.training.optim import make_optimizer

ROWS = 4
FILL = (0.485, 0.456, 0.406)


pytestmark = pytest.mark.usefixtures("double")


def pictures(size=32, seed=0):
    return torch.rand(ROWS, 3, size, size, generator=torch.Generator().manual_seed(seed))


def task(**hyper):
    torch.manual_seed(0)
    settings = {"overlap": 2, "width": 32, "discriminator_width": 8, "views": {"flip": 0.0}}
    return create("inpainting", {"image": TinyImage()}, **settings | hyper)


def inputs_of(built, images=None, step=0):
    return built.transform({"image": pictures() if images is None else images}, Draws(0, step, ROWS))


def test_the_square_and_its_rim_are_those_of_the_released_code():
    inputs = inputs_of(task(overlap=4), pictures(128))
    weight = inputs["weight"][0, 0]
    hole = weight == 1
    assert hole.nonzero().amin(0).tolist() == [36, 36]
    assert hole.nonzero().amax(0).tolist() == [91, 91]
    assert (weight > 0).nonzero().amin(0).tolist() == [32, 32]
    assert (weight > 0).nonzero().amax(0).tolist() == [95, 95]
    assert int((weight > 0).sum()) == 64**2
    assert float(0.999 * weight.sum()) == pytest.approx(64**2 * 0.999 + 9 * 0.999 * (64**2 - 56**2))
    assert torch.equal(weight.unique(), torch.tensor([0.0, 1.0, 10.0]))


def test_random_regions_are_smooth_and_cover_what_they_should():
    built = task(region="random", overlap=1)
    inputs = [inputs_of(built, pictures(64), step) for step in range(20)]
    holes = torch.cat([one["weight"] for one in inputs])[:, 0] == 1
    covered = holes.double().mean((1, 2))
    assert ((covered >= 0.2) & (covered <= 0.3 + 1 / 64**2)).all()
    assert covered.min() < 0.22
    assert covered.max() > 0.28
    assert not torch.equal(holes[0], holes[1])
    # Of neighbors, 1 in 16 lies across an edge; of independent pixels 3 in 8 would.
    assert (holes[:, 1:] ^ holes[:, :-1]).double().mean() < 0.1
    # And they lie anywhere.
    anywhere = holes.double().mean(0)
    assert anywhere.min() > 0
    assert (anywhere < 0.8).all()
    # The rim is what lies within a pixel of the hole, diagonally too.
    rim = F.max_pool2d(holes[:, None].double(), 3, 1, 1)[:, 0].bool() & ~holes
    assert torch.equal(torch.cat([one["weight"] for one in inputs])[:, 0] == 10, rim)


@pytest.mark.parametrize("region", ["center", "random"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_the_hole_is_filled_with_the_mean_color_and_the_rest_stays(region, dtype):
    images = pictures() if dtype.is_floating_point else (pictures() * 255).to(dtype)
    inputs = inputs_of(task(region=region), images)
    hole = (inputs["weight"] == 1).expand(-1, 3, -1, -1)
    original = images if dtype.is_floating_point else images.double() / 255
    torch.testing.assert_close(inputs["target"], original)
    assert torch.equal(inputs["image"][~hole], inputs["target"][~hole])
    for channel, value in enumerate(FILL):
        assert torch.equal(inputs["image"][:, channel][hole[:, channel]].unique(), torch.tensor([value]))


@pytest.mark.parametrize("region", ["center", "random"])
def test_nothing_of_the_hole_reaches_painting_or_discriminator(region):
    built = task(region=region)
    inputs = inputs_of(built)
    hole = (inputs["weight"] == 1).expand(-1, 3, -1, -1)
    inputs_changed = inputs_of(built, torch.where(hole, pictures(seed=1), pictures()))
    outputs, changed = built.predict(inputs), built.predict(inputs_changed)
    assert torch.equal(outputs["image"], changed["image"])
    assert torch.equal(outputs["fake"], changed["fake"])
    assert torch.equal(outputs["fooled"], changed["fooled"])
    assert not torch.equal(outputs["real"], changed["real"])
    # And nothing of what is not painted reaches the discriminator.
    outside = (inputs["weight"] == 0).expand(-1, 3, -1, -1)
    around = inputs | {"target": torch.where(outside, pictures(seed=2), inputs["target"])}
    assert torch.equal(built.predict(around)["real"], outputs["real"])


@pytest.mark.parametrize("region", ["center", "random"])
def test_the_loss_weighs_the_rim_and_not_the_rest(region):
    built = task(region=region, adversarial=0.0)
    inputs = inputs_of(built)
    painting = torch.randn(ROWS, 3, 32, 32).requires_grad_()
    losses = built.loss({"image": painting}, inputs)
    weight, truth = inputs["weight"], 2 * inputs["target"] - 1
    squared = (painting - truth) ** 2
    torch.testing.assert_close(losses["loss"], (weight * squared).sum() / (3 * (weight > 0).sum()))
    (gradient,) = torch.autograd.grad(losses["loss"], painting)
    assert torch.equal((gradient != 0).any(1, keepdim=True), weight > 0)
    assert built.loss({"image": truth}, inputs)["loss"] == 0


@pytest.mark.parametrize("region", ["center", "random"])
def test_relative_error_of_the_mean_color_is_its_level(region):
    built = task(region=region, adversarial=0.0)
    inputs = inputs_of(built)
    hole = inputs["weight"] == 1
    rows = [target[:, there[0]].mean(1) for target, there in zip(inputs["target"], hole, strict=True)]
    mean = 2 * torch.stack(rows)[:, :, None, None] - 1
    losses = built.loss({"image": mean.expand(ROWS, 3, 32, 32)}, inputs)
    assert float(losses["relative_error"]) == pytest.approx(built.chance(ROWS).metrics["relative_error"], rel=1e-12)
    closer = torch.where(hole, 0.5 * (mean + 2 * inputs["target"] - 1), 100.0)  # half the way, outside is not counted
    assert float(built.loss({"image": closer}, inputs)["relative_error"]) == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize("region", ["center", "random"])
def test_each_player_gets_the_gradient_of_two_optimizers(region):
    built = task(region=region, adversarial=0.3)
    inputs = inputs_of(built)
    built(inputs)["loss"].backward()

    other = copy.deepcopy(built)
    other.zero_grad()
    weight, truth = inputs["weight"], 2 * inputs["target"] - 1
    features = other.encoder("image")(inputs["image"])
    maps = features.tokens.mT.unflatten(2, features.grid) + features.pooled[:, :, None, None]
    painting = other.decoder(maps, (32, 32))

    def judge(picture):
        if region == "random":
            return other.discriminator(torch.where(weight > 0, picture, 2 * torch.tensor(FILL)[:, None, None] - 1))
        return other.discriminator(picture[:, :, 8:24, 8:24])

    ones = torch.ones(ROWS)
    # The discriminator's step: its own parameters, from a painting without gradient.
    real, fake = judge(truth), judge(painting.detach())
    own = list(other.discriminator.parameters())
    step = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, 0 * ones)
    expected = dict(
        zip(
            (f"discriminator.{n}" for n, _ in other.discriminator.named_parameters()),
            torch.autograd.grad(step, own),
            strict=True,
        )
    )
    # The generator's step: all others, through the discriminator as it was.
    error = (weight * (painting - truth) ** 2).sum() / (3 * (weight > 0).sum())
    step = 0.7 * error + 0.3 * F.binary_cross_entropy_with_logits(judge(painting), ones)
    rest = {name: p for name, p in other.named_parameters() if not name.startswith("discriminator")}
    expected |= dict(zip(rest, torch.autograd.grad(step, list(rest.values())), strict=True))
    assert expected.keys() == dict(built.named_parameters()).keys()
    for name, parameter in built.named_parameters():
        assert parameter.grad.abs().max() > 1e-9
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-13, msg=name)


def test_the_discriminator_learns_at_a_tenth_of_the_rate():
    built = task()
    optimizer = make_optimizer(built, Optimizer(lr=2e-3))
    slow = {id(p) for group in optimizer.param_groups if group["lr_scale"] == 0.1 for p in group["params"]}
    assert slow == {id(p) for p in built.discriminator.parameters()}
    assert not hasattr(task(adversarial=0.0), "discriminator")


@pytest.mark.long
def test_a_discriminator_that_is_trained_tells_the_two_apart():
    built = task(adversarial=0.001)
    inputs = inputs_of(built)
    optimizer = torch.optim.Adam(built.discriminator.parameters(), lr=3e-3)
    for _ in range(25):
        optimizer.zero_grad()
        losses = built(inputs)
        losses["loss"].backward()
        optimizer.step()
    outputs = built.predict(inputs)
    assert (outputs["real"] > 0).all()
    assert (outputs["fake"] < 0).all()
    assert torch.equal(outputs["fake"], outputs["fooled"])
    assert losses["discriminator"] < 0.2
    assert losses["adversarial"] > 2


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("timm/test_resnet", {}),
        ("timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}),
        ("torchvision/squeezenet1_1", {}),
    ],
)
@pytest.mark.parametrize("region", ["center", "random"])
def test_any_image_encoder_can_paint(model, arguments, region):
    encoder = create_encoder(model, "image", **arguments).eval()
    built = create(
        "inpainting", {"image": encoder}, region=region, overlap=1, width=32, discriminator_width=8, views={"size": 32}
    )
    inputs = built.transform({"image": pictures(40)}, Draws(0, 0, ROWS))
    assert inputs["image"].shape == (ROWS, 3, 32, 32)
    outputs = built.predict(inputs)
    assert {key: tuple(value.shape) for key, value in outputs.items()} == {
        "image": (ROWS, 3, 32, 32),
        **dict.fromkeys(("real", "fake", "fooled"), (ROWS,)),
    }
    panels = built.preview(inputs, outputs)
    hole = (inputs["weight"] == 1).expand(-1, 3, -1, -1)
    assert torch.equal(torch.stack(panels[1].cells)[~hole], inputs["target"][~hole])


def test_refuses_what_it_cannot_paint():
    with pytest.raises(RecipeError, match="the encoder 'audio' reads audio"):
        create("inpainting", tiny_encoders(), encoder="audio")
    for wrong in ({"adversarial": 1.0}, {"mask_ratio": (0.3, 0.2)}, {"overlap": -1}):
        with pytest.raises(RecipeError, match="should be"):
            task(**wrong)
    with pytest.raises(RecipeError, match="discriminator_width = 12 is no multiple of 8"):
        task(discriminator_width=12)
    with pytest.raises(RecipeError, match="a rim of overlap = 8"):
        inputs_of(task(overlap=8))
    with pytest.raises(RecipeError, match="multiples of 4"):
        inputs_of(task(), pictures(30))
