"""A step captures the passes that made the gradient, whatever else the model is used for between two steps."""

import gc
import weakref
from functools import partial

import pytest
import torch
import torch._functorch.config
from torch import nn
from torch.utils.checkpoint import checkpoint

from brandla.kfac import KFAC, Brand, Exact
from kfac.networks import EXACT, batch, gradients, loss_of, mlp, stepped

CROSS_ENTROPY = nn.functional.cross_entropy


def plainly(model, inputs):
    return model(inputs)


def checkpointed(model, inputs):
    middle = checkpoint(model[:2], inputs, use_reentrant=False)
    return checkpoint(model[2:], middle, use_reentrant=False)


def reentrant(model, inputs):
    middle = checkpoint(model[:2], inputs.clone().requires_grad_(), use_reentrant=True)
    return checkpoint(model[2:], middle, use_reentrant=True)


def offloaded(model, inputs):
    with torch.autograd.graph.save_on_cpu():
        return model(inputs)


def steps(forward, parts, **options):
    """Return the gradients after three steps on 12 samples each, in ``parts``."""
    model = mlp(6, 8, 8, 4)
    preconditioner = KFAC(model, EXACT, clip=None, **options)
    for seed in range(3):
        inputs, labels = batch(12, 6, 4, seed)
        model.zero_grad()
        for part in parts:
            outputs = forward(model, inputs[part])
            if "curvature" in options:
                preconditioner.curvature(outputs)
            (CROSS_ENTROPY(outputs, labels[part], reduction="sum") / 12).backward()
        preconditioner.step()
        assert not any(layer.capture.calls or layer.capture.edges for layer in preconditioner._layers)
    return gradients(model)


@pytest.mark.parametrize(
    ("forward", "options"),
    [
        (plainly, {}),
        (plainly, {"application": "two-sided"}),
        (plainly, {"factor_every": 2}),
        (plainly, {"curvature": "empirical"}),
        (plainly, {"curvature": "type-2"}),
        (plainly, {"gradient": "pair"}),
        (checkpointed, {}),
        (checkpointed, {"gradient": "pair"}),
        (checkpointed, {"curvature": "type-2"}),
        (reentrant, {}),
        (offloaded, {}),
    ],
    ids=lambda own: getattr(own, "__name__", str(own)),
)
def test_neither_parts_of_a_batch_nor_where_activations_are_kept_make_a_difference(forward, options):
    whole = steps(plainly, [slice(0, 12)], **options)
    torch.testing.assert_close(steps(forward, [slice(0, 2), slice(2, 9), slice(9, 12)], **options), whole)


