"""What is computed once and kept on disk: the VAE's moments of each image, the text encoder's states of each prompt.

Entries are keyed by what they were computed from and by the model that did, so they are never stale, and runs and data
sets can share a folder. Files are written whole: an interrupted run continues where it stopped.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from tiger.files import atomic_path

SHARD_ROWS = 1024  # entries a file
TENSOR = "entries"  # its name in a file
DECIDES = ("hidden_act", "layer_norm_eps", "num_attention_heads")

Encode = Callable[[Sequence[int]], torch.Tensor]  # positions -> (b, ...)


class Cache:
    """Tensors of a folder, by position, read from memory-mapped files as they are asked for."""

    def __init__(self, places: Sequence[tuple[Path, int]]):
        self.places = places
        self.files: dict[Path, Any] = {}  # path -> open slice

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> torch.Tensor:
        """float32, of the shape that was stored."""
        path, row = self.places[index]
        if path not in self.files:
            self.files[path] = safe_open(str(path), framework="pt").get_slice(TENSOR)
        return self.files[path][row].float()


def cached(
    folder: Path, keys: Sequence[str], encode: Encode, *, unit: str, batch_size: int = 16, rank: int = 0,
    world: int = 1, wait: Callable[[], None] = lambda: None,
) -> Cache:  # fmt: skip
    """Compute every entry that `folder` does not hold yet, and return all in the order of `keys`.

    Args:
        keys: name what the entries are computed from; each begins with the hex digits of a hash of it.
        encode: positions in `keys` -> their entries, in the number format that is to be stored.
        rank, world, wait: with several processes each computes its share; `wait` lets them meet.
    """
    known = read_index(folder)
    first = {key: index for index, key in reversed(list(enumerate(keys))) if key not in known}  # duplicates once
    # Shared out by key, as another process may already have written part of its share when this one reads the index.
    mine = [(key, first[key]) for key in sorted(first) if int(key[:8], 16) % world == rank]
    with tqdm(total=len(mine), desc=f"encoding {unit}s", unit=unit, disable=rank > 0 or not mine) as bar:
        for start in range(0, len(mine), SHARD_ROWS):
            write_shard(folder, mine[start : start + SHARD_ROWS], encode, batch_size, bar)
    wait()
    if first:
        known = read_index(folder)
    return Cache([known[key] for key in keys])


def write_shard(folder: Path, rows: Sequence[tuple[str, int]], encode: Encode, batch_size: int, bar: tqdm) -> None:
    """Compute (key, position) rows into one file of `folder`, named after its keys."""
    parts = []
    for start in range(0, len(rows), batch_size):
        with torch.no_grad():
            parts.append(encode([index for _, index in rows[start : start + batch_size]]).cpu())
        bar.update(len(parts[-1]))
    keys = [key for key, _ in rows]
    name = hashlib.sha256("".join(keys).encode()).hexdigest()[:16]
    with atomic_path(folder / f"{name}.safetensors") as path:
        save_file({TENSOR: torch.cat(parts).contiguous()}, str(path), metadata={"keys": json.dumps(keys)})


def read_index(folder: Path) -> dict[str, tuple[Path, int]]:
    """Key -> (file, row) of a cache folder. A damaged file is named on stderr and removed, to be made again."""
    index = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("."):
            continue  # one being written
        try:
            with safe_open(str(path), framework="pt") as file:
                file.get_slice(TENSOR)
                keys = json.loads(file.metadata()["keys"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            print(f"warning: {path} is damaged and is made again: {error}", file=sys.stderr)
            path.unlink(missing_ok=True)
            continue
        index |= {key: (path, row) for row, key in enumerate(keys)}
    return index


def model_key(model: torch.nn.Module) -> str:
    """Short hash of a model's weights and configuration.

    Of transformers' configuration, which names versions, only what decides what the weights do.
    """
    if isinstance(model.config, Mapping):  # diffusers'
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    else:
        config = {key: getattr(model.config, key, None) for key in DECIDES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class TextCache:
    """Text -> hidden states of a frozen text encoder, each distinct text encoded once; at most `limit` are kept.

    `store` puts those that will come on disk, where other processes and later runs find them; without it, and for
    others, they are kept in main memory (thousands would fill a GPU).
    """

    def __init__(self, encode: Callable[[list[str]], torch.Tensor], limit: int, device: torch.device | str = "cpu"):
        """device: where the states are wanted."""
        self.encode = encode
        self.limit = limit
        self.device = torch.device(device)
        self.states: dict[str, torch.Tensor] = {}  # text -> (L, D), on the CPU
        self.stored: Mapping[str, int] = {}  # text -> place in `cache`
        self.cache = Cache([])

    def store(self, texts: Sequence[str], folder: Path, **share: Any) -> None:
        """Encode what `folder` lacks of the distinct texts, up to `limit`, in float32. share: see `cached`.

        folder: named after the text encoder and its tokenizer.
        """
        distinct = sorted(set(texts))[: self.limit]
        keys = [hashlib.sha256(text.encode()).hexdigest() for text in distinct]

        def encode(indices: Sequence[int]) -> torch.Tensor:
            return self.encode([distinct[index] for index in indices]).float()

        self.cache = cached(folder, keys, encode, unit="prompt", **share)
        self.stored = {text: place for place, text in enumerate(distinct)}

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(B,) texts -> (B, L, D) on the device. What the cache lacks is encoded in one batch."""
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}  # prompts recur: each is moved once
        missing = [text for text in rows if text not in self.stored and text not in self.states]
        found = dict(zip(missing, self.encode(missing).float().cpu(), strict=True)) if missing else {}
        for text in missing[: max(self.limit - len(self.states), 0)]:
            self.states[text] = found[text].clone()  # a view would keep its whole batch alive
        for text in rows.keys() - found.keys():
            found[text] = self.cache[self.stored[text]] if text in self.stored else self.states[text]
        distinct = torch.stack([found[text] for text in rows])
        places = torch.tensor([rows[text] for text in texts])
        return to_device(distinct, self.device)[to_device(places, self.device)]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move a tensor without waiting for the GPU: a copy from memory that is not pinned would."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
