"""Synthetic stand-ins: handwritten digits for MNIST, striped and veined textures for photographs.

They let every script run on a machine without the downloads. A digit is a pen path: hand-placed
control points, blended between writers, jittered, splined, bent, slanted and inked. All chance
comes from one seeded generator on the CPU, so that a seed means the same data on every device.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Digits

# Ways of writing a digit: (digit, how often against its other ways, spellings apart by "|"). A
# spelling lists control points "x,y" in percent of the digit's height, y downwards; "*" marks a
# sharp corner, "/" lifts the pen. The spellings of one way have corners and lifts in the same
# places, so that any blend of them is again that digit: a writer between.
# fmt: off
_WAYS = (
    # 0: round, narrow, wide, with a gap, with an end that runs on inside
    (0, 1.0, """
        38,2 12,16 3,50 14,84 36,98 60,84 69,50 60,16 36,2 |
        32,2 16,20 12,50 16,82 28,98 43,82 48,50 44,18 30,3 |
        24,10 6,34 6,70 24,96 50,93 68,62 64,24 44,4 20,12 |
        58,10 26,3 6,38 11,82 36,98 62,78 68,40 52,10 28,14 |
        62,12 34,4 8,26 4,66 26,94 62,90 86,62 84,26 58,8"""),
    # 1: a plain stroke; a serif; a serif and a foot
    (1, 7.0, """
        40,0 40,50 40,100 |
        44,0 38,48 36,100 |
        36,0 42,52 40,100 |
        58,0 40,50 22,100"""),
    (1, 1.0, """
        14,24 26,14 38,0* 38,50 38,100 |
        20,18 30,10 40,0* 38,50 32,100"""),
    (1, 0.6, """
        10,22 24,14 38,0* 38,50 36,99 / 8,99 36,99 66,98 |
        18,16 28,10 40,0* 40,50 38,97 / 16,98 38,97 60,95"""),
    # 2: a corner at the foot; a loop at the foot; a swan's neck with neither
    (2, 1.0, """
        6,20 28,1 56,12 54,38 30,70 4,95* 34,95 70,95 |
        4,10 34,3 62,6 56,32 32,62 4,92* 36,90 74,92 |
        10,30 24,4 50,4 56,34 34,68 10,97* 34,92 66,99 |
        16,40 22,16 36,2 46,30 28,74 6,98* 34,94 76,97 |
        2,16 26,6 48,16 44,44 24,70 2,88* 36,92 80,100"""),
    (2, 1.0, """
        8,24 26,3 54,8 58,34 38,64 14,92 1,84 16,74 44,90 72,90 |
        4,16 30,1 56,14 50,42 32,70 16,96 3,92 10,78 38,88 74,98 |
        12,34 22,8 48,2 56,30 36,62 22,86 4,92 10,68 42,82 68,84 |
        14,14 32,0 52,14 48,44 36,66 14,98 -4,86 14,66 46,84 80,76 |
        14,34 20,6 50,2 68,32 56,74 26,97 4,84 16,66 48,80 80,98 |
        20,26 34,8 56,14 60,44 46,72 24,94 6,84 22,64 52,82 82,92 |
        6,28 24,4 58,4 72,36 58,78 30,98 4,90 8,70 40,76 78,94"""),
    (2, 0.4, """
        8,22 30,2 56,14 46,46 20,78 8,94 34,96 66,90 |
        12,30 30,4 52,10 50,40 26,74 8,96 30,93 72,97 |
        0,12 30,4 52,6 44,34 22,66 12,88 28,94 50,86"""),
    # 3: a sharp waist; a small loop at the waist; a flat top
    (3, 1.0, """
        8,14 32,0 58,14 48,38 24,47* 50,50 62,72 42,97 4,90 |
        4,8 34,2 54,14 44,36 20,44* 46,46 56,70 34,96 2,98 |
        10,22 30,4 50,14 46,34 26,42* 56,44 68,68 44,98 10,86 |
        2,4 36,0 64,8 50,34 30,50* 52,56 56,78 32,98 0,94"""),
    (3, 0.8, """
        8,14 34,1 57,16 46,38 26,47 32,47 60,60 58,86 32,99 2,90 |
        4,10 34,4 56,14 40,40 18,48 34,40 62,56 60,84 30,100 4,84 |
        14,20 36,2 54,18 44,42 22,54 30,44 54,58 46,84 22,98 -2,96"""),
    (3, 0.4, """
        6,5 30,4 58,4* 44,20 26,40* 56,52 62,78 36,98 4,90 |
        0,14 26,6 50,4* 42,22 30,36* 60,44 66,72 40,98 2,98 |
        4,10 36,4 70,2* 52,24 32,44* 52,50 58,72 36,94 10,98"""),
    # 4: open and angular; open and round; closed; a cup whose right side runs on as the stem
    (4, 1.0, """
        16,4 10,28 4,54* 34,54 68,51 / 58,2 54,50 50,100 |
        8,2 6,30 8,50* 34,52 70,46 / 54,4 54,50 54,98 |
        24,0 14,26 2,48* 30,56 72,54 / 64,10 54,50 42,98"""),
    (4, 1.0, """
        14,6 6,32 14,52 36,52 66,42 / 60,2 54,50 46,100 |
        20,4 8,30 12,50 34,48 56,36 / 62,0 55,48 52,98 |
        6,10 4,36 16,54 38,50 70,40 / 56,6 52,52 50,100"""),
    (4, 0.6, """
        50,2 28,30 3,62* 36,61 72,58 / 50,2 48,50 45,100 |
        42,2 24,26 5,52* 34,50 64,47 / 43,0 45,50 44,98 |
        56,0 32,26 8,50* 40,54 76,54 / 57,2 50,50 40,100"""),
    (4, 0.8, """
        12,6 8,32 22,48 46,44 60,6* 57,50 50,100 |
        6,4 5,36 22,50 48,48 58,4* 56,52 54,98 |
        18,8 4,36 16,52 44,42 62,0* 52,50 38,100"""),
    # 5: a separate cap; one stroke with corners; one smooth S
    (5, 1.0, """
        20,4 18,20 14,40* 40,36 62,60 50,90 24,99 2,88 / 20,4 44,4 68,1 |
        24,6 20,24 18,44* 46,40 58,66 44,92 22,98 4,90 / 26,8 46,4 76,0 |
        14,2 14,20 12,44* 42,44 60,66 48,92 22,96 -2,92 / 14,3 36,5 58,4 |
        6,10 8,24 12,44* 34,36 52,58 44,88 22,98 6,86 / 6,10 40,6 82,4 |
        34,8 26,26 18,44* 42,46 50,66 38,90 18,98 -6,94 / 36,9 56,4 84,-2"""),
    (5, 0.7, """
        66,3 42,4 20,5* 17,24 12,43* 40,37 62,60 52,90 24,99 2,88 |
        72,2 48,8 30,10* 26,26 16,48* 44,44 56,66 42,90 20,98 -2,92 |
        56,4 36,2 12,4* 12,20 11,40* 42,38 58,62 46,92 20,96 2,94"""),
    (5, 0.5, """
        64,5 38,3 16,20 26,42 52,56 56,80 32,98 2,90 |
        74,4 46,4 28,22 32,42 52,60 48,82 26,98 -2,94"""),
    # 6: a stem, bent or straight, and a loop that turns up and closes; a bowl whose end curls down
    #    inside
    (6, 1.0, """
        52,0 24,24 8,56 14,88 36,99 58,82 50,60 28,60 12,80 |
        38,0 18,26 6,58 14,88 38,98 60,76 52,50 28,52 10,70 |
        64,2 32,22 10,56 8,84 28,99 52,88 52,68 32,62 12,78 |
        28,0 12,28 4,62 14,92 40,97 60,78 48,58 24,64 8,80 |
        56,6 26,14 8,46 10,82 34,98 60,82 58,54 36,46 14,62 |
        44,0 30,30 16,60 12,88 26,99 44,88 42,70 28,68 14,86"""),
    (6, 0.7, """
        10,4 2,32 2,62 18,92 48,98 70,76 58,54 38,64 32,88 |
        24,0 8,26 2,58 14,92 42,98 62,74 50,52 32,64 24,92 |
        36,8 12,30 2,62 22,90 56,94 82,74 70,56 46,66 40,86"""),
    # 7: a plain corner; a serif; a crossing bar; a round shoulder
    (7, 1.0, """
        4,10 32,7 62,6* 44,46 28,100 |
        2,4 32,8 64,12* 50,52 42,100 |
        6,12 30,4 60,8* 52,40 44,98 |
        2,8 30,10 66,2* 40,44 12,98 |
        8,16 30,10 54,6* 50,50 46,100"""),
    (7, 0.7, """
        6,26 8,6* 34,8 62,5* 46,48 32,100 |
        2,22 8,10* 34,6 60,8* 52,50 44,100 |
        2,38 10,6* 36,4 58,4* 56,48 54,100 |
        0,24 4,14* 40,18 72,0* 44,42 20,100"""),
    (7, 0.6, """
        4,10 32,7 62,6* 44,46 28,100 / 18,52 40,50 64,46 |
        6,6 34,8 62,10* 48,50 38,100 / 20,56 42,50 70,50 |
        8,12 34,10 62,4* 50,50 44,98 / 30,46 50,48 78,44 |
        6,8 34,8 66,4* 42,50 22,100 / 8,58 36,54 72,50"""),
    (7, 0.7, """
        4,16 32,4 60,8 54,40 40,68 30,100 |
        8,28 26,6 54,2 58,32 50,66 46,100 |
        2,10 30,6 56,12 48,42 34,70 24,98"""),
    # 8: an S closed by a rising stroke; a loop begun at the waist; two rings
    (8, 1.2, """
        58,14 34,0 10,20 32,44 58,74 34,99 8,78 32,48 56,20 50,4 |
        64,10 36,2 14,22 34,44 48,74 26,98 8,80 34,50 62,24 64,6 |
        60,10 36,4 12,16 30,44 56,70 38,98 14,86 34,52 62,24 78,2 |
        62,24 40,4 8,14 26,40 50,64 42,97 16,92 26,62 50,36 68,8 |
        54,12 22,0 4,24 34,44 46,72 34,98 20,82 34,54 62,28 50,4 |
        50,10 28,0 10,18 30,42 58,72 36,99 6,82 26,52 50,24 44,6 |
        56,18 40,2 18,18 28,44 44,76 24,99 8,80 30,52 60,26 58,12"""),
    (8, 0.8, """
        36,46 14,26 34,1 58,18 42,44 12,70 26,98 54,88 56,66 34,46 |
        32,50 10,28 28,2 52,14 40,44 8,74 30,99 60,84 54,62 30,44 |
        40,42 22,24 44,1 64,14 46,40 16,64 14,92 42,96 54,68 38,44"""),
    (8, 0.3, """
        34,2 14,10 14,34 34,46 56,36 56,12 34,2 / 34,46 10,58 8,86 34,99 60,88 58,58 34,46"""),
    # 9: a stem that turns back from the ring; a stem that curves to the left; a ring that runs on
    #    into the tail
    (9, 1.0, """
        56,12 30,3 8,24 22,46 50,36 60,8* 58,50 54,100 |
        52,10 26,6 6,30 22,50 46,36 58,4* 52,50 40,100 |
        58,14 36,0 12,16 18,44 46,40 60,14* 60,54 60,100 |
        60,16 34,8 8,36 20,54 48,42 62,14* 54,56 44,98 |
        58,18 30,2 0,30 18,58 48,50 62,18* 66,56 72,98 |
        62,10 34,6 10,28 20,46 42,42 58,28* 52,60 46,100 |
        60,2 30,12 4,38 14,54 40,44 58,24* 52,60 44,100"""),
    (9, 0.7, """
        58,16 32,2 8,24 24,46 52,34 59,14* 60,56 44,94 12,92 |
        54,14 30,0 12,20 26,42 48,32 57,12* 60,52 50,92 20,100"""),
    (9, 1.0, """
        54,12 26,4 8,28 28,46 52,26 56,12 52,52 36,100 |
        58,8 32,8 10,30 28,46 54,30 60,14 54,56 46,100 |
        46,4 20,12 12,36 34,40 50,16 54,20 52,56 48,100"""),
)
# fmt: on

_SAMPLES = 64  # ink dots per digit: at most about a pixel apart, too close for the eye to tell
_INK_BLUR = 0.7  # standard deviation of a dot in pixels; rounds corners and fills crossings
_CHUNK = 250  # images drawn at a time: bounds memory, and makes image i independent of n


class _Ways(NamedTuple):
    """The table as tensors, padded with zeros to its longest entries."""

    shapes: torch.Tensor  # (ways, spellings, controls, 2), control points
    spelled: torch.Tensor  # (ways, spellings), 1 where a spelling exists
    splines: torch.Tensor  # (ways, dots, controls), the weight of each control point in each dot
    joined: torch.Tensor  # (ways, dots - 1), 0 where the pen is lifted between two dots
    chances: torch.Tensor  # (10, ways), how often each digit is written in each way


@functools.cache
def _compile_ways():
    """The table _WAYS as _Ways."""
    parsed = [_parse_way(text) for _, _, text in _WAYS]
    count = len(parsed)
    spellings = max(shapes.shape[0] for shapes, _ in parsed)
    controls = max(shapes.shape[1] for shapes, _ in parsed)
    ways = _Ways(
        shapes=torch.zeros(count, spellings, controls, 2),
        spelled=torch.zeros(count, spellings),
        splines=torch.zeros(count, _SAMPLES, controls),
        joined=torch.zeros(count, _SAMPLES - 1),
        chances=torch.zeros(10, count),
    )
    for way, (shapes, pieces) in enumerate(parsed):
        digit, often, _ = _WAYS[way]
        spellings, controls, _ = shapes.shape
        ways.shapes[way, :spellings, :controls] = shapes
        ways.spelled[way, :spellings] = 1
        ways.chances[digit, way] = often
        times = _dot_times(shapes, pieces)
        ways.splines[way, :, :controls] = _spline_weights(pieces, times, controls)
        ways.joined[way] = _joined_dots(pieces, times)
    return ways


def _parse_way(text):
    """The text of one way -> points (spellings, controls, 2) and its pieces, lists of indices.

    Pieces lie between corners or lifts of the pen.
    """
    shapes = []
    for spelling in text.split("|"):
        points = []
        pieces = [[]]
        for token in spelling.split():
            if token == "/":
                pieces.append([])
                continue
            index = len(points)
            points.append([float(value) / 100 for value in token.rstrip("*").split(",")])
            pieces[-1].append(index)
            if token.endswith("*"):
                pieces.append([index])
        shapes.append(points)
    return torch.tensor(shapes), pieces


def _dot_times(shapes, pieces):
    """Where the ink dots of a way lie on its curves: a list of (piece, span, fraction of the span).

    Dots go to spans by length, measured on the mean shape: even spacing lets few dots cover a long
    path.
    """
    mean = shapes.mean(0)
    spans = []
    lengths = []
    for piece, indices in enumerate(pieces):
        for span in range(len(indices) - 1):
            start = mean[indices[span]]
            end = mean[indices[span + 1]]
            spans.append((piece, span))
            lengths.append((end - start).norm())
    shares = torch.stack(lengths)
    shares = shares.cumsum(0) / shares.sum()
    edges = (shares * _SAMPLES).round().long().tolist()
    times = []
    first = 0
    for (piece, span), last in zip(spans, edges):
        ends_piece = span == len(pieces[piece]) - 2
        steps = max(last - first - ends_piece, 1)
        times += [(piece, span, i / steps) for i in range(last - first)]
        first = last
    return times


def _spline_weights(pieces, times, controls):
    """Catmull-Rom weights (dots, controls) of the dots: a curve is linear in its control points.

    A piece's end points are repeated, so that it starts and ends on them and a corner between two
    pieces stays sharp.
    """
    weights = torch.zeros(len(times), controls)
    for row, (piece, span, t) in enumerate(times):
        last = len(pieces[piece]) - 1
        basis = (
            -t + 2 * t**2 - t**3,
            2 - 5 * t**2 + 3 * t**3,
            t + 4 * t**2 - 3 * t**3,
            t**3 - t**2,
        )
        for offset, value in zip((-1, 0, 1, 2), basis):
            position = min(max(span + offset, 0), last)
            weights[row, pieces[piece][position]] += value / 2
    return weights


def _joined_dots(pieces, times):
    """(dots - 1): 1 where a dot and the next are in one piece or in two that meet, else 0."""
    joined = []
    for (piece, _, _), (next_piece, _, _) in zip(times, times[1:]):
        same_point = pieces[piece][-1] == pieces[next_piece][0]
        joined.append(float(same_point or piece == next_piece))
    return torch.tensor(joined)


class _Chance:
    """Random numbers for n digits at once, all from one generator."""

    def __init__(self, n, generator):
        self.n = n
        self.generator = generator

    def normal(self, *size):
        """(n, *size), mean 0 and standard deviation 1."""
        return torch.randn(self.n, *size, generator=self.generator)

    def uniform(self, low, high, *size):
        """(n, *size), from low to high."""
        return low + (high - low) * torch.rand(self.n, *size, generator=self.generator)


def _draw_controls(way, chance):
    """Control points (n, controls, 2), each of another writer, for ways (n,)."""
    ways = _compile_ways()
    spelled = ways.spelled[way]
    # Uneven blends: cubed exponentials leave most writers near one spelling and some in between.
    exponential = chance.uniform(0.001, 0.999, spelled.shape[1]).log().neg()
    blend = exponential.pow(3) * spelled
    blend = blend / blend.sum(1, keepdim=True)
    controls = (blend[:, :, None, None] * ways.shapes[way]).sum(1)
    # Neighboring points err together, as a hand does: independent errors make rings polygonal.
    error = chance.normal(*controls.shape[1:])
    size = chance.uniform(0.008, 0.026, 1, 1)
    return controls + size * (error + error.roll(1, 1) + error.roll(-1, 1))


def _bend(dots, chance):
    """Dots (n, dots, 2) bent, stretched, slanted and turned, as writers differ."""
    # Elastic deformation: a few long sine waves bend the path, short enough to differ between its
    # parts.
    for strength, wave in ((0.045, 5.0), (0.016, 10.0)):
        angle = chance.uniform(0, 2 * math.pi, 1, 2)
        frequency = wave * chance.uniform(0.5, 1.2, 1, 2)
        direction = frequency * torch.cat([angle.cos(), angle.sin()], 1)
        amplitude = strength * chance.normal(1, 2)
        phase = chance.uniform(0, 2 * math.pi, 1, 2)
        dots = dots + amplitude * torch.sin(dots @ direction + phase)
    stretch = torch.exp(0.1 + 0.19 * chance.normal(1))  # width against height
    slant = 0.15 + 0.24 * chance.normal(1)  # writers lean to the right more often than not
    turn = 0.09 * chance.normal(1)
    x, y = dots.unbind(-1)
    x = x * stretch
    x = x - slant * y
    turned_x = x * turn.cos() - y * turn.sin()
    turned_y = x * turn.sin() + y * turn.cos()
    return torch.stack([turned_x, turned_y], -1)


def _fit_frame(dots, labels, chance):
    """Dots in pixels, sized as in MNIST: the longer side of the ink fills 20. And the pen's radius,
    (n, 1) in pixels.
    """
    extent = dots.amax(1) - dots.amin(1)
    longest = extent.amax(1, keepdim=True)
    shortest = extent.amin(1)
    # A pen too broad for a narrow digit would fill its loops; a 1 has none.
    broadest = torch.where(labels == 1, 2.4, 0.8 + 1.9 * shortest / longest[:, 0])
    radius = 1.22 * torch.exp(0.28 * chance.normal(1))
    radius = radius.clamp(0.7, 2.3).minimum(broadest[:, None])
    scale = (20 - 2 * radius) / longest
    return dots * scale[..., None], radius


def _draw_paths(labels, generator):
    """The pen paths of labels (n,).

    Returns dots (n, dots, 2) in pixels about the center, x before y; their ink (n, dots); and the
    radius of the pen in pixels, the softness of its edge in pixels and the strength of its ink,
    each (n, 1, 1).
    """
    ways = _compile_ways()
    chance = _Chance(len(labels), generator)
    way = torch.multinomial(ways.chances[labels], 1, generator=generator)[:, 0]
    controls = _draw_controls(way, chance)
    dots = _bend(ways.splines[way] @ controls - 0.5, chance)
    dots, radius = _fit_frame(dots, labels, chance)

    # Each dot stands for half the path to its neighbors.
    gaps = (dots[:, 1:] - dots[:, :-1]).norm(dim=-1)
    gaps = gaps * ways.joined[way]
    lengths = 0.5 * (F.pad(gaps, (0, 1)) + F.pad(gaps, (1, 0)))
    # Pen pressure swells and thins the line along the path.
    phase = torch.linspace(0, 2 * math.pi, _SAMPLES) * chance.uniform(0.4, 2, 1)
    phase = phase + chance.uniform(0, 2 * math.pi, 1)
    swelling = 0.14 * chance.normal(1).clamp(-1.5, 1.5)
    pressure = 1 + swelling * torch.sin(phase)
    excess = radius.square() * (pressure.square() - 1)
    ink = lengths * torch.exp(excess / (2 * _INK_BLUR**2))

    # The center of mass lies in the middle; on average half a pixel off, since MNIST moves by whole
    # pixels and an image of 28 has no middle one.
    mass = lengths * pressure
    moment = (mass[..., None] * dots).sum(1, keepdim=True)
    center = moment / mass.sum(1)[:, None, None]
    dots = dots - center + chance.uniform(0.1, 0.9, 1, 2)
    softness = chance.uniform(0.7, 1.1, 1, 1)
    strength = chance.uniform(0.95, 1.08, 1, 1)
    return dots, ink, radius[..., None], softness, strength


def _ink(dots, ink, radius, softness, strength):
    """Paths, as _draw_paths returns them, to images uint8 (n, 28, 28).

    The distance to the path is a soft minimum over the dots, -2 b^2 log(sum exp(-d^2 / 2 b^2)).
    Gaussians separate into x and y: the sum over dots for all 784 pixels is one small matrix
    product. True minima cost ten times as much.
    """
    grid = torch.arange(28, dtype=torch.float32, device=dots.device) - 13.5
    offset = dots[..., None] - grid  # (n, dots, 2, 28)
    exponent = offset.square() / (-2 * _INK_BLUR**2)
    bells = exponent.clamp_min(-80).exp()  # where it underflows, exp() is ten times slower
    columns, rows = bells.unbind(2)  # (n, dots, 28) each
    rows = rows * ink[..., None]
    density = rows.transpose(1, 2) @ columns
    density = density / (math.sqrt(2 * math.pi) * _INK_BLUR)
    squared = -2 * _INK_BLUR**2 * density.clamp_min(1e-30).log()
    distance = squared.clamp_min(0).sqrt()
    value = ((radius - distance) / softness + 0.5).clamp(0, 1)
    value = value * strength * 255
    return value.round().clamp(0, 255).to(torch.uint8)


def synthetic_digits(n, seed, device="cpu"):
    """Draw n handwritten-looking digits, white on black.

    Returns images, uint8 (n, 28, 28), and labels, int64 (n,) in 0..9, uniform at random, both on
    `device`. The same seed gives the same digits, and image i does not depend on n; the paths are
    drawn on the CPU and only inked on `device`, where rounding may differ by one gray level.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    all_labels = []
    # The arrays are so small that a second thread gains little; on a busy machine, waiting for it
    # costs ten times more.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(0, n, _CHUNK):  # whole chunks: the last one is cut only at the end
            labels = torch.randint(10, (_CHUNK,), generator=generator)
            paths = _draw_paths(labels, generator)
            images.append(_ink(*(part.to(device) for part in paths)))
            all_labels.append(labels.to(device))
    finally:
        torch.set_num_threads(threads)
    return torch.cat(images)[:n], torch.cat(all_labels)[:n]


