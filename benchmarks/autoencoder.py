"""What the autoencoder of a base loses: the judges' figures on real images, and on their reconstructions.

python -m benchmarks.autoencoder --model assets/tiny-base --data_dir runs/base/judges
"""

import argparse
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from eval import attributes
from eval.images import load_images, load_masks, read_split
from eval.judges import load_attribute_net, load_segmenter, mask_iou, segment

BATCH = 16


@torch.no_grad()
def encode(vae: AutoencoderKL, images: np.ndarray) -> Tensor:
    """(N, S, S) uint8 -> (N, C, h, w) latents, not scaled."""
    x = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    encoded: Any = [vae.encode(part) for part in x.split(BATCH)]
    return torch.cat([part.latent_dist.mean for part in encoded])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> np.ndarray:
    """(N, C, h, w) latents, not scaled -> (N, S, S) uint8."""
    decoder: Any = vae  # diffusers' types know tuples alone
    y = torch.cat([decoder.decode(part).sample for part in latents.split(BATCH)])
    return ((y.mean(1).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """(N, S, S) uint8 -> the same, encoded and decoded."""
    return decode(vae, encode(vae, images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/tiny-base", help="diffusers folder with a vae")
    parser.add_argument("--data_dir", required=True, help="phantom data set with a test split")
    parser.add_argument("--judges", default="assets/judges")
    args = parser.parse_args()
    rows = read_split(args.data_dir, "test")
    segmenter = load_segmenter(f"{args.judges}/segmenter")
    attribute_net = load_attribute_net(f"{args.judges}/attributes")
    images, masks = load_images(rows, segmenter.resolution), load_masks(rows, segmenter.resolution)
    stated = [dict(row.attributes) for row in rows.rows]
    copies = reconstruct(AutoencoderKL.from_pretrained(args.model, subfolder="vae"), images)
    error = (images.astype(np.float32) - copies) ** 2
    print(f"{len(images)} images; PSNR {np.mean(10 * np.log10(255**2 / error.mean((1, 2)))):.2f} dB")
    for name, those in (("real", images), ("reconstructed", copies)):
        iou = mask_iou(segment(segmenter, those), masks).mean()
        agreement = attributes.measure(attribute_net, those, stated)
        listed = ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in agreement["categories"].items())
        print(f"{name}: mask IoU {iou:.4f}; attribute accuracy {agreement['accuracy']:.4f} ({listed})")


if __name__ == "__main__":
    main()
