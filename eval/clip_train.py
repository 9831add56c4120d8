"""CLIP on medical image-text pairs: fine-tune it, then ask it whether images show what their prompts say.

    python -m eval.clip_train train --data_dir D --output_dir R/clip --pretrained_model models/clip-vit-base-patch32
    python -m eval.clip_train train --data_dir D --output_dir R/clip --max_train_steps 2000  # a small one, from nothing
    python -m eval.clip_train evaluate --model R/clip --real D --fake G --output R/clip.json

`evaluate` gives the CLIP score (that of other images' texts beside it) and, category by category, how often the term
that CLIP thinks likeliest is the one the image was asked for: the paper's automated Turing test 3. Both also for real
test images, equally many of each class, as no generator can be asked for more: in the categories that are not `able`
there, CLIP knows nothing, and its agreement says nothing. A generator or a CLIP that was trained on the images or
patients compared with is refused; what could not be checked is in the report. The folder is one of transformers, so it
serves `--extractor` too.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval import statistics
from eval.features import RESIZE, load_whole, preparation
from eval.images import (
    HelpFormatter,
    add_knowledge,
    group_of,
    load_images,
    matched,
    patients_of,
    read_split,
    select_split,
    shuffled,
)
from eval.leakage import refuse_leakage, refuse_trained
from eval.training import METRICS, begin, device, finish, fit, refuse_numbers, shift
from tiger.errors import InputError, run
from tiger.files import read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest

TOKENIZER = Path(__file__).resolve().parents[1] / "assets" / "tiny-base" / "tokenizer"
MAX_LENGTH = 77  # tokens
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MOST_SCALE = float(np.log(100))  # CLIP's own limit (Radford et al. 2021, section 2.5)
BATCH = 64
RESAMPLES = 500


# ------------------------------------------------------------------------------------------------------------- the net


class Clip(nn.Module):
    """A CLIPModel of transformers with its tokenizer and its way to prepare images."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any):
        super().__init__()
        self.model, self.tokenizer, self.processor = model.to(device()), tokenizer, processor
        self.size = int(processor.crop_size["height"])
        self.prepare = preparation(self.size, processor.image_mean, processor.image_std)

    def embed_images(self, images: np.ndarray) -> Tensor:
        """(B, H, W) uint8 -> (B, D) of length 1."""
        features = self.model.get_image_features(pixel_values=self.prepare(images))
        return F.normalize(features.pooler_output, dim=1)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """(B,) -> (B, D) of length 1; cut at 77 tokens."""
        return F.normalize(self.model.get_text_features(**self.tokens(texts)).pooler_output, dim=1)

    def tokens(self, texts: Sequence[str]) -> Any:
        """(B,) -> input_ids and attention_mask, (B, L)."""
        return self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        ).to(device())

    def save(self, folder: Path) -> None:
        """Write a folder of transformers, each file atomically, config.json last."""
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as staged:
            for part in (self.model, self.tokenizer, self.processor):
                part.save_pretrained(staged)
            for path in sorted(Path(staged).iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, folder / path.name)


def load_clip(folder: str | Path) -> Clip:
    """Load a CLIPModel's folder, from safetensors. Raises InputError where a file is missing."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "preprocessor_config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder}: has no {name}; give a folder of transformers' CLIP, weights as safetensors")
    if read_json(folder / "config.json").get("model_type") != "clip":
        raise InputError(f"{folder}/config.json: is no CLIP of transformers (model_type 'clip')")
    return Clip(
        load_whole(CLIPModel, folder),
        CLIPTokenizer.from_pretrained(folder, local_files_only=True),
        CLIPImageProcessor.from_pretrained(folder, local_files_only=True),
    )


def new_clip(resolution: int, width: int, seed: int) -> Clip:
    """A small CLIP from nothing: 16×16 patches; four layers for images, two for texts."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    torch.manual_seed(seed)
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, local_files_only=True)
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": max(1, width // 48)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config=shared | tokens | {"num_hidden_layers": 2, "vocab_size": len(tokenizer)},
        vision_config=shared | {"num_hidden_layers": 4, "image_size": resolution, "patch_size": 16},
        projection_dim=width,
    )
    square = {"height": resolution, "width": resolution}
    processor = CLIPImageProcessor(
        size={"shortest_edge": resolution}, crop_size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD
    )
    return Clip(CLIPModel(config), tokenizer, processor)


