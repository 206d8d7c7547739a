"""Every kind of layer: its rows make up its gradient, its step equals the dense formula, and all of them train."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brandla.kfac import KFAC, TwoLevel
from kfac.networks import (
    DENSE,
    EXACT,
    Conv1D,
    OwnLinear,
    RMSNorm,
    Router,
    Words,
    assert_dense_step,
    gradients,
    loss_of,
    one_hot,
    stepped,
    weighted,
)
from kfac.systems import STRUCTURED, SYSTEMS, full_rank
from oracles import gaussian

# torch warns that an uneven "same" costs a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

DOUBLE = torch.float64
# Sums of float64 numbers of size 1 in two orders: at most a few thousand terms, each rounded at 1e-16.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def captured(module, inputs, sharing="expand"):
    """Return the layer of a copied module, and its rows, after a backward pass with a random weight for each output."""
    module = copy.deepcopy(module)
    preconditioner = KFAC(module, EXACT, sharing=sharing)
    weighted(module(inputs)).backward()
    # Rows use the running statistics of their call, even if these change before the step.
    with torch.no_grad():
        module.train()(inputs)
    (layer,) = preconditioner._layers
    # Without its preconditioner, the layer would lose its hooks and the captured data.
    layer.owner = preconditioner
    rows = layer.rows("loss", None)
    assert rows is not None
    return layer, rows


CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3), (2, 4, 11)),
    "1d-stride-dilation": (nn.Conv1d(4, 6, 3, stride=2, dilation=3, padding=2), (2, 4, 11)),
    "1d-circular": (nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"), (2, 4, 9)),
    "2d": (nn.Conv2d(3, 5, 3), (2, 3, 6, 7)),
    "2d-no-bias": (nn.Conv2d(3, 5, 3, bias=False), (2, 3, 6, 7)),
    "2d-1x1": (nn.Conv2d(3, 5, 1), (2, 3, 4, 5)),
    "2d-mixed": (nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 3), dilation=(1, 2)), (2, 3, 6, 7)),
    "2d-same": (nn.Conv2d(3, 5, (4, 3), padding="same", dilation=(2, 3)), (2, 3, 6, 7)),
    "2d-same-uneven": (nn.Conv2d(3, 5, (4, 3), padding="same"), (2, 3, 6, 7)),
    "2d-valid": (nn.Conv2d(3, 5, 2, padding="valid", stride=3), (2, 3, 8, 7)),
    "2d-reflect": (nn.Conv2d(3, 5, 3, padding=(2, 1), padding_mode="reflect"), (2, 3, 6, 7)),
    "2d-replicate-same": (nn.Conv2d(3, 5, 4, padding="same", padding_mode="replicate"), (2, 3, 6, 7)),
    "2d-groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), (2, 4, 6, 7)),
    "2d-depthwise": (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 7)),
    "2d-one-sample": (nn.Conv2d(3, 5, 3), (3, 6, 7)),
    "3d": (nn.Conv3d(2, 3, (2, 3, 1), padding=(1, 0, 2), stride=(1, 2, 1)), (2, 2, 4, 5, 3)),
    "3d-groups": (nn.Conv3d(2, 4, 2, groups=2, bias=False), (2, 2, 4, 5, 3)),
    "transposed-1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5)),
    "transposed-2d": (nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), padding=(3, 0), dilation=(2, 1)), (2, 4, 5, 4)),
    "transposed-2d-groups": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 4)),
    "transposed-3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), (2, 2, 3, 2, 3)),
}
LINEARS = {
    f"linear-{len(shape)}d-{'' if bias else 'no-'}bias": (nn.Linear(6, 4, bias=bias), shape)
    for shape in ((6,), (5, 6), (5, 3, 6), (2, 3, 4, 6))
    for bias in (True, False)
}


@pytest.mark.parametrize(("module", "shape"), (CONVOLUTIONS | LINEARS).values(), ids=CONVOLUTIONS | LINEARS)
def test_rows_make_up_the_gradient_and_in_reduce_are_means_and_sums(module, shape):
    """Σ γ aᵀ over samples and positions, bias included, is autograd's gradient; "reduce" averages sample by sample."""
    module = module.double()
    torch.manual_seed(1)
    inputs = torch.randn(shape, dtype=DOUBLE)
    layer, rows = captured(module, inputs)
    torch.testing.assert_close(rows.gradients.mT @ rows.inputs, layer.gradient(), **TOLERANCE)
    samples = 1 if len(shape) < module.weight.ndim else shape[0]
    assert rows.inputs.shape[-2] == rows.gradients.shape[-2] == rows.uses == samples * rows.positions
    assert torch.equal(layer.kind.tensor(layer.kind.matrix(module.weight)), module.weight)
    _, reduced = captured(module, inputs, sharing="reduce")
    by_sample = [part.unflatten(-2, (samples, rows.positions)) for part in rows[:2]]
    torch.testing.assert_close(reduced.inputs, by_sample[0].mean(-2), **TOLERANCE)
    torch.testing.assert_close(reduced.gradients, by_sample[1].sum(-2), **TOLERANCE)
    assert reduced.uses == samples


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_an_embedding_are_one_hot(shape, padding_idx, sharing):
    indices = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    layer, rows = captured(nn.Embedding(9, 4, padding_idx=padding_idx).double(), indices, sharing)
    torch.testing.assert_close(rows.gradients.mT @ one_hot(rows.inputs, 9), layer.gradient(), **TOLERANCE)
    assert torch.equal(rows.inputs < 0, indices.flatten() == (-1 if padding_idx is None else padding_idx))
    assert torch.equal(layer.kind.tensor(layer.gradient()), layer.kind.weight.grad)


