"""The arms of the comparison: what each one draws its batches from, and how it changes the images.

    none          the real training images, classes as frequent as they are
    oversampling  the real training images, every class equally often: the baseline, and the sampler of all that follow
    basic         oversampling; images flipped, cropped, rotated, moved and given noise
    mixup         oversampling; pairs of images and labels mixed (Zhang et al. 2018)
    cutmix        oversampling; a box of one image in another, labels in proportion (Yun et al. 2019)
    erasing       oversampling; a box of the image erased (Zhong et al. 2020)
    features      oversampling; features pushed away from those of another image of the class: a variant of DeVries &
                  Taylor 2017, see `extrapolate`
    NAME          the real images with the synthetic ones given as --fake NAME=DIR, mixed as the policy says; a bare
                  --fake DIR is tiger_f
    real_upper    oversampling with further real images (--extra_real), as many as there are synthetic ones, or all
                  where there are fewer: what the best generator could give. Every image of a class is as likely, so
                  further ones fill a larger share of a rare class, where that of synthetic ones is fixed

Policies for synthetic images:
    share     a fixed share of synthetic images within every class of each balanced batch: were it larger in the rare
              ones, looking synthetic would be a cue to the label (the default)
    rare      the same, in the rare classes only
    pooled    synthetic and real images in one pool, each equally likely, as a data set filled up with them; classes
              are as frequent as they are there
    pretrain  synthetic images alone for the first half of the steps, then real ones alone
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from tiger.errors import InputError

REAL, EXTRA = "real", "extra_real"  # where an image comes from; else the name of its synthetic set
AUGMENTATIONS = ("basic", "mixup", "cutmix", "erasing", "features")
PLAIN = ("none", "oversampling", *AUGMENTATIONS)  # these draw from nothing but the real training images
UPPER = "real_upper"
POLICIES = ("share", "rare", "pooled", "pretrain")
NAMES = {  # as tables and pages have them; a set of synthetic images that is not here has its own name
    "none": "real images as they are",
    "oversampling": "oversampling",
    "basic": "basic image manipulation",
    "mixup": "mixing images (mixup)",
    "cutmix": "mixing images (CutMix)",
    "erasing": "random erasing",
    "features": "feature space augmentation (variant: in the net)",  # see `extrapolate`
    "real_common": "oversampling, further images of the common classes",  # benchmarks/study.sh
    "coarse": "Stable Diffusion (coarse stage)",
    "coarse_emphasised": "Stable Diffusion (coarse stage), emphasis",
    "sd_controlnet": "Stable Diffusion + ControlNet",
    "sd_emphasised": "Stable Diffusion + ControlNet, emphasis",
    "tiger_n": "Tiger-N",
    "tiger_f": "Tiger-F",
    "emphasised": "Tiger-F, emphasis",  # generation.py --emphasis
    "more_emphasised": "Tiger-F, emphasis, four times as many images",
    "perturbed": "Tiger-F, frequencies off by up to 30 %",  # benchmarks/perturb.py
    "perturbed_emphasised": "Tiger-F, emphasis, frequencies off by up to 30 %",
    "perfect": "drawn exactly as Tiger-F was asked",  # benchmarks/ceiling.py
    "perfect_emphasised": "drawn exactly as Tiger-F with emphasis was asked",
    "real_upper": "further real images",
}
MODE = v2.InterpolationMode.BILINEAR
MEAN_GREY = 0.449  # what erased pixels become: ImageNet's
EXTRAPOLATION = 0.5  # λ of DeVries & Taylor 2017, section 3.2

Group = tuple[float, np.ndarray]  # share of a batch, the rows that it is drawn from


def is_synthetic(condition: str) -> bool:
    """Whether the arm is a set of synthetic images; arms of real ones alone are PLAIN, or begin with "real_"."""
    arm = condition.partition(",")[0]
    return arm not in PLAIN and not arm.startswith("real_")


def generator_of(condition: str) -> tuple[str, str]:
    """ "tiger_f_0, 100 a class" -> ("tiger_f, 100 a class", "0"), without its generator, and which that is; "" where it
    has none."""
    arm, comma, rest = condition.partition(",")
    method, _, number = arm.rpartition("_")
    known = method in NAMES and is_synthetic(method)
    return (f"{method}{comma}{rest}", number) if known and number.isdecimal() else (condition, "")


def title(condition: str) -> str:
    """ "tiger_f_0, 100 a class" -> "Tiger-F, generator 0, 100 a class" """
    whole, number = generator_of(condition)
    method, comma, rest = whole.partition(",")
    return f"{NAMES.get(method, method)}{number and f', generator {number}'}{comma}{rest}"


@dataclass(frozen=True)
class Mixing:
    """How real and synthetic images come together."""

    policy: str = "share"
    share: float = 0.25  # of synthetic images in a class, where the policy has one
    rare: tuple[str, ...] = ()  # classes


def phases_of(arm: str, mixing: Mixing, y: np.ndarray, origin: np.ndarray, labels: Sequence[str]) -> list[list[Group]]:
    """What the batches of each phase of the training are drawn from; the phases share the steps equally.

    Args:
        y, origin: (N,) class index and source of every image that may be drawn; a class index is one of `labels`.
    Raises InputError where a class has no image to draw from.
    """
    real = origin == REAL
    if arm == "none":
        return [[(1.0, np.flatnonzero(real))]]
    if arm in PLAIN:
        return [balanced(arm, y, labels, real)]
    if arm == UPPER:
        return [balanced(arm, y, labels, real | (origin == EXTRA))]
    fake = origin == arm
    if mixing.policy == "pretrain":
        return [balanced(arm, y, labels, fake), balanced(arm, y, labels, real)]
    if mixing.policy == "pooled":
        return [[(1.0, np.flatnonzero(real | fake))]]
    shares = [mixing.share if mixing.policy == "share" or label in mixing.rare else 0.0 for label in labels]
    return [balanced(arm, y, labels, real, fake, shares)]


def balanced(
    arm: str,
    y: np.ndarray,
    labels: Sequence[str],
    real: np.ndarray,
    fake: np.ndarray | None = None,
    shares: Sequence[float] | None = None,
) -> list[Group]:
    """Every class equally often, `shares` of each from `fake`; real, fake: (N,) bool of the images."""
    groups = []
    for c, label in enumerate(labels):
        parts = [(1.0, real)]
        if fake is not None and shares is not None:
            parts = [(1 - shares[c], real), (shares[c], fake)]
        for share, allowed in parts:
            rows = np.flatnonzero((y == c) & allowed)
            if share and not len(rows):
                raise InputError(f"arm {arm}: no images of class {label} to draw from; generate some for every class")
            if share:
                groups.append((share / len(labels), rows))
    return groups


def draw_batch(groups: Sequence[Group], size: int, rng: np.random.Generator) -> np.ndarray:
    """Row indices of one batch: each group gets its share of the places to within one, its rows equally likely.

    Places are laid by systematic sampling, so that rounding favours no group over many batches, and then shuffled:
    mixup and CutMix mix neighbours, which must not always be of one class.
    """
    edges = np.cumsum([share for share, _ in groups])
    places = (np.arange(size) + rng.random()) / size * edges[-1]
    rows = [groups[g][1] for g in np.minimum(np.searchsorted(edges, places, side="right"), len(groups) - 1)]
    return rng.permutation(np.array([part[rng.integers(len(part))] for part in rows]))


def synthetic_shares(groups: Sequence[Group], y: np.ndarray, origin: np.ndarray, classes: int) -> list[float]:
    """The share of synthetic images in each class of a batch; where they differ, looks tell something of the label."""
    drawn, synthetic = np.zeros(classes), np.zeros(classes)
    for share, rows in groups:
        each = np.full(len(rows), share / len(rows))
        drawn += np.bincount(y[rows], each, minlength=classes)
        synthetic += np.bincount(y[rows], each * ~np.isin(origin[rows], (REAL, EXTRA)), minlength=classes)
    return (synthetic / np.maximum(drawn, 1e-12)).tolist()


# ------------------------------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Augmentation:
    """What an arm does to images on top of what every arm does. Random numbers are PyTorch's global ones."""

    image: Callable[[Tensor], Tensor] | None = None  # (1, H, W) in [0, 1], one image at a time
    batch: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # (B, 3, H, W), (B,) -> mixed, (B, C)
    features: Callable[[Tensor, Tensor], Tensor] | None = None  # (B, D) before the classifier, (B,) -> (B, D)


