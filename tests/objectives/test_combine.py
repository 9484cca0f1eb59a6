"""Several tasks at once: the weighted sum of what each would be alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_encoders import TinyImage, tiny_batch, tiny_captioners, tiny_encoders
from torch import Tensor, nn

from mmssl import recipe
from mmssl.build import build
from mmssl.encoders.base import Encoder, Features, one_pass
from mmssl.errors import RecipeError
from mmssl.objectives import Objective, combine, create
from mmssl.objectives.base import Step
from mmssl.ops.draws import Draws
from mmssl.training.loop import fit
from mmssl.training.step import ForwardPass, accumulated_backward, task_gradients

TASKS = {
    "turn": {"name": "rotation", "weight": 0.5, "data": "pictures"},
    "pairs": {"name": "contrastive", "width": 7, "data": "pairs"},
}


def _batch(rows: int = 4) -> dict[str, torch.Tensor]:
    return {
        f"{source}/{k}": v for i, source in enumerate(("pictures", "pairs")) for k, v in tiny_batch(rows, i).items()
    }


def test_loss_is_the_weighted_sum_of_each_alone():
    torch.manual_seed(0)
    task = create("combine", tiny_encoders(), tasks=TASKS)
    assert task.meets == "loss"
    assert task.needs == ("pictures/image", "pairs/image", "pairs/text")
    draws = Draws(3, 1, 4)
    inputs = task.transform(_batch(), draws)
    losses = task(inputs)
    alone = {}
    for i, (name, given) in enumerate(TASKS.items()):
        hyper = {key: value for key, value in given.items() if key not in ("name", "weight", "data")}
        single = create(given["name"], task.encoders, **hyper)
        single.load_state_dict(
            {k.removeprefix(f"tasks.{name}."): v for k, v in task.state_dict().items() if not k.startswith("tasks.")
             or k.startswith(f"tasks.{name}.")}
        )  # fmt: skip
        alone[name] = single(single.transform(tiny_batch(4, i), Draws(3, 1, 4).named(name)))
        for key, value in alone[name].items():
            torch.testing.assert_close(losses[f"{name}/{key}"], value)
    torch.testing.assert_close(losses["loss"], 0.5 * alone["turn"]["loss"] + alone["pairs"]["loss"])


def test_tasks_draw_apart_and_adding_one_changes_no_other():
    encoders = tiny_encoders()
    one = {"first": {"name": "rotation"}}
    two = {"second": {"name": "rotation"}, **one}
    batch = tiny_batch(4)
    alone = create("combine", encoders, tasks=one).transform(batch, Draws(0, 0, 4))
    both = create("combine", encoders, tasks=two).transform(batch, Draws(0, 0, 4))
    assert torch.equal(alone["first/image"], both["first/image"])
    assert not torch.equal(both["first/image"], both["second/image"])


def test_encoders_are_shared_and_saved_once():
    task = create("combine", tiny_encoders(), tasks=TASKS)
    names = [name for name, _ in task.named_parameters(remove_duplicate=False)]
    assert len(names) == len(set(names)) == len(list(task.parameters()))
    assert not any("tasks" in name and "encoders" in name for name in task.state_dict())
    assert task.tasks["turn"].encoder("image") is task.encoder("image")
    copy = create("combine", tiny_encoders(), tasks=TASKS)
    copy.load_state_dict(task.state_dict())
    inputs = task.transform(_batch(), Draws(0, 0, 4))
    torch.testing.assert_close(copy(inputs)["loss"], task(inputs)["loss"])
    assert task.double().tasks["turn"].encoder("image").first.weight.dtype == torch.float64


def test_chance_steps_and_previews_are_those_of_the_tasks():
    task = create("combine", tiny_encoders(), tasks=TASKS)
    chance = task.chance(8)
    assert math.isclose(chance.loss, 0.5 * math.log(4) + math.log(8))
    assert chance.metrics["turn/accuracy"] == 0.25
    assert math.isclose(chance.metrics["pairs/loss"], math.log(8))
    task.tasks["pairs"].logit_scale.data.fill_(9)
    task.after_step(0.5)
    assert math.isclose(task.tasks["pairs"].logit_scale.item(), math.log(100), rel_tol=1e-6)
    inputs = task.transform(_batch(), Draws(0, 0, 4))
    titles = [panel.title for panel in task.preview(inputs, task.predict(inputs))]
    assert titles[0] == "turn: 0°"
    assert titles[-1] == "pairs: nearest text"
    assert create("combine", tiny_encoders(), tasks={"turn": {"name": "rotation"}}).meets == "nowhere"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({"a": {"name": "rotatoin"}}, r"tasks.a: .*did you mean 'rotation'"),
        ({"a": {"name": "rotation", "viewz": {}}}, r"tasks.a: .*unknown key 'viewz' \(did you mean 'views'"),
        ({"a": {"name": "rotation", "views": {"flip": "often"}}}, r"tasks.a: .*flip = 'often'"),
        ({"a": {}}, r"tasks.a: needs a name"),
        ({"a": {"name": "rotation", "weight": -1}}, r"tasks.a: weight = -1"),
        ({"a": {"name": "rotation", "data": 3}}, r"tasks.a: data = 3"),
        ({"a/b": {"name": "rotation"}}, r"tasks.a/b: a task is named by letters"),
        ({"a": {"name": "rotation", "encoder": "sound"}}, r"tasks.a: .*needs an encoder named 'sound'"),
        ({"probe": {"name": "rotation"}}, r"tasks.probe: .probe. has another meaning"),
        ({"keys": {"name": "rotation"}}, r"tasks.keys: .keys. has another meaning"),
        ({}, r"needs at least one task"),
    ],
)
def test_errors_name_the_task(tasks, message):
    with pytest.raises(RecipeError, match=message):
        create("combine", tiny_encoders(), tasks=tasks)


def test_conflicts_need_two_tasks_and_a_number_of_steps():
    with pytest.raises(RecipeError, match="between two tasks, and there is one"):
        create("combine", tiny_encoders(), tasks={"a": {"name": "rotation"}}, conflicts=5)
    with pytest.raises(RecipeError, match="conflicts = -1 should be int from 0"):
        create("combine", tiny_encoders(), tasks=TASKS, conflicts=-1)


FIGHT = {
    "turn": {"name": "rotation", "weight": 0.5},
    "pairs": {"name": "contrastive", "width": 7},
    "words": {"name": "masked_language", "weight": 3.0},
}
ROWS = 8


def _logged(task: Objective, inputs: dict[str, Tensor], parts: int = 1, number: int = 0) -> dict[str, Tensor]:
    """What a task says before a step."""
    numbers: dict[str, Tensor] = {}
    gradients = partial(task_gradients, task, parts=parts, reseed=torch.manual_seed)
    task.before_step(Step(number, data=list, prepare=lambda: inputs, gradients=gradients, log=numbers.update))
    return numbers


def _conflicts(rank: int = 0, world: int = 1, parts: int = 1) -> dict[str, Tensor]:
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in tiny_batch(ROWS).items()}
    inputs, random = task.transform(own, Draws(5, 3, local, share=rank, shares=world)), torch.get_rng_state()
    numbers = _logged(task, inputs, parts)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in task.parameters())
    return numbers


def _process(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save([_conflicts(rank, world, parts) for parts in (1, 2)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.usefixtures("double")
def test_conflicts_are_cosines_of_the_gradients_of_each_alone_however_the_batch_is_cut(tmp_path: Path, processes):
    torch.manual_seed(1)
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=1)
    inputs = task.transform(tiny_batch(ROWS), Draws(5, 3, ROWS))
    alone = {}
    for name, given in FIGHT.items():
        task.zero_grad()
        (given.get("weight", 1.0) * task(inputs)[f"{name}/loss"]).backward()
        alone[name] = {
            modality: torch.cat([p.grad.flatten() for p in encoder.parameters()])
            for modality, encoder in task.encoders.items()
            if all(p.grad is not None for p in encoder.parameters())
        }
    cosine = torch.nn.functional.cosine_similarity
    norms = {name: torch.cat(list(own.values())).norm() for name, own in alone.items()}
    expected = {f"gradient_share/{name}": norm / sum(norms.values()) for name, norm in norms.items()}
    expected["conflict/turn_pairs"] = cosine(alone["turn"]["image"], alone["pairs"]["image"], 0)
    expected["conflict/pairs_words"] = cosine(alone["pairs"]["text"], alone["words"]["text"], 0)
    assert expected["conflict/turn_pairs"].abs() > 1e-3

    processes(_process, (2, str(tmp_path)), 2)
    cut = [
        _conflicts(),
        _conflicts(parts=4),
        *(part for rank in (0, 1) for part in torch.load(tmp_path / f"{rank}.pt")),
    ]
    for found in cut:
        assert found.keys() == expected.keys()  # rotation and masked language share no encoder
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-10, atol=1e-12)


def test_a_run_that_measures_conflicts_has_the_same_bits_and_logs_them_when_due():
    def trained(conflicts: int) -> tuple[dict[str, Tensor], list[dict]]:
        # BatchNorm in the image encoder, dropout in the text encoder, cached accumulation.
        changes = {"objective.conflicts": conflicts, "training.steps": 5, "training.log_every": 4}
        loaded = recipe.load("rotation_contrastive_toy", changes | {"training.accumulate": 2})
        torch.manual_seed(0)
        objective, loader = build(loaded)
        history = fit(objective, loader, loaded.training, quiet=True)
        return objective.state_dict(), history

    (state, history), (plain_state, plain) = trained(2), trained(0)
    assert all(torch.equal(value, plain_state[key]) for key, value in state.items())
    assert [record["step"] for record in history] == [0, 2, 4, 5]
    assert [record["step"] for record in plain] == [0, 4, 5]
    assert ["conflict/turn_match" in record for record in history] == [False, True, True, False]
    for record in plain:
        (same,) = (other for other in history if other["step"] == record["step"])
        assert {key: same[key] for key in record if "loss" in key} == {
            key: value for key, value in record.items() if "loss" in key
        }


COCA = {
    "match": {"name": "contrastive", "width": 7, "views": {"area": None}},
    "caption": {"name": "captioning", "weight": 2.0},
}


class NoisyImage(TinyImage):
    """With dropout and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(self.dim)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Features:
        features = super().forward(x, valid)
        tokens = self.norm(self.drop(features.tokens).mT).mT
        return features._replace(tokens=tokens, pooled=tokens.mean(1))


