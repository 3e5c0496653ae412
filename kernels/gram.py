"""Style loss of one layer and the patch sampler as Triton kernels. Needs torch and triton alone.

    style_loss = mean |F F^T - T T^T| / (C H W)        F, T: features and target features, (N, C, H W)

The sums of both products meet in one accumulator, for tiles on and above the diagonal; no Gram matrix of either side
is ever in memory. Backward needs the signs alone, kept as int8: it is one product, sign matrix times features.
Sums are float32 in a fixed order: the same bits in every run. Tuning changes warps and stages, never the order.
"""
import torch
import triton
import triton.language as tl

WORKSPACE = 64 * 2 ** 20               # bytes at most for the partial sums, where H W is split over programs
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
CONFIGS = [triton.Config({}, num_warps=warps, num_stages=stages) for warps, stages in ((8, 3), (4, 3), (8, 4))]


def tuned(kernel):
    """Choose warps and stages on first use of a shape, and keep the choice on disk; the interpreter takes the first."""
    configs = CONFIGS if isinstance(kernel, triton.runtime.JITFunction) else CONFIGS[:1]
    return triton.autotune(configs, key=["channels", "positions_class"], cache_results=True)(kernel)


@triton.jit
def upper_tile(index, tiles):
    """Row and column of the index-th tile on or above the diagonal of tiles x tiles, row by row."""
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
    if INTERPRETED and a.dtype == tl.bfloat16:             # Triton's interpreter would multiply the bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def add_products(total, features, rows, columns, channels, positions, first, last, stride_c, stride_p,
                 BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    """total + F[rows] F[columns]^T over the positions from first to last."""
    for start in range(first, last, BLOCK_P):
        position = start + tl.arange(0, BLOCK_P)
        valid = position < positions
        a = tl.load(features + rows[:, None] * stride_c + position[None, :] * stride_p,
                    mask=(rows < channels)[:, None] & valid[None, :], other=0.0)
        b = tl.load(features + columns[None, :] * stride_c + position[:, None] * stride_p,
                    mask=(columns < channels)[None, :] & valid[:, None], other=0.0)
        total = multiply(a, b, total, PRECISION)
    return total


