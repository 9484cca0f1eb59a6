"""What a folder says is held to what its weights hold, before anything is built; broken weights go to nobody."""

import json
import os
import re
import shutil
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import PAIRS, ROTATION, make_run

import mmssl
from mmssl.errors import MmsslError, RecipeError, RunError
from mmssl.hub import export, push
from mmssl.hub.bounds import count_weights, no_larger_than


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bounds") / "run"
    make_run(folder, PAIRS)
    return folder


@pytest.fixture
def folder(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "run"))


@contextmanager
def refused(error, match: str):
    """With that sentence, in ten seconds of processor time."""
    start = time.process_time()
    with pytest.raises(error, match=match):
        yield
    assert time.process_time() - start < 10


def edit(folder: Path, change) -> None:
    tree = yaml.safe_load((folder / "recipe.yaml").read_text())
    change(tree)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))


@pytest.mark.long
@pytest.mark.parametrize(
    ("encoder", "arguments"),
    [
        ("text", {"num_hidden_layers": 10_000_000}),
        ("text", {"num_hidden_layers": 200_000}),
        ("text", {"vocab_size": 10**12}),
        ("text", {"hidden_size": 2_000_000}),
        ("text", {"intermediate_size": 10**30}),
        ("image", {"depth": 1_000_000}),
        ("image", {"depth": 3_000}),
        ("image", {"embed_dim": 1_000_000}),
        ("image", {"model": "timm/vit_giant_patch14_224", "depth": 2_000}),
    ],
    ids=str,
)
def test_networks_far_larger_than_the_weights_are_not_built(folder, encoder, arguments) -> None:
    edit(folder, lambda tree: tree["encoders"][encoder].update(arguments))
    with refused(MmsslError, r"far larger network|more than any network has|has weights for|can't allocate memory"):
        mmssl.load(folder)


@pytest.mark.parametrize("width", [10**30, 10**12, 10**7, 2_000_000])
def test_heads_far_larger_than_the_weights_are_not_built(folder, width) -> None:
    edit(folder, lambda tree: tree["objective"].update(width=width))
    with refused(MmsslError, r"far larger network|more than any network has|has weights for|has shape|width"):
        mmssl.load(folder)


def test_sizes_of_a_sound_folder_are_counted(sound) -> None:
    stored = load_file(sound / "model.safetensors")
    assert count_weights(sound / "model.safetensors") == (len(stored), sum(value.numel() for value in stored.values()))


def test_building_is_watched_only_inside(sound) -> None:
    with no_larger_than(sound / "model.safetensors"):
        torch.nn.Linear(2, 2)
        with pytest.raises(RunError, match="far larger network"):
            torch.nn.Linear(1 << 15, 1 << 14, device="meta")
    torch.nn.Linear(1 << 15, 1 << 14, device="meta")


@pytest.mark.long
@pytest.mark.parametrize("number", [200_000, 700_000])
def test_very_many_tensors_are_refused(folder, number) -> None:
    text = json.dumps({str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(number)}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with refused(RunError, "more than any network has"):
        mmssl.load(folder)


@pytest.mark.parametrize("name", ["metrics.jsonl", "probes.json", "recipe.yaml", "tokenizers/text/tokenizer.json"])
def test_only_regular_files_are_read(folder, name) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with refused(RunError, Path(name).name):
        mmssl.load(folder)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", ""])
def test_encoders_are_named_like_files_inside(folder, name) -> None:
    edit(folder, lambda tree: tree["encoders"].update({name: tree["encoders"].pop("image") | {"modality": "image"}}))
    with pytest.raises(RecipeError, match="names files and folders"):
        mmssl.load(folder)


@pytest.mark.quick(3)
@pytest.mark.parametrize("content", ["{}", "[{}]", "[[]]", "[3]", "garbage", "", '{"rows": []}', "[" * 100_000])
def test_damaged_probes_are_said(folder, tmp_path, content) -> None:
    run = mmssl.load(folder)
    (folder / "probes.json").write_text(content)
    for use in (lambda: mmssl.load(folder), lambda: push(run, "me/x", dry_run=tmp_path / "out")):
        with pytest.raises(RunError, match=r"probes\.json"):
            use()
    assert not (tmp_path / "out").exists()


def test_no_probes_are_fine(folder) -> None:
    (folder / "probes.json").write_text("[]")
    assert mmssl.load(folder).probes == []


@pytest.mark.parametrize("tokens", ["x", 3])
def test_tokenizers_that_the_library_chokes_on(folder, tokens) -> None:
    path = folder / "tokenizers" / "text" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "extra_special_tokens": tokens}))
    with pytest.raises(MmsslError, match=re.escape(str(folder))):
        mmssl.load(folder)


@pytest.mark.quick(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["in memory", "on disk"])
def test_weights_that_are_not_finite_are_handed_to_nobody(tmp_path, value, where) -> None:
    run = make_run(tmp_path / "run", ROTATION)
    name = next(name for name, _ in run.objective.named_parameters() if name.endswith("patch_embed.proj.weight"))
    if where == "in memory":
        with torch.no_grad():
            run.objective.get_parameter(name)[0, 0] = value
    else:
        stored = load_file(run.directory / "model.safetensors")
        stored[name][0, 0] = value
        save_file(stored, run.directory / "model.safetensors")
        run = mmssl.load(run.directory)
    for use in (lambda: export(run, tmp_path / "out"), lambda: push(run, "me/x", dry_run=tmp_path / "out")):
        with pytest.raises(RunError, match=r"patch_embed\.proj\.weight is not finite"):
            use()
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_not_finite_is_not_pushed(tmp_path) -> None:
    run = make_run(tmp_path / "run", ROTATION)
    stored = load_file(run.directory / "model.safetensors")
    stored["head.bias"][0] = float("nan")
    save_file(stored, run.directory / "model.safetensors")
    run = mmssl.load(run.directory)
    with pytest.raises(RunError, match=r"head\.bias is not finite"):
        push(run, "me/x", dry_run=tmp_path / "out")
