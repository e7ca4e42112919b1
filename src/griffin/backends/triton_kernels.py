"""The Triton kernels of an FF block that is computed for its experts only. Importing this module imports triton.

Three kernels a block: `read` (gate and up rows, activation) writes z, `write` adds up the experts' down rows in S parts
of the list, `finish` adds the parts in their order. No atomics: the same inputs give the same bits. Experts are a list
of indices in a buffer of fixed size and a count, both read on the device, so that a captured graph stays right when
they change; programs behind the count end at once. Sums are float32.

Shapes: T tokens, H model width, F neurons (also the length of an index list), `per_set` tokens for each index list.
    X (T, H), IDX (sets, F) int32, COUNT (sets,) int32, Z (T, F) float32, PARTS (S, T, H) float32, Y (T, H)
    weights: a row a neuron, of gate, up and (neuron-major) down.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activated(g, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return g / (1.0 + tl.exp(-g))
    elif ACTIVATION == "gelu":
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(v)) / 2 is the sigmoid of 2 v
        return g / (1.0 + tl.exp(-1.5957691216057308 * (g + 0.044715 * g * g * g)))
    elif ACTIVATION == "relu":
        return tl.maximum(g, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        return tl.maximum(g, 0.0) * tl.maximum(g, 0.0)


@triton.jit
def _z(g, u, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    if GATED:
        return _activated(g, ACTIVATION) * u
    else:
        return _activated(u, ACTIVATION)


@triton.jit
def _with_bias(sums, BIAS, experts, here, BIASED: tl.constexpr):
    if BIASED:
        sums += tl.load(BIAS + experts, mask=here, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def _project(X, tokens, real, W, stride, experts, here, hidden, ROWS: tl.constexpr, M: tl.constexpr, C: tl.constexpr):
    """x times the experts' rows of floats: (ROWS, M)."""
    sums = tl.zeros([ROWS, M], dtype=tl.float32)
    rows = W + experts.to(tl.int64)[:, None] * stride
    for begin in range(0, hidden, C):
        columns = begin + tl.arange(0, C)
        inside = columns < hidden
        w = tl.load(
            rows + columns[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        x = tl.load(X + tokens[:, None] * hidden + columns[None, :], mask=real[:, None] & inside[None, :], other=0.0)
        sums += tl.sum(x.to(tl.float32)[:, None, :] * w[None, :, :], axis=2)
    return sums


@triton.jit
def read(
    X, IDX, COUNT, GATE, UP, GATE_BIAS, UP_BIAS, Z, T, hidden, F, per_set, gate_stride, up_stride,
    GATED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """z of the experts, weights being floats. Grid: (F / M, T / ROWS)."""
    tokens = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1) * ROWS // per_set
    places = tl.program_id(0) * M + tl.arange(0, M)
    experts = tl.load(IDX + which * F + places, mask=places < F, other=0)  # together with the count, not after it
    count = tl.load(COUNT + which)
    if tl.program_id(0) * M >= count:
        return
    real, here = tokens < T, places < count
    u = _project(X, tokens, real, UP, up_stride, experts, here, hidden, ROWS, M, C)
    u = _with_bias(u, UP_BIAS, experts, here, BIASED)
    g = u
    if GATED:
        g = _project(X, tokens, real, GATE, gate_stride, experts, here, hidden, ROWS, M, C)
        g = _with_bias(g, GATE_BIAS, experts, here, BIASED)
    tl.store(Z + tokens[:, None] * F + places[None, :], _z(g, u, GATED, ACTIVATION), mask=real[:, None] & here[None, :])


@triton.jit
def write(
    Z, IDX, COUNT, DOWN, PARTS, T, hidden, F, per_set, stride,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The experts' down rows of floats, in SPLITS parts of the list. Grid: (H / C, SPLITS, T / ROWS)."""
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(2) * ROWS // per_set
    columns = tl.program_id(0) * C + tl.arange(0, C)
    count = tl.load(COUNT + which)
    share = tl.cdiv(tl.cdiv(count, SPLITS), K) * K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, count)
    real, inside = tokens < T, columns < hidden
    sums = tl.zeros([ROWS, C], dtype=tl.float32)
    for at in range(begin, end, K):
        places = at + tl.arange(0, K)
        here = places < end
        experts = tl.load(IDX + which * F + places, mask=here, other=0).to(tl.int64)
        w = tl.load(
            DOWN + experts[:, None] * stride + columns[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
            eviction_policy="evict_first",
        ).to(tl.float32)
        z = tl.load(Z + tokens[:, None] * F + places[None, :], mask=real[:, None] & here[None, :], other=0.0)
        sums += tl.sum(z[:, :, None] * w[None, :, :], axis=1)
    where = PARTS + (tl.program_id(1) * T + tokens[:, None]) * hidden + columns[None, :]
    tl.store(where, sums, mask=real[:, None] & inside[None, :])


@triton.jit
def finish(PARTS, BIAS, Y, T, hidden, SPLITS: tl.constexpr, BIASED: tl.constexpr, C: tl.constexpr):
    """The parts in their order, the bias, and the cast. Grid: (H / C, T)."""
    token = tl.program_id(1)
    columns = tl.program_id(0) * C + tl.arange(0, C)
    inside = columns < hidden
    y = tl.zeros([C], dtype=tl.float32)
    for part in range(SPLITS):
        y += tl.load(PARTS + (part * T + token) * hidden + columns, mask=inside, other=0.0)
    if BIASED:
        y += tl.load(BIAS + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + token * hidden + columns, y.to(Y.dtype.element_ty), mask=inside)


# -- weights in groups: see griffin.weights.device_groups -----------------------------------------------------------


@triton.jit
def _scale_and_offset(
    SCALE, SUB, OFFSET, SUB_OFFSET, at_span, at_group, mask, SUBS: tl.constexpr, OFFSETS: tl.constexpr
):
    """s and m of groups, weight = s * (code - zero) - m."""
    s = tl.load(SCALE + at_span, mask=mask, other=0.0).to(tl.float32)
    if SUBS:
        s *= tl.load(SUB + at_group, mask=mask, other=0).to(tl.float32)
    if OFFSETS == "none":
        return s, s * 0.0
    elif OFFSETS == "sub":
        m = tl.load(OFFSET + at_span, mask=mask, other=0.0).to(tl.float32)
        return s, m * tl.load(SUB_OFFSET + at_group, mask=mask, other=0).to(tl.float32)
    elif OFFSETS == "f16":
        return s, -tl.load(OFFSET + at_span, mask=mask, other=0.0).to(tl.float32)
    else:
        tl.static_assert(OFFSETS == "code")
        return s, s * tl.load(OFFSET + at_span, mask=mask, other=0).to(tl.float32)


@triton.jit
def _add_groups(
    sums, codes, X, tokens, real, hidden, groups, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here, spans, n_groups,
    ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SUBS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """x times whole groups of codes (M, G, GROUP): the codes of a group are summed before its scale is applied."""
    columns = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(
        X + tokens[:, None, None] * hidden + columns[None, :, :],
        mask=real[:, None, None] & (columns < hidden)[None, :, :],
        other=0.0,
    ).to(tl.float32)  # (ROWS, G, GROUP)
    dots = tl.sum(x[:, None, :, :] * (codes.to(tl.float32) - ZERO)[None, :, :, :], axis=3)  # (ROWS, M, G)
    rows = experts.to(tl.int64)[:, None]
    s, m = _scale_and_offset(
        SCALE, SUB, OFFSET, SUB_OFFSET, rows * spans + (groups * GROUP // SPAN)[None, :],
        rows * n_groups + groups[None, :], here[:, None] & (groups < n_groups)[None, :], SUBS, OFFSETS,
    )  # fmt: skip
    return sums + tl.sum(s[None, :, :] * dots - m[None, :, :] * tl.sum(x, axis=2)[:, None, :], axis=2)


@triton.jit
def _project_groups(
    X, tokens, real, CODES, SCALE, SUB, OFFSET, SUB_OFFSET, stride, spans, n_groups, experts, here, hidden,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SUBS: tl.constexpr,
    OFFSETS: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """x times the experts' rows of weights in groups: (ROWS, M). A byte has one code, or two, half a row apart."""
    sums = tl.zeros([ROWS, M], dtype=tl.float32)
    rows = CODES + experts.to(tl.int64)[:, None, None] * stride
    for begin in range(0, stride // GROUP, G):
        groups = begin + tl.arange(0, G)
        at = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        codes = tl.load(
            rows + at[None, :, :],
            mask=here[:, None, None] & (at < stride)[None, :, :],
            other=0,
            eviction_policy="evict_first",
        )
        if BITS == 4:
            sums = _add_groups(
                sums, codes & 15, X, tokens, real, hidden, groups, SCALE, SUB, OFFSET, SUB_OFFSET, experts,
                here, spans, n_groups, ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
            sums = _add_groups(
                sums, codes >> 4, X, tokens, real, hidden, groups + stride // GROUP, SCALE, SUB, OFFSET, SUB_OFFSET,
                experts, here, spans, n_groups, ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
        else:
            sums = _add_groups(
                sums, codes, X, tokens, real, hidden, groups, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here,
                spans, n_groups, ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
    return sums


@triton.jit
def read_groups(
    X, IDX, COUNT, GATE_BIAS, UP_BIAS, Z, T, hidden, F, per_set,
    GATE, GATE_SCALE, GATE_SUB, GATE_OFFSET, GATE_SUB_OFFSET, gate_stride, gate_spans, gate_groups,
    UP, UP_SCALE, UP_SUB, UP_OFFSET, UP_SUB_OFFSET, up_stride, up_spans, up_groups,
    GATE_BITS: tl.constexpr, GATE_ZERO: tl.constexpr, GATE_GROUP: tl.constexpr, GATE_SPAN: tl.constexpr,
    GATE_SUBS: tl.constexpr, GATE_OFFSETS: tl.constexpr,
    UP_BITS: tl.constexpr, UP_ZERO: tl.constexpr, UP_GROUP: tl.constexpr, UP_SPAN: tl.constexpr,
    UP_SUBS: tl.constexpr, UP_OFFSETS: tl.constexpr,
    GATED: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, M: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """z of the experts, weights being in groups. Grid: (F / M, T / ROWS)."""
    tokens = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1) * ROWS // per_set
    places = tl.program_id(0) * M + tl.arange(0, M)
    experts = tl.load(IDX + which * F + places, mask=places < F, other=0)
    count = tl.load(COUNT + which)
    if tl.program_id(0) * M >= count:
        return
    real, here = tokens < T, places < count
    u = _project_groups(
        X, tokens, real, UP, UP_SCALE, UP_SUB, UP_OFFSET, UP_SUB_OFFSET, up_stride, up_spans, up_groups, experts, here,
        hidden, UP_BITS, UP_ZERO, UP_GROUP, UP_SPAN, UP_SUBS, UP_OFFSETS, ROWS, M, G,
    )  # fmt: skip
    u = _with_bias(u, UP_BIAS, experts, here, BIASED)
    g = u
    if GATED:
        g = _project_groups(
            X, tokens, real, GATE, GATE_SCALE, GATE_SUB, GATE_OFFSET, GATE_SUB_OFFSET, gate_stride, gate_spans,
            gate_groups, experts, here, hidden, GATE_BITS, GATE_ZERO, GATE_GROUP, GATE_SPAN, GATE_SUBS, GATE_OFFSETS,
            ROWS, M, G,
        )  # fmt: skip
        g = _with_bias(g, GATE_BIAS, experts, here, BIASED)
    tl.store(Z + tokens[:, None] * F + places[None, :], _z(g, u, GATED, ACTIVATION), mask=real[:, None] & here[None, :])


@triton.jit
def _written(
    codes, z, columns, hidden, padded, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here,
    ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SUBS: tl.constexpr, OFFSETS: tl.constexpr,
):  # fmt: skip
    """What experts with these codes (K, C) write: (ROWS, C). Their groups run over neurons."""
    mask = here[:, None] & (columns < hidden)[None, :]
    s, m = _scale_and_offset(
        SCALE, SUB, OFFSET, SUB_OFFSET, (experts // SPAN)[:, None] * padded + columns[None, :],
        (experts // GROUP)[:, None] * padded + columns[None, :], mask, SUBS, OFFSETS,
    )  # fmt: skip
    return tl.sum(z[:, :, None] * (s * (codes.to(tl.float32) - ZERO) - m)[None, :, :], axis=1)


@triton.jit
def write_groups(
    Z, IDX, COUNT, CODES, SCALE, SUB, OFFSET, SUB_OFFSET, PARTS, T, hidden, F, per_set, stride, padded,
    BITS: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr, SUBS: tl.constexpr,
    OFFSETS: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As `write`, of weights in groups. Grid: (bytes of a row / C, SPLITS, T / ROWS)."""
    tokens = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(2) * ROWS // per_set
    columns = tl.program_id(0) * C + tl.arange(0, C)
    count = tl.load(COUNT + which)
    share = tl.cdiv(tl.cdiv(count, SPLITS), K) * K
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, count)
    real = tokens < T
    low = tl.zeros([ROWS, C], dtype=tl.float32)
    high = tl.zeros([ROWS, C], dtype=tl.float32)
    for at in range(begin, end, K):
        places = at + tl.arange(0, K)
        here = places < end
        experts = tl.load(IDX + which * F + places, mask=here, other=0).to(tl.int64)
        codes = tl.load(
            CODES + experts[:, None] * stride + columns[None, :],
            mask=here[:, None] & (columns < stride)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        z = tl.load(Z + tokens[:, None] * F + places[None, :], mask=real[:, None] & here[None, :], other=0.0)
        if BITS == 4:
            low += _written(
                codes & 15, z, columns, hidden, padded, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here,
                ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
            high += _written(
                codes >> 4, z, columns + stride, hidden, padded, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here,
                ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
        else:
            low += _written(
                codes, z, columns, hidden, padded, SCALE, SUB, OFFSET, SUB_OFFSET, experts, here,
                ZERO, GROUP, SPAN, SUBS, OFFSETS,
            )  # fmt: skip
    rows = PARTS + (tl.program_id(1) * T + tokens[:, None]) * hidden
    inside = (columns < stride) & (columns < hidden)
    tl.store(rows + columns[None, :], low, mask=real[:, None] & inside[None, :])
    if BITS == 4:
        inside = (columns < stride) & (columns + stride < hidden)
        tl.store(rows + (columns + stride)[None, :], high, mask=real[:, None] & inside[None, :])
