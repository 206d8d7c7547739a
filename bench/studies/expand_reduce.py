"""Steps to a target with K-FAC, expand and reduce, beside AdamW, Muon and SOAP: vision transformers and graph networks.

Run by ``make study-expand-reduce``. Figures are steps and losses, so the machine's other work makes no difference.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from statistics import fmean
from typing import Literal

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from bench.frame import pictures
from bench.frame.pictures import Theme
from bench.frame.samples import FOLDER, fashion, standardised
from bench.frame.study import Piece, Row, Study, Tables, command, sweep
from bench.gpu.device import Device
from bench.studies import kfac_page
from bench.studies.kfac_methods import numbers_at, optimizer, points
from bench.studies.kfac_page import BASE, by_method, ratio_text, with_range
from bench.studies.networks import Graphs, Nodes, ViT
from brandla.demo import data
from brandla.demo.data import Split, seeded
from brandla.demo.studies import Trainer, train_and_evaluate
from brandla.kfac import KFAC, Exact

DIGITS, FASHION = "digits", "fashion-mnist"
# A target is the accuracy that every run of AdamW has reached in this share of its steps, in whole per cent.
SHARE = 0.75


@dataclass(frozen=True)
class Task:
    """Images, a network that learns them, and the lengths of its runs."""

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
    """The settings of the study. Every method has ``trials`` trials a task, at the same points of its two ranges."""

    tasks: tuple[Task, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trials: int = 8
    search_seed: int = 1000  # the seed of the trials' points, networks and batches, which no measured run has
    renew_every: int = 5  # steps between renewals of K-FAC's and SOAP's decompositions
    weight_decay: float = 0.01
    most_judged: int = 1000  # only the first so many images of a part are judged


USUAL = Settings(
    (
        Task("ViT, digits", "16 patches of 2 × 2 pixels", DIGITS, "vit", 64, 128, 160, 50, 5),
        Task("graphs, digits", "a graph of bright pixels for each image", DIGITS, "graphs", 64, 128, 120, 40, 5),
        Task("nodes, Fashion-MNIST", "each image of 14 × 14 pixels a node", FASHION, "nodes", 64, 512, 60, 24, 3),
    )
)
OF_FASHION = Task("ViT, Fashion-MNIST", "16 patches of 7 × 7 pixels", FASHION, "vit", 64, 128, 300, 80, 10)
FULL = replace(USUAL, tasks=(*USUAL.tasks, OF_FASHION))
SMALL = {"images": DIGITS, "width": 8, "batch": 16, "steps": 2, "search_steps": 1, "evaluate_every": 1}
QUICK = Settings(tuple(replace(task, **SMALL) for task in USUAL.tasks), seeds=(0,), trials=1, most_judged=100)


FIRST_ORDER = ("AdamW", "Muon", "SOAP")
EXPAND, REDUCE = "K-FAC, expand", "K-FAC, reduce"
# The ranges of the two numbers that are searched, both evenly in the logarithm.
ADAM_RANGES = {"rate": (3e-4, 0.03), "1 − β₁": (0.03, 0.3)}
KFAC_RANGES = {"rate": (0.01, 0.3), "damping": (0.003, 0.1)}
METHODS = dict.fromkeys(FIRST_ORDER, ADAM_RANGES) | dict.fromkeys((EXPAND, REDUCE), KFAC_RANGES)
COLOURS = kfac_page.COLOURS | {EXPAND: pictures.PALETTE[4], REDUCE: pictures.PALETTE[0]}


# --- Runs


def pieces(settings: Settings, device: Device, tables: Tables) -> Iterator[Piece]:
    """Yield the search of each task, then its runs."""
    load = lambda images: data.load("cpu") if images == DIGITS else fashion(FOLDER)
    samples = cache(lambda images: standardised(load(images), str(device.tensors)))

    def trial(task: Task, method: str, point: int) -> Iterator[Row]:
        """Yield the score of a trial: its mean accuracy on the validation images, 0 if it diverged."""
        numbers, seed = numbers_at(METHODS[method], points(settings)[point][:2]), settings.search_seed
        looks = train(task, method, numbers, settings, samples(task.images)[2:], task.search_steps, seed)
        whole = all(math.isfinite(look["loss"]) for look in looks)
        yield {"numbers": numbers, "score": fmean(look["accuracy"] for look in looks) if whole else 0.0}

    def run_seed(task: Task, method: str, seed: int) -> Iterator[Row]:
        """Yield a run with the numbers of the best trial."""
        trials = [row for row in tables["trials"] if (row["task"], row["method"]) == (task.name, method)]
        numbers = max(trials, key=lambda row: row["score"])["numbers"]
        looks = train(task, method, numbers, settings, samples(task.images)[:2], task.steps, seed)
        yield {"numbers": numbers, "looks": looks}

    for task in settings.tasks:
        # There is nothing to reduce if each node has a term of the loss.
        methods = [method for method in METHODS if not (task.network == "nodes" and method == REDUCE)]
        trials = product([task], methods, range(settings.trials))
        yield from sweep("trials", ("task", "method", "point"), trials, trial, cost=task.search_steps)
        runs = [(task, method, seed) for seed in settings.seeds for method in methods]
        yield from sweep("runs", ("task", "method", "seed"), runs, run_seed, cost=task.steps)


def train(task, method, numbers, settings, parts: tuple[Split, Split], steps, seed) -> list[Row]:
    """Train on the first part at a constant rate; return accuracy and loss on the second part at every few steps."""
    training, judging = parts[0], Split(*(part[: settings.most_judged] for part in parts[1]))
    model = seeded(seed, NETWORKS[task.network], training.images.shape[1], task.width).to(training.images.device)
    if method in FIRST_ORDER:
        numbers = numbers | {"weight decay": settings.weight_decay}
        trainer = Trainer(model, optimizer(method, model.parameters(), numbers, settings))
    else:
        # K-FAC preconditions SGD without momentum.
        sharing = method.removeprefix("K-FAC, ")
        kfac = KFAC(model, Exact(settings.renew_every), damping=numbers["damping"], sharing=sharing, seed=seed)
        if isinstance(model, Graphs):
            model.around = kfac.graphs
        trainer = Trainer(model, torch.optim.SGD(model.parameters(), numbers["rate"]), kfac)
    looks = {*range(task.evaluate_every, steps, task.evaluate_every), steps}
    batches = data.batches(training, task.batch, steps, seed)
    run = train_and_evaluate(trainer, batches, lambda model: judge(model, judging, task.batch), looks)
    if run["failure"]:
        raise RuntimeError(run["failure"])
    return [{name: look[name] for name in ("step", "accuracy", "loss")} for look in run["evaluations"]]


@torch.no_grad()
def judge(model: nn.Module, split: Split, chunk: int) -> Row:
    """Return the share of rightly classified images, and the mean loss; ``chunk`` images are judged at once."""
    outputs = torch.cat([model(images) for images in split.images.split(chunk)])
    right = (outputs.argmax(-1) == split.labels).double().mean()
    return {"accuracy": float(right), "loss": float(nn.functional.cross_entropy(outputs, split.labels))}


# --- Summaries


def courses(content: Row) -> Iterator[tuple[Row, pd.DataFrame, float]]:
    """Yield each task with its looks, a row each, and its target in %, which is NaN without runs of AdamW."""
    for task in content["settings"]["tasks"]:
        if runs := [row for row in content.get("runs", []) if row["task"] == task["name"]]:
            looks = pd.json_normalize(runs, "looks", ["method", "seed", "numbers"]).astype({"accuracy": float})
            early = looks[(looks["method"] == BASE) & (looks["step"] <= SHARE * task["steps"])]
            least = early.groupby("seed")["accuracy"].max().min()
            yield task, looks, math.nan if early.empty else math.floor(1e-9 + 100 * least)


def summary(looks: pd.DataFrame, target: float) -> pd.DataFrame:
    """Return a row for each method: mean, least and largest steps to the target, last accuracy and last loss."""
    run = ["method", "seed"]
    first = looks[looks["accuracy"] >= target / 100].groupby(run)["step"].min()
    ended = looks.drop_duplicates(run, keep="last").set_index(run).assign(step=first).reset_index()
    words = lambda numbers: "; ".join(f"{name} {value:g}" for name, value in numbers.items())
    numbers = looks.groupby("method")["numbers"].first().map(words)
    return by_method(ended, ["step", "accuracy", "loss"]).assign(numbers=numbers)


def shown(content: Row) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield a table for each task: steps to the target, and accuracy and loss after all steps."""
    for task, looks, percent in courses(content):
        found, target = summary(looks, percent), "the target" if math.isnan(percent) else f"{percent}%"
        columns = {
            "method": found.index,
            f"steps to {target}": with_range(found, "step", "{:.0f}".format),
            f"× {BASE}": found["step over"].map(ratio_text),
            "reached by": found["reached"].astype(str) + " of " + found["runs"].astype(str),
            "accuracy after all steps": with_range(found, "accuracy", lambda share: f"{100 * share:.1f} %"),
            "loss after all steps": with_range(found, "loss", "{:.3f}".format),
            "chosen by the search": found["numbers"],
        }
        yield f"{task['name']}, to {target}", pd.DataFrame(columns).reset_index(drop=True)


def draw(content: Row, theme: Theme) -> Figure:
    """Draw a panel for each task: mean and range of the test accuracy over the seeds against steps."""
    found = list(courses(content))
    words = f"{content['settings']['trials']} trials of each method beforehand; mean and range of the seeds"
    about = [(f"{task['name']}: test accuracy", task["words"], 3.6) for task, *_ in found]
    figure, axes = pictures.panels(content, words, theme, *about)
    for axis, (_, looks, target) in zip(axes, found, strict=True):
        lines = looks.pivot(index=["step", "seed"], columns="method", values="accuracy")[looks["method"].unique()]
        pictures.curves(axis, 100 * lines, COLOURS, theme, (EXPAND, REDUCE), linewidth=1.7)
        axis.axhline(target, color=theme.text, linewidth=1, linestyle=":")
        axis.set(ylim=(3 * target - 200 if target > 75 else 0, 100), ylabel="%")
    axes[0].legend(fontsize=9)
    axes[-1].set_xlabel("step")
    return figure


STUDY = Study("expand-reduce", {"quick": QUICK, "usual": USUAL, "full": FULL}, pieces, shown, threads=1)

if __name__ == "__main__":
    command(STUDY, __doc__)()
