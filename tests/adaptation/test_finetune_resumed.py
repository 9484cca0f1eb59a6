"""Fine-tuning that is killed ends in the same bits, and on several processes in the same numbers."""

import json
import os
import socket

import pytest
import torch
from safetensors.torch import load_file

import mmssl
from mmssl.adaptation.probes import _trained
from mmssl.adaptation.probes._unfinished import Unfinished
from mmssl.adaptation.probes.finetune import Finetune
from mmssl.errors import Interrupted, RecipeError, RunError
from mmssl.hub import load_classifier
from mmssl.recipe import Data
from mmssl.training import checkpoint

TOY = Data(source="toy", image={"size": 16}, limit=40)
QUICK = {"label": "color", "probe": "finetune", "seed": 3, "seeds": 1, "batch_rows": 8, "steps": 4, "decay": (1.0,)}
OPTIONS = {
    "plain": {"lr": (1e-3, 3e-3), "mixup": 0.4, "head_steps": 2},
    "stopped early": {"lr": (1e-3,), "early_stop": 3, "lora": 1, "cutmix": 1.0, "baseline": False},
}


def tune(folder, name="plain", **others):
    """A small vision transformer with random weights, tuned and saved."""
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    encoder = mmssl.encoder("timm/vit_tiny_patch16_224", modality="image", **size)
    return mmssl.adapt(encoder, TOY, save=folder, **{**QUICK, **OPTIONS[name], **others})


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIONS)
def test_what_was_killed_ends_in_the_same_bits(name, tmp_path, monkeypatch):
    table = tune(tmp_path / "whole", name)
    save, saves = checkpoint.save, []

    def counted(directory, *rest):
        save(directory, *rest)
        saves.append(directory)
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


def test_two_calls_do_not_save_at_one_place(tmp_path, monkeypatch):
    def asked_twice(*_):
        with pytest.raises(RunError, match=r"process \d+ on .* has been writing there since .*or save elsewhere"):
            tune(tmp_path / "same")
        raise RunError("as far as it goes")

    monkeypatch.setattr(Finetune, "score", asked_twice)
    with pytest.raises(RunError, match="as far as it goes"):
        tune(tmp_path / "same")
    assert not list(tmp_path.iterdir())


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*_):
        raise Interrupted("stopped at step 1 of 4; go on with --resume")

    monkeypatch.setattr(checkpoint, "save", interrupted)
    with pytest.raises(Interrupted, match="the same call, made again, goes on from the last checkpoint"):
        tune(tmp_path / "it")


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
