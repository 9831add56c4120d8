"""How well does a base listen to its prompts?

    python -m benchmarks.prompts --model assets/tiny-base --data_dir runs/base/data
    python -m benchmarks.prompts --model runs/study/coarse0 --data_dir runs/study/data --term macrocalcification

Three measures on held-out rows. `rise`: how much the squared error near the lesion rises, in percent, when one term of
the prompt is replaced by another one of its category, noise and all else equal; where a term changes nothing the U-Net
does not read it. Its standard error is over images. `seen`: share of images drawn from the prompts in which the
attribute net sees the term that was asked for; beside it that share of the real images and of their reconstructions.
`kept`: the same share of what the U-Net makes, in one step, of the images with little noise added (timestep 200): what
it takes for noise there, it cannot draw either.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.autoencoder import decode, encode, reconstruct
from eval.attributes import measure
from eval.images import load_images, load_masks, read_split
from eval.judges import load_attribute_net
from tiger import diffusion
from tiger.components import Components, load_components
from tiger.conditions import grow
from tiger.errors import InputError, run
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest
from tiger.tokenizer import encode_text

TIMESTEPS = (150, 300, 450, 600, 750, 900)
KEPT_FROM = 200  # the timestep that `kept` starts from: latents are 86 % themselves, 51 % noise
BATCH = 20


def other_terms(rows: Manifest, category: str, among: Manifest, rng: np.random.Generator) -> list[str]:
    """For each row another term of the category, one that occurs among the rows of `among`."""
    stated = [row.attributes[category] for row in rows.rows]
    terms = sorted({row.attributes[category] for row in among.rows})
    if len(terms) < 2:
        return stated
    return [str(rng.choice([term for term in terms if term != own])) for own in stated]


@torch.no_grad()
def errors(parts: Components, latents: Tensor, weights: Tensor, states: Tensor, timestep: int) -> Tensor:
    """(N,) weighted squared errors of the prediction at one timestep; noise is the same at every call."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(timestep))
    at = torch.full((len(latents),), timestep)
    noisy = diffusion.add_noise(parts.noise_schedule, latents, noise, at)
    target = diffusion.target(parts.noise_schedule, latents, noise, at)
    found = torch.cat(
        [parts.unet(x, timestep, s).sample for x, s in zip(noisy.split(BATCH), states.split(BATCH), strict=True)]
    )
    error = (found - target).square().mean(1, keepdim=True)
    return (error * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3))


def latents_of(parts: Components, rows: Manifest) -> Tensor:
    """(N, C, h, w): the images, encoded and scaled."""
    images = load_images(rows, parts.vae.config["sample_size"])
    return encode(parts.vae, images) * parts.vae.config["scaling_factor"]


@torch.no_grad()
def states_of(parts: Components, texts: Sequence[str]) -> Tensor:
    """(N, tokens, D): the prompts, encoded."""
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    return torch.cat([encode_text(list(batch), parts.tokenizer, parts.text_encoder) for batch in batches])


