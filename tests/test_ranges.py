"""Numbers of a recipe are held to their ranges when it is read, and the error says which one."""

from __future__ import annotations

import datetime
import math
import re
from typing import Any, get_args, get_type_hints

import pytest

from mmssl import recipe as recipes
from mmssl.errors import RecipeError
from mmssl.modules.views import AudioView, Crop, ImageView
from mmssl.ranges import describe
from mmssl.registry import check_keywords, components, find, keywords

FREE = {"bias", "mean"}  # of contrastive pairs' logits, and of a spectrogram: any number

TASKS = [pytest.param(find("objective", name), id=name) for name in components("objective")]
OTHERS = [
    *(pytest.param(find("encoder", name), id=name) for name in ("audio", "text")),
    *(pytest.param(kind, id=kind.__name__) for kind in (Crop, ImageView, AudioView)),
]


def numbers(component: type) -> dict[str, tuple[Any, set]]:
    """Name -> annotation and the types in it, of the hyper-parameters that are one number or several."""
    plain, hints = (get_type_hints(component.__init__, include_extras=extras) for extras in (False, True))
    found = {}
    for name in keywords(component):
        kinds = {plain[name], *get_args(plain[name])}
        kinds |= {inner for kind in kinds for inner in get_args(kind)}
        if kinds & {int, float} and dict not in {getattr(kind, "__origin__", None) for kind in kinds}:
            found[name] = hints[name], kinds
    return found


@pytest.mark.parametrize("component", TASKS + OTHERS)
def test_every_number_has_a_range(component):
    for name, (hint, _) in numbers(component).items():
        assert name in FREE or describe(hint), f"{component.__name__}: {name}"


@pytest.mark.parametrize("component", TASKS + OTHERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, True])
def test_no_number_is_infinite_or_none_at_all_or_a_truth(component, value):
    for name, (hint, kinds) in numbers(component).items():
        if bool in kinds or any(getattr(kind, "__origin__", None) is tuple for kind in kinds):
            continue
        with pytest.raises(RecipeError, match=f"{name} = {value} should be .*{re.escape(describe(hint))}"):
            check_keywords(component, {name: value}, "objective")


@pytest.mark.parametrize(
    ("task", "given", "message"),
    [
        ("simclr", {"temperature": -1}, "temperature = -1 should be float from 0.001 to 100"),
        ("simclr", {"temperature": 1e-30}, "temperature = 1e-30 should be float from 0.001 to 100"),
        ("moco", {"temperature": 0}, "from 0.001 to 100"),
        ("moco", {"width": 0}, "width = 0 should be int [|] None from 1 to 1048576"),
        ("moco", {"groups": 0}, "groups = 0 should be int from 1"),
        ("contrastive", {"width": 0}, "width = 0 should be int [|] None from 1 to 1048576"),
        ("byol", {"momentum": 2}, "momentum = 2 should be float from 0 to 1"),
        ("dino", {"local_crops": -1}, "local_crops = -1 should be int from 0"),
        ("dino", {"teacher_temperature": [0, 0.04]}, "teacher_temperature .* from 0.001 to 100"),
        ("jigsaw", {"orders": 10**20}, "orders = 100000000000000000000 should be int from 1"),
        ("masked_autoencoder", {"mask_ratio": 1}, "mask_ratio = 1 should be .* above 0 to below 1"),
        ("vicreg", {"variance": -25}, "variance = -25 should be float from 0"),
        ("temporal_alignment", {"window": 0}, r"window = 0 should be float \| None above 0 to 3600"),
    ],
)
def test_what_makes_no_sense_is_refused(task, given, message):
    with pytest.raises(RecipeError, match=f"objective: .*{message}"):
        check_keywords(find("objective", task), given, "objective")


def test_one_value_is_a_list_of_one():
    finetune = find("probe", "finetune")
    assert check_keywords(finetune, {"lr": "1e-3"}, "probe") == check_keywords(finetune, {"lr": [1e-3]}, "probe")
    with pytest.raises(RecipeError, match=r"lr = .* should be .* above 0"):
        check_keywords(finetune, {"lr": 0}, "probe")
    with pytest.raises(RecipeError, match=r"lr = .*True"):
        check_keywords(finetune, {"lr": True}, "probe")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"flip": 3}, "flip = 3 should be .*from 0 to 1"),
        ({"size": 0}, "size = 0 should be .*from 1 to 8192"),
        ({"size": 10**20}, "size = 1000.* should be .*from 1 to 8192"),
        ({"area": [0, 1]}, "area .*above 0 to 1"),
    ],
)
def test_crops_that_make_no_sense_are_refused(given, message):
    with pytest.raises(RecipeError, match=f"views: {message}"):
        Crop.of({}, given)


@pytest.mark.parametrize("given", [{"blur": math.nan}, {"flip": 3}, {"strength": -1}, {"size": 0}, {"area": [0.5, 2]}])
def test_views_that_make_no_sense_are_refused(given):
    with pytest.raises(RecipeError, match=f"views: {next(iter(given))} = .* should be .*(from|above) 0 to"):
        check_keywords(ImageView, given, "views")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.optimizer.betas": [0.9, False]}, "training.optimizer.betas = [0.9, False]: should be a number"),
        ({"license": b"MIT"}, "license = b'MIT': should be a text"),
        ({"license": datetime.date(2020, 1, 1)}, "license = datetime.date(2020, 1, 1): should be a text"),
        ({"license": r'"\ud800"'}, r"license = '\ud800': holds characters that no text has"),
        ({"data.source": r'"a\0b"'}, r"data.source = 'a\x00b': holds characters that no text has"),
        ({"data.columns": {1: "image"}}, "data.columns: the key 1 should be a name"),
        ({"encoders.image.drop_rate": math.nan}, "encoders.image.drop_rate = nan: should be a finite number"),
        ({"encoders.image.mean": [0.5, math.inf]}, "encoders.image.mean = inf: should be a finite number"),
        ({"objective.views": {"blur": -math.inf}}, "objective.views.blur = -inf: should be a finite number"),
        ({"encoders.image.img_size": -(10**20)}, "image.img_size = -100000000000000000000 is more than any network"),
        ({"encoders.image.depths": [2, 10**7]}, "image.depths = 10000000 is more than any network has; at most 10,000"),
        ({"encoders.image.text_cfg": {"vocab_size": 10**12}}, "image.text_cfg.vocab_size = 1000000000000 is more"),
        ({"encoders.image.modality": "x~"}, "'image': modality = 'x~' is none (known: audio,"),
        ({"encoders.image.modality": ["x"]}, "'image': modality = ['x'] is none"),
    ],
)
def test_what_no_component_reads_is_refused_by_file_and_key(changes, message):
    tree = {"encoders": {"image": {"model": "timm/test_resnet"}}, "objective": {"name": "rotation"}}
    with pytest.raises(RecipeError, match=re.escape(message)) as error:
        recipes.load(tree | {"data": {"source": "toy"}}, changes)
    assert str(error.value).startswith("recipe: ")


def test_an_endless_value_is_cut_out_of_the_middle_of_a_sentence():
    said = str(RecipeError("recipe: objective: width = " + "0, " * 5000 + "should be one number\n\nor two"))
    assert len(said) <= 600
    assert said.startswith("recipe: objective: width = 0, 0,")
    assert said.endswith("0, should be one number or two")
