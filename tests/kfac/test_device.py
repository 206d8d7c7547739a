"""A step launches few kernels and never waits for the device, as a CPU can show. A CUDA graph is a tape of kernels."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

triton = pytest.importorskip("triton")

import brandla  # noqa: E402
from bench import launches  # noqa: E402
from brandla import Rank  # noqa: E402
from brandla.kfac import KFAC, Brand, Exact, Foof, InverseFree, Strategy, TwoLevel, Woodbury  # noqa: E402
from brandla.kfac.capture.finite import FiniteCheck  # noqa: E402
from brandla_kernels import OPS  # noqa: E402
from kfac.networks import Words  # noqa: E402
from kfac.systems import STRUCTURED, SYSTEMS, factors_of  # noqa: E402

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter has tests of its own")

# --- Kernels and waits


def third_step(model, inputs, strategy, *, resumed=False, **options):
    """Count the third step's launches, also from a checkpoint: the first step also compares gradients with rows."""
    preconditioner = KFAC(model, strategy, **options)
    for step in range(3):
        if resumed:
            preconditioner.load_state_dict(preconditioner.state_dict())
        model.zero_grad()
        model(inputs).square().mean().backward()
        if step < 2:
            preconditioner.step()
    return launches.counts_of(preconditioner.step)


@pytest.mark.parametrize(("gradient", "resumed"), [("autograd", False), ("pair", True)])
@pytest.mark.parametrize(("clip_by", "most"), [("rms", 3), ("kl", 7), ("spectral", 70)])
def test_a_layer_adds_few_kernels_to_a_step(clip_by, most, gradient, resumed):
    """A padding for the bias and 2 products; with ``"kl"`` also two Gram matrices, their product and its sum."""
    options = {"clip_by": clip_by, "gradient": gradient, "resumed": resumed}
    few, many = (third_step(launches.mlp(depth), torch.randn(6, 48), Brand(8), **options) for depth in (3, 7))
    assert many.kernels - few.kernels <= 4 * most
    assert many.waits == 0


def test_counts_of_steps_follow_a_model_that_is_moved():
    preconditioner = KFAC(nn.Linear(3, 2), Exact())
    for device in ("cpu", "meta"):
        preconditioner._count(FiniteCheck(torch.ones((), dtype=torch.bool, device=device), known_finite=False))
    assert {count.device.type for count in preconditioner._step_counts} == {"meta"}


