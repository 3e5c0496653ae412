"""Pictures to look at: contact sheets of the mechanisms, and heat maps of where classifiers look.

Heat maps are Grad-CAM's (Selvaraju et al., ICCV 2017), shown as sheets and measured against true
digit masks.
"""

import math
import unicodedata

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import pil_to_tensor

from data import imagenet, mnist, runs
from kernels import compose, shuffle_patches

# --------------------------------------------------------------------------------------------------
# Files and sheets


def save_picture(path, image):
    """Write a .png or .jpg, whole or not at all. image: uint8 (1 or 3, H, W)."""
    picture = to_pil(image)
    with runs.atomic(path) as temporary:
        if path.suffix.lower() == ".png":
            picture.save(temporary, format="PNG")
        else:
            picture.save(temporary, format="JPEG", quality=95)


def to_pil(image):
    """uint8 (1 or 3, H, W) -> PIL image."""
    pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().cpu().numpy())


def to_unit(image):
    """[-1, 1] -> [0, 1]."""
    return image / 2 + 0.5


def printable(names):
    """Names of classes in the letters that the font has: without accents; of a name in another
    script the number of its class.
    """
    shown = []
    for index, name in enumerate(names):
        name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        shown.append(name.strip() or str(index))
    return shown


def tile_sheet(images, column_titles=(), row_titles=(), scale=3, gap=2):
    """A labeled contact sheet.

    images: (rows, columns, 1 or 3, H, W) in [0, 1]. Titles are drawn above the columns and left of
    the rows. scale: pixels of the sheet for each pixel. gap: pixels between images. Returns uint8
    (3, height, width).
    """
    rows, columns, _, height, width = images.shape
    images = images.expand(rows, columns, 3, height, width)
    pixels = images.mul(255).round().clamp(0, 255)
    pixels = pixels.to(torch.uint8).cpu()
    pixels = pixels.repeat_interleave(scale, 3)
    pixels = pixels.repeat_interleave(scale, 4)
    height = height * scale + gap
    width = width * scale + gap
    left = gap
    top = gap
    if row_titles:
        lines = "\n".join(row_titles).split("\n")
        left = 8 + 7 * max(map(len, lines))
    if column_titles:
        top = 16

    size = (left + columns * width, top + rows * height)
    sheet = Image.new("RGB", size, "white")
    for row in range(rows):
        for column in range(columns):
            x = left + column * width
            y = top + row * height
            sheet.paste(to_pil(pixels[row, column]), (x, y))
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(column_titles):
        x = left + column * width + width // 2
        draw.text((x, top // 2), title, fill="black", anchor="mm")
    for row, title in enumerate(row_titles):
        y = top + row * height + height // 2
        draw.text((left - 5, y), title, fill="black", anchor="rm")
    return pil_to_tensor(sheet)


# --------------------------------------------------------------------------------------------------
# What the mechanisms make


MAX_ROWS = 20  # of a sheet whose rows are classes; of more, every second, third ... is shown


def shown_classes(cgn):
    """The classes that a sheet of a CGN shows, int64 (n,)."""
    classes = len(cgn.names)
    every = math.ceil(classes / MAX_ROWS)
    return torch.arange(0, classes, every, device=cgn.label_emb.weight.device)


def sheet_scale(size):
    """Pixels of a sheet for each pixel of an image of size x size."""
    return max(1, 96 // size)


@torch.no_grad()
def mechanism_sheet(cgn):
    """A sheet of an MNIST CGN. Rows are classes; for two latents: mask, foreground, background,
    composite, and a counterfactual.
    """
    generator = torch.Generator().manual_seed(0)  # the same latents each time: sheets compare
    y = shown_classes(cgn)
    device = y.device
    columns = []
    for shift in (3, 7):  # the counterfactual's textures are of any other class
        z = torch.randn(len(y), cgn.z_dim, generator=generator)
        offsets = torch.randint(cgn.size, (2, len(y), 2), generator=generator)
        offsets = offsets.to(device)
        mask, foreground, background = cgn(z.to(device), y)
        foreground = shuffle_patches(foreground, offsets[0])
        background = shuffle_patches(background, offsets[1])
        composite = compose(mask, foreground, background)
        other_foreground = foreground.roll(shift, 0)
        other_background = background.roll(2 * shift, 0)
        counterfactual = compose(mask, other_foreground, other_background)
        columns.append(as_rgb(mask))
        for image in (foreground, background, composite, counterfactual):
            columns.append(to_unit(image))
    images = torch.stack(columns, 1)
    titles = ["mask", "foreground", "background", "composite", "counterfact."]
    names = printable(cgn.names)
    rows = [names[label] for label in y.tolist()]
    return tile_sheet(images, 2 * titles, rows, sheet_scale(cgn.size))


@torch.no_grad()
def segmentation_sheet(cgn, images, masks, labels, count=4):
    """A sheet of the first `count` real images of each class, a row for each class: the image, the
    mask found in it, and a counterfactual of that mask.

    images: uint8 (n, 3, S, S). masks: uint8 (n, 1, S, S). labels: (n,).
    """
    device = labels.device
    generator = torch.Generator().manual_seed(0)
    y = shown_classes(cgn)
    chosen = first_of_classes(labels, y, count)
    columns = []
    for column in range(count):
        index = chosen[:, column]
        z = torch.randn(2, len(y), cgn.z_dim, generator=generator).to(device)
        offsets = torch.randint(cgn.size, (2, len(y), 2), generator=generator).to(device)
        foreground = cgn.foreground(z[0], (y + 3 + column) % len(cgn.names))
        background = cgn.background(z[1], (y + 6 + 3 * column) % len(cgn.names))
        foreground = shuffle_patches(foreground, offsets[0])
        background = shuffle_patches(background, offsets[1])
        mask = masks[index] / 255
        columns += [images[index] / 255, as_rgb(mask)]
        columns.append(to_unit(compose(mask, foreground, background)))
    titles = ["image", "mask", "counterfact."]
    names = printable(cgn.names)
    rows = [names[label] for label in y.tolist()]
    return tile_sheet(torch.stack(columns, 1), count * titles, rows, sheet_scale(cgn.size))


def first_of_classes(labels, y, count):
    """Indices (len(y), count) of the first images of each class in y; a class of fewer images has
    them again from the first, and one of none has some image.
    """
    rows = []
    for label in y:
        of_class = (labels == label).nonzero()[:, 0]
        if not len(of_class):
            of_class = labels.new_zeros(1)
        rows.append(of_class[torch.arange(count, device=labels.device) % len(of_class)])
    return torch.stack(rows)


@torch.no_grad()
def imagenet_mechanism_sheet(cgn, cgan, z, y):
    """A sheet of an ImageNet CGN. Rows are classes: premask, mask, foreground, background,
    composite, the cGAN's image, and a counterfactual.

    z: (N, z_dim), as the networks take it. y: classes (N,).
    """
    dtype = cgan.embeddings.weight.dtype
    with torch.autocast(z.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        outputs = cgn(z, y[:, None].expand(-1, 3))
        target = cgan(z.to(dtype), y)
    premask, mask, foreground, background, _ = outputs
    other_foreground = foreground.roll(1, 0)
    other_background = background.roll(2, 0)
    columns = {
        "premask": to_unit(premask),
        "mask": as_rgb(mask),
        "foreground": to_unit(foreground),
        "background": to_unit(background),
        "composite": to_unit(compose(mask, foreground, background)),
        "cGAN": to_unit(target),
        "counterfact.": to_unit(compose(mask, other_foreground, other_background)),
    }
    images = torch.stack(list(columns.values()), 1)
    rows = list(map(str, y.tolist()))
    return tile_sheet(images, list(columns), rows, scale=1)


def as_rgb(mask):
    """(N, 1, H, W) -> (N, 3, H, W)."""
    return mask.expand(-1, 3, -1, -1)


def counterfactual_sheet(mask, foreground, background, column_titles, row_titles):
    """One shape per row, one pair of textures per column. The left column shows the row's mask.

    mask: (rows, 1, S, S) in [0, 1]. foreground, background: (columns, 3, S, S) in [-1, 1].
    column_titles: of the pairs.
    """
    columns = [as_rgb(mask)]
    for one_foreground, one_background in zip(foreground, background):
        composite = compose(mask, one_foreground, one_background)
        columns.append(to_unit(composite))
    images = torch.stack(columns, 1)
    titles = ["mask", *column_titles]
    return tile_sheet(images, titles, row_titles, sheet_scale(mask.shape[-1]))


def interpolation_sheet(columns, row_titles):
    """The frames of an interpolation side by side, a row for each.

    columns: a list of frames (rows, 3, S, S) in [-1, 1].
    """
    images = torch.stack(columns, 1)
    return tile_sheet(to_unit(images), row_titles=row_titles, scale=sheet_scale(images.shape[-1]))


FACTOR_COLORS = {
    "shape": "#0072b2",
    "texture": "#e69f00",
    "background": "#009e73",
    "none": "#c8c8c8",
}


def factor_chart(bars):
    """Stacked bars of the shares of counterfactuals that a classifier calls by the class of their
    shape, texture, background, or by none of these.

    bars: name -> the four in percent. Returns uint8 (3, height, 640).
    """
    font = ImageFont.load_default(14)
    sheet = Image.new("RGB", (640, 50 + 34 * len(bars)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (factor, color) in enumerate(FACTOR_COLORS.items()):
        x = 180 + 110 * column
        draw.rectangle((x, 14, x + 12, 26), color)
        draw.text((x + 18, 20), factor, "black", font, anchor="lm")
    for row, (name, shares) in enumerate(bars.items()):
        y = 42 + 34 * row
        draw.text((170, y + 13), name, "black", font, anchor="rm")
        x = 180
        for share, color in zip(shares, FACTOR_COLORS.values()):
            width = 0 if math.isnan(share) else 4.4 * share
            draw.rectangle((x, y, x + width, y + 26), color)
            if share >= 8:
                draw.text((x + width / 2, y + 13), f"{share:.0f} %", "black", font, anchor="mm")
            x += width
    return pil_to_tensor(sheet)


# --------------------------------------------------------------------------------------------------
# Heat maps


def heat_maps(model, images, scores=None):
    """Grad-CAM of each head's own prediction, at the last activation with places that it depends
    on.

    images: (N, 3, H, W), as `model` wants them. scores: a function of model and images that returns
    logits (N, heads, classes) or (N, classes), if calling the model does not. Returns maps
    (N, heads, H, W), from 0 to 1, their maximum, and predictions (N, heads).
    """
    logits, activations = record_activations(model, images, scores)
    if logits.ndim == 2:
        logits = logits[:, None]
    values, predictions = logits.max(2)
    maps = []
    for score in values.sum(0):  # of all images at once: they do not depend on one another
        heat = grad_cam(score, activations)
        if heat is None:
            heat = images.new_zeros(len(images), 1, 2, 2)
        heat = F.interpolate(heat, images.shape[2:], mode="bilinear")
        maps.append(heat)
    maps = torch.cat(maps, 1)
    largest = maps.amax((2, 3), keepdim=True)
    return maps / largest.clamp_min(1e-12), predictions


def record_activations(model, images, scores):
    """Logits (float32), and the modules' outputs that `as_map` takes, in the order of their run."""
    activations = []

    def record(module, inputs, output):
        if as_map(output) is not None:
            activations.append(output)

    hooks = [module.register_forward_hook(record) for module in model.modules()]
    model.eval()
    images = images.detach().requires_grad_()
    try:
        with torch.enable_grad():
            # model.forward, because a compiled model runs no hooks.
            logits = scores(model, images) if scores else model.forward(images)
    finally:
        for hook in hooks:
            hook.remove()
    return logits.float(), activations


def grad_cam(score, activations):
    """Heat (N, 1, h, w), at least 0, at the last activation that the score depends on.

    None if there is none. The activations are those that `as_map` takes.
    """
    for activation in reversed(activations):
        (gradient,) = torch.autograd.grad(score, activation, retain_graph=True, allow_unused=True)
        # A transformer's last activations matter in the class token alone.
        if gradient is None or not as_map(gradient).any():
            continue
        weight = as_map(gradient).mean((2, 3), keepdim=True)
        heat = weight * as_map(activation)
        heat = heat.sum(1, keepdim=True).relu()
        return heat.detach().float()
    return None


def as_map(activation):
    """An activation as a map, (N, C, H, W); None if it has no places.

    Tokens (N, 1 + S * S, C), class token first, become (N, C, S, S).
    """
    if not isinstance(activation, torch.Tensor) or activation.ndim not in (3, 4):
        return None
    if activation.ndim == 3:
        tokens = activation[:, 1:].transpose(1, 2)
        side = round(tokens.shape[2] ** 0.5)
        if side * side != tokens.shape[2]:
            return None
        activation = tokens.unflatten(2, (side, side))
    height, width = activation.shape[2:]
    return activation if height * width > 1 else None


def intersection_over_union(maps, masks, threshold=0.5):
    """How well the pixels whose heat exceeds the threshold agree with a mask, (N,).

    maps: (N, ...). masks: bool, of the same shape.
    """
    hot = maps > threshold
    intersection = (hot & masks).flatten(1).sum(1)
    union = (hot | masks).flatten(1).sum(1)
    return intersection / union.clamp_min(1)


def overlay(images, maps):
    """Images (N, 3, H, W) in [0, 1] under heat maps (N, H, W) from blue over green to red."""
    centers = torch.tensor([0.75, 0.5, 0.25], device=maps.device)  # heats of pure red, green, blue
    distances = maps[:, None] - centers.view(3, 1, 1)
    colors = (1.5 - 4 * distances.abs()).clamp(0, 1)
    gray = images.mean(1, keepdim=True)
    return 0.5 * gray + 0.5 * colors


def digit_scores(classifier, images):
    """Logits of an MnistClassifier layer by layer. Its own forward does not call every layer, so
    that hooks would miss the last map.
    """
    return classifier.cls(classifier.model(images).flatten(1))


def explain_digits(classifier, images, digits, labels, count, path):
    """Write a sheet of the first `count` images, and measure all of them.

    images: uint8 (n, 3, 32, 32). digits: their shapes, uint8 (n, 1, 32, 32); a pixel belongs to the
    digit above a tenth of the maximum. labels: (n,). Returns the mean intersection over union of
    heat map and digit in percent, and, to compare, of the whole image.
    """
    masks = digits[:, 0] > 0.1 * digits.max()
    maps = []
    predictions = []
    for part in images.split(500):
        heat, predicted = heat_maps(classifier, mnist.to_float(part), digit_scores)
        maps.append(heat[:, 0])
        predictions += predicted[:, 0].tolist()
    maps = torch.cat(maps)

    shown = images[:count] / 255
    shapes = masks[:count, None].float()
    shapes = shapes.expand_as(shown)
    shown_maps = overlay(shown, maps[:count])
    titles = []
    for label, prediction in zip(labels[:count].tolist(), predictions):
        titles.append(f"{label} seen as {prediction}")
    rows = torch.stack([shown, shapes, shown_maps], 1)
    sheet = tile_sheet(rows, ["image", "digit", "heat map"], titles)
    save_picture(path, sheet)

    whole = torch.ones_like(maps)
    return {
        "heat map IoU": 100 * intersection_over_union(maps, masks).mean().item(),
        "whole image IoU": 100 * intersection_over_union(whole, masks).mean().item(),
    }


def explain_images(classifier, images, labels, names, scores, path):
    """Write a sheet of images, uint8 (n, 3, S, S), with heat maps of a classifier.

    labels: (n,). names: of the classes. scores: see heat_maps.
    """
    maps, predictions = heat_maps(classifier, mnist.to_float(images), scores)
    rows = beside_overlays(images / 255, maps)
    names = printable(names)
    titles = []
    for label, prediction in zip(labels.tolist(), predictions[:, 0].tolist()):
        titles.append(f"{names[label]}\nseen as {names[prediction]}")
    scale = sheet_scale(images.shape[2])
    save_picture(path, tile_sheet(rows, ["image", "heat map"], titles, scale))


def explain_ensemble(ensemble, tests, count, image_size, batch_size, device, path):
    """Write a sheet of `count` images with heat maps of the three heads, half of them
    counterfactuals if there are any.

    tests: name -> (kind, (paths, labels)). The first two of kind "counterfactual", "val" or "ood"
    are shown.
    """
    kinds = ("counterfactual", "val", "ood")
    chosen = [test for kind, test in tests.values() if kind in kinds]
    chosen = chosen[:2]
    rows = []
    titles = []
    for index, (paths, labels) in enumerate(chosen):
        transform = imagenet.make_transform(False, image_size)
        images = imagenet.Images(paths, labels, transform)
        last = len(paths) - 1
        wanted = min(len(paths), (count + index) // len(chosen))
        order = torch.linspace(0, last, wanted).long().tolist()
        for pixels, truths in imagenet.batches(images, order, batch_size, 0, device):
            inputs = imagenet.normalized(pixels)
            maps, predictions = heat_maps(ensemble, inputs)
            rows.append(beside_overlays(pixels / 255, maps))
            titles += map(heads_title, truths.tolist(), predictions.tolist())
    columns = ["image", *imagenet.HEADS]
    save_picture(path, tile_sheet(torch.cat(rows), columns, titles, scale=1))


def beside_overlays(images, maps):
    """Images (N, 3, H, W) in [0, 1] and their heat maps (N, heads, H, W) as rows of a sheet."""
    columns = [images]
    for heat in maps.unbind(1):
        columns.append(overlay(images, heat))
    return torch.stack(columns, 1)  # (N, 1 + heads, 3, H, W)


def heads_title(truth, prediction):
    """What each head sees, and what the image is.

    truth: a class, or the three classes of a counterfactual. prediction: three classes.
    """
    names = [name[:24] for name in imagenet.class_names()]
    lines = []
    for head, index in zip(imagenet.HEADS, prediction):
        lines.append(f"{head}: {names[index]}")
    classes = truth if isinstance(truth, list) else [truth]
    true_names = [names[index] for index in classes]
    lines += ["", f"is {' / '.join(true_names)}"]
    return "\n".join(lines)
