"""Models under torch.compile are captured without graph breaks, and take the same steps."""

import shutil
from functools import partial

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

from brandla.kfac import KFAC
from brandla.kfac.capture.tap import Ticket, collect
from kfac.networks import EXACT, batch, encoder, gradients, loss_of, mlp, stepped, train

# The compiler instantiates autograd functions, uses torch.jit, and reads .grad of non-leaf tensors.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute")

WHOLE, EAGER = (partial(torch.compile, backend=own) for own in ("aot_eager", "eager"))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.up = nn.Linear(width, 2 * width, dtype=torch.float64)
        self.down = nn.Linear(2 * width, width, dtype=torch.float64)

    def forward(self, inputs):
        # The norm is used twice. Its rows are made of the input and the gradient of each use.
        return self.norm(inputs + self.down(nn.functional.relu(self.up(self.norm(inputs)), inplace=True)))


def blocks(count=1):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(6) for _ in range(count)))


def checkpointed(model):
    def forward(inputs):
        for block in model:
            inputs = checkpoint(block, inputs, use_reentrant=False)
        return inputs

    return WHOLE(forward)


def block_by_block(model):
    """Compile each block separately."""
    for block in model:
        block.compile(backend="aot_eager")
    return model


# Inductor builds with the system's C++ compiler, whose link line allows no path with a space. Scalar code without
# optimisation and without precompiled headers builds fastest.
BUILT_SOON = {
    "cpp.vec_isa_ok": False,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.debug_compile": True,
    "compile_threads": 1,
}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__, reason="needs g++, and an environment whose path has no space"
)


@pytest.mark.parametrize(
    ("make", "compiled", "options", "graphs"),
    [
        (blocks, WHOLE, {}, 1),
        # On a CPU this mode does the same as on a GPU, except CUDA graphs.
        pytest.param(blocks, partial(torch.compile, mode="reduce-overhead"), {}, 1, marks=needs_compiler),
        # One graph for the first block, whose input needs no gradient, and one for all others.
        (partial(blocks, 4), block_by_block, {}, 2),
        (blocks, checkpointed, {}, None),
        (blocks, WHOLE, {"curvature": "type-2"}, 1),
        (blocks, WHOLE, {"curvature": "monte-carlo"}, 1),
        (blocks, EAGER, {"gradient": "pair"}, 1),
        # One graph with the op that captures, and one without.
        (blocks, EAGER, {"factor_every": 2, "application": "two-sided"}, 2),
        (encoder, EAGER, {}, 1),
    ],
)
def test_compiled_steps_are_those_of_the_eager_model(make, compiled, options, graphs):
    """Also if the preconditioner gets the compiled model."""
    model, reference, data = make(), make(), [batch(8, 6, 6, seed) for seed in range(4)]
    run = compiled(model)
    preconditioner = KFAC(run if isinstance(run, nn.Module) else model, EXACT, **options)
    # The compiler requires this setting for a graph with several backward passes.
    with torch._functorch.config.patch(donated_buffer="curvature" not in options), inductor.patch(BUILT_SOON):
        train(model, preconditioner, data, loss=lambda _, own: loss_of(run, own, preconditioner))
    assert dict(counters["graph_break"]) == {}
    assert graphs in (None, counters["stats"]["unique_graphs"])
    plain = KFAC(reference, EXACT, **options)
    train(reference, plain, data, loss=lambda _, own: loss_of(reference, own, plain))
    torch.testing.assert_close(list(model.parameters()), list(reference.parameters()))


def test_compiled_blocks_keep_the_names_of_their_layers():
    """Options refer to these names, and both models can load each other's states."""
    states = []
    for compiled in (False, True):
        torch.manual_seed(0)
        blocks = [Block(6), Block(6)]
        model = nn.Sequential(*(EAGER(block) for block in blocks) if compiled else blocks)
        preconditioner = KFAC(model, {"": EXACT, "1.up": None}, damping=0.1)
        names = [layer.name for layer in preconditioner._layers]
        assert [name for name in names if "norm" not in name] == ["0.up", "0.down", "1.down"]
        assert preconditioner.report().unsupported["1.up"] == "inverse is None"
        stepped(model, preconditioner, model(batch(8, 6, 2)[0]).square().mean())
        states.append(preconditioner.state_dict())
        preconditioner.load_state_dict(states[0])
    assert states[0]["layers"].keys() == states[1]["layers"].keys()


def test_a_warning_names_layers_in_older_graphs_and_all_layers_are_left_alone_after_remove():
    """One layer of the model is compiled."""
    model = mlp(6, 8, 4)
    run, data = nn.Sequential(EAGER(model[:2]), model[2]), batch(12, 6, 4)

    def step():
        """Take a step, and return for each gradient whether it is unchanged."""
        model.zero_grad()
        loss_of(run, data).backward()
        before = gradients(model)
        preconditioner.step()
        return list(map(torch.equal, before, gradients(model)))

    loss_of(run, data).backward()
    preconditioner = KFAC(model, EXACT)
    unseen = r"no call that made it was captured.*torch.compiler.reset\(\) after the construction\): 0$"
    with pytest.warns(UserWarning, match=unseen) as caught:
        assert step() == [True, True, False, False]
    assert caught[0].filename == __file__
    torch.compiler.reset()
    assert not any(step())
    assert all(row.reason == "" for row in preconditioner.report().factors)
    loss_of(run, data).backward()
    preconditioner.remove()
    assert all(step())
    preconditioner = None
    loss_of(run, data).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model))


def test_the_op_passes_torch_opcheck_and_stays_outside_of_cuda_graphs():
    """A replay would not run the Python code that hands over the rows."""
    assert torch.Tag.cudagraph_unsafe in torch.ops.brandla_kfac.collect.default.tags
    collected = []
    kind = KFAC(nn.Linear(2, 2))._layers[0].kind
    ticket = Ticket(kind, lambda kind, inputs, gradient: collected.append((inputs, gradient)))
    arguments = (ticket.number, torch.randn(3, 2), torch.randn(2, 3).mT)
    torch.library.opcheck(collect, arguments)
    result = collect(*arguments)
    assert torch.equal(result, arguments[2])
    assert result.data_ptr() != arguments[2].data_ptr()
    assert collected[-1] == arguments[1:]
    gone = ticket.number
    del ticket
    assert torch.equal(collect(gone, *arguments[1:]), arguments[2])
