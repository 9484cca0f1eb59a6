"""Tasks on clips: frames of a view change alike, tubes hide one place in all frames, what is hidden is unseen."""

import pytest
import torch
from tiny_encoders import tiny_batch, tiny_encoders

from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.augment import random_views
from mmssl.ops.draws import Draws
from mmssl.ops.patches import patchify, unpatchify

LAYER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
NETWORKS = {
    "videomae": ("transformers/videomae", LAYER | {"image_size": 16, "patch_size": 4, "num_frames": 4}),
    "vivit": ("transformers/vivit", LAYER | {"image_size": 16, "num_frames": 4, "tubelet_size": [2, 4, 4]}),
    "frames": (
        "timm/vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    ),
}
SMALL = {"decoder_depth": 1, "decoder_width": 16, "decoder_heads": 2}
ROWS = 5


def clips(rows=ROWS, size=16):
    return tiny_batch(rows, size=size, frames=4)


def masked(network="videomae", **hyper):
    torch.manual_seed(0)
    model, kwargs = NETWORKS[network]
    given = {"views": {"area": None, "flip": 0.0}} | (SMALL if hyper.get("form") != "simmim" else {"block": 4})
    return create(
        "masked_autoencoder",
        {"video": create_encoder(model, "video", **kwargs)},
        encoder="video",
        **given | hyper,
    )


def shown(task, inputs):
    """bool (B, N), True for hidden places."""
    number = inputs["seen"].shape[1] + inputs["hidden"].shape[1]
    return torch.zeros(ROWS, number, dtype=torch.bool).scatter(1, inputs["hidden"], True)


def test_patches_of_clips_are_tubelets_and_come_back():
    clip = torch.rand(2, 3, 4, 6, 8)
    patches = patchify(clip, (2, 3, 4))
    assert patches.shape == (2, 2 * 2 * 2, 2 * 3 * 4 * 3)
    place = 0
    for t in range(0, 4, 2):
        for y in range(0, 6, 3):
            for x in range(0, 8, 4):
                cut = clip[:, :, t : t + 2, y : y + 3, x : x + 4]
                assert torch.equal(patches[:, place], cut.permute(0, 2, 3, 4, 1).flatten(1))
                place += 1
    assert torch.equal(unpatchify(patches, (2, 3, 4), (4, 6, 8)), clip)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_tube_hides_the_same_places_in_all_frames_and_nothing_else_does(network):
    batch = clips()
    for tube in (True, False):
        task = masked(network, mask_ratio=0.75, tube=tube)
        inputs = task.transform(batch, Draws(0, 0, ROWS))
        hidden = shown(task, inputs).unflatten(1, (-1, 16))
        assert hidden.shape[1] == 4 // task.encoder("video").patch_size[0]
        alike = (hidden == hidden[:, :1]).all()
        assert alike == tube
        assert hidden.flatten(1).sum(1).tolist() == [hidden[0].numel() * 3 // 4] * ROWS
        # Each row hides others.
        assert not torch.equal(hidden[0], hidden[1])
        pixels = patchify(task.encoder("video").prepare(batch["video"])[0], task.pixels.patch)
        target = pixels.gather(1, inputs["hidden"][:, :, None].expand(-1, -1, pixels.shape[2]))
        plain = masked(network, mask_ratio=0.75, tube=tube, norm_pix=False)
        torch.testing.assert_close(plain.transform(batch, Draws(0, 0, ROWS))["target"], target)


@pytest.mark.parametrize("form", ["mae", "simmim"])
@pytest.mark.parametrize("network", NETWORKS)
def test_nothing_is_seen_of_what_is_hidden(network, form):
    task = masked(network, form=form)
    inputs = task.transform(clips(), Draws(0, 0, ROWS))
    clip = (inputs["video"].double() / 255).requires_grad_()
    (task.double().predict(inputs | {"video": clip})["pixels"] ** 3).sum().backward()
    reached = patchify(clip.grad.abs().transpose(1, 2), task.pixels.patch).sum(2) > 0
    assert torch.equal(~reached, shown(task, inputs))


@pytest.mark.quick(1)
@pytest.mark.parametrize("network", NETWORKS)
def test_masked_autoencoders_of_clips_learn(network):
    task, batch = masked(network, mask_ratio=0.5, norm_pix=False), clips()
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        outcome = task(task.transform(batch, Draws(0, 0, ROWS)))
        optimizer.zero_grad()
        outcome["loss"].backward()
        assert not [name for name, p in task.named_parameters() if p.grad is None]
        optimizer.step()
        losses.append(float(outcome["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    inputs = task.transform(batch, Draws(0, 1, ROWS))
    panels = task.preview(inputs, task.predict(inputs))
    assert [panel.title for panel in panels] == ["input", "prediction", "target"]
    assert all(cell.shape == (4, 3, 16, 16) for panel in panels for cell in panel.cells)
    torch.testing.assert_close(torch.stack([*panels[2].cells]), batch["video"] / 255, rtol=1e-5, atol=1e-5)


def test_crops_and_mirrors_are_those_of_the_clip():
    task = masked(views={"area": (0.2, 0.9), "flip": 0.5})
    still = clips()["video"][:, :1].expand(-1, 4, -1, -1, -1)
    video = task.transform({"video": still}, Draws(0, 0, ROWS))["video"]
    assert torch.equal(video, video[:, :1].expand_as(video))
    assert not torch.allclose(video, still / 255)


def test_all_frames_of_a_view_change_alike():
    pictures = torch.rand(ROWS, 3, 24, 24)
    image = random_views(pictures, Draws(0, 0, ROWS), 2, 16, solarize=0.3)
    clip = random_views(pictures[:, None].expand(-1, 3, -1, -1, -1), Draws(0, 0, ROWS), 2, 16, solarize=0.3)
    assert clip.shape == (ROWS, 2, 3, 3, 16, 16)
    for frame in clip.unbind(2):
        torch.testing.assert_close(frame, image)
    # A frame is changed as it would be alone.
    moving = torch.rand(ROWS, 3, 3, 24, 24)
    together = random_views(moving, Draws(0, 0, ROWS), 2, 16)
    for number, frame in enumerate(together.unbind(2)):
        torch.testing.assert_close(frame, random_views(moving[:, number], Draws(0, 0, ROWS), 2, 16))


@pytest.mark.parametrize("name", ["simclr", "moco", "nnclr", "byol", "simsiam", "barlow_twins", "vicreg"])
def test_all_frames_of_a_view_share_one_draw(name):
    """Of a clip that stands still every view stands still, and the two views differ."""
    torch.manual_seed(0)
    narrow = {"hidden": 16, "width": 8} if name in ("barlow_twins", "vicreg") else {}
    task = create(name, {"video": tiny_encoders()["video"]}, encoder="video", **narrow)
    still = clips()["video"][:, :1].expand(-1, 4, -1, -1, -1)
    views = task.transform({"video": still}, Draws(0, 0, ROWS))["views"]
    torch.testing.assert_close(views, views[:, :, :1].expand_as(views))
    assert all(not torch.equal(a, b) for a, b in views)


@pytest.mark.long
@pytest.mark.parametrize("name", ["simclr", "moco", "nnclr", "byol", "simsiam", "barlow_twins", "vicreg"])
def test_tasks_of_two_views_take_a_step_on_clips(name):
    torch.manual_seed(0)
    task = create(name, {"video": tiny_encoders()["video"]}, encoder="video")
    assert task.needs == ("video",)
    batch = clips(8)
    inputs = task.transform(batch, Draws(0, 0, 8))
    assert inputs["views"].shape[:4] == (8, 2, 4, 3)
    outcome = task(inputs)
    outcome["loss"].backward()
    assert outcome["loss"].isfinite()
    assert task.encoder("video").net.weight.grad.abs().sum() > 0


@pytest.mark.long
def test_simclr_tells_clips_apart():
    torch.manual_seed(0)
    model, kwargs = NETWORKS["videomae"]
    colors = {"jitter": 0, "grayscale": 0, "blur": 0}
    task = create("simclr", {"video": create_encoder(model, "video", **kwargs)}, encoder="video", views=colors)
    batch = {"video": torch.rand(8, 1, 3, 1, 1).expand(-1, 4, -1, 16, 16)}
    optimizer = torch.optim.Adam(task.parameters(), 1e-2)
    for step in range(60):
        outcome = task(task.transform(batch, Draws(0, step, 8)))
        optimizer.zero_grad()
        outcome["loss"].backward()
        optimizer.step()
    assert outcome["loss"] < 0.5 * task.chance(8).loss


def test_simclr_hears_waveforms():
    torch.manual_seed(0)
    waves = {"conv_dim": [8, 8], "conv_stride": [4, 2], "conv_kernel": [8, 4], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"}
    encoder = create_encoder("transformers/wav2vec2", "audio", **LAYER, **waves, **positions)
    task = create("simclr", {"audio": encoder}, encoder="audio")
    inputs = task.transform(tiny_batch(4, frames=60), Draws(0, 0, 4))
    assert inputs["views"].shape == (4, 2, 300)
    assert inputs["valid"].shape == (4, 2, 300)
    task(inputs)["loss"].backward()
    assert not [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("name", "model", "hyper", "says"),
    [
        ("masked_autoencoder", "timm/test_resnet", {}, "does not read patch by patch"),
        ("masked_autoencoder", "transformers/convnext", {}, "does not read patch by patch"),
        ("masked_autoencoder", "transformers/timesformer", {}, "does not read patch by patch"),
        ("dino", "timm/test_vit", {}, "dino compares crops of images or of sounds"),
    ],
)
def test_what_cannot_work_fails_when_built(name, model, hyper, says):
    small = {"hidden_sizes": [4] * 4, "depths": [1] * 4} if "convnext" in model else {}
    small |= LAYER | {"image_size": 16} if "timesformer" in model else {}
    with pytest.raises(RecipeError, match=says):
        create(name, {"video": create_encoder(model, "video", **small)}, encoder="video", **hyper)


def test_tubes_are_for_clips():
    image = create_encoder(NETWORKS["frames"][0], "image", **NETWORKS["frames"][1])
    with pytest.raises(RecipeError, match="tube is for clips"):
        create("masked_autoencoder", {"image": image}, tube=True, **SMALL)
