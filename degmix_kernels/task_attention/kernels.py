"""Triton kernels of ``task_attention``: one pass forward, one backward.

A row is a pixel and a head of the keys; a tile is (rows, channels of a head), and a program owns one block
of rows of one image. It reads the tiles of all key tasks once, keeps them, and takes past them the queries of
all tasks and of the ``sharing`` heads that use these keys, ``CHUNK`` at a time so that their loads overlap.
What a key's gradient sums over, queries and heads, is therefore summed within one program.

Inputs have a stride on each of their first three axes, in multiples of ``UNIT``, so that the compiler knows
how wide it may load; outputs are contiguous. Arithmetic is fp32.
"""

import triton
import triton.language as tl


@triton.jit
def weighted_sum(weights, tiles):
    """Σ w_t x_t over the tasks: (rows, 1) and (rows, channels) → (rows, channels)."""
    total = weights[0] * tiles[0].to(tl.float32)
    for task in tl.static_range(1, len(tiles)):
        total += weights[task] * tiles[task].to(tl.float32)
    return total


@triton.jit
def products(tile, tiles):
    """x · y_t over the channels, (rows, 1) for each task."""
    results = ()
    for task in tl.static_range(len(tiles)):
        results += (tl.sum(tile * tiles[task].to(tl.float32), axis=1, keep_dims=True),)
    return results


@triton.jit
def softmax(scores, scale):
    """Softmax over the tasks of scale · score, (rows, 1) for each."""
    largest = scores[0] * scale
    for task in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[task] * scale)
    total = tl.zeros_like(largest)
    powers = ()
    for task in tl.static_range(len(scores)):
        powers += (tl.exp(scores[task] * scale - largest),)
        total += powers[task]
    weights = ()
    for task in tl.static_range(len(scores)):
        weights += (powers[task] / total,)
    return weights


@triton.jit
def grad_softmax(weights, grad_weights, scale):
    """The gradients of the products: w_t (g_t − Σ w g) · scale, (rows, 1) for each task."""
    mean = weights[0] * grad_weights[0]
    for task in tl.static_range(1, len(weights)):
        mean += weights[task] * grad_weights[task]
    results = ()
    for task in tl.static_range(len(weights)):
        results += (weights[task] * (grad_weights[task] - mean) * scale,)
    return results


@triton.jit
def accumulate(totals, weights, tile):
    """totals_t + w_t x for each task."""
    results = ()
    for task in tl.static_range(len(totals)):
        results += (totals[task] + weights[task] * tile,)
    return results


@triton.jit
def load_tasks(pointer, address, stride, valid, zero, UNIT: tl.constexpr, TASKS: tl.constexpr):
    """The tile of every key task."""
    tiles = ()
    for task in tl.static_range(TASKS):
        tiles += (tl.load(pointer + address + (zero + task) * stride * UNIT, mask=valid, other=0.0),)
    return tiles


@triton.jit
def store_tasks(pointer, tiles, address, stride, valid):
    """Store the tile of every key task."""
    for task in tl.static_range(len(tiles)):
        tl.store(pointer + address + task * stride, tiles[task].to(pointer.dtype.element_ty), mask=valid)


@triton.jit
def block_of(rows, row_blocks, INDEX_64: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """This program's image and rows, (rows, 1), and a zero of the width of an index."""
    program = tl.program_id(0)
    zero = tl.zeros((), tl.int64 if INDEX_64 else tl.int32)
    image, block = zero + program // row_blocks, zero + program % row_blocks
    return image, block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None], zero


