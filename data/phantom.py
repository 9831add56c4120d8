"""Synthetic B-mode thyroid ultrasound whose every attribute is known.

    python -m data.prepare phantom --output_dir runs/phantom --count 64 --seed 3

A convolution speckle model (Bamber & Dickinson, Phys. Med. Biol. 25:463, 1980): complex Gaussian scatterers, whose
amplitude is an echogenicity map, convolved with a depth-dependent anisotropic point spread function; several looks are
compounded, attenuation is integrated along depth (so shadows and enhancement follow from the anatomy), and the
intensity is log-compressed. Lengths are fractions of the image side unless a name ends in `_px`; levels are decibels.
"""

import math
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from tiger.conditions import sobel_map
from tiger.errors import InputError
from tiger.files import atomic_path, changed_settings, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import FILE_NAME, Manifest, Row, write

Array = NDArray[np.float32]
Attributes = dict[str, str]
Table = Mapping[str, Mapping[str, float]]

LOOKS = 5  # compounded frames: one look is far grainier than a modern scanner
OVERSAMPLING = 1.5  # the model runs on a finer grid than the image
DYNAMIC_RANGE = 62.0  # dB between black and white
THYROID = -18.0  # dB

_PLANES = {"longitudinal plane": 0.55, "transverse plane": 0.45}
_QUALITY = {
    "definition": {"less definition": 0.25, "definition": 0.45, "more definition": 0.3},
    "detail": {"less detail": 0.25, "detail": 0.45, "more detail": 0.3},
    "brightness": {"low bright": 0.25, "bright": 0.45, "high bright": 0.3},
}

# The truth of this synthetic world: P(term | class). Rare classes share most terms with common ones and own a few.
CLASS_ATTRIBUTES: Mapping[str, Table] = {
    "benign": {
        "composition": {"solid": 0.4, "mixed": 0.28, "spongiform": 0.18, "cystic": 0.14},
        "echogenicity": {"hyperechoic": 0.25, "isoechoic": 0.48, "hypoechoic": 0.26, "markedly hypoechoic": 0.01},
        "echotexture": {"homogeneous": 0.6, "heterogeneous": 0.4},
        "calcification": {
            "no calcification": 0.79,
            "microcalcification": 0.05,
            "macrocalcification": 0.02,
            "peripheral rim": 0.14,
        },
        "aspect": {"wider-than-tall": 0.5, "taller-than-wide": 0.06, "round": 0.22, "oval": 0.22},
        "shape": {"regular shape": 0.85, "irregular shape": 0.15},
        "margin": {"clear": 0.73, "unclear": 0.2, "irregular margin": 0.05, "extracapsular": 0.02},
        "halo": {"no halo": 0.6, "intermittent halo": 0.38, "uneven thick halo": 0.02},
        "diameter": {"small": 0.2, "middle": 0.35, "large": 0.3, "enormous": 0.15},
        "location": {"inferior pole": 0.35, "middle pole": 0.38, "upper pole": 0.27},
        "extension": {"no extension": 0.94, "extension": 0.06},
    },
    "PTC": {
        "composition": {"solid": 0.88, "mixed": 0.1, "spongiform": 0.01, "cystic": 0.01},
        "echogenicity": {"hyperechoic": 0.03, "isoechoic": 0.18, "hypoechoic": 0.76, "markedly hypoechoic": 0.03},
        "echotexture": {"homogeneous": 0.4, "heterogeneous": 0.6},
        "calcification": {
            "no calcification": 0.35,
            "microcalcification": 0.58,
            "macrocalcification": 0.02,
            "peripheral rim": 0.05,
        },
        "aspect": {"wider-than-tall": 0.2, "taller-than-wide": 0.45, "round": 0.15, "oval": 0.2},
        "shape": {"regular shape": 0.35, "irregular shape": 0.65},
        "margin": {"clear": 0.2, "unclear": 0.4, "irregular margin": 0.38, "extracapsular": 0.02},
        "halo": {"no halo": 0.84, "intermittent halo": 0.15, "uneven thick halo": 0.01},
        "diameter": {"small": 0.42, "middle": 0.36, "large": 0.16, "enormous": 0.06},
        "location": {"inferior pole": 0.35, "middle pole": 0.35, "upper pole": 0.3},
        "extension": {"no extension": 0.7, "extension": 0.3},
    },
    "FTC": {
        "composition": {"solid": 0.84, "mixed": 0.14, "spongiform": 0.01, "cystic": 0.01},
        "echogenicity": {"hyperechoic": 0.18, "isoechoic": 0.5, "hypoechoic": 0.31, "markedly hypoechoic": 0.01},
        "echotexture": {"homogeneous": 0.45, "heterogeneous": 0.55},
        "calcification": {
            "no calcification": 0.83,
            "microcalcification": 0.06,
            "macrocalcification": 0.03,
            "peripheral rim": 0.08,
        },
        "aspect": {"wider-than-tall": 0.36, "taller-than-wide": 0.06, "round": 0.22, "oval": 0.36},
        "shape": {"regular shape": 0.65, "irregular shape": 0.35},
        "margin": {"clear": 0.32, "unclear": 0.1, "irregular margin": 0.1, "extracapsular": 0.48},
        "halo": {"no halo": 0.22, "intermittent halo": 0.2, "uneven thick halo": 0.58},
        "diameter": {"small": 0.06, "middle": 0.28, "large": 0.38, "enormous": 0.28},
        "location": {"inferior pole": 0.35, "middle pole": 0.35, "upper pole": 0.3},
        "extension": {"no extension": 0.82, "extension": 0.18},
    },
    "MTC": {
        "composition": {"solid": 0.93, "mixed": 0.05, "spongiform": 0.01, "cystic": 0.01},
        "echogenicity": {"hyperechoic": 0.01, "isoechoic": 0.06, "hypoechoic": 0.4, "markedly hypoechoic": 0.53},
        "echotexture": {"homogeneous": 0.4, "heterogeneous": 0.6},
        "calcification": {
            "no calcification": 0.28,
            "microcalcification": 0.17,
            "macrocalcification": 0.53,
            "peripheral rim": 0.02,
        },
        "aspect": {"wider-than-tall": 0.22, "taller-than-wide": 0.2, "round": 0.28, "oval": 0.3},
        "shape": {"regular shape": 0.58, "irregular shape": 0.42},
        "margin": {"clear": 0.47, "unclear": 0.26, "irregular margin": 0.25, "extracapsular": 0.02},
        "halo": {"no halo": 0.87, "intermittent halo": 0.12, "uneven thick halo": 0.01},
        "diameter": {"small": 0.2, "middle": 0.36, "large": 0.32, "enormous": 0.12},
        "location": {"inferior pole": 0.1, "middle pole": 0.38, "upper pole": 0.52},
        "extension": {"no extension": 0.84, "extension": 0.16},
    },
}


