"""The frozen pretrained networks and how weights are loaded: VGG-16's features, U^2-Net, checks.

VGG-16 gives the features of the style losses, U^2-Net (Qin et al. 2020) the masks of the ImageNet
CGN. No file is loaded in a way that could run code, and every name and shape is checked before any
of it is used. For VGG-16 there is a random stand-in, for use without a network connection.
"""

import collections
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import download, runs
from kernels import convolution_relu, enlarge, max_pool

# VGG-16: index in `features` -> output channels of its 3 x 3 convolutions.
VGG16_CONVOLUTIONS = {
    0: 64,
    2: 64,
    5: 128,
    7: 128,
    10: 256,
    12: 256,
    14: 256,
    17: 512,
    19: 512,
    21: 512,
    24: 512,
    26: 512,
    28: 512,
}
VGG16_POOLED = {2, 7, 14, 21, 28}  # those before a 2 x 2 max-pooling
STYLE_CONVOLUTIONS = (2, 4, 7, 10)  # the n-th ones, for the style losses: relu1_2, 2_2, 3_3, 4_3


# --------------------------------------------------------------------------------------------------
# State dicts


def strip_module_prefix(state, path):
    """A state dict without the `module.` that all its names begin with, if they do.

    UserError if what was loaded from `path` is no dict of names.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise runs.UserError(
            f"{path}: holds a {type(state).__name__}, not tensors by name; give another file"
        )
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return dict(state)


def check_state_dict(state, expected, path):
    """Check what a file held against what is needed, before any of it is used.

    state: what was loaded from `path`. expected: name -> tensor or shape, such as
    `module.state_dict()`. Returns `state` without a `module.` common to all names. Raises UserError
    that lists missing and unexpected names, values that are no (dense) tensors, wrong shapes,
    integers for floating-point numbers, NaN and infinite values.
    """
    state = strip_module_prefix(state, path)
    texts = []
    for kind, names in find_problems(state, expected).items():
        if names:
            more = ", ..." if len(names) > 4 else ""
            texts.append(f"{len(names)} {kind}: {', '.join(names[:4])}{more}")
    if texts:
        raise runs.UserError(
            f"{path}: not the weights needed here ({'; '.join(texts)}); give another file"
        )
    return state


def find_problems(state, expected):
    """Kind of problem -> names in a state dict, or expected ones, that have it."""
    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "not a tensor": [],
        "of wrong shape": [],
        "not floating-point": [],
        "not finite": [],
    }
    for name, want in expected.items():
        if name not in state:
            continue
        value = state[name]
        shape = tuple(getattr(want, "shape", want))
        floating = isinstance(want, torch.Tensor) and want.is_floating_point()
        if not is_dense_tensor(value):
            problems["not a tensor"].append(name)
        elif tuple(value.shape) != shape:
            problems["of wrong shape"].append(f"{name} {tuple(value.shape)} instead of {shape}")
        elif floating and not value.is_floating_point():
            problems["not floating-point"].append(name)
        elif value.is_floating_point() and not value.float().isfinite().all():
            problems["not finite"].append(name)
    return problems


def is_dense_tensor(value):
    """Whether a value of a state dict is a tensor with all its numbers in memory."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def load_network(entry, folder, path, expected):
    """The state dict of a published network: of the file `path` if that is given, else of an entry
    of the table of downloads, fetched into `folder` if need be.

    expected: name -> tensor. Returns tensors on the CPU in its order and dtypes. UserError if the
    file cannot be had or does not fit.
    """
    path = path or download.find_or_download(entry, folder)
    state = check_state_dict(runs.load_tensors(path), expected, path)
    return {name: state[name].to(want.dtype) for name, want in expected.items()}


def load_into(module, state):
    """Load a state dict that was checked, as one of the version that the module itself would write:
    torchvision's mnasnet refuses one that tells none.
    """
    state = collections.OrderedDict(state)
    state._metadata = module.state_dict()._metadata
    module.load_state_dict(state)


def to_half(state):
    """A state dict with its floating-point tensors in half precision, as bundled files have it.

    UserError for numbers that are too large.
    """
    half = {}
    for name, value in state.items():
        half[name] = value.half() if value.is_floating_point() else value
        if not half[name].isfinite().all():
            raise runs.UserError(f"{name}: holds numbers too large for half precision")
    return half


# --------------------------------------------------------------------------------------------------
# VGG-16