# --------------------------------------------------------------------------------------------------
# Textures

# Ten striped textures: (period in pixels, angle in degrees, waviness in periods, share of the
# stripe's color, softness of its edges, color between the stripes, color of the stripes, color of a
# line inside them or None). Periods fit two to six times into a crop of 32 pixels. Colors differ
# enough for a crop's mean color to tell most classes; directions, periods and shares differ as
# well, since texture and not color alone is to be learned.
# fmt: off
_STRIPES = (
    (12, None, 0.5, 0.30, 0.10, (70, 32, 18), (238, 214, 140), (255, 248, 225)),  # cream on brown
    (15, 118, 0.6, 0.42, 0.08, (214, 224, 236), (244, 164, 20), None),  # orange bars on pale blue
    (10, 75, 1.1, 0.34, 0.12, (200, 120, 44), (44, 22, 10), None),  # tiger
    (11, 100, 2.2, 0.52, 0.05, (226, 60, 110), (22, 12, 20), None),  # pink and black, forked
    (14, 25, 0.8, 0.50, 0.30, (120, 196, 60), (60, 140, 240), (170, 226, 255)),  # reef fish
    (8, 140, 1.8, 0.50, 0.05, (240, 238, 232), (24, 22, 24), None),  # zebra
    (6, 0, 0.5, 0.45, 0.15, (196, 170, 232), (96, 44, 168), None),  # fine lavender lines
    (13, 50, 0.9, 0.60, 0.15, (150, 232, 190), (10, 92, 60), (24, 130, 90)),  # mint on dark green
    (16, 90, 0.15, 0.50, 0.03, (232, 208, 190), (176, 92, 84), None),  # awning
    (16, 160, 1.2, 0.48, 0.06, (252, 216, 0), (20, 18, 10), None),  # wasp
)

