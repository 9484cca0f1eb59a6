"""Images, sounds and clips of transformers: every output is that of the library's own model, every depth in place."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, SiglipConfig, SiglipModel, Wav2Vec2Config, Wav2Vec2Model

from mmssl.encoders import create, reinitialized
from mmssl.errors import RecipeError

LAYER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PATCHES = LAYER | {"image_size": 32, "patch_size": 8}
CLIPS = PATCHES | {"num_frames": 4}
# Convolutions with a stride of 8 in all, that see 20 samples.
WAVES = LAYER | {
    **{"conv_dim": [8, 8, 8], "conv_stride": [2, 2, 2], "conv_kernel": [4, 3, 4], "num_feat_extract_layers": 3},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer"},
    **{"do_stable_layer_norm": True},
}
MODELS = {
    "vit": ("image", PATCHES),
    "dinov2": ("image", {key: value for key, value in PATCHES.items() if key != "intermediate_size"}),
    "siglip_vision_model": ("image", PATCHES),
    "convnext": ("image", {"hidden_sizes": [8, 12, 16, 20], "depths": [1, 1, 1, 1]}),
    "audio-spectrogram-transformer": ("audio", LAYER | {"num_mel_bins": 32, "max_length": 40, "patch_size": 8}),
    "wav2vec2": ("audio", WAVES),
    "hubert": ("audio", WAVES),
    "wavlm": ("audio", WAVES | {"num_buckets": 8, "max_bucket_distance": 16}),
    "videomae": ("video", CLIPS),
    "vivit": ("video", LAYER | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "timesformer": ("video", CLIPS),
}
PREFIX = {"vit": 1, "dinov2": 1, "audio-spectrogram-transformer": 2, "vivit": 1}
GRIDS = {"audio-spectrogram-transformer": (3, 4), "videomae": (2, 4, 4), "vivit": (2, 4, 4), "timesformer": (4, 4, 4)}
FREE = ("vit", "dinov2", "siglip_vision_model", "audio-spectrogram-transformer", "videomae", "vivit")


def build(name, seed=0, **kwargs):
    """In double precision, with every weight random: some models start positions and class tokens at 0."""
    torch.manual_seed(seed)
    modality, given = MODELS[name]
    encoder = create(f"transformers/{name}", modality, **given | kwargs).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def an_input(modality):
    generator = torch.Generator().manual_seed(1)
    if modality == "audio":
        return torch.randn(2, 4000, generator=generator).mul(0.1).clamp(-1, 1).double()
    shape = (2, 3, 32, 32) if modality == "image" else (2, 4, 3, 32, 32)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def given_to_the_library(encoder, x):
    """What the library's own model takes, made from raw input by hand."""
    if encoder.modality == "audio":
        if encoder.front is not None:
            return encoder.spectrogram(x).mT
        return (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-7).sqrt()
    # Constants that were rounded to single precision before they became double.
    mean, std = (torch.tensor(encoder.spec[key])[:, None, None].double() for key in ("mean", "std"))
    return (x.double() / 255 - mean) / std


