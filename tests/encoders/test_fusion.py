"""Fusion: what its layers compute, whom a token sees, and that it can be built again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, FlavaMultimodalConfig, FlavaMultimodalModel
from transformers.models.blip.modeling_blip_text import BlipTextEncoder

import mmssl
from mmssl import recipe
from mmssl.build import build_objective
from mmssl.encoders import create, reinitialized
from mmssl.encoders.base import Features
from mmssl.encoders.fusion import FusionEncoder
from mmssl.errors import RecipeError
from mmssl.registry import ROOT

D, A, B = 16, 5, 7  # width, tokens of each side
BERT = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"embed_dim": D, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
MODELS = {
    "joint": ("transformers/flava", BERT),
    "cross": ("transformers/bert", BERT | NO_DROPOUT),
    "multiway": ("timm/vit_tiny_patch16_224", VIT | {"joint_layers": 1}),
    "bottleneck": ("timm/vit_tiny_patch16_224", VIT | {"bottleneck_tokens": 2}),
}


pytestmark = pytest.mark.usefixtures("double")


def fusion(kind: str, width_a: int = 6, width_b: int = 8, **changes) -> FusionEncoder:
    torch.manual_seed(0)
    model, kwargs = MODELS[kind]
    made = create(model, "fusion", reads={"image": width_a, "text": width_b}, **kwargs | changes)
    assert isinstance(made, FusionEncoder)
    assert made.kind == kind
    return made


def unmapped(kind: str, **changes) -> FusionEncoder:
    """One whose maps change nothing, so that it can be compared with the library's layers."""
    made = fusion(kind, D, D, **changes)
    made.map_a, made.map_b = nn.Identity(), nn.Identity()
    made.map_a.in_features = made.map_b.in_features = D
    return made


def side(tokens: int, width: int, lengths: list[int] | None = None, seed: int = 1) -> Features:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, tokens, width, generator=generator)
    mask = None if lengths is None else torch.arange(tokens) < torch.tensor(lengths)[:, None]
    return Features(values, values.mean(1), (tokens,), mask)


