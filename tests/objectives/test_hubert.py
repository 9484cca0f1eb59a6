"""HuBERT: clusters are those of scikit-learn on any number of processes, targets are in time, the loss is plain."""

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from sklearn.cluster import KMeans
from tiny_encoders import tiny_waves

from mmssl.errors import RecipeError
from mmssl.objectives import create
from mmssl.objectives.base import Step
from mmssl.objectives.reconstruction.hubert import Cepstra
from mmssl.ops.clustering import choose_centers
from mmssl.ops.draws import Draws, mix_seed

ROWS, SAMPLES = 8, 400
HYPER = {"mask_length": 4, "codes": 5, "width": 6, "target": "layers.0"}


def task(kind: str = "hubert", **hyper):
    torch.manual_seed(0)
    return create("hubert", {"audio": tiny_waves(kind)}, **HYPER | hyper)


def sounds():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(SAMPLES) < torch.tensor([400, 333, 200, 60, 10, 400, 380, 250])[:, None]
    audio = torch.randn(ROWS, SAMPLES, generator=generator).to(torch.get_default_dtype()) * 0.1
    return {"audio": audio * mask, "audio_mask": mask}


def fitted(batches, **hyper):
    objective = task(**hyper)
    objective.before_step(Step(0, lambda: batches))
    return objective


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("unmasked", [0.0, 0.5])
def test_loss_and_gradient_are_a_plain_cross_entropy_of_cosines(unmasked):
    objective = fitted([sounds()], unmasked=unmasked).train()
    inputs = objective.transform(sounds(), Draws(0, 0, ROWS))
    losses = objective(inputs)
    losses["loss"].backward()
    mine = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

    objective.zero_grad()
    hidden, batch = inputs["hidden"], sounds()
    valid = objective.network.valid_frames(batch["audio_mask"])
    embedded = objective.network.embed(
        objective.network.frames(batch["audio"], batch["audio_mask"])[0], hidden, objective.mask_token
    )
    tokens = objective.projection(objective.network.encode(embedded, valid).tokens)
    logits = F.cosine_similarity(tokens[:, :, None], objective.clusters, dim=3) / 0.1
    layer = objective.network.layers(batch["audio"], batch["audio_mask"])["layers.0"].tokens.detach()
    nearest = torch.cdist(layer, objective.codebook.centers).argmin(2)
    errors = F.cross_entropy(logits.flatten(0, 1), nearest.flatten(), reduction="none").view(hidden.shape)
    weights = torch.where(hidden, 1.0, unmasked) * valid
    plain = (errors * weights).sum() / weights.sum()
    plain.backward()
    assert float(losses["loss"].detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for name, parameter in objective.named_parameters():
        if name in mine:
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-9, atol=1e-13)
    assert len(mine) > 30
    # The level to beat: the frequency of each cluster among the frames that were clustered.
    shares = (objective.codebook.counts + 1) / (objective.codebook.counts + 1).sum()
    surprise = (-shares[nearest].log() * weights).sum() / weights.sum()
    assert float(losses["relative_error"]) == pytest.approx(float(plain.detach() / surprise), rel=1e-9)


def test_zero_answers_are_at_chance_whatever_the_weights():
    for unmasked in (0.0, 0.3):
        objective = fitted([sounds()], unmasked=unmasked)
        inputs = objective.transform(sounds(), Draws(0, 0, ROWS))
        nothing = {key: torch.zeros_like(value) for key, value in objective.predict(inputs).items()}
        assert float(objective.loss(nothing, inputs)["loss"]) == pytest.approx(math.log(5), rel=1e-5)


