"""A recipe that cannot work gives one sentence: file, key, what was expected and the nearest valid name."""

import copy
import re

import pytest
import yaml

from mmssl import recipe as recipes
from mmssl.build import build
from mmssl.errors import MmsslError, RecipeError, counted, nearest

SOUND = {
    "encoders": {"image": {"model": "timm/test_resnet"}},
    "objective": {"name": "rotation"},
    "data": {"source": "toy", "limit": 8, "image": {"size": 32}},
    "training": {"steps": 2, "batch_size": 4},
}
PAIRS = {
    "encoders.text": {
        "model": "transformers/bert",
        "tokenizer": "train:100",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
    },
    "objective": {"name": "contrastive"},
}
CLIPS = {
    "encoders": {
        "video": {"model": "timm/test_resnet"},
        "audio": {"model": "timm/test_resnet", "mels": 32},
    },
    "objective": {"name": "temporal_alignment", "window": 1.0, "min_shift": 0.5},
    "data.video": {"size": 32, "fps": 12.5, "frames": 25},
    "data.audio": {"seconds": 2},
}
VIT = {
    "model": "timm/vit_tiny_patch16_224",
    "img_size": 32,
    "patch_size": 8,
    "depth": 1,
    "embed_dim": 8,
    "num_heads": 1,
}


def changed(changes: dict, base: dict = SOUND) -> dict:
    """`base` with dotted keys set, or dropped where the value is `...`."""
    tree = copy.deepcopy(base)
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if value is ...:
            del node[last]
        else:
            node[last] = value
    return tree


def sentence(error: MmsslError) -> str:
    text = str(error)
    assert "\n" not in text
    assert "Traceback" not in text
    return text


SCHEMA = [
    ({"objektive": {}}, r"unknown key 'objektive' \(did you mean 'objective'\?\)"),
    ({"training.stepz": 3}, r"unknown key 'training.stepz' \(did you mean 'steps'\?\)"),
    ({"training.optimizer": {"learning_rate": 1}}, r"unknown key 'training.optimizer.learning_rate'"),
    ({"data.image": {"sise": 32}}, r"unknown key 'data.image.sise' \(did you mean 'size'\?\)"),
    ({"data": {"a": {"source": "toy", "colums": {}}}}, r"unknown key 'data.a.colums' \(did you mean 'columns'\?\)"),
    ({"training.steps": "many"}, r"training.steps = 'many': .*integer"),
    ({"training.steps": 0}, r"training.steps = 0: .*greater than 0"),
    ({"training.precision": "fp8"}, r"training.precision = 'fp8': .*'bf16'"),
    ({"training.accumulate": 3}, r"batch_size 4 cannot be cut into accumulate = 3"),
    ({"data": {"a": {"source": "toy"}, "b": {"split": "x"}}}, r"missing key 'data.b.source'"),
    ({"data": "toy"}, r"data = 'toy': .*a mapping, such as {key: value}"),
    ({"objective": "rotation"}, r"objective = 'rotation': input should be a mapping, such as {key: value}"),
    (
        {"training.schedule": "linear"},
        r"training.schedule = 'linear': input should be a mapping, such as {key: value}$",
    ),
    ({"training.trackers": "wandb"}, r"training.trackers = 'wandb': input should be a list$"),
    ({"objective": ...}, r"missing key 'objective'"),
    ({"data.source": ...}, r"missing key 'data.source'"),
    ({"objective": {"views": {"area": None}}}, r"objective: needs a name"),
    ({"encoders.image": {}}, r"encoders: 'image' needs a model"),
    ({"encoders": {}}, r"encoders: .*at least 1"),
    ({"data.source": ""}, r"data: source and split are names, and one of them is empty"),
    ({"data.audio": {"seconds": float("inf")}}, r"data.audio.seconds = inf: .*finite"),
    ({"data.audio": {"rate": 0}}, r"data.audio.rate = 0: .*greater than 0"),
    ({"data.video": {"fps": float("nan")}}, r"data.video.fps = nan: .*finite"),
    ({"data.text": {"length": 10**9}}, r"data.text.length = 1000000000: .*less than or equal to 131072"),
    ({"data.text": {"length": 2}}, r"data.text.length = 2: .*greater than or equal to 3"),
    ({"data.image": {"size": 10**20}}, r"data.image.size = 1000.*: .*less than or equal to 8192"),
    ({"data.image": {"extent": [5, 5]}}, r"data.image.extent = \[5, 5\]: .*black first"),
    ({"data.max_bad": 1.5}, r"data.max_bad = 1.5: .*less than or equal to 1"),
    ({"training.optimizer": {"betas": [2, 3]}}, r"training.optimizer.betas.0 = 2: .*less than 1"),
    ({"training.optimizer": {"betas": [0.9, 1.0]}}, r"training.optimizer.betas.1 = 1.0: .*less than 1"),
    ({"training.optimizer": {"eps": -1}}, r"training.optimizer.eps = -1: .*greater than 0"),
    ({"training.optimizer": {"eps": float("nan")}}, r"training.optimizer.eps = nan: .*finite"),
    ({"training.optimizer": {"lr": float("inf")}}, r"training.optimizer.lr = inf: .*finite"),
    ({"training.optimizer": {"nesterov": True}}, r"training.optimizer.*: nesterov is for sgd with momentum"),
    ({"training.seed": 2**70}, r"training.seed = 1180591620717411303424: .*less than"),
    ({"training.seed": -1}, r"training.seed = -1: .*greater than or equal to 0"),
    ({"training.clip": float("inf")}, r"training.clip = inf: .*finite"),
    ({"training.workers": 100_000}, r"training.workers = 100000: 100000 should be 0 to 256, or auto"),
    (
        {"data.audio": {"channel": "up"}},
        r"data.audio.channel = 'up': should be mean, left, right, or a number from 0 to 255",
    ),
    ({"data.audio": {"channel": 300}}, r"data.audio.channel = 300: should be mean, left, right, or a number from 0"),
    ({"training.batch_size": True}, r"training.batch_size = True: should be a number, not true or false"),
    ({"training.optimizer": {"lr": True}}, r"training.optimizer.lr = True: should be a number"),
    ({"training.schedule": {"warmup": 1000}}, r"schedule.warmup is at 1000 of the run's .*training.schedule.warmup"),
    ({"training.epochs": 0}, r"training.epochs = 0: .*greater than 0"),
    ({"training.schedule": {"name": "multistep"}}, r"milestones are for the schedule multistep, which needs some"),
    ({"training.schedule": {"milestones": [1]}}, r"milestones are for the schedule multistep"),
    ({"training.schedule": {"name": "multistep", "milestones": [2, 1]}}, r"milestones \[2.0, 1.0\] should ascend"),
    ({"training.schedule": {"name": "inverse_sqrt"}}, r"inverse_sqrt falls from the end of the warm-up, which is 0"),
]


