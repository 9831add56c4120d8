"""The attribute net that judges whether an image shows what its prompt says: train it on known attributes, measure it.

python -m eval.attributes train --data_dir runs/phantom --output_dir runs/judges/attributes --max_train_steps 10000
python -m eval.attributes evaluate --data_dir runs/phantom --split test --model runs/judges/attributes

A training that was interrupted goes on when its command is run again.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.images import HelpFormatter, add_knowledge, load_images, load_masks, read_split
from eval.judges import AttributeNet, load_attribute_net, normalise, predict_attributes, save_judge
from eval.training import begin, device, finish, fit, refuse_numbers, shift
from tiger.errors import InputError, name_rows, run
from tiger.files import write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

IGNORED = -100  # cross_entropy's default: a row that does not state a category does not train its head


def encode(rows: Manifest, categories: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """category -> (N,) int64 index of each row's term, or IGNORED where the row does not state it."""
    unknown = [
        f"{row.file_name} ({name}={row.attributes[name]})"
        for row in rows.rows
        for name, terms in categories.items()
        if name in row.attributes and row.attributes[name] not in terms
    ]
    if unknown:
        raise InputError(f"{rows.path}: attribute values that the knowledge base does not have: {name_rows(unknown)}")
    return {
        name: np.array([terms.index(row.attributes[name]) if name in row.attributes else IGNORED for row in rows.rows])
        for name, terms in categories.items()
    }


