"""Steps to a target with K-FAC, expand and reduce, beside AdamW, Muon and SOAP: vision transformers and graph networks.

Run by ``make study-expand-reduce``. Figures are steps and losses: how busy the machine is makes no difference.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from bench.frame import pages, pictures
from bench.frame.images import CLASSES, FOLDER, Images, fashion, seeded, standardised
from bench.frame.pictures import Theme
from bench.frame.study import Piece, Row, Study, command
from bench.gpu.device import Device
from bench.studies.kfac_methods import Numbers, points, spread
from bench.studies.kfac_page import BASE, NOTHING, over_base, ranged
from bench.studies.peers import SOAP, Muon
from brandla.demo import data
from brandla.demo.data import Split
from brandla.demo.frame import Tables, Tick
from brandla.demo.training import Trainer
from brandla.kfac import KFAC, Exact

DIGITS, FASHION = "digits", "fashion-mnist"
# A target is what every run of AdamW has reached in this share of its steps, in whole per cent.
SHARE = 0.75
PATCHES, HEADS, LAYERS = 4, 4, 2  # patches along a side
NEIGHBOURS = 8


class ViT(nn.Module):
    """A vision transformer over 4 × 4 patches, each with its place as one-hot entries, whose outputs are averaged."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        self.side = round(pixels**0.5) // PATCHES
        layer = partial(nn.TransformerEncoderLayer, width, HEADS, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.first = nn.Linear(self.side**2 + PATCHES**2, width)
        self.layers = nn.Sequential(*(layer() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.unflatten(1, (PATCHES, self.side, PATCHES, self.side)).transpose(2, 3).flatten(3).flatten(1, 2)
        places = torch.eye(PATCHES**2, device=images.device).expand(len(images), -1, -1)
        hidden = self.first(torch.cat([parts, places], 2))
        return self.head(self.norm(self.layers(hidden)).mean(1))


class Sage(nn.Module):
    """A graph convolution: a Linear layer of each node's features beside the mean of its neighbours'."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * inputs, outputs)

    def forward(self, nodes: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        return self.linear(torch.cat([nodes, mean(nodes)], 1)).relu()


class Graphs(nn.Module):
    """A network for graphs: an image is the graph of its bright pixels, and a class is told by the mean over them."""

    # Says which graph each node is of; K-FAC has one of its own for "reduce".
    around: Callable[[Tensor, int], AbstractContextManager[None]] = staticmethod(lambda index, count: nullcontext())

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        side = round(pixels**0.5)
        rows, columns = torch.arange(pixels) // side, torch.arange(pixels) % side
        near = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs()) == 1
        self.register_buffer("near", near.nonzero().mT)
        self.register_buffer("places", nn.functional.one_hot(torch.stack([rows, columns], 1), side).flatten(1).float())
        self.layers = nn.ModuleList([Sage(1 + 2 * side, width), *(Sage(width, width) for _ in range(LAYERS))])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        bright = images > 0
        graph, place = bright.nonzero(as_tuple=True)
        number = bright.flatten().cumsum(0).sub(1).view_as(bright)
        of, edge = (bright[:, self.near[0]] & bright[:, self.near[1]]).nonzero(as_tuple=True)
        source, target = (number[of, ends[edge]] for ends in self.near)
        nodes = torch.cat([images[bright][:, None], self.places[place]], 1)
        with self.around(graph, len(images)):
            for layer in self.layers:
                nodes = layer(nodes, lambda features: mean_by(target, features[source], len(graph)))
        return self.head(mean_by(graph, nodes, len(images)))


class Nodes(nn.Module):
    """A network for nodes: images, at half their resolution, are those of one graph with edges from the nearest."""

    def __init__(self, pixels: int, width: int) -> None:
        super().__init__()
        side = round(pixels**0.5)
        self.smaller = nn.Sequential(nn.Unflatten(1, (1, side, side)), nn.AvgPool2d(2), nn.Flatten())
        self.layers = nn.ModuleList([Sage(pixels // 4, width), Sage(width, width)])
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        near = torch.cdist(images, images).topk(min(NEIGHBOURS + 1, len(images)), largest=False).indices[:, 1:]
        nodes = self.smaller(images)
        for layer in self.layers:
            nodes = layer(nodes, lambda features: features[near].mean(1))
        return self.head(nodes)


def mean_by(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of the rows of each index below ``count``; 0 where there is none."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, index, rows)
    return sums / rows.new_zeros(count).index_add(0, index, rows.new_ones(len(rows))).clamp_min(1)[:, None]


@dataclass(frozen=True)
class Task:
    """Images, a network that learns them, and how long it may."""

    name: str
    words: str
    images: Literal["digits", "fashion-mnist"]
    network: Literal["vit", "graphs", "nodes"]
    width: int
    batch: int
    steps: int  # of a run
    search_steps: int  # of a trial of the search
    evaluate_every: int


NETWORKS = {"vit": ViT, "graphs": Graphs, "nodes": Nodes}


@dataclass(frozen=True)
class Settings:
    """One study. Every method has ``trials`` trials a task, at the same points of its two ranges."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    # Of the trials' points, networks and batches: none of the seeds that are measured.
    search_seed: int = 1000
    # Steps between renewals of K-FAC's and SOAP's decompositions.
    renew_every: int = 5
    weight_decay: float = 0.01
    # Of the images of each part, the first so many judge.
    most_judged: int = 1000


USUAL = Settings(
    (
        Task("ViT, digits", "16 patches of 2 × 2 pixels", DIGITS, "vit", 64, 128, 160, 50, 5),
        Task("graphs, digits", "a graph of bright pixels for each image", DIGITS, "graphs", 64, 128, 120, 40, 5),
        Task("nodes, Fashion-MNIST", "each image of 14 × 14 pixels a node", FASHION, "nodes", 64, 512, 60, 24, 3),
    )
)
OF_FASHION = Task("ViT, Fashion-MNIST", "16 patches of 7 × 7 pixels", FASHION, "vit", 64, 128, 300, 80, 10)
FULL = replace(USUAL, tasks=(*USUAL.tasks, OF_FASHION))
QUICK = Settings(
    tuple(
        replace(task, images=DIGITS, width=8, batch=16, steps=2, search_steps=1, evaluate_every=1)
        for task in USUAL.tasks
    ),
    seeds=(0,),
    trials=1,
    most_judged=100,
)


# --- Methods


Make = Callable[[nn.Module, Numbers, Settings, int], Trainer]


def first_order(kind: str, model: nn.Module, numbers: Numbers, settings: Settings, seed: int) -> Trainer:
    """Return a model with AdamW, Muon or SOAP."""
    rate, beta, decay = numbers["rate"], 1 - numbers["1 − β₁"], settings.weight_decay
    optimizers: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
        "AdamW": lambda weights: torch.optim.AdamW(weights, rate, betas=(beta, 0.999), weight_decay=decay),
        "Muon": lambda weights: Muon(weights, rate, beta, decay),
        "SOAP": lambda weights: SOAP(weights, rate, (beta, 0.99), decay, settings.renew_every),
    }
    return Trainer(model, optimizers[kind](model.parameters()))


def kfac(
    sharing: Literal["expand", "reduce"], model: nn.Module, numbers: Numbers, settings: Settings, seed: int
) -> Trainer:
    """Return a model with K-FAC before SGD without momentum."""
    preconditioner = KFAC(model, Exact(settings.renew_every), damping=numbers["damping"], sharing=sharing, seed=seed)
    if isinstance(model, Graphs):
        model.around = preconditioner.graphs
    return Trainer(model, torch.optim.SGD(model.parameters(), numbers["rate"]), preconditioner)


FIRST_ORDER = {"rate": (3e-4, 0.03), "1 − β₁": (0.03, 0.3)}
OF_KFAC = {"rate": (0.01, 0.3), "damping": (0.003, 0.1)}
# The two numbers that are searched, each evenly in the logarithm, and what makes a trainer of them.
METHODS: dict[str, tuple[dict[str, tuple[float, float]], Make]] = {
    **{kind: (FIRST_ORDER, partial(first_order, kind)) for kind in ("AdamW", "Muon", "SOAP")},
    "K-FAC, expand": (OF_KFAC, partial(kfac, "expand")),
    "K-FAC, reduce": (OF_KFAC, partial(kfac, "reduce")),
}
COLOURS = {
    "AdamW": ("#5c5c5c", "#b4b8c2"),
    "Muon": ("#7f6000", "#ffd966"),
    "SOAP": ("#274e13", "#b6d7a8"),
    "K-FAC, expand": ("#e69f00", "#f0b840"),
    "K-FAC, reduce": ("#0072b2", "#56b4e9"),
}


def methods(task: Task) -> list[str]:
    """Return the methods of a task: where each node has a term of the loss, there is nothing to reduce."""
    return [method for method in METHODS if not (task.network == "nodes" and method == "K-FAC, reduce")]


# --- Runs


def load(name: str, device: str) -> Images:
    return standardised(Images(*data.load("cpu")) if name == DIGITS else fashion(FOLDER), device)


@torch.no_grad()
def judge(model: nn.Module, split: Split, chunk: int) -> tuple[float, float]:
    """Return the share of the images that are classified rightly, and the mean loss; ``chunk`` are judged at once."""
    right, loss = 0.0, 0.0
    for images, labels in zip(split.images.split(chunk), split.labels.split(chunk), strict=True):
        outputs = model(images)
        right += float((outputs.argmax(-1) == labels).sum())
        loss += float(nn.functional.cross_entropy(outputs, labels, reduction="sum"))
    return right / len(split.labels), loss / len(split.labels)


def pieces(settings: Settings, device: Device) -> list[Piece]:
    """Return the search of each task, and its runs."""
    where = str(device.tensors)
    images = cache(partial(load, device=where))
    cube = [point[:2] for point in points(settings)]
    found = []
    for task in settings.tasks:
        for method in methods(task):
            for at, point in enumerate(cube):
                numbers = spread(METHODS[method][0], point)
                key = {"task": task.name, "method": method, "point": at}
                trial = partial(tried, task, method, numbers, settings, images)
                found.append(Piece("trials", key, task.search_steps, trial))
        for seed in settings.seeds:
            for method in methods(task):
                key = {"task": task.name, "method": method, "seed": seed}
                run = partial(measured, task, method, seed, settings, images)
                found.append(Piece("runs", key, task.steps, run))
    return found


def tried(task: Task, method: str, numbers: Numbers, settings: Settings, images: Any, _: Tables, tick: Tick) -> Any:
    """Yield the score of a trial: its mean accuracy on the images that validate, 0 if it diverged."""
    parts = images(task.images)[2:]
    looks = list(looked(task, method, numbers, settings, parts, task.search_steps, settings.search_seed, tick))
    whole = all(look["loss"] is not None for look in looks)
    yield {"numbers": numbers, "score": sum(look["accuracy"] for look in looks) / len(looks) if whole else 0.0}


def measured(task: Task, method: str, seed: int, settings: Settings, images: Any, tables: Tables, tick: Tick) -> Any:
    """Yield a run with the numbers of the best trial."""
    own = [row for row in tables["trials"] if (row["task"], row["method"]) == (task.name, method)]
    numbers = max(own, key=lambda row: row["score"])["numbers"]
    parts = images(task.images)[:2]
    looks = looked(task, method, numbers, settings, parts, task.steps, seed, tick)
    yield {"numbers": numbers, "looks": list(looks)}


def looked(
    task: Task,
    method: str,
    numbers: Numbers,
    settings: Settings,
    parts: tuple[Split, Split],
    steps: int,
    seed: int,
    tick: Tick,
) -> Iterator[Row]:
    """Train on the first part at a constant rate, and yield accuracy and loss on the second at every few steps."""
    model = seeded(seed, NETWORKS[task.network], parts[0].images.shape[1], task.width).to(parts[0].images.device)
    trainer = METHODS[method][1](model, numbers, settings, seed)
    judging = Split(*(part[: settings.most_judged] for part in parts[1]))
    for step, batch in enumerate(data.batches(parts[0], task.batch, steps, seed), start=1):
        trainer.step(batch)
        tick(1 / steps)
        if step % task.evaluate_every == 0 or step == steps:
            accuracy, loss = judge(model, judging, task.batch)
            yield {"step": step, "accuracy": accuracy, "loss": loss if math.isfinite(loss) else None}


# --- Summaries


def target_of(content: Row, task: Row) -> float:
    """Return the accuracy that steps are counted to; NaN where AdamW has not run."""
    base = [row for row in content.get("runs", []) if (row["task"], row["method"]) == (task["name"], BASE)]
    early = [[at["accuracy"] for at in row["looks"] if at["step"] <= SHARE * task["steps"]] for row in base]
    return math.floor(1e-9 + 100 * min((max(looks) for looks in early), default=math.nan)) / 100 if base else math.nan


def summary(content: Row, task: Row) -> pd.DataFrame:
    """Return a row a method: mean, least and largest of the steps to the target, and of the last accuracy and loss."""
    rows = [row for row in content.get("runs", []) if row["task"] == task["name"]]
    if not rows:
        return pd.DataFrame()
    target = target_of(content, task)
    arrived = [[at["step"] for at in row["looks"] if at["accuracy"] >= target] for row in rows]
    runs = pd.DataFrame(
        {
            "method": [row["method"] for row in rows],
            "step": [min(steps, default=math.nan) for steps in arrived],
            "accuracy": [row["looks"][-1]["accuracy"] for row in rows],
            "loss": [math.nan if row["looks"][-1]["loss"] is None else row["looks"][-1]["loss"] for row in rows],
        }
    )
    by = runs.groupby("method", sort=False)
    parts = (by[part].agg(["mean", "min", "max"]).add_prefix(f"{part} ") for part in ("step", "accuracy", "loss"))
    found = pd.concat(parts, axis=1).assign(runs=by.size(), reached=by["step"].count())
    numbers = {row["method"]: "; ".join(f"{name} {value:g}" for name, value in row["numbers"].items()) for row in rows}
    return found.assign(numbers=pd.Series(numbers))


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a table a task: steps to the target, whoever wins, and what all steps lead to."""
    for task in content["settings"]["tasks"]:
        found, share = summary(content, task), target_of(content, task)
        target = "the target" if math.isnan(share) else f"{share:.0%}"
        if len(found):
            columns = {
                "method": found.index,
                f"steps to {target}": ranged(found, "step", "{:.0f}".format),
                f"× {BASE}": [NOTHING if math.isnan(ratio) else f"{ratio:.2f}" for ratio in over_base(found, "step")],
                "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
                "accuracy after all steps": ranged(found, "accuracy", lambda share: f"{100 * share:.1f} %"),
                "loss after all steps": ranged(found, "loss", "{:.3f}".format),
                "chosen by the search": found["numbers"],
            }
            yield f"{task['name']}, to {target}", pd.DataFrame({name: list(cells) for name, cells in columns.items()})


def section(content: Row, machine: str) -> Iterator[str]:
    """Yield the section of ``docs/measurements/kfac.md``."""
    settings = content["settings"]
    yield "### Expand and reduce: steps to a target\n\n`expand-reduce.json`, of `make study-expand-reduce`."
    yield f"Every method has two numbers to be searched and {settings['trials']} trials on each task, the same points"
    yield "of a Latin hypercube, on a part of the training images; then it runs from"
    yield f"{len(settings['seeds'])} seeds. Rates are constant. K-FAC is `Exact({settings['renew_every']})` before SGD"
    yield f"without momentum, with the default clip. The target of a task is what every run of {BASE} has reached in"
    yield f"{SHARE:.0%} of its steps, in whole per cent. Steps are those of the first look at or above it, on the"
    yield f"test images (at most {settings['most_judged']}): mean and range of the seeds, of the runs that got there."
    yield pages.caveats(content["facts"])
    yield pages.picture(STUDY.name, machine, "Test accuracy against steps, a panel for each task")
    for task, (title, cells) in zip(settings["tasks"], shown(content), strict=False):
        yield f"#### {title}\n\n{about(task)}\n"
        yield pages.markdown(cells)


def about(task: Row) -> str:
    """Say what a task is."""
    how = f"width {task['width']}, batches of {task['batch']}, {task['steps']} steps, a look every"
    return f"{task['words']}; {how} {task['evaluate_every']}; trials of {task['search_steps']} steps."


def draw(content: Row, theme: Theme) -> Figure:
    """Draw a panel a task: mean test accuracy over the seeds against steps, with the range."""
    tasks = [task for task in content["settings"]["tasks"] if len(summary(content, task))]
    words = f"{content['settings']['trials']} trials of each method beforehand; mean and range of the seeds"
    figure, axes = pictures.panels([3.6] * len(tasks), content, words, theme)
    for task, axis in zip(tasks, axes, strict=True):
        pictures.titled(axis, f"{task['name']}: test accuracy", task["words"], theme)
        runs = pd.DataFrame([row for row in content["runs"] if row["task"] == task["name"]])
        for method, own in runs.groupby("method", sort=False):
            looks = pd.DataFrame(own["looks"].explode().tolist())
            course = looks.groupby("step")["accuracy"].agg(["mean", "min", "max"]) * 100
            colour = theme.colour(*COLOURS[str(method)])
            style = "-" if "K-FAC" in str(method) else (0, (4, 1.5))
            axis.plot(course.index, course["mean"], color=colour, linewidth=1.7, linestyle=style, label=method)
            axis.fill_between(course.index, course["min"], course["max"], color=colour, alpha=0.13, linewidth=0)
        target = 100 * target_of(content, task)
        axis.axhline(target, color=theme.text, linewidth=1, linestyle=":")
        axis.set(ylim=(3 * target - 200 if target > 75 else 0, 100), ylabel="%")
    axes[0].legend(fontsize=9)
    axes[-1].set_xlabel("step")
    return figure


STUDY = Study("expand-reduce", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown, draw=draw, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
