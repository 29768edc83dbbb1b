"""shrink: the products of every token with all adapters' A and with the gate, in one pass over x.

For few tokens the time goes into reading the weights, so the columns *and* the inner dimension are cut into pieces that
fill the GPU; the pieces' partial sums are added by the kernel that follows (:mod:`meteora.kernels.route`), in a fixed
order. For many tokens it is an ordinary matrix product, which cuBLAS does best.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents
from triton.tools.tensor_descriptor import TensorDescriptor

from meteora.kernels.launch import overlaps

FEW_TOKENS = 64  # up to here the weights are what is read, and pointers load small tiles of them best
SOME_WORK = 2**22  # tokens * in, up to which our kernel is faster than cuBLAS (H100)
PROGRAMS = 320  # that are to share the work of few tokens


def shrink_ref(x: Tensor, W: Tensor) -> Tensor:
    """x (T, in), W (C, in) -> (1, T, C) float32."""
    return (x.float() @ W.float().t()).unsqueeze(0)


@triton.jit(do_not_specialize=["T"])
def _shrink(
    x_ptr, w_ptr, out_ptr, T, K, C, x_stride, w_stride, piece,
    BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1) * BT + tl.arange(0, BT)
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    split = tl.program_id(2).to(tl.int64)
    k = tl.arange(0, BK)
    first = split * piece
    # Rows and columns beyond the end repeat others instead of being masked: only what is stored has to be right.
    x = x_ptr + (token % T).to(tl.int64)[:, None] * x_stride + first + k[None, :]
    w = w_ptr + (column % C).to(tl.int64)[None, :] * w_stride + first + k[:, None]
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(first, tl.minimum(first + piece, K), BK):
        if EVEN:
            a, b = tl.load(x), tl.load(w)
        else:
            a = tl.load(x, mask=(start + k)[None, :] < K, other=0.0)
            b = tl.load(w, mask=(start + k)[:, None] < K, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x += BK
        w += BK
    if OVERLAP:
        gdc_launch_dependents()
    out = out_ptr + (split * T + token)[:, None] * C + column[None, :]
    tl.store(out, total, mask=(token < T)[:, None] & (column < C)[None, :])


@triton.jit(do_not_specialize=["T"])
def _shrink_tiles(
    x, w, out_ptr, T, K, C, piece, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, OVERLAP: tl.constexpr
):
    # x and w are tensor descriptors: the copy engine brings whole tiles, and zeros beyond the end.
    row, first_column = tl.program_id(1) * BT, tl.program_id(0) * BC
    split = tl.program_id(2)
    first = split * piece
    total = tl.zeros((BT, BC), tl.float32)
    for start in range(first, tl.minimum(first + piece, K), BK):
        total = tl.dot(x.load([row, start]), w.load([first_column, start]).T, total, input_precision="ieee")
    if OVERLAP:
        gdc_launch_dependents()
    token = row + tl.arange(0, BT)
    column = first_column + tl.arange(0, BC)
    out = out_ptr + (split.to(tl.int64) * T + token)[:, None] * C + column[None, :]
    tl.store(out, total, mask=(token < T)[:, None] & (column < C)[None, :])


def _describable(tensor: Tensor) -> bool:
    """Whether a tensor descriptor may point at this matrix: 16-byte steps, from a 16-byte boundary."""
    step = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and step % 16 == 0 and tensor.data_ptr() % 16 == 0


def _product(x: Tensor, W: Tensor) -> Tensor:
    if x.dtype == torch.float32 or not x.is_cuda:
        return torch.mm(x.float(), W.t().float()).unsqueeze(0)
    return torch.mm(x, W.t(), out_dtype=torch.float32).unsqueeze(0)


def shrink(x: Tensor, W: Tensor) -> Tensor:
    """x (T, in), W (C, in) of one dtype -> partial sums (splits, T, C) float32, whose sum over splits is x @ W^T.

    Their last dimensions are dense; x may be strided in T.
    """
    T, K = x.shape
    C = W.shape[0]
    few = T <= FEW_TOKENS
    if not few and (T * K > SOME_WORK or x.element_size() > 2 or not _describable(x) or not _describable(W)):
        return _product(x, W)
    if T <= 16:
        BT, BC, BK, warps, least = 16, 16, 128, 2, 256
    elif few:
        BT, BC, BK, warps, least = 16, 32, 128, 4, 512
    else:
        BT, BC, BK, warps, least = 64, 64, 64, 4, 256
    tiles = triton.cdiv(T, BT) * triton.cdiv(C, BC)
    # Each split reads ``least`` inner columns or more, so that its sums are worth their writing and reading.
    splits = max(1, min(16, triton.cdiv(PROGRAMS, tiles), K // least))
    piece = triton.cdiv(triton.cdiv(K, splits), BK) * BK
    splits = triton.cdiv(K, piece)
    out = torch.empty(splits, T, C, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(C, BC), triton.cdiv(T, BT), splits)
    if few:
        _shrink[grid](
            x, W, out, T, K, C, x.stride(0), W.stride(0), piece,
            BT, BC, BK, K % BK == 0, overlaps(x), num_warps=warps, num_stages=4,
        )  # fmt: skip
    else:
        tiles_of_x, tiles_of_W = TensorDescriptor.from_tensor(x, [BT, BK]), TensorDescriptor.from_tensor(W, [BC, BK])
        _shrink_tiles[grid](
            tiles_of_x, tiles_of_W, out, T, K, C, piece, BT, BC, BK, overlaps(x), num_warps=warps, num_stages=4
        )
    return out
