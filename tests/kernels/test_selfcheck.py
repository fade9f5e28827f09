"""The check that a tile computes right on a GPU: passes right kernels, names wrong ones, and is remembered."""

import pytest
import torch
from kernels import checked


@pytest.mark.parametrize("source", [False, True], ids=["plain", "source"])
@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_right_kernel_passes(interpreter, op, dtype, source):
    assert interpreter(checked.check, op, dtype, source, 1) is None


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_strided_kernels_pass(interpreter, op):
    assert interpreter(checked.check, op, torch.float32, True, 2) is None


@pytest.mark.parametrize("op", ["fprop", "dgrad", "wgrad"])
def test_kernels_that_read_boxes_pass(interpreter, op):
    assert interpreter(checked.check, op, torch.float16, op != "dgrad", 1, True) is None


def test_a_wrong_second_accumulator_is_named(interpreter):
    sentence = interpreter(checked.wrong)
    assert "64x32+16" in sentence and "integers are wrong" in sentence


def test_what_passed_is_remembered_and_what_failed_is_not(interpreter, tmp_path):
    tmp_path.chmod(0o700)
    first, again, new_process, damaged, wrong, still_wrong, files = interpreter(checked.history, str(tmp_path))
    assert first == (1, None) and again == (0, None) and new_process == (0, None) and damaged == (1, None)
    assert wrong[0] == still_wrong[0] == 1 and "wrong" in wrong[1] and wrong == still_wrong
    assert files == (0, None)
