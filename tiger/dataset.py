"""Manifest rows as tensors, the order they are trained in, and their latents."""

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset, Sampler

from tiger import conditions, shards
from tiger.cache import Cache, cached, model_key
from tiger.knowledge import Placement
from tiger.manifest import Manifest, Row, row_weights

NOWHERE = Placement()  # of an organ whose words name no parts of it


class TigerDataset(Dataset[dict[str, Any]]):
    """Rows of a manifest; item i is a dict with

    image     (3, H, W) float32 in [-1, 1]; or, once `latents` is set, `moments` (2C, h, w) float32 instead
    mask      (1, H, W) float32, 0 or 1           (with conditions)
    region    (1, H, W) float32, 0 or 1           (with conditions): where the map is blank
    sobel     (1, H, W) float32 in [0, 1]         (with conditions)
    text, text_fg, text_bg, label: str;  index: int

    With random_flip there are twice as many items: the second half is the first half mirrored, encoded and cached like
    any other image; `placement` tells which words of the prompts change sides then. There are no random crops: an image
    is encoded once, whole.
    """

    def __init__(
        self,
        manifest: Manifest,
        resolution: int,
        *,
        with_conditions: bool = False,
        blank_nodule: bool = True,
        random_flip: bool = False,
        placement: Placement = NOWHERE,
    ):
        self.rows = manifest.rows
        self.random_flip = random_flip
        self.placement = placement
        self.manifest = manifest
        self.resolution = resolution
        self.with_conditions = with_conditions
        self.blank_nodule = blank_nodule
        self.latents: Cache | None = None

    def __len__(self) -> int:
        return len(self.rows) * (2 if self.random_flip else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)  # ends iteration
        item: dict[str, Any] = self.texts(index) | {"label": self.row(index).label or "", "index": index}
        if self.latents is None:
            item["image"] = self.image(index)
        else:
            item["moments"] = self.latents[index]
        return item | self.conditions(index) if self.with_conditions else item

    def texts(self, index: int) -> dict[str, str]:
        """The prompts of an item: text, text_fg, text_bg."""
        row = self.row(index)
        texts = {"text": row.text, "text_fg": row.text_fg, "text_bg": row.text_bg}
        if self.mirrored(index):
            return {name: mirror_text(text, row.plane, self.placement) for name, text in texts.items()}
        return texts

    def row(self, index: int) -> Row:
        """The manifest's row behind an item."""
        return self.rows[index % len(self.rows)]

    def mirrored(self, index: int) -> bool:
        """Whether an item is left-right mirrored."""
        return index >= len(self.rows)

    def image(self, index: int) -> torch.Tensor:
        """Gray file -> (3, H, W) float32 in [-1, 1]."""
        gray = conditions.resize_gray(self.gray(index, "file_name"), self.resolution)
        return (self.tensor(gray, index) * 2.0 - 1.0).expand(3, -1, -1)

    def conditions(self, index: int) -> dict[str, torch.Tensor]:
        """Mask, nodule's region and Sobel map, (1, H, W) float32 in [0, 1] each."""
        mask = conditions.resize_mask(conditions.binarize(self.gray(index, "condition_fg")), self.resolution)
        sobel = conditions.resize_gray(self.gray(index, "condition_bg"), self.resolution)
        region = mask
        if self.blank_nodule:
            region, sobel = conditions.nodule_region(mask), conditions.blank_nodule(sobel, mask)
        return {name: self.tensor(a, index) for name, a in (("mask", mask), ("region", region), ("sobel", sobel))}

    def gray(self, index: int, column: str) -> np.ndarray:
        """One of an item's files as it lies in its folder or shard: (H, W) uint8."""
        return conditions.read_gray(self.manifest.file(self.row(index), column))

    def tensor(self, gray: np.ndarray, index: int) -> torch.Tensor:
        """(H, W) uint8 -> (1, H, W) float32 in [0, 1], mirrored if the item is."""
        pixels = torch.from_numpy(gray)[None].float() / 255.0
        return pixels.flip(-1) if self.mirrored(index) else pixels

    def content_key(self, index: int) -> str:
        """Names what the encoded image depends on besides the VAE and the resolution."""
        return self.contents[index % len(self.rows)] + ("-mirrored" if self.mirrored(index) else "")

    @functools.cached_property
    def contents(self) -> list[str]:
        """The hash of each row's image file, read once."""
        return self.hashes("file_name")

    def hashes(self, column: str) -> list[str]:
        """Half the SHA-256 of each row's file of a column, 32 hex digits, whether it lies in a folder or in a shard."""
        files = (self.manifest.file(row, column) for row in self.rows)
        return [shards.content_hash(path) for path in files]

    def weights(self, balance: float) -> np.ndarray | None:
        """Drawing probability of each item ∝ (count of its class)^-balance; None when all are equal."""
        weights = row_weights(self.manifest, balance)
        return weights if weights is None or not self.random_flip else np.tile(weights, 2) / 2


