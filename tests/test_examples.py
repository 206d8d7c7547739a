"""The examples train: the loss falls in a few steps. The Gaussian process has the likelihood of the dense process."""

from copy import deepcopy

import pytest
import torch
from torch.distributions import MultivariateNormal

from examples import evidence, influence, pinn
from examples.cosmos import Cosmos
from examples.digits import digits, network, train
from examples.gaussian_process import Process
from examples.kl_shampoo import KLShampoo
from examples.projection import ProjectedAdam
from examples.shampoo import Shampoo
from examples.soap import LowRankSOAP
from oracles import gaussian

OPTIMIZERS = [(Shampoo, 1.0), (ProjectedAdam, 0.01), (LowRankSOAP, 0.01), (Cosmos, 0.01), (KLShampoo, 0.01)]


@pytest.mark.parametrize(("kind", "rate"), OPTIMIZERS)
def test_an_optimizer_on_tracked_factors_trains(kind, rate):
    model = network()
    losses = list(train(model, kind(model.parameters(), lr=rate), 15))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("kind", "rate"), OPTIMIZERS[2:])
def test_an_optimizer_that_is_loaded_again_goes_on_to_the_bit(kind, rate):
    model = network()
    optimizer = kind(model.parameters(), lr=rate, rank=4)
    list(train(model, optimizer, 3))
    other = deepcopy(model)
    loaded = kind(other.parameters(), lr=rate, rank=4)
    loaded.load_state_dict(deepcopy(optimizer.state_dict()))
    assert list(train(model, optimizer, 2)) == list(train(other, loaded, 2))


@pytest.mark.filterwarnings("ignore:KFAC")
def test_influence_finds_wrong_labels():
    losses, share = influence.train(20)
    assert losses[-1] < 0.5 * losses[0]
    assert share > 3 * influence.WRONG


def test_evidence_is_against_too_strong_a_prior():
    inputs, labels = (part[:100] for part in digits())
    weak, strong = (
        evidence.evidence_of(evidence.train(inputs, labels, precision, 20), inputs, labels, precision)
        for precision in (1.0, 1000.0)
    )
    assert weak > strong


@pytest.mark.parametrize("name", pinn.PROBLEMS)
def test_more_steps_solve_an_equation_better(name):
    errors = [pinn.train(pinn.PROBLEMS[name], "K-FAC", steps)[0] for steps in (1, 8)]
    assert errors[1] < 0.5 * errors[0]


def test_likelihood_and_gradient_equal_those_of_the_dense_covariance():
    """The dense covariance is F Fᵀ + diag(δ) + σ²I. Its diagonal is the kernel's, plus σ²."""
    inputs, targets = gaussian(30, 2, seed=1), gaussian(30, seed=2)
    process = Process(inputs, 6)
    root, diagonal = process.root(inputs), (process.log_signal.exp() + process.log_noise.exp()).expand(30)
    covariance = (root @ root.mT).diagonal_scatter(diagonal)
    expected = MultivariateNormal(torch.zeros_like(targets), covariance).log_prob(targets)
    likelihood, parameters = process.log_likelihood(inputs, targets), [*process.parameters()]
    torch.testing.assert_close(likelihood, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(value, parameters) for value in (likelihood, expected)))