@dataclass(frozen=True)
class Phantom:
    """One image with its exact truth: HxW uint8 arrays, masks are 0/255."""

    image: NDArray[np.uint8]
    nodule: NDArray[np.uint8]
    thyroid: NDArray[np.uint8]


CATEGORIES = (*CLASS_ATTRIBUTES["benign"], "direction", *_QUALITY)  # what `render` needs a term for


@dataclass(frozen=True)
class Preset:
    """What a data set holds. `shares` are training shares a class; `held_out` are the valid and test sizes as a
    fraction of the training count, balanced over the classes. Without `particular_terms` no image has a term that a
    rare subtype owns; with `uniform_attributes` every term is as likely as another, whatever the class."""

    shares: Mapping[str, float]
    held_out: Mapping[str, float] = field(default_factory=dict)
    particular_terms: bool = True
    uniform_attributes: bool = False


PRESETS: Mapping[str, Preset] = {
    "longtail": Preset({"benign": 0.56, "PTC": 0.38, "FTC": 0.03, "MTC": 0.03}, {"valid": 0.13, "test": 0.6}),
    "study": Preset({"benign": 0.57, "PTC": 0.39, "FTC": 0.02, "MTC": 0.02}, {"valid": 0.2, "test": 2}),
    "balanced": Preset({"benign": 0.25, "PTC": 0.25, "FTC": 0.25, "MTC": 0.25}),
    "common": Preset({"benign": 0.55, "PTC": 0.45}, {"valid": 0.03}, particular_terms=False),
    "truth": Preset({"benign": 1, "PTC": 1, "FTC": 1, "MTC": 1}, {"test": 0.1}, uniform_attributes=True),
}


def _choose(rng: np.random.Generator, probabilities: Mapping[str, float]) -> str:
    weights = np.array(list(probabilities.values()))
    return str(rng.choice(list(probabilities), p=weights / weights.sum()))


def sample_nodule(label: str, rng: np.random.Generator, particular: frozenset[str], uniform: bool) -> Attributes:
    """Draw the nodule's attributes for a class; terms in `particular` are left out, `uniform` ignores the class."""
    attributes = {}
    for category, table in CLASS_ATTRIBUTES[label].items():
        allowed = {term: 1.0 if uniform else p for term, p in table.items() if term not in particular}
        attributes[category] = _choose(rng, allowed)
    if attributes["composition"] == "cystic":  # fluid: no texture, no calcium, and its level is not a grey of tissue
        attributes |= {"echogenicity": "hypoechoic", "echotexture": "homogeneous", "calcification": "no calcification"}
    if attributes["composition"] == "spongiform":
        attributes |= {"echotexture": "heterogeneous", "calcification": "no calcification"}
    return attributes