class VGG16Features(nn.Module):
    """Frozen VGG-16 from a `features.*` state dict, only as deep as the state dict goes.

    Channels last is the faster memory format for convolutions, on GPUs and CPUs.
    """

    def __init__(self, state, memory_format=torch.channels_last):
        super().__init__()
        self.memory_format = memory_format
        self.kernels = "auto"  # backend of its kernel
        self.convolutions = nn.ModuleList()
        for name in state:
            if not name.endswith(".weight"):
                continue
            weight = state[name]
            convolution = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
            convolution.weight.data = weight
            convolution.bias.data = state[name.replace(".weight", ".bias")]
            self.convolutions.append(convolution)
        self.requires_grad_(False).to(memory_format=memory_format)

    def forward(self, image, layers=len(STYLE_CONVOLUTIONS)):
        """The features of the style losses, a list of (N, C, h, w) in the dtype of the weights.

        image: (N, 3, H, W) in [-1, 1]. layers: how many, from the first; no others are computed.
        """
        dtype = self.convolutions[0].weight.dtype
        x = image.to(dtype, memory_format=self.memory_format)
        features = []
        for number, convolution in enumerate(self.convolutions, 1):
            x, feature = convolution_relu(x, convolution, backend=self.kernels)
            if number not in STYLE_CONVOLUTIONS:
                continue
            features.append(feature)
            if len(features) == layers:
                break
            if number < len(self.convolutions):
                x = max_pool(x, backend=self.kernels)
        return features


def vgg16_blank(number_of_convolutions):
    """Name -> tensor without memory (device "meta") of VGG-16's first 1 to 13 convolutions.

    Names and layout are torchvision's: `features.0.weight`, `features.0.bias`, ...
    """
    if not 1 <= number_of_convolutions <= len(VGG16_CONVOLUTIONS):
        raise runs.UserError(
            f"VGG-16 has 1 to {len(VGG16_CONVOLUTIONS)} convolutions to choose, "
            f"not {number_of_convolutions}"
        )
    blank = {}
    channels = 3
    for index, width in list(VGG16_CONVOLUTIONS.items())[:number_of_convolutions]:
        blank[f"features.{index}.weight"] = torch.empty(width, channels, 3, 3, device="meta")
        blank[f"features.{index}.bias"] = torch.empty(width, device="meta")
        channels = width
    return blank


def load_vgg16_features(weights_dir, number_of_convolutions):
    """The first convolutions (1 to 13) of the pretrained VGG-16, downloaded if need be.

    weights_dir: the folder of the weights, or the path of a file. Returns name -> float32 tensor on
    the CPU, named as in torchvision. The rest of the file is neither read nor checked, but names
    that VGG-16 does not have are an error. Raises UserError.
    """
    needed = vgg16_blank(number_of_convolutions)
    path = Path(weights_dir)
    # A missing .pth is a slip, not a folder to be made.
    if not path.is_file() and path.suffix != ".pth":
        path = download.find_or_download(download.FILES["vgg16"], path)
    state = strip_module_prefix(runs.load_tensors(path), path)
    unneeded = vgg16_blank(len(VGG16_CONVOLUTIONS)).keys() - needed.keys()
    for index in (0, 3, 6):
        unneeded |= {f"classifier.{index}.weight", f"classifier.{index}.bias"}
    # Names that VGG-16 does not have stay, and are refused below.
    state = {name: value for name, value in state.items() if name not in unneeded}
    state = check_state_dict(state, needed, path)
    # Cloned out of the memory map: the tensors outlive the file, which may be replaced or deleted.
    return {
        name: state[name].detach().float().clone(memory_format=torch.contiguous_format)
        for name in needed
    }


@torch.no_grad()
def random_vgg16_features(number_of_convolutions, seed=0):
    """The offline stand-in for `load_vgg16_features`: random filters, zero biases, the same names.

    Every layer is scaled to a mean activation of 1 after its ReLU on seeded pictures in [-1, 1].
    The same seed gives the same weights, whatever the global random state.
    """
    generator = torch.Generator().manual_seed(seed)
    x = blob_pictures(generator)
    state = {}
    for name, blank in vgg16_blank(number_of_convolutions).items():
        if name.endswith("bias"):
            state[name] = torch.zeros(blank.shape)
            continue
        # He's normal filters (their scale is set below); orthogonal ones spread the features no
        # better and take longer. What does help is to take away each filter's mean: what comes out
        # of a ReLU has a large common part that drowns the rest (cosine of two pictures' features
        # after 10 layers: 0.96 with it, 0.67 without). The first layer has no ReLU before it and
        # keeps the means, so that brightness counts.
        weight = torch.randn(blank.shape, generator=generator)
        if state:
            weight -= weight.mean((1, 2, 3), keepdim=True)
        x = F.conv2d(x, weight, padding=1).relu_()
        scale = x.mean()
        x /= scale
        state[name] = weight.div_(scale)
        index = int(name.split(".")[1])
        if index in VGG16_POOLED:
            x = F.max_pool2d(x, 2)
    return state


def blob_pictures(generator, count=16, side=32):
    """Pictures (count, 3, side, side) in [-1, 1]: four soft colored blobs each, on black (-1)."""
    line = torch.linspace(0, 1, side)
    x, y, radius = torch.rand(3, count, 4, 1, 1, generator=generator)
    distance = (line - x) ** 2 + (line[:, None] - y) ** 2
    blobs = torch.exp(-distance / (0.05 + 0.2 * radius) ** 2)  # (count, 4, side, side)
    colors = torch.rand(count, 4, 3, generator=generator)
    return torch.einsum("nbc,nbhw->nchw", colors, blobs).clamp(max=1) * 2 - 1


