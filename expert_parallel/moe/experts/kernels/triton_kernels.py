"""Implements the row kernels in Triton: each program computes a tile of rows and columns in one pass over memory.

torch_ops.py defines what is computed. There are no atomics: each value is written by one program and each sum has one
order, so a rerun gives the same bits. Arguments with names of tensors are pointers to contiguous ones. Row indices are
converted to int64 before they are multiplied, since row * D can exceed 2^31. WIDE is the dtype of the arithmetic.
num_rows changes every step, so kernels are not specialized for its value.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_rows"])
def gather(x_LD, row_R, out_RD, num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Gathers rows as torch_ops.gather does."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    row = tl.load(row_R + r, mask=r < num_rows, other=-1).to(tl.int64)
    x = tl.load(x_LD + row * num_columns + d, mask=(row >= 0) & (d < num_columns), other=0.0)
    tl.store(out_RD + r * num_columns + d, x, mask=(r < num_rows) & (d < num_columns))


@triton.jit(do_not_specialize=["num_rows"])
def row_dots(
    x_RD, y_RD, dot_R, num_rows, num_columns, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Computes torch_ops.row_dots. A program computes all columns of its rows, so that it can sum over D without other
    programs."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    dots = tl.zeros((BLOCK_R, BLOCK_D), WIDE)
    for start in range(0, num_columns, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        inside = (r < num_rows)[:, None] & (d < num_columns)
        here = r[:, None] * num_columns + d
        x = tl.load(x_RD + here, mask=inside, other=0.0).to(WIDE)
        dots += x * tl.load(y_RD + here, mask=inside, other=0.0).to(WIDE)
    tl.store(dot_R + r, tl.sum(dots, axis=1), mask=r < num_rows)


@triton.jit
def activation_and_slopes(gate, up, KIND: tl.constexpr):
    """Returns the value of an activation, its derivative by gate, and its derivative by up.

    Kinds without a gate use `gate` alone. The compiler removes what a caller does not use. Clamps are comparisons, not
    minima, since these keep a NaN, as torch does.
    """
    slope_up = gate
    if KIND == "relu":
        value = tl.where(gate <= 0, 0.0, gate)
        slope_gate = tl.where(gate <= 0, 0.0, gate * 0.0 + 1.0)
    elif KIND == "gelu" or KIND == "geglu":
        normal = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * normal
        slope_gate = normal + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif KIND == "swiglu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * sigmoid
        slope_gate = sigmoid + value * (1.0 - sigmoid)
    else:
        tl.static_assert(KIND == "gpt_oss")
        below = gate <= 7.0
        gate = tl.where(gate > 7.0, 7.0, gate)
        sigmoid = 1.0 / (1.0 + tl.exp(-1.702 * gate))
        value = gate * sigmoid
        slope_gate = tl.where(below, sigmoid + 1.702 * value * (1.0 - sigmoid), 0.0)
    if KIND == "swiglu" or KIND == "geglu":
        slope_up = value
        slope_gate = slope_gate * up
        value = value * up
    elif KIND == "gpt_oss":
        slope_up = tl.where((up >= -7.0) & (up <= 7.0), value, 0.0)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up)) + 1.0
        slope_gate = slope_gate * up
        value = value * up
    return value, slope_gate, slope_up


@triton.jit(do_not_specialize=["num_rows"])
def activate(
    h_RF2,
    weights_R,
    a_RF,
    num_rows,
    hidden,
    h_columns,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Computes torch_ops.activate."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (r < num_rows) & (f < hidden)
    gate = tl.load(h_RF2 + r * h_columns + f, mask=inside, other=0.0).to(WIDE)
    up = gate
    if GATED:
        up = tl.load(h_RF2 + r * h_columns + hidden + f, mask=inside, other=0.0).to(WIDE)
    value, _, _ = activation_and_slopes(gate, up, KIND)
    if WEIGHTED:
        value *= tl.load(weights_R + r, mask=r < num_rows, other=0.0).to(WIDE)
    tl.store(a_RF + r * hidden + f, value.to(a_RF.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def activate_backward(
    h_RF2,
    g_RF,
    weights_R,
    a_RF,
    dh_RF2,
    dot_R,
    num_rows,
    hidden,
    h_columns,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Computes torch_ops.activate_backward. A program computes all columns of its rows, so that it can sum over F
    without other programs."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    weight = tl.load(weights_R + r, mask=r < num_rows, other=0.0).to(WIDE)[:, None]
    dots = tl.zeros((BLOCK_R, BLOCK_F), WIDE)
    for start in range(0, hidden, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)[None, :]
        inside = (r < num_rows)[:, None] & (f < hidden)
        here = r[:, None] * h_columns + f
        gate = tl.load(h_RF2 + here, mask=inside, other=0.0).to(WIDE)
        up = gate
        if GATED:
            up = tl.load(h_RF2 + here + hidden, mask=inside, other=0.0).to(WIDE)
        g = tl.load(g_RF + r[:, None] * hidden + f, mask=inside, other=0.0).to(WIDE)
        value, slope_gate, slope_up = activation_and_slopes(gate, up, KIND)
        dots += g * value
        tl.store(a_RF + r[:, None] * hidden + f, (value * weight).to(a_RF.dtype.element_ty), mask=inside)
        tl.store(dh_RF2 + here, (g * slope_gate * weight).to(dh_RF2.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(dh_RF2 + here + hidden, (g * slope_up * weight).to(dh_RF2.dtype.element_ty), mask=inside)
    tl.store(dot_R + r, tl.sum(dots, axis=1), mask=r < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def combine(
    y_RD,
    rows_VK,
    weights_R,
    y_VD,
    num_rows,
    num_columns,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Computes torch_ops.combine."""
    v = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)[:, None]
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros((BLOCK_V, BLOCK_D), WIDE)
    for k in tl.range(K, loop_unroll_factor=4):  # unrolled, so that the rows of four choices are loaded at once
        row = tl.load(rows_VK + v * K + k, mask=v < num_rows, other=-1).to(tl.int64)
        y = tl.load(y_RD + row * num_columns + d, mask=(row >= 0) & (d < num_columns), other=0.0).to(WIDE)
        if WEIGHTED:
            y *= tl.load(weights_R + row, mask=row >= 0, other=0.0).to(WIDE)
        total += y
    tl.store(y_VD + v * num_columns + d, total.to(y_VD.dtype.element_ty), mask=(v < num_rows) & (d < num_columns))