def gradients(module: nn.Module, value: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    value.square().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_joint_is_the_multimodal_model_of_flava():
    made = unmapped("joint")
    theirs = FlavaMultimodalModel(FlavaMultimodalConfig(**BERT), add_pooling_layer=False).eval()
    theirs.load_state_dict(made.net.net.state_dict())
    a, b = side(A, D), side(B, D, [7, 3, 1])
    mask = torch.cat([torch.ones(3, 1 + A, dtype=torch.bool), b.valid], 1)
    expected = theirs(torch.cat([a.tokens, b.tokens], 1), attention_mask=mask.long()).last_hidden_state
    fused = made(a, b)
    torch.testing.assert_close(torch.cat([fused.pooled[:, None], fused.a, fused.b], 1), expected)
    own, their = gradients(made.net.net, fused.pooled), gradients(theirs, expected[:, 0])
    assert own.keys() == their.keys()
    torch.testing.assert_close(own, their)


@pytest.mark.parametrize("causal", [False, True])
def test_cross_is_the_text_encoder_of_blip(causal):
    """Written apart from BERT's in transformers, after the code of ALBEF's authors.

    Without a mask of `a`: in transformers 5.23 it does not arrive at BLIP's attention.
    """
    made = unmapped("cross", hidden_act="gelu")
    config = BlipTextConfig(**BERT | NO_DROPOUT, encoder_hidden_size=D, is_decoder=True, layer_norm_eps=1e-12)
    config._attn_implementation = "eager"
    theirs = BlipTextEncoder(config).eval()
    theirs.load_state_dict(made.net.net.state_dict())
    a, b = side(A, D), side(B, D, [7, 3, 1])
    seen = b.valid[:, None, None].expand(-1, -1, B, -1)
    if causal:
        seen = seen & torch.ones(B, B, dtype=torch.bool).tril()
    expected = theirs(
        b.tokens,
        attention_mask=torch.where(seen, 0.0, -1e30),
        encoder_hidden_states=a.tokens,
    ).last_hidden_state
    fused = made(a, b, causal=causal)
    assert fused.a is None
    torch.testing.assert_close(fused.b[b.valid], expected[b.valid])
    torch.testing.assert_close(fused.pooled, expected[:, 0])
    own, their = gradients(made.net.net, fused.b[b.valid]), gradients(theirs, expected[b.valid])
    assert own.keys() == their.keys()
    torch.testing.assert_close(own, their)


@pytest.mark.parametrize("joint_layers", [0, 2])
def test_multiway_with_equal_experts_is_a_vision_transformer(joint_layers):
    made = unmapped("multiway", joint_layers=joint_layers)
    for layer in made.net.layers:
        for expert in layer.experts[1:]:
            expert.load_state_dict(layer.experts[0].state_dict())
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    for block, layer in zip(theirs.blocks, made.net.layers, strict=True):
        block.norm1, block.attn = layer.norm, layer.attention
        block.norm2, block.mlp = layer.experts[0].norm, layer.experts[0].mlp
    theirs.norm = made.net.norm
    a, b = side(A, D), side(B, D, [7, 3, 1])
    seen = torch.cat([torch.ones(3, A, dtype=torch.bool), b.valid], 1)[:, None, None]
    for given in ((a, b), (a, None), (None, b)):
        x = torch.cat([features.tokens for features in given if features is not None], 1)
        mask = seen[..., (0 if given[0] else A) : (A + B if given[1] else A)]
        for block in theirs.blocks:
            x = block(x, attn_mask=mask)
        fused = made(*given)
        parts = [part for part in (fused.a, fused.b) if part is not None]
        assert len(parts) == sum(features is not None for features in given)
        torch.testing.assert_close(torch.cat(parts, 1), theirs.norm(x))


def test_each_modality_has_its_expert_and_pairs_have_theirs_on_top():
    made = fusion("multiway")
    experts = [len(layer.experts) for layer in made.net.layers]
    assert experts == [2, 2, 3]
    a, b = side(A, 6), side(B, 8)

    def used(given: tuple[Features | None, Features | None]) -> list[set[int]]:
        found = gradients(made, made(*given).pooled)
        assert found.keys() == dict(made.named_parameters()).keys()  # 0 where idle, and never none
        return [
            {j for j in range(n) if found[f"net.layers.{i}.experts.{j}.mlp.fc1.weight"].abs().max() > 0}
            for i, n in enumerate(experts)
        ]

    assert used((a, b)) == [{0, 1}, {0, 1}, {2}]
    assert used((a, None)) == [{0}, {0}, {0}]
    assert used((None, b)) == [{1}, {1}, {1}]
    # Three networks and not three copies.
    weights = [expert.mlp.fc1.weight for expert in made.net.layers[2].experts]
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("number", [1, 3])
def test_a_bottleneck_is_two_vision_transformers_that_pass_the_mean_of_a_few_tokens(number):
    """By timm's own blocks, one row and one modality at a time, without padding in place of with a mask."""
    made = unmapped("bottleneck", bottleneck_tokens=number)
    theirs = [timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT) for _ in range(2)]
    for i, net in enumerate(theirs):
        net.blocks.load_state_dict(made.net.blocks[i].state_dict())
        net.norm.load_state_dict(made.net.norms[i].state_dict())
    a, b = side(A, D, [5, 2, 4]), side(B, D, [7, 3, 1])
    fused = made(a, b)
    pooled = []
    for row in range(3):
        streams = [features.tokens[row : row + 1][:, features.valid[row]] for features in (a, b)]
        passed = made.net.tokens[None]
        for layer in range(VIT["depth"]):
            out = [net.blocks[layer](torch.cat([passed, x], 1)) for net, x in zip(theirs, streams, strict=True)]
            streams = [x[:, number:] for x in out]
            passed = torch.stack([x[:, :number] for x in out]).mean(0)
        streams = [net.norm(x) for net, x in zip(theirs, streams, strict=True)]
        torch.testing.assert_close(fused.a[row][a.valid[row]], streams[0][0])
        torch.testing.assert_close(fused.b[row][b.valid[row]], streams[1][0])
        pooled.append(torch.stack([x[0].mean(0) for x in streams]).mean(0))
    torch.testing.assert_close(fused.pooled, torch.stack(pooled))
    expected = gradients(nn.ModuleList(net.blocks for net in theirs), torch.stack(pooled))
    own = gradients(made.net.blocks, fused.pooled)
    assert own.keys() == expected.keys()
    torch.testing.assert_close(own, expected)


