"""A network with every kind of layer: training, compiled and in half precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from brandla.kfac import KFAC, InverseFree, Strategy, TwoLevel
from brandla.kfac.systems.structures import STRUCTURES
from kfac.networks import EXACT, stepped
from kfac.systems import SYSTEMS

pytestmark = pytest.mark.filterwarnings("ignore:KFAC")


INDICES, LABELS = torch.arange(21).reshape(3, 7), torch.arange(3)


class Words(nn.Module):
    """Indices with padding, attention, whole gradients, channels in groups, positions."""

    def __init__(self, attention: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(30, 8, padding_idx=0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True) if attention else None
        self.norm = nn.LayerNorm(8)
        self.conv = nn.Conv1d(8, 12, 3, groups=2)
        self.out = nn.Linear(12, 3)

    def forward(self, indices: Tensor) -> Tensor:
        vectors = self.words(indices)
        if self.attention is not None:
            vectors = vectors + self.attention(vectors, vectors, vectors, need_weights=False)[0]
        return self.out(torch.relu(self.conv(self.norm(vectors).mT)).mean(-1))


STRUCTURED = {structure: InverseFree(structure, preconditioner_every=1) for structure in STRUCTURES}


@pytest.mark.parametrize("strategy", (SYSTEMS | STRUCTURED).values(), ids=SYSTEMS | STRUCTURED)
def test_every_kind_of_layer_trains(strategy: Strategy):
    """In seven steps, when all periods have come round, or some more. Structured: in "reduce", under autocast."""
    half = strategy in STRUCTURED.values()
    # A two-level step couples the layers: shortened layer by layer, it need not go downhill through an attention.
    model = Words(attention=not isinstance(strategy, TwoLevel))
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


@pytest.mark.parametrize("options", [{}, {"sharing": "reduce"}, {"curvature": "type-2"}], ids=str)
def test_autocast_gives_nearly_the_same_factors(options: dict):
    """Inputs and gradients in bfloat16, ε = 2⁻⁸, through the layers; factors in float32."""
    states = []
    for enabled in (False, True):
        model = Words()
        preconditioner = KFAC(model, EXACT, **options)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(INDICES)
            if "curvature" in options:
                preconditioner.curvature(outputs)
            loss = nn.functional.cross_entropy(outputs, LABELS)
        loss.backward()
        preconditioner.step()
        states.append({layer.name: layer.curvature for layer in preconditioner._layers})
    for name, curvature in states[0].items():
        for (_, plain), (_, half) in zip(curvature.factors(), states[1][name].factors(), strict=True):
            key = "diagonal" if "diagonal" in plain.state else "dense"
            difference = torch.linalg.vector_norm(half.state[key] - plain.state[key])
            assert half.state[key].dtype == torch.float32
            assert difference <= 40 * 2**-8 * torch.linalg.vector_norm(plain.state[key]), name


# The compiler instantiates autograd functions, and looks at .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_a_compiled_model_gets_the_same_step():
    steps = []
    for compiled in (False, True):
        model = Words()
        preconditioner = KFAC(model, EXACT)
        forward = torch.compile(model, backend="aot_eager") if compiled else model
        nn.functional.cross_entropy(forward(INDICES), LABELS).backward()
        preconditioner.step()
        assert preconditioner.report().unsupported == {}
        steps.append([part.grad for part in model.parameters()])
    for eager, compiled in zip(*steps, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4 * float(eager.abs().max()))
