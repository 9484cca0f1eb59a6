"""Frozen features: what they are, and that taking them leaves no trace."""

import pytest
import torch

from mmssl import encoder as create
from mmssl.adaptation import features
from mmssl.adaptation.features import depths_of, extract
from mmssl.encoders import reinitialized
from mmssl.errors import DataError, RunError
from mmssl.media.text import Tokenizer


@pytest.fixture
def small():
    torch.manual_seed(0)
    return create("timm/test_resnet", modality="image")


def images(rows: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (rows, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def batches(rows: int, size: int = 7):
    x = images(rows)
    return [
        {
            "image": x[i : i + size],
            "label": torch.arange(rows)[i : i + size] % 2,
            "id": torch.arange(rows)[i : i + size],
        }
        for i in range(0, rows, size)
    ]


def test_features_are_the_pooled_vectors_of_evaluation_mode_in_order(small):
    vectors, labels, ids = features(small, batches(20))
    small.eval()
    with torch.no_grad():
        expected = small(images(20)).pooled
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert ids.tolist() == list(range(20))
    assert labels.tolist() == [i % 2 for i in range(20)]


def test_the_encoder_is_left_as_it_was_found(small):
    small.train()
    frozen_part = next(m for m in small.modules() if isinstance(m, torch.nn.BatchNorm2d))
    frozen_part.eval()
    modes = [m.training for m in small.modules()]
    state = {key: value.clone() for key, value in small.state_dict().items()}
    features(small, batches(10))
    assert [m.training for m in small.modules()] == modes
    assert any(modes)
    assert not all(modes)
    assert all(torch.equal(value, state[key]) for key, value in small.state_dict().items())
    with pytest.raises(DataError, match="the encoder reads 'image'"):
        features(small, [{"text": torch.zeros(2, 3)}])
    assert [m.training for m in small.modules()] == modes


def test_layers_have_every_depth_and_the_pooled_vector(small):
    views, _, _ = features(small, batches(9), layers=True)
    small.eval()
    with torch.no_grad():
        expected = small.layers(images(9))
    assert list(views) == ["pooled", *expected]
    for depth, value in expected.items():
        torch.testing.assert_close(views[depth], value.pooled, atol=1e-5, rtol=1e-5)


TOKENIZER = Tokenizer.train(["a red square"] * 4, 60)
VIT = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
NETWORKS = {
    "timm/test_resnet": ("image", {}),
    "timm/vit_tiny_patch16_224": ("image", VIT),
    "timm/test_vit": ("video", {"img_size": 32}),
    "torchvision/resnet18": ("image", {}),
    "transformers/vit": ("image", BERT | {"image_size": 32, "patch_size": 16}),
    "transformers/bert": ("text", BERT | {"tokenizer": TOKENIZER}),
}


@pytest.mark.parametrize("model", NETWORKS)
def test_layers_and_the_pooled_vector_are_of_one_pass(model):
    modality, options = NETWORKS[model]
    network = create(model, modality=modality, **options).eval()
    x = {"image": images(2), "video": images(2)[:, None].expand(-1, 3, -1, -1, -1), "text": torch.ones(2, 4).long()}
    batch = {modality: x[modality]}
    passes = []
    layer = max((m for m in network.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)), key=_parameters)
    layer.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        found = depths_of(network, batch, True)
        assert len(passes) == 1
        alone, layers = network(x[modality]), network.layers(x[modality])
    assert len(passes) == 3
    assert torch.equal(found.pop("pooled").pooled, alone.pooled)
    assert list(found) == list(layers)
    assert all(torch.equal(found[depth].tokens, layers[depth].tokens) for depth in layers)


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_mask_reaches_the_encoder():
    class Mean(torch.nn.Module):
        modality = "text"

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, valid=None):
            pooled = ((x * mask).sum(1) / mask.sum(1))[:, None].double()
            return type("Features", (), {"pooled": pooled})

    mask = torch.tensor([[True, True, False], [True, False, False]])
    vectors, labels, _ = features(Mean(), [{"text": torch.tensor([[1, 3, 100], [5, 100, 100]]), "text_mask": mask}])
    assert vectors.flatten().tolist() == [2.0, 5.0]
    assert vectors.dtype == torch.float32
    assert labels is None


def test_several_encoders_read_a_generator_in_one_pass(small):
    other = reinitialized(small, 5)
    (first, second), rest = extract([small, other], (batch for batch in batches(12)))
    assert torch.equal(first["pooled"], features(small, batches(12))[0])
    assert torch.equal(second["pooled"], features(other, batches(12))[0])
    assert not torch.equal(first["pooled"], second["pooled"])
    assert set(rest) == {"label", "id"}


def test_random_encoders_are_reproducible_and_differ_by_seed(small):
    one, again, other = (features(reinitialized(small, seed), batches(5))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


def test_no_rows_and_diverged_weights_are_said(small):
    with pytest.raises(DataError, match="no rows"):
        features(small, [])
    with torch.no_grad():
        next(small.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match="4 of 4 pooled features are not finite"):
        features(small, batches(4))
