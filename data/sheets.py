"""Pictures of what the mechanisms make, to look at while training."""
import torch

from data.mnist import SIZE
from data.runs import tile_sheet
from kernels import shuffle_patches


@torch.no_grad()
def sample_sheet(cgn):
    """Rows are classes; for two latents: mask, foreground, background, composite, and a counterfactual."""
    device = next(cgn.parameters()).device
    generator = torch.Generator().manual_seed(0)           # the same latents every time, so that sheets compare
    classes = cgn.label_emb.num_embeddings
    latent, y = cgn.f_shape[0].in_features - cgn.label_emb.embedding_dim, torch.arange(classes)
    columns = []
    for shift in (3, 7):                                   # any other class for the counterfactual's textures
        z = torch.randn(classes, latent, generator=generator).to(device)
        offsets = torch.randint(SIZE, (2, classes, 2), generator=generator).to(device)
        mask, foreground, background = cgn(z, y.to(device))
        foreground, background = (shuffle_patches(t, o) for t, o in zip((foreground, background), offsets))
        factual = torch.lerp(background, foreground, mask)
        counterfactual = torch.lerp(background.roll(2 * shift, 0), foreground.roll(shift, 0), mask)
        columns += [mask.expand(-1, 3, -1, -1) * 2 - 1, foreground, background, factual, counterfactual]
    titles = ["mask", "foreground", "background", "composite", "counterfact."] * 2
    return tile_sheet(torch.stack(columns, 1) / 2 + 0.5, titles, [str(c) for c in range(classes)])


@torch.no_grad()
def imagenet_sheet(cgn, cgan, z, y, truncation):
    """Rows are classes: premask, mask, foreground, background, composite, the cGAN's image, and a counterfactual."""
    dtype = cgan.embeddings.weight.dtype
    with torch.autocast(z.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        premask, mask, foreground, background, _ = cgn(z, y[:, None].expand(-1, 3), truncation)
        target = cgan(z.to(dtype), y, truncation)
    images = [premask, mask.expand(-1, 3, -1, -1) * 2 - 1, foreground, background,
              torch.lerp(background, foreground, mask), target,
              torch.lerp(background.roll(2, 0), foreground.roll(1, 0), mask)]
    titles = ["premask", "mask", "foreground", "background", "composite", "cGAN", "counterfact."]
    return tile_sheet(torch.stack(images, 1) / 2 + 0.5, titles, [str(c) for c in y.tolist()], scale=1)
