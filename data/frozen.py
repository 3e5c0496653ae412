"""The frozen pretrained networks: VGG-16's features for the style losses, U^2-Net for masks; folding of constants."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from kernels import normalize_weight

STYLE_CONVOLUTIONS = (2, 4, 7, 10)                         # relu1_2, relu2_2, relu3_3, relu4_3: VGG-16's n-th layers


class VGG16Features(nn.Module):
    """Frozen VGG-16 from a `features.*` state dict, only as deep as the state dict goes."""

    def __init__(self, state):
        super().__init__()
        weights = [value for key, value in state.items() if key.endswith("weight")]
        self.convolutions = nn.ModuleList(nn.Conv2d(w.shape[1], w.shape[0], 3, padding=1) for w in weights)
        for convolution, (weight, bias) in zip(self.convolutions, zip(*[iter(state.values())] * 2)):
            convolution.weight.data, convolution.bias.data = weight, bias
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, image):
        """image: (N, 3, H, W) in [-1, 1]. Returns the features before each max-pool, in the weights' dtype."""
        x, features = image.to(self.convolutions[0].weight.dtype, memory_format=torch.channels_last), []
        for number, convolution in enumerate(self.convolutions, 1):
            x = F.relu_(convolution(x))
            if number in STYLE_CONVOLUTIONS:
                features.append(x)
                x = F.max_pool2d(x, 2) if number < len(self.convolutions) else x
        return features


class ConvNormReLU(nn.Module):
    def __init__(self, inputs, outputs, dilation=1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(inputs, outputs, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(outputs)

    def forward(self, x):
        return F.relu_(self.bn_s1(self.conv_s1(x)))


def resize_like(x, other):
    size = other.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=True)


class RSU(nn.Module):
    """Residual U-block of U^2-Net: a U-Net of `depth` levels around the features of its first convolution.

    dilated: dilations 1, 2, 4, ... instead of pooling (RSU-4F).
    """

    def __init__(self, inputs, middle, outputs, depth, dilated):
        super().__init__()
        self.depth, self.dilated = depth, dilated
        dilation = [2 ** i if dilated else 1 for i in range(depth - 1)] + [2 ** (depth - 1) if dilated else 2]
        self.rebnconvin = ConvNormReLU(inputs, outputs)
        for i in range(depth):
            self.add_module(f"rebnconv{i + 1}", ConvNormReLU(middle if i else outputs, middle, dilation[i]))
        for i in reversed(range(depth - 1)):
            self.add_module(f"rebnconv{i + 1}d", ConvNormReLU(2 * middle, middle if i else outputs, dilation[i]))

    def forward(self, x):
        h = entry = self.rebnconvin(x)
        levels = []
        for i in range(1, self.depth):
            if levels and not self.dilated:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = getattr(self, f"rebnconv{i}")(h)
            levels.append(h)
        h = getattr(self, f"rebnconv{self.depth}")(h)
        for i in reversed(range(1, self.depth)):
            h = getattr(self, f"rebnconv{i}d")(torch.cat([resize_like(h, levels[i - 1]), levels[i - 1]], 1))
        return h + entry


class U2Net(nn.Module):
    """Saliency (Qin et al. 2020): (N, 3, H, W), here images in [-1, 1] as they are -> mask (N, 1, H, W) in (0, 1)."""

    def __init__(self, small=False):
        super().__init__()
        widths = [64] * 6 if small else [64, 128, 256, 512, 512, 512]                    # of the encoder's stages
        middles = [16] * 6 if small else [32, 32, 64, 128, 256, 256]
        decoder = [64] * 5 if small else [64, 64, 128, 256, 512]
        decoder_middles = [16] * 5 if small else [16, 32, 64, 128, 256]
        depths = [7, 6, 5, 4, 4, 4]
        for i in range(6):
            self.add_module(f"stage{i + 1}", RSU(widths[i - 1] if i else 3, middles[i], widths[i], depths[i], i >= 4))
        for i in reversed(range(5)):
            inputs = widths[i] + (decoder[i + 1] if i < 4 else widths[5])
            self.add_module(f"stage{i + 1}d", RSU(inputs, decoder_middles[i], decoder[i], depths[i], i >= 4))
        for i, channels in enumerate([*decoder, widths[5]]):
            self.add_module(f"side{i + 1}", nn.Conv2d(channels, 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x):
        stages, h = [], x
        for i in range(1, 7):
            h = getattr(self, f"stage{i}")(F.max_pool2d(h, 2, ceil_mode=True) if stages else h)
            stages.append(h)
        sides = [self.side6(h)]
        for i in range(5, 0, -1):
            h = getattr(self, f"stage{i}d")(torch.cat([resize_like(h, stages[i - 1]), stages[i - 1]], 1))
            sides.insert(0, getattr(self, f"side{i}")(h))
        return self.outconv(torch.cat([resize_like(side, sides[0]) for side in sides], 1)).float().sigmoid()


@torch.no_grad()
def fold(network, truncation=1.0):
    """Constants into weights, in place: spectral norms, BatchNorms, and conditional norms for this truncation."""
    for module in network.modules():
        if hasattr(module, "weight_orig"):
            normalize_weight(module)
            weight = module.__dict__.pop("weight")
            del module.weight_orig, module.weight_u, module.weight_v
            module._forward_pre_hooks.clear()
            module.weight = nn.Parameter(weight)
    for module in list(network.modules()):
        if hasattr(module, "running_means"):
            module.fold(truncation)
        elif isinstance(module, ConvNormReLU):
            module.conv_s1 = nn.utils.fuse_conv_bn_eval(module.conv_s1, module.bn_s1)
            module.bn_s1 = nn.Identity()
    return network.requires_grad_(False).to(memory_format=torch.channels_last)


@torch.no_grad()
def random_networks(make_biggan, small_u2net, seed=0):
    """State dicts of a BigGAN and a U^2-Net with random weights, and statistics that keep every layer's variance.

    make_biggan: a function that returns the BigGAN. The same seed gives the same weights.
    """
    def measure(module, inputs):
        x = inputs[0]
        mean, variance = ((module.running_mean, module.running_var) if isinstance(module, nn.BatchNorm2d)
                          else (module.running_means, module.running_vars))
        mean[:], variance[:] = x.mean((0, 2, 3)), x.var((2, 3)).mean(0)       # within images: they keep structure

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        biggan, u2net = make_biggan().eval(), U2Net(small_u2net).eval()
        hooks = [module.register_forward_pre_hook(measure) for network in (biggan, u2net)
                 for module in network.modules() if hasattr(module, "running_means") or hasattr(module, "running_mean")]
        biggan.generator.conv_to_rgb.bias.zero_()
        biggan.generator.bn.weight *= 0.01                 # far from the ends of tanh and sigmoid
        u2net.outconv.weight *= 0.01
        z, y = torch.randn(8, biggan.z_dim), torch.randint(biggan.embeddings.in_features, (8,))
        for _ in range(10):                                # power iterations, to know the singular values
            biggan.train()(z[:1], y[:1], 1.0)
        images = biggan.eval()(z, y, 1.0)
        biggan.generator.bn.weight /= images.atanh().std()
        logits = u2net(images / images.std()).logit()
        for hook in hooks:
            hook.remove()
        factor = 4 / logits.std()                          # decided, as a trained one is
        u2net.outconv.weight *= factor
        u2net.outconv.bias.copy_((u2net.outconv.bias - logits.mean()) * factor)
    return biggan.state_dict(), u2net.state_dict()