def sample_view(rng: np.random.Generator) -> Attributes:
    """Draw the plane and the image quality, which differ between images of one patient."""
    return {"direction": _choose(rng, _PLANES)} | {name: _choose(rng, table) for name, table in _QUALITY.items()}


# ---------------------------------------------------------------------------------------------------------- rendering


def _smooth_noise(rng: np.random.Generator, n: int, sigma_x: float, sigma_y: float) -> Array:
    """(n, n) Gaussian noise of unit variance with the given correlation lengths in pixels."""
    small = (max(4, int(n / max(sigma_y, 1))), max(4, int(n / max(sigma_x, 1))))
    noise = rng.standard_normal(small, dtype=np.float32)
    noise = cv2.resize(noise, (n, n), interpolation=cv2.INTER_CUBIC)
    return noise / (noise.std() + 1e-6)


def _fill(points: Array, n: int) -> NDArray[np.uint8]:
    """Fill a closed polygon, points (k, 2) as x, y fractions → (n, n) of 0/255."""
    mask = np.zeros((n, n), np.uint8)
    cv2.fillPoly(mask, [np.round(points * n * 16).astype(np.int32)], 255, shift=4)
    return mask


def _signed_distance(mask: NDArray[np.uint8]) -> Array:
    """Distance to the outline in pixels, positive inside."""
    inside = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
    outside = cv2.distanceTransform(255 - mask, cv2.DIST_L2, 3)
    return np.asarray(inside - outside, np.float32)


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -30, 30))), np.float32)


def _rotate(points: Array, angle: float) -> Array:
    c, s = math.cos(angle), math.sin(angle)
    return points @ np.array([[c, s], [-s, c]], np.float32)


_RADIUS = {"small": (0.065, 0.082), "middle": (0.098, 0.118), "large": (0.135, 0.158), "enormous": (0.18, 0.21)}
_ASPECT = {  # width / height, and the tilt in degrees
    "wider-than-tall": ((1.6, 1.95), 6),
    "taller-than-wide": ((0.52, 0.66), 6),
    "round": ((0.94, 1.06), 90),
    "oval": ((1.3, 1.48), 40),
}


def nodule_outline(attributes: Attributes, rng: np.random.Generator) -> Array:
    """(k, 2) outline around the origin: size, aspect, shape and margin as the attributes say."""
    (low, high), tilt = _ASPECT[attributes["aspect"]]
    ratio, radius = rng.uniform(low, high), rng.uniform(*_RADIUS[attributes["diameter"]])
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False, dtype=np.float32)
    r = 1 + 0.02 * np.sin(2 * angle + rng.uniform(0, 6.28))
    if attributes["shape"] == "irregular shape":  # a few deep lobes
        for order, size in ((2, 0.1), (3, 0.21), (4, 0.13)):
            r += size * rng.uniform(0.7, 1.3) * np.sin(order * angle + rng.uniform(0, 6.28))
    if attributes["margin"] == "irregular margin":  # spicules and micro-lobules
        for order in (7, 9, 12):
            r += 0.08 * np.sin(order * angle + rng.uniform(0, 6.28))
    if attributes["margin"] == "extracapsular":  # tongues of tissue that leave the outline
        for centre in rng.uniform(0, 6.28) + np.cumsum(rng.uniform(1.1, 2.0, int(rng.integers(3, 5)))):
            offset = (angle - centre + np.pi) % (2 * np.pi) - np.pi
            r += rng.uniform(0.38, 0.6) * np.exp(-((offset / 0.17) ** 2))
    outline = np.stack([r * np.cos(angle) * math.sqrt(ratio), r * np.sin(angle) / math.sqrt(ratio)], 1)
    sign = 1 if rng.random() < 0.5 else -1
    turn = math.radians(rng.uniform(0.6, 1.0) * tilt * sign)
    return _rotate((outline * radius).astype(np.float32), turn)


def _thyroid_outline(
    plane: str, half_height: float, half_nodule: float, rng: np.random.Generator
) -> tuple[Array, float]:
    """(k, 2) outline of the lobe, and the side (-1 or 1) on which the trachea lies in a transverse view."""
    angle = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    power = 0.82
    unit = np.stack([np.sign(f) * np.abs(f) ** power for f in (np.cos(angle), np.sin(angle))], 1).astype(np.float32)
    unit[:, 1] *= 1 + 0.05 * np.sin(3 * angle + rng.uniform(0, 6.28))
    side = 1.0 if rng.random() < 0.5 else -1.0
    if plane == "longitudinal plane":
        half_width, centre_x, tilt = rng.uniform(0.41, 0.47), rng.uniform(0.47, 0.53), rng.uniform(-5, 5)
    else:
        half_width = max(rng.uniform(0.25, 0.29), half_height * 1.2, half_nodule * 1.25)
        centre_x, tilt = 0.5 - side * rng.uniform(0.04, 0.08), side * rng.uniform(4, 14)
    centre_y = 0.22 + half_height + rng.uniform(0.0, 0.05)
    outline = _rotate(unit * np.array([half_width, half_height], np.float32), math.radians(tilt))
    return outline + np.array([centre_x, centre_y], np.float32), side


