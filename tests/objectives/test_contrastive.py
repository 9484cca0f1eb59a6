"""Contrastive pairs: what reaches the loss, chance, the temperature."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import minimize_scalar
from tiny_encoders import tiny_batch, tiny_encoders, tiny_pairs

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.pairs import info_nce, sigmoid_pairs

NETWORK = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = NETWORK | {"vocab_size": 20, "max_position_embeddings": 6, "projection_size": 8, "eos_token_id": 19}
VISION = NETWORK | {"image_size": 8, "patch_size": 4}


def _transformers(*names):
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return [getattr(library, name) for name in names]


def _inputs():
    ids = torch.randint(1, 18, (7, 6))
    ids[:, -1] = 19
    return {"input_ids": ids, "pixel_values": torch.randn(7, 3, 8, 8, dtype=torch.float64)}


def _assert_same_gradients(mine, theirs, model):
    assert math.isclose(mine.item(), theirs.item(), rel_tol=1e-12)
    weights = dict(model.named_parameters())
    ours, others = (
        torch.autograd.grad(loss, list(weights.values()), retain_graph=True, allow_unused=True)
        for loss in (mine, theirs)
    )
    for name, own, other in zip(weights, ours, others, strict=True):
        assert (own is None) == (other is None), name
        if own is not None:
            torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12, msg=name)
    found = {name for name, own in zip(weights, ours, strict=True) if own is not None and own.abs().max() > 1e-6}
    assert "logit_scale" in found
    assert len(found) > 20


def test_start_values_are_the_papers():
    clip, siglip = (create("contrastive", tiny_encoders(), form=form) for form in ("clip", "siglip"))
    assert math.isclose(clip.logit_scale, math.log(1 / 0.07), rel_tol=1e-6)
    assert math.isclose(siglip.logit_scale, math.log(10), rel_tol=1e-6)
    assert siglip.logit_bias == -10
    assert "logit_bias" not in dict(clip.named_parameters())


def test_temperature_is_clamped_after_the_step():
    task = create("contrastive", tiny_encoders())
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)):
        task.logit_scale.data.fill_(value)
        task.after_step(0.5)
        assert math.isclose(task.logit_scale, expected, rel_tol=1e-6)


@pytest.mark.parametrize("pair", [("image", "text"), ("audio", "text"), ("video", "audio"), ("video", "text")])
def test_both_sides_and_their_masks_arrive(pair):
    a, b = pair
    task = create("contrastive", tiny_encoders(), a=a, b=b, width=7)
    assert task.needs == pair
    batch = tiny_batch(4)
    inputs = task.transform(batch, Draws(0, 0, 4))
    for side, name in (("a", a), ("b", b)):
        assert (f"{side}_valid" in inputs) == (f"{name}_mask" in batch)
    outputs = task.predict(inputs)
    assert outputs["a"].shape == outputs["b"].shape == (4, 7)
    losses = task.loss(outputs, inputs)
    assert {f"accuracy_{a}_to_{b}", f"accuracy_{b}_to_{a}", "temperature", "loss"} == losses.keys()
    shown = task.preview(inputs, {"a": torch.eye(4), "b": torch.eye(4)[[0, 2, 1, 3]]})
    assert list(shown[2].right) == [True, False, False, True]
    # Whatever stands behind the mask has no say.
    for key in (key for key in ("text", "audio") if key in pair):
        batch[key] = torch.where(batch[f"{key}_mask"], batch[key], 7)
    again = task.predict(task.transform(batch, Draws(0, 0, 4)))
    if "audio" not in pair:  # the tiny sound encoder sees frames that begin valid and end behind the mask
        torch.testing.assert_close(again, outputs)


def test_images_are_cropped_lightly_or_not_at_all():
    batch = tiny_batch(4)
    whole = create("contrastive", tiny_encoders(), views={"area": None}).transform(batch, Draws(0, 0, 4))["a"]
    assert whole is batch["image"]
    cropped = create("contrastive", tiny_encoders()).transform(batch, Draws(0, 0, 4))["a"]
    assert cropped.shape == whole.shape
    assert cropped.is_floating_point()


def test_all_frames_of_a_clip_are_cropped_alike():
    batch = tiny_batch(4)
    batch["video"][:] = batch["video"][:, :1].clone()
    cropped = create("contrastive", tiny_encoders(), a="video", views={"area": (0.3, 0.5), "flip": 0.5}).transform(
        batch, Draws(0, 0, 4)
    )["a"]
    assert cropped.shape == batch["video"].shape
    assert (cropped == cropped[:, :1]).all()
    assert not (cropped == batch["video"] / 255).flatten(1).all(1).any()


def test_a_hidden_layer_before_the_shared_space():
    task = create("contrastive", tiny_encoders(), a="audio", b="video", width=7, hidden=9)
    for net, own in ((task.project_a, 5), (task.project_b, 6)):
        assert [(layer.in_features, layer.out_features) for layer in (net[0], net[2])] == [(own, 9), (9, 7)]
        assert isinstance(net[1], torch.nn.ReLU)
    assert task.pairs[0].project is None
    with pytest.raises(RecipeError, match="a hidden layer is before a shared space; set width"):
        create("contrastive", tiny_encoders(), a="video", width=None, hidden=9)


@pytest.mark.parametrize("form", ["clip", "siglip"])
@pytest.mark.parametrize("pair", [("audio", "video"), ("audio", "text"), ("video", "text")])
def test_on_noise_pairs_of_any_kind_are_found_at_chance(form, pair):
    task = create("contrastive", tiny_encoders(), a=pair[0], b=pair[1], width=7, form=form)
    with torch.no_grad():
        found = [task(task.transform(tiny_batch(64, seed=k), Draws(0, k, 64))) for k in range(4)]
    for name in task.accuracies:
        hits = round(sum(float(losses[name]) for losses in found) * 64)
        assert stats.binomtest(hits, 256, task.chance(64).metrics[name]).pvalue > 1e-3


@pytest.mark.parametrize("rows", [2, 9])
def test_chance_is_the_loss_of_the_best_constant(rows):
    same = torch.zeros(rows, 4, dtype=torch.float64)
    outputs = {"a": same, "b": same}
    clip, siglip = (create("contrastive", tiny_encoders(), form=form).double() for form in ("clip", "siglip"))
    assert math.isclose(clip.loss(outputs, {})["loss"], clip.chance(rows).loss, rel_tol=1e-9)

    def constant(bias: float) -> float:
        siglip.logit_bias.data.fill_(bias)
        return float(siglip.loss(outputs, {})["loss"])

    best = minimize_scalar(constant, bounds=(-8, 8), method="bounded")
    assert math.isclose(best.fun, siglip.chance(rows).loss, rel_tol=1e-6)
    assert siglip.chance(rows).metrics["accuracy_text_to_image"] == 1 / rows


@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_every_gradient_of_transformers_clip(chunk):
    CLIPConfig, CLIPModel = _transformers("CLIPConfig", "CLIPModel")
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=7)).double()
    output = model(**_inputs(), return_loss=True)
    mine = info_nce(output.image_embeds, output.text_embeds, model.logit_scale.exp(), chunk=chunk)[0]
    _assert_same_gradients(mine, output.loss, model)


@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_every_gradient_of_transformers_siglip(chunk):
    SiglipConfig, SiglipModel = _transformers("SiglipConfig", "SiglipModel")
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION)).double()
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.logit_bias.fill_(-1.5)
    output = model(**_inputs(), return_loss=True)
    # The scale of transformers is exp(logit_scale), its bias is added after it: as here.
    scale, bias = model.logit_scale[0].exp(), model.logit_bias[0]
    mine = sigmoid_pairs(output.image_embeds, output.text_embeds, scale, bias, chunk=chunk)[0]
    _assert_same_gradients(mine, output.loss, model)


def test_loss_of_transformers_align():
    align = pytest.importorskip("transformers.models.align.modeling_align")
    torch.manual_seed(0)
    task = create("contrastive", tiny_encoders(), temperature=1.0, smoothing=0.1).double()
    z = torch.nn.functional.normalize(torch.randn(2, 6, 512, dtype=torch.float64), dim=-1)
    temperature = 1 / task.logit_scale.exp()
    expected = align.align_loss(z[1] @ z[0].T / temperature)
    assert math.isclose(task.loss({"a": z[0], "b": z[1]}, {})["loss"].item(), expected.item(), rel_tol=1e-12)


def test_equal_captions_and_equal_images_are_one_item():
    torch.manual_seed(0)
    task = create("contrastive", tiny_encoders(), positives="equal", width=7)
    batch = tiny_batch(6)
    for key in ("text", "text_mask"):
        batch[key][4] = batch[key][1].clone()
    batch["image"][5] = batch["image"][2].clone()
    inputs = task.transform(batch, Draws(0, 0, 6))
    a, b = inputs["items"].T
    assert b[4] == b[1]
    assert a[5] == a[2]
    assert len(a.unique()) == len(b.unique()) == 5
    # Crops of the equal images differ; what is compared is what came from the data.
    assert not torch.equal(inputs["a"][5], inputs["a"][2])
    outputs = task.predict(inputs)
    alone = create("contrastive", tiny_encoders(), width=7)
    assert "items" not in alone.transform(batch, Draws(0, 0, 6))
    assert not torch.isclose(task.loss(outputs, inputs)["loss"], alone.loss(outputs, {})["loss"])


@pytest.mark.parametrize("form", ["clip", "siglip"])
def test_chance_where_items_are_equal(form):
    """A blind network scores the logarithm of B whatever is equal; siglip's best constant is the data's to tell."""
    task = create("contrastive", tiny_encoders(), form=form, positives="equal", smoothing=0.1 * (form == "clip"))
    items = torch.tensor([[0, 5], [1, 5], [2, 6], [3, 7], [4, 5]])
    same = torch.zeros(5, 4)
    losses = task.loss({"a": same, "b": same}, {"items": items})
    assert task.chance(5).metrics == dict.fromkeys(("accuracy_image_to_text", "accuracy_text_to_image"), 0.2)
    if form == "clip":
        assert losses["loss"].item() == pytest.approx(task.chance(5).loss, rel=1e-6)
    else:
        assert task.chance(5).loss is None
        assert task.chance(5).levels.keys() <= losses.keys()


def test_without_a_width_the_encoders_meet_in_their_own_space():
    encoders = tiny_encoders()
    task = create("contrastive", encoders, width=None)
    names = [name for name, _ in task.named_parameters() if not name.startswith("encoders.")]
    assert names == ["logit_scale"]
    inputs = task.transform(tiny_batch(3), Draws(0, 0, 3))
    pooled = encoders["text"](inputs["b"], inputs["b_valid"]).pooled
    torch.testing.assert_close(task.predict(inputs)["b"], torch.nn.functional.normalize(pooled, dim=-1))
    with pytest.raises(RecipeError, match="'audio' has 5 and 'text' 6; set one"):
        create("contrastive", tiny_encoders(), a="audio", width=None)


@pytest.mark.parametrize("chunk", [2, 5])
@pytest.mark.parametrize("form", ["clip", "siglip"])
def test_chunks_change_nothing(form, chunk):
    torch.manual_seed(0)
    whole = create("contrastive", tiny_encoders(), form=form, width=7).double()
    parts = create("contrastive", dict(whole.encoders), form=form, width=7, chunk=chunk).double()
    parts.load_state_dict(whole.state_dict())
    inputs = whole.transform(tiny_batch(8), Draws(0, 0, 8))
    for key, value in whole(inputs).items():
        torch.testing.assert_close(parts(inputs)[key], value, rtol=1e-12, atol=0)


def test_refuses_one_encoder_for_both_sides():
    with pytest.raises(RecipeError, match="two encoders"):
        create("contrastive", tiny_encoders(), a="image", b="image")
    with pytest.raises(RecipeError, match="form = 'clup'"):
        create("contrastive", tiny_encoders(), form="clup")
    for wrong, message in (
        ({"form": "siglip", "smoothing": 0.1}, "siglip has none; set form=clip"),
        ({"smoothing": 1.0}, "smoothing = 1.0 .* less than 1"),
        ({"chunk": 0}, "chunk = 0 .* greater than or equal to 1"),
        ({"temperature": 0.0}, "temperature = 0.0 .* greater than or equal to 0.01"),
        ({"temperature": 2.0}, "temperature = 2.0 .* less than or equal to 1"),
    ):
        with pytest.raises(RecipeError, match=message):
            create("contrastive", tiny_encoders(), **wrong)


def test_through_a_multiway_network_each_side_goes_alone():
    torch.manual_seed(0)
    encoders, batch = tiny_pairs("multiway"), tiny_batch(4)
    task = create("contrastive", encoders, fusion="fusion", width=7, views={"area": None}).eval()
    inputs = task.transform(batch, Draws(0, 0, 4))
    outputs = task.predict(inputs)
    image, text = encoders["image"](batch["image"]), encoders["text"](batch["text"], batch["text_mask"])
    network = encoders["fusion"]
    torch.testing.assert_close(outputs["a"], F.normalize(task.project_a(network(image, None).pooled), dim=-1))
    torch.testing.assert_close(outputs["b"], F.normalize(task.project_b(network(None, text).pooled), dim=-1))
    (pair,) = task.pairs
    torch.testing.assert_close(pair.embed[1](text), outputs["b"])
    with pytest.raises(RecipeError, match="fusion = 'fusion' should take one side alone"):
        create("contrastive", tiny_pairs("joint"), fusion="fusion")