def in_place(name, hidden):
    """The library's hidden states -> tokens (B, N, D) in rows, frame by frame."""
    if hidden.ndim == 4:
        return hidden.flatten(2).mT
    if name == "timesformer":
        return hidden[:, 1:].unflatten(1, (16, 4)).transpose(1, 2).flatten(1, 2)
    return hidden[:, PREFIX.get(name, 0) :]


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_every_depth_are_those_of_the_library(name):
    encoder, x = build(name), an_input(MODELS[name][0])
    output = encoder.backbone.net(given_to_the_library(encoder, x), output_hidden_states=True)
    features = encoder(x)
    torch.testing.assert_close(features.tokens, in_place(name, output.last_hidden_state), rtol=0, atol=1e-9)
    assert features.tokens.shape[2] == features.pooled.shape[1] == encoder.dim
    assert torch.tensor(features.grid).prod() == features.tokens.shape[1]
    assert features.grid == GRIDS.get(name, features.grid)
    depths = encoder.layers(x)
    assert len(depths) == len(output.hidden_states) >= 3
    for mine, theirs in zip(depths.values(), output.hidden_states, strict=True):
        torch.testing.assert_close(mine.tokens, in_place(name, theirs), rtol=0, atol=1e-9)
        torch.testing.assert_close(mine.pooled, mine.tokens.mean(1))
        assert torch.tensor(mine.grid).prod() == mine.tokens.shape[1]
    pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        first = output.last_hidden_state[:, 0]
        pooled = first if name in ("vit", "vivit", "timesformer") else features.tokens.mean(1)
    torch.testing.assert_close(features.pooled, pooled, rtol=0, atol=1e-9)


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", MODELS)
def test_every_weight_learns_and_the_seed_is_all_that_differs(name):
    encoder = build(name).train()
    features = encoder(an_input(encoder.modality))
    (features.tokens.square().sum() + features.pooled.square().sum()).backward()
    assert not [key for key, parameter in encoder.named_parameters() if parameter.grad is None]
    assert json.loads(json.dumps(encoder.spec)) == encoder.spec
    one, same, other = (reinitialized(encoder, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)
    assert {key: value.shape for key, value in one.items()} == {
        key: value.shape for key, value in encoder.state_dict().items()
    }


@pytest.mark.parametrize("name", FREE)
def test_tokens_can_be_left_out_and_keep_their_places(name):
    encoder, x = build(name), an_input(MODELS[name][0])
    assert encoder.subsets
    tokens, features = encoder.embed(x), encoder(x)
    torch.testing.assert_close(encoder.encode(tokens).tokens, features.tokens)
    generator = torch.Generator().manual_seed(2)
    order = torch.randperm(tokens.shape[1], generator=generator)
    mixed = encoder.encode(tokens[:, order])
    torch.testing.assert_close(mixed.tokens, features.tokens[:, order])
    torch.testing.assert_close(mixed.pooled, features.pooled)
    # What is left out has no influence, and what replaces a token has its position.
    kept, gone = order[:6], order[6:]
    hidden = torch.zeros(2, tokens.shape[1], dtype=torch.bool)
    hidden[:, gone] = True
    first, second = torch.randn(2, encoder.width, generator=generator, dtype=torch.float64)
    shown = encoder.embed(x, hidden, first)
    torch.testing.assert_close(encoder.encode(shown[:, kept]).pooled, encoder.encode(tokens[:, kept]).pooled)
    assert not torch.allclose(encoder.encode(tokens[:, kept]).pooled, features.pooled)
    difference = encoder.embed(x, hidden, second) - shown
    torch.testing.assert_close(difference[:, gone], (second - first).expand(2, len(gone), -1))
    assert not difference[:, kept].any()
    assert not torch.allclose(shown[0, gone[0]], shown[0, gone[1]])


@pytest.mark.parametrize("name", [name for name in FREE if name != "videomae"])
def test_tokens_that_are_not_valid_are_as_good_as_left_out(name):
    encoder, x = build(name), an_input(MODELS[name][0])
    if name == "dinov2" and not encoder.backbone.padding:
        pytest.skip("the layers of this version of transformers take no mask")
    tokens = encoder.embed(x)
    valid = torch.zeros(2, tokens.shape[1], dtype=torch.bool)
    valid[:, 2:9] = True
    noisy = torch.where(valid[:, :, None], tokens, 50.0)
    masked, left_out = encoder.encode(noisy, valid), encoder.encode(tokens[:, 2:9])
    torch.testing.assert_close(masked.tokens[:, 2:9], left_out.tokens)
    torch.testing.assert_close(masked.pooled, left_out.pooled)
    assert encoder.encode(tokens, torch.zeros_like(valid)).pooled.isfinite().all()


@pytest.mark.parametrize("name", ["convnext", "timesformer"])
def test_networks_whose_tokens_must_stay_say_so(name):
    encoder = build(name)
    assert not encoder.subsets
    with pytest.raises(TypeError, match="no tokens that can be left out"):
        encoder.embed(an_input(encoder.modality))


def test_videomae_says_that_it_knows_no_padding():
    encoder = build("videomae")
    tokens = encoder.embed(an_input("video"))
    with pytest.raises(TypeError, match="attends to every token"):
        encoder.encode(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool))


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip_vision_model"])
def test_other_sizes_get_resampled_positions_as_in_the_library(name):
    encoder = build(name)
    x = an_input("image").repeat(1, 1, 2, 1)[:, :, :48]
    options = {} if name == "dinov2" else {"interpolate_pos_encoding": True}
    output = encoder.backbone.net(given_to_the_library(encoder, x), **options)
    torch.testing.assert_close(encoder(x).tokens, in_place(name, output.last_hidden_state), rtol=0, atol=1e-6)
    assert encoder(x).grid == (6, 4)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm"])
