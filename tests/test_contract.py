"""What holds for every objective, built from every toy recipe."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from recipe_files import TOYS, each
from torch import Tensor

from mmssl import recipe
from mmssl.batch import MODALITIES, TEXT_PARTS, Batch, count_rows, split_rows
from mmssl.build import build
from mmssl.errors import RecipeError
from mmssl.modules.teacher import Teacher
from mmssl.objectives import reinitialized
from mmssl.objectives.base import Objective, Step
from mmssl.ops.draws import Draws
from mmssl.report.figures import draw_panels

# Of one source, and no frames of clips; the tasks of a combination are tested alone.
PICTURES = [
    path
    for path in TOYS
    if "\n  image:" in (text := path.read_text())
    and text.count("source: toy") == 1
    and "\n  video:" not in text
    and "name: combine" not in text
]
WHOLE = {"captioning", "inpainting", "jigsaw"}  # no share of the area is drawn there
ROWS = 4


@pytest.fixture(scope="module", params=each(TOYS))
def built(request) -> tuple[Objective, Batch]:
    """An objective in evaluation mode, where BatchNorm and dropout leave rows alone, and a batch of its data."""
    torch.manual_seed(0)
    objective, loader = build(recipe.load(request.param, {"training.batch_size": ROWS}))
    return objective.eval(), next(loader.batches(0, 1))


class Watched(dict):
    """A batch that remembers what was read."""

    def __init__(self, entries: Batch) -> None:
        super().__init__(entries)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def items(self) -> Any:
        self.read |= set(self)
        return super().items()


def differing(a: Batch, b: Batch, tolerance: float = 0.0) -> Iterator[str]:
    assert a.keys() == b.keys()
    for key in a:
        same = (a[key] - b[key]).abs().max() <= tolerance if a[key].is_floating_point() else torch.equal(a[key], b[key])
        if a[key].shape != b[key].shape or not same:
            yield key


def rows_of(values: Batch, chosen: Any) -> Batch:
    return {key: value[chosen] for key, value in values.items() if value.ndim}


def test_it_needs_modalities_and_never_a_label(built):
    objective, batch = built
    assert objective.needs
    assert {need.rpartition("/")[2] for need in objective.needs} <= {*MODALITIES, *TEXT_PARTS}
    if any("/" in need for need in objective.needs):
        pytest.skip("a combination hands all entries of a source on; its tasks are tested alone")
    labeled = Watched(batch | {"label": torch.zeros(ROWS, dtype=torch.long)})
    objective.transform(labeled, Draws(0, 0, ROWS))
    assert labeled.read
    assert "label" not in labeled.read


def test_the_transform_draws_from_seed_and_step_alone(built, monkeypatch):
    objective, batch = built
    drawn: list[object] = []
    next_stream = Draws._next
    monkeypatch.setattr(Draws, "_next", lambda *args: drawn.append(args) or next_stream(*args))
    before = {key: value.clone() for key, value in batch.items()}
    torch.manual_seed(1)
    inputs = objective.transform(batch, Draws(7, 3, ROWS))
    torch.manual_seed(2)
    assert not list(differing(inputs, objective.transform(batch, Draws(7, 3, ROWS))))
    for seed, step in ((7, 4), (8, 3)):
        # Nothing is random in a causal language model or a captioner.
        assert bool(list(differing(inputs, objective.transform(batch, Draws(seed, step, ROWS))))) == bool(drawn)
    assert not list(differing(batch, before))
    assert not any(value.requires_grad for value in inputs.values())


def test_inputs_and_outputs_have_rows_first(built):
    objective, batch = built
    inputs = objective.transform(batch, Draws(0, 0, ROWS))
    assert count_rows(inputs) == ROWS
    assert {key for key, value in inputs.items() if value.ndim == 0} == set(objective.divisors)
    outputs = objective.predict(inputs)
    assert count_rows(outputs) == ROWS
    assert all(value.ndim and value.is_floating_point() for value in outputs.values())


def test_what_a_row_becomes_does_not_depend_on_the_other_rows(built):
    objective, batch = built
    if objective.meets == "transform":
        pytest.skip("a sample of it is made of two rows; its own test proves which")
    inputs = objective.transform(batch, Draws(0, 0, ROWS))
    others = {key: torch.cat([value[:1], value[:1].expand(ROWS - 1, *value.shape[1:])]) for key, value in batch.items()}
    alone = objective.transform(others, Draws(0, 0, ROWS))
    assert not list(differing(rows_of(inputs, slice(1)), rows_of(alone, slice(1))))


def test_processes_together_make_what_one_makes(built):
    objective, batch = built
    if objective.meets == "transform":
        pytest.skip("it collects rows of other processes; its gradients over processes are proved")
    whole = objective.transform(batch, Draws(0, 5, ROWS))
    halves = [
        objective.transform(rows_of(batch, slice(2 * share, 2 * share + 2)), Draws(0, 5, 2, share=share, shares=2))
        for share in range(2)
    ]
    joined = {key: torch.cat([half[key] for half in halves]) for key in halves[0] if halves[0][key].ndim}
    assert not list(differing(rows_of(whole, slice(None)), joined, 1e-6))


def test_predictions_are_made_row_by_row(built):
    objective, batch = built
    inputs = objective.transform(batch, Draws(0, 0, ROWS))
    with torch.no_grad():
        whole = objective.predict(inputs)
        parts = [objective.predict(part) for part in split_rows(inputs, ROWS)]
    assert not list(differing(whole, {key: torch.cat([part[key] for part in parts]) for key in whole}, 1e-4))


def test_the_loss_is_finite_and_stands_beside_its_chance_level(built):
    objective, batch = built
    losses = objective(objective.transform(batch, Draws(0, 0, ROWS)))
    assert all(value.ndim == 0 and torch.isfinite(value) for value in losses.values())
    chance = objective.chance(ROWS)
    assert chance.levels
    assert chance.metrics
    assert set(chance.levels) <= set(losses)
    assert all(math.isfinite(level) for level in chance.levels.values())
    names = [key.rpartition("/")[2] for key in losses]
    for key, name in zip(losses, names, strict=True):
        if name.startswith(("accuracy", "ranking")):
            assert key in chance.metrics
            assert 0 <= losses[key] <= 1


def test_every_weight_learns(built):
    objective, batch = built
    objective.zero_grad()
    inputs = objective.transform(batch, Draws(0, 0, ROWS))  # tasks that take turns all take part in evaluation mode
    objective.train()
    objective(inputs)["loss"].backward()
    objective.eval()
    idle = [name for name, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not idle


def test_chance_is_what_a_network_that_sees_nothing_scores(built):
    objective, batch = built
    with torch.no_grad():
        inputs = objective.transform(batch, Draws(0, 0, ROWS))
        outputs = {key: torch.zeros_like(value) for key, value in objective.predict(inputs).items()}
        blind = objective.loss(outputs, inputs)
    chance = objective.chance(ROWS)
    if "logit_bias" in dict(objective.named_parameters()):
        pytest.skip("a sigmoid's level is that of its best bias")
    if chance.loss is None:
        pytest.skip("the level of its loss depends on the data; its own test proves that of its metrics")
    assert float(blind["loss"]) == pytest.approx(chance.loss, rel=1e-5, abs=1e-6)


def test_its_state_is_all_in_the_state_dict(built):
    objective, batch = built
    with torch.no_grad():
        inputs = objective.transform(batch, Draws(0, 0, ROWS))
        before = objective.predict(inputs)
        state = {key: value.clone() for key, value in objective.state_dict().items()}
        for p in objective.parameters():
            p.add_(torch.randn_like(p))
        assert list(differing(before, objective.predict(inputs), 1e-6))
        objective.load_state_dict(state)
        assert not list(differing(before, objective.predict(inputs)))


def test_a_teacher_begins_as_its_student_is_by_then(built):
    """In a combination it may have learned before; see `Teacher.begin`."""
    objective, batch = built
    teachers = [module for module in objective.modules() if isinstance(module, Teacher)]
    if not teachers or hasattr(objective, "tasks"):
        pytest.skip("it has no teacher, or is a combination, whose tasks are tested alone")
    own = {id(parameter) for teacher in teachers for parameter in teacher.parameters()}
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * (id(parameter) not in own))
    before = [parameter.clone() for teacher in teachers for parameter in teacher.parameters()]
    objective.before_step(Step(0, data=lambda: [batch]))
    after = [parameter for teacher in teachers for parameter in teacher.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    objective.load_state_dict(state)


@pytest.mark.long
def test_its_preview_can_be_drawn(built, tmp_path):
    objective, batch = built
    with torch.no_grad():
        inputs = objective.transform(batch, Draws(0, 0, ROWS))
        panels = objective.preview(inputs, objective.predict(inputs))
    assert len(panels) >= 2
    assert all(panel.title and len(panel.cells) == ROWS for panel in panels)
    for panel in panels:  # a sound says what its axes measure
        if isinstance(panel.cells[0], Tensor) and panel.cells[0].ndim <= 2 and "image" not in objective.needs:
            assert panel.scale is not None, panel.title
            assert bool(panel.scale.bands) == (panel.cells[0].ndim == 2), panel.title
    assert draw_panels(panels, tmp_path / "panels.png", rows=1).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_it_can_be_made_afresh(built):
    objective, _ = built
    one, same, other = (reinitialized(objective, seed).state_dict() for seed in (1, 1, 2))
    assert one.keys() == objective.state_dict().keys()
    assert not list(differing(one, same))
    assert list(differing(one, other))


def test_what_it_compares_it_compares_row_by_row(built):
    objective, batch = built
    if not objective.pairs:
        pytest.skip("it compares no two encoders")
    encoders = objective.exported
    if objective.needs[0] == "video":  # an encoder of images may see frames of it
        batch = batch | {"image": batch["video"][:, 0]}
    for pair in objective.pairs:
        assert pair.embed or pair.match
        sides = []
        for name in (pair.a, pair.b):
            key = next(key for key in batch if key.rpartition("/")[2] == encoders[name].modality)
            with torch.no_grad():
                sides.append(encoders[name](batch[key], batch.get(f"{key}_mask")))
        if pair.embed is not None:
            a, b = (embed(side) for embed, side in zip(pair.embed, sides, strict=True))
            assert a.shape == b.shape
            torch.testing.assert_close(torch.cat([a, b]).norm(dim=1), torch.ones(2 * ROWS))
        if pair.match is not None:
            logits = pair.match(*sides)
            assert logits.shape == (ROWS,)
            turned = [
                side._replace(
                    tokens=side.tokens.flip(0),
                    pooled=side.pooled.flip(0),
                    valid=None if side.valid is None else side.valid.flip(0),
                )
                for side in sides
            ]
            torch.testing.assert_close(pair.match(*turned), logits.flip(0), atol=1e-5, rtol=1e-4)


@pytest.mark.quick(6)
@pytest.mark.parametrize("path", each(PICTURES))
def test_squeezed_pictures_are_seen_in_their_shape_or_refused(path):
    plain = recipe.load(path)
    settings = {"training.batch_size": ROWS, "data.image.fit": "squeeze"}
    sizes = {"objective.views.size": plain.data.image.size}
    if "local_crops" in plain.objective:
        sizes["objective.local_views.size"] = plain.data.image.size // 2
    if plain.objective["name"] in WHOLE:
        objective, loader = build(recipe.load(path, settings))
    else:
        with pytest.raises(RecipeError, match=r"views: size, in pixels, is needed where data\.image\.fit is squeeze"):
            build(recipe.load(path, settings))
        objective, loader = build(recipe.load(path, settings | sizes))
    batch = next(loader.batches(0, 1))
    assert batch["image_aspect"].tolist() == [1.0] * ROWS
    seen = [
        objective.eval().transform(batch | {"image_aspect": torch.full((ROWS,), aspect)}, Draws(0, 0, ROWS))
        for aspect in (1.0, 2.0)
    ]
    assert set(differing(*seen))
