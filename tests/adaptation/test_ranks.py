"""Ranks: equal to the published evaluators' formulas, ties, chance, chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmssl.adaptation.ranks import Relation, by_vectors, rank
from mmssl.errors import RunError

KS = (1, 2, 5, 10)


def similarities(queries: int, gallery: int, seed: int = 0) -> torch.Tensor:
    """Distinct scores, so that no rule for ties is asked for."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(queries * gallery, generator=generator).view(queries, gallery).float()


def ranked(scores: torch.Tensor, relation: Relation, **more):
    return rank(lambda start, stop: scores[start:stop], relation, **more)


def one_to_one(rows: int) -> Relation:
    index = torch.arange(rows)
    return Relation.of_rows(index, index, index)


def captions(images: int, each: int) -> Relation:
    """Of image `i` the texts `each * i` and so on."""
    text = torch.arange(images * each)
    return Relation.of_rows(text // each, text, text)


def test_pairs_equal_mil_nce_compute_metrics():
    scores = similarities(50, 50)
    x = scores.numpy()
    # Miech et al.: the place of the diagonal's value in each sorted row.
    place = np.where(np.sort(-x, axis=1) - np.diag(-x)[:, None] == 0)[1]
    found = ranked(scores, one_to_one(50))
    for k in KS:
        assert found.recall(k) == pytest.approx(np.sum(place < k) / len(place))
    assert found.median == np.median(place) + 1


@pytest.mark.parametrize("each", [1, 5])
def test_several_captions_equal_big_vision(each):
    images = 12
    scores = similarities(images, images * each, seed=each)
    distance, owner = -scores.numpy(), np.arange(images * each) // each
    there, back = ranked(scores, captions(images, each)), ranked(scores.T, captions(images, each).transposed())
    nearest_images, nearest_texts = distance.argsort(axis=0), distance.argsort(axis=1)
    for k in KS:
        text_to_image = (nearest_images[:k] == owner[None]).any(axis=0).mean()
        image_to_text = (owner[nearest_texts[:, :k]] == np.arange(images)[:, None]).any(axis=1).mean()
        assert back.recall(k) == pytest.approx(text_to_image)
        assert there.recall(k) == pytest.approx(image_to_text)


def test_any_relation_equals_clip_benchmark():
    generator = torch.Generator().manual_seed(3)
    items, texts, groups = 20, 30, 8
    # Items of several groups: every item has one of its own first, so that each has an answer.
    a = torch.cat([torch.arange(items), torch.randint(0, items, (60,), generator=generator)])
    b = torch.cat([torch.randint(0, texts, (items,), generator=generator), torch.arange(texts), torch.arange(texts)])
    group = torch.cat([torch.arange(items), groups + torch.randint(0, groups, (60,), generator=generator)])
    relation = Relation.of_rows(a, b, group)
    positive = torch.zeros(items, texts, dtype=torch.bool)
    for i in range(len(a)):
        for j in range(len(b)):
            positive[a[i], b[j]] |= group[i] == group[j]
    assert torch.equal(relation.right(0, items), positive)
    assert positive.sum(1).unique().numel() > 3
    scores = similarities(items, texts)
    found = ranked(scores, relation)
    for k in KS:
        onehot = F.one_hot(scores.topk(k, dim=1).indices, texts)
        true_positives = (onehot * positive[:, None]).sum((1, 2))
        recall = true_positives / positive.sum(1)
        assert found.recall(k) == pytest.approx((recall > 0).double().mean().item())


def test_chunks_change_nothing():
    generator = torch.Generator().manual_seed(1)
    queries, gallery = torch.randn(37, 6, generator=generator), torch.randn(74, 6, generator=generator)
    gallery[1::2] = gallery[::2]  # every item twice: ties everywhere
    relation = captions(37, 2)
    whole = rank(by_vectors(queries, gallery), relation)
    for cells in (1, 74, 75, 1000):
        assert torch.equal(rank(by_vectors(queries, gallery), relation, cells=cells).rank, whole.rank)


def test_memory_is_bounded_by_cells():
    asked = []
    scores = similarities(40, 40)

    def score(start: int, stop: int) -> torch.Tensor:
        asked.append(stop - start)
        return scores[start:stop]

    rank(score, one_to_one(40), cells=400)
    assert asked == [10] * 4


@pytest.mark.parametrize("cells", [1, 1000], ids=["row by row", "in chunks"])
@pytest.mark.parametrize(("rows", "width"), [(7, 100), (7, 512), (37, 3), (129, 64)])
def test_a_constant_model_gets_nothing(rows, width, cells):
    vector = F.normalize(torch.randn(1, width, generator=torch.Generator().manual_seed(rows)), dim=1)
    same = vector.expand(rows, -1).clone()
    # In single precision equal products differ by the place at which they stand, row by row at these sizes.
    found = rank(by_vectors(same, same), one_to_one(rows), cells=cells)
    assert (found.rank == rows).all()
    assert found.recall(rows - 1) == 0
    # Right items are not in each other's way.
    assert (rank(by_vectors(same, same.repeat_interleave(3, 0)), captions(rows, 3)).rank == 3 * rows - 2).all()


def test_chance_is_that_of_a_random_order():
    relation = captions(10, 4)
    found = ranked(similarities(10, 40), relation)
    generator = torch.Generator().manual_seed(0)
    draws = [ranked(torch.rand(10, 40, generator=generator), relation) for _ in range(400)]
    for k in KS:
        assert found.chance()[k - 1].item() == pytest.approx(np.mean([d.recall(k) for d in draws]), abs=0.03)
        missed = math.comb(36, k) / math.comb(40, k)
        assert found.chance()[k - 1].item() == pytest.approx(1 - missed)
    assert found.chance()[-1] == 1


def test_candidates_are_ordered_anew_and_the_others_stay_behind():
    scores = torch.tensor([[9.0, 8, 7, 6, 5], [9.0, 8, 7, 6, 5], [9.0, 8, 7, 6, 5]])
    relation = Relation.of_rows(torch.arange(3), torch.tensor([2, 4, 0]), torch.arange(3))
    # The gallery has 5 items, of which two are right for nobody: the relation has to know them.
    assert relation.b.shape[0] == 5
    logits = torch.tensor([[0.0, 1, 5, 9, 9], [0.0, 1, 5, 9, 9], [5.0, 5, 1, 9, 9]])
    found = rank(lambda s, e: scores[s:e], relation, match=lambda q, i: logits[q, i], top=3)
    assert found.rank.tolist() == [1, 5, 2]  # moved up; not among the candidates; a tie, which counts against it
    assert rank(lambda s, e: scores[s:e], relation, match=lambda q, i: logits[q, i], top=0).rank.tolist() == [3, 5, 1]
    whole = rank(lambda s, e: scores[s:e], relation, match=lambda q, i: logits[q, i], top=99)
    assert torch.equal(whole.rank, ranked(logits, relation).rank)


def test_among_equal_scores_wrong_items_are_candidates_first():
    scores, logits = torch.zeros(1, 4), torch.tensor([[9.0, 1, 1, 1]])
    relation = Relation.of_rows(torch.tensor([0]), torch.tensor([0]), torch.tensor([0]))
    relation = Relation(relation.a, type(relation.b)(([1.0], ([0], [0])), shape=(4, 1)))
    found = rank(lambda s, e: scores[s:e], relation, match=lambda q, i: logits[q, i], top=3)
    assert found.rank.tolist() == [4]


def test_not_a_number_is_an_error_and_no_hit():
    scores = similarities(4, 4)
    scores[1, 2] = torch.nan
    with pytest.raises(RunError, match="not finite"):
        ranked(scores, one_to_one(4))
    logits = similarities(4, 4) / 0
    with pytest.raises(RunError, match="not finite"):
        ranked(similarities(4, 4), one_to_one(4), match=lambda q, i: logits[q, i], top=2)


def test_a_query_without_an_answer_is_named():
    relation = Relation.of_rows(torch.tensor([0, 2]), torch.tensor([0, 1]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="query 1 has no right item"):
        ranked(similarities(3, 2), relation)


def test_parts_share_nothing():
    # Items 0 and 1 have text 0 in common; item 2 has a group with item 3.
    relation = Relation.of_rows(
        torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 2, 2, 3])
    )
    assert relation.parts().tolist() == [0, 0, 1, 1, 2]