class LayerScale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(6))

    def forward(self, inputs):
        return inputs * self.gamma


class Shifted(nn.LayerNorm):
    def forward(self, inputs):
        return super().forward(inputs - 1)


BATCH, CHANNELS = 5, 4
IMAGES = BATCH, CHANNELS, 3, 2
WITH_STATISTICS = partial(nn.InstanceNorm2d, CHANNELS, affine=True, track_running_stats=True)
NORMS = {
    "layer": (lambda: nn.LayerNorm(CHANNELS), (BATCH, 3, CHANNELS)),
    "layer-no-shift": (lambda: nn.LayerNorm(CHANNELS, bias=False), (BATCH, 3, CHANNELS)),
    "layer-two-dimensions": (lambda: nn.LayerNorm((2, 2)), (BATCH, 3, 2, 2)),
    "rms": (lambda: nn.RMSNorm(CHANNELS, eps=1e-3), (BATCH, 3, CHANNELS)),
    "group": (lambda: nn.GroupNorm(2, CHANNELS), IMAGES),
    "batch-1d": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS)),
    "batch-1d-positions": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS, 3)),
    "batch-2d": (lambda: nn.BatchNorm2d(CHANNELS, eps=1e-2), IMAGES),
    "batch-2d-evaluation": (lambda: nn.BatchNorm2d(CHANNELS).eval(), IMAGES),
    "batch-2d-no-statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False).eval(), IMAGES),
    "batch-3d": (lambda: nn.BatchNorm3d(CHANNELS), (*IMAGES, 2)),
    "instance-1d": (lambda: nn.InstanceNorm1d(CHANNELS, affine=True), (BATCH, CHANNELS, 6)),
    "instance-2d": (WITH_STATISTICS, IMAGES),
    "instance-2d-evaluation": (lambda: WITH_STATISTICS().eval(), IMAGES),
}
# Modules of any type that scale a function of their input.
SCALES = {
    "rms-found": (RMSNorm, (BATCH, 2, 6)),
    "gemma": (partial(RMSNorm, offset=1.0), (BATCH, 2, 6)),
    "scale": (LayerScale, (BATCH, 2, 6)),
    "own-layer-norm": (partial(Shifted, 6), (BATCH, 2, 6)),
}


def random_norm(make):
    """Return a module with random scale, shift and running statistics."""
    torch.manual_seed(2)
    module = make().double()
    with torch.no_grad():
        for name, part in (*module.named_parameters(), *module.named_buffers()):
            if part.is_floating_point():
                part.copy_(torch.rand_like(part) + (0.5 if "var" in name else 0))
    return module


@pytest.mark.parametrize(("make", "shape"), (NORMS | SCALES).values(), ids=NORMS | SCALES)
def test_rows_of_scale_and_shift_are_gradients_of_samples(make, shape):
    """A row is the gradient of one sample's output in the scale and shift of a channel."""
    module = random_norm(make)
    inputs = torch.randn(shape, dtype=DOUBLE)
    layer, rows = captured(module, inputs)
    torch.testing.assert_close(rows.inputs.sum(-2), layer.gradient()[:, 0], **TOLERANCE)
    expected = []
    for sample in range(BATCH):
        output = module(inputs) * (torch.arange(BATCH) == sample).reshape(-1, *[1] * (len(shape) - 1))
        parts = torch.autograd.grad(weighted(output), module.parameters())
        expected.append(torch.stack([part.flatten() for part in parts], -1))
    torch.testing.assert_close(rows.inputs, torch.stack(expected, 1), **TOLERANCE)


