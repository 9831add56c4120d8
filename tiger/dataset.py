"""Manifest rows as tensors, the order they are trained in, and what is computed once: latents and text states."""

import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from tiger import conditions, shards
from tiger.files import atomic_path
from tiger.knowledge import Placement
from tiger.manifest import Manifest, Row, row_weights

SHARD_ROWS = 1024  # images a cache file
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
        self.latents: LatentCache | None = None

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
        return conditions.to_gray(shards.open_image(self.manifest.file(self.row(index), column)))

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
        return [hashlib.sha256(shards.read_bytes(path)).hexdigest()[:32] for path in files]

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


class LatentCache:
    """VAE moments of each row of a data set, read from memory-mapped files as they are asked for."""

    def __init__(self, places: Sequence[tuple[Path, int]]):
        self.places = places
        self.files: dict[Path, Any] = {}  # path -> open slice

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        """(2C, h, w) float32: mean and log-variance."""
        path, row = self.places[index]
        if path not in self.files:
            self.files[path] = safe_open(str(path), framework="pt").get_slice("moments")
        return self.files[path][row].float()


def cache_latents(
    vae: AutoencoderKL, dataset: TigerDataset, cache_dir: Path, *, batch_size: int = 16, rank: int = 0, world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> LatentCache:  # fmt: skip
    """Encode every image that the cache does not hold yet, and return the cache.

    Entries are keyed by the image file's content, the VAE's weights and config, and the resolution, so they are never
    stale, and runs and data sets can share them. Files are written whole: an interrupted run continues where it
    stopped. With several processes each encodes its share; `wait` lets them meet.
    """
    folder = cache_dir / f"latents-{dataset.resolution}px-{model_key(vae)}"
    keys = [dataset.content_key(index) for index in range(len(dataset))]
    known = read_index(folder)
    first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in known}  # duplicates once
    # Shared out by key, as another process may already have written part of its share when this one reads the index.
    mine = [(key, first[key]) for key in sorted(first) if int(key[:8], 16) % world == rank]
    with tqdm(total=len(mine), desc="encoding images", unit="image", disable=rank > 0 or not mine) as bar:
        for start in range(0, len(mine), SHARD_ROWS):
            write_shard(vae, dataset, mine[start : start + SHARD_ROWS], folder, batch_size, bar)
    wait()
    if first:
        known = read_index(folder)
    return LatentCache([known[key] for key in keys])


def write_shard(
    vae: AutoencoderKL, dataset: TigerDataset, rows: list[tuple[str, int]], folder: Path, batch_size: int, bar: tqdm
) -> None:
    """Encode (key, index) rows into one file of `folder`, named after its keys."""
    moments = []
    for start in range(0, len(rows), batch_size):
        images = torch.stack([dataset.image(index) for _, index in rows[start : start + batch_size]])
        with torch.no_grad():
            encoded: Any = vae.encode(images.to(vae.device, vae.dtype))
        moments.append(encoded.latent_dist.parameters.half().cpu())  # (b, 2C, h, w)
        bar.update(len(images))
    keys = [key for key, _ in rows]
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    with atomic_path(folder / f"{name}.safetensors") as path:
        save_file({"moments": torch.cat(moments).contiguous()}, str(path), metadata={"keys": json.dumps(keys)})


def read_index(folder: Path) -> dict[str, tuple[Path, int]]:
    """Content key -> (file, row) of a cache folder. A damaged file is named on stderr and removed, to be made again."""
    index = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("."):
            continue  # one being written
        try:
            with safe_open(str(path), framework="pt") as file:
                keys = json.loads(file.metadata()["keys"])
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            print(f"warning: {path} is damaged and is made again: {error}", file=sys.stderr)
            path.unlink(missing_ok=True)
            continue
        index |= {key: (path, row) for row, key in enumerate(keys)}
    return index


def model_key(model: torch.nn.Module) -> str:
    """Short hash of a model's weights, and of its configuration (not of transformers', which names versions)."""
    settings = model.config if isinstance(model.config, Mapping) else {}
    config = {key: value for key, value in settings.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class TextCache:
    """Text -> hidden states of a frozen text encoder, each distinct text encoded once; at most `limit` are kept."""

    def __init__(self, encode: Callable[[list[str]], torch.Tensor], limit: int, device: torch.device | str = "cpu"):
        """device: where the states are wanted. They are kept in main memory: thousands would fill a GPU."""
        self.encode = encode
        self.limit = limit
        self.device = torch.device(device)
        self.states: dict[str, torch.Tensor] = {}  # text -> (L, D), on the CPU

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(B,) texts -> (B, L, D) on the device. What the cache lacks is encoded in one batch."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}  # prompts recur: each is moved once
        missing = [text for text in rows if text not in self.states]
        fresh = dict(zip(missing, self.encode(missing).float().cpu(), strict=True)) if missing else {}
        distinct = torch.stack([fresh[text] if text in fresh else self.states[text] for text in rows])
        for text in missing[: max(self.limit - len(self.states), 0)]:
            self.states[text] = fresh[text].clone()  # a view would keep its whole batch alive
        places = torch.tensor([rows[text] for text in texts])
        return to_device(distinct, self.device)[to_device(places, self.device)]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor without waiting for the GPU: a copy from memory that is not pinned would."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