def _place(outline: Array, thyroid: Array, attributes: Attributes, rng: np.random.Generator) -> Array:
    """Move the nodule into its third of the lobe (left = upper pole) and to its depth (extension = across the top)."""
    x0, x1 = float(thyroid[:, 0].min()), float(thyroid[:, 0].max())
    third = {"upper pole": 0, "middle pole": 1, "inferior pole": 2}[attributes["location"]]
    width = (x1 - x0) / 3
    left, right = float(-outline[:, 0].min()), float(outline[:, 0].max())
    x = x0 + width * (third + rng.uniform(0.25, 0.75))
    inner = min(max(x, x0 + 0.9 * left), x1 - 0.9 * right)  # inside the lobe as far as the third allows
    x = min(max(inner, x0 + width * (third + 0.05)), x0 + width * (third + 0.95))
    near = np.abs(thyroid[:, 0] - x) < 0.03
    top, bottom = float(thyroid[near, 1].min()), float(thyroid[near, 1].max())
    up, down = float(-outline[:, 1].min()), float(outline[:, 1].max())
    if attributes["extension"] == "extension":
        y = top + up - rng.uniform(0.01, 0.03)
    else:
        low, high = top + up + 0.025, max(bottom - down, top + up + 0.03)
        y = rng.uniform(low, high) if high > low else low
    return outline + np.array([x, y], np.float32)


@dataclass
class _Tissue:
    """Maps that anatomy is painted on, all (n, n) float32."""

    level: Array  # echogenicity, dB
    loss: Array  # attenuation relative to the gain compensation, dB a row
    specular: Array  # amplitude of smooth reflectors, which do not speckle

    def blend(self, weight: Array, level: Array | float) -> None:
        self.level += weight * (level - self.level)


def _fascia(tissue: _Tissue, height: Array, amplitude: float, width_px: float, rng: np.random.Generator) -> None:
    """A bright sheet where `height` (signed distance in pixels) is zero; it comes and goes along its length."""
    n = height.shape[0]
    rough = height + 0.9 * (n / 192) * _smooth_noise(rng, n, n / 13, n / 13)
    presence = np.clip(0.4 + 0.6 * _smooth_noise(rng, n, n / 9, n / 9), 0, 1.3)
    sheet = amplitude * presence * np.exp(-np.square(rough / (width_px * n / 192)))
    tissue.specular += 0.6 * sheet
    tissue.level += 24 * sheet  # a tissue boundary is also a layer of strong scatterers


