"""The image classifier behind `eval.classify`: one ResNet, one training recipe, whatever the data."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval import scoring
from eval.arms import Augmentation
from eval.training import device, fit, shift
from tiger.errors import InputError
from tiger.files import atomic_path, write_json

MODELS = ("resnet18", "resnet34", "resnet50")


@dataclass(frozen=True)
class Recipe:
    """What every arm shares."""

    model: str = "resnet50"
    weights: str | None = None  # local ImageNet checkpoint (.safetensors, .pth); None: from scratch
    max_train_steps: int = 3000  # optimizer steps
    train_batch_size: int = 32  # images
    learning_rate: float = 1e-3  # peak; warm-up, then cosine to 0
    validations: int = 5  # times that the valid split is looked at, evenly spread; the best state is kept
    bf16: bool = False  # trainings under autocast to bfloat16; what is measured stays float32

    def __post_init__(self) -> None:
        if self.weights and not Path(self.weights).is_file():
            raise InputError(f"{self.weights}: no such file; give a local checkpoint, or none to train from scratch")
        if self.bf16 and device().type == "cpu":
            raise InputError("--bf16: there is no GPU here, and a CPU gains nothing by it; leave it out")

    def settings(self) -> dict[str, Any]:
        """All of it as JSON, the weights by their content; bf16 only where it is on, as older scores know none."""
        settings = asdict(self) | {"weights": _digest(self.weights) if self.weights else None}
        return settings if self.bf16 else {name: value for name, value in settings.items() if name != "bf16"}


@cache
def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def build(recipe: Recipe, classes: int) -> nn.Module:
    """The torchvision ResNet with a head for `classes`; the weights' own head, such as ImageNet's, is left out."""
    import torchvision

    net: torchvision.models.ResNet = getattr(torchvision.models, recipe.model)(weights=None, num_classes=classes)
    if recipe.weights:
        body = {name: tensor for name, tensor in read_weights(recipe.weights).items() if not name.startswith("fc.")}
        try:
            missing, unexpected = net.load_state_dict(body, strict=False)
        except RuntimeError as error:  # shapes
            raise InputError(
                f"{recipe.weights}: not a {recipe.model}: {str(error).splitlines()[-1].strip()}"
            ) from error
        if unexpected or set(missing) != {"fc.weight", "fc.bias"}:
            wrong = next(iter((*unexpected, *sorted(set(missing) - {"fc.weight", "fc.bias"}))), "fc.weight")
            raise InputError(f"{recipe.weights}: not a {recipe.model} as torchvision or timm have it, see {wrong}")
    return net.to(memory_format=torch.channels_last).to(device())


def save(net: nn.Module, folder: Path, model: str, image_size: int, classes: Sequence[str]) -> None:
    """Write {config.json, model.safetensors}, which `eval.features` takes as an extractor; the config comes last."""
    from safetensors.torch import save_file

    with atomic_path(folder / "model.safetensors") as temporary:
        save_file({name: tensor.contiguous().cpu() for name, tensor in net.state_dict().items()}, temporary)
    write_json(folder / "config.json", {"model": model, "image_size": image_size, "classes": list(classes)})


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from .pth by PyTorch's loader that runs no code; there also one that a
    training wrapped, in {"state_dict": …} or under names that begin with "module.".

    Raises InputError where it is none.
    """
    if Path(path).suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot be read ({error}): replace the file") from error
    found = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(found, dict) and isinstance(found.get("state_dict"), dict):
        found = found["state_dict"]
    if not (isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())):
        raise InputError(f"{path}: holds no state dict, tensors by their names")
    return {name.removeprefix("module."): value for name, value in found.items()}


