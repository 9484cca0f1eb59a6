"""Files, pictures, arrays and texts as an encoder takes them: what the loader makes of the same rows."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

import mmssl
from mmssl.data.columns import Decoder
from mmssl.errors import DataError, RecipeError
from mmssl.media.clip import write_clip
from mmssl.media.text import Tokenizer
from mmssl.recipe import Data

VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def image_encoder():
    return mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **VIT).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    generator = np.random.default_rng(0)
    for name, extent in {"a.png": (40, 60, 3), "b.png": (64, 30, 3)}.items():
        Image.fromarray(generator.integers(0, 256, extent, dtype=np.uint8)).save(folder / name)
    frames = generator.integers(0, 256, (40, 48, 48, 3), dtype=np.uint8)
    sound = generator.uniform(-0.5, 0.5, 32_000).astype(np.float32)
    write_clip(folder / "clip.mp4", frames, 20.0, sound, 16_000)
    return folder


def test_every_form_of_a_picture_is_the_same_picture(image_encoder, files):
    path = files / "a.png"
    picture = Image.open(path)
    forms = [path, str(path), path.read_bytes(), picture, np.asarray(picture)]
    each = [image_encoder.read(form).x for form in forms]
    assert each[0].shape == (1, 3, 32, 32)
    assert each[0].dtype == torch.uint8
    assert all(torch.equal(one, each[0]) for one in each)
    assert torch.equal(image_encoder.read(forms).x, torch.cat(each))


def test_what_was_read_goes_through_the_encoder(image_encoder, files):
    read = image_encoder.read([files / "a.png", files / "b.png"])
    expected = Decoder(Data(source="x", image={"size": 32}), ["image"])({"image": str(files / "b.png")}, 0.5)
    assert torch.equal(read.x[1], expected["image"])
    assert torch.equal(image_encoder(read).pooled, image_encoder(read.x).pooled)
    assert image_encoder.layers(*read)["blocks.0"].pooled.shape == (2, 16)


def test_settings_and_what_a_network_was_built_for(image_encoder, files):
    assert image_encoder.read(files / "a.png", size=48, fit="pad").x.shape == (1, 3, 48, 48)
    tall = mmssl.encoder("torchvision/resnet18", modality="image").read(files / "a.png")
    assert tall.x.shape == (1, 3, 224, 224)
    with pytest.raises(RecipeError, match=r"unknown key 'sice' \(did you mean 'size'"):
        image_encoder.read(files / "a.png", sice=48)
    with pytest.raises(RecipeError, match="size"):
        image_encoder.read(files / "a.png", size=-1)


@pytest.mark.parametrize("thing", [Image.new("RGB", (8, 8)), [Image.new("RGB", (8, 8))], "a.png", np.zeros((8, 8, 3))])
def test_what_is_no_tensor_is_sent_to_read(image_encoder, thing):
    with pytest.raises(DataError, match=rf"{type(thing).__name__} is none: encoder\(encoder.read\(things\)\)"):
        image_encoder(thing)


def test_tuples_and_generators_are_read_like_lists(image_encoder, files):
    paths = [files / "a.png", files / "b.png"]
    expected = image_encoder.read(paths).x
    assert torch.equal(image_encoder.read(tuple(paths)).x, expected)
    assert torch.equal(image_encoder.read(path for path in paths).x, expected)


@pytest.mark.parametrize("shape", [(40, 48, 3), (3, 32, 32), (2, 32, 32, 3), ()])
def test_a_tensor_of_another_shape_is_told_the_shape_and_the_way(image_encoder, shape):
    for call in (image_encoder, image_encoder.layers, image_encoder.embed):
        with pytest.raises(DataError, match=r"takes tensors \(B, 3, H, W\), and this one is .*encoder.read\(things\)"):
            call(torch.zeros(shape, dtype=torch.uint8))


def test_other_modalities_name_their_shapes():
    sounds = mmssl.encoder("timm/test_resnet", modality="audio", rate=8_000)
    with pytest.raises(DataError, match=r"takes tensors \(B, S\) or \(B, M, T\), and this one is \(8000,\)"):
        sounds(torch.zeros(8_000))
    with pytest.raises(DataError, match=r"takes tensors \(B, T, 3, H, W\), and this one is \(8, 3, 32, 32\)"):
        mmssl.encoder("timm/test_resnet", modality="video")(torch.zeros(8, 3, 32, 32))


def test_a_thing_that_cannot_be_read_is_named(image_encoder, files):
    with pytest.raises(DataError, match=r"number 1: there is no image file '.*none.png'"):
        image_encoder.read([files / "a.png", files / "none.png"])
    with pytest.raises(DataError, match="nothing to read"):
        image_encoder.read([])
    with pytest.raises(DataError, match="cannot read image from int"):
        image_encoder.read(3)
    for tensors in (torch.zeros(3, 8, 8), [torch.zeros(3, 8, 8)]):
        with pytest.raises(DataError, match=r"tensors go to the encoder itself, encoder\(x\), as \(B, 3, H, W\)"):
            image_encoder.read(tensors)


def test_texts():
    tokenizer = Tokenizer.train(["a red circle on a table", "two small blue squares"] * 3, 100)
    bert = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    encoder = mmssl.encoder(
        "transformers/bert", modality="text", tokenizer=tokenizer, max_position_embeddings=24, **bert
    ).eval()
    read = encoder.read(["a red circle", "two"])
    assert read.x.shape == read.valid.shape == (2, 24)  # as many as it takes
    ids, mask = tokenizer("two", 24)
    assert torch.equal(read.x[1], ids)
    assert torch.equal(read.valid[1], mask)
    short = encoder.read("two", length=8)
    assert short.x.shape == (1, 8)
    torch.testing.assert_close(encoder(short).pooled, encoder(read).pooled[1:], atol=1e-5, rtol=1e-5)
    with pytest.raises(DataError, match="number 1: int is no text"):
        encoder.read(["two", 2])


def test_sounds(files):
    encoder = mmssl.encoder("timm/test_resnet", modality="audio", rate=8_000).eval()
    wave = np.sin(np.arange(8_000) / 9).astype(np.float32) / 2
    read = encoder.read([(wave, 8_000), {"array": wave, "sampling_rate": 8_000}, files / "clip.mp4"], seconds=1.5)
    assert read.x.shape == read.valid.shape == (3, 12_000)
    assert torch.equal(read.x[0], read.x[1])
    assert torch.equal(read.x[0, :8_000], torch.from_numpy(wave))
    assert read.valid.sum(1).tolist() == [8_000, 8_000, 12_000]
    assert encoder(read).pooled.isfinite().all()
    with pytest.raises(RecipeError, match="8000 samples a second"):
        encoder.read((wave, 8_000), rate=16_000)
    with pytest.raises(DataError, match="needs its sample rate"):
        encoder.read(wave)


def test_clips(files):
    encoder = mmssl.encoder("timm/test_resnet", modality="video").eval()
    read = encoder.read(str(files / "clip.mp4"), size=40, frames=8, fps=10)
    assert read.x.shape == (1, 8, 3, 40, 40)
    data = Data(source="x", video={"size": 40, "frames": 8, "fps": 10})
    assert torch.equal(read.x[0], Decoder(data, ["video"])({"video": str(files / "clip.mp4")}, 0.5)["video"])
    assert encoder(read).pooled.shape[0] == 1


def test_an_encoder_of_a_run_reads_as_the_run_does():
    from mmssl.build import build_objective
    from mmssl.recipe import load

    recipe = load(
        {
            "encoders": {"image": {"model": "timm/test_resnet"}},
            "objective": {"name": "byol"},
            "data": {"source": "toy", "image": {"size": 40, "fit": "pad"}},
            "training": {"steps": 1, "batch_size": 4},
        }
    )
    encoder = build_objective(recipe, {}, where="recipe").exported["image"]
    held = io.BytesIO()
    Image.new("RGB", (20, 10)).save(held, "PNG")
    x = encoder.read(held.getvalue()).x
    assert x.shape == (1, 3, 40, 40)
    assert (x[..., 0, :] == 255).all()  # the white that `pad` adds


def test_a_fusion_reads_no_files():
    fusion = mmssl.encoder(
        "transformers/bert",
        modality="fusion",
        reads={"image": 8, "text": 8},
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    with pytest.raises(TypeError, match="reads no files"):
        fusion.read("a.png")
