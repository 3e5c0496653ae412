"""Images per second of one core: ImageNet's input pipeline against the plain form, and a training step against two passes.

    python tests/benchmark_input.py

Plain: PIL, torchvision's v1 transforms, normalisation of each image in float32. Images are drawn scenes with noise, JPEG,
500 x 375. Step: resnet50, 4 real and 4 counterfactual images; plain is float32 and a forward pass for each kind.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.io import write_jpeg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data.imagenet import MEAN, STD, Images, batches, normalized, transform  # noqa: E402  (needs the path above)
from data.scenes import draw_scenes  # noqa: E402
from train_classifier import Ensemble, ensemble_loss  # noqa: E402

COUNT, BATCH, ROUNDS = 128, 32, 9


def write_images(folder):
    generator = torch.Generator().manual_seed(0)
    scenes, _, _ = draw_scenes(torch.randn(COUNT, 32, generator=generator), torch.randn(COUNT, 32, generator=generator), 500)
    noise = 0.1 * torch.randn(scenes[:, :, :375].shape, generator=generator)
    pixels = ((scenes[:, :, :375] + noise) * 127.5 + 127.5).clamp(0, 255).byte()
    paths = [folder / f"{n}.jpg" for n in range(COUNT)]
    for path, image in zip(paths, pixels):
        write_jpeg(image, str(path), quality=90)
    return paths


def plain(paths, training):
    change = v1.Compose([*([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()] if training
                           else [v1.Resize(256), v1.CenterCrop(224)]), v1.ToTensor(), v1.Normalize(MEAN, STD)])
    for first in range(0, len(paths), BATCH):
        yield torch.stack([change(Image.open(path).convert("RGB")) for path in paths[first:first + BATCH]])


def ours(paths, training):
    images = Images(paths, torch.zeros(len(paths)), transform(training))
    for pixels, _ in batches(images, range(len(paths)), BATCH, 0, torch.device("cpu")):
        yield normalized(pixels)


def rates(paths, training):
    """Images per second of both forms, in turns: the median of the rounds."""
    seconds = {plain: [], ours: []}
    for _ in range(ROUNDS):
        for make, times in seconds.items():
            start = time.perf_counter()
            for _ in make(paths, training):
                pass
            times.append(time.perf_counter() - start)
    return [len(paths) / statistics.median(times) for times in seconds.values()]


def step_seconds(bf16, separate):
    torch.manual_seed(0)
    ensemble = Ensemble("resnet50").train().to(memory_format=torch.channels_last if bf16 else torch.contiguous_format)
    optimizer = torch.optim.SGD(ensemble.parameters(), 1e-3, momentum=0.9)
    pixels, y = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8), torch.arange(4)
    labels, seconds = torch.randint(1000, (4, 3)), []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        x = normalized(pixels)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = torch.cat([ensemble(x[:4].contiguous()), ensemble(x[4:].contiguous())]) if separate else ensemble(x)
        optimizer.zero_grad(set_to_none=True)
        ensemble_loss(logits, y, labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def main():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder))
        for name, training in (("training", True), ("evaluation", False)):
            before, after = rates(paths, training)
            print(f"input, {name:10}  plain {before:6.0f} images/s   ours {after:6.0f} images/s   {after / before:.2f} x")
    torch.set_num_threads(threads)
    plain_step, *others = (step_seconds(*form) for form in ((False, True), (False, False), (True, False)))
    print(f"step on {threads} threads: two passes, float32 {plain_step:.2f} s; one pass {others[0]:.2f} s "
          f"({100 * others[0] / plain_step:.0f} %); bf16, channels last {others[1]:.2f} s "
          f"({100 * others[1] / plain_step:.0f} %)")


if __name__ == "__main__":
    main()
