"""One process of two: a training step of an accelerated network under DistributedDataParallel.

Usage: ddp_worker.py RANK FOLDER. Saves gradients and buffers as FOLDER/RANK.pt.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from convert.networks import FAMILIES  # noqa: E402
from models import shake  # noqa: E402

from wrn_fast.convert import accelerate, report  # noqa: E402


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name in ("x spare", "ssl", "reference"):
        torch.manual_seed(0)
        model = shake(FAMILIES[name]()).double()
        x = torch.randn(4, 3, 32, 32, dtype=torch.float64)[2 * rank : 2 * rank + 2]
        parallel = DistributedDataParallel(accelerate(model), find_unused_parameters=True)
        assert report(parallel).accelerated
        out = parallel(x)
        (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        torch.save(
            {
                "gradients": {k: p.grad for k, p in model.named_parameters()},
                "buffers": dict(model.named_buffers()),
            },
            folder / f"{name} {rank}.pt",
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
