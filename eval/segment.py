"""The nodule segmenter that judges generated images: train it on images with exact masks, and measure it.

python -m eval.segment train --data_dir runs/phantom --output_dir runs/judges/segmenter --max_train_steps 6000
python -m eval.segment evaluate --data_dir runs/phantom --split test --model runs/judges/segmenter

A training that was interrupted goes on when its command is run again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.images import HelpFormatter, add_knowledge, load_images, load_masks, read_split
from eval.judges import Segmenter, load_segmenter, mask_iou, normalise, save_judge, segment
from eval.training import begin, device, finish, fit, refuse_numbers, shift
from tiger.errors import InputError, run
from tiger.files import write_json


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 1, S, S) in [-1, 1]: brightness, contrast, noise, blur, so that a generator's looks do not fool the judge."""
    batch = (len(images), 1, 1, 1)
    device = images.device
    gain = 1 + 0.25 * (2 * torch.rand(batch, generator=generator) - 1)
    offset = 0.2 * (2 * torch.rand(batch, generator=generator) - 1)
    sigma = 0.08 * torch.rand(batch, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    blurred = torch.rand(batch, generator=generator) < 0.25
    images = torch.where(blurred.to(device), F.avg_pool2d(images, 3, 1, padding=1, count_include_pad=False), images)
    return (images * gain.to(device) + offset.to(device) + (sigma * noise).to(device)).clamp(-1, 1)


def segmentation_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Binary cross-entropy + soft Dice (Milletari et al. 2016, eq. 2 without squares), both (B, 1, S, S)."""
    probability = torch.sigmoid(logits)
    overlap = (probability * masks).sum((1, 2, 3))
    dice = (2 * overlap + 1) / (probability.sum((1, 2, 3)) + masks.sum((1, 2, 3)) + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - dice).mean()


def measure(net: Segmenter, images: np.ndarray, masks: np.ndarray) -> dict[str, float]:
    """Mean and spread of the per-image IoU and Dice; (N, S, S) uint8 and bool."""
    iou = mask_iou(segment(net, images), masks)
    dice = 2 * iou / (1 + iou)
    return {
        "n": len(iou),
        "iou": float(iou.mean()),
        "iou_median": float(np.median(iou)),
        "dice": float(dice.mean()),
        "iou_below_0.5": float((iou < 0.5).mean()),
    }


def train(args: argparse.Namespace, command: str) -> None:
    """Train on split `train`, watch and measure on `test`, by which nothing is chosen, save."""
    torch.manual_seed(args.seed)
    net = Segmenter(args.width, args.resolution).to(memory_format=torch.channels_last).to(device())
    train_rows = read_split(args.data_dir, "train", knowledge=args.knowledge)
    held_out = read_split(args.data_dir, "test", knowledge=args.knowledge)
    images, masks = load_images(train_rows, args.resolution), load_masks(train_rows, args.resolution)
    test_images, test_masks = load_images(held_out, args.resolution), load_masks(held_out, args.resolution)
    if begin(args, train_rows, held_out):
        return
    if args.dry_run:
        print(f"{len(images)} training and {len(test_images)} test images: nothing trained")
        return

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        pair = torch.stack([torch.from_numpy(images[rows]), torch.from_numpy(masks[rows]).to(torch.uint8)], dim=1)
        pair = shift(pair, args.resolution // 16, generator).to(device())  # (B, 2, S, S)
        inputs = augment(normalise(pair[:, 0]), generator).contiguous(memory_format=torch.channels_last)
        return segmentation_loss(net(inputs), pair[:, 1:].float())

    speed = fit(
        net,
        loss,
        lambda rng: rng.integers(len(images), size=args.train_batch_size),
        steps=args.max_train_steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        folder=Path(args.output_dir),
        description="segmenter",
        validate=lambda step: {"iou": measure(net, test_images[:128], test_masks[:128])["iou"]},
    )
    metrics = measure(net, test_images, test_masks)
    save_judge(net, args.output_dir)
    notes = {"command": command, "split": "test", "train_n": len(images), "steps_per_second": speed}
    finish(Path(args.output_dir), notes | metrics)
    print(json.dumps(metrics))


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Measure a trained segmenter on a split."""
    net = load_segmenter(args.model)
    rows = read_split(args.data_dir, args.split, knowledge=args.knowledge)
    metrics = measure(net, load_images(rows, net.resolution), load_masks(rows, net.resolution))
    result = {"command": command, "split": args.split, **metrics}
    if args.output is not None:
        write_json(args.output, result)
    print(json.dumps(result, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m eval.segment", description=__doc__, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True)
    t = modes.add_parser("train", formatter_class=HelpFormatter, allow_abbrev=False)
    t.add_argument("--data_dir", required=True, help="manifest with condition_fg and the splits train and test")
    t.add_argument("--output_dir", required=True, help="folder for config.json, model.safetensors, metrics.json")
    t.add_argument("--max_train_steps", type=int, default=6000, help="optimizer steps")
    t.add_argument("--train_batch_size", type=int, default=32, help="images")
    t.add_argument("--learning_rate", type=float, default=2e-3, help="peak; warm-up, then cosine to 0")
    t.add_argument("--resolution", type=int, default=128, help="px, a multiple of 32")
    t.add_argument("--width", type=int, default=16, help="channels at half resolution")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--dry_run", action="store_true", help="check the input and train nothing")
    e = modes.add_parser("evaluate", formatter_class=HelpFormatter, allow_abbrev=False)
    e.add_argument("--data_dir", required=True, help="manifest with condition_fg")
    e.add_argument("--split", default="test")
    e.add_argument("--model", default="assets/judges/segmenter", help="folder of a trained segmenter")
    e.add_argument("--output", help="JSON file; printed in any case")
    for mode in (t, e):
        add_knowledge(mode)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    command = f"python -m eval.segment {shlex.join(sys.argv[1:] if argv is None else argv)}"
    if args.mode == "train":
        refuse_numbers(args)
        if args.resolution % 32:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of 32")
        train(args, command)
    else:
        evaluate(args, command)


if __name__ == "__main__":
    sys.exit(run(main))
