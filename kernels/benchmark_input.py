"""Time ImageNet's input pipeline against PIL, and a classifier's step against two forward passes.

    python kernels/benchmark_input.py

Input, images per second of one core: the plain form decodes one image at a time with PIL, and
transforms and normalizes it with torchvision's v1 transforms. The images are smooth pictures with
noise, JPEG, 500 x 375. The two forms take turns, so that a slow moment hits both.

Step: resnet50 with 4 real and 4 counterfactual images. The plain form is float32, with a forward
pass for each of the two kinds.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms as v1

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_classifier  # noqa: E402  (needs the path above)
from data import imagenet, pictures, runs  # noqa: E402

# --------------------------------------------------------------------------------------------------
# Input


def write_images(folder, count):
    """Write `count` JPEG files of 500 x 375, of about 70 kB each. Returns their paths."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for index in range(count):
        coarse = torch.rand(1, 3, 3, 4, generator=generator) * 2 - 1
        image = F.interpolate(coarse, (375, 500), mode="bicubic")[0]
        image += 0.1 * torch.randn(image.shape, generator=generator)
        pixels = (image * 127.5 + 127.5).clamp(0, 255).byte()
        path = folder / f"{index}.jpg"
        pictures.to_pil(pixels).save(path, quality=90)
        paths.append(path)
    return paths


def plain_batches(paths, training, batch_size):
    """Normalized batches, float32 (n, 3, 224, 224), in the plain form."""
    if training:
        augment = [v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()]
    else:
        augment = [v1.Resize(256), v1.CenterCrop(224)]
    normalize = v1.Normalize(imagenet.MEAN, imagenet.STD)
    transform = v1.Compose([*augment, v1.ToTensor(), normalize])
    for start in range(0, len(paths), batch_size):
        images = []
        for path in paths[start : start + batch_size]:
            image = Image.open(path).convert("RGB")
            images.append(transform(image))
        yield torch.stack(images)


def our_batches(paths, training, batch_size):
    """The same by the pipeline of train_classifier.py."""
    labels = torch.zeros(len(paths))
    images = imagenet.Images(paths, labels, imagenet.make_transform(training))
    order = range(len(paths))
    for pixels, _ in imagenet.batches(images, order, batch_size, 0, torch.device("cpu")):
        yield imagenet.normalized(pixels)


def read_all(batches):
    """Seconds that it takes to go through the batches."""
    start = time.perf_counter()
    for _ in batches:
        pass
    return time.perf_counter() - start


def time_input(paths, training, args):
    """Images per second of the plain form and of ours: the median of the rounds."""
    plain = []
    ours = []
    for _ in range(args.rounds):
        plain.append(read_all(plain_batches(paths, training, args.batch_size)))
        ours.append(read_all(our_batches(paths, training, args.batch_size)))
    return len(paths) / statistics.median(plain), len(paths) / statistics.median(ours)


# --------------------------------------------------------------------------------------------------
# Step


def time_step(separate, bf16, rounds):
    """Median seconds of a training step.

    separate: a forward pass for each kind of image instead of one for both. bf16: in bfloat16 and
    channels last instead of float32 and channels first.
    """
    torch.manual_seed(0)
    ensemble = train_classifier.Ensemble("resnet50").train()
    if bf16:
        ensemble.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(ensemble.parameters(), 1e-3, momentum=0.9)
    pixels = torch.randint(256, (8, 3, 224, 224), dtype=torch.uint8)
    labels = torch.arange(4)
    counterfactual_labels = torch.randint(1000, (4, 3))

    seconds = []
    for _ in range(1 + rounds):  # the first one warms up
        start = time.perf_counter()
        x = imagenet.normalized(pixels)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if separate:
                real = ensemble(x[:4].contiguous())
                counterfactual = ensemble(x[4:].contiguous())
                logits = torch.cat([real, counterfactual])
            else:
                logits = ensemble(x)
        loss = train_classifier.ensemble_loss(logits, labels, counterfactual_labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# --------------------------------------------------------------------------------------------------
# Command line


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--images", type=runs.positive_int, default=128, help="files that are read in a round"
    )
    parser.add_argument(
        "--batch-size", type=runs.positive_int, default=32, help="images in a batch that is read"
    )
    parser.add_argument(
        "--rounds", type=runs.positive_int, default=9, help="timed rounds, and timed steps"
    )
    return parser.parse_args()


def main():
    args = parse_args()
    device = runs.pick_device("cpu")  # with what the scripts set up there
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_images(Path(folder), args.images)
        for name, training in (("training", True), ("evaluation", False)):
            plain, ours = time_input(paths, training, args)
            print(
                f"input, {name:10}  plain {plain:6.0f} images/s   ours {ours:6.0f} images/s   "
                f"{ours / plain:.2f} x"
            )

    torch.set_num_threads(threads)
    two_passes = time_step(separate=True, bf16=False, rounds=args.rounds)
    one_pass = time_step(separate=False, bf16=False, rounds=args.rounds)
    print(
        f"step, threads: {threads}; two passes, float32 {two_passes:.2f} s; "
        f"one pass {one_pass:.2f} s ({100 * one_pass / two_passes:.0f} %)"
    )
    if runs.pick_bf16("auto", device):
        half = time_step(separate=False, bf16=True, rounds=args.rounds)
        print(f"bf16, channels last {half:.2f} s ({100 * half / two_passes:.0f} %)")


if __name__ == "__main__":
    main()
