"""Several tasks at once: the weighted sum of what each would be alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tiny_encoders import TinyImage, tiny_batch, tiny_captioners, tiny_encoders
from torch import Tensor, nn

from mmssl.encoders.base import Encoder, Features, one_pass
from mmssl.errors import RecipeError
from mmssl.objectives import Objective, combine, create
from mmssl.ops.draws import Draws
from mmssl.training.step import ForwardPass, accumulated_backward

TASKS = {
    "turn": {"name": "rotation", "weight": 0.5, "data": "pictures"},
    "pairs": {"name": "contrastive", "width": 7, "data": "pairs"},
}


SHARED = {
    "turn": {"name": "rotation"},
    "pairs": {"name": "contrastive", "width": 7},
    "words": {"name": "masked_language"},
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


def test_what_each_task_scored_is_told_by_its_name():
    tasks = {"words": {"name": "masked_language"}, "turn": {"name": "rotation"}}
    task = create("combine", tiny_encoders(), tasks=tasks)
    inputs = task.transform(tiny_batch(4), Draws(0, 0, 4))
    assert {name: float(count) > 0 for name, count in task.scored(inputs).items()} == {"words": True}
    nothing = {key: torch.zeros_like(inputs[key]) for key in task.divisors}
    assert task.scored(inputs | nothing) == {"words": 0}


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


COCA = {
    "match": {"name": "contrastive", "width": 7, "views": {"area": None}},
    "caption": {"name": "captioning", "weight": 2.0},
}
ROWS = 8


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


@pytest.mark.long
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


def test_tasks_hold_no_encoders_of_their_own():
    task = create("combine", tiny_encoders(), tasks=SHARED)
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
