"""The evidence of a model by Laplace's approximation, from the factors of a preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from brandla import LowRankEigh, _check, checked, damped_logdet, kron_damped_logdet
from brandla.damped import LowRank
from brandla.kfac.capture.layer import Layer
from brandla.kfac.preconditioner import KFAC
from brandla.kfac.systems.ekfac import EigenvalueCorrected
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.factor import Factor
from brandla.kfac.systems.form import DenseForm, Diagonal
from brandla.kfac.systems.kronecker import Kronecker

_SUPPORTED = "Exact, EKFAC, Randomized, Brand, BrandRandomized or BrandCorrected"


def evidence(
    preconditioner: KFAC, log_likelihood: Tensor | float, prior_precision: Tensor | float, terms: int
) -> Tensor:
    """Return the log marginal likelihood of the layers' weights W under a prior N(0, I/δ), by Laplace's approximation.

    log p ≈ log-likelihood − ½ Σ (log det(N A ⊗ G + δI) − p log δ) − ½ Σ δ ‖W‖², with sums over layers of p parameters.
    It is differentiable in δ and in the log-likelihood; N A ⊗ G is constant. `brandla.kron_damped_logdet` computes the
    determinants in float64, for `EKFAC` with its fitted values. Eigenvalues that a low-rank factor leaves out count as
    the strategy's tail: 0, unless you choose ``tail="mean"`` or another tail.

    Parameters
    ----------
    preconditioner
        It needs factors of the whole data set at W: `decay` near 1, ``curvature="type-2"`` or ``"monte-carlo"``, and a
        pass over the data without steps of the optimizer.
    log_likelihood
        Σ log p(y | x, W) over the data set, a number or a scalar tensor. The loss must be −1/N times this value, as
        cross-entropy is. The mean square is for noise of variance ½ (then add − N/2 log π, for one output).
    prior_precision
        δ > 0: one for all layers, shape (), or one per layer in the order of `KFAC.report`, shape (L,).
    terms
        N, the number of terms of the loss in the data set: samples, times positions if each position has a term.

    Returns
    -------
    Tensor
        A scalar, in float64.

    Raises
    ------
    ValueError, TypeError
        For layers without data, strategies whose curvature has no such eigenvalues, and values out of range.

    Notes
    -----
    Parameters that are not preconditioned do not count. Nothing is read back.

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
    of_layers = torch.empty(len(layers), 0, 0, dtype=torch.float64, device=device)
    prior_precision = _check.scalar(
        "evidence", "prior_precision", prior_precision, "the layers", of_layers, positive=True
    )
    precision = torch.as_tensor(prior_precision, dtype=torch.float64, device=device).expand(len(layers))
    total = torch.as_tensor(log_likelihood, dtype=torch.float64, device=device)
    # Factors may have been kept in less than float64, so they may fail the checks of `checked` for float64.
    with preconditioner._replicas.complete(), checked(False):
        for layer, of_layer in zip(layers, precision, strict=True):
            weights, damping = layer.parameters().to(torch.float64), of_layer / terms
            # log det(N M + δI) − p log δ. Both terms contain p log N, which cancels.
            gained = _logdet(layer, damping) - weights.numel() * damping.log()
            total = total - 0.5 * gained - 0.5 * of_layer * weights.square().sum()
    return total


def _logdet(layer: Layer, damping: Tensor) -> Tensor:
    """Return log det(A ⊗ G + λI) of a layer's curvature, in float64."""
    curvature = layer.curvature
    if not curvature.started:
        _check.fail_value("evidence", f"{layer.name} must have data; take steps of KFAC over the data set first")
    factors = dict(curvature.factors())
    if isinstance(curvature, Kronecker) and layer.shape.single and factors:
        return damped_logdet(_operand(factors["input"]), damping, tail=factors["input"].form.tail).sum()
    if not isinstance(curvature, (Kronecker, EigenvalueCorrected)) or len(factors) < 2:
        rule = f"{layer.name}: the strategy must be {_SUPPORTED}, whose curvature is a Kronecker product"
        _check.fail_type("evidence", f"{rule}; got {layer.strategy}")
    left, right, fitted = factors["output"], factors["input"], None
    if isinstance(curvature, EigenvalueCorrected):
        fitted = (curvature.sums / right.state["total"]).to(torch.float64)
    operands, (left_tail, right_tail) = (_operand(left), _operand(right)), (left.form.tail, right.form.tail)
    return kron_damped_logdet(*operands, damping, left_tail=left_tail, right_tail=right_tail, values=fitted).sum()


def _operand(factor: Factor) -> LowRank:
    """Return M in float64: a diagonal factor as a batch of order 1, and a dense factor decomposed as by `Exact`."""
    form, operand = factor.form, factor.operand()
    if isinstance(form, Diagonal):
        frequencies = (factor.state["diagonal"] / factor.state["total"])[..., None]
        operand = LowRankEigh(frequencies, torch.ones_like(frequencies)[..., None])
    elif operand is None and isinstance(form, DenseForm):
        operand = Exact().decompose(form.average(factor.state))
    assert operand is not None
    return operand.to(torch.float64)
