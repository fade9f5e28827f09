"""One process of two: training steps of an accelerated network under fully_shard (FSDP2).

Usage: fsdp_worker.py RANK FOLDER. Saves the whole gradients, weights and buffers as FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from convert.networks import calls  # noqa: E402
from families import family_x  # noqa: E402
from models import shake  # noqa: E402

from wrn_fast import classic  # noqa: E402
from wrn_fast.convert import accelerate, report, restore  # noqa: E402


def networks(name):
    """The network and its images, equal in every process."""
    torch.manual_seed(0)
    model = shake(family_x.WideResNet(10, 10, 1) if name == "accelerated" else classic(10, 10, 1)).double()
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    return accelerate(model), images


def shard(model, mesh):
    for group in (model.block1, model.block2, model.block3):
        for block in group.layer:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def steps(model, images, rank):
    """Two steps of SGD on this rank's halves: the last gradients, the weights, the number of operator calls."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    counts = calls(lambda: model.eval()(images[0, :1]))
    model.train()
    for x in images:
        optimizer.zero_grad()
        model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        gradients = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
        optimizer.step()
    weights = {k: p.full_tensor().detach() for k, p in model.named_parameters()}
    return {"gradients": gradients, "weights": weights, "fprops": counts["fprop"]}


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for name in ("accelerated", "own"):
        model, images = networks(name)
        shard(model, mesh)
        found[name] = steps(model, images, rank)
        if name == "accelerated":
            found["reports"] = [str(report(model)), str(report(restore(model)))]
            found["after restore"] = calls(lambda model=model, images=images: model(images[0]))["fprop"]
    late = family_x.WideResNet(10, 10, 1)
    shard(late, mesh)
    found["sharded first"] = str(report(accelerate(late)))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
