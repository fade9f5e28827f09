"""Accelerated models over several processes: DDP, FSDP2, and children by fork and spawn."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert.fsdp_worker import networks
from convert.networks import FAMILIES
from models import shake

from wrn_fast import parity
from wrn_fast.convert import restore

DOUBLE = torch.float64
ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def two_ranks(name, folder):
    """Both processes of a worker script to their end; what each saved is in the folder."""
    worker = Path(__file__).with_name(name)
    processes = [subprocess.Popen([sys.executable, str(worker), str(r), str(folder)], env=ENV) for r in range(2)]
    assert [p.wait(timeout=240) for p in processes] == [0, 0]


def test_distributed_data_parallel_equals_one_process(tmp_path):
    two_ranks("ddp_worker.py", tmp_path)
    for name in ("x spare", "ssl", "reference"):
        torch.manual_seed(0)
        model = shake(FAMILIES[name]()).double()
        x = torch.randn(4, 3, 32, 32, dtype=DOUBLE)
        state = copy.deepcopy(model.state_dict())
        want = {}
        for half in x.split(2):  # each rank has batch statistics of its own; gradients are averaged
            model.load_state_dict(state)
            out = model(half)
            (out[0] if isinstance(out, tuple) else out).square().sum().backward()
        want = {k: None if p.grad is None else p.grad / 2 for k, p in model.named_parameters()}
        first, second = (torch.load(tmp_path / f"{name} {r}.pt", weights_only=True) for r in range(2))
        for key, value in want.items():
            a, b = first["gradients"][key], second["gradients"][key]
            if value is None:
                assert a is None or not a.any(), key
            else:
                assert torch.equal(a, b), key
                assert parity.error(a, value) <= parity.FLOAT64 or not value.any(), key


def test_fully_sharded_training_equals_one_process(tmp_path):
    """FSDP2 over blocks and the whole: two steps of two ranks are one process's mean over both halves."""
    two_ranks("fsdp_worker.py", tmp_path)
    first, second = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    for name, fprops in (("accelerated", 6), ("own", 7)):
        model, images = networks(name)
        restore(model)
        start = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for x in images:
            optimizer.zero_grad()
            for half in x.split(2):
                model(half).square().mean().div(2).backward()
            optimizer.step()
        for key, p in model.named_parameters():
            for rank in (first[name], second[name]):
                assert rank["fprops"] == fprops
                assert parity.error(rank["gradients"][key], p.grad) <= parity.FLOAT64, key
                assert parity.error(rank["weights"][key], p.detach()) <= parity.FLOAT64, key
            assert not torch.equal(p, start[key])
    assert "3 accelerated, 0 left" in first["reports"][0]
    assert "0 accelerated, 3 left" in first["reports"][1] and first["after restore"] == 0
    assert "sharded (FSDPBasicBlock): accelerate before fully_shard" in first["sharded first"]


SPAWNED = """
import multiprocessing, sys
sys.path[:0] = {path!r}
import torch
from families import family_x
from wrn_fast.block import FastBlock
from wrn_fast.convert import accelerate

def child(model, x, queue):
    plain = not any(isinstance(m, FastBlock) for m in model.modules())
    queue.put((plain, accelerate(model)(x).tolist()))

if __name__ == "__main__":
    torch.manual_seed(0)
    model, x = accelerate(family_x.WideResNet(10, 10, 1)).double().eval(), torch.randn(1, 3, 32, 32).double()
    model.requires_grad_(False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(model, x, queue))
    process.start()
    plain, values = queue.get(timeout=120)
    process.join()
    print(plain, torch.equal(torch.tensor(values, dtype=torch.float64), model(x)))
"""


@pytest.mark.long
def test_a_spawned_process_gets_the_plain_model(tmp_path):
    root = Path(__file__).resolve().parents[2]
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED.format(path=[str(root), str(root / "tests")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=240)
    assert done.stdout.split() == ["True", "True"], done.stderr


LOADED = """
import sys
sys.path[:0] = {path!r}
import torch
from torch.utils.data import DataLoader, Dataset
from families import family_x
from wrn_fast.block import FastBlock
from wrn_fast.convert import accelerate

class Features(Dataset):
    def __init__(self, model, x):
        self.model, self.x = model, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x, model = self.x[i : i + 1], self.model
        if not any(isinstance(m, FastBlock) for m in model.modules()):
            accelerate(model)
        with torch.no_grad():
            y = model(x)
        gradient = torch.autograd.grad(model(x.requires_grad_()).sum(), [x])[0]
        return torch.cat([y.flatten(), gradient.flatten()])

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, x = accelerate(family_x.WideResNet(10, 10, 4)).eval(), torch.randn(4, 3, 32, 32)
    model.requires_grad_(False)
    data = Features(model, x)
    want = torch.stack([data[i] for i in range(4)])  # the parent's threads have run
    # a child that hangs is an error after `timeout` seconds; one that spawns has to import torch first
    loader = DataLoader(data, 2, num_workers=2, multiprocessing_context=sys.argv[1], timeout=int(sys.argv[2]))
    print(all(torch.equal(torch.cat(list(loader)), want) for _ in range(2)))
"""


@pytest.mark.native
@pytest.mark.parametrize(("context", "seconds"), [("fork", 5), pytest.param("spawn", 100, marks=pytest.mark.long)])
def test_workers_of_a_loader_call_the_model_after_the_parent_did(context, seconds, tmp_path):
    """OpenMP's threads do not survive a fork; the bits are the same with one thread."""
    script = tmp_path / "loaded.py"
    script.write_text(LOADED.format(path=[str(ROOT), str(ROOT / "tests")]))
    command = [sys.executable, str(script), context, str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["True"], done.stderr