# Ten veined textures: (kind, size of the cells or curls in pixels, width of the veins in pixels or
# as a share, weight of the finer second net, ground color, second ground color, color of the
# veins).
_VEINS = (
    ("net", 26, 2.6, 0.7, (70, 168, 20), (120, 205, 40), (206, 240, 130)),  # leaf against light
    ("curls", 30, 0.16, 0.4, (84, 10, 16), (120, 24, 28), (196, 140, 136)),  # red marble
    ("curls", 18, 0.22, 0.6, (86, 128, 124), (126, 166, 160), (206, 232, 222)),  # sage
    ("net", 20, 3.6, 0.0, (176, 224, 70), (208, 240, 110), (120, 16, 50)),  # sorrel
    ("net", 24, 2.4, 0.6, (170, 66, 18), (208, 104, 36), (250, 222, 170)),  # autumn leaf
    ("net", 9, 2.2, 0.0, (150, 148, 10), (226, 220, 60), (14, 18, 4)),  # dragonfly wing
    ("fibers", 9, 0.30, 0.5, (98, 84, 170), (136, 120, 204), (52, 36, 110)),  # iris petal
    ("net", 15, 3.4, 0.4, (14, 50, 26), (30, 80, 40), (110, 30, 80)),  # dark leaf, purple veins
    ("net", 32, 3.8, 0.7, (24, 160, 196), (50, 190, 220), (26, 56, 76)),  # turquoise
    ("curls", 24, 0.30, 0.8, (240, 232, 206), (250, 246, 230), (84, 104, 128)),  # blue cheese
)
# fmt: on


