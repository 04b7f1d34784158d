"""The generic pass: load, cast, RULE, cast, store. One kernel for every rule of the table.

A rule's ``derive`` and ``update`` are compiled into the kernel as they stand in ``rules.py``. The
rounding points are those of ``reference.py``: load to the compute type, multiply the gradient, run
the rule with scalars that were derived in float64 and rounded once, round each stream once.

The kernel must not be autotuned: a second run would update the parameters a second time.
"""

import triton
import triton.language as tl

# Elements per program, and per tile of a sum; the same in every back-end (csrc/launch.h).
TILE = tl.constexpr(1024)


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
def update_elements(
    bases,
    begin,
    numel,
    layout,
    scalars,
    grad_multiplier,
    UPDATE: tl.constexpr,
    DTYPES: tl.constexpr,
    COMPUTE: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Run the rule on WIDTH elements from ``begin`` on; streams p, g, states start at ``bases``.

    VECTOR > 1 promises that bases are 16-byte aligned, and a mask that ends at the end of a vector.
    """
    index = begin + tl.arange(0, WIDTH)
    # The divisions tell the compiler that the mask is the same throughout a vector.
    inside = index // VECTOR < numel // VECTOR
    pointers = ()
    loaded = ()
    for s in tl.static_range(len(DTYPES)):
        offsets = stream_offsets(layout, s, index, DIMS) if DIMS > 0 else index
        pointer = bases[s].to(tl.pointer_type(DTYPES[s])) + offsets
        if VECTOR > 1:
            pointer = tl.max_contiguous(tl.multiple_of(pointer, 16), WIDTH)
        pointers += (pointer,)
        value = tl.load(pointer, mask=inside & (bases[s] != 0), other=0.0)
        loaded += (value.to(COMPUTE),)
    states = ()
    for s in tl.static_range(2, len(DTYPES)):
        states += (loaded[s],)
    updated = UPDATE(loaded[0], loaded[1] * grad_multiplier, *states, *scalars)
    for s in tl.static_range(len(DTYPES)):
        if s != 1:  # gradients are never modified
            value = updated[s - (s > 1)].to(DTYPES[s])
            tl.store(pointers[s], value, mask=inside & (bases[s] != 0))


@triton.jit
def derive_scalars(
    hyper,
    tensor_scalars,
    tensors,
    DERIVE: tl.constexpr,
    COMPUTE: tl.constexpr,
    HYPER: tl.constexpr,
    TENSOR_SCALARS: tl.constexpr,
):
    """The scalars of the update: derived in float64, each rounded once to the compute type."""
    arguments = ()
    for k in tl.static_range(HYPER):
        arguments += (tl.load(hyper + k),)
    for k in tl.static_range(TENSOR_SCALARS):
        arguments += (tl.load(tensor_scalars + k * tensors),)
    derived = DERIVE(*arguments)
    scalars = ()
    for k in tl.static_range(len(derived)):
        scalars += (derived[k].to(COMPUTE),)
    return scalars


@triton.jit(
    do_not_specialize=["tensors"],
    do_not_specialize_on_alignment=["hyper", "grad_scale", "found_inf"],
)
def step_kernel(
    tile_tensor,  # int32 [tiles]: the tensor that a tile belongs to
    shapes,  # int64 [3, tensors]: number of elements, first tile, row of the hyper table
    addresses,  # int64 [streams, tensors]: p, g, states; 0 where a state is absent
    tensor_scalars,  # float64 [TENSOR_SCALARS, tensors]
    layouts,  # int64 [tensors, 1 + streams, DIMS] or None: see stream_offsets
    hyper,  # float64 [rows, HYPER + 1]: hyper-parameters, then the gradient multiplier
    grad_scale,  # float32 [1] or None: gradients are divided by it
    found_inf,  # float32 [1] or None: where it is not zero nothing is written
    tensors,
    UPDATE: tl.constexpr,
    DERIVE: tl.constexpr,
    DTYPES: tl.constexpr,  # of each stream
    COMPUTE: tl.constexpr,
    HYPER: tl.constexpr,
    TENSOR_SCALARS: tl.constexpr,
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
    hyper += tl.load(shapes + 2 * tensors + tensor) * (HYPER + 1)
    tensor_scalars += tensor
    scalars = derive_scalars(hyper, tensor_scalars, tensors, DERIVE, COMPUTE, HYPER, TENSOR_SCALARS)
    grad_multiplier = tl.load(hyper + HYPER)
    if grad_scale is not None:
        # Rounded to float32 as GradScaler.unscale_ does.
        grad_multiplier *= (1.0 / tl.load(grad_scale).to(tl.float64)).to(tl.float32).to(tl.float64)
    grad_multiplier = grad_multiplier.to(COMPUTE)
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) != 0.0, 0, numel)

    # 16-byte accesses need aligned streams and a tile that ends with a whole vector.
    bases = ()
    vectors = (numel % VECTOR == 0) | (begin + TILE <= numel)
    for s in tl.static_range(STREAMS):
        bases += (tl.load(addresses + s * tensors + tensor),)
        vectors = vectors & (bases[s] % 16 == 0)
    if DIMS > 0:
        layouts += tensor * (1 + STREAMS) * DIMS
        vectors = vectors & (tl.load(layouts) == 0)
    if vectors:
        update_elements(
            bases, begin, numel, layouts, scalars, grad_multiplier,
            UPDATE, DTYPES, COMPUTE, TILE, VECTOR, 0,
        )  # fmt: skip
    else:
        for part in range(0, TILE, PART):
            update_elements(
                bases, begin + part, numel, layouts, scalars, grad_multiplier,
                UPDATE, DTYPES, COMPUTE, PART, 1, DIMS,
            )  # fmt: skip
