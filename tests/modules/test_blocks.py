"""Blocks computed anew: the same bits of gradients, state and random numbers, in less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

import mmssl
from mmssl.build import build
from mmssl.encoders.base import Encoder
from mmssl.errors import RecipeError
from mmssl.modules.blocks import blocks_of, learning_blocks, recomputed
from mmssl.recipe import load
from mmssl.training.loop import fit

LAYER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
WAVES = {"conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 8], "num_feat_extract_layers": 2}
WAVES |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.2}
CLIP = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}}
CLIP |= {"text_cfg": {"context_length": 16, "width": 64, "heads": 1, "layers": 1}}
NETWORKS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "timm transformer": ("timm/test_vit", "image", {"drop_rate": 0.2, "drop_path_rate": 0.3, "img_size": 32}, 6),
    "timm CNN": ("timm/test_resnet", "image", {"drop_path_rate": 0.3}, 4),
    "timm stages": ("timm/test_convnext", "image", {"drop_path_rate": 0.3}, 7),
    "torchvision CNN": ("torchvision/mobilenet_v3_small", "image", {}, 11),
    "open_clip": ("open_clip/ViT-B-32", "image", CLIP, 2),
    "transformers pictures": ("transformers/vit", "image", LAYER | DROPOUT | {"image_size": 32, "patch_size": 8}, 2),
    "transformers sounds": ("transformers/wav2vec2", "audio", LAYER | WAVES, 2),
}


def build_one(name: str) -> Encoder:
    torch.manual_seed(0)
    model, modality, given, _ = NETWORKS[name]
    return mmssl.encoder(model, modality=modality, **given).double().train()


def pass_through(encoder: Encoder) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor], Tensor]:
    """Output, gradients, buffers afterwards, and the next random numbers."""
    generator = torch.Generator().manual_seed(1)
    shape = (4, 2000) if encoder.modality == "audio" else (4, 3, 32, 32)
    x = torch.rand(shape, generator=generator, dtype=torch.float64)
    torch.manual_seed(2)
    features = encoder(x)
    weight = torch.randn(features.tokens.shape, generator=generator, dtype=torch.float64)
    ((features.tokens * weight).sum() + features.pooled.square().sum()).backward()
    gradients = [parameter.grad for parameter in encoder.parameters()]
    return features.pooled, gradients, dict(encoder.named_buffers()), torch.rand(2)


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_is_the_same_to_the_bit(name: str) -> None:
    kept, again = build_one(name), build_one(name)
    blocks = blocks_of(again)
    assert len(blocks) == NETWORKS[name][3]
    with recomputed(blocks):
        found = pass_through(again)
    expected = pass_through(kept)
    assert torch.equal(found[0], expected[0])
    for (key, _), a, b in zip(kept.named_parameters(), expected[1], found[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b), key
    for key, value in expected[2].items():
        assert torch.equal(value, found[2][key]), key
    assert torch.equal(found[3], expected[3])
    assert all("forward" not in vars(block) for block in blocks)


def test_dropout_is_drawn_and_the_comparison_can_fail() -> None:
    encoder = build_one("timm transformer")
    once = pass_through(encoder)[0]
    torch.manual_seed(3)
    x = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert not torch.equal(once, encoder(x).pooled)


def peak(blocks: bool) -> int:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.TransformerEncoderLayer(64, 2, 256, batch_first=True, dropout=0.0) for _ in range(8))
    ).train()
    x = torch.randn(8, 64, 64)
    tracker = MemTracker()
    tracker.track_external(net, x)
    with recomputed(blocks_of(net) if blocks else []), tracker:
        net(x).sum().backward()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@pytest.mark.long
def test_the_peak_of_memory_is_lower() -> None:
    assert peak(blocks=True) < 0.5 * peak(blocks=False)


def test_a_stage_is_its_blocks_and_a_block_is_not_its_parts() -> None:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(layer(), layer())

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)])

    assert len(blocks_of(nn.Sequential(Stage(), Stage()))) == 4
    assert [type(block) for block in blocks_of(nn.ModuleList([Mixed(), Mixed()]))] == [Mixed, Mixed]
    head = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert blocks_of(head) == []
    shared = layer()
    assert len(blocks_of(nn.Sequential(shared, shared))) == 1


RECIPE: dict[str, Any] = {
    "encoders": {"image": {"model": "timm/test_vit", "img_size": 32, "patch_size": 8, "drop_path_rate": 0.3}},
    "objective": {"name": "byol"},
    "data": {"source": "toy", "limit": 16, "image": {"size": 32}},
    "training": {"steps": 3, "batch_size": 8, "accumulate": 2, "log_every": 1},
}


def trained(objective: str, model: str, **training: Any) -> dict[str, Tensor]:
    encoders = RECIPE["encoders"] if model == "vit" else {"image": {"model": "timm/test_resnet", "drop_path_rate": 0.3}}
    training = RECIPE["training"] | training
    recipe = load(RECIPE | {"encoders": encoders, "objective": {"name": objective}, "training": training})
    task, loader = build(recipe)
    fit(task, loader, recipe.training, quiet=True)
    return task.state_dict()


@pytest.mark.long
@pytest.mark.parametrize(
    ("objective", "model"),
    [("simsiam", "resnet"), ("byol", "vit"), ("masked_autoencoder", "vit"), ("simclr", "resnet")],
)
def test_training_is_the_same_to_the_bit(objective: str, model: str) -> None:
    """With BatchNorm that sees views apart, teachers, subsets of tokens, and rows that meet in micro-batches."""
    plain, again = trained(objective, model), trained(objective, model, checkpointing=True)
    assert all(torch.equal(value, again[key]) for key, value in plain.items())


def test_a_teacher_is_left_as_it_is() -> None:
    task, _ = build(load(RECIPE))
    blocks = learning_blocks(task)
    assert len(blocks) == len(blocks_of(task)) / 2 == 6


@pytest.mark.long
def test_a_network_without_blocks_is_refused_when_it_is_built() -> None:
    tree = RECIPE | {"encoders": {"image": {"model": "timm/vgg11"}}, "objective": {"name": "rotation"}}
    recipe = load(tree, {"training.checkpointing": True, "data.image.size": 32})
    with pytest.raises(RecipeError, match=r"training.checkpointing: encoders.image: timm/vgg11 has no blocks .*leave"):
        build(recipe)


def test_batch_norm_and_compilation_do_not_go_with_it() -> None:
    tree = RECIPE | {"encoders": {"image": {"model": "timm/test_resnet"}}, "objective": {"name": "rotation"}}
    recipe = load(tree, {"training.checkpointing": True, "training.compile": True})
    with pytest.raises(RecipeError, match=r"counting a batch twice; drop this or training.compile"):
        build(recipe)