def to_input(images: Tensor) -> Tensor:
    """(B, H, W) in 0 … 255 -> (B, 3, H, W) float, normalised as ImageNet's mean grey."""
    grey = (images.to(device()).unsqueeze(1).float() / 255 - 0.449) / 0.226
    return grey.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, generator: torch.Generator, each: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """(B, H, W) uint8 -> (B, 3, H, W): moved by up to 1/16, gain and offset up to a tenth. A flip would swap poles.

    each: what an arm does besides to an image, (1, H, W) in [0, 1].
    """
    moved = shift(images, images.shape[-1] // 16, generator)
    if each is not None:
        changed = torch.stack([each(image) for image in moved.unsqueeze(1).float() / 255])  # (B, 1, H, W)
        moved = changed.squeeze(1) * 255
    inputs = to_input(moved)
    gain, offset = 0.2 * torch.rand((2, len(images), 1, 1, 1), generator=generator) - 0.1
    return inputs * (1 + gain.to(inputs.device)) + (offset / 0.226).to(inputs.device)


@torch.inference_mode()
def predict(net: nn.Module, images: np.ndarray, batch_size: int = 128) -> np.ndarray:
    """(N, H, W) uint8 -> (N, classes) probabilities."""
    parts = [torch.from_numpy(images[i : i + batch_size]) for i in range(0, len(images), batch_size)]
    return torch.cat([net(to_input(part)).float().softmax(1).cpu() for part in parts]).double().numpy()


def macro_auc(y: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean of the AUC of each class in `y` against all others; y (N,) class indices, probabilities (N, classes)."""
    return float(np.nanmean(scoring.class_aucs(y, probabilities, np.ones((1, len(y))))))


def train(
    recipe: Recipe,
    images: np.ndarray,
    y: np.ndarray,
    draw: Callable[[np.random.Generator], np.ndarray],
    valid: tuple[np.ndarray, np.ndarray] | None,
    *,
    classes: int,
    seed: int,
    description: str,
    augmentation: Augmentation | None = None,
    net: nn.Module | None = None,
) -> tuple[nn.Module, dict[str, float]]:
    """Train one classifier and return it, in the state that was best on `valid`, with notes on the training.

    Args:
        images, y: (N, H, W) uint8 and (N,) class indices: everything that may be drawn.
        draw: numpy generator -> the row indices of one batch.
        valid: images and classes to select the state on, by macro AUC over the classes there; None: the last state.
        augmentation: what an arm does to images on top of what every arm does.
        net: a classifier to go on from; None: a new one.
    """
    torch.manual_seed(seed)
    net = build(recipe, classes) if net is None else net
    augmentation = augmentation or Augmentation()
    best: dict[str, Any] = {"auc": -1.0, "step": recipe.max_train_steps, "state": None}

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        inputs = augment(torch.from_numpy(images[rows]), generator, augmentation.image)
        target = torch.from_numpy(y[rows]).to(inputs.device)
        if augmentation.features is not None:
            features = features_of(net, inputs)
            return F.cross_entropy(net.get_submodule("fc")(augmentation.features(features, target)), target)
        if augmentation.batch is not None:
            inputs, target = augmentation.batch(inputs, target)
        return F.cross_entropy(net(inputs), target)

    def validate(step: int) -> dict[str, float]:
        assert valid is not None
        value = macro_auc(valid[1], predict(net, valid[0]))
        if value > best["auc"]:
            state = {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}
            best.update(auc=value, step=step, state=state)
        return {"valid auc": value}

    speed = fit(
        net,
        loss,
        draw,
        steps=recipe.max_train_steps,
        learning_rate=recipe.learning_rate,
        seed=seed,
        description=description,
        weight_decay=0.05,
        validate=validate if valid is not None else None,
        validation_steps=max(1, recipe.max_train_steps // recipe.validations),
        bf16=recipe.bf16,
    )
    if best["state"] is not None:
        net.load_state_dict(best["state"])
    notes = {"selected_step": best["step"], "images_per_second": round(speed * recipe.train_batch_size, 1)}
    return net.eval(), notes | ({"valid_macro_auc": best["auc"]} if valid is not None else {})


def features_of(net: nn.Module, inputs: Tensor) -> Tensor:
    """(B, D): what the net's last layer sees."""
    found: list[Tensor] = []
    hook = net.get_submodule("fc").register_forward_pre_hook(lambda layer, given: found.append(given[0]))
    net(inputs)
    hook.remove()
    return found[0]
