"""Cosines of gradients, and the pair that the closing line names."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmssl.audit.conflicts import fiercest
from mmssl.audit.verdict import closing_lines
from mmssl.objectives.base import Chance
from mmssl.ops.conflicts import compare
from mmssl.report.figures import draw_conflicts


def test_cosine_is_over_what_both_train_and_share_over_everything():
    torch.manual_seed(0)
    shared = {name: (torch.randn(3, 4), torch.randn(5)) for name in "ab"}
    gradients = {
        "a": {"image.w": shared["a"][0], "image.b": shared["a"][1]},
        "b": {"image.b": shared["b"][1], "image.w": shared["b"][0], "text.w": 7 * torch.ones(9)},
        "c": {"text.w": torch.arange(9.0)},
        "d": {"audio.w": torch.ones(2)},
    }
    found = compare(gradients)
    flat = {name: torch.cat([part.flatten() for part in parts]) for name, parts in shared.items()}
    torch.testing.assert_close(found["conflict/a_b"], F.cosine_similarity(flat["a"], flat["b"], 0))
    torch.testing.assert_close(found["conflict/b_c"], F.cosine_similarity(torch.ones(9), torch.arange(9.0), 0))
    norms = [
        flat["a"].norm(),
        (flat["b"].norm() ** 2 + 7**2 * 9).sqrt(),
        torch.arange(9.0).norm(),
        torch.ones(2).norm(),
    ]
    for name, norm in zip("abcd", norms, strict=True):
        torch.testing.assert_close(found[f"gradient_share/{name}"], norm / sum(norms))
    assert len(found) == 6


def test_a_gradient_of_nothing_has_no_cosine():
    found = compare({"a": {"w": torch.ones(3)}, "b": {"w": torch.zeros(3)}, "c": {"w": -torch.ones(3)}})
    assert found.keys() == {"gradient_share/a", "gradient_share/b", "gradient_share/c", "conflict/a_c"}
    assert found["conflict/a_c"] == pytest.approx(-1)


def history(**cosines: list[float]) -> list[dict]:
    return [
        {"step": 5 * i, "loss": 1.0, "gradient_share/a": 0.5, "gradient_share/b_c": 0.3, "gradient_share/d": 0.2}
        | {f"conflict/{pair}": value for pair, value in zip(cosines, values, strict=True)}
        for i, values in enumerate(zip(*cosines.values(), strict=True), 1)
    ]


def test_the_line_names_the_lowest_pair_with_its_interval():
    noise = [0.1 * (-1) ** i for i in range(16)]
    line = fiercest(history(a_b_c=[-0.2 + x for x in noise], a_d=[0.3] * 16))
    margin = 2.49 * 0.1033 / 4  # Student's t of 1.25 % on either side at 15 degrees of freedom; two pairs
    assert line == (
        f"a and b_c pull against each other: mean cosine of their gradients -0.200 "
        f"(95% interval {-0.2 - margin:.3f} to {-0.2 + margin:.3f}, 16 measurements)"
    )
    assert "a and b_c agree least: mean cosine" in fiercest(history(a_b_c=noise, a_d=[0.3] * 16))
    assert "a and d agree least, and pull the same way" in fiercest(history(a_b_c=[0.9] * 4, a_d=[0.8] * 4))
    assert fiercest(history(a_d=[-0.5])) == (
        "a and d are furthest apart: cosine of their gradients -0.500 (1 measurement)"
    )
    assert fiercest([{"step": 1, "loss": 1.0}]) is None
    assert fiercest(history(a_d=[math.nan, 0.25])).endswith("0.250 (1 measurement)")


def test_it_closes_the_run_after_the_verdicts(tmp_path):
    records = history(a_d=[-0.5, -0.4, -0.5])
    assert [line.split(":")[0] for line in closing_lines(records, Chance(2.0), 8)] == ["verdict", "conflict"]
    assert draw_conflicts(records, tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert draw_conflicts([{"step": 1, "loss": 1.0}], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
