"""wav2vec 2.0: loss and every gradient are those of transformers, masks have its statistics, hidden stays hidden."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_encoders import tiny_encoders, tiny_waves
from transformers import Wav2Vec2Config, Wav2Vec2ForPreTraining
from transformers.models.wav2vec2 import modeling_wav2vec2 as library

from mmssl.audit.verdict import ONE_CLUSTER
from mmssl.encoders import create as create_encoder
from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.ops.draws import Draws
from mmssl.ops.masking import mask_spans

SAMPLES = 400  # 48 frames
HYPER = {"mask_length": 4, "negatives": 7, "codes": 6, "width": 4}


def task(seed: int = 0, kind: str = "wav2vec2", **hyper):
    torch.manual_seed(seed)
    return create("wav2vec2", {"audio": tiny_waves(kind)}, **HYPER | hyper)


def sounds(rows: int = 5, ragged: bool = False):
    generator = torch.Generator().manual_seed(1)
    batch = {"audio": torch.randn(rows, SAMPLES, generator=generator).to(torch.get_default_dtype()) * 0.1}
    if ragged:
        batch["audio_mask"] = torch.arange(SAMPLES) < torch.tensor([400, 333, 200, 60, 10])[:rows, None]
        batch["audio"] = batch["audio"] * batch["audio_mask"]
    return batch


def as_in_the_library(objective):
    """The library's model with the same weights."""
    net = objective.network.backbone.net
    config = Wav2Vec2Config.from_dict(
        net.config.to_dict()
        | {
            "apply_spec_augment": True,
            "mask_time_prob": 0.5,
            "num_codevectors_per_group": 6,
            "num_codevector_groups": 2,
        }
        | {"codevector_dim": 4, "proj_codevector_dim": 4, "num_negatives": 7, "contrastive_logits_temperature": 0.1}
        | {"diversity_loss_weight": 0.1, "final_dropout": 0.0, "feat_quantizer_dropout": 0.0}
    )
    model = Wav2Vec2ForPreTraining(config).double().train()
    model.wav2vec2.load_state_dict({**net.state_dict(), "masked_spec_embed": objective.mask_token.detach()})
    pairs = {
        "project_hid": objective.question,
        "project_q": objective.answer,
        "quantizer.weight_proj": objective.quantizer.logits,
    }
    for name, mine in pairs.items():
        model.get_submodule(name).load_state_dict(mine.state_dict())
    with torch.no_grad():
        model.quantizer.codevectors.copy_(objective.quantizer.codebooks.flatten(0, 1)[None])
    return model


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("ragged", [False, True])
def test_loss_and_every_gradient_are_those_of_transformers(monkeypatch, ragged):
    objective = task().train()
    batch = sounds(ragged=ragged)
    inputs = objective.transform(batch, Draws(3, 0, 5))
    losses = objective(inputs)
    losses["loss"].backward()
    losses = {key: float(value.detach()) for key, value in losses.items()}

    model, hidden, places = as_in_the_library(objective), inputs["hidden"], inputs["places"]
    rows, frames = hidden.shape
    noise = torch.zeros(rows, frames, 2, 6).index_put((torch.arange(rows)[:, None], places), inputs["noise"])
    negatives = torch.zeros(rows, frames, 7, dtype=torch.long)
    for row in range(rows):
        own = inputs["chosen"][row]
        negatives[row, places[row, own]] = places[row][inputs["negatives"][row, own]]
    negatives += torch.arange(rows)[:, None, None] * frames

    def gumbel(logits, tau, hard):
        soft = ((logits + noise.view(-1, 6)) / tau).softmax(-1)
        return F.one_hot(soft.argmax(-1), 6) + (soft - soft.detach())

    monkeypatch.setattr(library.nn.functional, "gumbel_softmax", gumbel)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # the library's own calls would round to 32 bits
    normal, valid = objective.network.prepare(batch["audio"], batch.get("audio_mask"))
    theirs = model(normal, attention_mask=valid, mask_time_indices=hidden, sampled_negative_indices=negatives)
    number = hidden.sum()
    assert number == inputs["hidden_frames"]
    assert losses["loss"] == pytest.approx(float(theirs.loss.detach() / number), rel=1e-12)
    assert losses["contrastive"] == pytest.approx(float(theirs.contrastive_loss.detach() / number), rel=1e-12)
    summed = float(theirs.codevector_perplexity.detach())  # over the groups
    assert losses["perplexity"] == pytest.approx(summed / len(objective.quantizer.codebooks), rel=1e-12)

    (theirs.loss / number).backward()
    expected = dict(model.wav2vec2.named_parameters())
    for name, parameter in objective.network.backbone.net.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-9, atol=1e-12)
    heads = {
        objective.mask_token: expected["masked_spec_embed"],
        objective.quantizer.logits.weight: model.quantizer.weight_proj.weight,
        objective.quantizer.logits.bias: model.quantizer.weight_proj.bias,
        objective.question.weight: model.project_hid.weight,
        objective.question.bias: model.project_hid.bias,
        objective.answer.weight: model.project_q.weight,
        objective.answer.bias: model.project_q.bias,
    }
    for mine, other in heads.items():
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)
        assert mine.grad.abs().max() > 1e-6
    codebooks = model.quantizer.codevectors.grad.view_as(objective.quantizer.codebooks)
    torch.testing.assert_close(objective.quantizer.codebooks.grad, codebooks, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("frames", "probability", "length"), [(500, 0.65, 10), (120, 0.8, 10), (49, 0.65, 10)])
