"""K-BFGS: quasi-Newton updates of inverse Kronecker factors, from two passes of each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from brandla import _check
from brandla._small import largest_eigenvalue
from brandla.kfac.systems.exact import Exact
from brandla.kfac.systems.form import State
from brandla.kfac.systems.kronecker import Kronecker
from brandla.kfac.systems.strategy import Curvature, Problem, StateCurvature, Strategy
from brandla.kfac.values import Damping, Gradient, Now, Rows, Shape, Side, dense
from brandla_kernels import gram_ema_


@dataclass(frozen=True)
class KBFGS(Strategy):
    """K-BFGS: step H_G ∂W H_A with BFGS updates of H_A ≈ (A + λI)⁻¹ and of H_G, the inverse Hessian in the outputs.

    H_A: s = H_A ā, y = (A + λI) s for the mean input ā. H_G: after the optimizer's step, the batch goes forward and
    back once more, and `KFAC.second_pass` takes s and y from the changes of the mean output and of its gradient.

    Without second passes H_G stays I. A layer stores 2d_in² + d_out² numbers. A step takes 2d_in² k + O(d_in² + d_out²)
    operations, with no read-back. H_G is in float64: its flat directions may be 10⁷ times its steep ones, and float32
    would leave an indefinite matrix. Layers with one-hot inputs, and layers with one factor, use `Exact`.

    Parameters
    ----------
    average
        Decay of the running means of s and y of the outputs, in [0, 1).
    curved
        μ in (0, 1): if sᵀy < μ yᵀH y, s moves towards H y until both sides are equal.

    Notes
    -----
    If then sᵀy < λ κ sᵀs, y moves towards κ s until both sides are equal. Absolute damping has κ = 1, and the same λ
    for A and G, the papers' √λ. Relative damping has κ = ‖y‖/‖s‖, and A gets λ d₁. For convolutions ā is the mean
    window. The papers, not read in full (``docs/kfac.md``), have a factor √τ of the damping for τ positions: omitted.

    References
    ----------
    D. Goldfarb, Y. Ren, A. Bahamou, "Practical quasi-Newton methods for training deep neural networks", NeurIPS 2020,
    arXiv 2006.08877. Y. Ren, A. Bahamou, D. Goldfarb, "Kronecker-factored quasi-Newton methods for deep learning",
    arXiv 2102.06737.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import KFAC, KBFGS
    >>> model, inputs = torch.nn.Linear(20, 10), torch.randn(8, 20)
    >>> preconditioner, optimizer = KFAC(model, KBFGS()), torch.optim.SGD(model.parameters(), 0.1)
    >>> model(inputs).square().mean().backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    >>> optimizer.zero_grad()
    >>> model(inputs).square().mean().backward()  # the same batch again
    >>> preconditioner.second_pass()
    """

    reads_rows: ClassVar[bool] = True
    takes_second_pass: ClassVar[bool] = True
    measures_length: ClassVar[bool] = False

    average: float = 0.9
    curved: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.average < 1:
            _check.fail_value("KBFGS", f"average must be in [0, 1); got {self.average}")
        if not 0 < self.curved < 1:
            _check.fail_value("KBFGS", f"curved must be in (0, 1); got {self.curved}")

    def curvature(self, shape: Shape) -> Curvature:
        if shape.one_hot or shape.single:
            return Kronecker.of(shape, Exact())
        return QuasiNewton(shape, self)

    def solve(self, problems: Sequence[Problem], now: Now) -> list[Gradient]:
        """Solve, and keep the mean outputs and their gradients for the second pass."""
        for problem in problems:
            if isinstance(problem.curvature, QuasiNewton) and problem.rows is not None and problem.weight is not None:
                problem.curvature.note(problem.rows, problem.weight, now)
        return super().solve(problems, now)

    def second_pass(self, problems: Sequence[Problem], now: Now) -> None:
        for problem in problems:
            if isinstance(problem.curvature, QuasiNewton) and problem.rows is not None and problem.weight is not None:
                problem.curvature.absorb_change(problem.rows, problem.weight, now)


@dataclass
class QuasiNewton(StateCurvature):
    """The sum of a aᵀ, H_A and H_G of one layer, and the running means of s and y of its outputs."""

    in_float64: ClassVar[tuple[str, ...]] = ("output",)
    remark: ClassVar[str] = "BFGS"
    of_sides: ClassVar[Mapping[Side, Sequence[str]]] = {
        "input": ("dense", "total", "input"),
        "output": ("output", "s", "y", "outputs", "gradients", "noted"),
    }

    strategy: KBFGS

    def absorb(self, rows: Rows, now: Now) -> None:
        """Take the inputs into A, and update H_A."""
        if is_first := not self.started:
            self.state = self._start()
        state, weight = self.state, 1 - now.decay
        gram_ema_(state["dense"], rows.inputs.mT, now.decay, weight / rows.uses)
        total = now.decay * state["total"] + weight * now.finite.to(self.shape.dtype)
        state["total"] = total.clamp_min(torch.finfo(total.dtype).tiny)
        average = state["dense"] / state["total"]
        average.diagonal(dim1=-2, dim2=-1).add_(now.damping.of(largest_eigenvalue(average))[..., None])
        if is_first:
            state["input"] = torch.cholesky_inverse(torch.linalg.cholesky_ex(average).L)
        s = _times(state["input"], _means(rows)[0])
        state["input"] = bfgs_update(state["input"], s, _times(average, s), now.finite)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return H_G ∂W H_A."""
        return cast(Tensor, self.state["output"].to(self.shape.dtype) @ dense(gradient) @ self.state["input"])

    def note(self, rows: Rows, weight: Callable[[], Tensor], now: Now) -> None:
        """Keep the mean output of this pass, and its gradient."""
        mean, self.state["gradients"] = _means(rows)
        self.state["outputs"] = _times(weight(), mean)
        self.state["noted"] = now.finite.to(self.shape.dtype)

    def absorb_change(self, rows: Rows, weight: Callable[[], Tensor], now: Now) -> None:
        """Take the changes since `note` into the running means s and y, and update H_G with the means."""
        if "noted" not in self.state:
            return
        finite = now.finite & self.state.pop("noted").bool()
        mean, gradients = _means(rows)
        for name, before, after in (("s", "outputs", _times(weight(), mean)), ("y", "gradients", gradients)):
            running, share = self.state[name], finite.to(self.shape.dtype) * (1 - self.strategy.average)
            self.state[name] = (1 - share) * running + share * (after - self.state.pop(before))
        inverse, s, y = (self.state[name].double() for name in ("output", "s", "y"))
        s, y = powell_damped(inverse, s, y, self.strategy.curved, now.damping)
        # If a common shift of the outputs does not change the loss, as for an attention's keys, y is only rounding.
        rounding = 100 * torch.finfo(self.shape.dtype).eps * (1 - self.strategy.average) * rows.gradients.abs().sum(-2)
        is_resolved = _dot(self.state["y"], self.state["y"]) > _dot(rounding, rounding)
        self.state["output"] = bfgs_update(inverse, s, y, finite & is_resolved)

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {name: part.shape for name, part in self._start().items()}

    def _start(self) -> State:
        groups, d_out, d_in, dtype, device = self.shape[:5]
        zeros = {"dense": (*groups, d_in, d_in), "total": (), "s": (*groups, d_out), "y": (*groups, d_out)}
        state: State = {name: torch.zeros(size, dtype=dtype, device=device) for name, size in zeros.items()}
        for name, n, own in (("input", d_in, dtype), ("output", d_out, torch.float64)):
            state[name] = torch.eye(n, dtype=own, device=device).expand(*groups, n, n).clone()
        return state