def agreement(predicted: list[dict[str, str]], stated: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """category -> {n, accuracy, majority}: how often prediction and statement agree, and what always naming the
    most frequent term would give. Only rows that state a category count."""
    result = {}
    for name in predicted[0] if predicted else []:
        pairs = [(p[name], s[name]) for p, s in zip(predicted, stated, strict=True) if name in s]
        if pairs:
            terms = [term for _, term in pairs]
            majority = max(terms.count(term) for term in set(terms)) / len(terms)
            accuracy = sum(p == s for p, s in pairs) / len(pairs)
            result[name] = {"n": len(pairs), "accuracy": accuracy, "majority": majority}
    return result


def measure(net: AttributeNet, images: np.ndarray, stated: list[dict[str, str]]) -> dict[str, Any]:
    """Accuracy per category and its plain mean over the categories; (N, S, S) uint8 images."""
    categories = agreement(predict_attributes(net, images), stated)
    mean = float(np.mean([values["accuracy"] for values in categories.values()]))
    return {"n": len(images), "accuracy": mean, "categories": categories}


def train(args: argparse.Namespace, command: str) -> None:
    """Train on split `train`, watch and measure on `test`, save."""
    torch.manual_seed(args.seed)
    knowledge = Knowledge.load(args.knowledge)
    train_rows = read_split(args.data_dir, "train", knowledge=args.knowledge)
    held_out = read_split(args.data_dir, "test", knowledge=args.knowledge)
    stated = {name for row in train_rows.rows for name in row.attributes}
    categories = {name: list(category.terms) for name, category in knowledge.categories.items() if name in stated}
    if not categories:
        raise InputError(f"{train_rows.path}: no row has `attributes`; this net needs them as its truth")
    targets = {name: torch.from_numpy(values) for name, values in encode(train_rows, categories).items()}
    images, masks = load_images(train_rows, args.resolution), load_masks(train_rows, args.resolution)
    test_images = load_images(held_out, args.resolution)
    test_stated = [dict(row.attributes) for row in held_out.rows]
    if begin(args, train_rows, held_out):
        return
    if args.dry_run:
        print(
            f"{len(images)} training and {len(test_images)} test images, {len(categories)} categories: nothing trained"
        )
        return
    net = AttributeNet(categories, args.width, args.resolution).to(memory_format=torch.channels_last).to(device())

    def loss(rows: np.ndarray, generator: torch.Generator) -> Tensor:
        pair = torch.stack([torch.from_numpy(images[rows]), torch.from_numpy(masks[rows]).to(torch.uint8)], dim=1)
        # Only moved: brightness, detail and definition are what it must tell apart, and a flip swaps the poles.
        pair = shift(pair, args.resolution // 32, generator).to(device())  # (B, 2, S, S)
        seen = normalise(pair[:, 0])
        # Noise that no eye notices, up to 5 grey levels: a judge must not read what cannot be seen.
        amount = 0.04 * torch.rand(len(seen), 1, 1, 1, generator=generator)
        noise = (amount * torch.randn(seen.shape, generator=generator)).to(seen)
        logits, where = net((seen + noise).contiguous(memory_format=torch.channels_last))
        nodule = F.avg_pool2d(pair[:, 1:].float(), 8)  # (B, 1, S/8, S/8): share of each cell
        picked = torch.from_numpy(rows)
        value = F.binary_cross_entropy_with_logits(where, nodule)
        for name, values in logits.items():
            target = targets[name][picked].to(values.device)
            if bool((target != IGNORED).any()):  # the mean over no rows would be nan
                value = value + F.cross_entropy(values, target, ignore_index=IGNORED)
        return value

    speed = fit(
        net,
        loss,
        lambda rng: rng.integers(len(images), size=args.train_batch_size),
        steps=args.max_train_steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        folder=Path(args.output_dir),
        description="attributes",
        validate=lambda step: {"accuracy": measure(net, test_images[:256], test_stated[:256])["accuracy"]},
    )
    metrics = measure(net, test_images, test_stated)
    save_judge(net, args.output_dir)
    notes = {"command": command, "split": "test", "train_n": len(images), "steps_per_second": speed}
    finish(Path(args.output_dir), notes | metrics)
    print(json.dumps(metrics, indent=2))


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Measure a trained attribute net on a split."""
    net = load_attribute_net(args.model)
    rows = read_split(args.data_dir, args.split, knowledge=args.knowledge)
    encode(rows, net.categories)  # values it cannot know are named
    metrics = measure(net, load_images(rows, net.resolution), [dict(row.attributes) for row in rows.rows])
    result = {"command": command, "split": args.split, **metrics}
    if args.output is not None:
        write_json(args.output, result)
    print(json.dumps(result, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m eval.attributes", description=__doc__, allow_abbrev=False)
    modes = parser.add_subparsers(dest="mode", required=True)
    t = modes.add_parser("train", formatter_class=HelpFormatter, allow_abbrev=False)
    t.add_argument("--data_dir", required=True, help="manifest with attributes, condition_fg and splits train, test")
    t.add_argument("--output_dir", required=True, help="folder for config.json, model.safetensors, metrics.json")
    t.add_argument("--max_train_steps", type=int, default=10000, help="optimizer steps")
    t.add_argument("--train_batch_size", type=int, default=32, help="images")
    t.add_argument("--learning_rate", type=float, default=2e-3, help="peak; warm-up, then cosine to 0")
    t.add_argument("--resolution", type=int, default=128, help="px, a multiple of 16")
    t.add_argument("--width", type=int, default=24, help="channels at half resolution")
    t.add_argument("--seed", type=int, default=0)
    t.add_argument("--dry_run", action="store_true", help="check the input and train nothing")
    e = modes.add_parser("evaluate", formatter_class=HelpFormatter, allow_abbrev=False)
    e.add_argument("--data_dir", required=True, help="manifest with attributes")
    e.add_argument("--split", default="test")
    e.add_argument("--model", default="assets/judges/attributes", help="folder of a trained attribute net")
    e.add_argument("--output", help="JSON file; printed in any case")
    for mode in (t, e):
        add_knowledge(mode)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    command = f"python -m eval.attributes {shlex.join(sys.argv[1:] if argv is None else argv)}"
    if args.mode == "train":
        refuse_numbers(args)
        if args.resolution % 16:
            raise InputError(f"--resolution {args.resolution}: must be a multiple of 16")
        train(args, command)
    else:
        evaluate(args, command)


if __name__ == "__main__":
    sys.exit(run(main))
