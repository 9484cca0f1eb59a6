"""What holds for every encoder: errors when built, a complete specification, weights from files."""

import copy
import json
import math

import pytest
import torch

from mmssl.encoders import create, reinitialized
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red square", "a blue circle on a green ground"] * 4, 120)


def an_input(modality, tokenizer):
    torch.manual_seed(0)
    if modality == "image":
        return (torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8),)
    if modality == "video":
        return (torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8),)
    if modality == "audio":
        mask = torch.ones(2, 8000, dtype=torch.bool)
        mask[1, 3000:] = False
        return torch.randn(2, 8000) * 0.1 * mask, mask
    ids, masks = zip(*(tokenizer(text, 10) for text in ("a red square", "a blue circle on a green")), strict=True)
    return torch.stack(ids), torch.stack(masks)


ENCODERS = [
    ("image", "timm/test_resnet", {}),
    ("text", "transformers/bert", BERT),
    ("audio", "timm/vit_tiny_patch16_224", VIT | {"img_size": [64, 48]}),
    ("video", "timm/vit_tiny_patch16_224", VIT | {"temporal": "max"}),
    ("video", "timm/vit_tiny_patch16_224", VIT | {"temporal": "transformer"}),
    ("image", "timm/vit_tiny_patch16_224", VIT),
    ("image", "torchvision/shufflenet_v2_x0_5", {}),
    ("image", "open_clip/ViT-B-32", CLIP),
    ("text", "open_clip/ViT-B-32", CLIP),
    ("audio", "torchvision/shufflenet_v2_x0_5", {"mels": 32}),
    ("video", "timm/mobilenetv3_small_050", {}),
]


