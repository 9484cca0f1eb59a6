"""Every recipe that comes along: readable, complete, and true to the signatures of what it names."""

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_files import FILES, TOYS, each
from torch.overrides import TorchFunctionMode

from mmssl import catalog, recipe
from mmssl.batch import MODALITIES
from mmssl.build import build, build_objective
from mmssl.catalog import find_recipe
from mmssl.dry_run import check
from mmssl.media.text import Tokenizer
from mmssl.recipe import Recipe
from mmssl.registry import check_keywords, components, find
from mmssl.runs import preview
from mmssl.training.launch import start_processes

SETS = r"_(imagenet|cc12m|wikipedia|audioset|audiocaps|finevideo|librispeech|webvid|kinetics|ucf101|c4)$"
PUBLISHED = [path for path in FILES if re.search(SETS, path.stem)]


def tasks_of(loaded: Recipe) -> list[str]:
    name = loaded.objective["name"]
    return [name, *(task["name"] for task in loaded.objective.get("tasks", {}).values())]


@pytest.mark.parametrize("path", each(FILES))
def test_the_head_says_what_how_and_with_which_result(path: Path):
    head = catalog.head(path)
    assert head[0].endswith((".", "?", ":"))
    assert "" in head
    facts = dict(
        re.split(r":\s+", line, maxsplit=1) for line in head if re.match(r"(command|hardware|time|result):", line)
    )
    assert list(facts) == ["command", "hardware", "time", "result"]
    assert re.search(rf"mmssl run (\S*/)?{path.stem}\b", facts["command"])
    assert find_recipe(path.stem) == path
    body = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert 5 <= len(body) <= 30


@pytest.mark.parametrize("path", each(FILES))
def test_it_lies_in_the_folder_of_its_task_and_is_named_after_it(path: Path):
    loaded = recipe.load(path)
    task = components("objective")[loaded.objective["name"]]
    if path.parent.name != "recipes":
        assert path.parent.name == (task.family or task.name)
        # A combination may bear the name of the paper that it is from, which its head begins with: CoCa, BLIP.
        paper = (
            re.match(r"[\w-]*", catalog.head(path)[0])[0].lower().replace("-", "") if task.name == "combine" else None
        )
        assert path.stem.startswith("_".join(tasks_of(loaded)[1:]) or task.name) or path.stem.partition("_")[0] == paper


@pytest.mark.parametrize("path", each(FILES))
def test_its_keys_are_those_of_the_constructors(path: Path):
    loaded = recipe.load(path)
    assert loaded.training.schedule.warmup <= loaded.training.steps
    for name, arguments in loaded.encoders.items():
        given = dict(arguments)
        modality = given.pop("modality", name)
        assert modality in (*MODALITIES, "fusion")
        check_keywords(find("encoder", modality), {k: v for k, v in given.items() if k != "model"}, str(path))
    hyper = {key: value for key, value in loaded.objective.items() if key != "name"}
    check_keywords(find("objective", loaded.objective["name"]), hyper, str(path))


def test_every_task_has_a_toy_recipe_and_every_name_is_used_once():
    toys = [recipe.load(path) for path in TOYS]
    assert {name for toy in toys for name in tasks_of(toy)} == set(components("objective"))
    assert len({path.stem for path in FILES}) == len(FILES)


def test_every_task_has_its_published_scale():
    assert {name for path in PUBLISHED for name in tasks_of(recipe.load(path))} == set(components("objective"))


def is_light(path: Path) -> bool:
    """Whether its networks need no memory to be built: filter banks and vocabularies have to be computed."""
    encoders = recipe.load(path).encoders
    return "audio" not in encoders and not any("tokenizer" in given for given in encoders.values())


class DrawnOnce(TorchFunctionMode):
    """Every matrix of weights is the same numbers over and over: to draw those of large networks takes a minute."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0.02 * torch.randn(65537, generator=torch.Generator().manual_seed(0))  # prime: no two rows agree

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = function.__name__.endswith(("normal_", "uniform_"))
        weights = args[0] if args else (kwargs or {}).get("tensor")  # as functions of torch.nn.init hand it on
        if not drawn or not isinstance(weights, torch.nn.Parameter) or weights.ndim < 2:
            return function(*args, **(kwargs or {}))
        flat, size = weights.detach().view(-1), len(self.numbers)
        whole = flat.numel() // size * size
        flat[:whole].view(-1, size).copy_(self.numbers)
        flat[whole:].copy_(self.numbers[: flat.numel() - whole])
        return weights


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=() if p.stem == "rotation_imagenet" else pytest.mark.long) for p in PUBLISHED],
)
def test_the_published_networks_can_be_built(path: Path):
    loaded = recipe.load(path)
    words = Tokenizer.train(["a word and another word"], 40)
    tokenizers = {name: words for name, given in loaded.encoders.items() if "tokenizer" in given}
    # Weights without memory where that is possible: these networks are large, and only their shapes are asked about.
    with torch.device("meta") if is_light(path) else DrawnOnce():
        objective = build_objective(loaded, tokenizers, where=str(path), pretrained=False)
    sources = loaded.sources()
    for need in objective.needs:
        assert need.rpartition("/")[0] in sources
    for data in sources.values():
        assert data.source not in ("toy", "")
    assert objective.chance(loaded.training.batch_size).levels


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, id=p.stem) for p in PUBLISHED])
def test_the_published_tasks_run_on_noise_of_their_shapes(path: Path):
    loaded = recipe.load(path)
    words = Tokenizer.train(["a word and another word"], 40)
    tokenizers = {name: words for name, given in loaded.encoders.items() if "tokenizer" in given}
    check(loaded, build_objective(loaded, tokenizers, where=str(path), pretrained=False), str(path))


def _start(rank: int, port: int, folder: Path, names: tuple[str, ...]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    start_processes()
    for name in names:
        objective, loader = build(recipe.load(name, {"training.batch_size": 8}), folder / name, where=name)
        if rank == 0:  # as at the end of a run, where the others wait
            assert preview(objective, loader)
    torch.distributed.destroy_process_group()


@pytest.mark.long
def test_tasks_that_compare_rows_start_and_end_on_two_processes(processes, tmp_path):
    names = ("matching_toy", "albef_toy", "blip_toy", "contrastive_toy", "moco_toy", "next_sentence_toy", "dino_toy")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    processes(_start, (port, tmp_path, names), 2)
