"""Where classifiers look: Grad-CAM heat maps (Selvaraju et al., ICCV 2017), as sheets and against true digit masks."""
import torch
import torch.nn.functional as F
import torchvision

from data.imagenet import Images, batches, normalized, transform
from data.mnist import to_float
from data.robustness import HEADS
from data.runs import save_png, tile_sheet


def as_map(activation):
    """(N, C, H, W) as it is; tokens (N, 1 + S * S, C), class token first, as (N, C, S, S); None for what has no places."""
    if not isinstance(activation, torch.Tensor) or activation.ndim not in (3, 4):
        return None
    if activation.ndim == 3:
        side = round((activation.shape[1] - 1) ** 0.5)
        if side * side != activation.shape[1] - 1:
            return None
        activation = activation[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    return activation if activation.shape[2] * activation.shape[3] > 1 else None


def heat_maps(model, images, scores=None):
    """Grad-CAM of each head's own answer, at the last activation with places that the answer depends on.

    images: (N, 3, H, W), as `model` wants them. scores: from images to logits (N, heads, classes) or (N, classes), if
    calling the model does not give them. Returns maps (N, heads, H, W) from 0 to 1, their maximum, and answers (N, heads).
    """
    activations = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: activations.append(output))
             for module in model.modules()]
    model.eval()
    try:
        with torch.enable_grad():
            logits = (scores or model.forward)(images.detach().requires_grad_()).float()     # not as compiled
    finally:
        for hook in hooks:
            hook.remove()
    best, maps = (logits if logits.ndim == 3 else logits[:, None]).max(2), []
    candidates = [activation for activation in activations if as_map(activation) is not None]
    for score in best.values.sum(0):
        for activation in reversed(candidates):            # a transformer's last ones only matter in the class token
            gradient, = torch.autograd.grad(score, activation, retain_graph=True, allow_unused=True)
            if gradient is not None and as_map(gradient).any():
                weight = as_map(gradient).mean((2, 3), keepdim=True)
                maps.append((weight * as_map(activation)).sum(1, keepdim=True).relu().detach().float())
                break
        else:
            maps.append(images.new_zeros(len(images), 1, 2, 2))
    maps = torch.cat([F.interpolate(heat, images.shape[2:], mode="bilinear") for heat in maps], 1)
    return maps / maps.amax((2, 3), keepdim=True).clamp_min(1e-12), best.indices


def intersection_over_union(maps, masks, threshold=0.5):
    """Of the pixels where the heat exceeds the threshold, and a mask: maps (N, H, W), masks (N, H, W) bool -> (N,)."""
    hot = maps > threshold
    return (hot & masks).sum((1, 2)) / (hot | masks).sum((1, 2)).clamp_min(1)


def overlay(images, maps):
    """Images (N, 3, H, W) in [0, 1] under heat maps (N, H, W) from blue over green to red."""
    centers = torch.tensor([0.75, 0.5, 0.25], device=maps.device).view(3, 1, 1)
    colors = (1.5 - 4 * (maps[:, None] - centers).abs()).clamp(0, 1)
    return 0.5 * images.mean(1, keepdim=True) + 0.5 * colors


def explain_digits(classifier, images, digits, labels, count, path):
    """A sheet of the first `count` images, and numbers over all of them.

    images: uint8 (n, 3, 32, 32). digits: their shapes, uint8 (n, 1, 32, 32); a pixel belongs to the digit above a tenth
    of the maximum. Returns the mean intersection over union of heat map and digit in percent, and, to compare, of the
    whole image.
    """
    masks = digits[:, 0] > 0.1 * digits.max()
    found = [heat_maps(classifier, to_float(part), lambda x: classifier.cls(classifier.model(x).flatten(1)))
             for part in images.split(500)]
    maps, answers = (torch.cat(column)[:, 0] for column in zip(*found))
    shown = images[:count] / 255
    columns = [shown, masks[:count, None].float().expand_as(shown), overlay(shown, maps[:count])]
    titles = [f"{label} seen as {answer}" for label, answer in zip(labels[:count].tolist(), answers.tolist())]
    save_png(path, tile_sheet(torch.stack(columns, 1), ["image", "digit", "heat map"], titles))
    return {name: 100 * intersection_over_union(heat, masks).mean().item()
            for name, heat in (("heat map IoU", maps), ("whole image IoU", torch.ones_like(maps)))}


def explain_imagenet(ensemble, tests, args, device, path):
    """A sheet of --explain images, half of them counterfactuals if there are any, with heat maps of the three heads."""
    names = [name for name, (kind, _) in tests.items() if kind in ("counterfactual", "val", "ood")][:2]
    rows, titles = [], []
    for number, name in enumerate(names):
        paths, labels = tests[name][1]
        wanted = min(len(paths), (args.explain + number) // len(names))
        chosen = torch.linspace(0, len(paths) - 1, wanted).long().tolist()
        images = Images(paths, labels, transform(False, args.image_size))
        for pixels, truths in batches(images, chosen, args.batch_size, 0, device):
            maps, answers = heat_maps(ensemble, normalized(pixels))
            shown = pixels / 255
            rows += torch.stack([shown, *(overlay(shown, heat) for heat in maps.unbind(1))], 1)
            for truth, answer in zip(truths.tolist(), answers.tolist()):
                titles.append("\n".join(f"{head}: {short(a)}" for head, a in zip(HEADS, answer))
                              + f"\n\nis {' / '.join(map(short, truth)) if isinstance(truth, list) else short(truth)}")
    save_png(path, tile_sheet(torch.stack(rows), ["image", *HEADS], titles, scale=1))


def short(number):
    return torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"][number][:24]
