"""The two nets that judge generated images: a nodule segmenter and an attribute classifier.

Both see the image alone. The attribute net is *not* given the requested mask: aspect, diameter and location could be
read from a mask without looking at the image, and agreement would then say nothing about the generator. The mask only
supervises, in training, where the net looks.

A judge on disk is a folder with `config.json` (how to build it) and `model.safetensors` (fp16), trained by
`eval.segment` or `eval.attributes`.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from eval.leakage import refuse_trained
from eval.training import METRICS, device
from tiger.errors import InputError
from tiger.files import atomic_path, read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

SHIPPED = Path(__file__).resolve().parents[1] / "assets" / "judges"  # assets/README.md says what they were trained on


def normalise(images: Tensor) -> Tensor:
    """(B, H, W) uint8 -> (B, 1, H, W) float in [-1, 1]."""
    return images.unsqueeze(1).float() / 127.5 - 1


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """A small U-Net that starts at stride 2: image -> nodule logits.

    Args:
        width: channels at half resolution; each level below has more (×2, ×4, ×6).
        resolution: side in pixels of the square images it was trained on.
    """

    def __init__(self, width: int = 16, resolution: int = 128):
        super().__init__()
        self.config = {"width": width, "resolution": resolution}
        self.resolution = resolution
        w = [width, 2 * width, 4 * width, 6 * width]
        self.stem = nn.Sequential(_conv(1, w[0], 2, kernel=5), _conv(w[0], w[0]))
        self.down = nn.ModuleList(nn.Sequential(_conv(w[i], w[i + 1], 2), _conv(w[i + 1], w[i + 1])) for i in range(3))
        self.bottom = nn.Sequential(_conv(w[3], w[3], 2), _conv(w[3], w[3]))
        self.up = nn.ModuleList(_conv(a + b, b) for a, b in [(w[3], w[3]), (w[3], w[2]), (w[2], w[1]), (w[1], w[0])])
        self.head = nn.Conv2d(w[0], 4, 3, padding=1)  # four sub-pixels of the full resolution

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) in [-1, 1] -> (B, 1, S, S) logits; S a multiple of 32."""
        skips = [self.stem(images)]  # (B, w, S/2, S/2)
        for down in self.down:
            skips.append(down(skips[-1]))  # ... (B, 6w, S/16, S/16)
        hidden = self.bottom(skips[-1])  # (B, 6w, S/32, S/32)
        for up in self.up:
            hidden = up(torch.cat([F.interpolate(hidden, scale_factor=2.0), skips.pop()], dim=1))
        return F.pixel_shuffle(self.head(hidden), 2)  # (B, 4, S/2, S/2) -> (B, 1, S, S)


def local_spectrum(images: Tensor) -> Tensor:
    """(B, 1, H, W) in [-1, 1] -> (B, 63): mean log power of each 8×8 DCT-II coefficient but the constant, stride 4."""
    n = torch.arange(8, device=images.device, dtype=images.dtype)
    basis = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None]) / 2  # (frequency, position), orthonormal but for row 0
    basis[0] /= math.sqrt(2)
    filters = torch.einsum("uy,vx->uvyx", basis, basis).reshape(64, 1, 8, 8)[1:]
    return torch.log(F.conv2d(images, filters, stride=4).square() + 1e-4).mean((2, 3))


class AttributeNet(nn.Module):
    """Image -> one softmax per attribute category.

    Features are pooled over the whole image and over the nodule, the latter weighted by an attention map that the
    nodule's mask supervises in training. Two coordinate channels let it tell where the nodule lies. The local spectrum
    gives sharpness and grain at once (a linear probe on it reaches 0.99 and 0.95 on the phantom's), which convolutions
    alone did not find in hundreds of steps.

    Args:
        categories: category -> its terms, in the order of the head's outputs.
        width: channels at half resolution.
        resolution: side in pixels of the square images it was trained on.
    """

    def __init__(self, categories: dict[str, list[str]], width: int = 24, resolution: int = 128):
        super().__init__()
        self.config = {"categories": categories, "width": width, "resolution": resolution}
        self.categories = categories
        self.resolution = resolution
        w = [width, 2 * width, 4 * width, 6 * width]
        self.stem = nn.Sequential(_conv(3, w[0], 2, kernel=5), _conv(w[0], w[0]))
        self.trunk = nn.Sequential(
            *(_conv(w[0], w[1], 2), _conv(w[1], w[1])),
            *(_conv(w[1], w[2], 2), _conv(w[2], w[2])),
            *(_conv(w[2], w[3]), _conv(w[3], w[3])),
        )
        self.attention = nn.Conv2d(w[3], 1, 1)
        self.deep = nn.Sequential(_conv(w[3] + 1, w[3], 2), _conv(w[3], w[3]))
        self.texture_norm = nn.BatchNorm1d(63)
        features = 63 + 3 * w[3]
        self.dropout = nn.Dropout(0.2)
        self.heads = nn.ModuleDict({name: nn.Linear(features, len(terms)) for name, terms in categories.items()})

    def forward(self, images: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """(B, 1, S, S) in [-1, 1] -> ({category: (B, terms) logits}, (B, 1, S/8, S/8) nodule logits)."""
        batch, _, height, width = images.shape
        y = torch.linspace(-1, 1, height, device=images.device).view(1, 1, -1, 1).expand(batch, 1, height, width)
        x = torch.linspace(-1, 1, width, device=images.device).view(1, 1, 1, -1).expand(batch, 1, height, width)
        fine = self.stem(torch.cat([images, y, x], dim=1))  # (B, w, S/2, S/2)
        hidden = self.trunk(fine)  # (B, 6w, S/8, S/8)
        where = self.attention(hidden)  # (B, 1, S/8, S/8)
        inside = torch.sigmoid(where)
        nodule = (hidden * inside).sum((2, 3)) / (inside.sum((2, 3)) + 1e-3)  # (B, 6w)
        deep = self.deep(torch.cat([hidden, inside], dim=1)).amax((2, 3))  # (B, 6w)
        texture = self.texture_norm(local_spectrum(images))  # (B, 63)
        features = self.dropout(torch.cat([texture, hidden.mean((2, 3)), nodule, deep], dim=1))
        return {name: head(features) for name, head in self.heads.items()}, where


def save_judge(net: Segmenter | AttributeNet, folder: str | Path) -> None:
    """Write `config.json`, last, and `model.safetensors` (floats as fp16) into `folder`."""
    config: dict[str, Any] = {"architecture": type(net).__name__, **net.config}
    tensors = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous()
        for name, value in net.state_dict().items()
    }
    with atomic_path(Path(folder) / "model.safetensors") as temporary:
        save_file(tensors, temporary)
    write_json(Path(folder) / "config.json", config)