def _paint_neck(
    n: int, lobe: NDArray[np.uint8], lobe_level: float, plane: str, side: float, rng: np.random.Generator
) -> _Tissue:
    """Skin, fat, strap muscles, lobe, carotid, trachea and deep muscles of an (n, n) image."""
    y, x = np.mgrid[0:n, 0:n].astype(np.float32) / n
    wave = 0.014 * np.sin(2 * np.pi * (x * rng.uniform(0.5, 1.2) + rng.random()))
    fibres = _smooth_noise(rng, n, n / 9, 1.5)
    patches = _smooth_noise(rng, n, n / 10, n / 16)
    distance = _signed_distance(lobe)
    tissue = _Tissue(np.full((n, n), -33, np.float32), np.zeros((n, n), np.float32), np.zeros((n, n), np.float32))
    around = np.exp(-((np.minimum(distance, 0) / (0.05 * n)) ** 2)) * np.clip(patches, 0, 2)  # fat beside the lobe
    tissue.level += 2.0 * fibres + 3.0 * patches + 6 * around
    straps = _sigmoid((0.24 + wave - y) * n / 2)
    tissue.blend(straps, -36 + 4.5 * fibres)
    skin, fat = rng.uniform(0.03, 0.045), rng.uniform(0.085, 0.115)
    tissue.blend(_sigmoid((fat + wave - y) * n), -27 + 5 * fibres)
    tissue.blend(_sigmoid((skin - y) * n), -14 + 3 * fibres)
    _fascia(tissue, (y - skin) * n, 0.32, 1.0, rng)
    _fascia(tissue, (y - fat - wave) * n, 0.42, 1.2, rng)
    for share in rng.uniform(0.2, 0.9, int(rng.integers(1, 4))):  # sheets between the straps bend over the lobe
        level = (1 - share) * (fat + wave - y) * n + share * (distance + 3)
        _fascia(tissue, level, rng.uniform(0.12, 0.35), 0.9, rng)
    deep_edge = y - rng.uniform(0.72, 0.82) - 1.2 * wave - 0.03 * np.sin(5 * x + rng.uniform(0, 6.28))
    tissue.blend(np.asarray(_sigmoid(deep_edge * n / 4), np.float32), -47 + 3 * patches)
    _fascia(tissue, deep_edge * n, 0.28, 1.8, rng)
    tissue.loss += np.float32(0.075 * 192 / n) * (y > 0.42)  # the gain curve gives out with depth
    if plane == "transverse plane":
        _paint_trachea(tissue, x, y, 0.5 + side * rng.uniform(0.4, 0.47), rng)
        _paint_carotid(tissue, x, y, 0.5 - side * rng.uniform(0.37, 0.43), rng)
    inside = _sigmoid(distance / 0.8)
    tissue.blend(inside, lobe_level + 1.4 * _smooth_noise(rng, n, n / 18, n / 20))
    tissue.loss *= 1 - inside
    tissue.specular *= 1 - inside
    facing_probe = np.clip(
        np.abs(cv2.Sobel(distance, cv2.CV_32F, 0, 1, ksize=3)) / 8, 0, 1
    )  # specular reflectors face the probe
    _fascia(tissue, np.asarray(distance + 3.5 * (1 - facing_probe), np.float32), 0.5, 1.3, rng)
    return tissue


def _paint_trachea(tissue: _Tissue, x: Array, y: Array, centre_x: float, rng: np.random.Generator) -> None:
    n = x.shape[0]
    centre_y, radius = rng.uniform(0.44, 0.5), rng.uniform(0.18, 0.22)
    r = np.hypot(x - centre_x, (y - centre_y) * 0.95)
    lumen = _sigmoid((radius - r) * n / 2.5)
    front = np.clip((centre_y - y) / radius, 0, 1)
    tissue.blend(lumen, -44 + 8 * np.cos((radius - r) * 2 * np.pi / 0.035) * front)  # reverberation behind the wall
    tissue.specular += (
        0.5
        * front**1.5
        * np.clip(0.8 + 0.4 * _smooth_noise(rng, n, n / 9, n / 9), 0, 1.3)
        * np.exp(-(((r - radius) * n / 1.5) ** 2))
    )
    tissue.loss += 0.9 * lumen * np.float32(192 / n)  # air: nothing but decaying echoes behind the front wall


def _paint_carotid(tissue: _Tissue, x: Array, y: Array, centre_x: float, rng: np.random.Generator) -> None:
    n = x.shape[0]
    centre_y, radius = rng.uniform(0.4, 0.56), rng.uniform(0.075, 0.1)
    r = np.hypot(x - centre_x, (y - centre_y) * rng.uniform(0.9, 1.15))
    lumen = _sigmoid((radius - r) * n / 1.2)
    tissue.blend(lumen, -62)
    tissue.specular *= 1 - lumen
    across = np.abs(y - centre_y) / (r + 1e-3)  # walls that face the probe reflect most
    tissue.specular += 0.32 * across**2 * np.exp(-(((r - radius * 1.06) * n / 1.4) ** 2))
    tissue.loss -= 0.16 * lumen * np.float32(192 / n)


_LEVEL = {"hyperechoic": 6.5, "isoechoic": -5.0, "hypoechoic": -11.0, "markedly hypoechoic": -19.0}  # dB to the lobe


def _paint_nodule(
    tissue: _Tissue, mask: NDArray[np.uint8], lobe_level: float, attributes: Attributes, rng: np.random.Generator
) -> None:
    n = mask.shape[0]
    scale = n / 192
    distance = _signed_distance(mask)
    _paint_halo(tissue, distance, lobe_level, attributes["halo"], rng)
    width = {"unclear": 4.5, "clear": 0.5}.get(attributes["margin"], 0.9) * scale
    soft = _sigmoid(distance / width)
    level = np.full((n, n), lobe_level + _LEVEL[attributes["echogenicity"]], np.float32)
    if attributes["echotexture"] == "heterogeneous":
        level += 5.0 * _smooth_noise(rng, n, 5 * scale, 4 * scale)
    fluid = _fluid(distance, attributes["composition"], rng)
    level += fluid * (-58 - level)
    tissue.blend(soft, level)
    tissue.specular *= 1 - soft  # a nodule that crosses the capsule interrupts its line
    tissue.loss -= 0.12 * fluid * soft / scale  # fluid attenuates less than the gain compensates: enhancement
    if attributes["margin"] == "clear":
        tissue.level += 8 * np.exp(-(((distance + 0.6 * scale) / (1.2 * scale)) ** 2))
    _paint_calcification(tissue, distance, attributes["calcification"], rng)


