"""Heads that are trained on frozen features: what each reads that a simpler probe cannot, and what memory holds."""

import collections

import pytest
import torch
from torch import nn

import mmssl
from mmssl.adaptation import tokens as tokens_of
from mmssl.adaptation.probes.attentive import AttentiveHead
from mmssl.adaptation.probes.mlp import Mlp
from mmssl.adaptation.probes.ridge import Ridge
from mmssl.adaptation.targets.classes import Classes
from mmssl.adaptation.targets.labels import Labels
from mmssl.adaptation.targets.values import Values
from mmssl.adaptation.tokens import read_tokens
from mmssl.encoders.base import Encoder, Features, masked_mean
from mmssl.errors import DataError, RunError

PLACES, KINDS = 24, 40


class Beads(Encoder):
    """A string of beads -> a vector a bead, and their mean; samples of a sound are numbers of kinds."""

    modality, dim = "audio", 16

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding.from_pretrained(torch.randn(KINDS, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, x, valid=None):
        tokens = self.kinds(x.long())
        return Features(tokens, masked_mean(tokens, valid), (x.shape[1],), valid)


def strings(rows: int, seed: int, size: int = 50) -> list[dict[str, torch.Tensor]]:
    """Strings of 12 to 24 beads of 36 kinds, but for one bead of four others: the class."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(4, KINDS, (rows, PLACES), generator=random)
    label = torch.randint(0, 4, (rows,), generator=random)
    length = torch.randint(12, PLACES + 1, (rows, 1), generator=random)
    x[torch.arange(rows), (torch.rand(rows, generator=random) * length[:, 0]).long()] = label
    mask = torch.arange(PLACES) < length
    # After its end a string shows other classes, which nobody may look at.
    x = torch.where(mask, x, torch.randint(0, 4, x.shape, generator=random)).float()
    batch = {"audio": x, "audio_mask": mask, "label": label}
    cut = [value.split(size) for value in batch.values()]
    return [dict(zip(batch, part, strict=True)) for part in zip(*cut, strict=True)]


@pytest.mark.long
def test_attention_finds_the_one_token_that_pooling_buries():
    options = {"baseline": False, "steps": 250, "lr": (3e-3,), "seeds": 2}
    attentive = mmssl.adapt(Beads(), strings(600, 0), strings(300, 1), probe="attentive", **options)
    assert attentive.score > 0.9
    assert mmssl.adapt(Beads(), strings(600, 0), strings(300, 1), probe="ridge", baseline=False).score < 0.75
    assert mmssl.adapt(Beads(), strings(600, 0), strings(300, 1), probe="mlp", **options).score < 0.75
    assert len(attentive.rows[0].runs["accuracy"]) == 2  # heads of other weights, though the encoder is frozen


def test_the_head_and_the_gradient_of_its_query_are_those_of_attention_written_out():
    torch.manual_seed(0)
    head, dim, heads = AttentiveHead(128, 5).double(), 128, 2
    tokens = torch.randn(3, 7, dim, dtype=torch.float64)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    for bias in (head.attention.in_proj_bias, head.attention.out_proj.bias):
        nn.init.normal_(bias)
    outputs = head(tokens, valid)
    weights = torch.randn(3, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), head.query)

    query = head.query.detach().clone().requires_grad_()
    (wq, wk, wv), (bq, bk, bv) = head.attention.in_proj_weight.chunk(3), head.attention.in_proj_bias.chunk(3)
    q = (wq @ query + bq).view(heads, -1)
    k, v = ((tokens @ w.T + b).unflatten(2, (heads, -1)) for w, b in ((wk, bk), (wv, bv)))
    score = torch.einsum("hd,bnhd->bhn", q, k) / (dim // heads) ** 0.5
    share = score.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
    seen = torch.einsum("bhn,bnhd->bhd", share, v).flatten(1)
    pooled = seen @ head.attention.out_proj.weight.T + head.attention.out_proj.bias
    scaled = (pooled - pooled.mean(1, keepdim=True)) / (pooled.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = scaled @ head.head.weight.T + head.head.bias
    torch.testing.assert_close(outputs, expected)
    (again,) = torch.autograd.grad((expected * weights).sum(), query)
    assert gradient.abs().max() > 1e-3
    torch.testing.assert_close(gradient, again)


def test_tokens_are_kept_on_disk_and_read_as_they_were(tmp_path):
    batches, encoder = strings(7, 0, size=3), Beads()
    ids = torch.arange(7).split(3)
    numbered = [batch | {"id": own} for batch, own in zip(batches, ids, strict=True)]
    ((view,), read) = read_tokens([encoder], numbered, 7, layers=False, folder=tmp_path / "features")
    rows = view["pooled"]
    assert read.tolist() == list(range(7))
    assert not list((tmp_path / "features").iterdir())  # no name is left behind
    assert len(rows.tokens) == sum(int(batch["audio_mask"].sum()) for batch in batches)  # no padding
    assert rows.tokens.dtype == "float16"
    chosen = rows[torch.tensor([6, 1, 4])]
    ((batch),) = chosen.read([torch.tensor([2, 0])])
    for place, row in enumerate((4, 6)):
        own = {key: value[row % 3] for key, value in batches[row // 3].items()}
        beads = own["audio"][own["audio_mask"]].long()
        assert batch["tokens_mask"][place].sum() == len(beads)
        expected = nn.functional.layer_norm(encoder.kinds(beads), (16,))
        torch.testing.assert_close(batch["tokens"][place, : len(beads)], expected, atol=2e-3, rtol=1e-3)


def test_tokens_that_the_disk_cannot_hold_are_refused_with_the_first_batch(monkeypatch):
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(tokens_of.shutil, "disk_usage", lambda place: usage(20_000))
    with pytest.raises(DataError, match=r"the tokens of 600 rows take about 0\.0 GiB, and .* read fewer"):
        mmssl.adapt(Beads(), strings(600, 0), strings(300, 1), probe="attentive", baseline=False)
    broken = Beads()
    broken.kinds.weight.data[:] = torch.nan
    with pytest.raises(RunError, match="tokens are not finite"):
        mmssl.adapt(broken, strings(60, 0), strings(30, 1), probe="attentive", baseline=False)


def crossed(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers of any sign, shifted and stretched, and whether the signs are equal."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(seed))
    return x * torch.tensor([100.0, 0.01]) + 7, ((x > 0).sum(1) != 1).long()


@pytest.mark.long
def test_a_hidden_layer_reads_what_a_line_cannot():
    (x, label), (y, truth) = crossed(400, 0), crossed(200, 1)
    probe, target = Mlp(lr=(1e-2,), steps=200, hidden=32), Classes(range(2))
    (answers,) = probe.predict(target, x, label, y, probe.settings(), 0)
    (again,) = probe.predict(target, x, label, y, probe.settings(), 0)
    (other,) = probe.predict(target, x, label, y, probe.settings(), 1)
    (line,) = Ridge(alpha=(1e-3,)).predict(target, x, label, y, [{"alpha": 1e-3}], 0)
    assert target.score(answers, truth)["accuracy"] > 0.9
    assert target.score(line, truth)["accuracy"] < 0.65
    assert torch.equal(answers, again)
    assert not torch.equal(answers, other)


@pytest.mark.long
def test_it_learns_values_in_their_units_and_several_labels():
    (x, label), (y, truth) = crossed(400, 0), crossed(200, 1)
    probe, target = Mlp(lr=(1e-2,), steps=200, hidden=32), Values()
    (answers,) = probe.predict(target, x, 1000.0 + 5.0 * label[:, None].double(), y, probe.settings(), 0)
    assert target.score(answers, 1000.0 + 5.0 * truth[:, None].double())["r2"] > 0.5
    several, both = Labels(["same", "other"]), torch.stack([label == 1, label == 0], 1)
    (answers,) = probe.predict(several, x, both, y, probe.settings(), 0)
    found = several.score(answers, torch.stack([truth == 1, truth == 0], 1))
    assert found["subset_accuracy"] > 0.9
