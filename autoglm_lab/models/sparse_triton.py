"""The kernels behind `sparse_products`. Importing this file needs Triton."""
# mypy: ignore-errors
# ruff: noqa: N803, N806

import triton
import triton.language as tl


@triton.jit
def sparse_row_kernel(
    row, codes, values, result, count, FOURS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program ``OUTPUTS`` columns of the result: what they keep of each four against the row, in float32."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outputs < count
    rows = outputs.to(tl.int64)[:, None]
    places = tl.arange(0, WIDTH)
    total = tl.zeros((OUTPUTS, WIDTH), tl.float32)
    for start in tl.range(0, FOURS, WIDTH):
        fours = start + places
        inside = fours < FOURS
        known = there[:, None] & inside[None, :]
        code = tl.load(codes + rows * (FOURS // 2) + (fours // 2)[None, :], mask=known, other=0).to(tl.int32)
        code = code >> ((fours % 2) * 4)[None, :]
        first, second = code & 3, (code >> 2) & 3
        low = tl.load(values + rows * (2 * FOURS) + fours[None, :], mask=known, other=0).to(tl.float32)
        high = tl.load(values + rows * (2 * FOURS) + (FOURS + fours)[None, :], mask=known, other=0).to(tl.float32)
        given_0 = tl.load(row + fours * 4, mask=inside, other=0).to(tl.float32)[None, :]
        given_1 = tl.load(row + fours * 4 + 1, mask=inside, other=0).to(tl.float32)[None, :]
        given_2 = tl.load(row + fours * 4 + 2, mask=inside, other=0).to(tl.float32)[None, :]
        given_3 = tl.load(row + fours * 4 + 3, mask=inside, other=0).to(tl.float32)[None, :]
        # The first of two is never the last of four, the second never the first.
        total += low * tl.where(first == 0, given_0, tl.where(first == 1, given_1, given_2))
        total += high * tl.where(second == 3, given_3, tl.where(second == 2, given_2, given_1))
    tl.store(result + outputs, tl.sum(total, 1).to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows_count"])
def sparse_rows_kernel(
    rows, codes, values, result, rows_count, count,
    FOURS: tl.constexpr, OUTPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program ``OUTPUTS`` columns of every row, and one split of their sums, into its own part of the result."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outputs < count
    at = outputs.to(tl.int64)[:, None]
    members = tl.arange(0, ROWS)
    used = members < rows_count
    COMPUTE: tl.constexpr = tl.float32 if EXACT else rows.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    places = tl.arange(0, WIDTH)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    steps: tl.constexpr = (FOURS + WIDTH - 1) // WIDTH
    for step in tl.range(steps * split // splits, steps * (split + 1) // splits):
        fours = step * WIDTH + places
        inside = fours < FOURS
        known = there[:, None] & inside[None, :]
        code = tl.load(codes + at * (FOURS // 2) + (fours // 2)[None, :], mask=known, other=0).to(tl.int32)
        code = code >> ((fours % 2) * 4)[None, :]
        first, second = code & 3, (code >> 2) & 3
        low = tl.load(values + at * (2 * FOURS) + fours[None, :], mask=known, other=0).to(tl.float32)
        high = tl.load(values + at * (2 * FOURS) + (FOURS + fours)[None, :], mask=known, other=0).to(tl.float32)
        for column in tl.static_range(4):
            weights = tl.where(first == column, low, 0.0) + tl.where(second == column, high, 0.0)
            asked = rows + members[None, :] * (4 * FOURS) + (4 * fours + column)[:, None]
            given = tl.load(asked, mask=inside[:, None] & used[None, :], other=0).to(COMPUTE)
            total += tl.dot(weights.to(COMPUTE), given, input_precision=PRECISION)
    to = result + (split * rows_count + members)[None, :].to(tl.int64) * count + outputs[:, None]
    tl.store(to, total.to(result.dtype.element_ty), mask=there[:, None] & used[None, :])


@triton.jit(do_not_specialize=["first_row"])
def sparse_decode_kernel(codes, values, result, first_row, FOURS: tl.constexpr, WIDTH: tl.constexpr):
    """One program a piece of one row: its weights, zeros where none is kept."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = piece * WIDTH + tl.arange(0, WIDTH)
    inside = columns < 4 * FOURS
    fours, column = columns // 4, columns % 4
    code = tl.load(codes + (first_row + row) * (FOURS // 2) + fours // 2, mask=inside, other=0).to(tl.int32)
    code = code >> (fours % 2) * 4
    at = values + (first_row + row) * (2 * FOURS) + fours
    low = tl.load(at, mask=inside & (column == (code & 3)), other=0).to(tl.float32)
    high = tl.load(at + FOURS, mask=inside & (column == ((code >> 2) & 3)), other=0).to(tl.float32)
    tl.store(result + row * 4 * FOURS + columns, (low + high).to(result.dtype.element_ty), mask=inside)
