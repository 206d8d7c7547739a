"""The networks that studies train, each made from the size of a sample and a width."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from bench.frame.samples import CLASSES, CONTEXT, LETTERS
from brandla.demo.data import mlp

HIDDEN = 128  # units of the convolutional network's hidden layer
PATCHES, HEADS, LAYERS = 4, 4, 2  # patches along a side
NEIGHBOURS = 8


def two_hidden(inputs: int, width: int, outputs: int = CLASSES) -> nn.Sequential:
    """Return the MLP inputs-width-width-outputs."""
    return mlp(inputs, width, width, outputs)


def conv(pixels: int, channels: int) -> nn.Sequential:
    """Return two 3 × 3 convolutions, each with ReLU and 2 × 2 pooling, and two Linear layers, for square images."""
    side = round(pixels**0.5)
    return nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        *(nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *mlp(2 * channels * (side // 4) ** 2, HIDDEN, CLASSES),
    )


def strided(pixels: int, width: int) -> nn.Sequential:
    """Return a convolution, one with a stride, and two Linear layers, for images of 8 × 8 pixels."""
    layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), *mlp(576, width, CLASSES))


def letters_mlp(_: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Embedding(LETTERS, 16), nn.Flatten(), mlp(16 * CONTEXT, width, LETTERS))


class Transformer(nn.Module):
    """Two causal layers over letters."""

    def __init__(self, _: int, width: int) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, width), nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layers = [nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True) for _ in range(2)]
        self.layers, self.head = nn.ModuleList(layers), nn.Linear(width, LETTERS)

    def forward(self, codes: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=codes.device)
        hidden = self.letters(codes) + self.places
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden).mT


class Graph(nn.Module):
    """Two graph convolutions: each is a mean over the nearest neighbours in the batch, then a Linear layer."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, CLASSES)

    def forward(self, nodes: Tensor) -> Tensor:
        near = torch.cdist(nodes, nodes).topk(min(NEIGHBOURS, len(nodes)), largest=False).indices
        hidden = self.first(nodes[near].mean(1)).relu()
        return self.second(hidden[near].mean(1))


class ViT(nn.Module):
    """A vision transformer over 4 × 4 patches with one-hot positions, whose outputs are averaged."""

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
    """A network for graphs: an image is the graph of its bright pixels, and the mean over them tells its class."""

    # A context that tells which graph each node belongs to; K-FAC has one of its own for "reduce".
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
                nodes = layer(nodes, lambda features: mean_by_index(target, features[source], len(graph)))
        return self.head(mean_by_index(graph, nodes, len(images)))


class Nodes(nn.Module):
    """A network for nodes: images, at half their resolution, are the nodes of a graph with edges from the nearest."""

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


def mean_by_index(index: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return the mean of the rows with each index below ``count``; 0 without such rows."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, index, rows)
    return sums / rows.new_zeros(count).index_add(0, index, rows.new_ones(len(rows))).clamp_min(1)[:, None]