def augmentation_of(arm: str, size: int, classes: int) -> Augmentation:
    """The arm's augmentation of images of `size` px; that of most arms does nothing."""
    match arm:
        case "basic":
            return Augmentation(
                image=v2.Compose(
                    [
                        v2.RandomHorizontalFlip(),
                        v2.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.9, 1.1), antialias=True),
                        v2.RandomAffine(degrees=(-10, 10), translate=(0.1, 0.1), interpolation=MODE),
                        v2.GaussianNoise(sigma=0.05),
                    ]
                )
            )
        case "erasing":
            return Augmentation(image=v2.RandomErasing(p=0.5, value=MEAN_GREY))
        case "mixup":
            return Augmentation(batch=v2.MixUp(alpha=0.2, num_classes=classes))
        case "cutmix":
            return Augmentation(batch=v2.CutMix(alpha=1.0, num_classes=classes))
        case "features":
            return Augmentation(features=extrapolate)
    return Augmentation()


def extrapolate(features: Tensor, y: Tensor) -> Tensor:
    """(B, D) features, each pushed away from those of a random other image of its class, if there is one in the batch.

    f + λ (f − f') as DeVries & Taylor 2017 (https://arxiv.org/abs/1702.05538), but a variant of theirs: they take the
    features of an autoencoder trained beforehand, and the nearest neighbours of the class; here they are those of the
    classifier itself while it is trained, before its last layer, and the other image is a random one.
    """
    same = (y[:, None] == y[None]).float().fill_diagonal_(0)
    alone = same.sum(1) == 0
    same[alone, alone] = 1  # its own partner: nothing changes
    partner = torch.multinomial(same, 1).squeeze(1)
    return features + EXTRAPOLATION * (features - features[partner])
