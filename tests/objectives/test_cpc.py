"""CPC: the right block is t + k, nothing after t is read for it, and the loss is a plain cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_batch, tiny_encoders
from torch import Tensor

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws

ROWS = 4


def task(form: str = "cpc", encoder: str = "audio", **hyper):
    torch.manual_seed(0)
    encoders = {encoder: tiny_encoders()[encoder]}
    return create("cpc", encoders, encoder=encoder, form=form, **{"blocks": 6, "steps": 2, "width": 7} | hyper)


def prepared(objective, whole: bool = False):
    batch = tiny_batch(ROWS)
    if whole:
        batch["audio_mask"] = torch.ones_like(batch["audio_mask"])
        batch["audio"] = torch.rand_like(batch["audio"]) - 0.5  # silence has no slope
    return objective.transform(batch, Draws(0, 0, ROWS))


@pytest.mark.usefixtures("double")
def test_loss_is_a_cross_entropy_over_all_blocks_of_the_batch():
    objective = task(context=2)
    inputs = prepared(objective)
    outputs = objective.predict(inputs)
    states = objective.state(outputs["found"][:, :, 0])[0]
    candidates = [(row, block) for row in range(ROWS) for block in range(2, 6)]
    errors = []
    for row in range(ROWS):
        for t in range(1, 6):  # the last block of the context
            for k in (1, 2):
                if t + k < 6 and inputs["valid"][row, t + k].all():
                    guess = objective.guess[k - 1](states[row, t])
                    logits = torch.stack([guess @ outputs["found"][r, b, 0] for r, b in candidates])
                    right = candidates.index((row, t + k))
                    errors.append(F.cross_entropy(logits[None], torch.tensor([right])))
    losses = objective.loss(outputs, inputs)
    assert len(errors) == int(inputs["scored_blocks"]) < ROWS * 7
    torch.testing.assert_close(losses["loss"], torch.stack(errors).mean())
    torch.testing.assert_close(losses["relative_error"], losses["loss"].detach() / math.log(ROWS * 4))


@pytest.mark.usefixtures("double")
def test_dense_loss_is_a_cross_entropy_over_all_places_of_the_predicted_blocks():
    objective = task("dpc", "video")
    inputs = prepared(objective)
    outputs = objective.predict(inputs)
    found, guessed = outputs["found"], outputs["guessed"]
    assert found.shape == (ROWS, 6, 9, 6)
    assert guessed.shape == (ROWS, 2, 9, 6)
    candidates = [(r, t, p) for r in range(ROWS) for t in (4, 5) for p in range(9)]
    errors = []
    for row in range(ROWS):
        for place in range(9):
            _, state = objective.state(found[row, None, :4, place])
            for t in (4, 5):
                guess = objective.guess(state[0])[0]
                torch.testing.assert_close(guess, guessed[row, t - 4, place])
                logits = torch.stack([guess @ found[r, b, p] for r, b, p in candidates])
                errors.append(F.cross_entropy(logits[None], torch.tensor([candidates.index((row, t, place))])))
                _, state = objective.state(guess[None, None], state)
    torch.testing.assert_close(objective.loss(outputs, inputs)["loss"], torch.stack(errors).mean())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("form", "encoder"), [("cpc", "audio"), ("cpc", "video"), ("dpc", "video"), ("dpc", "audio")])
def test_a_guess_reads_no_block_from_its_own_on_and_not_beyond_its_context(form, encoder):
    objective = task(form, encoder)
    inputs = prepared(objective, whole=True)
    inputs["blocks"].requires_grad_()
    guessed = objective.predict(inputs)["guessed"]
    contexts = [3, 3] if form == "dpc" else [t - k for k in (1, 2) for t in range(k, 6)]
    targets = objective.targets
    assert len(contexts) == guessed.shape[1] == len(targets)
    for i, (last, target) in enumerate(zip(contexts, targets, strict=True)):
        assert last < target
        (slope,) = torch.autograd.grad(guessed[:, i].square().sum(), inputs["blocks"], retain_graph=True)
        read = slope.flatten(2).abs().sum(2) > 0
        assert read[:, : last + 1].all()
        assert not read[:, last + 1 :].any()


def test_blocks_are_parts_of_the_sound_in_order_and_padding_is_not_asked_about():
    objective, batch = task(), tiny_batch(ROWS)
    inputs = prepared(objective)
    assert torch.equal(inputs["blocks"].flatten(1), batch["audio"])
    whole = batch["audio_mask"].unflatten(1, (6, 20)).all(2)
    assert torch.equal(inputs["scored"], whole[:, objective.targets])
    assert objective.targets == [1, 2, 3, 4, 5, 2, 3, 4, 5]


def test_frames_of_a_clip_are_cropped_alike_and_colored_each_on_its_own():
    batch = tiny_batch(ROWS)
    batch["video"] = batch["video"][:, :1].expand(-1, 12, -1, -1, -1).contiguous()

    def frames(**hyper) -> Tensor:
        return task("dpc", "video", **hyper).transform(batch, Draws(0, 0, ROWS))["blocks"].flatten(1, 2)

    still = frames(strength=0.0)
    torch.testing.assert_close(still, still[:, :1].expand_as(still))
    assert (frames()[:, 0] - frames()[:, 1]).abs().amax((1, 2, 3)).min() > 0.01


def test_who_speaks_lowers_the_loss_and_not_the_ranking():
    objective = task()
    inputs = prepared(objective, whole=True)
    rows = torch.eye(ROWS)[:, None, None] * 20
    named = {"found": rows.expand(-1, 6, -1, -1), "guessed": rows.expand(-1, 9, -1, -1)}
    losses = objective.loss(named, inputs)
    assert float(losses["loss"]) == pytest.approx(math.log(5), abs=1e-4)
    assert float(losses["loss"]) < objective.chance(ROWS).loss - 1
    assert float(losses["ranking"]) == 0.5
    times = torch.eye(6)[None, :, None].expand(ROWS, -1, -1, -1)
    right = {"found": times, "guessed": times[:, objective.targets]}
    assert float(objective.loss(right, inputs)["ranking"]) == 1.0


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match="6 blocks leave no room for steps = 4 after context = 3"):
        task(steps=4, context=3)
    with pytest.raises(RecipeError, match="6 blocks leave no room for steps = 6"):
        task("dpc", "video", steps=6)
    with pytest.raises(RecipeError, match="a sound has none; take dense: false"):
        task(dense=True)
    with pytest.raises(RecipeError, match="cpc reads audio or video, and the encoder 'image' reads image"):
        task(encoder="image")
    with pytest.raises(RecipeError, match="12 frames cannot be cut into blocks = 13"):
        prepared(task(encoder="video", blocks=13))