class _Canvas:
    """Coordinates x and y, (size, size) in pixels, and the generator that draws on them."""

    def __init__(self, size, generator):
        axis = torch.arange(size, dtype=torch.float32)
        self.y, self.x = torch.meshgrid(axis, axis, indexing="ij")
        self.generator = generator

    def noise(self, cell, x=None, y=None):
        """Smooth noise of unit scale, (size, size). cell: the width of its bumps in pixels.

        x, y: other coordinates in place of the canvas's own.
        """
        if x is None:
            x, y = self.x, self.y
        knots = math.ceil(max(x.shape) / cell) + 4
        lattice = torch.randn(1, 1, knots, knots, generator=self.generator)
        where = torch.stack([x, y], -1)[None]
        where = where / cell / (knots - 1) * 2 - 1
        noise = F.grid_sample(lattice, where, "bicubic", "reflection", align_corners=True)
        return 1.3 * noise[0, 0]

    def net(self, cell, width, x, y):
        """Edges of Voronoi cells at x, y (size, size), the branching of veins: 1 on an edge, 0 from
        `width` pixels away on.

        There is one site per square of a grid, so that the two nearest lie among the squares around
        and no search is needed.
        """
        squares = math.ceil(max(x.shape) / cell) + 8
        sites = torch.rand(squares, squares, 2, generator=self.generator)
        column = (x / cell).floor().long() + 3
        row = (y / cell).floor().long() + 3
        distances = []
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                i = (row + down).clamp(0, squares - 1)
                j = (column + right).clamp(0, squares - 1)
                site_x, site_y = sites[i, j].unbind(-1)
                to_x = (j - 3 + site_x) * cell - x
                to_y = (i - 3 + site_y) * cell - y
                distances.append(torch.hypot(to_x, to_y))
        nearest = torch.stack(distances).topk(2, dim=0, largest=False).values
        return (1.3 - (nearest[1] - nearest[0]) / width).clamp(0, 1)

    def finish(self, picture):
        """Uneven light and grain, as in a photograph; (3, size, size) uint8."""
        light = 1 + 0.08 * self.noise(45)
        light = light + 0.05 * self.noise(3)
        grain = 4 * torch.randn(picture.shape, generator=self.generator)
        picture = picture * light + grain
        return picture.clamp(0, 255).round().to(torch.uint8)