def _fluid(distance: Array, composition: str, rng: np.random.Generator) -> Array:
    """Share of fluid in each pixel: none, a cyst, an eccentric cavity, or a honeycomb."""
    n = distance.shape[0]
    if composition == "cystic":
        return np.asarray(_sigmoid((distance - 1.0) / 0.7), np.float32)
    if composition == "mixed":  # a cavity of about half the nodule, cut by a wavy plane
        ys, xs = np.nonzero(distance > 0)
        y, x = np.mgrid[0:n, 0:n].astype(np.float32)
        angle = rng.uniform(0, 6.28)
        plane = (x - xs.mean()) * math.cos(angle) + (y - ys.mean()) * math.sin(angle)
        cut = plane + 2.0 * _smooth_noise(rng, n, n / 12, n / 12)
        return np.asarray(_sigmoid((distance - 2.2) / 0.8) * _sigmoid(cut / 0.8), np.float32)
    if composition == "spongiform":
        cells = _smooth_noise(rng, n, 4.6 * n / 192, 4.2 * n / 192)
        return np.asarray(_sigmoid((distance - 1.5) / 0.8) * _sigmoid((cells - 0.05) * 8), np.float32)
    return np.zeros_like(distance)


def _paint_halo(tissue: _Tissue, distance: Array, lobe_level: float, halo: str, rng: np.random.Generator) -> None:
    """A dark ring just outside the nodule."""
    if halo == "no halo":
        return
    n = distance.shape[0]
    scale = n / 192
    ys, xs = np.nonzero(distance > 0)
    y, x = np.mgrid[0:n, 0:n].astype(np.float32)
    angle = np.arctan2(y - ys.mean(), x - xs.mean())
    phase = rng.uniform(0, 6.28)
    if halo == "intermittent halo":
        thickness = np.full_like(distance, 3.6 * scale)
        present = _sigmoid((np.sin(4 * angle + phase) + 0.25) * 8)
    else:
        thickness = (6.2 + 2.4 * np.sin(2 * angle + phase) + 1.2 * np.sin(5 * angle)) * scale
        present = np.ones_like(distance)
    ring = _sigmoid((distance + thickness) / 0.6) * _sigmoid((2.0 * scale - distance) / 0.6)
    tissue.blend(np.asarray(ring * present, np.float32), lobe_level - 17)


def _paint_calcification(tissue: _Tissue, distance: Array, kind: str, rng: np.random.Generator) -> None:
    n = distance.shape[0]
    scale = n / 192
    if kind == "no calcification":
        return
    if kind == "peripheral rim":
        y, x = np.mgrid[0:n, 0:n].astype(np.float32)
        ys, xs = np.nonzero(distance > 0)
        upper = _sigmoid((ys.mean() + 0.25 * np.ptp(ys) - y) / 2)
        shell = np.exp(-(((distance - 1.0 * scale) / (1.3 * scale)) ** 2)) * upper
        tissue.specular += 0.6 * shell * np.clip(0.8 + 0.4 * _smooth_noise(rng, n, n / 20, n / 20), 0.2, 1.3)
        tissue.loss += 1.1 * shell / scale
        return
    depth = min(3.0 * scale, 0.35 * float(distance.max()))
    ys, xs = np.nonzero(distance > depth)
    if kind == "microcalcification":
        count = int(np.clip(rng.integers(6, 13) * len(ys) / (700 * scale**2), 5, 18))
        size, amplitude, loss = 0.95 * scale, 0.95, 0.0
    else:
        count, size, amplitude, loss = int(rng.integers(1, 3)), rng.uniform(2.6, 3.6) * scale, 1.2, 1.5
    spots = np.zeros((n, n), np.float32)
    for i in rng.integers(0, len(ys), count):
        centre = (int(xs[i] * 16), int(ys[i] * 16))
        axes = (int(size * 16 * rng.uniform(0.9, 1.5)), int(size * 16 * rng.uniform(0.7, 1.0)))
        cv2.ellipse(spots, centre, axes, rng.uniform(-30, 30), 0, 360, 1.0, -1, shift=4)
    spots = cv2.GaussianBlur(spots, (0, 0), 0.6)
    tissue.specular += amplitude * spots
    tissue.loss += loss * spots / scale