def test_masks_have_the_statistics_of_the_library(frames, probability, length):
    rows = 2000
    hidden = mask_spans(torch.ones(rows, frames, dtype=torch.bool), probability, length, Draws(0, 0, rows)).numpy()
    np.random.seed(0)
    # The library rounds the number of spans alike for all rows of a call.
    theirs = np.concatenate(
        [library._compute_mask_indices((20, frames), probability, length, min_masks=1) for _ in range(rows // 20)]
    )
    assert hidden.mean() == pytest.approx(theirs.mean(), abs=0.006)
    np.testing.assert_allclose(hidden.mean(0), theirs.mean(0), atol=0.07)

    def runs(masks):
        ends = np.diff(np.pad(masks.astype(int), ((0, 0), (1, 1))), axis=1)
        return np.nonzero(ends.T == -1)[0].size, masks.sum() / (ends == -1).sum(), (ends == 1).sum(1).std()

    for mine, other in zip(runs(hidden), runs(theirs), strict=True):
        assert mine == pytest.approx(other, rel=0.05)


def test_a_long_sound_hides_half_of_its_frames_and_padding_is_never_hidden():
    valid = torch.arange(3000).expand(64, -1) < torch.tensor([3000] * 62 + [700, 4])[:, None]
    hidden = mask_spans(valid, 0.65, 10, Draws(1, 0, 64))
    assert float(hidden[:62].float().mean()) == pytest.approx(1 - (1 - 0.065) ** 10, abs=0.005)  # 0.489
    assert float(hidden[62, :700].float().mean()) == pytest.approx(0.489, abs=0.06)
    assert not hidden[~valid].any()
    assert not hidden[63].any()  # no span fits


def test_negatives_are_other_hidden_frames_of_the_same_sound_each_equally_often():
    objective, rows = task(negatives=400), 5
    inputs = objective.transform(sounds(ragged=True), Draws(0, 0, rows))
    for row in range(rows):
        number = int(inputs["chosen"][row].sum())
        assert number == int(inputs["hidden"][row].sum())
        own = inputs["negatives"][row, :number]
        assert not (own == torch.arange(number)[:, None]).any()
        if number:
            counts = torch.bincount(own.flatten(), minlength=number).double()
            assert len(counts) == number
            assert float((counts / counts.mean() - 1).abs().max()) < 0.3
    assert inputs["chosen"].sum(1).tolist()[-1] == 0


@pytest.mark.usefixtures("double")
def test_no_answer_depends_on_a_hidden_sample():
    objective = task().eval()
    objective.network.normalize = False  # the mean and variance of a sound are of all samples
    batch = sounds()
    inputs = objective.transform(batch, Draws(0, 0, 5))
    inputs["audio"] = inputs["audio"].requires_grad_()
    _, tokens = objective.read(inputs)
    (slope,) = torch.autograd.grad(tokens.square().sum(), inputs["audio"])
    read_by_seen = torch.zeros(5, SAMPLES, dtype=torch.bool)
    for frame in range(48):
        read_by_seen[:, 8 * frame : 8 * frame + 20] |= ~inputs["hidden"][:, frame, None]
    assert not slope[~read_by_seen].any()
    assert (slope[read_by_seen] != 0).double().mean() > 0.95


def test_a_codebook_that_collapses_is_seen_and_equal_codes_are_no_negatives():
    objective = task().eval()
    inputs = objective.transform(sounds(), Draws(0, 0, 5))
    with torch.no_grad():
        objective.quantizer.logits.weight.zero_()
        objective.quantizer.logits.bias[[0, 6]] = 50.0
        losses = objective(inputs)
    assert float(losses["contrastive"]) == pytest.approx(0, abs=1e-6)
    assert float(losses["ranking"]) == 0.5
    assert float(losses["perplexity"]) == pytest.approx(1, abs=1e-4)
    assert losses["perplexity"] < ONE_CLUSTER  # which the verdict on a run asks
    even = {key: torch.zeros_like(value) for key, value in objective.predict(inputs).items()}
    assert float(objective.loss(even, inputs)["perplexity"]) == pytest.approx(6)
    assert float(objective.loss(even, inputs)["loss"]) == pytest.approx(math.log(8))


def test_codes_that_no_frame_has_leave_loss_and_gradient_finite():
    objective = task(codes=320)
    inputs = objective.transform(sounds(), Draws(0, 0, 5))
    with torch.no_grad():
        objective.quantizer.logits.weight.mul_(1000)  # as sure as published codebooks are at their first step
    losses = objective(inputs)
    losses["loss"].backward()
    assert 1 < losses["perplexity"] < 320
    assert all(weight.grad.isfinite().all() for weight in objective.parameters() if weight.grad is not None)


def test_the_choice_of_codes_gets_colder_and_is_without_noise_in_evaluation():
    objective = task(gumbel=(2.0, 0.5), gumbel_decay=0.5)
    frames, noise = torch.randn(1, 3, 6), torch.randn(1, 3, 2, 6) * 9

    def soft():
        objective.zero_grad()
        objective.quantizer(frames, noise)[0].sum().backward()
        return objective.quantizer.logits.weight.grad.clone()

    slopes = []
    for _ in range(4):
        slopes.append(soft())
        objective.after_step(0.0)
    assert not torch.equal(slopes[0], slopes[1])
    assert torch.equal(slopes[2], slopes[3])
    noisy = objective.train().quantizer(frames, noise)[1]
    still = objective.eval().quantizer(frames, noise)[1]
    assert not torch.equal(noisy, still)
    assert torch.equal(still, objective.quantizer(frames, noise * 0)[1])


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_its_relatives_will_do(kind):
    objective = task(kind=kind)
    objective(objective.transform(sounds(), Draws(0, 0, 5)))["loss"].backward()
    assert objective.mask_token.grad.abs().max() > 0


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match="reads spectrograms; take a network of waveforms"):
        create("wav2vec2", {"audio": create_encoder("timm/test_resnet", "audio")})
    with pytest.raises(RecipeError, match="width = 5 is not a multiple of groups = 2"):
        task(width=5)
    with pytest.raises(RecipeError, match="a span of mask_length = 4 frames is 44 samples, and the sounds have 40"):
        task().transform({"audio": torch.zeros(2, 40)}, Draws(0, 0, 2))
    with pytest.raises(RecipeError, match="wav2vec2 reads audio, and the encoder 'image' reads image"):
        create("wav2vec2", tiny_encoders(), encoder="image")
