"""Train a WideResNet: `python -m wrn_fast.recipes.train --data FOLDER`, or under torchrun on several processes.

SGD with Nesterov momentum, weight decay and steps of 0.2, as Zagoruyko and Komodakis (Wide Residual Networks, BMVC
2016, section 3) train; random crops and, but for digits, flips; autocast; an exponential moving average beside the
weights; a checkpoint an epoch, from which `--resume` goes on bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wrn_fast.demo import data
from wrn_fast.errors import WrnFastError
from wrn_fast.model import WideResNet
from wrn_fast.recipes import files
from wrn_fast.reference import BLOCKS

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Shares of the epochs after which the learning rate falls: 60, 120 and 160 of 200.
MILESTONES = (0.3, 0.6, 0.8)
_NOT_IN_THE_PLAN = ("data", "out", "resume", "device", "threads")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("python -m wrn_fast.recipes.train", description="Train a WideResNet.")
    option = parser.add_argument
    option("--data", metavar="PATH", help="folder with CIFAR-10, CIFAR-100 or SVHN files (default: handwritten digits)")
    option("--limit", type=int, default=0, help="most training images (default: all)")
    option("--depth", type=int, default=28, help="3ln + 4 for blocks of l convolutions (default: 28)")
    option("--width", type=int, default=10, help="widening factor (default: 10)")
    option("--block", choices=BLOCKS, default=BLOCKS[0], help="kernel sizes of a block (default: B(3,3))")
    option("--dropout", type=float, default=0.0, help="probability inside the blocks (default: 0)")
    option("--epochs", type=int, default=200, help="default: 200")
    option("--batch", type=int, default=128, help="images a step and process (default: 128)")
    option("--lr", type=float, default=0.1, help="first learning rate (default: 0.1)")
    option("--decay", type=float, default=5e-4, help="weight decay (default: 5e-4)")
    option("--ema", type=float, default=0.999, help="of the averaged weights (default: 0.999)")
    option("--amp", choices=AMP, default="off", help="dtype of autocast (default: off)")
    option("--seed", type=int, default=0, help="of weights, images and dropout (default: 0)")
    option("--threads", type=int, help="CPU threads a process (default: PyTorch's choice)")
    option("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    option("--out", type=Path, default=Path("run"), metavar="FOLDER", help="of last.pt, best.pt, history.json")
    option("--resume", action="store_true", help="go on from last.pt in FOLDER, if there is one")
    options = parser.parse_args(words)
    for name, least in (("epochs", 1), ("batch", 2), ("limit", 0)):
        if getattr(options, name) < least:
            raise WrnFastError(f"--{name}: expected at least {least}, got {getattr(options, name)}")
    if not 0.0 <= options.ema < 1.0:
        raise WrnFastError(f"--ema: expected at least 0 and below 1, got {options.ema}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise WrnFastError("--device: expected cpu, because PyTorch finds no GPU here, got cuda")
    return options


@contextlib.contextmanager
def processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """(rank, number of processes, device), from torchrun's environment; gloo on CPUs, nccl on GPUs."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device(device, local) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    if count > 1:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield rank, count, place
    finally:
        if count > 1:
            dist.destroy_process_group()


def batches(split: data.Split, batch: int, rank: int, count: int, seed: int) -> list[Tensor]:
    """The rows of each step of this process: one permutation for all, a last smaller batch left out."""
    order = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(seed))
    return [rows[rank::count] for rows in order.split(batch * count) if len(rows) == batch * count]


