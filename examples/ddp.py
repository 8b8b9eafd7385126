"""Private training on several processes: torchrun --nproc-per-node 2 examples/ddp.py.

Each process holds the whole model and takes a part of every batch. On GPUs, move model and data to
the process's device and choose the nccl backend; nothing else changes.
"""

import torch
import torch.distributed as dist
from torch import nn

import rootnoise as rn


def main() -> None:
    """Train a small classifier, and print on rank 0 what may be said about its privacy."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = torch.randn(768, 8, generator=torch.Generator().manual_seed(0))
    x, test_x = everything[:512], everything[512:]
    y, test_y = ((part[:, 0] + part[:, 1] > 0).long() for part in (x, test_x))

    sampler = rn.FixedCycleSampler(n_examples=len(x), batch_size=128, epochs=10)
    participation = sampler.participation
    bsr = rn.factorize(rn.SGD(sampler.n_steps, momentum=0.9), participation, "bsr")
    mechanism = rn.Mechanism.calibrate(bsr, participation, epsilon=8.0, delta=1e-5)

    module = rn.privatize(nn.Linear(8, 2), loss_reduction="sum")
    sgd = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    optimizer = rn.PrivateOptimizer(sgd, module, mechanism, sampler, process_group=dist.group.WORLD)
    for batch in sampler:
        part = batch[rank::size]
        optimizer.zero_grad()
        # A sum over examples, each of its own row alone: what mixes a batch is refused.
        nn.functional.cross_entropy(module(x[part]), y[part], reduction="sum").backward()
        optimizer.step(part)

    if rank == 0:
        with torch.no_grad():  # on other people's data: training accuracy is not covered
            accuracy = (module(test_x).argmax(1) == test_y).double().mean()
        print(f"accuracy {accuracy:.2f} on {size} processes. {optimizer.claim()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