class LargestStorage(TorchDispatchMode):
    """Records the size of the largest storage that an operation returns."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("module", "extent"),
    [(nn.Conv2d(4, 2, 5, padding=2), 16), (nn.Conv3d(4, 2, 3, padding=1), 14), (nn.ConvTranspose2d(4, 2, 5), 20)],
)
def test_reduce_never_stores_the_windows(module, extent):
    """No tensor is larger than the padded input times the kernel's size in one dimension; windows would be."""
    inputs = torch.randn(2, 4, *[12] * (module.weight.ndim - 2))
    layer, _ = captured(module, inputs, sharing="reduce")
    (call,) = layer.capture.calls
    with LargestStorage() as largest:
        layer.rows("loss", None)
    bound = 4 * 2 * 4 * extent ** (module.weight.ndim - 2) * module.kernel_size[0]
    assert largest.bytes <= bound
    with LargestStorage() as largest:
        call.kind.uses(call.inputs, call.gradients["loss"][0])
    assert largest.bytes > 2 * bound


# --- Steps against dense formulas

STRATEGIES = full_rank(12)


class Doubled(nn.Linear):
    """Multiplies not by its input but by twice the input, inside its forward pass."""

    def forward(self, inputs):
        return super().forward(2 * inputs).relu()


class Adapter(nn.Module):
    """Two matrices in one module, multiplied by functions and operators, with transposes."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(3, 4))
        self.up_bias = nn.Parameter(torch.randn(4))

    def forward(self, inputs):
        hidden = inputs @ self.down.transpose(0, 1)
        return torch.addmm(self.up_bias, hidden.tanh().flatten(0, -2), self.up).unflatten(0, inputs.shape[:-1])


def two_dilations():
    """Two convolutions with one kernel: the module that was called makes the rows of a call."""
    convolutions = [nn.Conv1d(6, 6, 3, bias=False, dilation=size, padding=size) for size in (1, 2)]
    convolutions[1].weight = convolutions[0].weight
    return nn.Sequential(*convolutions)


draw = partial(gaussian, seed=1)
WORDS = torch.arange(12) * 7 % 20
# With the positional or keyword arguments of a call.
MODULES = {
    "linear": (nn.Linear(40, 35), [draw(6, 2, 40)]),
    "conv": (nn.Conv2d(5, 30, 3, stride=3), [draw(3, 5, 6, 6)]),
    "conv-groups": (nn.Conv2d(10, 60, 3, groups=2), [draw(4, 10, 4, 3)]),
    "conv-depthwise": (nn.Conv1d(3, 6, 5, groups=3, padding="same", padding_mode="circular"), [draw(4, 3, 8)]),
    "conv-transposed": (nn.ConvTranspose1d(12, 30, 3, stride=2), [draw(3, 12, 1)]),
    "attention": (nn.MultiheadAttention(34, 2), [draw(2, 6, 34)] * 3),
    "decoder": (nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0), [draw(5, 2, 8), draw(5, 2, 8).flip(0)]),
    "transposed": (Conv1D(40, 35), [draw(6, 2, 40)]),
    "own-type": (OwnLinear(40, 35), [draw(6, 2, 40)]),
    "layer-norm": (nn.LayerNorm(6), [draw(5, 3, 6)]),
    "batch-norm": (nn.BatchNorm2d(3), [draw(5, 3, 2, 2)]),
    "rms-norm": (nn.RMSNorm(6), [draw(5, 6)]),
    "conv-shared": (two_dilations(), [draw(5, 6, 8)]),
    "embedding": (nn.Embedding(20, 40), [WORDS.view(3, 4)]),
    "bag": (nn.EmbeddingBag(20, 4, mode="sum", padding_idx=1), [WORDS.view(3, 4)]),
    "bag-offsets": (nn.EmbeddingBag(20, 4, padding_idx=1), [WORDS, torch.tensor([0, 2, 2, 5])]),
    "keyword": (nn.Linear(6, 4), {"input": draw(6)}),
    "keyword-found": (Conv1D(), {"inputs": draw(6)}),
    "bilinear": (nn.Bilinear(6, 6, 4), [draw(5, 2, 6), draw(5, 2, 6).flip(0)]),
}
# Modules that K-FAC finds, at least in part, by what they compute.
FOUND = {
    "transposed-square": Conv1D(6, 6, bias=False),
    "own-type-no-bias": OwnLinear(bias=False),
    "own-type-square": OwnLinear(6, 6),
    "own-forward": Doubled(6, 4),
    "router": Router(bias=False),
    "two-matrices": Adapter(),
    **{name: make() for name, (make, _) in SCALES.items()},
}
MODULES |= {name: (module, [draw(5, 2, 6)]) for name, module in FOUND.items()}
# These are large enough for Brand in both sharings.
LARGE = {"linear", "conv", "transposed", "own-type"}
# Every kind of layer with a dense and a low-rank system, and every system with groups on both sides.
PAIRS = [
    (kind, system) for kind in MODULES for system in STRATEGIES if kind == "conv-groups" or system in ("exact", "brand")
]


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("application", ["auto", "two-sided"])
@pytest.mark.parametrize(("kind", "system"), PAIRS)
def test_one_batch_equals_the_dense_formula(kind, system, application, sharing):
    """For groups, both forms of the application, both sharings, and every strategy at full rank."""
    module, arguments = MODULES[kind]
    module = copy.deepcopy(module).double()

    def run():
        return module(**arguments) if isinstance(arguments, dict) else module(*arguments)

    plain = run()
    preconditioner = KFAC(module, STRATEGIES[system], application=application, sharing=sharing, **DENSE)
    output = run()
    torch.testing.assert_close(output, plain, rtol=0, atol=0)
    (weighted(output) / 5).backward()
    assert_dense_step(preconditioner)
    report = preconditioner.report()
    assert report.unsupported == {}
    assert kind not in LARGE or {row.reason for row in report.factors} == {""}
    assert len(preconditioner.parameters()) == len(list(module.parameters()))
    preconditioner.remove()
    assert "forward" not in vars(module)


# --- A network with every kind of layer: training, compiled and in half precision


def words(*, attention=True):
    model = Words(30, 8, 3, channels=12, kernel=3, attention=attention).float()
    model.activation = torch.relu
    return model


@pytest.mark.parametrize("strategy", (SYSTEMS | STRUCTURED).values(), ids=SYSTEMS | STRUCTURED)
def test_every_kind_of_layer_trains(strategy):
    """After seven steps all periods have passed; training may take more. Structured: with "reduce" and autocast."""
    half = strategy in STRUCTURED.values()
    # A two-level step couples the layers. Clipped layer by layer, it need not be downhill through an attention.
    model = words(attention=not isinstance(strategy, TwoLevel))
    preconditioner = KFAC(model, strategy, sharing="reduce" if half else "expand", clip=0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    inputs = torch.randint(30, (64, 9), generator=torch.Generator().manual_seed(0))
    labels = torch.where((inputs < 8).sum(1) > 2, 1, 0)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = nn.functional.cross_entropy(model(inputs).float(), labels)
        after = stepped(model, preconditioner, loss)
        optimizer.step()
        losses.append(loss.item())
        if len(losses) >= 7 and losses[-1] < 0.8 * losses[0]:
            break
    assert all(torch.isfinite(part).all() for part in after)
    assert losses[-1] < 0.8 * losses[0]
    report = preconditioner.report()
    assert report.unsupported == {}
    assert all(row.reason != "no data yet" for row in report.factors)
    assert str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"gradient": "pair"}, {"curvature": "type-2"}], ids=str)
def test_autocast_agrees_with_full_precision(options, dtype):
    """The tolerance comes from the gradients' rounding error e, including units that cross a ReLU's kink.

    With relative damping 1, each side of the solve has condition 2, so it magnifies the gradient's error at most 4
    times. A and G are products of two rows with error e, so their errors are 2 e each, magnified 2 times: 12 e in all.
    """
    before, after = [], []
    for enabled in (True, False):
        model, scaler = words(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        preconditioner = KFAC(model, EXACT, damping=1.0, clip=None, scaler=scaler, **options)
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = loss_of(model, (torch.arange(21).reshape(3, 7), torch.arange(3)), preconditioner)
        scaler.scale(loss).backward()
        scaler.unscale_(torch.optim.SGD(model.parameters()))
        before.append(gradients(model))
        preconditioner.step()
        after.append(gradients(model))
    errors = [
        max(float((one - other).norm() / other.norm()) for one, other in zip(*own, strict=True))
        for own in (after, before)
    ]
    assert errors[0] < 12 * errors[1]
