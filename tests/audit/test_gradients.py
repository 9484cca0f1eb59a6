"""The gradient arm is exact: zero where the library's tasks hide things, above zero for every planted leak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mmssl import recipe
from mmssl.audit import own_files
from mmssl.audit.gradients import LEFT, Leak, between_rows, leaks
from mmssl.build import build
from mmssl.cli import app
from mmssl.modules.pictures import channels_first
from mmssl.objectives._concealed import Later
from mmssl.objectives.base import Objective
from mmssl.objectives.reconstruction.causal_language import CausalLanguage
from mmssl.objectives.reconstruction.colorization import Colorization
from mmssl.objectives.reconstruction.inpainting import Inpainting
from mmssl.objectives.reconstruction.masked_autoencoder import MaskedAutoencoder
from mmssl.objectives.reconstruction.masked_language import MaskedLanguage
from mmssl.objectives.reconstruction.span_denoising import SpanDenoising
from mmssl.objectives.transformation.rotation import Rotation
from mmssl.ops.patches import patchify

Inputs = dict[str, Tensor]


def built(name: str) -> tuple[Objective, Inputs]:
    objective, loader = build(recipe.load(f"{name}_toy", {"training.batch_size": 4, "training.workers": 0}))
    return objective, next(loader.batches(0, 1))


class SeesRows(Rotation):
    def predict(self, inputs: Inputs) -> Inputs:
        return {key: value + value.mean(0, keepdim=True) for key, value in super().predict(inputs).items()}


class SeesPatches(MaskedAutoencoder):
    """The pixels of hidden patches, as one that decodes the whole picture would see them."""

    def predict(self, inputs: Inputs) -> Inputs:
        patches = patchify(channels_first(inputs[self.modality], self.modality), self.pixels.patch)
        hidden = patches.gather(1, inputs["hidden"][:, :, None].expand(-1, -1, patches.shape[2]))
        return {"pixels": super().predict(inputs)["pixels"] + 1e-3 * hidden.mean()}


class LeavesThePicture(Inpainting):
    def transform(self, batch: Inputs, draws: Any) -> Inputs:
        inputs = super().transform(batch, draws)
        return inputs | {"image": inputs["target"]}


class LeavesColors(Colorization):
    def transform(self, batch: Inputs, draws: Any) -> Inputs:
        inputs = super().transform(batch, draws)
        tint = torch.tensor([0.01, 0.0, -0.01])[:, None, None]
        return inputs | {"image": inputs["image"] + tint}


class LeavesTokens(MaskedLanguage):
    """A mask drawn for the loss and never laid over the text."""

    def transform(self, batch: Inputs, draws: Any) -> Inputs:
        return super().transform(batch, draws) | {"text": batch["text"]}


class SeesTheNextToken(CausalLanguage):
    """The causal mask off by one."""

    def logits(self, inputs: Inputs) -> Tensor:
        valid = inputs["text_mask"][:, 1:]
        return super().logits(inputs) + inputs["text"][:, 1:][valid][:, None]


class SeesTheEnd(SpanDenoising):
    """The causal mask off: each answer knows the last token that is said."""

    def logits(self, inputs: Inputs) -> Tensor:
        said = inputs["target_mask"]
        last = (inputs["target"] * said).sum(1, keepdim=True).expand_as(said)
        return super().logits(inputs) + last[said][:, None]


PLANTED = [
    ("rotation", SeesRows, "other rows, in evaluation"),
    ("masked_autoencoder", SeesPatches, "what is hidden"),
    ("inpainting", LeavesThePicture, LEFT),
    ("colorization", LeavesColors, LEFT),
    ("masked_language", LeavesTokens, LEFT),
    ("causal_language", SeesTheNextToken, "later tokens"),
    ("span_denoising", SeesTheEnd, "later tokens"),
]


@pytest.mark.quick(3)
@pytest.mark.parametrize(("name", "leaking", "what"), PLANTED)
def test_a_planted_leak_is_found_and_the_task_itself_has_none(name, leaking, what):
    objective, batch = built(name)
    clean = {leak.what: leak for leak in leaks(objective, batch)}
    assert not any(leak.leaks for leak in clean.values())
    if not clean[what].why:  # a tenth of masked tokens stays on purpose
        assert clean[what].largest == 0
    objective.__class__ = leaking
    found = {leak.what: leak for leak in leaks(objective, batch)}
    assert found[what].leaks
    assert found[what].largest > 0


HIDING = (
    *("masked_autoencoder_audio", "masked_autoencoder_video", "masked_autoencoder_simmim"),
    *(
        "masked_pair",
        "masked_pair_beit3",
        "masked_pair_video",
        "replaced_token",
        "denoising",
        "captioning",
        "coca",
        "flava",
    ),
    "audio_visual_autoencoder",
)


@pytest.mark.long
@pytest.mark.parametrize("name", HIDING)
def test_what_every_task_hides_stays_hidden(name):
    objective, batch = built(name)
    found = leaks(objective, batch)
    assert len(found) > 2  # something is hidden
    assert [str(leak.text) for leak in found if leak.leaks] == []


@pytest.mark.long
def test_rows_of_a_network_of_waveforms_are_asked_too():
    objective, batch = built("wav2vec2")
    assert [leak.largest for leak in leaks(objective, batch)] == [0, 0]


def test_batch_normalization_explains_what_training_mixes():
    objective, batch = built("rotation")
    evaluated, trained = between_rows(objective, batch)
    assert (evaluated.largest, evaluated.verdict) == (0, "clean")
    assert (trained.largest > 0, trained.verdict) == (True, "explained")
    assert "BatchNorm layers" in trained.text
    transformer, batch = built("masked_autoencoder")
    assert [leak.largest for leak in between_rows(transformer, batch)] == [0, 0]


def test_whole_numbers_are_asked_by_others_in_their_place():
    objective, batch = built("next_sentence")
    assert [leak.largest for leak in between_rows(objective, batch)] == [0, 0]
    objective.predict = lambda inputs: {"logits": inputs["text"].double().mean().expand(len(inputs["text"]), 2)}
    assert all(leak.leaks for leak in between_rows(objective, batch))


def test_places_of_answers_are_counted_row_by_row():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    assert Later.of("text", valid, first=1).place.tolist() == [1, 2, 1]


def test_the_command_says_so_and_ends_in_one(monkeypatch):
    monkeypatch.setattr(own_files, "leaks", lambda objective, batch: [Leak("what is hidden", 0.5, True)])
    result = CliRunner().invoke(app, ["audit", "masked_autoencoder_toy", "--steps", "1", "--rows", "64"])
    assert result.exit_code == 1
    assert "  leaks             answers depend on what is hidden (by 0.5)" in result.output
    assert result.output.splitlines()[-1] == "masked_autoencoder leaks: answers depend on what is hidden (by 0.5)"
