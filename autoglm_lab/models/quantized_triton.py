"""The kernels behind `quantized_products`. Importing this file needs Triton."""
# mypy: ignore-errors
# ruff: noqa: N803, N806

import triton
import triton.language as tl


@triton.jit
def one_row_kernel(
    row, codes, scales, result, count,
    COLUMNS: tl.constexpr, CODE_WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """One program ``OUTPUTS`` columns of the result: their weights' codes against the row, summed in float32."""
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outputs < count
    at = codes + outputs.to(tl.int64)[:, None] * CODE_WIDTH
    places = tl.arange(0, WIDTH)
    if BITS == 8:
        total = tl.zeros((OUTPUTS, WIDTH), tl.float32)
        for start in tl.range(0, CODE_WIDTH, WIDTH):
            columns = start + places
            inside = columns < CODE_WIDTH
            code = tl.load(at + columns[None, :], mask=there[:, None] & inside[None, :], other=0)
            given = tl.load(row + columns, mask=inside, other=0).to(tl.float32)
            total += code.to(tl.float32) * given[None, :]
        scale = tl.load(scales + outputs, mask=there, other=0)
        summed = tl.sum(total, 1) * scale
    else:
        HALF: tl.constexpr = GROUP // 2
        GROUPS: tl.constexpr = WIDTH // HALF
        ALL: tl.constexpr = COLUMNS // GROUP
        total = tl.zeros((OUTPUTS, GROUPS), tl.float32)
        first = places // HALF * GROUP + places % HALF
        for start in tl.range(0, CODE_WIDTH, WIDTH):
            inside = start + places < CODE_WIDTH
            code = tl.load(at + (start + places)[None, :], mask=there[:, None] & inside[None, :], other=0)
            lower = tl.load(row + start * 2 + first, mask=inside, other=0).to(tl.float32)
            higher = tl.load(row + start * 2 + first + HALF, mask=inside, other=0).to(tl.float32)
            sums = (code & 15).to(tl.float32) * lower[None, :] + (code >> 4).to(tl.float32) * higher[None, :]
            sums = tl.sum(tl.reshape(sums, (OUTPUTS, GROUPS, HALF)), 2)
            given = tl.sum(tl.reshape(lower + higher, (GROUPS, HALF)), 1)
            groups = start // HALF + tl.arange(0, GROUPS)
            known = there[:, None] & (groups < ALL)[None, :]
            pair = scales + (outputs.to(tl.int64)[:, None] * ALL + groups[None, :]) * 2
            scale = tl.load(pair, mask=known, other=0).to(tl.float32)
            low = tl.load(pair + 1, mask=known, other=0).to(tl.float32)
            total += sums * scale + given[None, :] * low
        summed = tl.sum(total, 1)
    tl.store(result + outputs, summed.to(result.dtype.element_ty), mask=there)


@triton.jit
def _scaled(
    number, scales, outputs, there, start, ALL: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Weights behind half of the codes of some groups, ``[OUTPUTS, WIDTH]``."""
    GROUPS: tl.constexpr = WIDTH // HALF
    groups = start // HALF + tl.arange(0, GROUPS)
    known = there[:, None] & (groups < ALL)[None, :]
    pair = scales + (outputs.to(tl.int64)[:, None] * ALL + groups[None, :]) * 2
    scale = tl.load(pair, mask=known, other=0).to(tl.float32)
    low = tl.load(pair + 1, mask=known, other=0).to(tl.float32)
    grouped = tl.reshape(number.to(tl.float32), (OUTPUTS, GROUPS, HALF))
    return tl.reshape(grouped * scale[:, :, None] + low[:, :, None], (OUTPUTS, WIDTH))


@triton.jit(do_not_specialize=["rows_count"])
def few_rows_kernel(
    rows, codes, scales, result, rows_count, count,
    COLUMNS: tl.constexpr, CODE_WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program ``OUTPUTS`` columns of every row, and one split of their sums, into its own part of the result."""
    split, splits = tl.program_id(1), tl.num_programs(1)
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = outputs < count
    members = tl.arange(0, ROWS)
    used = members < rows_count
    COMPUTE: tl.constexpr = tl.float32 if EXACT else rows.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    at = codes + outputs.to(tl.int64)[:, None] * CODE_WIDTH
    places = tl.arange(0, WIDTH)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    steps: tl.constexpr = (CODE_WIDTH + WIDTH - 1) // WIDTH
    for step in tl.range(steps * split // splits, steps * (split + 1) // splits):
        start = step * WIDTH
        inside = start + places < CODE_WIDTH
        code = tl.load(at + (start + places)[None, :], mask=there[:, None] & inside[None, :], other=0)
        wanted = inside[:, None] & used[None, :]
        if BITS == 8:
            asked = rows + members[None, :] * COLUMNS + (start + places)[:, None]
            given = tl.load(asked, mask=wanted, other=0).to(COMPUTE)
            total += tl.dot(code.to(tl.float32).to(COMPUTE), given, input_precision=PRECISION)
        else:
            HALF: tl.constexpr = GROUP // 2
            first = places // HALF * GROUP + places % HALF
            asked = rows + members[None, :] * COLUMNS + (start * 2 + first)[:, None]
            lower = tl.load(asked, mask=wanted, other=0).to(COMPUTE)
            higher = tl.load(asked + HALF, mask=wanted, other=0).to(COMPUTE)
            ALL: tl.constexpr = COLUMNS // GROUP
            weights = _scaled(code & 15, scales, outputs, there, start, ALL, HALF, WIDTH, OUTPUTS).to(COMPUTE)
            total += tl.dot(weights, lower, input_precision=PRECISION)
            weights = _scaled(code >> 4, scales, outputs, there, start, ALL, HALF, WIDTH, OUTPUTS).to(COMPUTE)
            total += tl.dot(weights, higher, input_precision=PRECISION)
    if BITS == 8:
        total *= tl.load(scales + outputs, mask=there, other=0)[:, None]
    to = result + (split * rows_count + members)[None, :].to(tl.int64) * count + outputs[:, None]
    tl.store(to, total.to(result.dtype.element_ty), mask=there[:, None] & used[None, :])


@triton.jit(do_not_specialize=["numbers", "splits"])
def add_kernel(parts, result, numbers, splits, BLOCK: tl.constexpr):
    """The sum of the splits, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < numbers
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts + split * numbers + at, mask=there, other=0)
    tl.store(result + at, total.to(result.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["first", "columns"])
def decode_kernel(
    codes, scales, result, first, columns,
    CODE_WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program a piece of one row: its weights."""
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = piece * WIDTH + tl.arange(0, WIDTH)
    inside = places < CODE_WIDTH
    code = tl.load(codes + (first + row) * CODE_WIDTH + places, mask=inside, other=0)
    to = result + row * columns
    if BITS == 8:
        scale = tl.load(scales + first + row)
        tl.store(to + places, (code.to(tl.float32) * scale).to(result.dtype.element_ty), mask=inside)
    else:
        HALF: tl.constexpr = GROUP // 2
        pair = scales + ((first + row) * (columns // GROUP) + places // HALF) * 2
        scale = tl.load(pair, mask=inside, other=0).to(tl.float32)
        low = tl.load(pair + 1, mask=inside, other=0).to(tl.float32)
        at = to + places // HALF * GROUP + places % HALF
        tl.store(at, ((code & 15).to(tl.float32) * scale + low).to(result.dtype.element_ty), mask=inside)
        tl.store(at + HALF, ((code >> 4).to(tl.float32) * scale + low).to(result.dtype.element_ty), mask=inside)