def augment(x: Tensor, flip: bool) -> Tensor:
    """Each image [N, 3, H, W] moved by up to 4 pixels over a border of zeros and, if `flip`, mirrored or not."""
    n, _, h, w = x.shape
    padded = F.pad(x, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    down, right = torch.randint(9, (2, n, 1, 1)).to(x.device)
    rows = torch.arange(h, device=x.device).view(1, h, 1) + down
    columns = torch.arange(w, device=x.device).view(1, 1, w).expand(n, 1, w)
    if flip:
        mirrored = (torch.rand(n, 1, 1) < 0.5).to(x.device)
        columns = torch.where(mirrored, w - 1 - columns, columns)
    images = torch.arange(n, device=x.device).view(n, 1, 1)
    return padded[images, rows, columns + right].permute(0, 3, 1, 2)


class Run:
    """Model, average, optimizer and schedule of one process, and what of them a checkpoint holds."""

    def __init__(self, options: argparse.Namespace, split: data.Split, count: int, device: torch.device) -> None:
        self.options, self.split, self.count, self.device = options, split, count, device
        self.plan = {k: v for k, v in vars(options).items() if k not in _NOT_IN_THE_PLAN}
        self.plan |= {"images": split.name, "classes": split.classes, "processes": count}
        torch.manual_seed(options.seed)
        model = WideResNet(
            options.depth, split.classes, options.width, options.dropout, head="classic", dropout_in_eval=False,
            block=options.block,
        )  # fmt: skip
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(options.ema), use_buffers=True)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=options.decay
        )
        milestones = sorted({max(1, round(share * options.epochs)) for share in MILESTONES})
        self.schedule = torch.optim.lr_scheduler.MultiStepLR(self.optimizer, milestones, gamma=0.2)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        self.parallel: nn.Module = self.model
        if count > 1:
            self.parallel = DistributedDataParallel(self.model, [device.index] if device.type == "cuda" else None)
        self.history: list[dict[str, float]] = []

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model, "average": self.average, "optimizer": self.optimizer, "schedule": self.schedule,
            "scaler": self.scaler,
        }  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on; random numbers are seeded anew in each."""
        return {"plan": self.plan, "history": self.history} | {k: v.state_dict() for k, v in self._parts().items()}

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.history = state["history"]

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        dtype = AMP[self.options.amp]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def epoch(self, rank: int, progress: Progress) -> dict[str, float]:
        """One pass over the training images, then the accuracies of the weights and of their average."""
        number, options, split = len(self.history), self.options, self.split
        order = batches(split, options.batch, rank, self.count, options.seed * 1_000_003 + number)
        torch.manual_seed((options.seed * 1_000_003 + number) * self.count + rank)
        task = progress.add_task(f"epoch {number + 1} of {options.epochs}", total=len(order))
        self.parallel.train()
        total, began = torch.zeros((), device=self.device), time.perf_counter()
        for rows in order:
            # a mirrored digit is another sign
            x, y = augment(split.train_x[rows], split.name.startswith("CIFAR")), split.train_y[rows]
            with self.autocast():
                loss = F.cross_entropy(self.parallel(x.contiguous(memory_format=torch.channels_last)), y)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.average.update_parameters(self.model)
            total += loss.detach()
            progress.advance(task)
        self.schedule.step()
        if self.count > 1:
            dist.all_reduce(total)
        mean = total.item() / (len(order) * self.count)
        seconds, images = time.perf_counter() - began, len(order) * options.batch * self.count
        progress.remove_task(task)
        return {
            "epoch": number + 1, "loss": mean, "accuracy": self.accuracy(self.model),
            "average_accuracy": self.accuracy(self.average), "images": images, "seconds": seconds,
        }  # fmt: skip

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that are classified right, in eval mode."""
        model.eval()
        right = 0
        for x, y in zip(self.split.test_x.split(self.options.batch), self.split.test_y.split(self.options.batch)):
            with self.autocast():
                right += int((model(x).argmax(1) == y).sum())
        return right / len(self.split.test_y)


def train(options: argparse.Namespace) -> list[dict[str, float]]:
    """The whole run; the history."""
    if options.threads:
        torch.set_num_threads(options.threads)
    with processes(options.device or ("cuda" if torch.cuda.is_available() else "cpu")) as (rank, count, device):
        split = data.load(options.data, limit=options.limit, seed=options.seed).to(device)
        if len(split.train_x) < options.batch * count:
            raise WrnFastError(
                f"--batch: expected at most {len(split.train_x) // count} of {len(split.train_x)} images"
            )
        run = Run(options, split, count, device)
        options.out.mkdir(parents=True, exist_ok=True)
        last = options.out / "last.pt"
        if options.resume and last.exists():
            run.load(files.load_checkpoint(last, run.plan))
        console = Console(stderr=True, quiet=rank > 0)
        hidden = rank > 0 or not sys.stderr.isatty()
        with Progress(console=console, disable=hidden, transient=True) as progress:
            while len(run.history) < options.epochs:
                row = run.epoch(rank, progress)
                run.history.append(row)
                console.print("  ".join(f"{k} {v:g}" for k, v in row.items()))
                if rank == 0:
                    files.save_checkpoint(last, run.state())
                    if row["average_accuracy"] >= max(r["average_accuracy"] for r in run.history):
                        files.save_checkpoint(options.out / "best.pt", {"state_dict": run.average.module.state_dict()})
                    files.save_history(options.out / "history.json", run.history)
        return run.history


def main(words: list[str] | None = None) -> int:
    """The exit status."""
    try:
        train(parse(words))
    except WrnFastError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