def _speckle(level: Array, sharpness: float, rng: np.random.Generator) -> Array:
    """Compounded echo intensity (n, n): scatterers × amplitude, convolved with a PSF that widens away from focus."""
    n = level.shape[0]
    amplitude = np.power(10.0, level / 20)
    scatterers = rng.standard_normal((2 * LOOKS, n, n), dtype=np.float32) * amplitude
    axial = 0.95 * sharpness * n / 192
    zones = [(0.0, 1.35), (0.4, 1.1), (1.0, 2.3)]  # depth, lateral width in pixels
    depths = [depth for depth, _ in zones]
    rows = np.linspace(0, 1, n)
    filtered = np.zeros((len(zones), 2 * LOOKS, n, n), np.float32)
    for k, (_, lateral) in enumerate(zones):
        sigma = lateral * sharpness * n / 192
        norm = math.sqrt(4 * math.pi * sigma * axial)  # keeps the mean intensity of scatterers
        for field_index in range(2 * LOOKS):
            blurred = cv2.GaussianBlur(scatterers[field_index], (0, 0), sigmaX=sigma, sigmaY=axial)
            filtered[k, field_index] = blurred * norm
    for k in range(len(zones)):
        weight = np.interp(rows, depths, np.eye(len(zones))[k]).astype(np.float32)[:, None]
        filtered[k] *= weight
    echo = filtered.sum(0)
    return (echo**2).sum(0) / (2 * LOOKS)


_SHARPNESS = {"less definition": 1.6, "definition": 1.1, "more definition": 0.75}
_CONTRAST = {"less detail": 0.55, "detail": 1.0, "more detail": 1.6}
_GAIN = {"low bright": -7.5, "bright": 0.0, "high bright": 7.5}