class Training:
    """A model in training, and the actions of a loop between two steps, right or wrong."""

    def __init__(self, *, disturbed, compiled=False, **options):
        self.model = mlp(6, 8, 8, 4)
        self.run = torch.compile(self.model, backend="aot_eager") if compiled else self.model
        self.preconditioner = KFAC(self.model, EXACT, **options)
        self.curved, self.disturbed = self.preconditioner if "curvature" in options else None, disturbed
        self.seed, self.labels = 0, batch(10, 6, 4)[1]

    def zero(self):
        self.model.zero_grad()

    def fill_with_zeros(self):
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def forward(self, forward=None, **options):
        self.seed += 1
        self.inputs, self.labels = batch(10, 6, 4, self.seed)
        self.inputs.requires_grad_(**options)
        self.loss = self.loss_of(self.inputs, forward)

    def loss_of(self, inputs, forward=None):
        run = self.run if forward is None else partial(forward, self.model)
        return loss_of(run, (inputs, self.labels), self.curved)

    def backward(self):
        self.loss.backward()

    def attack(self):
        """Train on inputs moved along a gradient from the graph; undisturbed, from the graph of a copied model."""
        loss = self.loss if self.disturbed else CROSS_ENTROPY(mlp(6, 8, 8, 4)(self.inputs), self.labels)
        (direction,) = torch.autograd.grad(loss, self.inputs, retain_graph=True)
        self.loss = self.loss + self.loss_of((self.inputs + 0.1 * direction.sign()).detach())

    # The following actions must leave no trace. They use another batch, and a larger loss.

    def give_up(self):
        inputs, self.labels = batch(10, 6, 4, 100)
        (50 * self.loss_of(inputs)).backward()

    def give_up_the_graph(self):
        (50 * self.loss).backward(retain_graph=True)

    def ask_for_inputs(self):
        inputs, labels = batch(10, 6, 4, 100)
        inputs.requires_grad_()
        torch.autograd.grad(50 * CROSS_ENTROPY(self.run(inputs), labels), inputs)

    def ask_the_graph_for_inputs(self):
        torch.autograd.grad(50 * self.loss, self.inputs, retain_graph=True)

    def fail_forward(self):
        hidden = self.model[:3](batch(10, 6, 4, 100)[0])
        with pytest.raises(RuntimeError, match="shapes"):
            self.model[3:](hidden[:, :3])

    def fail_backward(self):
        """Fail in the loss's backward pass, or before it in the passes for the curvature."""

        def forward(model, inputs):
            hidden = model[:2](inputs)
            hidden.register_hook(lambda gradient: gradient[:0])
            return model[2:](hidden)

        with pytest.raises(RuntimeError, match="changed the size"):
            self.loss_of(batch(10, 6, 4, 100)[0], forward).backward()

    def evaluate(self):
        with torch.no_grad():
            self.run(batch(10, 6, 4, 100)[0])
        with torch.inference_mode():
            self.run(batch(10, 6, 4, 100)[0])

    def freeze(self):
        """Send no gradient to frozen weights: no hook of the capture may ask for one."""
        loss = CROSS_ENTROPY(self.run(batch(10, 6, 4, 100)[0]), batch(10, 6, 4, 100)[1])
        self.model.requires_grad_(False)
        loss.backward()
        self.model.requires_grad_(True)

    def call_with_other_parameters(self):
        other = {name: parameter.detach() * 2 for name, parameter in self.model.named_parameters()}
        functional = torch.func.functional_call
        torch.func.grad(lambda own: functional(self.model, own, batch(10, 6, 4)[0]).square().mean())(other)

    def derive(self):
        torch.testing.assert_close(derivatives(self.model), derivatives(mlp(6, 8, 8, 4)))


def derivatives(model):
    """Return derivatives in the inputs, by torch.func."""
    inputs = batch(10, 6, 4)[0]
    return [
        torch.func.grad(lambda inputs: model(inputs).square().sum())(inputs),
        torch.func.jacrev(model)(inputs[0]),
        torch.func.vjp(model, inputs)[1](torch.ones(10, 4, dtype=torch.float64)),
    ]


