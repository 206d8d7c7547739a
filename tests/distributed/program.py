"""A program for torchrun: train two replicas, and say whether their weights are equal."""

import gc

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from brandla.kfac import KFAC, Brand


def train() -> bool:
    """Take three steps, and compare with the weights of the first process."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 50)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFAC(model, Brand(8), distributed="split")
    torch.manual_seed(1 + distributed.get_rank())
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(8, 40)), torch.randint(50, (8,))).backward()
        preconditioner.step()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    first = weights.clone()
    distributed.broadcast(first, 0)
    return torch.equal(weights, first)


def main() -> None:
    """Train in a group, and take it down when nothing holds it any more.

    A DistributedDataParallel that outlives the group leaves threads to the end of the interpreter, which now and
    then aborts then: "terminate called without an active exception", without K-FAC as well.
    """
    distributed.init_process_group("gloo")
    print("equal" if train() else "different", flush=True)
    gc.collect()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
