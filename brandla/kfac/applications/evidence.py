"""The evidence of a model by Laplace's approximation, from the factors that a preconditioner keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla import LowRankEigh, _check
from brandla.kfac.capture.layer import Layer
from brandla.kfac.preconditioner import KFAC
from brandla.kfac.systems.ekfac import EigenvalueCorrected
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.form import DenseForm, normalised, tensor
from brandla.kfac.systems.kronecker import Kronecker

_KNOWN = "Exact, EKFAC, Randomized, Brand, BrandRandomized or BrandCorrected"


def evidence(
    preconditioner: KFAC, log_likelihood: Tensor | float, prior_precision: Tensor | float, terms: int
) -> Tensor:
    """Log marginal likelihood of the layers' weights W under a prior N(0, I/δ), by Laplace's approximation.

    log p ≈ log-likelihood − ½ Σ (log det(N A ⊗ G + δI) − p log δ) − ½ Σ δ ‖W‖², the sums over layers of p parameters.
    Differentiable in δ and in the log-likelihood; N A ⊗ G is constant. Its eigenvalues are the products of those of the
    factors, and with `EKFAC` what that fits in their place. Of factors of ranks r and s only r s are formed: the
    p − r s that are left out are taken for 0, and add nothing.

    Parameters
    ----------
    preconditioner
        With factors of the whole data set at W: `decay` near 1 and a pass over the data, ``curvature="type-2"`` or
        ``"monte-carlo"``, and no step of the optimizer on the way.
    log_likelihood
        Σ log p(y | x, W) over the data set, a number or a scalar tensor. The loss has to be its −1/N: cross-entropy is,
        and the mean square is for noise of variance ½ (then − N/2 log π is to be added, for one output).
    prior_precision
        δ > 0: one for all layers, shape (), or one a layer in the order of `KFAC.report`, shape (L,).
    terms
        N, the number of terms of the loss in the data set: samples, times positions where each has a term.

    Returns
    -------
    Tensor
        A scalar, in float64.

    Raises
    ------
    ValueError, TypeError
        For layers without data, for strategies whose curvature has no such eigenvalues, and for values out of range.

    Notes
    -----
    Parameters of the model that are not preconditioned have no part in it. Reads no value back.

    References
    ----------
    A. Immer, M. Bauer, V. Fortuin, G. Rätsch, M. E. Khan, "Scalable marginal likelihood estimation for model selection
    in deep learning", ICML 2021, arXiv 2104.04975.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, Exact, evidence
    >>> model, inputs = torch.nn.Linear(3, 2), torch.randn(8, 3)
    >>> preconditioner = KFAC(model, Exact(), curvature="type-2")
    >>> outputs = model(inputs)
    >>> preconditioner.curvature(outputs, loss="mse")
    >>> torch.nn.functional.mse_loss(outputs, torch.randn(8, 2)).backward()
    >>> preconditioner.step()
    >>> precision = torch.ones((), requires_grad=True)
    >>> evidence(preconditioner, -1.0, precision, terms=8).backward()
    >>> precision.grad.shape
    torch.Size([])
    """
    _check.count("evidence", "terms", terms, 1)
    layers = preconditioner._layers
    device = layers[0].kind.weight.device
    precision = torch.as_tensor(prior_precision, dtype=torch.float64, device=device)
    if precision.shape not in ((), (len(layers),)):
        rule = f"prior_precision must have shape () or (L,) = ({len(layers)},), one a layer"
        _check.fail_value("evidence", f"{rule}; got {tuple(precision.shape)}")
    total = torch.as_tensor(log_likelihood, dtype=torch.float64, device=device)
    with preconditioner._replicas.complete():
        for layer, own in zip(layers, precision.expand(len(layers)), strict=True):
            known = terms * _eigenvalues(layer)
            weights = layer.parameters().to(torch.float64)
            # log det(F + δI) − p log δ: what is left out is 0, and gives nothing.
            total = total - 0.5 * torch.log1p(known / own).sum() - 0.5 * own * weights.square().sum()
    return total


def _eigenvalues(layer: Layer) -> Tensor:
    """Return the eigenvalues of a layer's curvature that are not 0 by construction, of any shape, in float64."""
    curvature = layer.curvature
    if not curvature.started:
        _check.fail_value("evidence", f"{layer.name} must have data; take steps of KFAC over the data set first")
    if isinstance(curvature, EigenvalueCorrected):
        _, input_ = dict(curvature.factors()).values()
        return normalised(input_.state, curvature.sums).to(torch.float64)
    factors = dict(curvature.factors())
    if not isinstance(curvature, Kronecker) or (len(factors) < 2 and not curvature.single):
        rule = f"{layer.name}: the strategy must be {_KNOWN}, whose curvature is a Kronecker product"
        _check.fail_type("evidence", f"{rule}; got {layer.strategy}")
    own = {side: _of_factor(factor) for side, factor in factors.items()}
    if curvature.single:
        return own["input"]
    return own["output"][..., :, None] * own["input"][..., None, :]


def _of_factor(factor: Factor) -> Tensor:
    lowrank = factor.strategy.lowrank(factor.state)
    if isinstance(lowrank, LowRankEigh):
        values = lowrank.eigenvalues
    elif lowrank is not None:
        values = torch.linalg.eigvalsh(lowrank.gram)
    elif isinstance(factor.strategy, DenseForm):
        values = torch.linalg.eigvalsh(factor.strategy.average(factor.state))
    else:
        values = normalised(factor.state, tensor(factor.state, "diagonal"))
    return values.to(torch.float64).clamp_min(0)