def _ridges(noise, width):
    """Lines along the zeros of noise (size, size): 1 on a line, 0 where it exceeds about `width`.

    Where the noise is steep a line would be thinner than a pixel and break into dots; its slope
    widens it again.
    """
    down, right = torch.gradient(noise)
    slope = torch.hypot(down, right)
    return (1.2 - noise.abs() / (width + 0.8 * slope)).clamp(0, 1)


def _paint(picture, rgb, weight):
    """A color laid over a picture (3, size, size) where the weight (size, size) is above 0."""
    return picture.lerp(_color(rgb).expand_as(picture), weight)


def _color(rgb):
    return torch.tensor(rgb, dtype=torch.float32)[:, None, None]


def _striped(canvas, pattern):
    """One striped texture, (3, size, size) uint8. pattern: a row of _STRIPES."""
    period, angle, waviness, share, softness, ground, stripe, line = pattern
    x = canvas.x
    y = canvas.y
    if angle is None:  # rings about a point outside the picture
        across = torch.hypot(x + 25, y - 0.4 * x.shape[0])
    else:
        radians = math.radians(angle)
        across = x * math.cos(radians) + y * math.sin(radians)
    bend = canvas.noise(40)
    bend = bend + 0.3 * canvas.noise(14)
    phase = across / period + 0.4 * waviness * bend
    # Shares that vary along a stripe make it taper and break off, as on a hide.
    share = share * (1 + 0.18 * min(waviness, 1.5) * canvas.noise(22))
    offset = (phase - phase.floor() - 0.5).abs() * 2  # 0 in the middle of a stripe, 1 between two
    weight = ((share - offset) / softness + 0.5).clamp(0, 1)
    picture = _color(ground).lerp(_color(stripe), weight)
    if line is not None:
        weight = ((0.35 * share - offset) / softness + 0.5).clamp(0, 1)
        picture = _paint(picture, line, weight)
    return canvas.finish(picture)


