"""shrink: the products of every token with all adapters' A and with the gate, in one pass over x.

For few tokens the time goes into reading the weights, so the columns *and* the inner dimension are cut into pieces that
fill the GPU; the pieces' partial sums are added by the kernel that follows (:mod:`meteora.kernels.route`), in a fixed
order. For many tokens it is an ordinary matrix product, which cuBLAS does best, unless it is as narrow as a gate alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from meteora.kernels.launch import cdiv, cut, overlaps

FEW_TOKENS = 64  # up to here the weights are what is read
NARROW = 64  # columns, up to which x alone is what is read
PROGRAMS = 320  # that are to share the work of few tokens
NARROW_PROGRAMS = 256  # and at most of a narrow product, so that it is done in one round


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


def mm_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with a float32 result, as accumulated."""
    if a.dtype == torch.float32 or not a.is_cuda:
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def shrink(x: Tensor, W: Tensor, layers: int = 1) -> Tensor:
    """x (T, in), W (C, in) of one dtype -> partial sums (splits, T, C) float32, whose sum over splits is x @ W^T.

    Their last dimensions are dense; x may be strided in T. W may be that of several layers alike: it is then cut as for
    one of them, so that the sums of few tokens are, to the bit, those that each layer would get for itself.
    """
    T, K = x.shape
    C = W.shape[0]
    each = C // layers
    narrow = each <= NARROW and x.element_size() == 2
    if T > FEW_TOKENS and not narrow:
        return mm_float32(x, W.t()).unsqueeze(0)
    if T <= 16:
        BT, BC, BK, warps, stages, least = 16, 16, 128, 2, 4, 256
    elif T <= 32 and each <= 512:
        BT, BC, BK, warps, stages, least = 16, 32, 128, 4, 4, 512
    elif T <= FEW_TOKENS:
        BT, BC, BK, warps, stages, least = 64, 32, 128, 4, 3, 512
    else:
        BT, BC, BK, warps, stages, least = 64, 64, 128, 4, 3, 512
    tiles = cdiv(T, BT) * cdiv(each, BC)
    # Each split reads ``least`` inner columns or more, so that its sums are worth their writing and reading.
    wanted = cdiv(PROGRAMS, tiles) if T <= FEW_TOKENS else NARROW_PROGRAMS // tiles
    piece, splits = cut(K, max(1, min(16, wanted, K // least)), BK)
    out = torch.empty(splits, T, C, dtype=torch.float32, device=x.device)
    _shrink[(cdiv(C, BC), cdiv(T, BT), splits)](
        x, W, out, T, K, C, x.stride(0), W.stride(0), piece,
        BT, BC, BK, K % BK == 0, overlaps(x), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