@pytest.mark.parametrize(("modality", "model", "kwargs"), ENCODERS)
def test_encoder_keeps_the_contract(modality, model, kwargs, tokenizer):
    if modality == "text":
        kwargs = kwargs | {"tokenizer": tokenizer}
    encoder = create(model, modality, **kwargs).eval()
    inputs = an_input(modality, tokenizer)
    features = encoder(*inputs)
    rows, places, width = features.tokens.shape
    assert (rows, width) == (2, encoder.dim) == tuple(features.pooled.shape)
    assert torch.tensor(features.grid).prod() == places
    assert features.valid is None or features.valid.shape == (rows, places)
    depths = encoder.layers(*inputs)
    assert len(depths) >= 2
    for depth in depths.values():
        rows, places, width = depth.tokens.shape
        assert (rows, places) == (2, math.prod(depth.grid))
        assert depth.pooled.shape == (2, width)
        assert depth.valid is None or depth.valid.shape == (2, places)
        weight = torch.ones(2, places) if depth.valid is None else depth.valid.float()
        if kwargs.get("temporal") != "max":
            mean = (depth.tokens * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
            torch.testing.assert_close(depth.pooled, mean, rtol=1e-4, atol=1e-5)
    # One row at a time gives the same: rows do not meet.
    alone = encoder(*(x[1:] for x in inputs))
    torch.testing.assert_close(alone.pooled, features.pooled[1:], rtol=1e-4, atol=1e-5)

    encoder.train()
    features = encoder(*inputs)
    (features.tokens.sum() + features.pooled.square().sum()).backward()
    assert not [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.quick(4)
@pytest.mark.parametrize(("modality", "model", "kwargs"), ENCODERS)
def test_specification_builds_the_network_again(modality, model, kwargs, tokenizer):
    if modality == "text":
        kwargs = kwargs | {"tokenizer": tokenizer}
    encoder = create(model, modality, **kwargs)
    json.dumps({key: value for key, value in encoder.spec.items() if key != "tokenizer"})
    state = torch.get_rng_state()
    first, second, other = (reinitialized(encoder, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.spec == encoder.spec
    assert not first.training
    inputs = an_input(modality, tokenizer)
    torch.testing.assert_close(first(*inputs).pooled, second(*inputs).pooled, rtol=0, atol=0)
    assert not torch.equal(first(*inputs).pooled, other(*inputs).pooled)
    first.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(first(*inputs).pooled, encoder.eval()(*inputs).pooled)
    twin = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert first(*inputs).pooled.abs().sum() > 0


@pytest.mark.quick(4)
@pytest.mark.parametrize(("modality", "model", "kwargs"), ENCODERS)
def test_double_precision_from_input_to_output(modality, model, kwargs, tokenizer):
    if modality == "text":
        kwargs = kwargs | {"tokenizer": tokenizer}
    encoder = create(model, modality, **kwargs).eval()
    inputs = an_input(modality, tokenizer)
    single = encoder(*inputs)
    double = encoder.double()(*inputs)
    assert double.tokens.dtype == double.pooled.dtype == torch.float64
    torch.testing.assert_close(double.pooled.float(), single.pooled, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("modality", "model", "kwargs", "sentence"),
    [
        ("image", "tim/resnet18", {}, "'tim' is no library.*did you mean 'timm'"),
        ("image", "resnet18", {}, "is no library"),
        ("imag", "timm/resnet18", {}, "no encoder named 'imag'.*did you mean 'image'"),
        ("image", "timm/resnet19", {}, "timm has no such network.*did you mean 'resnet1"),
        ("image", "timm/zzzz", {}, r"timm.list_models\(\) lists the names"),
        ("image", "torchvision/resnet19", {}, "no such classification network.*did you mean 'resnet18'"),
        ("image", "open_clip/ViT-B-33", {}, "open_clip has no such model.*did you mean 'ViT-B-32'"),
        ("image", "transformers/bert", {}, "is no network for image; vit, dinov2"),
        ("image", "timm/vit_tiny_patch16_224", {"patchsize": 8}, "unknown key 'patchsize'.*did you mean 'patch_size'"),
        ("image", "timm/vit_tiny_patch16_224", {"num_heads": 5}, "should be divisible by num_heads"),
        ("image", "timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 7}, "cannot be cut into patches"),
        ("image", "timm/vit_tiny_patch16_224", {"class_token": False}, "[Tt]oken"),
        ("image", "timm/vit_tiny_patch16_224", {"depth": "two"}, "cannot be built"),
        ("image", "timm/vit_tiny_patch16_224", {"depth": -1}, "'depth' has to be 0 or more, and is -1"),
        (
            "image",
            "timm/resnet10t",
            {"channels": [0, 8, 8, 8]},
            r"'channels' has to be 1 or more, and is \[0, 8, 8, 8\]",
        ),
        ("image", "open_clip/ViT-B-32", {"vision_cfg": {"width": 0}}, "'width' has to be 1 or more, and is 0"),
        ("video", "transformers/videomae", {"num_hidden_layers": -1}, "'num_hidden_layers' has to be 0"),
        ("image", "timm/resnet18", {"num_classes": 10}, "'num_classes' is not for an encoder"),
        ("image", "timm/resnet18", {"checkpoint_path": "x.pth"}, "'checkpoint_path' is not for an encoder"),
        ("image", "timm/resnet18", {"pretraind": True}, "did you mean 'pretrained'"),
        ("image", "timm/resnet18", {"global_pool": ""}, "gives no vector"),
        ("image", "torchvision/resnet18", {"weights": "DEFAULT"}, "'pretrained' says where"),
        ("image", "open_clip/roberta-ViT-B-32", {}, "its text tower is of transformers"),
        ("image", "timm/resnet18", {"mean": [0.5]}, "one value for each of 3 channels"),
        ("image", "timm/resnet18", {"std": "wide"}, "std = 'wide' should be"),
        ("image", "torchvision/resnet18", {"group": 2}, "unknown key 'group'.*did you mean 'groups'"),
        ("image", "open_clip/ViT-B-32", {"embed": 2}, "unknown key 'embed'.*did you mean 'embed_dim'"),
        ("image", "open_clip/ViT-B-32", {"vision_cfg": {"layer": 2}}, "unknown key 'layer'.*did you mean 'layers'"),
        ("text", "transformers/bert", {}, "missing key 'tokenizer'"),
        ("text", "timm/resnet18", {}, "has no networks for text"),
        ("image", "torchvision/r3d_18", {}, "reads clips, which no encoder of image makes"),
        ("audio", "timm/vit_tiny_patch16_224", {"mels": 60}, "mels = 60 cannot be cut into patches of 16"),
        ("video", "torchvision/r3d_18", {"temporal": "max"}, "'temporal' is for image networks"),
        ("image", "timm/resnet18", {"pretrained": "local-dir:/nowhere"}, "cannot read /nowhere/config.json"),
        ("image", "open_clip/ViT-B-32", {"pretrained": "laion2"}, "no weights 'laion2'"),
        ("image", "open_clip/ViT-B-32", {"pretrained": True}, "no default weights .known: .*openai"),
    ],
)
def test_mistakes_are_one_sentence(modality, model, kwargs, sentence):
    with pytest.raises(RecipeError, match=sentence) as caught:
        create(model, modality, **kwargs)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.long
def test_mistakes_in_a_text_model_are_one_sentence(tokenizer):
    for model, kwargs, sentence in [
        ("transformers/brt", {}, "no such model type.*did you mean 'bert'"),
        ("transformers/bert", {"hidden_sizes": 2}, "unknown key 'hidden_sizes'.*did you mean 'hidden_size'"),
        ("transformers/bert", {"hidden_size": 10, "num_attention_heads": 3}, "multiple of the number of attention"),
        ("transformers/marian", {}, "is no text encoder"),
        ("transformers/bert", {"vocab_size": 7}, "7 embeddings, but the tokenizer has"),
        ("transformers/bert", {"pool": "last"}, "pool = 'last' should be"),
        ("open_clip/ViT-B-32", CLIP | {"pool": "mean"}, "pool_type"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            create(model, "text", tokenizer=tokenizer, **kwargs)


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("modality", "model", "kwargs"),
    [
        ("image", "timm/vit_tiny_patch16_224", VIT | {"reg_tokens": 2}),
        ("image", "torchvision/shufflenet_v2_x0_5", {}),
        ("image", "open_clip/ViT-B-32", CLIP),
        ("audio", "timm/vit_tiny_patch16_224", VIT | {"img_size": [64, 48]}),
        ("text", "open_clip/ViT-B-32", CLIP),
        ("text", "transformers/bert", BERT),
        ("image", "torchvision/vit_b_16", {"image_size": 32}),
    ],
)
def test_pretrained_from_a_directory_that_export_wrote(modality, model, kwargs, tokenizer, tmp_path):
    words = {"tokenizer": tokenizer} if modality == "text" else {}
    # Constants of their own show that they come from the file, not from the library's defaults.
    constants = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)} if model[:4] in ("timm", "open") else {}
    constants = constants if modality == "image" else {}
    encoder = create(model, modality, **kwargs, **words, **constants).eval()
    encoder.export(tmp_path)
    again = create(model, modality, pretrained=f"local-dir:{tmp_path}", **words).eval()
    inputs = an_input(modality, tokenizer)
    torch.testing.assert_close(again(*inputs).pooled, encoder(*inputs).pooled)
    torch.testing.assert_close(again(*inputs).tokens, encoder(*inputs).tokens)
    # The specification of what was loaded builds the same network with random weights, without the directory.
    for path in tmp_path.iterdir():
        path.unlink()
    fresh = reinitialized(again, 7)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}
    assert not torch.equal(fresh(*inputs).pooled, again(*inputs).pooled)


def test_the_directory_of_a_run_is_told_from_a_missing_file(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    with pytest.raises(RecipeError, match=r"is the directory of a run, .* mmssl\.load\(.*\)\.encoders"):
        create("timm/test_resnet", "image", pretrained=str(tmp_path))


@pytest.mark.long
def test_pretrained_from_a_file(tmp_path):
    for model, kwargs in [("timm/vit_tiny_patch16_224", VIT), ("torchvision/shufflenet_v2_x0_5", {})]:
        encoder = create(model, "image", **kwargs)
        path = tmp_path / f"{model.partition('/')[0]}.pth"
        torch.save(encoder.backbone.net.state_dict(), path)
        again = create(model, "image", pretrained=str(path), **kwargs)
        torch.testing.assert_close(again.backbone.net.state_dict(), encoder.backbone.net.state_dict())
    path = tmp_path / "clip.pt"
    import open_clip

    clip = open_clip.model.CLIP(
        **{**open_clip.get_model_config("ViT-B-32"), **CLIP, "text_cfg": CLIP["text_cfg"] | {"vocab_size": 120}}
    )
    torch.save(clip.state_dict(), path)
    text_cfg = CLIP["text_cfg"] | {"vocab_size": 120}
    again = create("open_clip/ViT-B-32", "image", pretrained=str(path), **CLIP | {"text_cfg": text_cfg})
    torch.testing.assert_close(again.backbone.net.state_dict(), clip.visual.state_dict())


@pytest.mark.long
def test_weights_of_another_network_are_refused(tmp_path):
    create("timm/vit_tiny_patch16_224", "image", **VIT).export(tmp_path / "timm")
    create("torchvision/shufflenet_v2_x0_5", "image").export(tmp_path / "torchvision")
    with pytest.raises(RecipeError, match="holds a vit_tiny_patch16_224"):
        create("timm/resnet18", "image", pretrained=f"local-dir:{tmp_path}/timm")
    with pytest.raises(RecipeError, match="holds a shufflenet_v2_x0_5"):
        create("torchvision/resnet18", "image", pretrained=f"local-dir:{tmp_path}/torchvision")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    for name in ("text.pth", "text.safetensors"):
        for model in ("torchvision/resnet18", "timm/resnet18"):
            with pytest.raises(RecipeError, match=r"cannot be built|holds no weights"):
                create(model, "image", pretrained=str(tmp_path / name))
    with pytest.raises(RecipeError, match="keys differ, the first is"):
        create("torchvision/resnet18", "image", pretrained=str(tmp_path / "torchvision" / "model.safetensors"))


def test_a_copy_of_a_torchvision_network_reads_its_own_maps():
    encoder = create("torchvision/resnet18", "image").eval()
    copied = copy.deepcopy(encoder)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
        x = torch.rand(2, 3, 32, 32)
        expected, other = encoder(x).tokens, copied(x).tokens
        assert not torch.allclose(expected, other)
        torch.testing.assert_close(list(copied.layers(x).values())[-1].tokens, other)
        torch.testing.assert_close(encoder(x).tokens, expected)


@pytest.mark.long
@pytest.mark.parametrize("model", ["torchvision/resnet18", "timm/test_resnet"])
def test_convolutional_networks_are_one_graph(model):
    encoder = create(model, "image").eval()
    compiled = torch.compile(encoder.backbone, fullgraph=True, backend="eager")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x).pooled, encoder.backbone(x).pooled)