@torch.no_grad()
def spread(clip: Clip, images: np.ndarray, texts: Sequence[str]) -> None:
    """Scale the last norm of both towers so that what they give has mean 0 and variance 1 over these pairs, in place.

    A new vision transformer gives every image nearly the same embedding (mean cosine 0.999), and contrastive training
    may stay there. This is the data-dependent initialisation of Krähenbühl et al. 2016, of one layer.
    """
    tokens = clip.tokens(texts)
    towers = (
        (clip.model.vision_model, clip.model.vision_model.post_layernorm, {"pixel_values": clip.prepare(images)}),
        (clip.model.text_model, clip.model.text_model.final_layer_norm, tokens),
    )
    for tower, norm, inputs in towers:
        pooled = tower(**inputs).pooler_output  # (N, width)
        mean, deviation = pooled.mean(0), pooled.std(0) + 1e-4
        norm.weight /= deviation
        norm.bias.copy_((norm.bias - mean) / deviation)


# ------------------------------------------------------------------------------------------------------------ training


def phrases_of(text: str) -> list[str]:
    """The findings of a prompt: what stands between its commas."""
    return [phrase.strip() for phrase in text.split(",") if phrase.strip()]


def some(phrases: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Any number of the phrases, at least one, in their order: so that single terms become known too."""
    count = int(rng.integers(1, len(phrases) + 1))
    return [phrases[int(i)] for i in sorted(rng.choice(len(phrases), count, replace=False))]


def contrastive_loss(similarity: Tensor, fits: Tensor) -> Tensor:
    """Both cross-entropies of CLIP, where a text may fit several images (UniCL, Yang et al. 2022, eq. 1 to 3).

    Args:
        similarity: (B, B) scaled cosines, images by texts.
        fits: (B, B) bool, whether every phrase of the text is said of the image; the diagonal is true.
    """
    targets = fits.to(similarity)
    by_image = F.cross_entropy(similarity, targets / targets.sum(1, keepdim=True))
    by_text = F.cross_entropy(similarity.T, (targets / targets.sum(0, keepdim=True)).T)
    return (by_image + by_text) / 2


def train(args: argparse.Namespace, command: str) -> None:
    """Train on split `train`, measure on `test`, save."""
    rows = read_split(args.data_dir, "train", synthetic=False, knowledge=args.knowledge)
    held_out = read_split(args.data_dir, "test", knowledge=args.knowledge)
    knowledge = Knowledge.load(args.knowledge)
    said = [phrases_of(row.text) for row in rows.rows]
    if empty := [row.file_name for row, phrases in zip(rows.rows, said, strict=True) if not phrases]:
        raise InputError(f"{rows.path}: rows without a text: {', '.join(empty[:8])}")
    if args.pretrained_model is None:
        clip = new_clip(args.resolution, args.width, args.seed)
    else:
        clip = load_clip(args.pretrained_model)
    if begin(args, rows, held_out):
        return
    if args.dry_run:
        print(f"{len(rows.rows)} training and {len(held_out.rows)} test images: nothing trained")
        return
    images, every = load_images(rows, clip.size), [set(phrases) for phrases in said]
    if args.pretrained_model is None:
        rng = np.random.default_rng(args.seed)
        sample = rng.choice(len(images), min(BATCH, len(images)), replace=False)
        spread(clip, images[sample], [", ".join(some(said[i], rng)) for i in sample])

    def loss(batch: np.ndarray, generator: torch.Generator) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        texts = [some(said[i], rng) for i in batch]
        fits = torch.tensor([[every[i].issuperset(text) for text in texts] for i in batch])
        moved = shift(torch.from_numpy(images[batch]), clip.size // 32, generator)
        similarity = clip.embed_images(moved.numpy()) @ clip.embed_texts([", ".join(text) for text in texts]).T
        scale = clip.model.logit_scale.clamp(max=MOST_SCALE).exp()
        return contrastive_loss(scale * similarity, fits.to(similarity.device))

    speed = fit(
        clip,
        loss,
        lambda rng: rng.choice(len(images), args.train_batch_size, replace=len(images) < args.train_batch_size),
        steps=args.max_train_steps,
        learning_rate=args.learning_rate or (3e-4 if args.pretrained_model is None else 1e-5),
        seed=args.seed,
        folder=Path(args.output_dir),
        description="CLIP",
        weight_decay=0.05,
    )
    metrics = measure(clip, held_out, knowledge, patients_of(held_out.rows))
    clip.save(Path(args.output_dir))
    notes = {"command": command, "split": "test", "resize": RESIZE, "train_n": len(images), "steps_per_second": speed}
    finish(Path(args.output_dir), notes | metrics)
    print(json.dumps(metrics, indent=2))


# ----------------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def measure(clip: Clip, manifest: Manifest, knowledge: Knowledge, patient_of: dict[str, str]) -> dict[str, Any]:
    """CLIP score and attribute agreement of a manifest's images with what their rows say.

    clip_score: 100 · max(0, cosine) of each image and its text (Hessel et al. 2021, without their factor of 2.5).
    shuffled: the same with the text of another row.
    agreement: the plain mean over categories of accuracies; agreement_shuffled: its value against what another row
        says; by_label: agreement for each class; categories: each, with `majority`, what always naming the most
        frequent term would give.
    """
    images = load_images(manifest, clip.size)
    pictures = torch.cat([clip.embed_images(images[i : i + BATCH]) for i in range(0, len(images), BATCH)])  # (N, D)
    texts = [row.text for row in manifest.rows]
    spoken = torch.cat([clip.embed_texts(texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)])  # (N, D)
    groups = [group_of(row, patient_of) for row in manifest.rows]
    other = shuffled(len(texts))  # the row whose text each has instead of its own

    def scores(texts: Tensor) -> np.ndarray:
        return 100 * (pictures * texts).sum(1).clamp(min=0).cpu().numpy()

    hits: dict[str, np.ndarray] = {}  # category -> (N,) 1, 0 or nan where the row does not state it
    chance: list[float] = []  # of each category
    categories: dict[str, dict[str, float]] = {}
    for name, category in knowledge.categories.items():
        terms = list(category.terms)
        stated = np.array([terms.index(t) if (t := row.attributes.get(name)) in terms else -1 for row in manifest.rows])
        if not (stated >= 0).any():
            continue
        found = (pictures @ clip.embed_texts(terms).T).argmax(1).cpu().numpy()
        known = stated >= 0
        hits[name] = np.where(known, found == stated, np.nan)
        chance.append(float((found == stated[other])[stated[other] >= 0].mean()))
        categories[name] = statistics.share_ci(hits[name][known], np.array(groups)[known])
        categories[name]["majority"] = float(np.bincount(stated[known]).max() / known.sum())
    labels = np.array([str(row.label) for row in manifest.rows])
    table = np.stack(list(hits.values()), 1) if hits else np.full((len(labels), 1), np.nan)  # (N, categories)

    def agreement(rows: np.ndarray) -> dict[str, float] | None:
        of, people = table[rows], np.array(groups)[rows]
        if np.isnan(of).all():
            return None
        interval = statistics.cluster_bootstrap_ci(lambda of, _: mean_share(of), of, of, people, RESAMPLES, 0)
        return dict(zip(("value", "low", "high"), interval, strict=True))

    return {
        "n": len(images),
        "clip_score": statistics.mean_ci(scores(spoken), groups),
        "shuffled": statistics.mean_ci(scores(spoken[torch.from_numpy(other).to(spoken.device)]), groups),
        "agreement": agreement(np.ones(len(labels), bool)),
        "agreement_shuffled": float(np.mean(chance)) if chance else None,
        "by_label": {label: agreement(labels == label) for label in np.unique(labels).tolist()},
        "categories": categories,
    }


def mean_share(hits: np.ndarray) -> float:
    """Mean over the categories that any row states of the share of rows that hit: (N, categories) 1, 0 or nan."""
    stated = (~np.isnan(hits)).sum(0)
    return float((np.nansum(hits, 0)[stated > 0] / stated[stated > 0]).mean())


def evaluate(args: argparse.Namespace, command: str) -> None:
    """Measure synthetic images, and real ones beside them."""
    real = read_split(args.real, None, synthetic=False, knowledge=args.knowledge)
    fake = read_split(args.fake, None, synthetic=True, knowledge=args.knowledge)
    test = select_split(real, args.split)
    compared = Manifest(real.path, (*real.select(split="train").rows, *test.rows))
    unchecked = refuse_leakage(compared, [fake]).unchecked + refuse_trained(compared, Path(args.model))
    chosen = matched(fake.rows, test.rows, np.random.default_rng(0))
    fake, test = (replace(m, rows=tuple(m.rows[i] for i in of)) for m, of in zip((fake, test), chosen, strict=True))
    if not test.rows:
        raise InputError(f"{fake.path}: no class in common with split '{args.split}' of {test.path}")
    knowledge = Knowledge.load(args.knowledge)
    clip = load_clip(args.model).eval()
    if args.dry_run:
        print(f"{len(test.rows)} real and {len(fake.rows)} synthetic images: nothing measured")
        return
    patient_of = patients_of(real.rows)
    sides = {name: measure(clip, rows, knowledge, patient_of) for name, rows in (("synthetic", fake), ("real", test))}
    metrics_path = Path(args.model) / METRICS
    made_by = read_json(metrics_path)["command"] if metrics_path.is_file() else ""
    interval = "95 %, bootstrap over patients; a synthetic image belongs to that of its map; of a category's share of "
    interval += "0 or 1, which every resample has too, Wilson's with as many trials as patients"
    head = {"command": command, "model": str(args.model), "model_made_by": made_by, "split": args.split}
    categories = sides["real"]["categories"]
    able = [name for name, of in categories.items() if of["low"] > of["majority"]]
    head |= {"resize": RESIZE, "interval": interval, "unchecked": unchecked, "able": able}
    write_json(args.output, head | sides)
    for name, side in sides.items():
        figures = f"CLIP score {side['clip_score']['value']:.2f} (shuffled {side['shuffled']['value']:.2f})"
        agreed = "no attributes"
        if side["agreement"] is not None:
            agreed = f"agreement {side['agreement']['value']:.3f} (shuffled {side['agreement_shuffled']:.3f})"
        print(f"{name} (n = {side['n']}): {figures}, {agreed}")
    named = f": {', '.join(able)}" if able else ""
    print(f"better on real images than always naming the most frequent term in {len(able)} of {len(categories)}{named}")


# ----------------------------------------------------------------------------------------------------------------- CLI


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m eval.clip_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    modes = parser.add_subparsers(dest="mode", required=True)
    t = modes.add_parser("train", formatter_class=HelpFormatter, allow_abbrev=False)
    t.add_argument("--data_dir", required=True, help="manifest with splits train and test")
    t.add_argument("--output_dir", required=True, help="folder for metrics.json and the model, as transformers has it")
    t.add_argument("--pretrained_model", help="local folder of transformers' CLIP; without it a small one from nothing")
    t.add_argument("--max_train_steps", type=int, default=2000, help="optimizer steps")
    t.add_argument("--train_batch_size", type=int, default=64, help="image-text pairs")
    t.add_argument("--learning_rate", type=float, help="peak; without it 1e-5, from nothing 3e-4")
    t.add_argument("--resolution", type=int, default=128, help="px, of a model from nothing")
    t.add_argument("--width", type=int, default=192, help="of a model from nothing")
    t.add_argument("--seed", type=int, default=0, help="of initialisation, order and phrases")
    e = modes.add_parser("evaluate", formatter_class=HelpFormatter, allow_abbrev=False)
    e.add_argument("--model", required=True, help="what `train` wrote, or any CLIP in transformers' layout")
    e.add_argument("--real", required=True, help="manifest of real images")
    e.add_argument("--fake", required=True, help="manifest of synthetic images")
    e.add_argument("--split", default="test", help="real rows to compare with")
    e.add_argument("--output", required=True, help="JSON file")
    for mode in (t, e):
        add_knowledge(mode)
        mode.add_argument("--dry_run", action="store_true", help="check the input and do nothing")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = _parser().parse_args(argv)
    command = f"python -m eval.clip_train {shlex.join(sys.argv[1:] if argv is None else argv)}"
    if args.mode == "train":
        refuse_numbers(args)
        train(args, command)
    else:
        evaluate(args, command)


if __name__ == "__main__":
    sys.exit(run(main))
