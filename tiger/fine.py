"""The fine stage: FG-Encoder, BG-Encoder and fusion learn to steer the frozen coarse U-Net (paper eq. 5-15)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from tiger import diffusion
from tiger.components import Components
from tiger.dataset import TextCache
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet, Residuals, separate_surrogate, unet_with_residuals
from tiger.pipeline import TigerPipeline
from tiger.stage import Losses, SampleNoise, draw, image_grid, noised
from tiger.terms import TermFrequencies, token_weights
from tiger.tokenizer import encode_text


class FineStage:
    """Trains a DualControlNet made from `components.unet`. See stage.Stage."""

    def __init__(
        self,
        components: Components,
        shown: list[dict[str, Any]],
        knowledge: Knowledge,
        accelerator: Accelerator,
        *,
        knowledge_name: str,
        term_weighting: str,
        fusion: str,
        fusion_gain: float,
        update: str,
        bg_region: str,
        learning_rate: float,
        weight_decay: float,
        snr_gamma: float | None,
        timestep_sampling: str,
        text_dropout: float,
        fg_dropout: float,
        bg_dropout: float,
        text_cache_size: int,
        validation_inference_steps: int,
    ):
        """shown: dataset items with images and conditions, for the validation grid."""
        self.components = components
        self.shown = shown
        self.knowledge = knowledge
        self.accelerator = accelerator
        self.update = update
        self.bg_region = bg_region
        self.snr_gamma = snr_gamma
        self.timestep_sampling = timestep_sampling
        self.text_dropout, self.fg_dropout, self.bg_dropout = text_dropout, fg_dropout, bg_dropout
        self.validation_inference_steps = validation_inference_steps
        components.to(accelerator.device)
        self.read_text = TextCache(self.encode, text_cache_size)
        self.model = DualControlNet.from_unet(
            components.unet,
            term_weighting=term_weighting,
            fusion=fusion,
            fusion_gain=fusion_gain,
            vae_scale_factor=components.vae_scale_factor,
            knowledge=knowledge_name,
        ).train()
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # diffusers' wrapper hides `self`
        self.trainable: nn.Module = self.model
        groups = [list(part.parameters()) for part in (self.model.fg, self.model.bg, self.model.fusion)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
            for parameters in groups
            if parameters  # a plain sum has none
        ]
        self.frequencies = TermFrequencies()  # τ of the current global batch

    def encode(self, texts: list[str]) -> torch.Tensor:
        """(B,) prompts -> (B, L, D) hidden states."""
        return encode_text(texts, self.components.tokenizer, self.components.text_encoder)

    def begin_step(self, texts: Sequence[dict[str, str]]) -> None:
        """Count the terms of the global batch for this step, and add them to the table that inference will use."""
        if self.model.term_weighting != "off":
            self.frequencies = TermFrequencies.of([text["text_fg"] for text in texts], self.knowledge)
            self.model.term_frequencies.update(self.frequencies)

    def loss(self, batch: dict[str, Any], noise: SampleNoise, step: int) -> Losses:
        """L_FG over the nodule and L_BG over the rest, each for the parameters that `update` gives it."""
        device = self.accelerator.device
        z = noised(self.components, batch["moments"].to(device), noise, self.snr_gamma, self.timestep_sampling)
        mask, sobel = batch["mask"].to(device), batch["sobel"].to(device)  # (B, 1, H, W)
        dropped = noise.rand() < self.text_dropout
        states, fg_states, bg_states = self.states(batch, dropped)
        term_weights = self.term_weights(batch["text_fg"], dropped)
        keep = {"fg_keep": noise.rand() >= self.fg_dropout, "bg_keep": noise.rand() >= self.bg_dropout}

        def control(paths: str) -> Any:
            encoders = (fg_states, bg_states, mask, sobel)
            return self.trainable(z.latents, z.timesteps, *encoders, term_weights=term_weights, paths=paths, **keep)

        def decode(residuals: Residuals) -> torch.Tensor:
            with self.accelerator.autocast():
                return unet_with_residuals(self.components.unet, z.latents, z.timesteps, states, residuals)

        def losses(prediction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return diffusion.masked_losses(prediction, z.target, mask, self.bg_region, z.weights)

        if self.update == "separate":
            for_fg, for_bg = control("split")
            scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0  # fp16's gradient scale
            loss, l_fg, l_bg = separate_surrogate(for_fg, for_bg, decode, losses, scale)
        elif self.update == "alternate":
            branch = "fg" if step % 2 == 0 else "bg"
            l_fg, l_bg = losses(decode(control(branch)))
            loss = l_fg if branch == "fg" else l_bg
        else:
            l_fg, l_bg = losses(decode(control("both")))
            loss = l_fg + l_bg
        l_fg, l_bg = l_fg.detach(), l_bg.detach()
        return loss, {"loss": l_fg + l_bg, "loss_fg": l_fg, "loss_bg": l_bg}

    def states(self, batch: dict[str, Any], dropped: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Hidden states (B, L, D) of the joint, FG and BG prompts; of the empty prompt where `dropped` (B,)."""
        texts = [*batch["text"], *batch["text_fg"], *batch["text_bg"], ""]
        *kinds, empty = self.read_text(texts).to(dropped.device).split(len(dropped))
        return tuple(torch.where(dropped[:, None, None], empty[-1:], states) for states in kinds)

    def term_weights(self, texts: list[str], dropped: torch.Tensor) -> torch.Tensor | None:
        """Weights (B, L) of the FG prompts' tokens; of the empty prompt's where `dropped` (B,). None if off."""
        if self.model.term_weighting == "off":
            return None
        weights = token_weights([*texts, ""], self.components.tokenizer, self.knowledge, self.frequencies)
        weights = weights.to(dropped.device)
        return torch.where(dropped[:, None], weights[-1:], weights[:-1])

    def save(self, folder: Path) -> None:
        """Encoders, fusion and term frequencies, each ControlNet in diffusers' layout."""
        self.model.save_pretrained(folder / "controlnet")

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        saved = DualControlNet.from_pretrained(folder / "controlnet")
        self.model.load_state_dict(saved.state_dict())
        self.model.term_frequencies = saved.term_frequencies

    def pipeline(self) -> TigerPipeline:
        """The whole model as it stands."""
        parts = self.components
        return TigerPipeline(parts.vae, parts.text_encoder, parts.tokenizer, parts.unet, parts.scheduler, self.model)

    def validate(self) -> Image.Image:
        """From above: real images, their masks, their Sobel maps, and what the model makes of those and the prompts."""
        real, masks, maps = (torch.stack([item[key] for item in self.shown]) for key in ("image", "mask", "sobel"))
        drawn = draw(self.pipeline(), self.shown, self.validation_inference_steps, masks=masks, maps=maps)
        return image_grid([real / 2 + 0.5, masks, maps, drawn])

    def export(self, folder: Path) -> None:
        """A TigerPipeline."""
        self.pipeline().save_pretrained(str(folder))
