"""K-FAC for physics-informed networks: losses with derivatives of a network with respect to its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from brandla import _check
from brandla.kfac.applications import forward_laplacian as forward
from brandla.kfac.report import Report, rows_of
from brandla.kfac.systems.kronecker import FactorStrategy, Kronecker
from brandla.kfac.systems.strategy import StateCurvature
from brandla.kfac.values import Damping, Gradient, Now, Rows, Shape, Side, dense
from brandla_kernels import gram_ema_

# Functions of `Columns` at points (N, d), or of values (M, m) at points (M, d), that return one residual per point.
Residual: TypeAlias = Callable[[forward.Columns, Tensor], Tensor]
BoundaryResidual: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class PINN:
    """Precondition the gradients of ½ mean r² over points inside, r with derivatives, plus ½ mean r² at the boundary.

    The Gauss–Newton matrix of a layer is about A_Ω ⊗ B_Ω + A_∂ ⊗ B_∂. Each of N points inside has S = d + 2 input
    columns z (value, derivatives, Laplacian; the bias's 1 is only in the first) and the derivatives g of r with respect
    to the layer's output columns. A_Ω = Σ z zᵀ / (N S) and B_Ω = Σ g gᵀ / N. A_∂ and B_∂ are the same with S = 1. All
    are averaged over steps, and λ is added to each.

    Parameters
    ----------
    model
        ``nn.Sequential`` of ``nn.Linear`` and activations that `forward_laplacian` knows.
    inverse
        None inverts the sum, by two Cholesky factorisations and two eigendecompositions per layer and step in float64.
        This suits widths of a few hundred. A system of factors such as ``Brand(rank=32)`` inverts ½ (A_Ω + A_∂) ⊗ (B_Ω
        + B_∂), which equals the sum if the two A, or the two B, are equal.
    damping
        λ > 0, absolute.
    decay
        ρ of the averages, in [0, 1).
    weights
        Weights of the Laplacian, as in `forward_laplacian`.

    Notes
    -----
    There is no clip: choose the length of a step by a line search with `loss`, as the source does. Use one process.

    References
    ----------
    F. Dangel, J. Müller, M. Zeinhofer, "Kronecker-factored approximate curvature for physics-informed neural networks",
    NeurIPS 2024, arXiv 2405.15603.

    Examples
    --------
    >>> import torch
    >>> from brandla.kfac import PINN
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> preconditioner = PINN(model, damping=1e-3)
    >>> poisson = lambda u, x: u.laplacian[:, 0] + 1, lambda u, x: u[:, 0]
    >>> _ = preconditioner.backward(torch.rand(9, 2), poisson[0], torch.rand(4, 2).round(), poisson[1])
    >>> torch.optim.SGD(model.parameters(), lr=0.1).step()
    """

    def __init__(
        self,
        model: nn.Sequential,
        inverse: FactorStrategy | None = None,
        *,
        damping: float = 1e-5,
        decay: float = 0.95,
        weights: Tensor | None = None,
    ) -> None:
        forward.check_model("PINN", model)
        if inverse is not None and not isinstance(inverse, FactorStrategy):
            rule = "inverse must be None or a strategy of factors such as Brand(rank=32)"
            _check.fail_type("PINN", f"{rule}; got {type(inverse).__name__}")
        if not 0 < damping < float("inf"):
            _check.fail_value("PINN", f"damping must be finite and > 0; got {damping}")
        if not 0 <= decay < 1:
            _check.fail_value("PINN", f"decay must be in [0, 1); got {decay}")
        self._model, self._damping, self._decay, self._weights = model, damping, decay, weights
        modules = model.named_modules(remove_duplicate=False)
        self._linears = {name: module for name, module in modules if isinstance(module, nn.Linear)}
        self._shapes = []
        for linear in self._linears.values():
            dtype = torch.float64 if inverse is None else linear.weight.dtype
            d_in = linear.in_features + (linear.bias is not None)
            self._shapes.append(Shape((), linear.out_features, d_in, dtype, linear.weight.device))
        self.curvatures: list[SumOfTwo | Kronecker] = [
            SumOfTwo(shape) if inverse is None else Kronecker.of(shape, inverse) for shape in self._shapes
        ]
        self._system = str(inverse)
        self._steps, self._captured_bytes = 0, 0
        self._skipped: Tensor | int = 0

    @torch.no_grad()
    def loss(self, interior: Tensor, residual: Residual, boundary: Tensor, at_boundary: BoundaryResidual) -> Tensor:
        """Return the loss alone. The parameters are those of `backward`."""
        inside = residual(forward.forward_laplacian(self._model, interior, self._weights), interior)
        return _loss(inside, at_boundary(self._model(boundary), boundary))

    def backward(self, interior: Tensor, residual: Residual, boundary: Tensor, at_boundary: BoundaryResidual) -> Tensor:
        """Take a batch in, write the preconditioned gradients into ``grad`` of all weights, and return the loss.

        Parameters
        ----------
        interior, boundary
            Points (N, d) and (M, d).
        residual
            A function of the `Columns` and the points that returns r (N,). Each r depends on its own point only.
        at_boundary
            The same for values (M, m) and points: r (M,).

        Raises
        ------
        ValueError
            For residuals of another shape.
        RuntimeError
            In several processes.
        """
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            message = "PINN.backward: training must be in one process; got a group of several"
            raise RuntimeError(message)
        uses: tuple[forward.Uses, forward.Uses] = [], []
        with torch.enable_grad():
            columns = forward.propagate(self._model, forward.first_columns(interior), self._weights, uses[0])
            values = forward.propagate(self._model, boundary[:, None], self._weights, uses[1])
            residuals = residual(forward.split_columns(columns), interior), at_boundary(values[:, 0], boundary)
        finite = torch.isfinite(_loss(*residuals))
        terms = [_terms(*parts, finite) for parts in zip(residuals, (interior, boundary), uses, strict=True)]
        now = Now(self._steps, self._steps * 65_537, self._decay, Damping(self._damping, "absolute"), finite)
        layers = zip(self._linears.values(), self.curvatures, *terms, strict=True)
        for linear, curvature, (inside, gradient_inside), (outside, gradient_outside) in layers:
            if isinstance(curvature, SumOfTwo):
                curvature.absorb(inside, now)
                curvature.absorb(outside, now, "boundary")
            else:
                # The factors are ½ (A_Ω + A_∂) and B_Ω + B_∂.
                inputs = torch.cat([rows.inputs / (2 * rows.uses) ** 0.5 for rows in (inside, outside)])
                gradients = torch.cat([rows.gradients * rows.uses**0.5 for rows in (inside, outside)])
                curvature.absorb(Rows(inputs, gradients, 1), now)
            step = dense(curvature.solve(gradient_inside + gradient_outside, now)).to(linear.weight.dtype)
            linear.weight.grad = step[:, : linear.in_features].clone()
            if linear.bias is not None:
                linear.bias.grad = step[:, -1].clone()
        self._steps += 1
        self._skipped = ~finite + self._skipped
        self._captured_bytes = sum(rows.inputs.nbytes + rows.gradients.nbytes for rows, _ in chain(*terms))
        return _loss(*residuals).detach()

    def report(self) -> Report:
        """Return each layer's factors and memory, like `KFAC.report`, and the number of batches skipped.

        This waits for the device. A layer of the sum has one row per side, with the memory of both matrices.
        """
        system = "SumOfTwo" if self._system == "None" else self._system
        parts = zip(self._linears, self._shapes, self.curvatures, strict=True)
        rows = [row for name, shape, curvature in parts for row in rows_of(name, system, shape, curvature)]
        return Report(rows, {}, int(self._skipped), self._captured_bytes)

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state for a bit-equal continuation."""
        curvatures = {str(index): curvature.state_dict() for index, curvature in enumerate(self.curvatures)}
        return {"system": self._system, "steps": self._steps, "curvatures": curvatures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same model and system, or raise before anything changes."""
        saved, count = state["curvatures"], len(self.curvatures)
        if state["system"] != self._system or len(saved) != count:
            wanted, got = f"{self._system} of {count} layers", f"{state['system']} of {len(saved)}"
            _check.fail_value("PINN.load_state_dict", f"the state must be that of {wanted}; got {got}")
        loaded = [curvature.loaded(saved[str(index)], str(index)) for index, curvature in enumerate(self.curvatures)]
        self.curvatures, self._steps = loaded, state["steps"]


@dataclass
class SumOfTwo(StateCurvature):
    """A_Ω ⊗ B_Ω + A_∂ ⊗ B_∂ of one layer, each an exponential average, in the dtype of its shape: float64."""

    loader: ClassVar[str] = "PINN.load_state_dict"
    remark: ClassVar[str] = "inside and at the boundary"
    of_sides: ClassVar[Mapping[Side, Sequence[str]]] = {
        "input": ("interior input", "boundary input", "total"),
        "output": ("interior output", "boundary output"),
    }

    def absorb(self, rows: Rows, now: Now, term: str = "interior") -> None:
        """Take in the rows of a term. Each step begins with the rows inside."""
        if term == "interior":
            total = self.state.get("total", torch.zeros((), dtype=self.shape.dtype, device=self.shape.device))
            self.state["total"] = now.decay * total + (1 - now.decay) * now.finite.to(self.shape.dtype)
        for side, vectors, scale in (("input", rows.inputs, 1 / rows.uses), ("output", rows.gradients, rows.uses)):
            start = torch.zeros(vectors.shape[-1], vectors.shape[-1], dtype=self.shape.dtype, device=vectors.device)
            sums = self.state.setdefault(f"{term} {side}", start)
            gram_ema_(sums, vectors.mT.to(sums.dtype), now.decay, (1 - now.decay) * scale)

    def solve(self, gradient: Gradient, now: Now) -> Gradient:
        """Return K₂ [(K₂ᵀ ∂W K₁) / (1 + s₂ s₁ᵀ)] K₁ᵀ, where KᵀM_ΩK = I and KᵀM_∂K = diag(s) on each side."""
        (right, s_in), (left, s_out) = (self._pencil(side, now.damping.value) for side in self.of_sides)
        rotated = left.mT @ dense(gradient).to(right.dtype) @ right
        return left @ (rotated / (1 + s_out[:, None] * s_in)) @ right.mT

    def sizes(self, state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each matrix."""
        sides = {name: self.shape.d_in if name.endswith("input") else self.shape.d_out for name in state}
        return {name: (n, n) for name, n in sides.items() if name != "total"}

    def _pencil(self, side: Side, damping: float) -> tuple[Tensor, Tensor]:
        """Return K and s of the two factors of a side, each plus λI."""
        total = self.state["total"].clamp_min(torch.finfo(self.shape.dtype).tiny)
        inside, outside = (self.state[f"{term} {side}"] / total for term in ("interior", "boundary"))
        for part in (inside, outside):
            part.diagonal().add_(damping)
        factor = torch.linalg.cholesky_ex(inside).L
        half = torch.linalg.solve_triangular(factor, outside, upper=False)
        values, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        return torch.linalg.solve_triangular(factor.mT, vectors, upper=True), values.clamp_min(0)


def _terms(residuals: Tensor, points: Tensor, uses: forward.Uses, finite: Tensor) -> list[tuple[Rows, Tensor]]:
    """Return for each layer rows with A = Σ z zᵀ / (N S), G = Σ g gᵀ / N, and the gradient of ½ mean r²; or zeros."""
    if residuals.shape != points.shape[:1]:
        rule = f"residuals must have shape (N,) = ({len(points)},), one for each point"
        _check.fail_value("PINN.backward", f"{rule}; got {tuple(residuals.shape)}")
    derivatives = torch.autograd.grad(residuals.sum(), [output for _, output in uses])
    terms = []
    for (inputs, _), of_output in zip(uses, derivatives, strict=True):
        r = residuals.detach().repeat_interleave(of_output.shape[1])
        z, g, r = (torch.where(finite, part, 0) for part in (inputs.flatten(0, 1), of_output.flatten(0, 1), r))
        rows = Rows(z, g / (len(z) * len(points)) ** 0.5, len(z))
        terms.append((rows, (g * r[:, None]).mT @ z / len(points)))
    return terms


def _loss(inside: Tensor, outside: Tensor) -> Tensor:
    return (inside.square().mean() + outside.square().mean()) / 2
