"""Private training of a sharded model: torchrun --nproc-per-node 2 examples/fsdp2.py.

Each process holds a part of every parameter, of the optimizer's state and of the noise. On GPUs,
make the mesh of "cuda" and choose the nccl backend; nothing else changes.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rootnoise as rn


def main() -> None:
    """Train a small classifier, and print on rank 0 what may be said about its privacy."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    everything = torch.randn(768, 8, generator=torch.Generator().manual_seed(0))
    x, test_x = everything[:512], everything[512:]
    y, test_y = ((part[:, 0] + part[:, 1] > 0).long() for part in (x, test_x))

    sampler = rn.FixedCycleSampler(n_examples=len(x), batch_size=128, epochs=10)
    participation = sampler.participation
    bsr = rn.factorize(rn.SGD(sampler.n_steps, momentum=0.9), participation, "bsr")
    mechanism = rn.Mechanism.calibrate(bsr, participation, epsilon=8.0, delta=1e-5)

    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    module = rn.privatize(model, loss_reduction="sum")
    sgd = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    optimizer = rn.PrivateOptimizer(sgd, module, mechanism, sampler)
    for batch in sampler:
        part = batch[rank::size]
        optimizer.zero_grad()
        # A sum over examples, each of its own row alone: what mixes a batch is refused.
        nn.functional.cross_entropy(module(x[part]), y[part], reduction="sum").backward()
        optimizer.step(part)

    with torch.no_grad():  # on other people's data: training accuracy is not covered
        accuracy = (module(test_x).argmax(1) == test_y).double().mean()
    if rank == 0:
        print(f"accuracy {accuracy:.2f} on {size} processes. {optimizer.claim()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