def rises(
    parts: Components,
    rows: Manifest,
    latents: Tensor,
    knowledge: Knowledge,
    categories: Sequence[str],
    among: Manifest,
) -> dict[str, list[float]]:
    """category -> [rise in percent, its standard error]; terms are replaced by others that occur in `among`."""
    size = parts.vae.config["sample_size"]
    near = np.stack([grow(mask.astype(np.uint8), size // 16) for mask in load_masks(rows, size)])
    weights = F.adaptive_avg_pool2d(torch.from_numpy(near).float()[:, None], latents.shape[-1])
    rng = np.random.default_rng(0)

    def states(changes: dict[str, list[str]]) -> Tensor:
        changed = [
            {**row.attributes, **{name: terms[i] for name, terms in changes.items()}} for i, row in enumerate(rows.rows)
        ]
        parts_of = (knowledge.compose(str(row.label), of) for row, of in zip(rows.rows, changed, strict=True))
        return states_of(parts, [", ".join(words) for words in parts_of])

    own = states({})
    base = {t: errors(parts, latents, weights, own, t) for t in TIMESTEPS}
    found = {}
    for name in tqdm(categories, desc="change terms"):
        changed = states({name: other_terms(rows, name, among, rng)})
        rise = torch.stack([errors(parts, latents, weights, changed, t) - base[t] for t in TIMESTEPS]).mean(0)
        scale = 100 / torch.stack(list(base.values())).mean()
        found[name] = [float(rise.mean() * scale), float(rise.std() / len(rise) ** 0.5 * scale)]
    return found


@torch.no_grad()
def kept(parts: Components, rows: Manifest, latents: Tensor) -> np.ndarray:
    """(N, S, S) uint8: the images after noise of timestep KEPT_FROM and one step of the U-Net with their prompts."""
    scheduler: Any = DDIMScheduler.from_config(parts.noise_schedule.config, clip_sample=False)
    scheduler.set_timesteps(scheduler.config["num_train_timesteps"])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    noisy = diffusion.add_noise(parts.noise_schedule, latents, noise, torch.full((len(latents),), KEPT_FROM))
    states = states_of(parts, [row.text for row in rows.rows])
    clean = [
        scheduler.step(parts.unet(x, KEPT_FROM, own).sample, KEPT_FROM, x).pred_original_sample
        for x, own in zip(noisy.split(BATCH), states.split(BATCH), strict=True)
    ]
    return decode(parts.vae, torch.cat(clean) / parts.vae.config["scaling_factor"])


def drawn(model: str, rows: Manifest, steps: int, guidance_scale: float) -> np.ndarray:
    """(N, S, S) uint8: an image from each row's prompt, by plain diffusers."""
    pipe = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = []
    for start in tqdm(range(0, len(rows.rows), BATCH), desc="draw", unit="batch"):
        prompts = [row.text for row in rows.rows[start : start + BATCH]]
        asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "generator": generator}
        made: np.ndarray = pipe(prompts, **asked, output_type="np", return_dict=False)[0]  # (B, S, S, 3) in 0..1
        images.append((made.mean(-1) * 255).round().astype(np.uint8))
    return np.concatenate(images)


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="assets/tiny-base", help="diffusers folder")
    parser.add_argument("--data_dir", required=True, help="phantom data set")
    parser.add_argument("--split", default="valid", help="rows that the base was not trained on (default: %(default)s)")
    parser.add_argument("--most", type=int, default=300, help="rows, evenly spread (default: %(default)s)")
    parser.add_argument("--term", help="only rows that have this term, such as macrocalcification")
    parser.add_argument("--steps", type=int, default=20, help="of DDIM (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    args = parser.parse_args(argv)
    if args.most < 2:
        raise InputError(f"--most {args.most}: must be at least 2")
    every = read_split(args.data_dir, args.split, synthetic=False)
    found = [row for row in every.rows if args.term in (None, *row.attributes.values())]
    if len(found) < 2:
        raise InputError(f"--term {args.term}: {len(found)} rows of {every.path} have it, needed are 2")
    rows = Manifest(every.path, tuple(found[:: max(1, len(found) // args.most)][: args.most]))
    knowledge, net = Knowledge.load("thyroid"), load_attribute_net("assets/judges/attributes")
    parts = load_components(args.model)
    latents = latents_of(parts, rows)
    listed = rises(parts, rows, latents, knowledge, list(net.categories), every)
    real = load_images(rows, net.resolution)
    sets = {
        "drawn": drawn(args.model, rows, args.steps, args.guidance_scale),
        "kept": kept(parts, rows, latents),
        "reconstructed": reconstruct(parts.vae, real),
        "real": real,
    }
    seen = {name: measure(net, images, [dict(row.attributes) for row in rows.rows]) for name, images in sets.items()}
    print(f"{len(rows.rows)} images; rise: mean {np.mean([rise for rise, _ in listed.values()]):.2f} %")
    print("seen: " + ", ".join(f"{name} {values['accuracy']:.3f}" for name, values in seen.items()))
    for name, (rise, error) in listed.items():
        shares = ", ".join(f"{kind} {seen[kind]['categories'][name]['accuracy']:.3f}" for kind in sets)
        print(f"{name}: rise {rise:.2f} ± {error:.2f} %; seen: {shares}")


if __name__ == "__main__":
    sys.exit(run(main))
