"""Momentum teachers."""

import math

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torchvision.ops import StochasticDepth

from mmssl.modules.teacher import Teacher, cosine_momentum, has_dropout, without_dropout


def student() -> nn.ModuleDict:
    return nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "head": nn.Linear(4, 2)})


def test_a_teacher_follows_and_takes_no_gradient():
    net = student()
    teacher = Teacher(dict(net.items()))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in net.parameters())
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p))
    teacher.follow({"encoder": net["encoder"], "head": net["head"]}, 0.9)
    for name, own in teacher.named_parameters():
        torch.testing.assert_close(own, 0.9 * before[name] + 0.1 * net.get_parameter(name))
    teacher.follow(dict(net.items()), 0.0)
    torch.testing.assert_close(list(teacher.parameters()), list(net.parameters()))


def test_a_teacher_keeps_statistics_of_its_own():
    net = student()
    teacher = Teacher(dict(net.items()))
    teacher["encoder"](torch.randn(8, 3) + 5)
    teacher.follow(dict(net.items()), 0.5)
    assert teacher["encoder"][1].num_batches_tracked == 1
    assert net["encoder"][1].num_batches_tracked == 0


def test_a_schedule_from_start_to_one():
    assert cosine_momentum(0.996, 0) == pytest.approx(0.996)
    assert cosine_momentum(0.996, 1) == 1
    assert cosine_momentum(0.99, 0.5) == pytest.approx(1 - 0.01 * (math.cos(math.pi / 2) + 1) / 2)


@pytest.mark.parametrize("part", [nn.Dropout(0.1), DropPath(0.1), StochasticDepth(0.1, "row")])
def test_dropout_is_found_and_turned_off(part):
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Dropout(0.0), part))
    assert has_dropout(net)
    without_dropout(net)
    assert not has_dropout(net)
    x = torch.randn(50, 3)
    assert torch.equal(net[1].train()(x), x)


def test_a_teacher_begins_as_its_students_with_their_statistics():
    net = student()
    teacher = Teacher(dict(net.items()))
    with torch.no_grad():
        for value in (*net.parameters(), *net.buffers()):
            value.add_(1)
    teacher.begin(1, dict(net.items()))
    assert not any(torch.equal(a, b) for a, b in zip(teacher.parameters(), net.parameters(), strict=True))
    teacher.begin(0, dict(net.items()))
    own, theirs = ((*part.parameters(), *part.buffers()) for part in (teacher, net))
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
