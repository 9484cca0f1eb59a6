"""Logistic regression against scikit-learn's, for two classes and for more."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mmssl.ops.logistic import fit_logistic


def rows(classes: int, count: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(classes)
    y = torch.arange(count) % classes
    centers = torch.randn(classes, 9, generator=generator, dtype=torch.float64)
    return centers[y] + 2 * torch.randn(count, 9, generator=generator, dtype=torch.float64) + 1, y


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("c", [1e-4, 0.1, 100.0])
def test_it_is_scikit_learns(classes, c):
    x, y = rows(classes)
    fit, other = fit_logistic(x, y, c), LogisticRegression(C=c, max_iter=1000).fit(x.numpy(), y.numpy())
    assert fit.converged
    np.testing.assert_allclose(fit.weights[:, :-1], other.coef_, atol=1e-6)
    np.testing.assert_allclose(fit.weights[:, -1], other.intercept_, atol=1e-6)
    np.testing.assert_allclose(fit.chances(x), other.predict_proba(x.numpy()), atol=1e-7)


def test_a_start_changes_the_time_and_not_the_answer():
    x, y = rows(3)
    cold = fit_logistic(x, y, 1.0)
    warm = fit_logistic(x, y, 1.0, start=cold.weights, max_iter=1)
    assert warm.converged
    torch.testing.assert_close(warm.weights, cold.weights, atol=1e-3, rtol=0)
    assert not fit_logistic(x, y, 1.0, max_iter=1).converged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_same():
    x, y = rows(5)
    here, there = fit_logistic(x, y, 0.1), fit_logistic(x.cuda(), y.cuda(), 0.1)
    assert there.weights.is_cuda
    torch.testing.assert_close(there.weights.cpu(), here.weights, atol=1e-6, rtol=0)
