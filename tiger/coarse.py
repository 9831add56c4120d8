"""The coarse stage: noised latents and the full prompt in, the U-Net's ε- or v-error out (paper eq. 4)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from torch import nn
from transformers import CLIPTextModel

from tiger import diffusion
from tiger.components import Components
from tiger.dataset import TextCache
from tiger.files import write_json
from tiger.pipeline import TigerPipeline
from tiger.stage import Losses, SampleNoise, draw, image_grid, noised
from tiger.tokenizer import encode_text, token_ids

LAYOUT = {  # of the finished model: folder -> (library, class)
    "vae": ("diffusers", "AutoencoderKL"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "scheduler": ("diffusers", "DDIMScheduler"),
}


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
    """Trains `components.unet` in place. See stage.Stage."""

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
        components.to(device)
        components.unet.requires_grad_(True)
        components.text_encoder.requires_grad_(train_text_encoder)
        self.model = CoarseModel(components.unet, components.text_encoder if train_text_encoder else None).train()
        self.trainable: nn.Module = self.model
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(self.model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)
        ]
        # What the model takes in place of prompts: states of a frozen text encoder, token ids for one in training.
        self.read_text: Callable[[list[str]], torch.Tensor] = TextCache(self.encode, text_cache_size)
        if train_text_encoder:
            self.read_text = lambda texts: token_ids(texts, components.tokenizer)

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(B,) prompts -> (B, L, D) hidden states."""
        return encode_text(texts, self.components.tokenizer, self.components.text_encoder)

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Nothing here depends on the whole batch."""

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """Mean squared error of the prediction; prompts are dropped at random."""
        z = noised(self.components, batch["moments"].to(self.device), noise, self.snr_gamma)
        text = self.text(batch["text"], noise.rand() < self.text_dropout)
        prediction = self.trainable(z.latents, z.timesteps, text)
        loss = diffusion.loss(prediction, z.target, z.weights)
        return loss, {"loss": loss.detach()}

    def text(self, prompts: list[str], dropped: torch.Tensor) -> torch.Tensor:
        """What the model takes for B prompts, (B, …); for the empty prompt where `dropped` (B,)."""
        read = self.read_text([*prompts, ""]).to(dropped.device)
        return torch.where(dropped.view(-1, *[1] * (read.ndim - 1)), read[-1:], read[:-1])

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
        real = torch.stack([item["image"] for item in self.shown])  # (B, 3, H, W)
        size = {"height": real.shape[2], "width": real.shape[3]}
        drawn = draw(pipeline, self.shown, self.validation_inference_steps, branches="none", **size)
        return image_grid([real / 2 + 0.5, drawn])

    def export(self, folder: Path) -> None:
        """A plain StableDiffusionPipeline.

        Written part by part: that class, when it is built, changes the scheduler's steps_offset.
        """
        for name in LAYOUT:
            getattr(self.components, name).save_pretrained(str(folder / name))
        absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"), (None, None))
        index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__}
        write_json(folder / "model_index.json", index | LAYOUT | absent | {"requires_safety_checker": False})
