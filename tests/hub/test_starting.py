"""A run that starts from the weights of another: the same network and tokenizer, and one that loads alone."""

import shutil

import pytest
import torch
from small_runs import BERT, PAIRS, VIT, make_run

import mmssl
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.media.text import Tokenizer
from mmssl.recipe import load

SMALL = {"steps": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("first") / "run", PAIRS)


def recipe(objective: str, name: str, **arguments):
    data = {"source": "toy", "limit": 16, "image": {"size": 32}, "text": {"length": 16}}
    tree = {"encoders": {name: arguments}, "objective": {"name": objective}, "data": data, "training": SMALL}
    return load(tree)


def test_an_image_encoder_starts_from_a_run(first):
    # The architecture may be left out: it is that of the run.
    for given in ({}, VIT):
        asked = recipe("rotation", "image", **{"model": VIT["model"], **given}, pretrained=str(first.directory))
        objective, _ = build(asked)
        mine, theirs = objective.exported["image"], first.encoders["image"]
        assert mine.spec == theirs.spec
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in mine.state_dict().items())
        assert mine.origin["started_from"] == first.directory.name


def test_another_name_and_frozen(first):
    asked = recipe(
        "rotation", "seen", model=VIT["model"], modality="image", pretrained=str(first.directory), frozen=True
    )
    asked = load(asked.model_dump(exclude_none=True), {"objective.encoder": "seen"})
    encoder = build(asked)[0].exported["seen"]
    assert encoder.frozen
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(encoder.backbone.net.pos_embed, first.encoders["image"].backbone.net.pos_embed)


@pytest.mark.long
def test_a_text_encoder_takes_the_tokenizer_along(first, tmp_path):
    bert = {key: value for key, value in BERT.items() if key != "tokenizer"}
    copied = shutil.copytree(first.directory, tmp_path / "first")
    asked = recipe("masked_language", "text", **bert, pretrained=str(copied))
    run = mmssl.run(asked, out=tmp_path / "second", quiet=True)
    assert run.encoders["text"].tokenizer == first.encoders["text"].tokenizer
    shutil.rmtree(copied)
    again = mmssl.load(tmp_path / "second")  # needs nothing of the first
    assert again.encoders["text"].tokenizer == first.encoders["text"].tokenizer
    assert torch.equal(again.encoders["text"].token_embedding, run.encoders["text"].token_embedding)


def test_another_tokenizer_is_refused(first, tmp_path):
    Tokenizer.train(["other words altogether"] * 3, 80).save(tmp_path / "words")
    given = {**BERT, "tokenizer": str(tmp_path / "words"), "pretrained": str(first.directory)}
    with pytest.raises(RecipeError, match=r"tokenizer = .*words is not that of the run"):
        build(recipe("masked_language", "text", **given))
    same = {**given, "tokenizer": str(first.directory / "tokenizers" / "text")}
    assert (
        build(recipe("masked_language", "text", **same))[0].exported["text"].tokenizer
        == first.encoders["text"].tokenizer
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model": "timm/test_resnet"}, "has a timm/vit_tiny_patch16_224 of image, and this is a timm/test_resnet"),
        ({"model": VIT["model"], "depth": 2}, "holds another network: backbone"),
        ({"model": VIT["model"], "embed_dim": 32}, "holds another network: backbone"),
    ],
)
def test_other_networks_are_refused(first, arguments, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build(recipe("rotation", "image", **arguments, pretrained=str(first.directory)))


def test_a_run_without_such_an_encoder_is_said(first):
    asked = recipe("masked_autoencoder", "video", model=VIT["model"], pretrained=str(first.directory))
    with pytest.raises(RecipeError, match="has no encoder 'video'"):
        build(asked)
