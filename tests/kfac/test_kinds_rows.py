"""The rows that every kind of module gives, against the gradient and the output that they must make up."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brandla.kfac import KFAC
from brandla.kfac.capture.layer import Layer
from brandla.kfac.values import Rows
from kfac.networks import EXACT, one_hot, weighted

pytestmark = [
    pytest.mark.filterwarnings("ignore:KFAC"),
    # torch says that an uneven "same" costs a copy.
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]

# Sums of float64 numbers of size 1 in two orders: at most a few thousand terms, each rounded at 1e-16.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def captured(module: nn.Module, inputs: Tensor, sharing: str = "expand") -> tuple[Layer, Rows]:
    """The layer of a copy of a module after one backward pass of a loss with a random weight for each output."""
    module = copy.deepcopy(module)
    preconditioner = KFAC(module, EXACT, sharing=sharing)
    weighted(module(inputs)).backward()
    (layer,) = preconditioner._layers
    # It takes its hooks and what they caught along when it goes.
    layer.owner = preconditioner
    rows = layer.rows("loss", None)
    assert rows is not None
    return layer, rows


def assert_reduced(module: nn.Module, inputs: Tensor, rows: Rows) -> None:
    """In "reduce" the rows are means and sums over the positions of a sample."""
    _, reduced = captured(module, inputs, sharing="reduce")
    by_sample = [part.unflatten(-2, (-1, rows.positions)) for part in rows[:2]]
    torch.testing.assert_close(reduced.inputs, by_sample[0].mean(-2), **TOLERANCE)
    torch.testing.assert_close(reduced.gradients, by_sample[1].sum(-2), **TOLERANCE)
    assert reduced.uses * rows.positions == rows.uses


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


@pytest.mark.parametrize(("module", "shape"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_rows_of_a_convolution_make_up_its_gradient_and_its_output(module: nn.Module, shape: tuple[int, ...]):
    """Σ γ aᵀ over samples and positions, bias included, is what autograd gives."""
    module = module.double()
    torch.manual_seed(1)
    inputs = torch.randn(shape, dtype=torch.float64)
    layer, rows = captured(module, inputs)
    torch.testing.assert_close(rows.gradients.mT @ rows.inputs, layer.gradient(), **TOLERANCE)
    assert rows.inputs.shape[-2] == rows.gradients.shape[-2] == rows.uses
    samples = shape[0] if len(shape) == module.weight.ndim else 1
    assert rows.uses == samples * rows.positions

    matrix = layer.kind.matrix(module.weight)
    assert torch.equal(layer.kind.tensor(matrix), module.weight)
    # (groups, samples · positions, channels) to (samples, channels, positions)
    made = (rows.inputs[..., : matrix.shape[-1]] @ matrix.mT).reshape(module.groups, samples, rows.positions, -1)
    made = made.permute(1, 0, 3, 2).flatten(1, 2)
    output = module(inputs).reshape(samples, module.out_channels, -1)
    if module.bias is not None:
        output = output - module.bias[:, None]
    torch.testing.assert_close(made, output, **TOLERANCE)

    assert_reduced(module, inputs, rows)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (5, 3, 6), (2, 3, 4, 6)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_a_linear_make_up_its_gradient(shape: tuple[int, ...], bias: bool):
    module, inputs = nn.Linear(6, 4, bias=bias).double(), torch.randn(shape, dtype=torch.float64)
    layer, rows = captured(module, inputs)
    torch.testing.assert_close(rows.gradients.mT @ rows.inputs, layer.gradient(), **TOLERANCE)
    assert rows.positions == (1 if len(shape) < 3 else torch.Size(shape[1:-1]).numel())
    assert_reduced(module, inputs, rows)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_of_an_embedding_are_one_hot(shape: tuple[int, ...], padding_idx: int | None, sharing: str):
    indices = torch.randint(4, shape, generator=torch.Generator().manual_seed(0))
    layer, rows = captured(nn.Embedding(9, 4, padding_idx=padding_idx).double(), indices, sharing)
    torch.testing.assert_close(rows.gradients.mT @ one_hot(rows.inputs, 9), layer.gradient(), **TOLERANCE)
    assert torch.equal(rows.inputs < 0, indices.flatten() == (-1 if padding_idx is None else padding_idx))
    assert torch.equal(layer.kind.tensor(layer.gradient()), layer.kind.weight.grad)


BATCH, CHANNELS = 5, 4
NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(CHANNELS), (BATCH, 3, CHANNELS)),
    "layer-no-shift": (lambda: nn.LayerNorm(CHANNELS, bias=False), (BATCH, 3, CHANNELS)),
    "layer-two-dimensions": (lambda: nn.LayerNorm((2, 2)), (BATCH, 3, 2, 2)),
    "rms": (lambda: nn.RMSNorm(CHANNELS, eps=1e-3), (BATCH, 3, CHANNELS)),
    "group": (lambda: nn.GroupNorm(2, CHANNELS), (BATCH, CHANNELS, 3, 2)),
    "batch-1d": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS)),
    "batch-1d-positions": (lambda: nn.BatchNorm1d(CHANNELS), (BATCH, CHANNELS, 3)),
    "batch-2d": (lambda: nn.BatchNorm2d(CHANNELS, eps=1e-2), (BATCH, CHANNELS, 3, 2)),
    "batch-2d-evaluation": (lambda: nn.BatchNorm2d(CHANNELS).eval(), (BATCH, CHANNELS, 3, 2)),
    "batch-2d-no-statistics": (
        lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False).eval(),
        (BATCH, CHANNELS, 3, 2),
    ),
    "batch-3d": (lambda: nn.BatchNorm3d(CHANNELS), (BATCH, CHANNELS, 3, 2, 2)),
    "instance-1d": (lambda: nn.InstanceNorm1d(CHANNELS, affine=True), (BATCH, CHANNELS, 6)),
    "instance-2d": (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True),
        (BATCH, CHANNELS, 3, 2),
    ),
    "instance-2d-evaluation": (
        lambda: nn.InstanceNorm2d(CHANNELS, affine=True, track_running_stats=True).eval(),
        (BATCH, CHANNELS, 3, 2),
    ),
}


def random_norm(make: Callable[[], nn.Module]) -> nn.Module:
    """A normalisation with random scale, shift and running statistics."""
    torch.manual_seed(2)
    module = make().double()
    with torch.no_grad():
        for name, part in (*module.named_parameters(), *module.named_buffers()):
            if part.is_floating_point():
                part.copy_(torch.rand_like(part) + (0.5 if "var" in name else 0))
    return module


@pytest.mark.parametrize(("make", "shape"), NORMS.values(), ids=NORMS)
def test_rows_of_a_normalisation_are_gradients_of_samples(make: Callable[[], nn.Module], shape: tuple[int, ...]):
    """Each against a scale and shift for every sample of its own, differentiated by autograd."""
    module = random_norm(make)
    inputs = torch.randn(shape, dtype=torch.float64)
    layer, rows = captured(module, inputs)
    torch.testing.assert_close(rows.inputs.sum(-2), layer.gradient()[:, 0], **TOLERANCE)

    # The same network by hand, from the output with scale 1 and shift 0.
    scale = module.weight.detach().flatten().expand(len(inputs), -1).clone().requires_grad_()
    shift = torch.zeros_like(scale, requires_grad=True)
    offset = getattr(module, "bias", None)
    with torch.no_grad():
        module = random_norm(make)
        module.weight.fill_(1)
        if offset is not None:
            module.bias.fill_(0)
        plain = module(inputs)
    last = isinstance(module, nn.LayerNorm | nn.RMSNorm)
    view = (len(inputs), *([1] * (inputs.ndim - 1 - module.weight.ndim)), *module.weight.shape)
    if not last:
        view = (len(inputs), CHANNELS, *([1] * (inputs.ndim - 2)))
    weighted(plain * scale.view(view) + shift.view(view)).backward()
    parts = [scale.grad] if offset is None else [scale.grad, shift.grad]
    torch.testing.assert_close(rows.inputs, torch.stack(parts, -1).transpose(0, 1), **TOLERANCE)


class LargestStorage(TorchDispatchMode):
    """Notes the largest storage that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["2d", "3d", "transposed-2d"])
def test_reduce_never_stores_the_windows(name: str):
    """No tensor is larger than the padded input times the kernel's size in one dimension; windows would be."""
    module = {
        "2d": nn.Conv2d(4, 2, 5, padding=2),
        "3d": nn.Conv3d(4, 2, 3, padding=1),
        "transposed-2d": nn.ConvTranspose2d(4, 2, 5),
    }[name]
    inputs = torch.randn(2, 4, *[12] * (module.weight.ndim - 2))
    layer, _ = captured(module, inputs, sharing="reduce")
    (call,) = layer.capture.calls
    with LargestStorage() as largest:
        layer.rows("loss", None)
    extent = 12 + 2 * 2 if name != "transposed-2d" else 12 + 2 * 4
    bound = 4 * 2 * 4 * extent ** (module.weight.ndim - 2) * module.kernel_size[0]
    assert largest.bytes <= bound
    with LargestStorage() as largest:
        call.kind.uses(call.inputs, call.gradients["loss"][0])
    assert largest.bytes > 2 * bound
