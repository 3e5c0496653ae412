"""The tiling of the patch images as a Triton kernel: only the windows drawn are read.

Any strides, float32, float16 and bfloat16. This file needs only torch and triton and can be copied
alone.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # pixels of a program


@triton.jit
def gather_kernel(
    image,  # (N, 3, H, W)
    corners,  # int64 (N, GRID^2)
    out,  # out: (N, 3, GRID * PATCH, GRID * PATCH), contiguous
    corner_width,  # windows along a row of the image
    image_n, image_c, image_h, image_w,  # strides in elements
    PATCH: tl.constexpr, GRID: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tile GRID x GRID windows of each image. A program writes BLOCK pixels of one image."""
    side: tl.constexpr = GRID * PATCH
    blocks: tl.constexpr = (side * side + BLOCK - 1) // BLOCK
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pixel = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < side * side

    # Where the pixel lies in the tiling, and which corner its window has in the image.
    y = pixel // side
    x = pixel % side
    window = corners + n * GRID * GRID + y // PATCH * GRID + x // PATCH
    corner = tl.load(window, mask=inside, other=0)

    # Where it comes from.
    y = corner // corner_width + y % PATCH
    x = corner % corner_width + x % PATCH
    image += n * image_n + y * image_h + x * image_w
    for c in tl.static_range(3):
        place = out + (n * 3 + c) * side * side + pixel
        tl.store(place, tl.load(image, mask=inside, other=0.0), mask=inside)
        image += image_c


def on_device(x):
    """Make x's device the current one, on which Triton launches; no change for a CPU tensor."""
    return torch.cuda.device(x.device if x.is_cuda else -1)


@torch.library.custom_op("cgn::gather_patches", mutates_args=())
def gather_patches(
    image: torch.Tensor, corners: torch.Tensor, patch_size: int, grid: int
) -> torch.Tensor:
    """Tile grid x grid windows of each image, row by row; no gradient.

    image: (N, 3, H, W). corners: int64 (N, grid^2), contiguous, y * (W - patch_size + 1) + x of
    each window's upper left pixel. Returns (N, 3, grid * patch_size, grid * patch_size).
    """
    side = grid * patch_size
    out = image.new_empty(len(image), 3, side, side)
    programs = len(image) * triton.cdiv(side * side, BLOCK)
    corner_width = image.shape[3] - patch_size + 1
    with on_device(image):
        gather_kernel[(programs,)](
            image, corners, out,
            corner_width,
            *image.stride(),
            PATCH=patch_size, GRID=grid, BLOCK=BLOCK,
        )  # fmt: skip
    return out


@gather_patches.register_fake
def gather_patches_outputs(image, corners, patch_size, grid):
    """Return the output of gather_patches, not filled."""
    side = grid * patch_size
    return image.new_empty(len(image), 3, side, side)