@pytest.mark.parametrize(("changes", "says"), SCHEMA, ids=[says for _, says in SCHEMA])
def test_the_recipes_own_keys(tmp_path, changes, says):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(changed(changes)))
    with pytest.raises(RecipeError) as error:
        recipes.load(path)
    text = sentence(error.value)
    assert text.startswith(str(path))
    assert re.search(says, text), text


COMPONENTS = [
    (
        {"objective": {"name": "rotaton"}},
        r"objective: .* named 'rotaton' \(did you mean 'rotation'\?\)",
    ),
    ({"objective.viewz": {}}, r"objective: .*unknown key 'viewz' \(did you mean 'views'\?\)"),
    ({"objective.views": {"flop": 1}}, r"objective: views: unknown key 'flop' \(did you mean 'flip'\?\)"),
    ({"objective.views": {"flip": "often"}}, r"objective: views: flip = 'often' should be float"),
    ({"encoders.image.model": "tim/resnet18"}, r"encoders.image: .*did you mean 'timm'"),
    ({"encoders.image.model": "timm/resnet81"}, r"encoders.image: .*did you mean 'resnet"),
    (
        {"encoders.image": {"model": "timm/test_resnet", "pretrained": "./nowhere.pt"}},
        r"encoders.image: timm/test_resnet: pretrained: there is no file './nowhere.pt'",
    ),
    (
        {"encoders.image": {"model": "torchvision/resnet18", "pretrained": "a/b"}},
        r"encoders.image: torchvision/resnet18: pretrained: there is no file 'a/b'",
    ),
    ({"encoders.image.model": "resnet18"}, r"encoders.image: .*timm"),
    ({"encoders": {"picture": {"model": "timm/test_resnet"}}}, r"encoders.picture: .*'picture'.*image"),
    ({"encoders": {"images": {"model": "timm/test_resnet", "modality": "image"}}}, r"an encoder named 'image'.*images"),
    ({"encoders.image": VIT | {"patch_size": 7}}, r"encoders.image: .*7"),
    ({"encoders.image": VIT | {"patch_sise": 8}}, r"encoders.image: .*patch_sise"),
    ({"encoders.image": VIT, "data.image": {"size": 30}}, r"rotation cannot run on image \(2, 3, 30, 30\)|30"),
    ({"data.columns": {"image": "img"}}, r"'img'.*image"),
    ({"data.split": "trian"}, r"'trian' \(did you mean 'train'\?\)"),
    ({"data.source": "no/such/folder/anywhere"}, r"no/such/folder/anywhere: there is no such file or folder"),
    (PAIRS | {"training.batch_size": 1}, r"training.batch_size = 1: contrastive compares the rows of a batch"),
    (PAIRS | {"objective": {"name": "contrastive", "b": "image"}}, r"contrastive compares two encoders"),
    (PAIRS | {"objective": {"name": "contrastive", "form": "clop"}}, r"form = 'clop' should be .*'clip'"),
    (PAIRS | {"objective": {"name": "masked_language", "encoder": "image"}}, r"masked_language reads text"),
    (PAIRS | {"encoders.text": {"model": "transformers/bert"}}, r"encoders.text: .*missing key 'tokenizer'"),
    (CLIPS | {"objective": {"name": "temporal_alignment"}}, r"window 4.2 s and min_shift 2.17 s .*have 25 \(2 s\)"),
    (CLIPS | {"data.audio": {"seconds": 1.99}}, r"whole number of samples for each frame|data.audio.seconds"),
    (
        {"objective": {"name": "combine", "tasks": {"turn": {"name": "rotation", "data": "pictures"}}}},
        r"source 'pictures', and data has one source without a name",
    ),
    (
        {"objective": {"name": "combine", "tasks": {"turn": {"name": "rotation", "flop": 1}}}},
        r"objective: tasks.turn: .*unknown key 'flop'",
    ),
]


