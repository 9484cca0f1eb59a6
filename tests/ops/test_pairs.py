"""Losses of pairs against formulas written out, open_clip's and PyTorch's own, with gradients, in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mmssl.ops.pairs import fingerprint, info_nce, sigmoid_pairs

ROWS, WIDTH = 10, 8
# Of ten rows 0, 3 and 7 have one caption, 1 and 2 one image, 4 and 5 both; the numbers of a and of b are apart.
ITEMS = torch.tensor([[i, 10 + i] for i in range(ROWS)])
ITEMS[[3, 7], 1] = ITEMS[0, 1]
ITEMS[2, 0] = ITEMS[1, 0]
ITEMS[5] = ITEMS[4]


@pytest.fixture
def leaves() -> tuple[torch.Tensor, ...]:
    """`a`, `b`, scale and bias."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64)
    scale, bias = torch.tensor([5.0, -2.0], dtype=torch.float64)
    return tuple(x.clone().requires_grad_() for x in (F.normalize(a, dim=-1), F.normalize(b, dim=-1), scale, bias))


def equal_rows() -> torch.Tensor:
    """By hand: bool (B, B)."""
    same = [[bool((ITEMS[i] == ITEMS[j]).any()) for j in range(ROWS)] for i in range(ROWS)]
    return torch.tensor(same)