def powell_damped(inverse: Tensor, s: Tensor, y: Tensor, least: float, damping: Damping) -> tuple[Tensor, Tensor]:
    """Return s moved so that sᵀy >= μ yᵀH y, with μ = ``least``, and then y moved so that sᵀy >= λ κ sᵀs."""
    image = _times(inverse, y)
    along, of_inverse = _dot(s, y), _dot(y, image)
    s = _mixed(s, image, (1 - least) * of_inverse, of_inverse - along, along < least * of_inverse)
    kappa = torch.ones_like(along)
    if damping.scale == "relative":
        kappa = torch.linalg.vector_norm(y, dim=-1, keepdim=True) / torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        kappa = kappa.nan_to_num(1.0, posinf=1.0)
    along, most = _dot(s, y), kappa * _dot(s, s)
    return s, _mixed(y, kappa * s, (1 - damping.value) * most, most - along, along < damping.value * most)


def bfgs_update(inverse: Tensor, s: Tensor, y: Tensor, usable: Tensor) -> Tensor:
    """Return BFGS's H⁺, for which H⁺ y = s, if ``usable`` and sᵀy is more than rounding; otherwise H."""
    image, along = _times(inverse, y), _dot(s, y)
    scale = torch.linalg.vector_norm(s, dim=-1, keepdim=True) * torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    usable = usable & (along > 8 * torch.finfo(s.dtype).eps * scale)
    rate = torch.where(usable, 1 / torch.where(usable, along, 1), 0)[..., None]
    outer = s[..., :, None] * s[..., None, :]
    mixed = s[..., :, None] * image[..., None, :]
    new = inverse + (rate.square() * _dot(y, image)[..., None] + rate) * outer - rate * (mixed + mixed.mT)
    return torch.where(new.isfinite().all(-1, keepdim=True).all(-2, keepdim=True), new, inverse)


def _mixed(one: Tensor, other: Tensor, above: Tensor, below: Tensor, where: Tensor) -> Tensor:
    """Return θ one + (1 − θ) other, with θ = above / below clamped to [0, 1], if ``where``; otherwise ``one``."""
    share = torch.where(where, (above / torch.where(where, below, 1)).clamp(0, 1), 1)
    return share * one + (1 - share) * other


def _means(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return the mean input ā, and the loss's gradient with respect to a common shift of all outputs."""
    scale = 1 if rows.share is None else rows.share.rsqrt()
    return scale * rows.inputs.mean(-2), scale * rows.gradients.sum(-2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum(-1, keepdim=True)