def _pair(tasks: dict | None = None, image: type[Encoder] = TinyImage, **hyper: object) -> Objective:
    torch.manual_seed(2)
    encoders = tiny_captioners()
    encoders = {"image": image(), "text": encoders["text"], "fusion": encoders["fusion"]}
    return create("combine", encoders, tasks=tasks or COCA, **hyper)


@contextmanager
def _counted(task: Objective) -> Iterator[dict[str, int]]:
    """How often each encoder runs."""
    runs = dict.fromkeys(task.encoders, 0)

    def count(name: str) -> object:
        return lambda *_: runs.update({name: runs[name] + 1})

    hooks = [encoder.register_forward_hook(count(name)) for name, encoder in task.encoders.items()]
    yield runs
    for hook in hooks:
        hook.remove()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("area", [None, (0.5, 1.0)])
def test_one_pass_serves_all_tasks_with_the_gradient_of_separate_passes(monkeypatch, parts, area):
    task = _pair(views={"area": area})
    inputs = task.transform(tiny_batch(ROWS), Draws(0, 0, ROWS))
    gradients, losses = [], []
    for passes in (1, 2):
        if passes == 2:
            monkeypatch.setattr(combine, "one_pass", nullcontext)
        task.zero_grad()
        with _counted(task) as runs:
            losses.append(accumulated_backward(ForwardPass(task), inputs, parts))
        replays = 1 if parts == 1 else 2 * parts
        assert runs == {"image": passes * replays, "text": passes * replays, "fusion": replays}
        gradients.append({name: parameter.grad for name, parameter in task.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 1e-5
        error = (gradient - gradients[1][name]).abs().max() / gradient.abs().max()
        assert error < 1e-12, f"{name}: {error:.2g}"
    assert losses[0] == losses[1]


def test_what_differs_is_not_shared():
    with_crops = _pair({**COCA, "match": {"name": "contrastive", "width": 7}})
    inputs = with_crops.transform(tiny_batch(4), Draws(0, 0, 4))
    assert inputs["match/b"] is inputs["caption/b"]
    with _counted(with_crops) as runs:
        with_crops(inputs)
    assert runs == {"image": 2, "text": 1, "fusion": 1}
    assert not torch.equal(inputs["match/a"], inputs["caption/a"])
    # Nothing is kept for the next step, nor for who runs an encoder outside.
    with _counted(with_crops) as runs:
        for _ in range(2):
            with_crops(inputs)
            with_crops.encoder("text")(inputs["match/b"], inputs["match/b_valid"])
    assert runs == {"image": 4, "text": 4, "fusion": 2}


def test_a_pass_without_gradient_serves_no_task_that_wants_one():
    image, pictures = TinyImage(), tiny_batch(3)["image"]
    with one_pass([image]):
        with torch.no_grad():
            quiet = image(pictures)
        features = image(pictures)
        assert image(pictures) is features
        assert image(pictures.clone()) is not features
        with torch.no_grad():
            assert image(pictures) is quiet
    assert features.tokens.requires_grad
    assert not quiet.tokens.requires_grad
    assert image(pictures) is not features
    with pytest.raises(RuntimeError, match="stop"), one_pass([image]):
        raise RuntimeError("stop")
    assert image(pictures) is not image(pictures)


def test_one_pass_has_one_dropout_mask_and_counts_the_rows_once(monkeypatch):
    twice = {name: {"name": "captioning"} for name in ("first", "second")}
    for shared in (True, False):
        if not shared:
            monkeypatch.setattr(combine, "one_pass", nullcontext)
        task = _pair(twice, NoisyImage)
        task.tasks["second"].load_state_dict(task.tasks["first"].state_dict())
        outputs = task.predict(task.transform(tiny_batch(4), Draws(0, 0, 4)))
        assert torch.equal(outputs["first/log_likelihood_ratio"], outputs["second/log_likelihood_ratio"]) == shared
        assert task.encoder("image").norm.num_batches_tracked == (1 if shared else 2)


def test_compiled_tasks_share_the_pass_too():
    graphs = []

    def collect(graph, _):
        graphs.append(graph)
        return graph.forward

    task = _pair()
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    compiled = torch.compile(task, backend=collect)(inputs)
    torch.testing.assert_close(compiled["loss"], task(inputs)["loss"])
    assert sum("conv2d" in str(node.target) for graph in graphs for node in graph.graph.nodes) == 2  # the encoder's two
    torch.compiler.reset()


def test_one_crop_for_all_tasks():
    task, batch = _pair(views={"area": (0.3, 0.5)}), tiny_batch(4)
    inputs = task.transform(batch, Draws(0, 0, 4))
    crops = inputs["match/a"]
    assert crops is inputs["caption/a"]
    assert crops.shape == batch["image"].shape
    assert crops.is_floating_point()
    assert not torch.equal(crops, task.transform(batch, Draws(0, 1, 4))["match/a"])
    whole = _pair().transform(batch, Draws(0, 0, 4))
    assert whole["match/a"] is whole["caption/a"]
    with pytest.raises(RecipeError, match="no task reads any"):
        create("combine", tiny_encoders(), tasks={"words": {"name": "masked_language"}}, views={"area": (0.5, 1.0)})


def test_what_tasks_measure_themselves_is_logged_at_their_own_pace():
    task = _pair({**COCA, "caption": {"name": "captioning", "blind": 3}}, conflicts=2)
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    conflicts = {"conflict/match_caption", "gradient_share/match", "gradient_share/caption"}
    blind = {"caption/loss_over_blind"}
    logged = [set(_logged(task, inputs, number=number)) for number in range(6)]
    assert logged == [set(), conflicts, blind, conflicts, set(), blind | conflicts]


def test_conflicts_are_refused_at_the_first_step_where_weights_are_sharded():
    task = create("combine", tiny_encoders(), tasks=FIGHT, conflicts=100)
    with pytest.raises(RecipeError, match=r"set objective\.conflicts=0"):
        task.before_step(Step(0, data=list, sharded=True))


def test_tasks_hold_no_encoders_of_their_own():
    task = create("combine", tiny_encoders(), tasks=FIGHT)
    for part in task.tasks.values():
        assert not any(isinstance(module, Encoder) for module in part.modules())
        assert part.encoder("image") is task.encoder("image")
        assert part.exported.keys() == task.exported.keys()


def test_squeezed_pictures_are_cropped_once_or_handed_on_with_their_aspect():
    tasks = {name: given | {"views": {"area": (0.5, 1.0), "size": 12}} for name, given in TASKS.items()}
    squeezed = _batch() | {f"{source}/image_aspect": torch.full((4,), 2.0) for source in ("pictures", "pairs")}
    each = create("combine", tiny_encoders(), tasks=tasks)
    inputs = each.transform(squeezed, Draws(0, 0, 4))
    for name, source in (("turn", "pictures"), ("pairs", "pairs")):
        own = {key.partition("/")[2]: value for key, value in squeezed.items() if key.startswith(f"{source}/")}
        alone = create(tasks[name]["name"], tiny_encoders(), views=tasks[name]["views"])
        for key, value in alone.transform(own, Draws(0, 0, 4).named(name)).items():
            torch.testing.assert_close(inputs[f"{name}/{key}"], value)
    tasks["pairs"] = TASKS["pairs"] | {"views": {"area": None}}
    once, draws = (
        create("combine", tiny_encoders(), tasks=tasks, views={"area": (0.5, 1.0), "size": 12}),
        Draws(0, 0, 4),
    )
    cut = [once.crop(squeezed[key], draws, squeezed[f"{key}_aspect"]) for key in ("pictures/image", "pairs/image")]
    torch.testing.assert_close(once.transform(squeezed, Draws(0, 0, 4))["pairs/a"], cut[1])
