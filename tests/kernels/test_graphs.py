"""Graphs of the triton backend, played on the CPU: a graph packs and folds nothing, and nothing in it goes stale."""

import pytest
from kernels import graphs


@pytest.mark.parametrize(
    "w_dtype, norm_dtype", [("float16", "float32"), ("float32", "float32"), ("float16", "float16")]
)
def test_a_graph_has_a_kernel_a_convolution_and_no_other(interpreter, seed, w_dtype, norm_dtype):
    names, right = interpreter(graphs.kernels, seed, w_dtype, norm_dtype)
    assert names == ["_conv_kernel"] * 4 and right


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("hidden", [False, True], ids=["counted", "hidden"])
def test_what_changes_in_place_is_followed(interpreter, seed, name, hidden):
    """Hidden: as a fused optimizer or a broadcast writes, past the version counter."""
    assert all(interpreter(graphs.changed, seed, name, hidden))


def test_unchanged_filters_are_left_alone(interpreter, seed):
    assert interpreter(graphs.left_alone, seed) == (True, True)


def test_refresh_finds_what_no_sample_shows(interpreter, seed):
    assert all(interpreter(graphs.single_elements, seed))


def test_a_batch_norm_of_strided_vectors_is_made_by_the_graph(interpreter, seed):
    assert interpreter(graphs.strided, seed)
