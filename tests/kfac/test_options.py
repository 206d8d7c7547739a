"""What is refused: options of the preconditioner, of every strategy, and models that there is nothing to do for."""

import re

import pytest
import torch
from torch import nn

from brandla import Rank
from brandla.kfac import (
    EKFAC,
    KBFGS,
    KFAC,
    PINN,
    Adaptive,
    Brand,
    BrandCorrected,
    BrandRandomized,
    ConjugateGradient,
    ErrorBound,
    Exact,
    Foof,
    InverseFree,
    Randomized,
    TwoLevel,
    Woodbury,
    forward_laplacian,
    register,
)
from brandla.kfac.systems.structures import BlockDiagonal, Hierarchical
from kfac.networks import OwnLinear, batch, layer_step, mlp

MODEL = mlp(10, 20, 4)
TANH = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
TWICE = nn.ModuleDict(dict.fromkeys("ab", MODEL[0]))


# With a value of the right kind that is out of range, and of another kind; … stands for whatever is between.
VALUES = [
    (lambda: KFAC(MODEL, damping=0.0), "KFAC: damping must be finite and > 0; got 0.0"),
    (lambda: KFAC(MODEL, clip=0.0), "clip must be finite and > 0, or None; got 0.0"),
    (lambda: KFAC(MODEL, decay=1.0), "decay must be in [0, 1); got 1.0"),
    (lambda: KFAC(MODEL, factor_every=0), "factor_every must be at least 1; got 0"),
    (lambda: KFAC(MODEL, sharing="share"), "sharing must be 'expand' or 'reduce'; got 'share'"),
    (lambda: KFAC(MODEL, sharing=lambda name, module: None), "sharing must be 'expand' or 'reduce'; got None"),
    (lambda: KFAC(MODEL, sharing={"nowhere": "reduce"}), "it has no module 'nowhere'"),
    (lambda: KFAC(MODEL, damping_scale="log"), "damping_scale must be 'relative' or 'absolute'; got 'log'"),
    (lambda: KFAC(MODEL, application="linear"), "application must be 'auto' or 'two-sided'; got 'linear'"),
    (lambda: KFAC(MODEL, curvature="exact"), "curvature must be 'empirical' or 'monte-carlo' or 'type-2'; got 'exact'"),
    (lambda: KFAC(MODEL, gradient="none"), "KFAC: gradient must be 'autograd' or 'pair'; got 'none'"),
    (lambda: KFAC(MODEL, distributed="ring"), "distributed must be 'gather' or 'split'"),
    (lambda: KFAC(MODEL, columns=0), "columns must be"),
    (lambda: KFAC(MODEL, batch_first="time"), "batch_first must be True, False or None; got 'time'"),
    (lambda: KFAC(mlp(3, 3)).mask(torch.ones(3)), "KFAC.mask: valid must be a tensor (samples, positions)"),
    (
        lambda: KFAC(mlp(3, 3)).graphs(torch.rand(2, 2)).__enter__(),
        "KFAC.graphs: index must be a vector of integers, one for each row; got float32 of shape (2, 2)",
    ),
    (lambda: register(OwnLinear, like="scale"), "like, for OwnLinear, must be 'linear' or 'transposed'; got 'scale'"),
    (lambda: register(nn.GRU, like="linear"), "register: like, for GRU, must be "),
    (lambda: Brand(0), "Brand: rank must be at least 1; got 0"),
    (lambda: Brand(lambda step: 0), "Brand: rank must be at least 1; got 0"),
    (lambda: Brand(4, form="sym"), "Brand: form must be 'root' or 'eigh'; got 'sym'"),
    (lambda: Brand(4, compress="qr"), "Brand: compress must be 'auto' or 'eigh' or 'cholesky'; got 'qr'"),
    (lambda: Brand(4, form="eigh", compress="cholesky"), "Brand: compress must be 'eigh' or 'auto' for form='eigh'"),
    (lambda: Brand(4, tail="largest"), "Brand: tail must be a number >= 0, 'mean' or 'smallest'; got 'largest'"),
    (lambda: Brand(8, sketch=0), "Brand: sketch must be at least 1; got 0"),
    (lambda: ErrorBound(0.0, 1, 2), "ErrorBound: target must be finite and > 0; got 0.0"),
    (lambda: ErrorBound(0.1, 0, 2), "ErrorBound: least must be at least 1; got 0"),
    (lambda: ErrorBound(0.1, 4, 2), "ErrorBound: most must be at least 4; got 2"),
    (lambda: ErrorBound(0.1, 1, 2, every=0), "ErrorBound: every must be at least 1; got 0"),
    (lambda: Exact(inverse_every=0), "Exact: inverse_every must be at least 1; got 0"),
    (lambda: Exact(inverse_every=lambda step: 0), "Exact: inverse_every must be at least 1; got 0"),
    (lambda: Exact(method="qr"), "Exact: method must be 'eigh' or 'cholesky'; got 'qr'"),
    (lambda: Exact(method="cholesky", tail="smallest"), "Exact: tail has no meaning for method='cholesky'"),
    (lambda: Exact(method="cholesky", tail=0.1), "leaves no eigenvalue out; got 0.1"),
    (lambda: Randomized(4, method="qr"), "Randomized: method must be 'svd' or 'eigh'; got 'qr'"),
    (lambda: Randomized(4, oversample=-1), "Randomized: oversample must be at least 0; got -1"),
    (lambda: BrandRandomized(4, overwrite_every=0), "BrandRandomized: overwrite_every must be at least 1"),
    (lambda: BrandCorrected(4, fraction=0.0), "BrandCorrected: fraction must be in (0, 1]; got 0.0"),
    (lambda: ConjugateGradient(iterations=0), "ConjugateGradient: iterations must be at least 1; got 0"),
    (lambda: ConjugateGradient(batches=0), "ConjugateGradient: batches must be at least 1; got 0"),
    (lambda: InverseFree("banded"), "InverseFree: structure must be one of 'dense', 'diagonal'"),
    (lambda: InverseFree(variant="kfac"), "variant must be 'singd' or 'ikfac'; got 'kfac'"),
    (lambda: InverseFree(rate=0.0), "rate must be finite and > 0; got 0.0"),
    (lambda: InverseFree(momentum=1.0), "momentum must be in [0, 1); got 1.0"),
    (lambda: InverseFree(preconditioner_every=0), "preconditioner_every must be at least 1"),
    (lambda: KBFGS(average=1.0), "KBFGS: average must be in [0, 1); got 1.0"),
    (lambda: KBFGS(curved=0.0), "KBFGS: curved must be in (0, 1); got 0.0"),
    (lambda: Woodbury(every=0), "Woodbury: every must be at least 1; got 0"),
    (lambda: Woodbury(features=0), "Woodbury: features must be at least 1; got 0"),
    (lambda: TwoLevel(Exact(), "krylov"), "TwoLevel: space must be 'nicolaides' or 'residual'; got 'krylov'"),
    (lambda: BlockDiagonal(0), "BlockDiagonal: block must be at least 1"),
    (lambda: Hierarchical(-1), "Hierarchical: first must be at least 0"),
    (lambda: Hierarchical(1, -2), "Hierarchical: last must be at least 0"),
    (lambda: Adaptive(every=0), "Adaptive: every must be at least 1; got 0"),
    (lambda: Adaptive(factor=1.0), "Adaptive: factor must be in (0, 1); got 1.0"),
    (lambda: Adaptive(0.0), "Adaptive: 0 < least <= initial <= most < inf must hold; got 1e-08, 0.0 and"),
    (lambda: KFAC(nn.DataParallel(mlp(10, 20, 4))), "KFAC: the model must not be in nn.DataParallel; use"),
    (lambda: KFAC(TWICE, {"b": Exact()}), "inverse must name modules of the model; 'b' is 'a': use that name"),
    (
        lambda: KFAC(nn.Sequential(nn.PReLU(), nn.ReLU())),
        "the model must have an nn.Linear… PReLU, ReLU, Sequential; name",
    ),
    (lambda: PINN(TANH, damping=0), "PINN: damping must be finite and > 0; got 0"),
]
KINDS = [
    (lambda: KFAC(MODEL, factor_every=1.5), "factor_every must be an int; got float 1.5"),
    (lambda: KFAC(MODEL, inverse="brand"), "inverse must be a strategy such as Brand(rank=128), or None; got str"),
    (lambda: KFAC(MODEL, inverse=lambda name, module: "brand"), "inverse must be a strategy"),
    (lambda: KFAC(MODEL, Brand), "Brand(rank=128), or None; got the class Brand; construct it"),
    (lambda: register(nn.Linear(2, 2), like="linear"), "register: module must be a type of modules, such as MyLinear"),
    (lambda: Brand(2.5), "Brand: rank must be an int; got float 2.5"),
    (lambda: BrandRandomized(ErrorBound(0.1, 1, 2)), "BrandRandomized: rank must be an int"),
    (lambda: Randomized(Rank(4, 0.1)), "Randomized: rank must be an int; got Rank"),
    (lambda: InverseFree(3), "InverseFree: structure must be a name or a Structure; got int"),
    (lambda: TwoLevel("exact"), "TwoLevel: inner must be a strategy such as Brand(rank=128); got str"),
    (lambda: Foof(Exact), "Foof: inner must be a strategy of factors such as Brand(rank=128); got Exact"),
    (lambda: Foof(EKFAC()), "got EKFAC"),
    (lambda: Foof(InverseFree()), "got InverseFree"),
    (lambda: KFAC(MODEL.parameters()), "KFAC: model must be an nn.Module; got generator; pass the model itself"),
    (lambda: KFAC(torch.optim.SGD(MODEL.parameters())), "KFAC: model must be an nn.Module; got SGD; pass the"),
    (lambda: PINN(MODEL), "PINN: model must be nn.Sequential of nn.Linear and Tanh, …; it has ReLU"),
    (lambda: PINN(TANH, EKFAC()), "PINN: inverse must be None or a strategy of factors …; got EKFAC"),
    (lambda: forward_laplacian(MODEL[0], torch.ones(3, 10)), "forward_laplacian: model must be nn.Sequential "),
]


@pytest.mark.parametrize(
    ("make", "message", "error"), [*((*own, ValueError) for own in VALUES), *((*own, TypeError) for own in KINDS)]
)
def test_bad_values_and_kinds_are_refused(make, message, error):
    with pytest.raises(error, match=re.escape(message).replace("…", ".*")):
        make()


def test_a_schedule_that_leaves_its_range_says_so():
    layer = mlp(10, 4)[0]
    preconditioner = KFAC(layer, Exact(), damping=lambda step: 1.0 - step)
    with pytest.raises(ValueError, match=re.escape("KFAC: damping must be finite and > 0; got 0.0")):
        layer_step(layer, preconditioner, batch(8, 10, 4))