def render(attributes: Attributes, rng: np.random.Generator, size: int = 128) -> Phantom:
    """Render one phantom; `attributes` holds a term for each of the fifteen categories. Deterministic in `rng`."""
    n = round(size * OVERSAMPLING)
    outline = nodule_outline(attributes, rng)
    plane = attributes["direction"]
    natural = rng.uniform(0.14, 0.17) if plane == "longitudinal plane" else rng.uniform(0.17, 0.2)
    half_height = min(max(natural, float(np.ptp(outline[:, 1])) / 2 + 0.045), 0.27)
    thyroid_outline, side = _thyroid_outline(plane, half_height, float(np.ptp(outline[:, 0])) / 2, rng)
    outline = _place(outline, thyroid_outline, attributes, rng)
    nodule, thyroid = _fill(outline, n), _fill(thyroid_outline, n)

    lobe_level = THYROID + rng.uniform(-2, 2)
    tissue = _paint_neck(n, thyroid, lobe_level, plane, side, rng)
    _paint_nodule(tissue, nodule, lobe_level, attributes, rng)
    attenuation = np.cumsum(tissue.loss, axis=0)
    attenuation = cv2.blur(attenuation, (3, 1))
    level = tissue.level - attenuation
    sharpness = _SHARPNESS[attributes["definition"]]
    intensity = _speckle(level, sharpness, rng)
    specular = cv2.GaussianBlur(tissue.specular, (0, 0), sigmaX=0.5 * sharpness, sigmaY=0.4 * sharpness)
    intensity += np.square(specular * np.power(10.0, -attenuation / 40))
    decibels = 10 * np.log10(intensity + 1e-7)
    smooth = cv2.GaussianBlur(decibels, (0, 0), 2.2 * n / 192)
    decibels = smooth + _CONTRAST[attributes["detail"]] * (decibels - smooth)
    gain = _GAIN[attributes["brightness"]] + rng.uniform(-1.5, 1.5) + 50
    grey = np.clip((decibels + gain) / DYNAMIC_RANGE, 0, 1)
    image = cv2.resize((grey * 255).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)

    def shrink(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        small = cv2.resize(mask, (size, size), interpolation=cv2.INTER_AREA)
        return np.where(small >= 128, 255, 0).astype(np.uint8)

    return Phantom(np.round(image).astype(np.uint8), shrink(nodule), shrink(thyroid))


# ------------------------------------------------------------------------------------------------------------ data set


@dataclass(frozen=True)
class Case:
    """One image to render; `index` numbers the whole data set and seeds the image together with `seed`."""

    index: int
    seed: int
    label: str
    split: str
    patient_id: str
    attributes: Attributes


def _counts(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split `total` over classes by share, at least two images each."""
    whole = sum(shares.values())
    return {label: max(2, round(total * share / whole)) for label, share in shares.items()}


def plan(count: int, seed: int, preset: str, particular: frozenset[str]) -> list[Case]:
    """List every image of a data set: `count` training images, and the preset's balanced held-out splits.

    One patient has one to four images of one nodule; a patient never straddles splits.
    """
    settings = PRESETS[preset]
    excluded = frozenset() if settings.particular_terms else particular
    rng = np.random.default_rng([seed, 0])
    sizes = {"train": _counts(count, settings.shares)}
    for split, fraction in settings.held_out.items():
        sizes[split] = _counts(max(1, round(count * fraction)), dict.fromkeys(settings.shares, 1.0))
    cases: list[Case] = []
    patient = 0
    for split, by_label in sizes.items():
        for label, wanted in by_label.items():
            while wanted > 0:
                images = min(wanted, int(rng.integers(1, 5)))
                nodule = sample_nodule(label, rng, excluded, settings.uniform_attributes)
                for _ in range(images):
                    attributes = nodule | sample_view(rng)
                    if settings.uniform_attributes:
                        attributes = sample_nodule(label, rng, excluded, True) | sample_view(rng)
                    cases.append(Case(len(cases), seed, label, split, f"P{seed:03d}{patient:05d}", attributes))
                wanted -= images
                patient += 1
    return cases


FOLDERS = ("images", "condition_fg", "condition_bg", "organ_mask")
SETTINGS = "phantom.json"  # what a data set was made with, beside its metadata.jsonl


def _render_case(case: Case, output_dir: Path, size: int) -> None:
    """Render one case and write its image, nodule mask, Sobel map (of the nodule too) and thyroid mask."""
    cv2.setNumThreads(1)
    paths = [output_dir / folder / f"{case.index:06d}.png" for folder in FOLDERS]
    if all(path.exists() for path in paths):
        return
    phantom = render(case.attributes, np.random.default_rng([case.seed, 1, case.index]), size)
    edges = sobel_map(phantom.image)
    for path, array in zip(paths, (phantom.image, phantom.nodule, edges, phantom.thyroid), strict=True):
        with atomic_path(path, durable=False) as temporary:
            Image.fromarray(array).save(temporary, format="PNG", compress_level=1)


def write_dataset(
    output_dir: str | Path,
    count: int,
    seed: int,
    preset: str = "longtail",
    size: int = 128,
    workers: int = 2,
    dry_run: bool = False,
) -> Manifest:
    """Write a phantom data set with its manifest; running it again renders only what is missing.

    Args:
        count: training images; the preset's held-out splits come on top.
        size: image side in pixels.
        dry_run: write nothing.
    Raises InputError for an unknown preset, a count that is not positive, or a folder that holds something else.
    """
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}")
    if count < 1:
        raise InputError(f"--count {count}: must be at least 1")
    output_dir = Path(output_dir)
    settings = {"seed": seed, "preset": preset, "count": count, "size": size}
    check_settings(output_dir, settings)
    knowledge = Knowledge.load("thyroid")
    particular = frozenset(term for subtype in knowledge.subtypes.values() for term in subtype.particular)
    cases = plan(count, seed, preset, particular)
    data = Manifest(output_dir / FILE_NAME, tuple(_row(case, knowledge) for case in cases))
    if dry_run:
        return data
    write_json(output_dir / SETTINGS, settings)  # first, so that no image is ever taken for one of another data set
    for folder in FOLDERS:
        (output_dir / folder).mkdir(parents=True, exist_ok=True)
    job = partial(_render_case, output_dir=output_dir, size=size)
    # Spawned, not forked: a forked worker can hang on a lock that one of OpenCV's threads held.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for _ in tqdm(pool.map(job, cases, chunksize=16), total=len(cases), desc="phantom", unit="image"):
            pass
    write(data.path, data.rows)
    return data


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder that holds another data set than the one that `settings` make."""
    held = any((output_dir / name).exists() for name in (FILE_NAME, *FOLDERS))
    if held and not (output_dir / SETTINGS).exists():
        raise InputError(
            f"--output_dir {output_dir}: holds a data set without {SETTINGS}, so what it was made with is not known; "
            "give another folder"
        )
    if changed := changed_settings(output_dir / SETTINGS, settings):
        differences = ", ".join(f"--{change}" for change in changed)
        raise InputError(
            f"--output_dir {output_dir}: holds a phantom made with other settings: {differences}; give the old values "
            "to resume, or another folder"
        )


def _row(case: Case, knowledge: Knowledge) -> Row:
    text_fg, text_bg = knowledge.compose(case.label, case.attributes)
    name = f"{case.index:06d}.png"
    return Row(
        file_name=f"images/{name}",
        condition_fg=f"condition_fg/{name}",
        condition_bg=f"condition_bg/{name}",
        organ_mask=f"organ_mask/{name}",
        text_fg=text_fg,
        text_bg=text_bg,
        label=case.label,
        patient_id=case.patient_id,
        split=case.split,
        attributes=case.attributes,
        plane=case.attributes["direction"].removesuffix(" plane"),
        source="phantom",
    )