def test_hidden_frames_are_those_of_the_library(name):
    encoder, x = build(name), an_input("audio")
    frames, valid = encoder.frames(x, torch.arange(4000).expand(2, -1) < 3500)
    hidden = torch.zeros_like(valid)
    hidden[:, 40:70] = hidden[0, 100:110] = True
    tokens = encoder.embed(frames, hidden, torch.zeros(encoder.width).double())
    assert encoder.width == encoder.dim
    assert not encoder.subsets
    assert torch.equal(tokens[~hidden], encoder.embed(frames)[~hidden])
    torch.testing.assert_close(encoder.embed(x), encoder.embed(encoder.frames(x)[0]))
    torch.testing.assert_close(encoder.encode(encoder.embed(x)).tokens, encoder(x).tokens)
    # The library hides by an index; a network that may do so has a mask token, which is 0 here.
    net = encoder.backbone.net
    net.masked_spec_embed, net.config.apply_spec_augment = torch.zeros(encoder.width).double(), True
    normal = given_to_the_library(encoder, x)
    theirs = net(normal, mask_time_indices=hidden).last_hidden_state
    embedded = encoder.embed(x, hidden, torch.zeros(encoder.width).double())
    torch.testing.assert_close(encoder.encode(embedded).tokens, theirs)


def test_only_networks_of_waveforms_have_frames():
    with pytest.raises(RecipeError, match="reads spectrograms; take a network of waveforms"):
        build("audio-spectrogram-transformer").frames(an_input("audio"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["wav2vec2", "hubert", "wavlm"])
def test_padding_has_no_influence_on_valid_frames(name):
    encoder, x = build(name), an_input("audio")
    short = encoder(x[:, :3000])
    padded = torch.cat([x[:, :3000], torch.full_like(x[:, :500], 0.7)], dim=1)
    valid = torch.arange(3500).expand(2, -1) < 3000
    long = encoder(padded, valid)
    assert long.valid.sum(1).tolist() == [short.tokens.shape[1]] * 2
    torch.testing.assert_close(long.tokens[:, : short.tokens.shape[1]], short.tokens)
    torch.testing.assert_close(long.pooled, short.pooled)
    alone, deep = encoder.layers(x[:, :3000]), encoder.layers(padded, valid)
    for mine, theirs in zip(deep.values(), alone.values(), strict=True):
        torch.testing.assert_close(mine.pooled, theirs.pooled)
    # The library, told how long each sound is, has the same frames.
    mask = valid.long()
    normal = given_to_the_library(encoder, x[:, :3000])
    theirs = encoder.backbone.net(torch.nn.functional.pad(normal, (0, 500)), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(long.tokens[long.valid], theirs[long.valid])
    assert encoder(padded, torch.zeros_like(valid)).pooled.isfinite().all()


def test_a_spectrogram_transformer_hears_what_its_feature_extractor_makes():
    from transformers import ASTFeatureExtractor

    encoder = build("audio-spectrogram-transformer").float()
    extractor = ASTFeatureExtractor(num_mel_bins=32, max_length=40)
    for samples in (4000, 9000):  # shorter and longer than 40 frames of 10 ms
        x = torch.randn(3, samples, generator=torch.Generator().manual_seed(3)).mul(0.1)
        theirs = extractor([row.numpy() for row in x], sampling_rate=16_000, return_tensors="pt")["input_values"]
        torch.testing.assert_close(encoder.spectrogram(x).mT, theirs, rtol=1e-5, atol=1e-5)
        output = encoder.backbone.net(theirs)
        torch.testing.assert_close(encoder(x).pooled, output.pooler_output, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(encoder(encoder.spectrogram(x)).pooled, encoder(x).pooled)


def test_a_spectrogram_transformer_heeds_no_padding():
    encoder, x = build("audio-spectrogram-transformer"), an_input("audio")
    valid = torch.arange(4000).expand(2, -1) < 2000
    x = torch.where(valid, x, 0.0)
    spectrogram, frames = encoder.spectrogram(x), encoder.valid_frames(valid)
    assert frames.shape == (2, 40)
    assert frames.sum(1).tolist() == [13, 13]  # windows of 400 that start before sample 2000
    features = encoder(x, valid)
    # Patches of 8 frames every 10: those from 0 and 10 hold valid frames.
    assert features.valid.unflatten(1, (3, 4)).all(1).tolist() == [[True, True, False, False]] * 2
    noisy = spectrogram.clone()
    noisy[:, :, 18:] = 9.0
    torch.testing.assert_close(encoder(noisy, frames).pooled, features.pooled)
    assert not torch.allclose(encoder(noisy).pooled, encoder(spectrogram).pooled)


def test_patches_that_overlap_have_no_patch_size():
    assert build("audio-spectrogram-transformer").patch_size is None
    assert build("audio-spectrogram-transformer", frequency_stride=8, time_stride=8).patch_size == (8, 8)
    assert build("videomae").patch_size == (2, 8, 8)


def test_without_layers_a_network_embeds():
    encoder = build("videomae", num_hidden_layers=0).eval()
    x = an_input("video")
    features = encoder(x)
    torch.testing.assert_close(encoder.encode(encoder.embed(x)).tokens, features.tokens)
    assert list(encoder.layers(x)) == ["embeddings"]


def test_networks_of_images_hear_and_see_clips():
    ear = create("transformers/vit", "audio", mels=32, **PATCHES | {"image_size": [32, 24]}).eval()
    assert ear.backbone.channels == 1
    assert ear(an_input("audio").float()).grid == (4, 4)  # 26 frames, filled up to 32
    eye = create("transformers/dinov2", "video", **MODELS["dinov2"][1]).eval()
    assert eye(an_input("video")).grid == (4, 4, 4)
    assert eye.subsets == eye.backbone.native.padding


@pytest.mark.parametrize(
    ("modality", "model", "kwargs", "says"),
    [
        ("video", "transformers/videomae", CLIPS | {"hidden_sizes": 3}, "unknown key 'hidden_sizes'.*'hidden_size'"),
        ("image", "transformers/dinov3x", {}, "no such model type"),
        ("image", "transformers/videomae", CLIPS, "is no network for image; vit"),
        ("image", "transformers/vit", PATCHES | {"trust_remote_code": True}, "'trust_remote_code' is not for an enc"),
        ("image", "transformers/dinov2", {"use_mask_token": True}, "unknown key 'use_mask_token'"),
        ("image", "transformers/vit", PATCHES | {"pretrained": True}, "has no default weights"),
        ("audio", "transformers/wav2vec2", WAVES | {"mels": 32}, "'mels' is for spectrograms"),
        ("audio", "transformers/wav2vec2", WAVES | {"layerdrop": 0.1}, "unknown key 'layerdrop'"),
        ("audio", "transformers/hubert", WAVES | {"num_hidden_layers": "many"}, "cannot be built"),
        ("audio", "transformers/audio-spectrogram-transformer", LAYER | {"n_fft": 512}, "'n_fft' cannot be chosen"),
        ("audio", "timm/test_vit", {"normalize": True}, "'normalize' is for networks of waveforms"),
        ("video", "transformers/timesformer", CLIPS | {"attention_type": "space_only"}, "take transformers/vit"),
        ("video", "transformers/vivit", LAYER | {"temporal": "max"}, "'temporal' is for image networks"),
    ],
)
def test_mistakes_are_one_sentence(modality, model, kwargs, says):
    with pytest.raises(RecipeError, match=says):
        create(model, modality, **kwargs)


def test_sizes_that_a_network_was_not_built_for_are_named():
    with pytest.raises(RecipeError, match="reads clips of 4 frames of 32 x 32 pixels, got 3 of 32 x 32"):
        build("videomae")(an_input("video")[:, :3])
    with pytest.raises(RecipeError, match="needs 20 samples at least, got 19"):
        build("wav2vec2")(an_input("audio")[:, :19])
    with pytest.raises(RecipeError, match="need 400 samples at least, got 399"):
        build("audio-spectrogram-transformer")(an_input("audio")[:, :399], torch.ones(2, 399, dtype=torch.bool))
    with pytest.raises(RecipeError, match="reads waveforms and has no spectrogram"):
        build("hubert").spectrogram(an_input("audio"))


@pytest.mark.long
def test_exports_are_read_back_by_the_library_alone(tmp_path):
    expected = {}
    for name, (modality, _) in MODELS.items():
        encoder = build(name).float()
        x = an_input(modality)
        given = given_to_the_library(encoder, x.float() if modality == "audio" else x).float()
        encoder.export(tmp_path / name)
        expected[name] = (given, encoder.backbone.net(given).last_hidden_state)
        written = json.loads((tmp_path / name / "preprocessing.json").read_text())
        assert written["model"] == f"transformers/{name}"
        again = create(f"transformers/{name}", modality, pretrained=f"local-dir:{tmp_path / name}").eval()
        assert again.spec == encoder.spec
        torch.testing.assert_close(again.backbone.state_dict(), encoder.backbone.state_dict(), rtol=0, atol=0)
    torch.save(expected, tmp_path / "expected.pt")
    program = """
import sys, torch
from pathlib import Path
from transformers import AutoModel
folder = Path(sys.argv[1])
for name, (given, tokens) in torch.load(folder / "expected.pt").items():
    net = AutoModel.from_pretrained(folder / name).eval()
    torch.testing.assert_close(net(given).last_hidden_state, tokens, rtol=1e-5, atol=1e-5)
assert "mmssl" not in sys.modules
print("all")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.stdout == "all\n", done.stderr


def test_pretrained_towers_and_their_constants_are_found(tmp_path):
    torch.manual_seed(0)
    text = LAYER | {"vocab_size": 20, "max_position_embeddings": 8, "num_hidden_layers": 1}
    both = SiglipModel(SiglipConfig(text_config=text, vision_config=PATCHES))
    both.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]})
    )
    encoder = create("transformers/siglip_vision_model", "image", pretrained=f"local-dir:{tmp_path}").eval()
    assert encoder.spec["mean"] == [0.1, 0.2, 0.3]
    assert encoder.spec["std"] == [0.4, 0.5, 0.6]
    torch.testing.assert_close(encoder.backbone.net.state_dict(), both.vision_model.state_dict())
    with pytest.raises(RecipeError, match="is a siglip with"):
        create("transformers/vit", "image", pretrained=f"local-dir:{tmp_path}")


def test_half_precision_weights_are_read_as_single(tmp_path):
    torch.manual_seed(0)
    encoder = create("transformers/vit", "image", **PATCHES)
    encoder.backbone.net.half().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).dtype == torch.float16
    again = create("transformers/vit", "image", pretrained=f"local-dir:{tmp_path}")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}


def test_published_settings_that_hide_frames_or_drop_layers_are_set_aside(tmp_path):
    """SpecAugment and layer dropping would make what a row becomes depend on the other rows of its batch."""
    torch.manual_seed(0)
    still = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    theirs = Wav2Vec2Model(Wav2Vec2Config(**WAVES, **still, mask_time_prob=0.5, mask_time_length=2, layerdrop=0.9))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    encoder = create("transformers/wav2vec2", "audio", pretrained=f"local-dir:{tmp_path}")
    assert encoder.spec["normalize"] is False
    x = an_input("audio").float()
    expected = theirs.eval()(x).last_hidden_state
    torch.testing.assert_close(encoder.train()(x).tokens, expected)
    encoder.export(tmp_path / "again")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "again").train()(x).last_hidden_state, expected)
