"""A label operator whose objects compete across blocks as StarDist's do, without a network."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

from chunkrestore.grid import Block, Halo
from chunkrestore.kernels.star_convex import Rays
from chunkrestore.operators.base import check_image
from chunkrestore.operators.stardist import StarDist

_VERTICES = np.concatenate([np.eye(3), -np.eye(3)]).astype(np.float32)
_FACES = np.array(
    [[0, 2, 1], [0, 4, 2], [0, 5, 4], [0, 1, 5], [3, 1, 2], [3, 2, 4], [3, 4, 5], [3, 5, 1]], np.int32
)
OCTAHEDRON = Rays(_VERTICES, _FACES)


@dataclass(frozen=True)
class Crystals:
    """Uneven octahedra around every second bright voxel, the brightest first; many are equally bright."""

    bright: float = 120.0
    nms_thresh: float = 0.2
    suppression: str = "exact"

    name = "crystals"
    needs = frozenset()
    rays = OCTAHEDRON
    scale = None
    rescale = None
    n_classes = 0
    _config = SimpleNamespace(n_dim=3)

    decide = StarDist.decide
    radius = StarDist.radius
    settle = StarDist.settle
    survivors = StarDist.survivors
    within = StarDist.within
    measure = StarDist.measure
    paint = StarDist.paint
    _rescaling = StarDist._rescaling

    def resolve(self, statistics):
        return self

    def check(self, shape, dtype):
        check_image(shape, dtype)

    def halo(self, shape):
        return Halo((0,) * len(shape))

    def memory_nbytes(self, read_shape):
        return 16 * int(np.prod(read_shape))

    def describe(self):
        return {"operator": self.name, "bright": self.bright, "nms_thresh": self.nms_thresh}

    def detect(self, image, block):
        voxels = np.argwhere(image > self.bright) + [s.start for s in block.core]
        voxels = voxels[(voxels % 2 == 0).all(axis=-1)]
        inner = tuple((voxels - [s.start for s in block.core]).T)
        spread = (voxels @ [3, 5, 7])[:, np.newaxis] * np.arange(1, 7)
        return {
            "prob": image[inner].astype(np.float32),
            "dist": (2.2 + (spread % 7) * 0.35).astype(np.float32),
            "points": voxels.astype(np.int64),
        }

    def __call__(self, image):
        block = Block.whole(image.shape)
        survivors = self.survivors(self.decide(self.detect(image, block)))
        objects = self.measure(survivors, {}, block)
        return self.paint(block, [objects | {"ids": np.argsort(np.argsort(objects["key"])) + 1}])
