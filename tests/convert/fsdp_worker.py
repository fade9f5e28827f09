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

from convert.networks import calls, randomised  # noqa: E402
from families import family_x  # noqa: E402

from wrn_fast.convert import accelerate, report, restore  # noqa: E402


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = accelerate(randomised(family_x.WideResNet(10, 10, 1)).double())
    images = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    for group in (model.block1, model.block2, model.block3):
        for block in group.layer:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    counts = calls(lambda: model.eval()(images[0, :1]))
    model.train()
    for x in images:
        optimizer.zero_grad()
        model(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        gradients = {k: p.grad.full_tensor() for k, p in model.named_parameters()}
        optimizer.step()
    found = {
        "fprops": counts["fprop"],
        "gradients": gradients,
        "weights": {k: p.full_tensor().detach() for k, p in model.named_parameters()},
        "output": model.eval()(images[0]).detach(),
        "reports": [str(report(model)), str(report(restore(model)))],
        "after restore": calls(lambda: model(images[0]))["fprop"],
    }
    late = family_x.WideResNet(10, 10, 1)
    for group in (late.block1, late.block2, late.block3):
        fully_shard(group.layer[0], mesh=mesh)
    found["sharded first"] = str(report(accelerate(late)))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
