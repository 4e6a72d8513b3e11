"""Products of 8-bit integers, and the steps before and after them.

    x ~ diag(s) q,    q in -127..127, one scale s a row (symmetric, half a step of rounding at most)
    x M ~ diag(s) (q M8) diag(c),    with M ~ M8 diag(c)

How the integers are multiplied changes nothing but the last bits. There are three ways, each the fastest somewhere:

    integers   `torch._int_mm`: where the processor has int8 units, and on GPUs
    onednn     oneDNN's quantised linear layer: fast with AVX2 alone too
    floats     as floating-point numbers, which hold such sums exactly up to 2^24

Without int8 units oneDNN adds pairs of products in 16 bits and cuts off what is too large: 2 x 255 x 127 is, and
2 x 255 x 63 is not. So it is tried with the largest numbers, and where it is exact for weights of 7 bits only, a model
may be given such (`weight_bits`). What is the fastest is timed once for each shape.

Quantising and rescaling go over memory once if they are compiled (`compile_steps`), several times if they are not.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

LARGEST = 127
# Bits of weights that the ways of multiplying are asked about.
BITS = (8, 7)
# Rows up to which a product is bound by reading the weight: one token, or a few, of generation.
_FEW = 16
# Elements of the weight that are turned into floating-point numbers at a time.
_CHUNK = 2**20
# Smaller products are over before the difference matters.
_SMALL = 2**16
# `_int_mm` on CUDA takes more rows than this, and sizes that are multiples of eight.
_CUDA_ROWS, _CUDA_MULTIPLE = 16, 8

# Rows that a shape is timed with, for up to so many rows; beyond the last, packing hardly counts any more.
_TIMED_ROWS = {_FEW: 1, 128: 64}
_MANY = 256

Way = Literal["integers", "onednn", "floats"]
# Inner and outer size, whether the matrix is contiguous, rows to time with, bits of the matrix -> the fastest way.
_FASTEST: dict[tuple[int, int, bool, int, int], Way] = {}
_BEST: dict[int, Way] = {}  # by bits of weights: the fastest way for a typical layer, once that is known
_EXACT: list[int] = []  # what `exact_bits` found


def quantise(x: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rounds each row to 8 bits.

    Args:
        x: (n, k).
        factor: (k,), multiplied into the columns first.

    Returns:
        int8 (n, k), and scales (n, 1) in float32, or float64 where x is that. A row that is not finite has a scale
        that is not either.
    """
    return _STEPS[0](x.detach(), factor)  # a compiler looks at the graph that it is part of