T = Training
forward_alone = partial(T.forward, requires_grad=False)
DISTURBING = {
    *(T.give_up, T.give_up_the_graph, T.ask_for_inputs, T.ask_the_graph_for_inputs, T.fail_forward, T.fail_backward),
    *(T.evaluate, T.freeze, T.call_with_other_parameters, T.derive),
}
LOOPS = {
    "gradient-of-inputs-first": [T.zero, T.ask_for_inputs, forward_alone, T.backward],
    "gradient-of-inputs-into-zeros": [T.fill_with_zeros, T.ask_for_inputs, T.forward, T.backward],
    "gradient-of-inputs-of-the-graph": [T.zero, T.forward, T.ask_the_graph_for_inputs, T.backward],
    "gradient-of-inputs-in-every-part": [T.zero, *(T.ask_for_inputs, T.forward, T.backward) * 2],
    "adversarial": [T.zero, T.forward, T.attack, T.backward],
    "given-up-then-zeroed-after-forward": [T.give_up, forward_alone, T.zero, T.backward],
    "given-up-between-forward-and-backward": [T.forward, T.give_up, T.zero, T.backward],
    "given-up-through-the-graph": [T.forward, T.give_up_the_graph, T.zero, T.backward],
    "given-up-before-checkpoints": [T.give_up, partial(T.forward, forward=reentrant), T.zero, T.backward],
    "failed-forward": [T.fail_forward, T.zero, T.forward, T.backward],
    "failed-backward": [T.fail_backward, T.zero, T.forward, T.backward],
    "evaluated": [T.zero, T.evaluate, T.forward, T.evaluate, T.backward, T.evaluate],
    "frozen": [T.zero, T.freeze, T.forward, T.backward],
    "functional": [T.zero, T.derive, T.forward, T.call_with_other_parameters, T.derive, T.backward],
}
COMPILED = [
    *("gradient-of-inputs-of-the-graph", "gradient-of-inputs-in-every-part"),
    *("given-up-between-forward-and-backward", "evaluated"),
]
# Loops for gradient="pair": nothing but the captured calls may reach the weights' gradients.
LEFT_OUT = ["gradient-of-inputs-first", "evaluated", "functional"]
# Passes for the curvature do not go through a reentrant checkpoint, and only the last call of `curvature` counts.
CURVED = sorted(LOOPS.keys() - {"given-up-before-checkpoints", "given-up-between-forward-and-backward"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in LOOPS),
        *((name, {"curvature": kind}) for name in CURVED for kind in ("empirical", "type-2")),
        *((name, {"gradient": "pair"}) for name in LEFT_OUT),
        *((name, {"compiled": True}) for name in COMPILED),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
# The compiler requires this for graphs with more than one backward pass.
@torch._functorch.config.patch(donated_buffer=False)
def test_passes_that_do_not_reach_the_gradient_do_not_reach_the_factors(name, options):
    compiled = "compiled" in options
    if compiled:
        torch.compiler.reset()
    own, reference = Training(disturbed=True, **options), Training(disturbed=False, **options | {"compiled": False})
    for _ in range(3):
        for training in (own, reference):
            for act in LOOPS[name]:
                if training.disturbed or act not in DISTURBING:
                    act(training)
            training.preconditioner.step()
        tolerance = {"rtol": 1e-7, "atol": 1e-7} if compiled else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(gradients(own.model), gradients(reference.model), **tolerance)


def test_a_compiled_functional_derivative_is_that_of_the_model():
    torch.compiler.reset()
    model = mlp(6, 8, 8, 4)
    preconditioner = KFAC(model, EXACT)
    derivative = torch.func.grad(lambda inputs: model(inputs).square().sum())
    found = torch.compile(derivative, backend="aot_eager")(batch(10, 6, 4)[0])
    torch.testing.assert_close(found, derivatives(mlp(6, 8, 8, 4))[0])
    assert all(layer.capture.calls == [] for layer in preconditioner._layers)


def by_hand(model, inputs, labels, plain):
    loss = CROSS_ENTROPY(model(inputs), labels)
    if plain:
        loss.backward()
        return
    for parameter, gradient in zip(model.parameters(), torch.autograd.grad(loss, model.parameters()), strict=True):
        parameter.grad = gradient


def in_reentrant_checkpoints_of_one_weight(model, inputs, labels, plain):
    """Nested backward passes add to the gradient of the middle layer, which is used twice."""
    hidden = model[:2](inputs)
    again = [model[2](hidden) if plain else checkpoint(model[2], hidden, use_reentrant=True) for _ in range(2)]
    CROSS_ENTROPY(model[3:](again[0] + again[1].tanh()), labels).backward()


def through_one_graph_twice(model, inputs, labels, plain):
    """The graph's rows count twice, as the rows of two graphs do."""
    first, second = (CROSS_ENTROPY(model(inputs), labels) / 2 for _ in range(2))
    first.backward(retain_graph=True)
    (second if plain else first).backward()


@pytest.mark.parametrize("backward", [by_hand, in_reentrant_checkpoints_of_one_weight, through_one_graph_twice])
def test_other_passes_that_make_the_gradient_are_in_the_factors(backward):
    found = []
    for plain in (True, False):
        model = mlp(6, 8, 8, 4)
        preconditioner = KFAC(model, EXACT, clip=None, application="two-sided")
        backward(model, *batch(10, 6, 4), plain)
        preconditioner.step()
        assert all(layer.curvature.started for layer in preconditioner._layers)
        found.append(gradients(model))
    # The rows are summed in another order, and each factor's inverse has condition 1/damping = 33.
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_inputs_are_dropped_if_a_checkpoint_drops_them():
    """Between forward and backward, no capture holds the input of the second layer."""
    model = mlp(6, 8, 4)
    preconditioner = KFAC(model, EXACT)
    seen = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0].untyped_storage())))
    inputs, labels = batch(10, 6, 4)
    loss = CROSS_ENTROPY(checkpoint(model, inputs, use_reentrant=False), labels)
    gc.collect()
    assert seen[0]() is None
    loss.backward()
    assert len(seen) == 2
    preconditioner.step()
    # The loss is still alive, and with it the graph.
    assert loss.grad_fn is not None
    assert preconditioner.report().captured_bytes == 8 * 10 * (6 + 8 + 8 + 4)
    assert not any(layer.capture.calls for layer in preconditioner._layers)


