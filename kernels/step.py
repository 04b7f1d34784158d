"""The generic pass: load, cast, RULE, cast, store. One kernel for every pass of every rule.

Where a pass has terms to sum, a second kernel, also for every rule, settles what follows from them.

A rule's functions are compiled into the kernel as they stand in ``rules`` (``kernels/rules.py``).
The rounding points are those of ``reference.py``: load to the compute type, multiply the gradient,
run the rule with scalars that were derived in float64 and rounded once, round each stream once.

The kernels must not be autotuned: a second run would update the parameters a second time.
"""

import triton
import triton.language as tl

from .rules import number
from .sums import TILE, halve, sum_of_tiles


@triton.jit
def stream_offsets(layout, stream, index, DIMS: tl.constexpr):
    """Where elements ``index`` of a tensor lie in one of its streams, in elements.

    ``layout``: DIMS sizes, outermost first, then DIMS strides per stream; 0 first: contiguous.
    """
    offsets = index
    if tl.load(layout) != 0:
        offsets = tl.zeros_like(index)
        for k in tl.static_range(DIMS - 1, -1, -1):
            size = tl.load(layout + k)
            offsets += (index % size) * tl.load(layout + (1 + stream) * DIMS + k)
            index = index // size
    return offsets


@triton.jit
def locate(
    base,
    layout,
    stream,
    index,
    DTYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Pointers to elements ``index`` of a tensor in one of its streams."""
    offsets = stream_offsets(layout, stream, index, DIMS) if DIMS > 0 else index
    pointer = base.to(tl.pointer_type(DTYPE)) + offsets
    if VECTOR > 1:
        pointer = tl.max_contiguous(tl.multiple_of(pointer, 16), index.shape[0])
    return pointer


@triton.jit
def rounded_to(value, DTYPE: tl.constexpr):
    """As torch rounds: a float64 becomes a float32 before it becomes a half."""
    if (value.dtype == tl.float64) & (DTYPE.primitive_bitwidth == 16):
        value = value.to(tl.float32)
    return value.to(DTYPE)


@triton.jit
def run_elements(
    bases,
    sources,
    begin,
    numel,
    layout,
    scalars,
    grad_multiplier,
    sums,
    tiles,
    FUNCTION: tl.constexpr,
    WRITES: tl.constexpr,
    SUMS: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Run the rule on WIDTH elements from ``begin`` on; streams p, g, states start at ``bases``.

    A stream reads as zero where its source is 0, and is not written where its base is 0.
    VECTOR > 1 promises that bases are 16-byte aligned, and a mask that ends at the end of a vector.
    """
    index = begin + tl.arange(0, WIDTH)
    # The divisions tell the compiler that the mask is the same throughout a vector.
    inside = index // VECTOR < numel // VECTOR
    # Added to an address it makes a block: Triton's interpreter loses the type of scalar masks.
    zero = tl.zeros_like(index)
    pointers = ()
    loaded = ()
    for s in tl.static_range(len(DTYPES)):
        pointer = locate(bases[s], layout, s, index, DTYPES[s], VECTOR, DIMS)
        pointers += (pointer,)
        value = tl.load(pointer, mask=inside & (zero + sources[s] != 0), other=0.0)
        loaded += (value.to(COMPUTE),)
    states = ()
    for s in tl.static_range(2, len(DTYPES)):
        states += (loaded[s],)
    results = FUNCTION(loaded[0], loaded[1] * grad_multiplier, *states, *scalars)
    for k in tl.static_range(len(WRITES)):
        base = bases[WRITES[k]]
        pointer = pointers[WRITES[k]]
        if (SUMS > 0) & (DIMS > 0):  # for a whole tile they do not fit into the registers
            pointer = locate(base, layout, WRITES[k], index, DTYPES[WRITES[k]], VECTOR, DIMS)
        value = rounded_to(results[k], DTYPES[WRITES[k]])
        tl.store(pointer, value, mask=inside & (zero + base != 0))
    for k in tl.static_range(SUMS):
        term = tl.where(inside, results[len(WRITES) + k].to(tl.float64), 0.0)
        tl.store(sums + k * tiles, halve(term))


@triton.jit
def load_numbers(table, stride, COUNT: tl.constexpr):
    """COUNT numbers of a table, ``stride`` apart."""
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers += (tl.load(table + k * stride),)
    return numbers


@triton.jit
def load_hyper(hyper, device_lr, row, HYPER: tl.constexpr):
    """The hyper-parameters of a row; the learning rate, the first of them, may lie elsewhere."""
    values = load_numbers(hyper + row * (HYPER + 1), 1, HYPER)
    if device_lr is not None:
        address = tl.load(device_lr + row)
        wide = address & 1
        low = (address != 0) & (wide == 0)
        single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=low, other=0.0)
        at = (address - wide).to(tl.pointer_type(tl.float64))
        double = tl.load(at, mask=wide != 0, other=0.0)
        found = tl.where(wide != 0, double, single.to(tl.float64))
        others = values
        values = (tl.where(address != 0, found, others[0]),)
        for k in tl.static_range(1, HYPER):
            values += (others[k],)
    return values


