"""How well does a base listen to its prompts?

    python -m benchmarks.prompts --model assets/tiny-base --data_dir runs/base/data

Two measures on held-out rows. `rise`: how much the squared error near the lesion rises, in percent, when one term of
the prompt is replaced by another one of its category, noise and all else equal; where a term changes nothing the U-Net
does not read it. Its standard error is over images. `seen`: share of images drawn from the prompts in which the
attribute net sees the term that was asked for; beside it that share of the real images and of their reconstructions.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.autoencoder import reconstruct
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
BATCH = 20


def other_terms(rows: Manifest, category: str, rng: np.random.Generator) -> list[str]:
    """For each row another term of the category, one that occurs in these rows."""
    stated = [row.attributes[category] for row in rows.rows]
    terms = sorted(set(stated))
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


def rises(parts: Components, rows: Manifest, knowledge: Knowledge, categories: Sequence[str]) -> dict[str, list[float]]:
    """category -> [rise in percent, its standard error]."""
    size = parts.vae.config["sample_size"]
    pixels = torch.from_numpy(load_images(rows, size).astype(np.float32) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    with torch.no_grad():
        encoded = torch.cat([parts.vae.encode(x, return_dict=False)[0].mode() for x in pixels.split(BATCH)])
    latents = encoded * parts.vae.config["scaling_factor"]
    near = np.stack([grow(mask.astype(np.uint8), size // 16) for mask in load_masks(rows, size)])
    weights = F.adaptive_avg_pool2d(torch.from_numpy(near).float()[:, None], latents.shape[-1])
    rng = np.random.default_rng(0)

    def states(changes: dict[str, list[str]]) -> Tensor:
        texts = [
            ", ".join(knowledge.compose(str(row.label), {**row.attributes, **{k: v[i] for k, v in changes.items()}}))
            for i, row in enumerate(rows.rows)
        ]
        with torch.no_grad():
            return torch.cat(
                [
                    encode_text(texts[i : i + BATCH], parts.tokenizer, parts.text_encoder)
                    for i in range(0, len(texts), BATCH)
                ]
            )

    own = states({})
    base = {t: errors(parts, latents, weights, own, t) for t in TIMESTEPS}
    found = {}
    for name in tqdm(categories, desc="change terms"):
        changed = states({name: other_terms(rows, name, rng)})
        rise = torch.stack([errors(parts, latents, weights, changed, t) - base[t] for t in TIMESTEPS]).mean(0)
        scale = 100 / torch.stack(list(base.values())).mean()
        found[name] = [float(rise.mean() * scale), float(rise.std() / len(rise) ** 0.5 * scale)]
    return found


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
    parser.add_argument("--steps", type=int, default=20, help="of DDIM (default: %(default)s)")
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    args = parser.parse_args(argv)
    if args.most < 2:
        raise InputError(f"--most {args.most}: must be at least 2")
    every = read_split(args.data_dir, args.split, synthetic=False)
    rows = Manifest(every.path, every.rows[:: max(1, len(every.rows) // args.most)][: args.most])
    knowledge, net = Knowledge.load("thyroid"), load_attribute_net("assets/judges/attributes")
    parts = load_components(args.model)
    listed = rises(parts, rows, knowledge, list(net.categories))
    real = load_images(rows, net.resolution)
    sets = {
        "drawn": drawn(args.model, rows, args.steps, args.guidance_scale),
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
