"""The style loss of one layer as Triton kernels.

    style_loss = mean |F F^T - T T^T| / (C H W)    F, T: features and target features, (N, C, H W)

Both products are summed into one accumulator, for tiles on and above the diagonal, so the Gram
matrix of neither side is ever in memory. Backward needs only the signs of the difference, kept as
int8: it is one product, sign matrix times features. Sums are float32 in a fixed order, so that
every run gives the same bits; tuning changes warps and stages, never the order.

Any sizes and strides; float32, float16 and bfloat16. This file needs only torch and triton and can
be copied alone.
"""

import torch
import triton
import triton.language as tl

WORKSPACE = 64 * 2**20  # bytes at most for partial sums, where programs share the positions
TUNED_SIZE = 2**22  # elements of features from which on a choice of configuration pays
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CONFIGS = [
    triton.Config({}, num_warps=8, num_stages=3),
    triton.Config({}, num_warps=4, num_stages=3),
    triton.Config({}, num_warps=8, num_stages=4),
]


def configs_to_try(configs, arguments, **_):
    """Of small features, the first: compiling the others takes seconds, and gains nothing."""
    images_and_positions = arguments["positions_class"] // 2
    large = arguments["channels"] * images_and_positions >= TUNED_SIZE
    return configs if large else configs[:1]


def tuned(kernel):
    """Let Triton choose warps and stages on first use of a shape and keep the choice on disk.

    The interpreter takes the first configuration.
    """
    configs = CONFIGS
    if not isinstance(kernel, triton.runtime.JITFunction):
        configs = CONFIGS[:1]
    key = ["channels", "positions_class"]
    prune = {"early_config_prune": configs_to_try}
    return triton.autotune(configs, key=key, prune_configs_by=prune, cache_results=True)(kernel)


# --------------------------------------------------------------------------------------------------
# Kernels. A position is a pixel of a feature map, there are H W of them. A name such as features_n,
# features_c, features_p is the stride of `features` from one image, channel or position to the
# next, in elements. positions_class only tells autotune which sizes to tune together.