@pytest.mark.parametrize("change", ["scaled", "replaced", "not-empty", "zeroed"])
def test_a_gradient_that_is_more_or_less_than_the_pair_is_applied_two_sided(change):
    """Other parts of the gradient reach the step; the application to the pair would drop them."""
    results = []
    for application in ("auto", "two-sided"):
        model, data = mlp(10, 20, 4), batch(3, 10, 4)
        preconditioner = KFAC(model, EXACT, clip=None, application=application)
        if change == "not-empty":
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
        loss = loss_of(model, data)
        loss.backward()
        if change == "zeroed":
            # The first pass's rows stay, since the gradient was never None.
            model.zero_grad(set_to_none=False)
            loss_of(model, batch(3, 10, 4, 2)).backward()
            for layer in preconditioner._layers:
                layer.gradient_is_pair = True
        for parameter in model.parameters():
            if change == "scaled":
                parameter.grad.mul_(0.25)
            if change == "replaced":
                parameter.grad = parameter.grad * 3
        preconditioner.step()
        results.append(gradients(model))
    torch.testing.assert_close(*results)


def test_modules_without_a_gradient_are_left_alone_until_they_have_one():
    model, data = nn.ModuleList(nn.Linear(6, 3, dtype=torch.float64) for _ in range(3)), batch(8, 6, 3)
    preconditioner = KFAC(model, Exact(inverse_every=3), factor_every=5)

    def used(inputs):
        """Call two modules, and use the output of one."""
        model[2](inputs)
        return model[0](inputs)

    for forward in (used, used, model[1]):
        model.zero_grad()
        loss_of(forward, data).backward()
        before = gradients(model)
        preconditioner.step()
        assert not torch.equal(gradients(model)[0], before[0])
        assert len(gradients(model)) == 2
        idle = {row.layer for row in preconditioner.report().factors if row.reason == "no data yet"}
        assert idle == ({"1", "2"} if forward is used else {"2"})


def test_factors_are_updated_every_so_many_steps_only():
    model = mlp(10, 20, 4)
    preconditioner = KFAC(model, Brand(3), factor_every=3, application="two-sided")
    totals = []
    for seed in range(7):
        stepped(model, preconditioner, loss_of(model, batch(4, 10, 4, seed)))
        totals.append(preconditioner._layers[0].curvature.input.state["total"].item())
    once, twice, thrice = (1 - 0.95**count for count in (1, 2, 3))
    assert totals == pytest.approx([once] * 3 + [twice] * 3 + [thrice])
