"""Trainings of a call that is killed end in the same bits, and fine-tuning on several processes in the same numbers."""

import json
import os
import random
import socket
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import mmssl
from mmssl.adaptation.probes import _trained, make_probe
from mmssl.adaptation.probes._unfinished import Unfinished
from mmssl.adaptation.probes.finetune import Finetune
from mmssl.adaptation.targets.values import Values
from mmssl.errors import Interrupted, RecipeError, RunError
from mmssl.hub import load_classifier
from mmssl.recipe import Data
from mmssl.training import checkpoint

TOY = Data(source="toy", image={"size": 16}, limit=40)
QUICK = {"seed": 3, "seeds": 1, "batch_rows": 8, "steps": 4}
CLASSES = {"label": "color", "probe": "finetune", "decay": (1.0,)}
OPTIONS = {
    "plain": {"lr": (1e-3, 3e-3), "mixup": 0.4, "head_steps": 2},
    "stopped early": {"lr": (1e-3,), "early_stop": 3, "lora": 1, "cutmix": 1.0, "baseline": False},
}
PLACES = {
    "pixels, frozen": {"probe": "segmentation", "lr": (1e-3, 1e-2), "layers": True, "seeds": 2, "shots": 8},
    "pixels, tuned": {
        "probe": "segmentation",
        "lr": (1e-3,),
        "tune": True,
        "decay": (1.0,),
        "head": "conv",
        "width": 8,
    },
    "boxes, frozen": {"probe": "detection", "lr": (1e-3, 1e-2), "width": 64, "baseline": False},
    "boxes, tuned": {"probe": "detection", "tune": True, "decay": (1.0,), "width": 64, "seeds": 2},
}


def tune(folder, name="plain", train=TOY, **others):
    """A small vision transformer with random weights; what was trained on it is saved."""
    options = PLACES[name] if name in PLACES else CLASSES | OPTIONS[name]
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **size)
    return mmssl.adapt(encoder, train, save=folder, **QUICK | options | others)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIONS | PLACES)
def test_what_was_killed_ends_in_the_same_bits(name, tmp_path, monkeypatch):
    table = tune(tmp_path / "whole", name)
    save, saves = checkpoint.save, []

    def counted(directory, module, optimizer, state, main):
        save(directory, module, optimizer, state, main)
        saves.append((directory, state["step"]))
        if len(saves) in (1, 3, 15):
            raise Killed

    monkeypatch.setattr(checkpoint, "save", counted)
    monkeypatch.setattr(_trained, "APART", 1)
    kills = 0
    while True:
        try:
            again = tune(tmp_path / "killed", name)
            break
        except Killed:
            kills += 1
            assert (tmp_path / ".killed.unfinished").is_dir()
    assert kills > 1
    assert len(set(saves)) == len(saves)  # nothing is done twice, be it of a training that ended
    assert again == table
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert found[0] == found[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


@pytest.mark.long
def test_few_steps_are_saved_once_at_their_end(tmp_path, monkeypatch):
    save, steps = checkpoint.save, []

    def counted(directory, module, optimizer, state, main):
        steps.append(state["step"])
        save(directory, module, optimizer, state, main)

    monkeypatch.setattr(checkpoint, "save", counted)
    tune(tmp_path / "few", baseline=False, lr=(1e-3,), head_steps=0)
    assert set(steps) == {4}


@pytest.mark.long
def test_another_call_goes_on_with_nothing_of_this_one(tmp_path, monkeypatch):
    places = []
    place = Unfinished.place
    monkeypatch.setattr(Unfinished, "place", lambda self, *depends: places.append(depends) or place(self, *depends))
    for number, others in enumerate([{}, {"steps": 5}, {"seed": 1}, {"label": "shape"}, {"weight_decay": 0.1}]):
        tune(tmp_path / str(number), baseline=False, **others)
    assert len(places) == 5 * 3  # two candidates, and all rows
    assert len(set(places)) == len(places)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *PLACES])
def test_a_process_killed_at_random_moments_ends_in_the_same_bits(name, tmp_path, forkserver):
    dice = random.Random(name)
    began = time.monotonic()
    tune(tmp_path / "whole", name)
    seconds, kills = time.monotonic() - began, 0
    while not (tmp_path / "killed").exists():
        process = forkserver.Process(target=_tune_often_saved, args=(tmp_path / "killed", name))
        process.start()
        process.join(dice.uniform(0.2, 1.2) * seconds if kills < 8 else None)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    tables = [json.loads((tmp_path / name / "classifier.json").read_text()) for name in ("whole", "killed")]
    assert found[0] == found[1]
    assert tables[0] == tables[1]


def _tune_often_saved(folder, name):
    torch.set_num_threads(1)
    _trained.APART = 1
    tune(folder, name)