@triton.jit
def forward(
    query_ptr,
    key_ptr,
    value_ptr,  # or None: the keys are the values
    output_ptr,  # contiguous
    scale,
    query_stride_batch,
    query_stride_task,
    query_stride_pixel,
    key_stride_batch,
    key_stride_task,
    key_stride_pixel,
    value_stride_batch,
    value_stride_task,
    value_stride_pixel,
    rows,  # pixels · HEADS
    row_blocks,
    query_tasks,
    queries,  # query_tasks · sharing
    sharing,  # heads of the query that use the same keys
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    TASKS: tl.constexpr,
    HEADS: tl.constexpr,  # of the keys
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """softmax(scale · q · k) v for one block of rows and every query."""
    image, row, zero = block_of(rows, row_blocks, INDEX_64, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    in_head = channel < HEAD_DIM
    valid = (row < rows) & in_head
    pixel, head = row // HEADS, row % HEADS

    within = head * HEAD_DIM + channel
    key_address = (image * key_stride_batch + pixel * key_stride_pixel) * UNIT + within
    keys = load_tasks(key_ptr, key_address, key_stride_task, valid, zero, UNIT, TASKS)
    values = keys
    if value_ptr is not None:
        value_address = (image * value_stride_batch + pixel * value_stride_pixel) * UNIT + within
        values = load_tasks(value_ptr, value_address, value_stride_task, valid, zero, UNIT, TASKS)

    within = head * sharing * HEAD_DIM + channel
    query_ptr += (image * query_stride_batch + pixel * query_stride_pixel) * UNIT + within
    output_ptr += (image * query_tasks * rows + row) * sharing * HEAD_DIM + channel
    for first in range(0, queries, CHUNK):
        tiles = ()
        for step in tl.static_range(CHUNK):
            query = zero + first + step
            asked = (row < tl.where(query < queries, rows, 0)) & in_head
            offset = (query // sharing) * query_stride_task * UNIT + (query % sharing) * HEAD_DIM
            tiles += (tl.load(query_ptr + offset, mask=asked, other=0.0),)
        for step in tl.static_range(CHUNK):
            query = zero + first + step
            asked = (row < tl.where(query < queries, rows, 0)) & in_head
            weights = softmax(products(tiles[step].to(tl.float32), keys), scale)
            result = weighted_sum(weights, values).to(output_ptr.dtype.element_ty)
            offset = ((query // sharing) * rows * sharing + query % sharing) * HEAD_DIM
            tl.store(output_ptr + offset, result, mask=asked)


@triton.jit
def backward(
    grad_ptr,  # of the output
    query_ptr,
    key_ptr,
    value_ptr,  # or None: the keys are the values
    grad_query_ptr,  # contiguous, or None; so are those below
    grad_key_ptr,
    grad_value_ptr,
    scale,
    grad_stride_batch,
    grad_stride_task,
    grad_stride_pixel,
    query_stride_batch,
    query_stride_task,
    query_stride_pixel,
    key_stride_batch,
    key_stride_task,
    key_stride_pixel,
    value_stride_batch,
    value_stride_task,
    value_stride_pixel,
    rows,
    row_blocks,
    query_tasks,
    queries,
    sharing,
    UNIT: tl.constexpr,
    INDEX_64: tl.constexpr,
    TASKS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Every gradient for one block of rows: the weights are computed again from query and keys."""
    image, row, zero = block_of(rows, row_blocks, INDEX_64, BLOCK_ROWS)
    channel = tl.arange(0, BLOCK_CHANNELS)[None, :]
    in_head = channel < HEAD_DIM
    valid = (row < rows) & in_head
    pixel, head = row // HEADS, row % HEADS

    within = head * HEAD_DIM + channel
    key_address = (image * key_stride_batch + pixel * key_stride_pixel) * UNIT + within
    keys = load_tasks(key_ptr, key_address, key_stride_task, valid, zero, UNIT, TASKS)
    values = keys
    if value_ptr is not None:
        value_address = (image * value_stride_batch + pixel * value_stride_pixel) * UNIT + within
        values = load_tasks(value_ptr, value_address, value_stride_task, valid, zero, UNIT, TASKS)
    grad_keys, grad_values = (), ()
    for _task in tl.static_range(TASKS):
        grad_keys += (tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32),)
        grad_values += (tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32),)

    within = head * sharing * HEAD_DIM + channel
    grad_ptr += (image * grad_stride_batch + pixel * grad_stride_pixel) * UNIT + within
    query_ptr += (image * query_stride_batch + pixel * query_stride_pixel) * UNIT + within
    dense = (image * query_tasks * rows + row) * sharing * HEAD_DIM + channel
    for first in range(0, queries, CHUNK):
        tiles, gradients = (), ()
        for step in tl.static_range(CHUNK):
            query = zero + first + step
            asked = (row < tl.where(query < queries, rows, 0)) & in_head
            offset = (query // sharing) * query_stride_task * UNIT + (query % sharing) * HEAD_DIM
            tiles += (tl.load(query_ptr + offset, mask=asked, other=0.0),)
            offset = (query // sharing) * grad_stride_task * UNIT + (query % sharing) * HEAD_DIM
            gradients += (tl.load(grad_ptr + offset, mask=asked, other=0.0),)
        for step in tl.static_range(CHUNK):
            tile, gradient = tiles[step].to(tl.float32), gradients[step].to(tl.float32)
            weights = softmax(products(tile, keys), scale)
            if (grad_query_ptr is not None) or (grad_key_ptr is not None):
                grad_scores = grad_softmax(weights, products(gradient, values), scale)
            if grad_query_ptr is not None:
                query = zero + first + step
                asked = (row < tl.where(query < queries, rows, 0)) & in_head
                offset = ((query // sharing) * rows * sharing + query % sharing) * HEAD_DIM
                result = weighted_sum(grad_scores, keys).to(grad_query_ptr.dtype.element_ty)
                tl.store(grad_query_ptr + dense + offset, result, mask=asked)
            if grad_key_ptr is not None:
                grad_keys = accumulate(grad_keys, grad_scores, tile)
                if value_ptr is None:
                    grad_keys = accumulate(grad_keys, weights, gradient)
            if grad_value_ptr is not None:
                grad_values = accumulate(grad_values, weights, gradient)

    stride = (zero + rows) * HEAD_DIM
    dense = image * TASKS * stride + row * HEAD_DIM + channel
    if grad_key_ptr is not None:
        store_tasks(grad_key_ptr, grad_keys, dense, stride, valid)
    if grad_value_ptr is not None:
        store_tasks(grad_value_ptr, grad_values, dense, stride, valid)