# --------------------------------------------------------------------------------------------------
# U^2-Net. Attributes have the names of the published state dicts.


class ConvNormReLU(nn.Module):
    """3 x 3 convolution, BatchNorm and ReLU. With the norm folded into the convolution, frozen.

    Returns the result twice, for two users of it, see convolution_relu.
    """

    def __init__(self, inputs, outputs, dilation=1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(outputs)
        self.kernels = "auto"  # backend of its kernel

    def forward(self, x):
        if isinstance(self.bn_s1, nn.Identity):
            return convolution_relu(x, self.conv_s1, backend=self.kernels)
        y = F.relu_(self.bn_s1(self.conv_s1(x)))
        return y, y


class RSU(nn.Module):
    """Residual U-block of U^2-Net: a U-Net of `depth` levels behind a first convolution, added to
    that convolution's features.

    dilated: dilations 1, 2, 4, ... instead of pooling (RSU-4F).
    """

    def __init__(self, inputs, middle, outputs, depth, dilated):
        super().__init__()
        self.depth = depth
        self.dilated = dilated
        self.kernels = "auto"  # backend of its pooling and enlargement
        if dilated:
            dilations = [2**level for level in range(depth)]
        else:
            dilations = [1] * (depth - 1) + [2]
        self.rebnconvin = ConvNormReLU(inputs, outputs)
        for i in range(depth):
            layer = ConvNormReLU(middle if i else outputs, middle, dilations[i])
            self.add_module(f"rebnconv{i + 1}", layer)
        for i in reversed(range(depth - 1)):
            layer = ConvNormReLU(2 * middle, middle if i else outputs, dilations[i])
            self.add_module(f"rebnconv{i + 1}d", layer)

    def forward(self, x):
        h, entry = self.rebnconvin(x)
        levels = []
        for i in range(1, self.depth):
            if levels and not self.dilated:
                h = max_pool(h, ceil_mode=True, backend=self.kernels)
            h, level = getattr(self, f"rebnconv{i}")(h)
            levels.append(level)
        h, _ = getattr(self, f"rebnconv{self.depth}")(h)
        for i in reversed(range(1, self.depth)):
            h = enlarge(h, levels[i - 1].shape[2:], backend=self.kernels)
            h, _ = getattr(self, f"rebnconv{i}d")(torch.cat([h, levels[i - 1]], 1))
        return h + entry


class U2Net(nn.Module):
    """The saliency network (Qin et al. 2020), or its small form, U^2-Net-p.

    (N, 3, H, W) -> mask (N, 1, H, W) in (0, 1). Images in [-1, 1] go in as they are, as in the
    published CGN code.
    """

    def __init__(self, small=False):
        super().__init__()
        self.kernels = "auto"  # backend of its pooling and enlargement
        depths = [7, 6, 5, 4, 4, 4]
        if small:
            encoder = [64] * 6  # output channels of the stages
            decoder = [64] * 5
            encoder_middles = [16] * 6  # channels within the stages
            decoder_middles = [16] * 5
        else:
            encoder = [64, 128, 256, 512, 512, 512]
            decoder = [64, 64, 128, 256, 512]
            encoder_middles = [32, 32, 64, 128, 256, 256]
            decoder_middles = [16, 32, 64, 128, 256]

        inputs = [3, *encoder[:5]]
        for i in range(6):
            stage = RSU(inputs[i], encoder_middles[i], encoder[i], depths[i], dilated=i >= 4)
            self.add_module(f"stage{i + 1}", stage)
        below = [*decoder[1:], encoder[5]]
        for i in reversed(range(5)):
            channels = encoder[i] + below[i]
            stage = RSU(channels, decoder_middles[i], decoder[i], depths[i], dilated=i >= 4)
            self.add_module(f"stage{i + 1}d", stage)
        for i, channels in enumerate([*decoder, encoder[5]]):
            self.add_module(f"side{i + 1}", nn.Conv2d(channels, 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        h = x
        stages = []
        for i in range(1, 7):
            if stages:
                h = max_pool(h, ceil_mode=True, backend=self.kernels)
            h = getattr(self, f"stage{i}")(h)
            stages.append(h)
        sides = [self.side6(h)]  # coarse masks, the finest first in the end
        for i in range(5, 0, -1):
            h = enlarge(h, stages[i - 1].shape[2:], backend=self.kernels)
            h = getattr(self, f"stage{i}d")(torch.cat([h, stages[i - 1]], 1))
            sides.insert(0, getattr(self, f"side{i}")(h))
        size = sides[0].shape[2:]
        masks = [enlarge(side, size, backend=self.kernels) for side in sides]
        return self.outconv(torch.cat(masks, 1)).float().sigmoid()
