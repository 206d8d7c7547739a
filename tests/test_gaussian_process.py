"""The likelihood of the Gaussian process of the examples against SciPy's, and its gradient against differences."""

from __future__ import annotations

from scipy.stats import multivariate_normal
from torch import Tensor

from examples.gaussian_process import Process
from oracles import gaussian

INPUTS, TARGETS = gaussian(30, 2, seed=1), gaussian(30, seed=2)


def scipy_likelihood(process: Process) -> float:
    """Return the density of the dense covariance F Fᵀ + diag(δ) + σ²I, which has the kernel's own diagonal."""
    root = process.root(INPUTS).detach()
    dense = root @ root.mT
    dense.diagonal().copy_((process.log_signal.exp() + process.log_noise.exp()).detach().expand(30))
    return float(multivariate_normal.logpdf(TARGETS.numpy(), cov=dense.numpy()))


def test_likelihood_and_gradient_are_those_of_the_dense_covariance() -> None:
    process = Process(INPUTS, 6)
    likelihood = process.log_likelihood(INPUTS, TARGETS)
    likelihood.backward()
    assert abs(likelihood.item() - scipy_likelihood(process)) <= 1e-9
    step = 1e-5
    for parameter in process.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad
        assert isinstance(gradient, Tensor)
        for index, slope in enumerate(gradient.view(-1).tolist()):
            ends = []
            for sign in (1, -1):
                flat[index] += sign * step
                ends.append(scipy_likelihood(process))
                flat[index] -= sign * step
            assert abs((ends[0] - ends[1]) / (2 * step) - slope) <= 1e-6 * max(1, abs(slope))
