"""The coarse stage: noised latents and the full prompt in, the U-Net's ε- or v-error out (paper eq. 4)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModel

from tiger import diffusion
from tiger.components import Components
from tiger.dataset import TextCache, sample_latents
from tiger.pipeline import TigerPipeline
from tiger.tokenizer import encode_text, token_ids
from tiger.trainer import SampleNoise, image_grid

GUIDANCE_SCALE, GUIDANCE_RESCALE = 3.0, 0.7  # of the validation grid


class CoarseModel(nn.Module):
    """The U-Net, and the text encoder where it is trained too, in one module."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None):
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """noisy (B, C, h, w); text: token ids (B, L) where the text encoder is trained, else its states (B, L, D)."""
        states = text if self.text_encoder is None else self.text_encoder(text)[0]
        return self.unet(noisy, timesteps, states).sample


class CoarseStage:
    """Trains `components.unet` in place. See trainer.Stage."""

    def __init__(
        self,
        components: Components,
        shown: list[dict[str, Any]],
        device: torch.device,
        *,
        train_text_encoder: bool,
        learning_rate: float,
        weight_decay: float,
        snr_gamma: float | None,
        text_dropout: float,
        text_cache_size: int,
        validation_inference_steps: int,
    ):
        """shown: dataset items with images, for the validation grid."""
        self.components = components
        self.shown = shown
        self.device = device
        self.snr_gamma = snr_gamma
        self.text_dropout = text_dropout
        self.validation_inference_steps = validation_inference_steps
        self.noise_schedule = DDPMScheduler.from_config(components.scheduler.config)
        components.unet.to(device).requires_grad_(True)
        text_encoder = components.text_encoder.to(device).requires_grad_(train_text_encoder)
        self.model = CoarseModel(components.unet, text_encoder if train_text_encoder else None).train()
        self.trainable: nn.Module = self.model
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
        ]
        # What the model takes in place of a prompt: states of a frozen text encoder, token ids for one in training.
        if train_text_encoder:
            self.read_text = lambda texts: token_ids(texts, components.tokenizer)
        else:
            self.read_text = TextCache(
                lambda texts: encode_text(texts, components.tokenizer, text_encoder), text_cache_size
            )

    def loss(
        self, batch: dict[str, Any], noise: SampleNoise, step: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Mean squared error of the prediction; prompts are dropped at random."""
        moments = batch["moments"].to(self.device)  # (B, 2C, h, w)
        shape = (moments.shape[1] // 2, *moments.shape[2:])
        latents = sample_latents(self.components.vae, moments, noise.randn(shape))
        timesteps = noise.randint(self.noise_schedule.config.num_train_timesteps)
        epsilon = noise.randn(shape)
        noisy = diffusion.add_noise(self.noise_schedule, latents, epsilon, timesteps)
        text = drop(self.read_text, batch["text"], noise.rand() < self.text_dropout)
        prediction = self.trainable(noisy, timesteps, text)
        weights = None
        if self.snr_gamma:
            weights = diffusion.min_snr_weights(self.noise_schedule, timesteps, self.snr_gamma)
        target = diffusion.target(self.noise_schedule, latents, epsilon, timesteps)
        loss = diffusion.loss(prediction, target, weights)
        return loss, {"loss": loss.detach()}

    def save(self, folder: Path) -> None:
        """Weights in diffusers' layout."""
        self.model.unet.save_pretrained(str(folder / "unet"))
        if self.model.text_encoder is not None:
            self.model.text_encoder.save_pretrained(str(folder / "text_encoder"))

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        self.model.unet.load_state_dict(UNet2DConditionModel.from_pretrained(str(folder / "unet")).state_dict())
        if self.model.text_encoder is not None:
            saved = CLIPTextModel.from_pretrained(str(folder / "text_encoder"))
            self.model.text_encoder.load_state_dict(saved.state_dict())

    def validate(self) -> Image.Image:
        """Above real images, below what the model draws from their prompts."""
        parts = self.components
        pipeline = TigerPipeline(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler)
        pipeline.set_progress_bar_config(disable=True)
        real = torch.stack([item["image"] for item in self.shown])  # (B, 3, H, W)
        drawn = pipeline(
            [item["text_fg"] for item in self.shown],
            [item["text_bg"] for item in self.shown],
            branches="none",
            num_inference_steps=self.validation_inference_steps,
            guidance_scale=GUIDANCE_SCALE,
            guidance_rescale=GUIDANCE_RESCALE,
            height=real.shape[2],
            width=real.shape[3],
            generator=[torch.Generator(self.device).manual_seed(seed) for seed in range(len(self.shown))],
            output_type="pt",
        ).images
        return image_grid([real / 2 + 0.5, drawn])

    def export(self, folder: Path) -> None:
        """A plain StableDiffusionPipeline."""
        parts = self.components
        StableDiffusionPipeline(
            parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler,
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(str(folder))  # fmt: skip


def drop(read_text: Any, texts: list[str], dropped: torch.Tensor) -> torch.Tensor:
    """(B, …) what the model takes for each of B prompts, on the device of `dropped` (B,); where True, for ""."""
    text, empty = read_text(texts).to(dropped.device), read_text([""]).to(dropped.device)
    return torch.where(dropped.view(-1, *[1] * (text.ndim - 1)), empty, text)