def quantise_weight(weight: Tensor, factor: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """As `quantise`, for a weight, which may have fewer bits."""
    return _quantise(weight, factor, 2 ** (bits - 1) - 1)


def rescale(sums: Tensor, scale: Tensor, channel: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """diag(scale) sums diag(channel) + bias; floating-point `sums` (n, m) are changed."""
    if channel is None and sums.dtype == scale.dtype:  # one pass as it is
        if bias is None or bias.dtype != sums.dtype:
            sums = sums.mul_(scale)
            return (sums if bias is None else sums.add_(bias)).to(dtype)
        return torch.addcmul(bias, sums, scale, out=sums).to(dtype)
    # Sizes of parameters are fixed in what is compiled, those of other tensors are not.
    return _STEPS[1](sums, scale, channel, None if bias is None else bias.detach(), dtype)


def _quantise(x: Tensor, factor: Tensor | None, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    wide = x if x.dtype == torch.float64 else x.float()
    if factor is not None:
        wide = wide * factor
    scale = wide.abs().amax(-1, keepdim=True).div_(largest).clamp_min_(torch.finfo(wide.dtype).tiny)
    return (wide / scale).round_().to(torch.int8), scale


def _rescale(sums: Tensor, scale: Tensor, channel: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = sums.mul_(scale) if sums.is_floating_point() else sums * scale
    if channel is not None:
        y = y.mul_(channel)
    if bias is not None:
        y = y.add_(bias)
    return y.to(dtype)


_STEPS: tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]] = (_quantise, _rescale)


def product(
    q: Tensor,
    scale: Tensor,
    matrix: Tensor,
    bits: int,
    dtype: torch.dtype,
    channel: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """diag(scale) q M diag(channel) + bias.

    Args:
        q: int8 (n, k).
        scale: (n, 1), as `quantise` gives it.
        matrix: M, int8 (k, m): a contiguous matrix or the transpose of one.
        bits: Of the numbers in M, 7 or 8.
        dtype: Of the result.
        channel: (m,).
        bias: (m,).
    """
    way = _way(q, matrix, scale.dtype, bits)
    if way == "onednn":
        by = _onednn if torch.compiler.is_compiling() else _by_onednn
        return rescale(by(q, matrix, channel), scale, None, bias, dtype)
    sums = _by_integers(q, matrix) if way == "integers" else _by_floats(q, matrix, scale.dtype)
    return rescale(sums, scale, channel, bias, dtype)


def _by_integers(q: Tensor, matrix: Tensor) -> Tensor:
    rows = q.shape[0]
    if q.is_cuda and rows <= _CUDA_ROWS:
        padded = q.new_zeros(_CUDA_ROWS + _CUDA_MULTIPLE, q.shape[1])
        padded[:rows] = q
        return torch._int_mm(padded, matrix)[:rows]
    return torch._int_mm(q, matrix)


def _by_floats(q: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    wide = q.to(dtype)
    step = max(1, _CHUNK // max(1, matrix.shape[0]))
    if matrix.shape[1] <= step:
        return wide @ matrix.to(dtype)
    sums = wide.new_empty(q.shape[0], matrix.shape[1])
    for start in range(0, matrix.shape[1], step):  # so that there is never a whole weight in floating point
        torch.mm(wide, matrix[:, start : start + step].to(dtype), out=sums[:, start : start + step])
    return sums


def _by_onednn(q: Tensor, matrix: Tensor, channel: Tensor | None) -> Tensor:
    """q M diag(channel) in float32. The matrix is packed in each call: a copy that is kept would double its memory."""
    outer = matrix.shape[1]
    packed = torch.ops.onednn.qlinear_prepack(matrix.t().contiguous(), None)
    rows = q.view(torch.uint8).bitwise_xor(128)  # q + 128
    scales = q.new_ones(outer, dtype=torch.float32) if channel is None else channel
    zeros = q.new_zeros(outer, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


# For compilers, which do not know packed weights.
_onednn = torch.library.custom_op("veneer::int8_by_onednn", _by_onednn, mutates_args=())


@_onednn.register_fake
def _(q: Tensor, matrix: Tensor, channel: Tensor | None) -> Tensor:
    return q.new_empty(q.shape[0], matrix.shape[1], dtype=torch.float32)


def exact_bits() -> int:
    """Bits of weights up to which oneDNN's products are exact here, 7 or 8; 0 where there are no such products.

    Found by multiplying, once, not by the processor's name.
    """
    if not _EXACT:
        _EXACT.append(next((bits for bits in BITS if _onednn_is_exact(bits)), 0))
    return _EXACT[0]


def _onednn_is_exact(bits: int) -> bool:
    """Whether the largest sums come out right, in both senses, for one row and many."""
    largest = 2 ** (bits - 1) - 1
    sign = torch.tensor([1, -1]).repeat(288)
    random = torch.randint(0, 2, (2, 576), generator=torch.Generator().manual_seed(0)) * 2 - 1
    patterns = torch.stack([torch.ones_like(sign), -torch.ones_like(sign), sign, sign.sort().values, *random])
    rows, weight = (patterns * LARGEST).to(torch.int8), (patterns * largest).to(torch.int8).repeat(16, 1)
    exact = rows.long() @ weight.long().t()
    try:
        found = [_by_onednn(rows.repeat(count, 1), weight.t(), None) for count in (1, 16)]
        found.append(_by_onednn(rows[:1], weight.t(), None))
    except (AttributeError, RuntimeError):  # a build without oneDNN, or an older one
        return False
    wide, many, one = (sums.long() for sums in found)
    return torch.equal(wide, exact) and torch.equal(many, exact.repeat(16, 1)) and torch.equal(one, exact[:1])


def weight_bits() -> int:
    """Bits that the weights of a model should be given here: 7 where only that makes its products fast, otherwise 8."""
    if torch.cuda.is_available() or best_way(8) != "floats" or best_way(7) == "floats":
        return 8
    return 7


def _way(q: Tensor, matrix: Tensor, dtype: torch.dtype, bits: int) -> Way:
    """The fastest way that can multiply these; `dtype` is that of the scales."""
    inner, outer = matrix.shape
    if q.is_cuda:
        fits = inner % _CUDA_MULTIPLE == 0 and outer % _CUDA_MULTIPLE == 0
        return "integers" if fits else "floats"
    if q.device.type != "cpu" or q.shape[0] == 0:
        return "floats"
    if torch.compiler.is_compiling():  # no clock there
        way = _BEST.get(bits, "floats")
    else:
        rows = next((timed for most, timed in _TIMED_ROWS.items() if q.shape[0] <= most), _MANY)
        key = (inner, outer, matrix.is_contiguous(), rows, bits)
        if key not in _FASTEST:
            _FASTEST[key] = "floats" if best_way(bits) == "floats" else _fastest(*key)
        way = _FASTEST[key]
    if way == "onednn" and dtype == torch.float64:  # its result is float32
        return "floats"
    return way


def best_way(bits: int) -> Way:
    """The fastest way for a typical layer with weights of these bits; timed once."""
    if bits not in _BEST:
        _BEST[bits] = _fastest(512, 512, False, _MANY, bits)
    return _BEST[bits]


def _fastest(inner: int, outer: int, contiguous: bool, rows: int, bits: int) -> Way:
    if inner * outer < _SMALL:
        inner = outer = 256
    q = torch.ones(rows, inner, dtype=torch.int8)
    matrix = torch.ones((inner, outer) if contiguous else (outer, inner), dtype=torch.int8)
    matrix = matrix if contiguous else matrix.t()
    ways: dict[Way, Callable[[], object]] = {
        "floats": lambda: _by_floats(q, matrix, torch.float32),
        "integers": lambda: _by_integers(q, matrix),
    }
    if bits <= exact_bits():
        ways["onednn"] = lambda: _by_onednn(q, matrix, None)
    with torch.no_grad():
        times = {way: seconds(run) for way, run in ways.items()}
    return min(times, key=lambda way: times[way])


def seconds(run: Callable[[], object], times: int = 3) -> float:
    """The shortest of a few runs, after one that is not counted."""
    run()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


_SAID = {"integers": "by the processor's int8 units", "onednn": "by oneDNN, exact here with weights of {bits} bits"}


def compile_steps(bits: int) -> str:
    """Has quantising and rescaling compiled, where products of integers are fast and compiled steps are faster.

    It takes some seconds the first time. Afterwards torch finds its result on disk.

    Args:
        bits: Of the weights that are going to be multiplied.

    Returns:
        What came of it, for a report.
    """
    global _STEPS
    if torch.cuda.is_available():
        return "products by the GPU's int8 units, not timed"
    way = best_way(bits)
    if way == "floats":
        return (
            f"this processor multiplies weights of {bits} bits no faster than float32, so the integers are multiplied "
            "in float32: the weights are small, a step is not faster"
        )
    products = f"products {_SAID[way].format(bits=bits)}"
    names = ("quantising", "rescaling")
    if known := [
        name for name, now, eager in zip(names, _STEPS, (_quantise, _rescale), strict=True) if now is not eager
    ]:
        return f"{products}; {' and '.join(known)} compiled"
    # Not random numbers: whoever compiles first would have other ones afterwards than who finds them compiled.
    x, channel = torch.linspace(-1, 1, 2**19).view(512, 1024), torch.ones(1024)
    rest = (_quantise(x, None)[1], channel, None, torch.float32)
    sums = torch.ones(512, 1024, dtype=torch.int32)
    # Each is one loop: processes that compile side by side would cost memory and gain nothing.
    options: dict[str, Any] = {"compile_threads": 1}
    quantising = torch.compile(_quantise, dynamic=True, options=options)
    rescaling = torch.compile(_rescale, dynamic=True, options=options)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler, about what it could do besides
            faster: dict[str, Callable[..., Any]] = {}
            if seconds(lambda: quantising(x, None), 9) < seconds(lambda: _quantise(x, None), 9):
                faster["quantising"] = quantising
            # Floating-point sums are rescaled in one pass without a compiler.
            if way == "integers" and (
                seconds(lambda: rescaling(sums, *rest), 9) < seconds(lambda: _rescale(sums, *rest), 9)
            ):
                faster["rescaling"] = rescaling
    except Exception as error:  # a compiler fails in as many ways as it has parts, and nothing depends on it
        cause = str(error).strip().partition("\n")[0][:100]
        return f"{products}; the steps around them are not compiled ({cause})"
    if not faster:
        return f"{products}; compiled steps around them are no faster, so not used"
    _STEPS = (faster.get("quantising", _quantise), faster.get("rescaling", _rescale))
    return f"{products}; {' and '.join(faster)} compiled"