CHOLESKY, ROOT = Exact(inverse_every=1, method="cholesky"), Brand(2, compress="cholesky")
STRATEGIES = {
    "cholesky": CHOLESKY,
    **{f"foof-{name}": Foof(inner) for name, inner in {"brand": ROOT, "cholesky": CHOLESKY}.items()},
    "two-level": TwoLevel(ROOT),
    "fngd": Woodbury(fixed_after=1),
    **{name: SYSTEMS[name] for name in ("conjugate-gradient", "residual", "k-bfgs", "woodbury")},
    **STRUCTURED,
    "ikfac": InverseFree(variant="ikfac", preconditioner_every=1),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_these_systems_never_wait_for_the_device(strategy):
    """With layers of every kind: indices, whole gradients, groups."""
    model = Words(30, 20, 16, channels=20, attention=True).float()
    assert third_step(model, torch.randint(30, (3, 2)), strategy).waits == 0


# --- CUDA graphs


NEVER_WAITS = Brand(8, compress="cholesky")


class Tape(launches.Counter):
    """Records what a CUDA graph holds: the launched kernels, and the memory of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        assert not self.counts.waits, f"{func} waits for the device"
        name = func.__name__.partition(".")[0]
        if func.namespace == "brandla":
            op = OPS[name.replace("_grouped", "")]
            if op.launch is not None:
                self.kernels.append((op.torch_form if name in OPS else op.grouped_form, args, {}, result))
        elif not func.is_view and func.overloadpacket not in launches.FREE:
            self.kernels.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        with brandla.backend("torch"):
            for kernel, args, kwargs, results in self.kernels:
                for old, new in zip(tree_leaves(results), tree_leaves(kernel(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Run:
    """A training run whose inputs stay in the same memory."""

    def __init__(self, strategy: Strategy = NEVER_WAITS, **options) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(40, 48), launches.Block(48), nn.Linear(48, 10))
        self.preconditioner = KFAC(self.model, strategy, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.inputs, self.labels = torch.zeros(6, 4, 40), torch.zeros(24, dtype=torch.int64)
        self.data = torch.Generator().manual_seed(1)

    def take(self):
        """Write the next batch into the inputs."""
        self.inputs.normal_(generator=self.data)
        self.labels.random_(10, generator=self.data)

    def step(self):
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.inputs).flatten(0, 1), self.labels).backward()
        self.preconditioner.step()
        self.optimizer.step()

    def warm_up(self, steps):
        """Take steps as on a GPU, with kernels that are recorded but not counted."""
        for _ in range(steps):
            self.take()
            with launches.on_gpu(), torch.enable_grad(), launches.Counter():
                self.step()

    def capture(self, monkeypatch):
        """Take a step, and return its tape."""
        self.take()
        self.optimizer.zero_grad()
        with monkeypatch.context() as patch, launches.on_gpu(), torch.enable_grad(), Tape() as tape:
            patch.setattr("brandla.kfac.preconditioner.is_captured", lambda: True)
            self.step()
        return tape


WITH_RULE = Brand(Rank(8, 1e-3), compress="cholesky")


@pytest.mark.parametrize(
    "options", [{}, {"clip_by": "kl", "gradient": "pair"}, {"strategy": CHOLESKY}, {"strategy": WITH_RULE}], ids=str
)
def test_replays_of_a_captured_step_train_as_steps_do(options, monkeypatch):
    captured, plain = (Run(**options) for _ in range(2))
    captured.warm_up(2)
    tape = captured.capture(monkeypatch)
    kept = [own.state for own in factors_of(captured.preconditioner)]
    before = [state["root"].clone() for state in kept if "root" in state]
    for _ in range(2):
        captured.take()
        tape.replay()
    plain.warm_up(5)
    assert not any(map(torch.equal, before, [state["root"] for state in kept if "root" in state]))
    for one, other in zip(captured.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(kept, [own.state for own in factors_of(plain.preconditioner)], strict=True):
        for name, part in one.items():
            if isinstance(part, Tensor):
                torch.testing.assert_close(part, other[name])
    # The report also counts the batches that replays skipped.
    assert captured.preconditioner.report().skipped == 0
    captured.inputs.fill_(float("nan"))
    tape.replay()
    assert captured.preconditioner.report().skipped == 1
    assert all(parameter.isfinite().all() for parameter in captured.model.parameters())


def test_signs_of_a_sketch_are_new_at_every_replay(monkeypatch):
    """Since E AΩΩᵀAᵀ = AAᵀ, the error falls with the replays. With the same signs it would stay."""
    run = Run(Brand(20, sketch=4, compress="cholesky"), decay=1 - 1e-9)
    run.optimizer.param_groups[0]["lr"] = 0.0
    run.warm_up(1)
    tape = run.capture(monkeypatch)
    (factor, *_) = factors_of(run.preconditioner)
    wide = run.inputs.flatten(0, 1)
    exact = wide.mT @ wide / len(wide)
    errors = []
    for _ in range(40):
        tape.replay()
        errors.append(float(torch.linalg.matrix_norm(factor.operand().dense()[:-1, :-1] - exact)))
    assert errors[-1] < 0.7 * errors[0]


REFUSED = [
    ({"strategy": Brand(8, compress="eigh")}, "got Brand.*compress='eigh'.* for 0"),
    ({"strategy": Brand(8, compress="cholesky", tail=0.1)}, "got Brand.*tail=0.1.* for 0"),
    ({"strategy": Brand(lambda step: 8)}, "a rank that is no schedule.*got Brand"),
    # One factor is no larger than the rank.
    ({"strategy": Brand(8)}, "Exact.*method='eigh'.* for 2"),
    ({"strategy": Exact(method="cholesky")}, "got Exact.*inverse_every=10"),
    ({"strategy": InverseFree()}, "for 0"),
    ({"clip_by": "spectral"}, "got clip_by='spectral'"),
    ({"scaler": torch.amp.GradScaler("cpu")}, "got scaler"),
    ({}, "factors of 0 have no data yet: take a few steps before the capture"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_a_graph_cannot_repeat_are_refused(options, message, monkeypatch):
    run = Run(**options)
    run.warm_up(0 if "scaler" in options or not options else 1)
    with pytest.raises(RuntimeError, match=f"KFAC.step: a CUDA graph.*{message}"):
        run.capture(monkeypatch)