@tuned
@triton.jit
def difference_kernel(features, target, sums, channels, positions, positions_class, splits, chunk,
                      features_n, features_c, features_p, target_n, target_c, target_p,
                      BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr):
    """sums (splits, N, C, C): F F^T - T T^T over each chunk of positions, tiles on and above the diagonal."""
    tiles = tl.cdiv(channels, BLOCK_C)
    upper = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    row, column = upper_tile(program % upper, tiles)       # programs of one chunk follow each other: it is in the cache
    split = program // upper % splits
    image = (program // upper // splits).to(tl.int64)
    rows = (row * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    columns = (column * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    first = split.to(tl.int64) * chunk
    last = tl.minimum(first + chunk, positions)
    total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    if target is not None:
        total = -add_products(total, target + image * target_n, rows, columns, channels, positions, first, last,
                              target_c, target_p, BLOCK_P, PRECISION)
    total = add_products(total, features + image * features_n, rows, columns, channels, positions, first, last,
                         features_c, features_p, BLOCK_P, PRECISION)
    images = tl.num_programs(0) // upper // splits
    place = sums + (split * images + image) * channels * channels + rows[:, None] * channels + columns[None, :]
    tl.store(place, total, mask=(rows < channels)[:, None] & (columns < channels)[None, :])


@triton.jit
def absolute_kernel(sums, gram, signs, partial, channels, splits, scale, weight,
                    TILE: tl.constexpr, SPLITS: tl.constexpr):
    """Adds up the splits; signs (N, C, C) int8 of the difference, and one weighted sum of absolute values a program.

    gram (N, C, C): the target's Gram matrix, if sums do not hold it yet. scale: 1 / (C H W). weight: 1 / (N C C).
    """
    tiles = tl.cdiv(channels, TILE)
    upper = tiles * (tiles + 1) // 2
    program = tl.program_id(0)
    row, column = upper_tile(program % upper, tiles)
    image, images = (program // upper).to(tl.int64), (tl.num_programs(0) // upper).to(tl.int64)
    rows = (row * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    columns = (column * TILE + tl.arange(0, TILE)).to(tl.int64)[None, :]
    valid = (rows <= columns) & (columns < channels)
    place = image * channels * channels + rows * channels + columns
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, splits, SPLITS):
        split = (start + tl.arange(0, SPLITS))[:, None, None]
        some = tl.load(sums + split * (images * channels * channels) + place[None], mask=valid[None] & (split < splits), other=0.0)
        total += tl.sum(some, 0)
    difference = total * scale
    if gram is not None:
        difference -= tl.load(gram + place, mask=valid, other=0.0).to(tl.float32)
    twice = tl.where(rows == columns, 1.0, 2.0)            # an element above the diagonal stands for two
    tl.store(partial + program, tl.sum(tl.where(valid, tl.abs(difference) * twice, 0.0)) * weight)
    sign = ((difference > 0).to(tl.int8) - (difference < 0).to(tl.int8)).to(tl.int8)
    tl.store(signs + place, sign, mask=valid)
    tl.store(signs + image * channels * channels + tl.trans(columns) * channels + tl.trans(rows), tl.trans(sign),
             mask=tl.trans(valid))


@tuned
@triton.jit
def style_backward_kernel(signs, features, out, grad, channels, positions, positions_class, scale,
                          features_n, features_c, features_p, out_n, out_c, out_p,
                          BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
                          PRECISION: tl.constexpr):
    """out = grad * scale * signs @ F. The sign matrix is symmetric, so that both halves of the derivative are this."""
    row_tiles, position_tiles = tl.cdiv(channels, BLOCK_C), tl.cdiv(positions, BLOCK_P)
    program = tl.program_id(0)
    image = (program // row_tiles // position_tiles).to(tl.int64)
    rows = (program % row_tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    position = (program // row_tiles % position_tiles).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    valid = position < positions
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_K):
        k = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        sign = tl.load(signs + (image * channels + rows[:, None]) * channels + k[None, :],
                       mask=(rows < channels)[:, None] & (k < channels)[None, :], other=0)
        f = tl.load(features + image * features_n + k[:, None] * features_c + position[None, :] * features_p,
                    mask=(k < channels)[:, None] & valid[None, :], other=0.0)
        total = multiply(sign.to(tl.float32).to(f.dtype), f, total, PRECISION)
    total *= tl.load(grad) * scale
    tl.store(out + image * out_n + rows[:, None] * out_c + position[None, :] * out_p, total,
             mask=(rows < channels)[:, None] & valid[None, :])


@triton.jit
def gather_kernel(image, corners, out, corner_width, image_n, image_c, image_h, image_w,
                  PATCH: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr):
    """Tiles GRID x GRID windows of each image into out. Arguments as in gather_patches."""
    side: tl.constexpr = GRID * PATCH
    blocks: tl.constexpr = (side * side + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < side * side
    y, x = pixel // side, pixel % side
    corner = tl.load(corners + n * GRID * GRID + y // PATCH * GRID + x // PATCH, mask=inside, other=0)
    y, x = corner // corner_width + y % PATCH, corner % corner_width + x % PATCH
    image += n * image_n + y * image_h + x * image_w
    for c in tl.static_range(3):
        tl.store(out + (n * 3 + c) * side * side + pixel, tl.load(image, mask=inside, other=0.0), mask=inside)
        image += image_c


# ---------------------------------------------------------------------------------------------------------------------
# Launching, and the operators that torch.compile and autograd see


def on_device(x):
    """Triton launches on the current device, which need not be that of x."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


def blocks(features):
    """Side of a tile, and terms of the sum at a time: what fits into registers. float32 takes three products."""
    side, terms = (128, 64) if features.element_size() == 2 else (64, 16)
    return max(16, min(side, triton.next_power_of_2(features.shape[1]))), terms


def precision(features):
    """float32 products as accurate as float32, unless torch.set_float32_matmul_precision asks for TF32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def positions_class(positions):
    """Sizes that are tuned together."""
    return triton.next_power_of_2(positions)


def split_positions(features, block_c, block_p):
    """Splits of H W and positions in each: two programs for each processor, within the workspace."""
    images, channels, positions = len(features), features.shape[1], features[0, 0].numel()
    tiles = triton.cdiv(channels, block_c)
    processors = torch.cuda.get_device_properties(features.device).multi_processor_count if features.is_cuda else 16
    programs = images * tiles * (tiles + 1) // 2
    most = WORKSPACE // (4 * images * channels * channels)
    splits = max(1, min(2 * processors // programs, triton.cdiv(positions, 256), most))
    chunk = triton.cdiv(triton.cdiv(positions, splits), block_p) * block_p
    return triton.cdiv(positions, chunk), chunk


Tensor = torch.Tensor


@torch.library.custom_op("cgn::style_forward", mutates_args=())
def style_forward(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and signs (N, C, C) of the difference. target: features, or a Gram matrix (N, C, C)."""
    flat = features.flatten(2)
    images, channels, positions = flat.shape
    gram, other = (target.contiguous(), None) if target.ndim == 3 else (None, target.flatten(2))
    block_c, block_p = blocks(features)
    splits, chunk = split_positions(features, block_c, block_p)
    tile, together = (64, 1) if splits == 1 else (16, 8)   # few bytes to add up, or many
    tiles = [triton.cdiv(channels, side) for side in (block_c, tile)]
    upper, programs = [images * n * (n + 1) // 2 for n in tiles]
    sums = features.new_empty(splits, images, channels, channels, dtype=torch.float32)
    partial = sums.new_empty(programs)
    signs = features.new_empty(images, channels, channels, dtype=torch.int8)
    with on_device(features):
        difference_kernel[(upper * splits,)](
            flat, other, sums, channels, positions, positions_class(positions), splits, chunk, *flat.stride(),
            *(other.stride() if other is not None else (0, 0, 0)), BLOCK_C=block_c, BLOCK_P=block_p,
            PRECISION=precision(features))
        absolute_kernel[(programs,)](sums, gram, signs, partial, channels, splits, 1 / (channels * positions),
                                     1 / signs.numel(), TILE=tile, SPLITS=together)
    return partial.sum(), signs


@style_forward.register_fake
def _(features, target):
    images, channels = features.shape[:2]
    return (features.new_empty((), dtype=torch.float32),
            features.new_empty(images, channels, channels, dtype=torch.int8))


def empty_like(features):
    """Not filled; contiguous, or channels last if features are."""
    last = features.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(features, memory_format=torch.channels_last if last else torch.contiguous_format)


@torch.library.custom_op("cgn::style_backward", mutates_args=())
def style_backward(signs: Tensor, features: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the loss with respect to features, in their dtype."""
    out = empty_like(features)
    flat, flat_out = features.flatten(2), out.flatten(2)
    images, channels, positions = flat.shape
    block_c, block_k = blocks(features)
    block_p = 128
    programs = images * triton.cdiv(channels, block_c) * triton.cdiv(positions, block_p)
    with on_device(features):
        style_backward_kernel[(programs,)](
            signs, flat, flat_out, grad, channels, positions, positions_class(positions),
            2 / (channels * positions * signs.numel()), *flat.stride(), *flat_out.stride(), BLOCK_C=block_c,
            BLOCK_K=min(block_k, block_c), BLOCK_P=block_p, PRECISION=precision(features))
    return out


style_backward.register_fake(lambda signs, features, grad: empty_like(features))


def keep_for_backward(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], inputs[0])


def backward(ctx, grad, _):
    return style_backward(*ctx.saved_tensors, grad), None


style_forward.register_autograd(backward, setup_context=keep_for_backward)


def style_loss(features, target):
    """Mean absolute difference of the Gram matrices of (N, C, H, W) features and of target features, or a Gram matrix
    (N, C, C). float32, float16 or bfloat16; the loss is float32. The target gets no gradient, and there is no second
    derivative.
    """
    return style_forward(features, target.detach())[0]


@torch.library.custom_op("cgn::gather_patches", mutates_args=())
def gather_patches(image: Tensor, corners: Tensor, patch_size: int, grid: int) -> Tensor:
    """Tiles grid x grid windows of each image (N, 3, H, W). corners (N, grid^2) int64: y * (W - patch_size + 1) + x.

    Returns (N, 3, grid * patch_size, grid * patch_size), row by row.
    """
    side, block = grid * patch_size, 1024
    out = image.new_empty(len(image), 3, side, side)
    with on_device(image):
        gather_kernel[(len(image) * triton.cdiv(side * side, block),)](
            image, corners, out, image.shape[3] - patch_size + 1, *image.stride(), PATCH=patch_size, GRID=grid,
            BLOCK=block)
    return out


@gather_patches.register_fake
def _(image, corners, patch_size, grid):
    return image.new_empty(len(image), 3, grid * patch_size, grid * patch_size)
