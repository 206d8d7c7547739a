"""What is refused: options of the preconditioner, of every strategy, and models that there is nothing to do for."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from brandla import Rank
from brandla.kfac import (
    EKFAC,
    KBFGS,
    KFAC,
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
)
from brandla.kfac.systems.structures import BlockDiagonal, Hierarchical
from kfac.networks import batch, layer_step, mlp

MODEL = mlp(10, 20, 4)
TWICE = nn.ModuleDict(dict.fromkeys("ab", MODEL[0]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": 0.0}, ValueError, "KFAC: damping must be finite and > 0; got 0.0"),
        ({"clip": 0.0}, ValueError, "clip must be finite and > 0, or None; got 0.0"),
        ({"decay": 1.0}, ValueError, "decay must be in [0, 1); got 1.0"),
        ({"factor_every": 0}, ValueError, "factor_every must be at least 1; got 0"),
        ({"factor_every": 1.5}, TypeError, "factor_every must be an int; got float 1.5"),
        ({"sharing": "share"}, ValueError, "sharing must be 'expand' or 'reduce'; got 'share'"),
        ({"sharing": lambda name, module: None}, ValueError, "sharing must be 'expand' or 'reduce'; got None"),
        ({"sharing": {"nowhere": "reduce"}}, ValueError, "it has no module 'nowhere'"),
        ({"damping_scale": "log"}, ValueError, "damping_scale must be 'relative' or 'absolute'; got 'log'"),
        ({"application": "linear"}, ValueError, "application must be 'auto' or 'two-sided'; got 'linear'"),
        ({"curvature": "exact"}, ValueError, "curvature must be 'empirical' or 'monte-carlo' or 'type-2'; got 'exact'"),
        ({"gradient": "none"}, ValueError, "KFAC: gradient must be 'autograd' or 'pair'; got 'none'"),
        ({"distributed": "ring"}, ValueError, "distributed must be 'gather' or 'split'"),
        ({"columns": 0}, ValueError, "columns must be"),
        ({"inverse": "brand"}, TypeError, "inverse must be a strategy such as Brand(rank=128), or None; got str"),
        (
            {"inverse": Brand},
            TypeError,
            "inverse must be a strategy such as Brand(rank=128), or None; got the class Brand; construct it",
        ),
        ({"inverse": lambda name, module: "brand"}, TypeError, "inverse must be a strategy"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=re.escape(message)):
        KFAC(MODEL, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Brand(0), "Brand: rank must be at least 1; got 0"),
        (lambda: Brand(lambda step: 0), "Brand: rank must be at least 1; got 0"),
        (lambda: Brand(4, form="sym"), "Brand: form must be 'root' or 'eigh'; got 'sym'"),
        (lambda: Brand(4, compress="qr"), "Brand: compress must be 'eigh' or 'cholesky'; got 'qr'"),
        (lambda: Brand(4, form="eigh", compress="cholesky"), "Brand: compress must be 'eigh' for form='eigh'"),
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
        (
            lambda: KFAC(TWICE, {"b": Exact()}),
            "inverse must name modules of the model; 'b' is 'a': use that name",
        ),
    ],
)
def test_bad_values_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
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
    ],
)
def test_bad_kinds_are_refused(make: Callable[[], object], message: str):
    with pytest.raises(TypeError, match=re.escape(message)):
        make()


def test_a_model_without_a_known_layer_is_refused():
    with pytest.raises(ValueError, match=r"KFAC: the model must have an nn.Linear.*PReLU.*optimizer alone"):
        KFAC(nn.Sequential(nn.PReLU(), nn.ReLU()), Exact())


def test_a_schedule_that_leaves_its_range_says_so():
    layer = mlp(10, 4)[0]
    preconditioner = KFAC(layer, Exact(), damping=lambda step: 1.0 - step)
    with pytest.raises(ValueError, match=re.escape("KFAC: damping must be finite and > 0; got 0.0")):
        layer_step(layer, preconditioner, batch(8, 10, 4))