@pytest.mark.parametrize(("changes", "says"), COMPONENTS, ids=[says for _, says in COMPONENTS])
def test_components_and_data_before_any_training(monkeypatch, tmp_path, changes, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MmsslError) as error:
        build(recipes.load(changed(changes)), where="mine.yaml")
    text = sentence(error.value)
    assert re.search(says, text), text
    assert isinstance(error.value, RecipeError) <= text.startswith("mine.yaml: "), text


def test_the_sound_recipes_of_this_file_do_build():
    for changes in ({}, PAIRS, CLIPS, {"encoders.image": VIT}):
        objective, loader = build(recipes.load(changed(changes)))
        assert objective.needs
        assert next(loader.batches(0, 1))["id"].shape == (4,)


def test_a_recipe_that_is_no_mapping_or_no_file(tmp_path):
    path = tmp_path / "list.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(RecipeError, match="a recipe is a mapping"):
        recipes.load(path)
    path.write_text("a: [1,\nb: 2")
    with pytest.raises(RecipeError, match="not valid YAML") as error:
        recipes.load(path)
    sentence(error.value)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        recipes.load(path)
    with pytest.raises(RecipeError, match="there is no such recipe"):
        recipes.load(tmp_path / "none.yaml")


def test_overrides_are_yaml_and_reach_any_depth():
    loaded = recipes.load(SOUND, {"training.optimizer.lr": "3e-4", "data.columns": "{image: picture}", "probe": "null"})
    assert loaded.training.optimizer.lr == 3e-4
    assert loaded.sources()[""].columns == {"image": "picture"}
    assert loaded.probe is None
    several = SOUND | {"probes": [{"label": "shape"}]}
    assert recipes.load(several, {"probes": "null"}).every_probe() == ()
    assert "probe" not in SOUND
    with pytest.raises(RecipeError, match="'steps' is not a section"):
        recipes.load(SOUND, {"training.steps.more": 1})


def test_a_dumped_recipe_loads_as_an_equal_one():
    loaded = recipes.load(changed(PAIRS | {"probe": {"label": "shape", "every": 5}}))
    assert recipes.load(yaml.safe_load(loaded.dump())) == loaded
    several = recipes.load(changed({"data": {"a": {"source": "toy"}, "b": {"source": "folder"}}}))
    assert list(several.sources()) == ["a", "b"]
    assert recipes.load(yaml.safe_load(several.dump())) == several


def test_nearest_names_the_closest_or_all():
    assert nearest("stepz", ["steps", "batch_size"]) == " (did you mean 'steps'?)"
    assert nearest("qqq", ["b", "a"]) == " (known: a, b)"
    assert nearest("qqq", []) == ""


def test_one_thing_is_counted_in_the_singular():
    assert [counted(number, "row") for number in (0, 1, 1234)] == ["0 rows", "1 row", "1,234 rows"]
    assert [counted(number, "file is", "files are") for number in (1, 2)] == ["1 file is", "2 files are"]


def test_passwords_in_addresses_are_told_to_nobody():
    assert str(MmsslError("https://me:s%40x@host/a@b.tar: a@b")) == "https://host/a@b.tar: a@b"