def mirror_text(text: str, plane: str | None, placement: Placement) -> str:
    """A prompt for the mirrored image: left and right are swapped, and the organ's parts where they lie side by side.

    A row without a plane counts as of the first that the knowledge base lays parts out in.
    """
    swaps = {"left": "right", "right": "left"}
    axis = placement.axis
    if axis and axis.get(plane or next(iter(axis))) == "horizontal":
        swaps |= dict(zip(placement.parts, reversed(placement.parts), strict=True))
    words = "|".join(map(re.escape, swaps))
    return re.sub(rf"\b({words})\b", lambda match: swaps[match.group()], text)


def batch_indices(seed: int, step: int, batch_size: int, count: int, weights: np.ndarray | None = None) -> np.ndarray:
    """(batch_size,) rows of the global batch of optimizer step `step`: a pure function of its arguments.

    Without weights each epoch is a permutation of the `count` rows, and batches run on across epochs; with weights rows
    are drawn with replacement.
    """
    if weights is not None:
        return np.random.default_rng((seed, step)).choice(count, batch_size, p=weights)
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([permutation(seed, int(place) // count, count)[place % count] for place in places])


@functools.lru_cache(maxsize=2)  # a batch spans two epochs at most, unless the data set is smaller than a batch
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """Order of the rows in one epoch."""
    return np.random.default_rng((seed, epoch, count)).permutation(count)


class StepSampler(Sampler[list[int]]):
    """Batches of row indices for one process, from optimizer step `start` to `stop`, `accumulation` batches a step.

    A global batch has accumulation x processes x batch_size places; a place gets the same row however it is cut up.
    """

    def __init__(
        self, count: int, weights: np.ndarray | None, *, seed: int, batch_size: int, accumulation: int,
        rank: int, world: int, start: int, stop: int,
    ):  # fmt: skip
        self.count, self.weights, self.seed = count, weights, seed
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        total = self.batch_size * self.accumulation * self.world
        for step in range(self.start, self.stop):
            rows = batch_indices(self.seed, step, total, self.count, self.weights)
            for micro in range(self.accumulation):
                yield rows[places(micro, self.batch_size, self.rank, self.world)].tolist()


def places(micro: int, batch_size: int, rank: int, world: int) -> slice:
    """Where one process's `micro`-th batch of a step lies in the global batch."""
    first = (micro * world + rank) * batch_size
    return slice(first, first + batch_size)


def sample_latents(vae: AutoencoderKL, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw latents from the VAE's posterior, in the U-Net's units: moments (B, 2C, h, w), noise -> (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    latents = mean + torch.exp(0.5 * log_variance.clamp(-30.0, 20.0)) * noise
    return latents * vae.config["scaling_factor"]


def cache_latents(vae: AutoencoderKL, dataset: TigerDataset, cache_dir: Path, **share: Any) -> Cache:
    """Moments (2C, h, w) of each of the data set's images: mean and log-variance, so that sampling stays random.

    Stored in half precision. Keyed by the image file's content, the VAE's weights and config, and the resolution.
    share: how `cached` goes about it.
    """

    def encode(indices: Sequence[int]) -> torch.Tensor:
        images = torch.stack([dataset.image(index) for index in indices])
        encoded: Any = vae.encode(images.to(vae.device, vae.dtype))
        return encoded.latent_dist.parameters.half()

    keys = [dataset.content_key(index) for index in range(len(dataset))]
    folder = cache_dir / f"latents-{dataset.resolution}px-{model_key(vae)}"
    return cached(folder, keys, encode, unit="image", **share)
