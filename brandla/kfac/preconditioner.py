"""`KFAC`: capture, absorb, refresh, precondition. Everything that differs between systems is in a strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NoReturn, cast
from weakref import finalize

import torch
from torch import Tensor, nn

from brandla import _check
from brandla._ranges import ranged
from brandla.kfac import state
from brandla.kfac.adaptive import Adaptive, Trial
from brandla.kfac.capture import fisher
from brandla.kfac.capture.calls import Groups, Pass, Recorder, Terms
from brandla.kfac.capture.finite import FiniteCheck, loss_scale
from brandla.kfac.capture.fisher import CurvatureType, Loss
from brandla.kfac.capture.layer import Layer, Sharing, by_strategy
from brandla.kfac.capture.mistakes import GRADIENTS_CHECKED_AT, Mistakes
from brandla.kfac.clip import copy_exact, divide_and_copy, kl_divisor, rms_divisors, spectral_norms
from brandla.kfac.find import find_layers
from brandla.kfac.options import AtStep, ByModule, ClipBy, Options, set_order, sharings, strategies
from brandla.kfac.processes.distributed import Mode, Replicas, replicas
from brandla.kfac.processes.sharded import whole_gradients
from brandla.kfac.report import Report, describe
from brandla.kfac.systems.brand import Brand
from brandla.kfac.systems.cuda_graph import check_capture, in_place, is_captured
from brandla.kfac.systems.factor import share_totals
from brandla.kfac.systems.schedule import Schedule
from brandla.kfac.systems.strategy import Problem, Strategy
from brandla.kfac.values import Damping, Gradient, Now, Rows, Scale

_DEFAULT = Brand(rank=128)
_FOR_ONE_PROCESS = "gradient must be 'autograd' where gradients are reduced over processes"


class KFAC:
    """Precondition the gradients of a model's layers: ∂W ← (G + λ_G I)⁻¹ ∂W (A + λ_A I)⁻¹.

    Use it between ``loss.backward()`` and ``optimizer.step()``; every other parameter is left to the optimizer.

    Parameters
    ----------
    model
        Any module. Modules that share a weight are one layer, with the bias of the first. Layers that cannot be
        preconditioned are left to the optimizer, at once or as soon as training shows it. `report` gives the reason.
    inverse
        The system: `Exact`, `EKFAC`, `Randomized`, `Brand`, `BrandRandomized`, `BrandCorrected`, `InverseFree`, `Foof`,
        `ConjugateGradient`, `TwoLevel`, `Woodbury`, `KBFGS`. One for all layers, a function of a module's name and the
        module, or a mapping from module names. A name covers the module and all modules in it (``""``: the model).
        None leaves a layer to the optimizer. The default is ``Brand(rank=128)``.
    damping
        λ > 0, relative to the largest eigenvalue of each factor or absolute, as ``damping_scale`` states. Or
        `Adaptive`: then call `adapt` after every step of the optimizer.
    clip
        Bound on the length of the step as ``clip_by`` measures it; None for no clipping.
    decay
        ρ of the factors' exponential average, in [0, 1); normalised so that the first batches count fully.
    factor_every
        Steps between batches that the factors take in. ``damping``, ``clip``, ``decay`` and ``factor_every`` are
        numbers, or functions of the step's number (from 0).
    sharing
        For inputs with positions, the dimensions between the first and the last. ``"expand"`` treats positions as
        samples. ``"reduce"`` first averages inputs and sums gradients over the positions. One for all layers, a
        mapping or a function, like ``inverse``.
    batch_first
        Whether inputs are (samples, positions, ...) or (positions, samples, ...). One for all layers, a mapping or a
        function, like ``inverse``. None takes the ``batch_first`` of the module, or of the nearest module around it
        that has one. If there is none, samples come first. `report` shows the order taken. Convolutions and other
        modules with a fixed order ignore this.
    damping_scale
        ``"relative"`` or ``"absolute"``.
    clip_by
        ``"rms"``: the root mean square of the entries of each weight's step, bias included. ``"spectral"``: its
        spectral norm as a matrix with the bias as a column, estimated from below; start with 0.3 at the rate 1.
        ``"kl"``: Σ ⟨step, ∂W⟩ over all layers.
    application
        ``"auto"`` applies the factors to the pair of inputs and output gradients, at a cost linear in the layer's size,
        if the gradient is exactly that pair and the pair is thin. ``"two-sided"`` always applies them to the gradient.
    curvature
        The source of G. ``"empirical"``: the gradients of the loss. ``"monte-carlo"``: the gradients for labels drawn
        from the model's own prediction. ``"type-2"``: the exact Hessian of the loss in the model's outputs, with one
        backward pass for each output. The last two need a call of `curvature` in every step.
    gradient
        ``"pair"``: autograd does not form the gradients of the weights of ``nn.Linear`` modules with a trained bias.
        `step` makes them, or the steps directly, from the inputs and output gradients. Until then ``weight.grad`` is
        None: do not clip or read it before `step`, and run no optimizer without `step`. ``torch.autograd.grad`` does
        not return it either. Gradients from elsewhere in the loss, such as a penalty on the weight, are added. Autograd
        still handles weights with hooks on their gradients, in compiled graphs, or shared by several modules. This
        works in one process only, and gradients must be set to None after each step.
    scaler
        The ``torch.amp.GradScaler`` of the loss, if there is one. Call its ``unscale_`` before `step`.
    seed
        Fixes the random starts of randomized decompositions, and the draws of labels.
    distributed
        For several processes that each hold the model and their own batch, and average their losses, as under
        DistributedDataParallel and FSDP2. ``"gather"``: every process takes in the rows of all. ``"split"``: each
        factor belongs to one process, which broadcasts the part that solving needs (``docs/many-machines.md``). The
        application is two-sided in several processes.
    process_group
        The processes; None for all.
    columns
        Bound on the number of columns of a factor's batch from all processes: wider batches are reduced to it. None
        for no bound.

    Raises
    ------
    ValueError, TypeError
        For options out of range, and for a model with no layer to precondition.

    Notes
    -----
    The loss counts as a mean over samples (and positions, for ``"expand"``) unless `curvature` gives the number of its
    terms. A sum only scales G. The gradient's history shows whether the pair is the whole gradient, and one comparison
    for each layer, with one read-back, confirms it. A batch with a non-finite value anywhere is skipped: factors stay
    unchanged and all gradients of the model become 0, on the device.

    Examples
    --------
    >>> import torch, brandla.kfac
    >>> model = torch.nn.Linear(20, 5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = brandla.kfac.KFAC(model, inverse=brandla.kfac.Brand(rank=4))
    >>> model(torch.randn(8, 20)).square().mean().backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        inverse: ByModule[Strategy | None] = _DEFAULT,
        *,
        damping: Schedule[float] | Adaptive = 0.03,
        clip: Schedule[float | None] = 0.07,
        decay: Schedule[float] = 0.95,
        factor_every: Schedule[int] = 1,
        sharing: ByModule[Sharing] = "expand",
        batch_first: ByModule[bool | None] = None,
        damping_scale: Scale = "relative",
        clip_by: ClipBy = "rms",
        application: Literal["auto", "two-sided"] = "auto",
        gradient: Literal["autograd", "pair"] = "autograd",
        curvature: CurvatureType = "empirical",
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
        distributed: Mode = "gather",
        process_group: torch.distributed.ProcessGroup | None = None,
        columns: int | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            remedy = "pass the model itself, not its parameters or its optimizer"
            _check.fail_type("KFAC", f"model must be an nn.Module; got {type(model).__name__}; {remedy}")
        model = _unwrapped(model, gradient)
        by_name = strategies(model, inverse, _DEFAULT)
        self.options = Options(
            damping, clip, decay, factor_every, damping_scale, clip_by, application, gradient, curvature, seed
        )
        _check.choice("KFAC", "distributed", distributed, ("gather", "split"))
        if columns is not None:
            _check.count("KFAC", "columns", columns, 1)
        self._model = model
        self._scaler = scaler
        self._process_options = (distributed, process_group, columns)
        self._known_replicas: Replicas | None = None
        self._recorder = Recorder(edges=self._takes_curvature)
        self._mistakes = Mistakes()
        self._mistakes.check_model(model)
        self._steps = 0
        self._adapted_damping = damping.initial if isinstance(damping, Adaptive) else None
        self._trial: Trial | None = None
        self._curvature_calls = 0
        self._captured_bytes = 0
        # The number of steps that were checked on the device, the number of finite ones among them, and 1.
        self._step_counts: list[Tensor] = []
        self._removed = False
        self._layers, self._unsupported = find_layers(model, by_name, sharings(model, sharing), self._recorder)
        set_order(model, batch_first, self._layers)
        if gradient == "pair":
            self._check_one_process()
            for layer in self._layers:
                layer.capture.leave_out_weight_gradient()
        self._choose_captures()
        # Hooks hold the captures but not this object: when it is freed, the hooks are removed.
        finalize(self, _detach, self._layers).atexit = False

    def __repr__(self) -> str:
        systems = ", ".join(f"{len(members)} {strategy}" for strategy, members in by_strategy(self._layers))
        return f"KFAC({systems}; {self.options}; step {self._steps})"

    def curvature(self, outputs: Tensor, loss: Loss = "cross_entropy", weights: Tensor | None = None) -> None:
        """Send the curvature of a loss back through the model, if factors are not made of the loss's own gradients.

        Call it in every step, after the forward pass and before the loss's backward pass. It does nothing if no factor
        takes in data. With ``curvature="empirical"`` nothing is sent: the call gives the number of terms that the loss
        is a mean of, and G gets the same scale as with the other two. No gradient of a parameter changes.

        Parameters
        ----------
        outputs
            The first argument of the loss: logits or predictions, shape (N, C) or (N, C, positions...).
        loss
            ``"cross_entropy"`` or ``"mse"``, as in ``torch.nn.functional`` with ``reduction="mean"``.
        weights
            Weight of each term, shape (N,) or (N, positions...): 0 for a term that the loss ignores, or the weight of
            its class. None for 1. Label smoothing makes no difference.

        Raises
        ------
        ValueError, TypeError
            For another loss, outputs that require no gradient, and weights of another shape.
        """
        _check.choice("KFAC.curvature", "loss", loss, ("cross_entropy", "mse"))
        if not self._takes_curvature:
            self._recorder.terms["loss"] = Terms(fisher.term_count(outputs, loss, weights))
        elif any("curvature" in layer.capture.passes for layer in self._layers):
            # One seed per call and process, counted down from the step's last seed: factors count up from the first.
            seed = self._seed + 65_536 - (self._curvature_calls * self._replicas.world + self._replicas.rank)
            fisher.send_back(outputs, loss, self.options.curvature, weights, self._layers, self._recorder, seed)
            self._curvature_calls += 1

    def mask(self, valid: Tensor | None) -> None:
        """Mark which positions of the coming batch are data, so that no factor counts padding.

        Call it before the forward pass. The mask applies to all calls until the next `step` or `mask`, so each of
        several accumulated batches may have its own. It applies to inputs (samples, positions, ...), or (positions,
        samples, ...) in layers of that order, and to inputs with all positions in one dimension. ``"reduce"`` averages
        over the positions with data.

        Parameters
        ----------
        valid
            (samples, positions), True or 1 where there is data: an attention mask as tokenizers give it, and the
            opposite of the ``key_padding_mask`` of ``nn.MultiheadAttention``. None for no padding.

        Raises
        ------
        ValueError
            If ``valid`` is not a matrix.
        """
        if valid is not None and valid.ndim != 2:
            rule = "valid must be a tensor (samples, positions), or None"
            _check.fail_value("KFAC.mask", f"{rule}; got shape {tuple(valid.shape)}")
        self._recorder.valid = None if valid is None else valid.detach().bool()

    @ranged()
    @torch.no_grad()
    def step(self) -> None:
        """Take in the data captured since the last step, and overwrite the gradients of the layers that have one.

        A gradient that nobody has written to since the last step stays unchanged.

        With several processes, all of them must call this, each after a backward pass. If one does not, the others
        raise an error of torch.distributed after the group's timeout.

        Raises
        ------
        RuntimeError
            If `curvature` is needed and was not called, or if gradients are still multiplied by the scale of the
            ``scaler``. With ``gradient="pair"``, if there are several processes, or if a gradient was not None before
            the first backward pass or has changed since the last one. While a CUDA graph is captured, for a step that
            the graph cannot repeat (``docs/recipes/cuda-graphs.md``).
        """
        if self._removed:
            return
        if self.options.gradient == "pair":
            self._check_one_process()
        unseen: list[Layer] = []
        supported = [layer for layer in self._layers if not layer.capture.refusal]
        for layer in supported:
            layer.begin()
        parts = [part for layer in supported for part in (layer.weight, layer.bias)]
        with whole_gradients(parts), self._graph_capture(supported):
            layers = [layer for layer in supported if layer.has_gradient]
            self._mistakes.check_loop(layers, alone=not self._replicas.several)
            if layers or self._replicas.several:
                self._step(supported, layers)
                unseen = [layer for layer in layers if layer.is_unseen]
        self._captured_bytes = sum([layer.end() for layer in self._layers])
        self._recorder.forget_terms()
        self._recorder.valid = None
        self._curvature_calls = 0
        self._steps += 1
        self._choose_captures()
        self._mistakes.warn_of_layers(self._layers, unseen)
        if not is_captured():
            self._mistakes.warn_of_checks()

    def adapt(self, loss: Tensor, again: Callable[[], Tensor]) -> float | None:
        """Measure how the last step changed the loss of its batch, and adapt the damping, if a measurement is due.

        If ``damping`` is `Adaptive`, call this in every step, after ``optimizer.step()`` and before ``zero_grad()``. It
        is right for an optimizer that moves the weights along the step, such as SGD without momentum.

        Parameters
        ----------
        loss
            The loss that the step was taken for.
        again
            Computes the same loss of the same batch again. It is called only if a measurement is due: one more forward
            pass, without gradients.

        Returns
        -------
        float or None
            The loss's reduction divided by the predicted one; None without a measurement, or if 0 or NaN is predicted.

        Raises
        ------
        RuntimeError
            If the damping is not `Adaptive`, or the gradients, which hold the step, are gone.
        """
        adaptive = self.options.damping
        if not isinstance(adaptive, Adaptive) or self._adapted_damping is None:
            message = "KFAC.adapt: damping must be Adaptive(...)"
            raise RuntimeError(message)
        trial, self._trial = self._trial, None
        if trial is None:
            return None
        with torch.no_grad():
            predicted = trial.predicted()
            reduction = self._replicas.mean((loss.detach() - again()).to(predicted.dtype))
        actual, expected = map(float, torch.stack([reduction.to(predicted.device), predicted]).tolist())
        if expected == 0 or math.isnan(expected):
            return None
        self._adapted_damping = adaptive.next(self._adapted_damping, actual / expected)
        return actual / expected

    @torch.no_grad()
    def second_pass(self) -> None:
        """Take in a second backward pass of the same batch, after the optimizer's step, as `KBFGS` needs it.

        Call ``zero_grad()`` before that pass, and again before the next batch. Only layers whose strategy takes a
        second pass are read, and no gradient changes.

        Raises
        ------
        RuntimeError
            If no strategy takes a second pass, with another ``curvature`` than ``"empirical"``, or with a ``scaler``.
        """
        layers = [layer for layer in self._layers if layer.strategy.takes_second_pass]
        is_scaled = self._scaler is not None and self._scaler.is_enabled()
        if not layers or self._takes_curvature or is_scaled:
            rule = "needs a strategy such as KBFGS(), curvature='empirical' and no scaler"
            message = f"KFAC.second_pass: {rule}; got {self!r}"
            raise RuntimeError(message)
        for layer in layers:
            layer.begin()
        # After a refused call, the weight may no longer be a parameter.
        local_rows = self._rows([layer for layer in layers if not layer.capture.refusal and layer.has_gradient], None)
        check, rows = self._replicas.exchange(
            local_rows, FiniteCheck.of(local_rows.values(), self._model), self._seed, 0
        )
        now = self._now(self.options.at(max(self._steps - 1, 0)), check)
        for strategy, members in by_strategy(rows):
            problems = [
                Problem(layer.curvature, rows[layer].gradients, rows[layer], layer.parameters) for layer in members
            ]
            strategy.second_pass(problems, now)
        for layer in self._layers:
            layer.end()
        self._recorder.forget_terms()

    def report(self) -> Report:
        """Return the strategy of each factor with the reason for it, its rank, its error bound and its memory.

        If factors are split among processes, all processes must call this.
        """
        skipped = int(self._step_counts[0] - self._step_counts[1]) if self._step_counts else 0
        with self._replicas.complete():
            return describe(self._layers, self._unsupported, skipped, self._captured_bytes)

    def remove(self) -> None:
        """Remove every hook from the model. Later steps leave gradients unchanged."""
        self._removed = True
        _detach(self._layers)

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients `step` overwrites: weights and biases of layers, each once.

        They include parameters of frozen layers, but not of layers that training showed to be unsupported.
        """
        kinds = [layer.kind for layer in self._layers if not layer.capture.refusal]
        parts = [part for kind in kinds for part in (kind.weight, kind.bias) if part is not None]
        return list({id(part): part for part in parts}.values())

    def others(self) -> list[nn.Parameter]:
        """Return all other parameters of the model, for a separate optimizer."""
        preconditioned = {id(part) for part in self.parameters()}
        return [part for part in self._model.parameters() if id(part) not in preconditioned]

    @contextmanager
    def graphs(self, index: Tensor, count: int | None = None) -> Iterator[None]:
        """Assign each row of a batch to a sample in forward passes inside the block: for batches of graphs.

        In layers whose sharing is ``"reduce"``, a call whose input has as many rows as ``index`` counts as one row per
        graph: inputs are averaged, and output gradients summed, over the graph's nodes, except nodes that `mask` leaves
        out.

        Parameters
        ----------
        index
            The number of each node's graph, shape (nodes,), integers: ``batch`` of torch_geometric.
        count
            The number of graphs; None reads it from ``index``, which waits for the device.

        Raises
        ------
        ValueError
            If ``index`` is no vector of integers.
        """
        if index.ndim != 1 or index.is_floating_point():
            got = f"{_check.spelled(index.dtype)} of shape {tuple(index.shape)}"
            _check.fail_value("KFAC.graphs", f"index must be a vector of integers, one for each row; got {got}")
        before = self._recorder.groups
        self._recorder.groups = Groups(index, int(index.max()) + 1 if count is None else count)
        try:
            yield
        finally:
            self._recorder.groups = before

    def __reduce__(self) -> NoReturn:
        _check.fail_type(
            "KFAC", "it cannot be copied or pickled: make one for the copied model, and give it this one's state_dict()"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state for a bit-equal continuation: numbers, strings and tensors, by layer name.

        Data captured since the last step is not included: save between a step and the next backward pass. The state is
        the same in every process, and any number of processes can continue from it. If factors are split among
        processes, all processes must call this.
        """
        with self._replicas.complete():
            layers = {layer.name: state.of_layer(layer) for layer in self._layers}
        return {"format": state.FORMAT, "steps": self._steps, "damping": self._adapted_damping, "layers": layers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``, which must come from the same layers and strategies; other options may differ.

        Raises
        ------
        ValueError
            For any other state. Nothing changes then.
        """
        state.load(self._layers, state_dict)
        for layer in self._layers:
            layer.capture.clear()
        share_totals(factor for layer in self._layers for _, factor in layer.curvature.factors())
        self._recorder.forget_terms()
        self._curvature_calls = 0
        self._steps = int(state_dict["steps"])
        if self._adapted_damping is not None and state_dict["damping"] is not None:
            self._adapted_damping = float(state_dict["damping"])
        self._known_replicas = None
        self._choose_captures()

    def _step(self, supported: list[Layer], layers: list[Layer]) -> None:
        """Step the ``layers`` that have a gradient. ``supported`` are all layers that can be preconditioned."""
        options = self.options.at(self._steps)
        scale = loss_scale(self._scaler, layers[0].weight.device) if layers else None
        # Layers without a gradient here may get data from another process.
        for layer in supported:
            layer.match_weight()
        if self._steps == GRADIENTS_CHECKED_AT and not self._replicas.several and not is_captured():
            self._mistakes.check_gradients(layers, scale)
        local_rows = self._rows(self._due_layers(layers, options), scale)
        terms = self._loss_terms(local_rows)
        left_out = {}
        for layer in layers:
            if layer.capture.left_out and (rows := layer.take_gradient(local_rows.get(layer), scale)) is not None:
                left_out[layer] = rows
        # A gradient that is a product of rows is finite if they are, so the check of the rows replaces its check.
        reads_rows_alone = self._applies_to_pairs and not self._takes_curvature
        products = [
            gradient
            for layer in local_rows | left_out
            if layer.unformed is not None or (reads_rows_alone and layer in local_rows and layer.checked_by_rows)
            for gradient in (layer.weight.grad, layer.bias_gradient)
        ]
        distinct = {id(rows): rows for rows in (*local_rows.values(), *left_out.values())}
        check = FiniteCheck.of(distinct.values(), self._model, products)
        check, rows_of_layers = self._replicas.exchange(local_rows, check, self._seed, terms)
        now = self._now(options, check)
        self._replicas.absorb(rows_of_layers, now)
        ready = [layer for layer in layers if layer.curvature.started and not layer.capture.refusal]
        self._precondition(ready, rows_of_layers, now, options.clip, scale)
        for layer in left_out.keys() - set(ready):
            layer.gradient()
        check.clear(self._model)
        for layer in ready:
            layer.mark_stepped()
        if not check.known_finite:
            self._count(check)
            # With a scaler some batches overflow; the scaler skips them too.
            if scale is None and not is_captured():
                self._mistakes.check_skipped(self._step_counts[0], self._step_counts[1], self._steps)

    def _count(self, check: FiniteCheck) -> None:
        """Count a step that was checked on the device, in place, so that replays of a CUDA graph count too."""
        device = check.finite_int.device
        if not self._step_counts:
            self._step_counts = [*torch.tensor([0, 0, 1], dtype=torch.int32, device=device).unbind()]
        elif self._step_counts[0].device != device:
            # The model has been moved.
            self._step_counts = [count.to(device) for count in self._step_counts]
        torch._foreach_add_(self._step_counts[:2], [self._step_counts[2], check.finite_int])

    def _rows(self, layers: list[Layer], scale: Tensor | None) -> dict[Layer, Rows]:
        """Return the rows that the factors of layers take in at this step."""
        if self._takes_curvature and layers and self._recorder.terms["curvature"] is None:
            kind = self.options.curvature
            message = (
                f"KFAC.step: curvature={kind!r} needs a call of preconditioner.curvature(outputs, loss=...) before the"
                " loss's backward pass, in every step that takes data into the factors; got none since the last step"
            )
            raise RuntimeError(message)
        if self._takes_curvature:
            return fisher.rows_of(layers)
        return {layer: rows for layer in layers if (rows := layer.rows("loss", scale)) is not None}

    def _loss_terms(self, rows: Mapping[Layer, Rows]) -> Tensor | float:
        """Return the loss's number of terms; 0 if `curvature` gave none, or if rows are not the loss's gradients."""
        if self._takes_curvature:
            return 0
        number: Tensor | float = fisher.terms_of(rows, "loss")
        if rows and self._recorder.terms["loss"] is not None and not isinstance(number, Tensor) and number == 0:
            message = "KFAC.step: curvature(outputs) was called after the loss's backward pass; call it before that"
            raise RuntimeError(message)
        return number

    def _precondition(
        self, layers: list[Layer], rows: Mapping[Layer, Rows], now: Now, clip: float | None, scale: Tensor | None
    ) -> None:
        """Overwrite the gradients of layers with their steps."""
        gradients: dict[Layer, Gradient] = {}
        steps: dict[Layer, Gradient] = {}
        applies_to_pairs = self._applies_to_pairs
        for layer in layers:
            pair = layer.pair(rows.get(layer), scale) if applies_to_pairs else None
            gradients[layer] = layer.gradient() if pair is None else pair
        for strategy, members in by_strategy(layers):
            problems = [
                Problem(layer.curvature, gradients[layer], rows.get(layer), layer.parameters, layer.sharing == "reduce")
                for layer in members
            ]
            steps |= dict(zip(members, strategy.steps(problems, now), strict=True))
        if isinstance(self.options.damping, Adaptive) and layers and self._steps % self.options.damping.every == 0:
            self._trial = Trial(layers, [steps[layer] for layer in layers], list(gradients.values()))
        self._write([steps[layer] for layer in layers], gradients, clip)

    def _write(self, steps: Sequence[Gradient], gradients: Mapping[Layer, Gradient], clip: float | None) -> None:
        """Overwrite the gradients of layers with their steps, clipped."""
        by, clip = self.options.clip_by, clip if steps else None
        divisors: Sequence[Tensor] | None = None
        # Compute these clips before writing: a gradient or a step may be a view of ``weight.grad``.
        if clip is not None and by == "kl":
            weights = sum(layer.kind.weights for layer in gradients)
            divisors = [kl_divisor(steps, list(gradients.values()), clip)] * weights
        elif clip is not None and by == "spectral":
            divisors = []
            norms = spectral_norms(steps, [layer.direction for layer in gradients], self._seed)
            for layer, own in zip(gradients, norms, strict=True):
                # The norm of a weight's step is the largest norm of its groups.
                divisors += (own.norm.reshape(layer.kind.weights, -1).amax(-1) / clip).clamp_min(1).unbind()
                layer.direction = own.direction
        written = [parts for layer, step in zip(gradients, steps, strict=True) for parts in layer.write(step)]
        copy_exact(written)
        if clip is not None and by == "rms":
            divisors = rms_divisors([[part.step for part in parts] for parts in written], clip)
        divide_and_copy(written, divisors)

    def _graph_capture(self, layers: Sequence[Layer]) -> AbstractContextManager[None]:
        """While a CUDA graph is captured, check that it can hold the step, and keep the tensors that replays read."""
        if not is_captured():
            return nullcontext()
        options = {
            "scaler": self._scaler is not None,
            "several processes": self._replicas.several,
            f"curvature={self.options.curvature!r}": self._takes_curvature,
            "Adaptive damping": self._adapted_damping is not None,
            "clip_by='spectral'": self.options.clip_by == "spectral",
        }
        check_capture(options, {layer.name: layer.curvature for layer in layers if layer.has_gradient})
        return in_place([layer.curvature for layer in layers])

    def _check_one_process(self) -> None:
        """Check that there is one process, because others would wait for gradients that autograd does not form."""
        if self._replicas.several:
            message = f"KFAC: {_FOR_ONE_PROCESS}; got several processes"
            raise RuntimeError(message)

    def _due_layers(self, layers: list[Layer], options: AtStep) -> list[Layer]:
        """Return the layers whose factors take in data at this step."""
        if self._steps % options.factor_every == 0:
            return layers
        return [layer for layer in layers if not layer.curvature.started]

    def _now(self, options: AtStep, check: FiniteCheck) -> Now:
        """Return the settings of this step, with the current value of an `Adaptive` damping."""
        damping = Damping(
            options.damping if self._adapted_damping is None else self._adapted_damping, self.options.damping_scale
        )
        replays = self._step_counts[0] if is_captured() else 0
        return Now(self._steps, self._seed, options.decay, damping, check.finite, replays)

    def _choose_captures(self) -> None:
        """Capture in the next passes only the data that will be used."""
        due = set(self._due_layers(self._layers, self.options.at(self._steps)))
        of_factors: Pass = "curvature" if self._takes_curvature else "loss"
        applies_to_pairs = self._applies_to_pairs
        for layer in self._layers:
            reads_loss = layer.strategy.takes_second_pass or (applies_to_pairs and layer.gradient_is_pair is not False)
            wanted: list[Pass] = ["loss"] if reads_loss else []
            layer.capture.set_passes([*wanted, of_factors] if layer in due else wanted)

    @property
    def _seed(self) -> int:
        """The first seed of this step, with room for one per factor. A checkpoint continues with the same seeds."""
        # Below 2⁶³ with what is added for factors.
        return (self.options.seed * 1_000_003 + self._steps) * 65_537 % (2**63 - 65_537)

    @property
    def _takes_curvature(self) -> bool:
        """Whether factors are made of separate backward passes for the curvature."""
        return self.options.curvature != "empirical"

    @property
    def _replicas(self) -> Replicas:
        """The processes. One process is not cached, because a group may be made later than this object."""
        if self._known_replicas is not None:
            return self._known_replicas
        found = replicas(self._layers, *self._process_options, from_curvature=self._takes_curvature)
        self._known_replicas = found if found.several else None
        return found

    @property
    def _applies_to_pairs(self) -> bool:
        """Whether factors may be applied to the pair of the rows captured here in place of the gradient."""
        return self.options.application == "auto" and not self._replicas.several


def _detach(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.capture.detach()


def _unwrapped(model: nn.Module, gradient: str) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(model, nn.DataParallel):
            _check.fail_value(
                "KFAC", "the model must not be in nn.DataParallel; use nn.parallel.DistributedDataParallel"
            )
        if isinstance(model, nn.parallel.DistributedDataParallel):
            if gradient == "pair":
                _check.fail_value("KFAC", f"{_FOR_ONE_PROCESS}; got a model in DistributedDataParallel")
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model
