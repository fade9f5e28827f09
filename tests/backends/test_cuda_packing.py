"""Packed filters of the cuda backend: the image that the kernels read, and when it is made again."""

from __future__ import annotations

import pytest
import torch
from backends import cuda_on_cpu

from wrn_fast import packing, parity
from wrn_fast.kernels import cuda_weights
from wrn_fast.kernels.cuda_passes import ptr
from wrn_fast.problem import ConvProblem

PLAIN = ConvProblem("cuda", torch.bfloat16, torch.bfloat16, 128, 32, 32, 160, 160, 3, 3, 1, (1, 1, 1, 1))


def pack(recorder, w, transpose=False, stream=0):
    """The buffer of one call."""
    return cuda_weights.packed(recorder, PLAIN, w, transpose, stream).tensor


def code(dtype):
    return cuda_on_cpu.CODES[str(dtype).removeprefix("torch.")]


def image_of(buffer, rows, columns, R, S, dtype):
    """The packed image as [rows, columns, R, S], read by sm90.h's words; what lies past the columns."""
    block = next(b for b in (160, 128, 96, 80, 64, 48, 32, 16) if rows % b == 0)
    chunks = -(-columns // 64)
    size = rows * chunks * 64 * R * S
    v = buffer[: 2 * size].view(dtype).view(rows // block, chunks, S, R, block, 8, 8)
    row = torch.arange(block)[:, None]
    v = v[:, :, :, :, row, torch.arange(8)[None, :] ^ row % 8]
    v = v.permute(0, 4, 1, 5, 6, 3, 2).reshape(rows, chunks * 64, R, S)
    return v[:, :columns], v[:, columns:]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["KCRS", "KRSC"])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, c, r, s", [(160, 80, 3, 3), (16, 3, 3, 3), (48, 64, 1, 1), (96, 130, 3, 1)])
@pytest.mark.parametrize("transpose", [False, True], ids=["fprop", "dgrad"])
def test_the_image_of_a_filter(recorder, k, c, r, s, transpose, w_dtype, memory):
    w = torch.randn(k, c, r, s).to(w_dtype).contiguous(memory_format=memory)
    buffer = pack(recorder, w, transpose)
    rows, columns = (c, k) if transpose else (k, c)
    padded = -(-rows // 16) * 16
    image, rest = image_of(buffer, padded, columns, r, s, torch.bfloat16)
    want = w.transpose(0, 1) if transpose else w
    assert torch.equal(image[:rows], want.to(torch.bfloat16)) and not image[rows:].any() and not rest.any()


def kept_pack(recorder, w):
    """The pack that calls of the same filter now share."""
    for _ in range(4):
        buffer = pack(recorder, w)
    assert pack(recorder, w).data_ptr() == buffer.data_ptr()
    return buffer


def test_an_unchanged_filter_is_not_packed_again(recorder):
    w = torch.randn(32, 64, 3, 3)
    buffer = kept_pack(recorder, w)
    image = buffer[: 2 * w.numel()]
    image.fill_(7)
    pack(recorder, w)
    assert (image == 7).all()


@pytest.mark.parametrize("scale", [1.0001, float("nan"), -1.0])
def test_a_write_that_no_version_shows_is_seen_on_the_device(recorder, scale):
    """As a fused optimizer writes: too little, perhaps, to move a sample's bfloat16."""
    w = torch.randn(96, 128, 3, 3)
    buffer = kept_pack(recorder, w)
    version = w._version
    w.data.mul_(scale)
    assert w._version == version
    again = pack(recorder, w)
    assert again.data_ptr() == buffer.data_ptr()
    image, _ = image_of(again, 96, 128, 3, 3, torch.bfloat16)
    assert torch.equal(image.nan_to_num(7), w.to(torch.bfloat16).nan_to_num(7))


def test_a_filter_whose_version_moved_gets_memory_of_its_own(recorder):
    w = torch.randn(32, 64, 3, 3)
    buffer = kept_pack(recorder, w)
    w.mul_(2)
    again = pack(recorder, w)
    assert again.data_ptr() != buffer.data_ptr()
    assert torch.equal(image_of(again, 32, 64, 3, 3, torch.bfloat16)[0], w.to(torch.bfloat16))


def test_every_stream_has_a_pack_of_its_own(recorder):
    w = torch.randn(32, 64, 3, 3)
    first = kept_pack(recorder, w)
    others = [pack(recorder, w, stream=1) for _ in range(4)]
    assert all(other.data_ptr() != first.data_ptr() for other in others)
    assert {kwargs["stream"] for _, kwargs in recorder.calls} == {0, 1}


def test_a_new_filter_is_packed_whole(recorder):
    """Each call before a pack is kept makes everything, whatever the memory held."""
    w = torch.randn(32, 64, 3, 3)
    for _ in range(3):
        pack(recorder, w)
    assert all(kwargs["all"] for name, kwargs in recorder.calls[:2])
    assert [row.shape for row in packing.report()] == [(32, 64, 3, 3)]


def test_no_cache_where_it_is_switched_off(recorder, monkeypatch):
    monkeypatch.setenv("WRN_FAST_PACK_CACHE", "0")
    w = torch.randn(32, 64, 3, 3)
    for _ in range(4):
        pack(recorder, w)
    assert not packing.report() and all(kwargs["all"] for _, kwargs in recorder.calls)


def test_all_filters_of_a_model_are_packed_by_one_call(recorder, seed):
    """More than a launch has room for, of both dtypes and layouts, tiles cut off; one of them changed afterwards."""
    g = torch.Generator().manual_seed(seed)
    weights, rows = recorder.Weights(dtype=cuda_on_cpu.CODES["bfloat16"]), []
    for i in range(40):
        K, C, r = int(torch.randint(1, 12, (1,), generator=g)) * 16, (3, 64, 80, 130)[i % 4], (1, 3)[i // 4 % 2]
        w = torch.randn(K, C, r, r, generator=g).to((torch.float32, torch.bfloat16)[i % 2])
        w = w.contiguous(memory_format=(torch.contiguous_format, torch.channels_last)[i // 2 % 2])
        sizes = {"K": K, "C": C, "R": r, "S": r}
        size = recorder.packed_bytes(**sizes, transpose=False)
        buffer = torch.full((size + recorder.samples_bytes(w_dtype=code(w.dtype), **sizes),), 0xFF, dtype=torch.uint8)
        k, c, y, x = w.stride()
        weights.add_filter(
            w=ptr(w), w_dtype=code(w.dtype), **sizes, stride_k=k, stride_c=c, stride_r=y, stride_s=x, transpose=False,
            packed=buffer.data_ptr(), samples=buffer.data_ptr() + size,
        )  # fmt: skip
        rows.append((w, buffer))
    weights.renew(all=True, stream=0)

    def check():
        for w, buffer in rows:
            image, rest = image_of(buffer, *w.shape, torch.bfloat16)
            assert torch.equal(image, w.to(torch.bfloat16)) and not rest.any()

    check()
    for w, _ in rows[33:]:
        w.mul_(-1)
    weights.renew(all=False, stream=0)
    check()


def test_all_norms_of_a_model_are_folded_by_one_call(recorder, seed):
    """More than a launch has room for, vectors of every dtype that a model may have, gamma and beta absent."""
    g = torch.Generator().manual_seed(seed)
    weights, rows = recorder.Weights(dtype=cuda_on_cpu.CODES["bfloat16"]), []
    for i in range(60):
        C = int(torch.randint(1, 700, (1,), generator=g))
        kinds = [(torch.float32, torch.bfloat16, torch.float16)[j % 3] for j in (i, i // 3)]
        mean, gamma, beta = (torch.randint(-8, 9, (C,), generator=g).to(kinds[j]) for j in (0, 1, 1))
        var = torch.full((C,), 0.25 if i % 2 else 4.0, dtype=kinds[0])
        gamma, beta = gamma if i % 4 else None, beta if i % 5 else None
        room = torch.full((8, C), torch.nan)
        table, stats = room[1:5], room[6:]
        weights.add_norm(
            C=C, mean=ptr(mean), var=ptr(var), stats_dtype=code(kinds[0]), gamma=ptr(gamma), beta=ptr(beta),
            affine_dtype=code(kinds[1]), eps=0.0, table=ptr(table), stats=ptr(stats),
        )  # fmt: skip
        rows.append((mean, var, gamma, beta, room))
    weights.renew(all=True, stream=0)
    for mean, var, gamma, beta, room in rows:
        rstd = var.float().rsqrt()
        scale = rstd if gamma is None else rstd * gamma.float()
        shift = (0.0 if beta is None else beta.float()) - mean.float() * scale
        assert parity.mismatch(room[1:5], torch.stack([scale, shift, mean.float(), rstd])) is None
        assert torch.equal(room[6:], torch.stack([mean.float(), var.float()])) and room[[0, 5]].isnan().all()
