"""PyTorch's default dtype and device are the user's: they change what a bare `torch.empty` gives, and nothing here."""

import copy

import pytest
import torch

import wrn_fast

DTYPES = [torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(autouse=True)
def defaults_kept():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def compare(seed, x, training, change):
    """The same model and seed before and after `change`: outputs, and in training gradients and buffers."""
    models = [wrn_fast.classic(10, 4, 4, 0.3).to(x.dtype).train(training)]
    models.append(copy.deepcopy(models[0]))
    results = []
    for model in models:
        if len(results) == 1:
            change()
        with torch.set_grad_enabled(training):
            # filters are packed into kept memory from the third call on
            for _ in range(1 if training else 3):
                torch.manual_seed(seed)
                y = model(x)
            if training:
                y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in model.parameters() if training), *model.buffers()])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("default", DTYPES)
def test_the_default_dtype_changes_nothing(seed, default, training):
    compare(seed, torch.randn(2, 3, 32, 32), training, lambda: torch.set_default_dtype(default))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_device_changes_nothing(seed, dtype, training):
    x = torch.randn(2, 3, 32, 32).to(dtype)
    compare(seed, x, training, lambda: torch.set_default_device("meta"))