def _veined(canvas, pattern):
    """One veined texture, (3, size, size) uint8. pattern: a row of _VEINS."""
    kind, cell, width, finer, ground, second, vein = pattern
    # Warped coordinates bend straight edges and curl ridges.
    reach = 0.55 * cell if kind == "curls" else 0.22 * cell
    u = canvas.x + reach * canvas.noise(cell)
    u = u + 0.1 * reach * canvas.noise(5)
    v = canvas.y + reach * canvas.noise(cell)
    v = v + 0.1 * reach * canvas.noise(5)
    if kind == "fibers":  # ridges drawn out along one direction
        u, v = 0.8 * u + 0.6 * v, (0.8 * v - 0.6 * u) / 7
    if kind == "net":
        veins = canvas.net(cell, width, u, v)
        small = canvas.net(cell / 3.2, 0.4 * width + 0.5, u, v)
    else:
        veins = _ridges(canvas.noise(cell, u, v), width)
        small = _ridges(canvas.noise(cell / 2.2, u, v), width)
    veins = torch.maximum(veins, finer * small)
    patches = (0.5 + 0.5 * canvas.noise(18)).clamp(0, 1)
    picture = _color(ground).lerp(_color(second), patches)
    picture = _paint(picture, vein, veins)
    return canvas.finish(picture)


def synthetic_textures(seed, size=150):
    """Draw ten striped object textures and ten veined background textures.

    Returns two tensors, (10, 3, size, size) uint8 RGB on the CPU. Texture i belongs to class i: its
    colors and kind of pattern are the class's own, the seed draws its course. A crop of 32 x 32
    pixels shows enough of it to tell the class. The same seed and size give the same textures.
    """
    canvas = _Canvas(size, torch.Generator().manual_seed(seed))
    objects = torch.stack([_striped(canvas, pattern) for pattern in _STRIPES])
    backgrounds = torch.stack([_veined(canvas, pattern) for pattern in _VEINS])
    return objects, backgrounds