@triton.jit
def load_kept(kept, tensors, KEPT: tl.constexpr, INITIAL: tl.constexpr):
    """The numbers kept for a tensor, in float64; absent ones are as they begin."""
    numbers = ()
    for k in tl.static_range(len(INITIAL)):
        address = tl.load(kept + k * tensors)
        number = tl.load(address.to(tl.pointer_type(KEPT)), mask=address != 0, other=0.0)
        initial = tl.full((), INITIAL[k], tl.float64)
        numbers += (tl.where(address != 0, number.to(tl.float64), initial),)
    return numbers


@triton.jit
def rounded(numbers, DTYPE: tl.constexpr):
    """Each number rounded once."""
    made = ()
    for k in tl.static_range(len(numbers)):
        made += (number(numbers[k], tl.float64).to(DTYPE),)
    return made


@triton.jit
def load_multiplier(grad_multiplier, grad_scale, DTYPE: tl.constexpr):
    """What a gradient is multiplied by."""
    multiplier = tl.load(grad_multiplier)
    if grad_scale is not None:
        # Rounded to float32 as GradScaler.unscale_ does.
        multiplier *= (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)
    return multiplier.to(DTYPE)


@triton.jit(
    do_not_specialize=["tensors", "tiles"],
    do_not_specialize_on_alignment=["hyper", "grad_scale", "found_inf"],
)
def pass_kernel(
    tile_tensor,  # int32 [tiles]: the tensor that a tile belongs to
    shapes,  # int64 [3, tensors]: number of elements, first tile, row of the hyper table
    addresses,  # int64 [streams, tensors]: p, g, states; 0 where a state is absent
    tensor_scalars,  # float64 [TENSOR_SCALARS, tensors]
    kept,  # int64 [numbers, tensors] or None: addresses of the kept numbers; 0 where absent
    layouts,  # int64 [tensors, 1 + streams, DIMS] or None: see stream_offsets
    hyper,  # float64 [rows, HYPER + 1]: hyper-parameters, then the gradient multiplier
    device_lr,  # int64 [rows] or None: addresses of learning rates, + 1 if float64; 0: in `hyper`
    grad_scale,  # float32 [1] or None: gradients are divided by it
    found_inf,  # float32 [1] or None: where it is not zero nothing is written
    sums,  # float64 [SUMS, tiles] or None, written: sums of each tile
    tensors,
    tiles,
    FUNCTION: tl.constexpr,  # of p, g, states and scalars: what is written, then the terms
    READS: tl.constexpr,  # of the scalars: whether each stream is loaded; or None
    SETTLED: tl.constexpr,  # of hyper-parameters and kept numbers: not 0: nothing is done; or None
    WRITES: tl.constexpr,  # which streams are written
    SUMS: tl.constexpr,  # number of terms
    DERIVE: tl.constexpr,
    DTYPES: tl.constexpr,  # of each stream
    COMPUTE: tl.constexpr,
    HYPER: tl.constexpr,
    TENSOR_SCALARS: tl.constexpr,
    KEPT: tl.constexpr,  # dtype of the kept numbers
    INITIAL: tl.constexpr,  # what they begin with
    DIMS: tl.constexpr,  # 0: every tensor is contiguous
    VECTOR: tl.constexpr,  # elements in 16 bytes of the narrowest stream
    PART: tl.constexpr,  # elements at a time where 16-byte accesses are not possible
):
    STREAMS: tl.constexpr = len(DTYPES)
    tile = tl.program_id(0).to(tl.int64)
    # One load finds the tensor; a search through tile counts would be ten that wait for each other.
    tensor = tl.load(tile_tensor + tile).to(tl.int64)
    numel = tl.load(shapes + tensor)
    begin = (tile - tl.load(shapes + tensors + tensor)) * TILE
    row = tl.load(shapes + 2 * tensors + tensor)
    values = load_hyper(hyper, device_lr, row, HYPER)
    tensor_values = load_numbers(tensor_scalars + tensor, tensors, TENSOR_SCALARS)
    kept_values = ()
    if kept is not None:
        kept_values = load_kept(kept + tensor, tensors, KEPT, INITIAL)
    scalars = rounded(DERIVE(*values, *tensor_values, *kept_values), COMPUTE)
    grad_multiplier = load_multiplier(hyper + row * (HYPER + 1) + HYPER, grad_scale, COMPUTE)
    if READS is not None:
        reads = READS(*scalars)
    if SETTLED is not None:
        numel = tl.where(number(SETTLED(*values, *kept_values), tl.float64) != 0.0, 0, numel)
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) != 0.0, 0, numel)

    # 16-byte accesses need aligned streams and a tile that ends with a whole vector.
    bases = ()
    sources = ()
    vectors = (numel % VECTOR == 0) | (begin + TILE <= numel)
    for s in tl.static_range(STREAMS):
        bases += (tl.load(addresses + s * tensors + tensor),)
        vectors = vectors & (bases[s] % 16 == 0)
        source = bases[s]
        if READS is not None:
            source = tl.where(number(reads[s], COMPUTE) != 0.0, source, 0)
        sources += (source,)
    if DIMS > 0:
        layouts += tensor * (1 + STREAMS) * DIMS
        vectors = vectors & (tl.load(layouts) == 0)
    if SUMS > 0:
        sums += tile
    if vectors:
        run_elements(
            bases, sources, begin, numel, layouts, scalars, grad_multiplier, sums, tiles,
            FUNCTION, WRITES, SUMS, DTYPES, COMPUTE, TILE, VECTOR, 0,
        )  # fmt: skip
    else:
        for part in range(0, TILE, PART):
            run_elements(
                bases, sources, begin + part, numel, layouts, scalars, grad_multiplier, sums, tiles,
                FUNCTION, WRITES, SUMS, DTYPES, COMPUTE, PART, 1, DIMS,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["tensors", "tiles", "updates"],
    do_not_specialize_on_alignment=["hyper", "found_inf"],
)
def settle_kernel(
    shapes,  # as in pass_kernel, and so on
    tensor_scalars,
    kept,
    hyper,
    device_lr,
    found_inf,
    tile_sums,  # float64 [SUMS, tiles]
    settled_scalars,  # float64 [TENSOR_SCALARS, tensors], written: those of this step
    tensors,
    tiles,
    updates,  # 0 where no update follows
    SETTLE: tl.constexpr,
    SETTLED: tl.constexpr,
    HYPER: tl.constexpr,
    TENSOR_SCALARS: tl.constexpr,
    KEPT: tl.constexpr,
    INITIAL: tl.constexpr,
    SUMS: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64)
    numel = tl.load(shapes + tensor)
    values = load_hyper(hyper, device_lr, tl.load(shapes + 2 * tensors + tensor), HYPER)
    given = load_numbers(tensor_scalars + tensor, tensors, TENSOR_SCALARS)
    kept_values = ()
    if kept is not None:
        kept += tensor
        kept_values = load_kept(kept, tensors, KEPT, INITIAL)
    measured = (number(SETTLED(*values, *kept_values), tl.float64) == 0.0) & (numel > 0)
    if found_inf is not None:
        measured = measured & (tl.load(found_inf) == 0.0)
    tile_sums += tl.load(shapes + tensors + tensor)
    count = tl.where(measured, (numel + TILE - 1) // TILE, 0)
    sums = ()
    for k in tl.static_range(SUMS):
        sums += (sum_of_tiles(tile_sums + k * tiles, count),)
    found = SETTLE(*values, numel.to(tl.float64), updates.to(tl.float64), *kept_values, *sums)
    for k in tl.static_range(TENSOR_SCALARS):
        value = tl.where(measured, number(found[k], tl.float64), given[k])
        tl.store(settled_scalars + k * tensors + tensor, value)
    for k in tl.static_range(len(INITIAL)):
        address = tl.load(kept + k * tensors)
        value = number(found[TENSOR_SCALARS + k], tl.float64).to(KEPT)
        tl.store(address.to(tl.pointer_type(KEPT)), value, mask=measured & (address != 0))