def test_nothing_passes_but_through_the_bottleneck():
    """Between the layers `b` is another one: its only way to `a` are the tokens that are written and read."""
    made = fusion("bottleneck").eval()
    with torch.no_grad():  # little passes through weights as they start
        for parameter in made.parameters():
            parameter.mul_(3)
    a, b = side(A, 6), side(B, 8)
    louder = b._replace(tokens=b.tokens * 3)
    assert (made(a, louder).a - made(a, b).a).abs().max() > 1e-3
    width = made.net.tokens.shape[0]

    def closed(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return torch.cat([out[:, :-width], torch.zeros_like(out[:, -width:])], dim=1)

    handles = [block.register_forward_hook(closed) for blocks in made.net.blocks for block in blocks]
    shut, still = made(a, b), made(a, louder)
    torch.testing.assert_close(still.a, shut.a, rtol=0, atol=0)
    assert (still.b - shut.b).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    # In the first layer nothing of the other side is there to be read yet.
    first = [[], []]
    for i, blocks in enumerate(made.net.blocks):
        blocks[0].register_forward_hook(lambda module, given, out, i=i: first[i].append(out))
    made(a, b), made(a, louder)
    torch.testing.assert_close(first[0][0], first[0][1], rtol=0, atol=0)
    assert (first[1][0] - first[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", MODELS)
def test_padding_has_no_say(kind):
    made = fusion(kind).eval()
    a, b = side(A, 6, [5, 2, 4]), side(B, 8, [7, 3, 1])
    noisy_a = a._replace(tokens=torch.where(a.valid[..., None], a.tokens, 50.0))
    noisy_b = b._replace(tokens=torch.where(b.valid[..., None], b.tokens, 50.0))
    fused, noisy = made(a, b), made(noisy_a, noisy_b)
    torch.testing.assert_close(noisy.pooled, fused.pooled)
    torch.testing.assert_close(noisy.b[b.valid], fused.b[b.valid])
    if fused.a is not None:
        torch.testing.assert_close(noisy.a[a.valid], fused.a[a.valid])
    # What is not padding has.
    louder = made(a._replace(tokens=a.tokens + 1.0), b)
    assert (louder.pooled - fused.pooled).abs().amin(0).max() > 1e-3
    # A row of padding alone is finite and leaves the others alone.
    empty = made(a, b._replace(valid=b.valid & torch.tensor([True, True, False])[:, None]))
    assert empty.pooled.isfinite().all()
    torch.testing.assert_close(empty.pooled[:2], fused.pooled[:2])


@pytest.mark.parametrize("kind", MODELS)
def test_every_token_sees_the_whole_pair_or_only_what_came_before(kind):
    made = fusion(kind).eval()
    a, b = side(A, 6), side(B, 8)
    for causal in (False, True) if kind == "cross" else (False,):
        a.tokens.requires_grad_(), b.tokens.requires_grad_()
        fused = made(a, b, causal=causal)
        for place in range(B):
            to_a, to_b = torch.autograd.grad(fused.b[0, place].square().sum(), [a.tokens, b.tokens], retain_graph=True)
            assert (to_a[0].abs().sum(1) > 0).all()
            assert to_a[1:].abs().max() == 0
            seen = to_b[0].abs().sum(1) > 0
            assert seen.tolist() == [not causal or earlier <= place for earlier in range(B)]


def test_a_causal_token_sees_itself_where_nothing_before_it_is_valid():
    b = side(B, 8)._replace(valid=torch.arange(B) >= torch.tensor([0, 2, 6])[:, None])
    assert fusion("cross").eval()(side(A, 6), b, causal=True).b.isfinite().all()


def test_cross_pools_the_first_token_or_the_mean():
    a, b = side(A, 6), side(B, 8, [7, 3, 1])
    first, mean = (fusion("cross", pool=pool).eval()(a, b) for pool in ("first", "mean"))
    torch.testing.assert_close(first.pooled, first.b[:, 0])
    torch.testing.assert_close(mean.pooled[1], mean.b[1, :3].mean(0))


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_learns_in_half_precision_too(kind):
    made = fusion(kind).float()
    a, b = (f._replace(tokens=f.tokens.float()) for f in (side(A, 6), side(B, 8, [7, 3, 1])))
    with torch.autocast("cpu", torch.bfloat16):
        fused = made(a, b)
    fused.pooled.float().square().sum().backward()
    assert [name for name, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    exact = made(a, b)
    assert (fused.pooled.float() - exact.pooled).abs().max() < 0.1


@pytest.mark.parametrize("kind", MODELS)
def test_it_can_be_built_again_with_new_or_with_its_own_weights(kind, tmp_path: Path):
    made = fusion(kind).eval()
    a, b = side(A, 6), side(B, 8, [7, 3, 1])
    made.export(tmp_path / "made")
    arguments = json.loads((tmp_path / "made" / "fusion.json").read_text())
    same = mmssl.encoder(**arguments, pretrained=f"local-dir:{tmp_path / 'made'}").eval()
    assert same.spec == made.spec == arguments
    torch.testing.assert_close(same(a, b), made(a, b), rtol=0, atol=0)
    fresh, again, other = reinitialized(made, 3), reinitialized(made, 3), reinitialized(made, 4)
    assert fresh.spec == made.spec
    torch.testing.assert_close(fresh(a, b), again(a, b), rtol=0, atol=0)
    assert not torch.allclose(fresh(a, b).pooled, other(a, b).pooled)
    with pytest.raises(RecipeError, match="another network"):
        fusion(kind, width_a=7, pretrained=f"local-dir:{tmp_path / 'made'}")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("cross", {"hidden_size": 15}, "multiple of the number of attention heads"),
        ("joint", {"hidden_size": 0}, "'hidden_size' has to be 1 or more"),
        ("joint", {"hidden_size": 15}, "multiple of the number of attention heads"),
        ("multiway", {"embed_dim": 15}, "divisible by num_heads"),
        ("cross", {"hidden_sice": 16}, "did you mean 'hidden_size'"),
        ("multiway", {"embed_dims": 16}, "unknown key 'embed_dims'"),
        ("multiway", {"joint_layers": 4}, "there are 3 layers"),
        ("joint", {"pool": "mean"}, "one way to pool"),
        ("cross", {"joint_layers": 1}, "experts"),
        ("bottleneck", {"joint_layers": 1}, "experts"),
        ("bottleneck", {"depth": 1}, "a depth of 2 or more"),
        ("bottleneck", {"bottleneck_tokens": 0}, "from 1"),
        ("cross", {"bottleneck_tokens": 2}, "blocks of a timm vision transformer"),
        ("cross", {"pretrained": True}, "local-dir"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_sentence(kind, changes, message):
    with pytest.raises(RecipeError, match=message):
        fusion(kind, **changes)


@pytest.mark.long
def test_networks_without_plain_blocks_and_other_libraries_are_refused():
    for model, message in (
        ("timm/resnet18", "a fusion needs plain blocks"),
        ("transformers/roberta", "is no fusion"),
        ("torchvision/r3d_18", "is no fusion"),
    ):
        with pytest.raises(RecipeError, match=message):
            create(model, "fusion", reads={"image": 6, "text": 8})
    with pytest.raises(RecipeError, match="two encoders"):
        create("transformers/bert", "fusion", reads={"image": 6})
    with pytest.raises(RecipeError, match="their widths are needed"):
        create("transformers/bert", "fusion", reads=["image", "text"])


def test_one_side_alone_and_causal_order_are_for_those_that_know_them():
    a, b = side(A, 6), side(B, 8)
    for kind in ("joint", "cross", "bottleneck"):
        with pytest.raises(ValueError, match="one is missing"):
            fusion(kind)(a, None)
    for kind in ("joint", "multiway", "bottleneck"):
        with pytest.raises(ValueError, match="both ways"):
            fusion(kind)(a, b, causal=True)
    with pytest.raises(ValueError, match="missing"):
        fusion("multiway")(None, None)


@pytest.mark.quick(2)
@pytest.mark.parametrize(
    ("reads", "message"),
    [
        (["image", "txt"], "no encoder of the recipe"),
        (["image", "fusion"], "no encoder of the recipe"),
        (["image", "image"], "should name two encoders"),
        ("image", "should name two encoders"),
        (None, "should name two encoders"),
    ],
)
def test_a_recipe_names_what_is_read_and_the_widths_are_filled_in(reads, message):
    loaded = recipe.load(ROOT.parent / "recipes" / "correspondence" / "matching_toy.yaml")
    loaded.encoders["text"] = {"model": "timm/test_vit", "modality": "image"}  # reads no words, needs no tokenizer
    objective = build_objective(loaded, {}, where="here")
    both = objective.encoder("fusion")
    assert list(objective.encoders)[-1] == "fusion"
    assert both.spec["reads"] == {name: objective.encoder(name).dim for name in ("image", "text")}
    loaded.encoders["fusion"]["reads"] = reads
    with pytest.raises(RecipeError, match=f"here: encoders.fusion: reads.*{message}"):
        build_objective(loaded, {}, where="here")
