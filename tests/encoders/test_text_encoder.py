"""Texts: padding has no influence, pooling, equality with the libraries."""

import pytest
import torch

from mmssl.encoders import create
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "image_size": 16, "patch_size": 8},
    "text_cfg": {"layers": 2, "width": 32, "heads": 2, "context_length": 12},
}
TEXTS = ("a red square", "a blue circle on a green ground", "red")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([*TEXTS] * 4, 120)


def encode(tokenizer, texts=TEXTS, length=10):
    ids, masks = zip(*(tokenizer(text, length) for text in texts), strict=True)
    return torch.stack(ids), torch.stack(masks)


def build(model, tokenizer, **kwargs):
    torch.manual_seed(0)
    return create(model, "text", tokenizer=tokenizer, **kwargs).double().eval()


MODELS = [
    ("bert", BERT),
    ("roberta", BERT),
    ("distilbert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32}),
    ("modernbert", BERT),
    ("gpt2", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
]


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_padding_has_no_influence(name, kwargs, tokenizer):
    encoder = build(f"transformers/{name}", tokenizer, **kwargs)
    short, long = encoder(*encode(tokenizer, length=10)), encoder(*encode(tokenizer, length=14))
    torch.testing.assert_close(short.pooled, long.pooled)
    torch.testing.assert_close(short.tokens[short.valid], long.tokens[long.valid])
    for mine, theirs in zip(
        encoder.layers(*encode(tokenizer, length=10)).values(),
        encoder.layers(*encode(tokenizer, length=14)).values(),
        strict=True,
    ):
        torch.testing.assert_close(mine.pooled, theirs.pooled)
        torch.testing.assert_close(mine.tokens[mine.valid], theirs.tokens[theirs.valid])


@pytest.mark.parametrize(("name", "kwargs"), MODELS)
def test_a_row_of_padding_is_finite_and_leaves_the_others(name, kwargs, tokenizer):
    encoder = build(f"transformers/{name}", tokenizer, **kwargs).train()
    ids, mask = encode(tokenizer)
    mask[1] = False
    features = encoder.eval()(ids, mask)
    assert features.tokens.isfinite().all()
    assert features.pooled.isfinite().all()
    assert torch.equal(features.valid, mask)
    torch.testing.assert_close(features.pooled[[0, 2]], encoder(*encode(tokenizer)).pooled[[0, 2]])
    features.pooled.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)
    assert all(value.pooled.isfinite().all() for value in encoder.layers(ids, mask).values())


def test_pooling_is_the_mean_of_valid_tokens_or_the_first(tokenizer):
    ids, mask = encode(tokenizer)
    mean, first = (
        build("transformers/bert", tokenizer, **BERT),
        build("transformers/bert", tokenizer, pool="first", **BERT),
    )
    features = mean(ids, mask)
    for row in range(3):
        torch.testing.assert_close(features.pooled[row], features.tokens[row][mask[row]].mean(dim=0))
    torch.testing.assert_close(first(ids, mask).pooled, features.tokens[:, 0])
    assert features.grid == (10,)
    depths = mean.layers(ids, mask)
    assert list(depths) == ["embeddings", "layers.0", "layers.1"]
    torch.testing.assert_close(depths["layers.1"].tokens, features.tokens)


def test_every_parameter_is_used_and_the_vocabulary_is_the_tokenizers(tokenizer):
    encoder = build("transformers/bert", tokenizer, **BERT)
    assert encoder.token_embedding.shape == (tokenizer.vocab_size, 16)
    assert encoder.token_embedding is encoder.backbone.net.embeddings.word_embeddings.weight
    assert encoder.backbone.net.config.pad_token_id == tokenizer.pad_id
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def test_open_clip_tower_equals_open_clip():
    tokenizer = Tokenizer.open_clip("ViT-B-32")
    encoder = build("open_clip/ViT-B-32", tokenizer, **CLIP)
    ids, mask = encode(tokenizer, length=12)
    features = encoder(ids, mask)
    torch.testing.assert_close(features.pooled, encoder.backbone.net(ids))
    # Pooled is the token at the end of the text; shorter rows are padded to the tower's context inside.
    last = mask.sum(dim=1) - 1
    torch.testing.assert_close(features.tokens[torch.arange(3), last], features.pooled)
    shorter = encoder(ids[:, :9], mask[:, :9])
    assert shorter.grid == (9,)
    torch.testing.assert_close(shorter.pooled, features.pooled)
    with pytest.raises(RecipeError, match="reads 12 ids, got 13"):
        encoder(*encode(tokenizer, length=13))


def test_open_clip_tower_that_sees_its_padding_gets_all_of_it(tokenizer):
    both_ways = CLIP | {"text_cfg": CLIP["text_cfg"] | {"no_causal_mask": True, "pool_type": "last"}}
    encoder = build("open_clip/ViT-B-32", tokenizer, **both_ways)
    ids, mask = encode(tokenizer, length=12)
    torch.testing.assert_close(encoder(ids, mask).pooled, encoder.backbone.net(ids))
    assert not mask[:, 9:].any()
    torch.testing.assert_close(encoder(ids[:, :9], mask[:, :9]).pooled, encoder(ids, mask).pooled)


def test_open_clip_tower_with_a_vocabulary_of_its_own_pools_the_end(tokenizer):
    encoder = build("open_clip/ViT-B-32", tokenizer, **CLIP)
    ids, mask = encode(tokenizer, length=12)
    features = encoder(ids, mask)
    last = mask.sum(dim=1) - 1
    torch.testing.assert_close(features.tokens[torch.arange(3), last], features.pooled)
    assert encoder.token_embedding.shape == (tokenizer.vocab_size, 32)


def test_a_text_longer_than_the_model_reads_is_refused(tokenizer):
    encoder = build("transformers/bert", tokenizer, max_position_embeddings=8, **BERT)
    with pytest.raises(RecipeError, match=r"reads 8 ids, got 10.*text\.length"):
        encoder(*encode(tokenizer))