def _read_judge(folder: str | Path, architecture: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config without its architecture name, and the weights as float32."""
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}; train this judge first, or give the folder that holds it")
    config = read_json(folder / "config.json")
    found = config.pop("architecture", None)
    if found != architecture:
        raise InputError(f"{folder}/config.json: this is a {found}, but a {architecture} is needed here")
    tensors = load_file(folder / "model.safetensors")
    return config, {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


def trained_by(folder: str | Path) -> dict[str, str]:
    """{folder, command} of a judge; the command is empty where no metrics.json holds it."""
    path = Path(folder) / METRICS
    return {"folder": str(folder), "command": read_json(path)["command"] if path.is_file() else ""}


def load_segmenter(folder: str | Path) -> Segmenter:
    """Load the nodule segmenter in evaluation mode, on the GPU when there is one."""
    config, tensors = _read_judge(folder, "Segmenter")
    net = Segmenter(**config)
    net.load_state_dict(tensors)
    return net.to(device()).eval()


def load_attribute_net(folder: str | Path) -> AttributeNet:
    """Load the attribute net in evaluation mode, on the GPU when there is one."""
    config, tensors = _read_judge(folder, "AttributeNet")
    net = AttributeNet(**config)
    net.load_state_dict(tensors)
    return net.to(device()).eval()


def refuse_taught(real: Manifest, judges: Path, names: Iterable[str]) -> list[str]:
    """What these nets of the folder `judges` leave unsaid of their training; of those that are shipped nothing.

    Raises InputError where one says that it was trained on images or patients of the valid or test rows of `real`.
    """
    if judges.resolve() == SHIPPED:
        return []
    return [text for name in names for text in refuse_trained(real, judges / name)]


def refuse_strangers(
    judges: Path, net: AttributeNet, sets: Iterable[Manifest], knowledge: Knowledge, otherwise: str = ""
) -> None:
    """Raise InputError where the rows of a set speak of other things than `net`, of the folder `judges`, was taught.

    That is: they state terms that it does not know in categories that it does, or nothing at all that it knows. What
    looks different under the same words, as real images do beside synthetic ones, goes unnoticed.
    """
    for rows in sets:
        stated = {
            item: row.file_name
            for row in rows.rows
            for item in (row.attributes or knowledge.parse(row.text).attributes).items()
        }
        known = [item for item in stated if item[0] in net.categories]
        strange = [item for item in known if item[1] not in net.categories[item[0]]]
        if strange or not known:
            what = "no row states an attribute that it knows"
            if strange:
                category, term = strange[0]
                what = f"it does not know the {category} {term!r} of {stated[strange[0]]}"
            raise InputError(
                f"{rows.path}: --judges {judges} was trained on other images: {what}; give --judges a folder with "
                "attributes/ and segmenter/ trained on yours by `python -m eval.attributes train --knowledge NAME` and "
                f"`python -m eval.segment train`{otherwise}"
            )


@torch.inference_mode()
def segment(net: Segmenter, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """(N, S, S) uint8 images at the net's resolution -> (N, S, S) bool, True where it sees the nodule."""
    device = next(net.parameters()).device
    found = [net(normalise(torch.from_numpy(part).to(device))) > 0 for part in _parts(images, batch_size)]
    return torch.cat(found).squeeze(1).cpu().numpy()


@torch.inference_mode()
def predict_attributes(net: AttributeNet, images: np.ndarray, batch_size: int = 64) -> list[dict[str, str]]:
    """(N, S, S) uint8 images at the net's resolution -> for each, its most likely term in every category."""
    device = next(net.parameters()).device
    predictions: list[dict[str, str]] = []
    for part in _parts(images, batch_size):
        logits, _ = net(normalise(torch.from_numpy(part).to(device)))
        best = {name: values.argmax(1).tolist() for name, values in logits.items()}
        predictions += [{name: net.categories[name][best[name][i]] for name in best} for i in range(len(part))]
    return predictions


def _parts(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def mask_iou(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Intersection over union of (N, H, W) bool masks, one value an image; two empty masks agree (1)."""
    intersection = (found & wanted).sum((1, 2))
    union = (found | wanted).sum((1, 2))
    return np.where(union == 0, 1.0, intersection / np.maximum(union, 1))