def centers(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    local = ROWS // world
    own = {key: value[rank * local : (rank + 1) * local] for key, value in sounds().items()}
    codebook = fitted([own]).codebook
    torch.save((codebook.centers, codebook.counts), f"{folder}/{world}_{rank}.pt")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.usefixtures("double")
def test_clusters_are_those_of_scikit_learn_on_any_number_of_processes(processes, tmp_path):
    centers(0, 1, str(tmp_path))
    processes(centers, (2, str(tmp_path)), 2)
    alone, counts = torch.load(tmp_path / "1_0.pt")
    for rank in range(2):
        found, theirs = torch.load(tmp_path / f"2_{rank}.pt")
        torch.testing.assert_close(found, alone)
        assert torch.equal(theirs, counts)
    objective = task()
    points = objective.vectors(sounds())
    points = points[~points.isnan().any(1)]
    assert len(points) == int(counts.sum()) == int(objective.network.valid_frames(sounds()["audio_mask"]).sum())
    start = choose_centers(points, 5, mix_seed(int(objective.codebook.seed), "k-means++"))
    library = KMeans(5, init=start.numpy(), n_init=1, max_iter=25, tol=0).fit(points.detach().numpy())
    np.testing.assert_allclose(alone.numpy(), library.cluster_centers_, rtol=1e-9, atol=1e-12)


def test_targets_stay_those_of_the_network_as_it_was():
    objective = fitted([sounds()])
    before = objective.transform(sounds(), Draws(0, 0, ROWS))["target"]
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(objective.transform(sounds(), Draws(0, 0, ROWS))["target"], before)
    again = task()
    again.load_state_dict(objective.state_dict())
    assert torch.equal(again.transform(sounds(), Draws(0, 0, ROWS))["target"], before)
    counts = again.codebook.counts.clone()
    again.before_step(Step(0, lambda: [{"audio": sounds()["audio"] * 2}]))
    assert torch.equal(again.codebook.counts, counts)  # one codebook for good


@pytest.mark.usefixtures("double")
def test_targets_are_those_of_weights_that_were_loaded_after_it_was_built():
    objective, batch = task(), sounds()
    with torch.no_grad():
        for parameter in objective.network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    objective.before_step(Step(0, lambda: [batch]))
    inputs = objective.transform(batch, Draws(0, 0, ROWS))
    layer = objective.network.layers(batch["audio"], batch["audio_mask"])["layers.0"].tokens
    nearest = torch.cdist(layer, objective.codebook.centers).argmin(2).gather(1, inputs["places"])
    assert torch.equal(inputs["target"][inputs["chosen"]], nearest[inputs["chosen"]])


@pytest.mark.usefixtures("double")
def test_cepstra_are_torchaudios_one_for_each_frame_of_the_same_samples():
    rate, reach, stride = 16_000, 400, 320
    sound = torch.randn(2, 16_000)
    found = Cepstra(rate, reach, stride).double()(sound)
    assert found.shape == (2, (16_000 - reach) // stride + 1, 39)
    mel = {"n_fft": reach, "hop_length": reach, "n_mels": 23, "center": False}
    whole = torchaudio.transforms.MFCC(rate, 13, log_mels=True, melkwargs=mel).double()
    for frame in (0, 7, 48):
        alone = whole(sound[:, frame * stride : frame * stride + reach])[:, :, 0]
        torch.testing.assert_close(found[:, frame, :13], alone, rtol=1e-9, atol=1e-9)
    steps = torchaudio.transforms.MFCC(rate, 13, log_mels=True, melkwargs=mel | {"hop_length": 160}).double()(sound)
    slope = torchaudio.functional.compute_deltas(steps)
    torch.testing.assert_close(found[:, :, 13:26], slope[:, :, ::2].mT)
    torch.testing.assert_close(found[:, :, 26:], torchaudio.functional.compute_deltas(slope)[:, :, ::2].mT)


@pytest.mark.parametrize("kind", ["wav2vec2", "wavlm"])
def test_its_relatives_will_do(kind):
    objective = fitted([sounds()], kind=kind)
    inputs = objective.transform(sounds(), Draws(0, 0, ROWS))
    objective(inputs)["loss"].backward()
    assert objective.mask_token.grad.abs().max() > 0
    panels = {panel.title: panel.cells for panel in objective.preview(inputs, objective.predict(inputs))}
    assert [len(text.split()) for text in panels["target"]] == inputs["chosen"].sum(1).tolist()


def test_what_cannot_work_is_said():
    with pytest.raises(RecipeError, match=r"target = 'layers.2' is neither mfcc nor a depth \(did you mean"):
        task(target="layers.2")
    silence = {"audio": torch.zeros(2, SAMPLES)}
    with pytest.raises(RecipeError, match="all frames of the data are alike"):
        fitted([silence])