def _scenes(number: int) -> datasets.Dataset:
    """Twelve pictures with a bright square each, whose masks and boxes depend on `number`."""
    rows = []
    for row in range(12):
        pixels, mask = np.full((16, 16, 3), 10 * row, np.uint8), np.zeros((16, 16), np.uint8)
        mask[4 : 8 + number, 4:12] = 1
        pixels[4:12, 4:12] = 255
        labels = {"mask": Image.fromarray(mask), "boxes": [[4, 4, 12, 8 + number]], "classes": [row % 2]}
        rows.append({"image": Image.fromarray(pixels), **labels})
    return datasets.Dataset.from_list(rows)


@pytest.mark.long
@pytest.mark.parametrize("probe", ["segmentation", "detection"])
def test_masks_and_boxes_that_changed_are_learned_anew(probe, tmp_path, monkeypatch):
    places, network = [], "pixels, tuned" if probe == "segmentation" else "boxes, tuned"
    place = Unfinished.place
    monkeypatch.setattr(Unfinished, "place", lambda self, *depends: places.append(depends) or place(self, *depends))
    test, quick = _scenes(0), {"data": Data(source="toy", image={"size": 16}), "seeds": 1, "baseline": False}
    for number, rows in enumerate([_scenes(0), _scenes(0), _scenes(1)]):
        tune(tmp_path / str(number), network, train=rows, test=test, steps=1, **quick)
    assert places[0] == places[1] != places[2]


def test_two_calls_do_not_save_at_one_place(tmp_path, monkeypatch):
    def asked_twice(*_):
        with pytest.raises(RunError, match=r"process \d+ on .* has been writing there since .*or save elsewhere"):
            tune(tmp_path / "same")
        raise RunError("as far as it goes")

    monkeypatch.setattr(Finetune, "score", asked_twice)
    with pytest.raises(RunError, match="as far as it goes"):
        tune(tmp_path / "same")
    assert not list(tmp_path.iterdir())


def test_two_calls_do_not_make_one_training_at_once(tmp_path):
    learner, outcome = make_probe("segmentation", {}), torch.ones(3)
    network = _trained.HeadTask(nn.Linear(2, 2), ["image"], Values(), (torch.zeros(1), torch.ones(1)))

    def finish(train):
        place = Unfinished(tmp_path / "unfinished").place("the same")
        return learner.finish(place, train, lambda: network, lambda _: outcome, last=False)[1]

    def asked_twice():
        with pytest.raises(RunError, match=r"process \d+ on .* has been writing there .* adapt a copy of the run"):
            finish(lambda: network)
        raise RunError("as far as it goes")

    with pytest.raises(RunError, match="as far as it goes"):
        finish(asked_twice)
    assert not list((tmp_path / "unfinished").iterdir())
    assert finish(lambda: network).equal(outcome)
    assert finish(asked_twice).equal(outcome)  # it has ended


@pytest.mark.parametrize("name", ["plain", "pixels, tuned"])
def test_an_interrupt_says_how_to_go_on(name, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise Interrupted("stopped at step 1 of 4; go on with --resume")

    monkeypatch.setattr(_trained, "fit", interrupted)
    with pytest.raises(Interrupted, match="the same call, made again, goes on from the last checkpoint"):
        tune(tmp_path / "it", name)
    with pytest.raises(Interrupted, match="the same call, made again, begins anew"):
        tune(None, name)  # of an encoder in memory nothing is kept
    assert not list(tmp_path.iterdir())


def _process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with pytest.raises(RecipeError, match="9 rows of a step cannot be divided among 2 processes; set batch_rows"):
        tune(f"{folder}/odd", batch_rows=9)
    for name in OPTIONS:
        table = tune(f"{folder}/{name}", name, shots=2)
        with open(f"{folder}/{name} {rank}.json", "w") as file:
            json.dump(table.to_json(), file)


@pytest.mark.long
def test_two_processes_give_the_numbers_of_one(tmp_path, processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes(_process, (port, str(tmp_path)), 2)
    for name in OPTIONS:
        table = tune(tmp_path / "alone" / name, name, shots=2).to_json()
        for rank in range(2):
            assert json.loads((tmp_path / f"{name} {rank}.json").read_text()) == json.loads(json.dumps(table))
        pictures = {"image": torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)}
        answers = [load_classifier(place / name).answer(pictures) for place in (tmp_path, tmp_path / "alone")]
        torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-5)
        weights = [load_file(place / name / "model.safetensors") for place in (tmp_path, tmp_path / "alone")]
        torch.testing.assert_close(weights[0]["head.weight"], weights[1]["head.weight"], atol=1e-5, rtol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["alone", *OPTIONS]