@triton.jit
def upper_tile(index, tiles):
    """Row and column of the index-th tile on or above the diagonal of tiles x tiles, by rows."""
    row = index * 0
    width = row + tiles
    while index >= width:
        index -= width
        width -= 1
        row += 1
    return row, row + index


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        # Triton's interpreter would multiply the bits as integers.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def add_products(
    total,  # (rows, columns)
    features,  # one image: (C, H W)
    rows, columns,
    channels, positions,
    first, last,
    stride_c, stride_p,
    BLOCK_P: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total + F[rows] F[columns]^T over the positions from first to last.

    ONE_TILE: there are no other rows and columns, so that both are the same and are loaded once.
    """
    for start in range(first, last, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        valid = position < positions
        a = tl.load(
            features + rows[:, None] * stride_c + position[None, :] * stride_p,
            mask=(rows < channels)[:, None] & valid[None, :],
            other=0.0,
        )  # (rows, BLOCK_P)
        if ONE_TILE:
            b = tl.trans(a)
        else:
            b = tl.load(
                features + columns[None, :] * stride_c + position[:, None] * stride_p,
                mask=(columns < channels)[None, :] & valid[:, None],
                other=0.0,
            )  # (BLOCK_P, columns)
        total = multiply(a, b, total, PRECISION)
    return total


@tuned
@triton.jit
def difference_kernel(
    features,  # (N, C, H W)
    target,  # (N, C, H W) or None
    sums,  # out: float32 (splits, N, C, C)
    channels, positions, positions_class,
    splits, chunk,  # `splits` programs share the positions of a tile, `chunk` for each
    features_n, features_c, features_p,
    target_n, target_c, target_p,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write F F^T - T T^T over each chunk of positions, tiles on and above the diagonal."""
    tiles = tl.cdiv(channels, BLOCK_C)
    upper = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    # Neighboring programs work on the tiles of one chunk, which is in the cache by then.
    row, column = upper_tile(program % upper, tiles)
    split = program // upper % splits
    image = (program // upper // splits).to(tl.int64)
    rows = (row * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    columns = (column * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    first = split.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, positions)

    total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if target is not None:
        total = -add_products(
            total, target + image * target_n, rows, columns, channels, positions, first, last,
            target_c, target_p, BLOCK_P, ONE_TILE, PRECISION,
        )  # fmt: skip
    total = add_products(
        total, features + image * features_n, rows, columns, channels, positions, first, last,
        features_c, features_p, BLOCK_P, ONE_TILE, PRECISION,
    )  # fmt: skip

    images = tl.num_programs(0) // upper // splits
    matrix = sums + (split * images + image) * channels * channels
    place = matrix + rows[:, None] * channels + columns[None, :]
    tl.store(place, total, mask=(rows < channels)[:, None] & (columns < channels)[None, :])


@triton.jit
def absolute_kernel(
    sums,  # float32 (splits, N, C, C)
    gram,  # (N, C, C): Gram matrix of the target, or None if sums already hold the difference
    signs,  # out: int8 (N, C, C)
    partial,  # out: float32, one number for each program
    channels, splits,
    scale,  # 1 / (C H W)
    weight,  # 1 / (N C C)
    TILE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the splits; write the signs of the difference and a weighted sum of absolutes."""
    tiles = tl.cdiv(channels, TILE)
    upper = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    row, column = upper_tile(program % upper, tiles)
    image = (program // upper).to(tl.int64)
    images = (tl.num_programs(0) // upper).to(tl.int64)
    rows = (row * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    columns = (column * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    valid = (rows <= columns) & (columns < channels)
    place = image * channels * channels + rows * channels + columns

    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, splits, SPLITS):
        split = (start + tl.arange(0, SPLITS))[:, None, None]
        part = tl.load(
            sums + split * (images * channels * channels) + place[None],
            mask=valid[None] & (split < splits),
            other=0.0,
        )  # (SPLITS, TILE, TILE)
        total += tl.sum(part, 0)
    difference = total * scale
    if gram is not None:
        difference -= tl.load(gram + place, mask=valid, other=0.0).to(tl.float32)

    count = tl.where(rows == columns, 1.0, 2.0)  # an element above the diagonal stands for two
    tl.store(partial + program, tl.sum(tl.where(valid, tl.abs(difference) * count, 0.0)) * weight)

    sign = ((difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)).to(tl.int8)
    tl.store(signs + place, sign, mask=valid)
    mirrored = signs + image * channels * channels + tl.trans(columns) * channels + tl.trans(rows)
    tl.store(mirrored, tl.trans(sign), mask=tl.trans(valid))


@tuned
@triton.jit
def style_backward_kernel(
    signs,  # int8 (N, C, C)
    features,  # (N, C, H W)
    out,  # out: (N, C, H W)
    grad,  # scalar
    channels, positions, positions_class,
    scale,
    features_n, features_c, features_p,
    out_n, out_c, out_p,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = grad * scale * signs @ F.

    The derivative is a sum of two products, one for each F in F F^T. They are equal, because the
    sign matrix is symmetric, and `scale` holds the factor of 2.
    """
    row_tiles = tl.cdiv(channels, BLOCK_C)
    position_tiles = tl.cdiv(positions, BLOCK_P)
    program = tl.program_id(0)
    image = (program // row_tiles // position_tiles).to(tl.int64)
    rows = (program % row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    position_tile = (program // row_tiles % position_tiles).to(tl.int64)
    position = position_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = position < positions

    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        sign = tl.load(
            signs + (image * channels + rows[:, None]) * channels + k[None, :],
            mask=(rows < channels)[:, None] & (k < channels)[None, :],
            other=0,
        )  # (BLOCK_C, BLOCK_K)
        f = tl.load(
            features
            + image * features_n
            + k[:, None] * features_c
            + position[None, :] * features_p,
            mask=(k < channels)[:, None] & valid[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_P)
        total = multiply(sign.to(tl.float32).to(f.dtype), f, total, PRECISION)
    total *= tl.load(grad) * scale
    inside = (rows < channels)[:, None] & valid[None, :]
    place = out + image * out_n + rows[:, None] * out_c + position[None, :] * out_p
    tl.store(place, total, mask=inside)


# --------------------------------------------------------------------------------------------------
# Launching


def on_device(x):
    """Make x's device the current one, on which Triton launches; no change for a CPU tensor."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def empty_like(x):
    """Return a tensor like x that is not filled: channels last if x is, else contiguous."""
    memory_format = torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.channels_last
    return torch.empty_like(x, memory_format=memory_format)


def block_sizes(features, target=None):
    """Side of a tile, and terms of its sums taken at a time: what fits into registers.

    float32 gets smaller ones, because its products are made of three. target: the other features
    of the product, if there are any.
    """
    side = 64
    terms = 16
    if features.element_size() == 2 and (target is None or target.element_size() == 2):
        side = 128
        terms = 64
    channels = features.shape[1]
    side = min(side, triton.next_power_of_2(channels))
    return max(16, side), terms


def dot_precision():
    """Products as exact as float32, unless torch.set_float32_matmul_precision allows TF32."""
    try:
        exact = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # where a program uses PyTorch's newer switch
        exact = torch.backends.cuda.matmul.fp32_precision != "tf32"
    return "tf32x3" if exact else "tf32"


def tuning_class(features):
    """Sizes of one class are tuned together: about as many positions in all, in one layout."""
    images, _, positions = features.shape
    channels_last = features.stride(1) == 1
    return 2 * triton.next_power_of_2(images * positions) + channels_last


def multiplies_from_shared_memory(x):
    """Whether one block in shared memory may serve as both factors of a product: on Hopper GPUs and
    later. Earlier ones would wait for each load instead of multiplying meanwhile.
    """
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


def split_positions(features, block_c, block_p):
    """Splits of H W, and positions in each: two programs for each processor, within WORKSPACE."""
    images, channels = features.shape[:2]
    positions = features[0, 0].numel()
    processors = 16
    if features.is_cuda:
        properties = torch.cuda.get_device_properties(features.device)
        processors = properties.multi_processor_count

    programs = count_upper_tiles(images, channels, block_c)
    wanted = 2 * processors // programs
    useful = triton.cdiv(positions, 256)
    affordable = WORKSPACE // (4 * images * channels * channels)
    splits = max(1, min(wanted, useful, affordable))

    chunk = triton.cdiv(positions, splits)
    chunk = triton.cdiv(chunk, block_p) * block_p  # whole blocks
    return triton.cdiv(positions, chunk), chunk


def count_upper_tiles(images, channels, side):
    """Tiles on and above the diagonals of all Gram matrices."""
    tiles = triton.cdiv(channels, side)
    return images * tiles * (tiles + 1) // 2


def launch_difference(features, target, sums, block_c, block_p, chunk):
    """Fill sums (splits, N, C, C). features: (N, C, H W); target: the same, or None."""
    images, channels, positions = features.shape
    splits = len(sums)
    programs = count_upper_tiles(images, channels, block_c) * splits
    target_strides = (0, 0, 0) if target is None else target.stride()
    with on_device(features):
        difference_kernel[(programs,)](
            features, target, sums,
            channels, positions, tuning_class(features),
            splits, chunk,
            *features.stride(),
            *target_strides,
            BLOCK_C=block_c, BLOCK_P=block_p,
            ONE_TILE=channels <= block_c and multiplies_from_shared_memory(features),
            PRECISION=dot_precision(),
        )  # fmt: skip


def launch_absolute(sums, gram, signs, positions):
    """Fill signs (N, C, C) and return the loss."""
    splits, images, channels, _ = sums.shape
    if splits == 1:  # few bytes to add up
        tile = 64
        together = 1
    else:
        tile = 16
        together = 8
    programs = count_upper_tiles(images, channels, tile)
    partial = sums.new_empty(programs)
    with on_device(sums):
        absolute_kernel[(programs,)](
            sums, gram, signs, partial,
            channels, splits,
            1 / (channels * positions),
            1 / signs.numel(),
            TILE=tile, SPLITS=together,
        )  # fmt: skip
    return partial.sum()


# --------------------------------------------------------------------------------------------------
# The operators that torch.compile and autograd see

Tensor = torch.Tensor


@torch.library.custom_op("cgn::style_forward", mutates_args=())
def style_forward(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, and the signs (N, C, C) of the difference.

    target: features (N, C, H, W), or a Gram matrix (N, C, C).
    """
    gram = None
    other = None
    if target.ndim == 3:
        gram = target.contiguous()
    else:
        other = target.flatten(2)
    flat = features.flatten(2)
    images, channels, positions = flat.shape
    block_c, block_p = block_sizes(features, other)
    splits, chunk = split_positions(features, block_c, block_p)
    sums = features.new_empty(splits, images, channels, channels, dtype=torch.float32)
    signs = features.new_empty(images, channels, channels, dtype=torch.int8)
    launch_difference(flat, other, sums, block_c, block_p, chunk)
    loss = launch_absolute(sums, gram, signs, positions)
    return loss, signs


@style_forward.register_fake
def style_forward_outputs(features, target):
    """Return the outputs of style_forward, not filled."""
    images, channels = features.shape[:2]
    loss = features.new_empty((), dtype=torch.float32)
    signs = features.new_empty(images, channels, channels, dtype=torch.int8)
    return loss, signs


@torch.library.custom_op("cgn::style_backward", mutates_args=())
def style_backward(signs: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of the loss with respect to features, in their dtype."""
    out = empty_like(features)
    flat = features.flatten(2)
    flat_out = out.flatten(2)  # a view
    images, channels, positions = flat.shape
    block_c, block_k = block_sizes(features)
    block_p = 128
    programs = images * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_p)
    scale = 2 / (channels * positions * signs.numel())
    with on_device(features):
        style_backward_kernel[(programs,)](
            signs, flat, flat_out, grad,
            channels, positions, tuning_class(flat),
            scale,
            *flat.stride(),
            *flat_out.stride(),
            BLOCK_C=block_c, BLOCK_K=min(block_k, block_c), BLOCK_P=block_p,
            PRECISION=dot_precision(),
        )  # fmt: skip
    return out


@style_backward.register_fake
def style_backward_outputs(signs, features, grad):
    """Return the output of style_backward, not filled."""
    return empty_like(features)


def save_style(ctx, inputs, output):
    features, _ = inputs
    _, signs = output
    ctx.mark_non_differentiable(signs)
    ctx.save_for_backward(signs, features)


def style_gradients(ctx, grad, _):
    signs, features = ctx.saved_tensors
    return style_backward(signs, features, grad), None


style_forward.register_autograd(style_gradients, setup_context=save_style)


def fused_style_loss(features, target):
    """Return the mean absolute difference of the Gram matrices, a scalar in float32.

    features: (N, C, H, W) in float32, float16 or bfloat16. target: features of the same shape, or a
    Gram matrix (N, C, C). The target gets no gradient, and there is no second derivative.
    """
    loss, _ = style_forward(features, target.detach())
    return loss
