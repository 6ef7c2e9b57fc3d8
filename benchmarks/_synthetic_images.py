"""Images of eight classes of shapes, their tokens by vector quantisation, and a classifier that needs no training.

An image has 32 x 32 pixels: one shape in one of four colours on a light background, at a random place and of a random size. Its
tokens are the nearest code words of its 8 x 8 patches of 4 x 4 pixels, in raster order.
"""

import functools
import itertools

import numpy as np
from scipy.cluster.vq import kmeans2, vq

SIZE, PATCH = 32, 4
GRID = SIZE // PATCH
CLASSES = ("disc", "square", "diamond", "triangle", "cross", "ring", "rows", "columns")
PALETTE = np.array([(0.84, 0.15, 0.16), (0.12, 0.47, 0.71), (0.17, 0.63, 0.17), (0.1, 0.1, 0.1)])
BACKGROUND = np.array((0.97, 0.97, 0.94))
RADII, CENTRES = np.arange(8, 13), np.arange(12, 20)


def masks(labels: np.ndarray, radii: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """How much of each pixel a shape covers, float[n, 32, 32], from int[n], [n] and [n, 2]."""
    y, x = (np.arange(SIZE)[:, None] - centres[:, 0, None, None], np.arange(SIZE) - centres[:, 1, None, None])
    r = radii[:, None, None]
    y, x = np.broadcast_arrays(y, x)
    across, from_centre = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    below = [  # negative inside the shape, in pixels from its edge
        from_centre - r,
        across - 0.85 * r,
        (abs(x) + abs(y) - 1.2 * r) * np.sqrt(0.5),
        np.maximum((2 * abs(x) - y - r) / np.sqrt(5), y - 0.8 * r),
        np.maximum(np.minimum(abs(x), abs(y)) - 0.3 * r, across - r),
        abs(from_centre - 0.75 * r) - 0.25 * r,
        np.maximum(across - r, -0.13 * r * np.cos(2.5 * np.pi * y / r)),
        np.maximum(across - r, -0.13 * r * np.cos(2.5 * np.pi * x / r)),
    ]
    return np.clip(0.5 - np.choose(labels[:, None, None], below), 0, 1)


def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n images, float[n, 32, 32, 3] in [0, 1], and their classes, int[n], which take turns."""
    labels = np.arange(n) % len(CLASSES)
    cover = masks(labels, rng.choice(RADII, n), rng.choice(CENTRES, (n, 2)))[..., None]
    return cover * rng.choice(PALETTE, n)[:, None, None] + (1 - cover) * BACKGROUND, labels


def patches(images: np.ndarray) -> np.ndarray:
    """float[n, 64, 48] from [n, 32, 32, 3]."""
    cut = images.reshape(-1, GRID, PATCH, GRID, PATCH, 3).swapaxes(2, 3)
    return cut.reshape(-1, GRID * GRID, PATCH * PATCH * 3)


def codebook(images: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Code words by k-means over the patches, float[codes, 48]."""
    return kmeans2(patches(images).reshape(-1, PATCH * PATCH * 3), codes, minit="++", seed=seed)[0]


def encode(book: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Tokens of images, int32[n, 64]."""
    cut = patches(images)
    return vq(cut.reshape(-1, cut.shape[-1]), book)[0].reshape(cut.shape[:2]).astype(np.int32)


def decode(book: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Images of tokens, float[n, 32, 32, 3]."""
    cut = book[tokens].reshape(-1, GRID, GRID, PATCH, PATCH, 3).swapaxes(2, 3)
    return cut.reshape(-1, SIZE, SIZE, 3)


@functools.cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape that `draw` can draw, as float32[m, 1024] of 0 and 1, and its class."""
    made = np.array(list(itertools.product(range(len(CLASSES)), RADII, CENTRES, CENTRES)))
    cover = masks(made[:, 0], made[:, 1], made[:, 2:]) > 0.5
    return cover.reshape(len(made), -1).astype(np.float32), made[:, 0]


def recognise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of the shape that overlaps most with an image's foreground, int[n], and that overlap.

    The overlap is the intersection over the union of pixels, over all shapes, sizes and places that `draw` can draw; foreground
    is what is further from the background than half of the nearest colour's distance.
    """
    shapes, labels = _templates()
    away = np.linalg.norm(images - BACKGROUND, axis=-1)
    nearest = np.linalg.norm(images[..., None, :] - PALETTE, axis=-1).argmin(-1)
    seen = (away > 0.5 * np.linalg.norm(PALETTE - BACKGROUND, axis=-1)[nearest]).reshape(len(images), -1).astype(np.float32)
    common = seen @ shapes.T
    overlap = common / (seen.sum(1)[:, None] + shapes.sum(1) - common)
    return labels[overlap.argmax(1)], overlap.max(1)