def assert_same(mine, theirs, leaves):
    assert math.isclose(mine.item(), theirs.item(), rel_tol=1e-12)
    ours, others = (torch.autograd.grad(loss, leaves) for loss in (mine, theirs))
    for own, other in zip(ours, others, strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk", [None, 3, 10])
def test_clip_is_open_clips(leaves, chunk):
    loss_module = pytest.importorskip("open_clip.loss")
    a, b, scale, _ = leaves
    assert_same(info_nce(a, b, scale, chunk=chunk)[0], loss_module.ClipLoss()(a, b, scale), (a, b, scale))


@pytest.mark.parametrize("chunk", [None, 3, 10])
def test_siglip_is_open_clips(leaves, chunk):
    loss_module = pytest.importorskip("open_clip.loss")
    assert_same(sigmoid_pairs(*leaves, chunk=chunk)[0], loss_module.SigLipLoss()(*leaves), leaves)


@pytest.mark.parametrize("chunk", [None, 4])
def test_align_is_cross_entropy_with_label_smoothing_both_ways(leaves, chunk):
    a, b, scale, _ = leaves
    logits, own = scale * a @ b.T, torch.arange(ROWS)
    theirs = sum(F.cross_entropy(x, own, label_smoothing=0.1) for x in (logits, logits.T)) / 2
    assert_same(info_nce(a, b, scale, smoothing=0.1, chunk=chunk)[0], theirs, (a, b, scale))
    assert abs(theirs.item() - info_nce(a, b, scale)[0].item()) > 0.01


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_unicl_is_the_papers_sum_over_positives(leaves, chunk):
    a, b, scale, _ = leaves
    equal = equal_rows()
    assert equal.sum(1).tolist() == [3, 2, 2, 3, 2, 2, 1, 3, 1, 1]

    def one_way(x, y):
        terms = []
        for i in range(ROWS):
            denominator = sum((scale * x[i] @ y[j]).exp() for j in range(ROWS))
            positives = [k for k in range(ROWS) if equal[i, k]]
            terms += [-sum(((scale * x[i] @ y[k]).exp() / denominator).log() for k in positives) / len(positives)]
        return torch.stack(terms).mean()

    theirs = (one_way(a, b) + one_way(b, a)) / 2
    assert_same(info_nce(a, b, scale, items=ITEMS, chunk=chunk)[0], theirs, (a, b, scale))
    assert abs(theirs.item() - info_nce(a, b, scale)[0].item()) > 0.01


@pytest.mark.parametrize("chunk", [None, 4])
def test_equal_items_with_smoothing_are_soft_targets(leaves, chunk):
    a, b, scale, _ = leaves
    equal = equal_rows().double()
    target = equal / equal.sum(1, keepdim=True) * 0.8 + 0.2 / ROWS
    logits = scale * a @ b.T
    theirs = -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum(1).mean() / 2
    assert_same(info_nce(a, b, scale, items=ITEMS, smoothing=0.2, chunk=chunk)[0], theirs, (a, b, scale))


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_equal_pairs_are_positives_of_siglip(leaves, chunk):
    a, b, scale, bias = leaves
    z = 2 * equal_rows().double() - 1
    theirs = -(1 / (1 + (-z * (scale * a @ b.T + bias)).exp())).log().sum() / ROWS
    assert_same(sigmoid_pairs(*leaves, items=ITEMS, chunk=chunk)[0], theirs, leaves)


def test_without_equal_items_nothing_changes(leaves):
    a, b, scale, _ = leaves
    apart = torch.arange(2 * ROWS).view(ROWS, 2)
    for plain, itemised in (
        (info_nce(a, b, scale), info_nce(a, b, scale, items=apart)),
        (sigmoid_pairs(*leaves), sigmoid_pairs(*leaves, items=apart)),
    ):
        torch.testing.assert_close(plain, itemised)


@pytest.mark.parametrize("chunk", [None, 2])
def test_accuracies_count_both_directions(chunk):
    a = torch.eye(3, dtype=torch.float64)
    b = torch.tensor([[1.0, 0, 0], [0.9, 0.8, 0], [0, 0, 1.0]], dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    for _, a_to_b, b_to_a in (info_nce(a, b, one, chunk=chunk), sigmoid_pairs(a, b, one, -one, chunk=chunk)):
        assert a_to_b == 1
        assert math.isclose(b_to_a, 2 / 3)


@pytest.mark.quick(1)
@pytest.mark.parametrize("chunk", [None, 4])
def test_guessing_scores_one_in_b_whatever_is_equal(chunk):
    """Random guesses: the mean of many is 1/B, though some rows have three right answers."""
    one = torch.ones((), dtype=torch.float64)
    torch.manual_seed(0)
    scores = []
    for _ in range(400):
        a, b = torch.randn(2, ROWS, WIDTH, dtype=torch.float64)
        scores += [*info_nce(a, b, one, items=ITEMS, chunk=chunk)[1:], *sigmoid_pairs(a, b, one, one, items=ITEMS)[1:]]
    assert torch.stack(scores).mean().item() == pytest.approx(1 / ROWS, abs=0.005)
    # Who finds an equal item finds its share of the pairs.
    z = torch.eye(ROWS, dtype=torch.float64)[[0, 1, 2, 0, 4, 4, 6, 0, 8, 9]]
    expected = (1 / equal_rows().sum(1)).mean().item()
    _, a_to_b, b_to_a = info_nce(z, z, one, items=ITEMS, chunk=chunk)
    assert a_to_b.item() == b_to_a.item() == pytest.approx(expected)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.parametrize("form", ["clip", "unicl", "siglip"])
def test_in_chunks_nothing_of_the_whole_matrix_is_made_or_kept(form):
    rows, chunk = 256, 16
    a, b = (torch.randn(rows, WIDTH).requires_grad_() for _ in range(2))
    scale = torch.ones((), requires_grad=True)
    items = torch.arange(rows).remainder(100)[:, None] if form == "unicl" else None

    def elements(chunk: int | None) -> tuple[int, int]:
        """Of the largest tensor that is made, and of all that wait for the backward pass."""
        kept = {}

        def keep(value):
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes() // 4
            return value

        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            if form == "siglip":
                loss = sigmoid_pairs(a, b, scale, scale - 2, chunk=chunk)[0]
            else:
                loss = info_nce(a, b, scale, items=items, chunk=chunk)[0]
            loss.backward()
        return largest.elements, sum(kept.values())

    made, kept = elements(None)
    assert made == rows * rows
    assert kept > rows * rows
    made, kept = elements(chunk)
    assert made == chunk * rows
    assert kept < 4 * rows * WIDTH < rows * rows


def test_fingerprints_are_those_of_the_bytes():
    torch.manual_seed(0)
    for x in (
        torch.randint(0, 256, (300, 3, 5, 7), dtype=torch.uint8),
        torch.randint(0, 30, (300, 9)),
        torch.randn(300, 11),
        torch.rand(300, 20) < 0.5,
    ):
        found = fingerprint(x)
        assert found.dtype == torch.int64
        assert len(found.unique()) == len(x.unique(dim=0)) == 300
        order = torch.randperm(300)
        assert torch.equal(fingerprint(x[order]), found[order])
        assert torch.equal(fingerprint(x[7:9]), found[7:9])


def test_fingerprints_tell_apart_what_differs_little():
    """Rows that differ in one byte, in a high bit alone, or in the order of their words."""
    pictures = torch.zeros(1 + 8 * 192, 192, dtype=torch.uint8)
    for place in range(192):
        for bit in range(8):
            pictures[1 + 8 * place + bit, place] = 1 << bit
    assert len(fingerprint(pictures).unique()) == len(pictures)
    two = torch.cartesian_prod(torch.arange(64), torch.arange(64)) << 58
    assert len(fingerprint(two).unique()) == len(two)
    words = torch.stack([torch.randperm(12) for _ in range(500)])
    assert len(fingerprint(words).unique()) == len(words.unique(dim=0))
