"""The two methods that the paper compares with, for the digit classifiers: IRM and Learning Not to Learn.

Neither needs a generator. Both are told what the shortcut is, the colour: IRM by environments in which the colours are
shaken by different amounts, Learning Not to Learn by the colours themselves, which the features must not tell.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

BINS = 8                                                   # of each channel's mean colour


def shaken_colours(x, environments, generator):
    """Colours mixed at random within each image: not in environment 0, most in the last. The images are dealt out in turn.

    x: (N, 3, H, W) in [-1, 1]. Returns as many, and the environment of each, (N,). The random numbers come from a CPU
    generator, so that every device agrees.
    """
    environment = torch.arange(len(x)) % environments
    strength = 0.5 * environment / max(environments - 1, 1)
    mix = torch.eye(3) + strength[:, None, None] * torch.randn(len(x), 3, 3, generator=generator)
    mixed = torch.einsum("nij,njhw->nihw", mix.to(x.device), x / 2 + 0.5)
    return mixed.clamp(0, 1) * 2 - 1, environment.to(x.device)


def invariance_penalty(log_probabilities, y, environment, environments):
    """IRMv1 (Arjovsky et al. 2019): the squared derivative of each environment's loss by a factor of the logits, mean.

    log_probabilities: (N, 10). The derivative at factor 1 is the mean of sum_k p_k l_k - l_y, in closed form.
    """
    excess = (log_probabilities.exp() * log_probabilities).sum(1) - log_probabilities.gather(1, y[:, None])[:, 0]
    members = F.one_hot(environment, environments).to(excess.dtype)
    return ((excess @ members) / members.sum(0).clamp(min=1)).square().mean()


class ReverseGradient(torch.autograd.Function):
    """x as it is; its derivative times -weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.weight * gradient, None


class ColourHead(nn.Module):
    """Tells the mean colour of the image from features (N, 64, H, W): logits (N, BINS, 3)."""

    def __init__(self, channels=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                    nn.Linear(32, 3 * BINS), nn.Unflatten(1, (BINS, 3)))

    def loss(self, features, x, weight):
        """Learning Not to Learn (Kim et al. 2019): cross-entropy to train the head, reversed for the features.

        The features also raise the entropy of its answer. Colours are the ranks of the channels' means in the batch.
        """
        colours = x.mean((2, 3)).argsort(0).argsort(0) * BINS // len(x)
        logits = self.layers(ReverseGradient.apply(features, weight))
        answer = torch.func.functional_call(self.layers, {k: p.detach() for k, p in self.layers.named_parameters()}, features)
        negative_entropy = (answer.softmax(1) * answer.log_softmax(1)).sum(1).mean()
        return F.cross_entropy(logits, colours) + 0.1 * weight * negative_entropy
