"""The kernels behind `paged_kernels`. Importing this file needs Triton.

Softmax is in base 2: the caller multiplies its scale by log2(e). Splitting a row's tokens among programs and joining
their partial results afterwards follows Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
"""
# mypy: ignore-errors
# ruff: noqa: N803, N806

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["new", "table_row"])
def write_kernel(
    keys, values, codes, scales, table, lengths, new,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    code_page, code_part, code_slot, code_head,
    scale_page, scale_part, scale_slot, scale_head,
    table_row,
    PAGE: tl.constexpr, DIM: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One program a new token, head, and keys (part 0) or values (part 1)."""
    row, token = tl.program_id(0) // new, tl.program_id(0) % new
    head, part = tl.program_id(1), tl.program_id(2)
    place = tl.load(lengths + row) - new + token
    page = tl.load(table + row * table_row + place // PAGE).to(tl.int64)
    slot = place % PAGE
    if part == 0:
        given = keys + row * key_batch + head * key_head + token * key_token
    else:
        given = values + row * value_batch + head * value_head + token * value_token
    to = codes + page * code_page + part * code_part + slot * code_slot + head * code_head
    dims = tl.arange(0, DIM)
    if BITS == 16:
        tl.store(to + dims, tl.load(given + dims))
    elif BITS == 8:
        numbers = tl.load(given + dims).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(numbers), 0) / 127, 6.103515625e-05).to(tl.float16)
        rounded = tl.floor(numbers / scale.to(tl.float32) + 0.5)
        tl.store(to + dims, tl.minimum(tl.maximum(rounded, -127.0), 127.0).to(tl.int8))
        tl.store(scales + page * scale_page + part * scale_part + slot * scale_slot + head * scale_head, scale)
    else:
        numbers = tl.load(given + dims).to(tl.float32)
        grouped = tl.reshape(numbers, (DIM // GROUP, GROUP))
        low = tl.min(grouped, 1).to(tl.float16)
        scale = tl.maximum((tl.max(grouped, 1) - low.to(tl.float32)) / 15, 6.103515625e-05).to(tl.float16)
        rounded = tl.floor((grouped - low.to(tl.float32)[:, None]) / scale.to(tl.float32)[:, None] + 0.5)
        nibbles = tl.reshape(tl.minimum(tl.maximum(rounded, 0.0), 15.0).to(tl.int32), (2, DIM // 2))
        halves = tl.arange(0, 2)[:, None]
        packed = tl.sum(nibbles << (halves * 4), 0)
        tl.store(to + tl.arange(0, DIM // 2), packed.to(tl.uint8))
        at = scales + page * scale_page + part * scale_part + slot * scale_slot + head * scale_head
        groups = tl.arange(0, DIM // GROUP)
        tl.store(at + groups * 2, scale)
        tl.store(at + groups * 2 + 1, low)


@triton.jit
def _tile(
    codes, scales, offsets, scale_offsets, dims, seen,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Keys or values of some tokens, ``[tokens, WIDTH]``: all dimensions, or for 4 bits the lower or higher half."""
    raw = tl.load(codes + offsets[:, None] + dims[None, :], mask=seen[:, None], other=0)
    if BITS == 16:
        tile = raw
    elif BITS == 8:
        scale = tl.load(scales + scale_offsets, mask=seen, other=0).to(tl.float32)
        tile = raw.to(tl.float32) * scale[:, None]
    else:
        nibbles = (raw >> 4) if HIGH else (raw & 15)
        group = (dims + (WIDTH if HIGH else 0)) // GROUP * 2
        at = scales + scale_offsets[:, None] + group[None, :]
        scale = tl.load(at, mask=seen[:, None], other=0).to(tl.float32)
        low = tl.load(at + 1, mask=seen[:, None], other=0).to(tl.float32)
        tile = nibbles.to(tl.float32) * scale + low
    return tile


@triton.jit(do_not_specialize=["table_row", "heads"])
def attend_kernel(
    query, codes, scales, table, lengths, partial, sums, scale,
    query_batch, query_head,
    code_page, code_part, code_slot, code_head,
    scale_page, scale_part, scale_slot, scale_head,
    table_row, heads,
    PAGE: tl.constexpr, DIM: tl.constexpr, SCALE_GROUP: tl.constexpr, BITS: tl.constexpr, HEADS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program a row, key head and split: attention of that head's queries over the split's tokens."""
    row, head, split, splits = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    length = tl.load(lengths + row)
    blocks = tl.cdiv(length, BLOCK)
    first = blocks * split // splits * BLOCK
    end = tl.minimum(blocks * (split + 1) // splits * BLOCK, length)

    WIDTH: tl.constexpr = DIM // 2 if BITS == 4 else DIM
    COMPUTE: tl.constexpr = tl.float32 if EXACT else query.dtype.element_ty
    PRECISION: tl.constexpr = "ieee" if EXACT else "tf32"
    members = tl.arange(0, ROWS)
    dims = tl.arange(0, WIDTH)
    used = members < HEADS
    asked = query + row * query_batch + (head * HEADS + members)[:, None] * query_head + dims[None, :]
    lower = tl.load(asked, mask=used[:, None], other=0).to(COMPUTE)
    result = tl.zeros((ROWS, WIDTH), tl.float32)
    if BITS == 4:
        higher = tl.load(asked + WIDTH, mask=used[:, None], other=0).to(COMPUTE)
        result_high = tl.zeros((ROWS, WIDTH), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)

    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        seen = tokens < end
        page = tl.load(table + row * table_row + tokens // PAGE, mask=seen, other=0).to(tl.int64)
        at = page * code_page + (tokens % PAGE) * code_slot + head * code_head
        scale_at = page * scale_page + (tokens % PAGE) * scale_slot + head * scale_head
        keys = _tile(codes, scales, at, scale_at, dims, seen, False, WIDTH, SCALE_GROUP, BITS).to(COMPUTE)
        scores = tl.dot(lower, tl.trans(keys), input_precision=PRECISION)
        if BITS == 4:
            keys_high = _tile(codes, scales, at, scale_at, dims, seen, True, WIDTH, SCALE_GROUP, BITS).to(COMPUTE)
            scores += tl.dot(higher, tl.trans(keys_high), input_precision=PRECISION)
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - highest[:, None])
        faded = tl.exp2(peak - highest)
        total = total * faded + tl.sum(weights, 1)
        at += code_part
        scale_at += scale_part
        values = _tile(codes, scales, at, scale_at, dims, seen, False, WIDTH, SCALE_GROUP, BITS).to(COMPUTE)
        result = result * faded[:, None] + tl.dot(weights.to(COMPUTE), values, input_precision=PRECISION)
        if BITS == 4:
            values_high = _tile(codes, scales, at, scale_at, dims, seen, True, WIDTH, SCALE_GROUP, BITS).to(COMPUTE)
            result_high = result_high * faded[:, None] + tl.dot(
                weights.to(COMPUTE), values_high, input_precision=PRECISION
            )
        peak = highest

    place = (row * heads + head * HEADS + members) * splits + split
    tl.store(partial + place[:, None] * DIM + dims[None, :], result, mask=used[:, None])
    if BITS == 4:
        tl.store(partial + place[:, None] * DIM + dims[None, :] + WIDTH, result_high, mask=used[:, None])
    tl.store(sums + place * 2, peak, mask=used)
    tl.store(sums + place * 2 + 1, total, mask=used)


@triton.jit(do_not_specialize=["heads", "count"])
def join_kernel(partial, sums, result, heads, count, DIM: tl.constexpr, MOST: tl.constexpr):
    """One program a row and head: the results of its ``count`` splits, weighted by what each summed."""
    row, head = tl.program_id(0), tl.program_id(1)
    place = (row * heads + head) * count
    splits, dims = tl.arange(0, MOST), tl.arange(0, DIM)
    there = splits < count
    peaks = tl.load(sums + (place + splits) * 2, mask=there, other=float("-inf"))
    totals = tl.load(sums + (place + splits) * 2 + 1, mask=there, other=0)
    weights = tl.exp2(peaks - tl.max(peaks, 0))
    parts = tl.load(partial + (place + splits)[:, None] * DIM + dims[None, :], mask=there[:, None], other=0)
    joined = tl.sum(parts * weights[:, None], 0) / tl.sum(totals * weights, 0)
    tl.store(result + (row * heads + head) * DIM + dims, joined)


@triton.jit(do_not_specialize=["length", "table_row", "result_part", "result_batch", "result_head"])
def read_kernel(
    codes, scales, table, result, length,
    code_page, code_part, code_slot, code_head,
    scale_page, scale_part, scale_slot, scale_head,
    table_row, result_part, result_batch, result_head,
    PAGE: tl.constexpr, DIM: tl.constexpr, SCALE_GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """One program a block of tokens, row and head, and keys or values: pages into one dense tensor."""
    row, head, part = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS, tl.program_id(2)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seen = tokens < length
    page = tl.load(table + row * table_row + tokens // PAGE, mask=seen, other=0).to(tl.int64)
    at = page * code_page + part * code_part + (tokens % PAGE) * code_slot + head * code_head
    scale_at = page * scale_page + part * scale_part + (tokens % PAGE) * scale_slot + head * scale_head
    WIDTH: tl.constexpr = DIM // 2 if BITS == 4 else DIM
    dims = tl.arange(0, WIDTH)
    to = result + part * result_part + row * result_batch + head * result_head + tokens[:, None] * DIM + dims[None, :]
    tile = _tile(codes, scales, at, scale_at, dims, seen, False, WIDTH, SCALE_GROUP, BITS)
    tl.store(to, tile, mask=seen[:, None])
    if BITS == 4:
        high = _tile(codes, scales, at, scale_at, dims, seen, True, WIDTH, SCALE_GROUP, BITS)
        tl.store(to + WIDTH, high, mask=seen[:, None])


@triton.jit(do_not_specialize=["table_row", "width", "words"])
def copy_kernel(
    given, taken, table, lengths, given_page, taken_page, table_row, width, words,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a page and row: one layer of it, as 32-bit words."""
    place, row = tl.program_id(0), tl.program_id(1)
    if place * PAGE < tl.load(lengths + row):
        page = tl.load(table + row * table_row + place).to(tl.int64)
        source = given + page * given_page
        target = taken + (row * width + place).to(tl.int64) * taken_page
        for start in range(0, words, BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)
