"""TigerPipeline: prompts, masks, Sobel maps and images -> ultrasound images.

pipe = TigerPipeline.from_pretrained("runs/finetune")
pipe(["malignant, follicular, solid"], ["sonogram transverse plane"], masks=[mask], maps=[sobel],
     generator=[torch.Generator().manual_seed(1)]).images[0].save("nodule.png")
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tiger.diffusion import latent_mask
from tiger.errors import InputError
from tiger.halves import Features, decode, encode
from tiger.knowledge import Knowledge
from tiger.model import DualControlNet, Residuals, unet_with_residuals
from tiger.terms import token_weights
from tiger.tokenizer import encode_text

Images = torch.Tensor | Sequence[Image.Image]
Generators = torch.Generator | list[torch.Generator] | None
# (branches, latents, timestep, whether this step is guided) -> residuals
Control = Callable[[str, torch.Tensor, torch.Tensor, bool], Residuals | None]

# Which conditions each choice of branches needs.
NEEDS = {
    "fused": ("masks", "maps"),
    "fg": ("masks",),
    "bg": ("maps",),
    "fg_then_bg": ("masks", "maps"),
    "none": (),
}

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

_load_knowledge = functools.cache(Knowledge.load)  # the same few words for every batch


class TigerPipeline(DiffusionPipeline):
    """Stable Diffusion with the FG-Encoder, the BG-Encoder and their fusion.

    Without a `controlnet` it is the coarse model, with `branches="none"` only.
    """

    # Not the controlnet: it takes turns with the U-Net at every step, so both stay on the device during sampling.
    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["controlnet"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        controlnet: DualControlNet | None = None,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            controlnet=controlnet,
        )
        self.vae_scale_factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        text_fg: Sequence[str],
        text_bg: Sequence[str],
        *,
        masks: Images | None = None,
        maps: Images | None = None,
        images: Images | None = None,
        strength: float = 1.0,
        branches: str = "fused",
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        reuse_encoder: int = 1,
        control_uncond: str = "null",
        resolution_weighting: bool = False,
        fg_scale: float = 1.0,
        bg_scale: float = 1.0,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], Any] | None = None,
    ) -> ImagePipelineOutput:
        """Make one image a prompt pair, B in all.

        masks: nodule masks, maps: Sobel maps, (B, 1, H, W) in [0, 1]. images: (B, 3, H, W) in [-1, 1]. Or PIL images.
        Sizes come from height and width (pixels), else from the first of these tensors, else from the U-Net's config.
        images with strength in (0, 1) start from those images, noised (refinement, as in img2img). At strength 1
        nothing of them is left, save with fg_then_bg.
        branches: "fused" in one pass, one encoder alone ("fg", "bg"), "none", or "fg_then_bg": FG first (with images,
        only inside the mask), then BG on that result, outside the mask.
        control_uncond: "null" is eq. 13, control in the conditional branch only; "text" controls both, with empty
        prompts for the unconditional one. resolution_weighting: residual i times latent size / its size, which is
        64 / h_i at 512 px (ControlNet §3.4). scales: factors on the residuals of each encoder.
        guidance_interval: guide only at timesteps t with low ≤ t / T ≤ high, T those of training (Kynkäänniemi et al.
        2024, https://arxiv.org/abs/2404.07724, who state it as noise levels σ). Other steps run one branch alone.
        reuse_encoder: run all encoders at every k-th step only (see tiger/halves.py).
        generator: one for each image, so that any image can be made again alone.
        output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1]; "latent" (B, C, h, w) float32, what
        the VAE would decode after division by its scaling factor.
        callback_on_step_end: called as (pipeline, step, timestep, {"latents": (B, C, h, w)}); it may return the latents
        to go on with under the same key. fg_then_bg counts the steps of each stage from 0.
        Raises InputError where arguments contradict each other.
        """
        self._check(text_fg, text_bg, masks, maps, images, strength, branches, control_uncond, generator)
        _check_options(guidance_interval, reuse_encoder, output_type)
        if branches == "none":
            masks = maps = None
        size = self._size(height, width, masks, maps, images)
        masks, maps = self._to_tensor(masks, size, "mask"), self._to_tensor(maps, size, "map")
        images = self._to_tensor(images, size, "image")
        init = None if images is None else self._encode_images(images)

        guided = guidance_scale > 1
        low, high = (share * self.scheduler.config["num_train_timesteps"] for share in guidance_interval)
        states = self._states(_joint(text_fg, text_bg), guided)
        latent_size = [side // self.vae_scale_factor for side in size]
        shape = (len(text_fg), self.unet.config["in_channels"], *latent_size)

        def sample(branches: str, init: torch.Tensor | None, region: torch.Tensor | None, strength: float):
            features: Features | None = None

            def predict(latents: torch.Tensor, t: torch.Tensor, index: int) -> torch.Tensor:
                nonlocal features
                guiding = guided and low <= float(t) <= high
                latents = self.scheduler.scale_model_input(latents, t).to(states.dtype)
                inputs = _double(latents, guiding)
                texts = states[-len(inputs) :]  # without the unconditional half where it is not needed
                if reuse_encoder == 1:
                    residuals = control(branches, latents, t, guiding)
                    output = unet_with_residuals(self.unet, inputs, t, texts, residuals)
                else:
                    _bring_in(self.unet)
                    if features is None or index % reuse_encoder == 0 or len(features.middle) != len(inputs):
                        features = encode(self.unet, inputs, t, texts, control(branches, latents, t, guiding))
                    output = decode(self.unet, features, t, texts)
                return _guide(output.float(), guidance_scale, guidance_rescale) if guiding else output.float()

            # Latents stay in float32, whatever the networks run in: half precision cannot tell √(1−ᾱ) of late steps.
            noise = randn_tensor(shape, generator, self._execution_device, torch.float32)  # type: ignore[arg-type]
            steps = num_inference_steps
            return self._denoise(predict, noise, init, region, steps, strength, generator, callback_on_step_end)

        uncond = control_uncond if guided else "none"
        with self._control(text_fg, text_bg, masks, maps, uncond, resolution_weighting, fg_scale, bg_scale) as control:
            if branches == "fg_then_bg":
                assert masks is not None  # checked above
                nodule = latent_mask(masks, latent_size)
                first = sample("fg", init, None if init is None else nodule, strength)
                latents = sample("bg", first, 1 - nodule, 1.0 if init is None else strength)
            else:
                latents = sample(branches, init, None, strength)

        if output_type == "latent":
            self.maybe_free_model_hooks()
            return ImagePipelineOutput(images=latents)  # type: ignore[arg-type]
        latents = latents.to(self.vae.dtype) / self.vae.config["scaling_factor"]
        decoded = self.vae.decode(latents, return_dict=False)[0]
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=self.image_processor.postprocess(decoded, output_type=output_type))  # type: ignore

    def _denoise(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        noise: torch.Tensor,
        init: torch.Tensor | None,
        region: torch.Tensor | None,
        steps: int,
        strength: float,
        generator: Generators,
        callback: Callable[[Any, int, torch.Tensor, dict[str, Any]], Any] | None,
    ) -> torch.Tensor:
        """The sampling loop: (B, C, h, w) noise -> clean latents, by whatever scheduler the pipeline holds.

        With strength < 1 it starts from `init` (clean latents), noised. With a region, (B, 1, h, w) 0/1, the rest is
        put back to `init`, noised to the same step, after each step (as Stable Diffusion's first inpainting did).
        """
        self.scheduler.set_timesteps(steps, device=noise.device)  # also clears what a multistep solver remembers
        skipped = 0 if init is None else steps - max(round(steps * strength), 1)
        timesteps = self.scheduler.timesteps[skipped:]
        if skipped:
            latents = self.scheduler.add_noise(init, noise, timesteps[:1])
        else:
            latents = noise * self.scheduler.init_noise_sigma
        accepts = inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if "generator" in accepts else {}

        for index, t in enumerate(self.progress_bar(timesteps)):  # type: ignore[call-arg]
            latents = self.scheduler.step(predict(latents, t, index), t, latents, return_dict=False, **extra)[0]
            if region is not None and init is not None:
                last = index + 1 == len(timesteps)
                known = init if last else self.scheduler.add_noise(init, noise, timesteps[index + 1 : index + 2])
                latents = torch.where(region.bool(), latents, known)
            if callback is not None:
                latents = (callback(self, index, t, {"latents": latents}) or {}).get("latents", latents)
        return latents

    @contextlib.contextmanager
    def _control(
        self,
        text_fg: Sequence[str],
        text_bg: Sequence[str],
        masks: torch.Tensor | None,
        maps: torch.Tensor | None,
        uncond: str,
        resolution_weighting: bool,
        fg_scale: float,
        bg_scale: float,
    ) -> Iterator[Control]:
        """A function that gives the U-Net's residuals at a step. Texts and conditions are encoded once, here.

        uncond: the control of the unconditional branch, "text" or "null" (zeros), both giving residuals (2B, …) with
        that branch first at guided steps; (B, …) at others, and with "none", where no step is guided.
        """
        net = self.controlnet
        if net is None or (masks is None and maps is None):
            yield lambda *_: None
            return
        with_empty = uncond == "text"
        fg_states, bg_states = self._states(text_fg, with_empty), self._states(text_bg, with_empty)
        weights = self._term_weights(text_fg, with_empty)
        _bring_in(net)
        with net.embedded_conditions(masks, maps) as (mask_embedding, map_embedding):

            def control(branches: str, latents: torch.Tensor, t: torch.Tensor, guiding: bool) -> Residuals | None:
                both = with_empty and guiding
                inputs = _double(latents, both)
                residuals = net(
                    inputs,
                    t,
                    fg_states[-len(inputs) :],
                    bg_states[-len(inputs) :],
                    None if branches == "bg" else _double(mask_embedding, both),
                    None if branches == "fg" else _double(map_embedding, both),
                    term_weights=None if weights is None else weights[-len(inputs) :],
                    fg_scale=fg_scale,
                    bg_scale=bg_scale,
                )
                if resolution_weighting:
                    residuals = [r * (latents.shape[-2] / r.shape[-2]) for r in residuals]
                if guiding and uncond == "null":
                    residuals = [torch.cat([torch.zeros_like(r), r]) for r in residuals]  # (B, …) -> (2B, …)
                return residuals

            yield control

    def compile_blocks(self, **options: Any) -> None:
        """Compile the networks' blocks in place (torch.compile with `options`): slow at first, faster from then on."""
        nets = [self.unet] if self.controlnet is None else [self.unet, self.controlnet.fg, self.controlnet.bg]
        for net in nets:
            for block in (*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", ())):
                block.compile(**options)
        self.vae.decoder.compile(**options)

    def _states(self, texts: Sequence[str], with_empty: bool) -> torch.Tensor:
        """(B, 77, D) hidden states; with_empty puts those of B empty prompts first: (2B, 77, D)."""
        empty = [""] * len(texts) if with_empty else []
        return encode_text([*empty, *texts], self.tokenizer, self.text_encoder).to(self.unet.dtype)

    def _term_weights(self, texts: Sequence[str], with_empty: bool) -> torch.Tensor | None:
        """(B or 2B, 77) weights from the term frequencies met in training; None where weighting is off."""
        net = self.controlnet
        if net.term_weighting == "off":
            return None
        empty = [""] * len(texts) if with_empty else []
        knowledge = _load_knowledge(net.config["knowledge"])
        return token_weights([*empty, *texts], self.tokenizer, knowledge, net.term_frequencies).to(
            self._execution_device
        )

    def _encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, C, h, w) float32: the posterior's mode, so that nothing is left to chance."""
        posterior = self.vae.encode(images.to(self.vae.dtype)).latent_dist
        return posterior.mode().float() * self.vae.config["scaling_factor"]

    def _size(self, height: int | None, width: int | None, *given: Images | None) -> tuple[int, int]:
        """Height and width in pixels."""
        tensors = [images for images in given if isinstance(images, torch.Tensor)]
        sample_size = self.unet.config["sample_size"]
        sides = sample_size if isinstance(sample_size, (list, tuple)) else (sample_size, sample_size)
        default = tensors[0].shape[-2:] if tensors else [side * self.vae_scale_factor for side in sides]
        size = height or default[0], width or default[1]
        if any(side % self.vae_scale_factor for side in size):
            raise InputError(f"image size {size[0]}×{size[1]}: both must be multiples of {self.vae_scale_factor}")
        return size

    def _to_tensor(self, images: Images | None, size: tuple[int, int], kind: str) -> torch.Tensor | None:
        """(B, 1, H, W) in [0, 1] for a mask (0 or 1) or map, (B, 3, H, W) in [-1, 1] for an image, on the device."""
        if images is None:
            return None
        if isinstance(images, torch.Tensor):
            tensor = images
        else:
            mode = "RGB" if kind == "image" else "L"
            resample = Image.Resampling.NEAREST if kind == "mask" else Image.Resampling.LANCZOS
            arrays = [np.asarray(image.convert(mode).resize((size[1], size[0]), resample)) for image in images]
            tensor = torch.from_numpy(np.stack(arrays)).float() / 255.0  # (B, H, W) or (B, H, W, 3)
            tensor = tensor.permute(0, 3, 1, 2) * 2 - 1 if kind == "image" else tensor[:, None]
        if tensor.shape[-2:] != size:
            raise InputError(f"{kind}s are {tuple(tensor.shape[-2:])} pixels high and wide where {size} was asked for")
        if kind == "mask":
            tensor = (tensor >= 0.5).float()
        return tensor.to(self._execution_device, self.unet.dtype)

    def _check(
        self,
        text_fg: Sequence[str],
        text_bg: Sequence[str],
        masks: Images | None,
        maps: Images | None,
        images: Images | None,
        strength: float,
        branches: str,
        control_uncond: str,
        generator: Generators,
    ) -> None:
        """Raise InputError where the arguments of a call contradict each other."""
        if isinstance(text_fg, str) or isinstance(text_bg, str):
            raise InputError("text_fg and text_bg are lists of prompts, one for each image")
        if branches not in NEEDS:
            raise InputError(f"branches is one of {', '.join(NEEDS)}, not {branches!r}")
        if control_uncond not in ("null", "text"):
            raise InputError(f"control_uncond is null or text, not {control_uncond!r}")
        if not 0 < strength <= 1:
            raise InputError(f"strength lies in (0, 1], not {strength}")
        if branches != "none" and self.controlnet is None:
            raise InputError(f"branches={branches!r} needs a fine-tuned model: this one has no controlnet folder")
        given: dict[str, Any] = {"masks": masks, "maps": maps}
        for name in NEEDS[branches]:
            if given[name] is None:
                raise InputError(f"branches={branches!r} needs {name}")
        given |= {"text_bg": text_bg, "images": images, "generator": generator if isinstance(generator, list) else None}
        for name, value in given.items():
            if value is not None and len(value) != len(text_fg):
                raise InputError(f"{len(text_fg)} text_fg but {len(value)} {name}: give one for each image")


def _check_options(guidance_interval: tuple[float, float], reuse_encoder: int, output_type: str) -> None:
    """Raise InputError where an option has no meaning."""
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise InputError(f"guidance_interval is (low, high) within 0..1, not {guidance_interval}")
    if reuse_encoder < 1:
        raise InputError(f"reuse_encoder is at least 1, not {reuse_encoder}")
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type is one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}")


def _bring_in(net: torch.nn.Module) -> None:
    """With enable_model_cpu_offload, move a network to the device now: only its own forward would do so by itself."""
    hook = getattr(net, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(net)


def _joint(text_fg: Sequence[str], text_bg: Sequence[str]) -> list[str]:
    """The prompt of the U-Net: FG text, then BG text."""
    return [", ".join(part for part in pair if part) for pair in zip(text_fg, text_bg, strict=True)]


def _guide(output: torch.Tensor, scale: float, rescale: float) -> torch.Tensor:
    """Classifier-free guidance, (2B, …) unconditional first -> (B, …): `ε_uncond + β (ε_cond − ε_uncond)` (eq. 13).

    rescale: the share of Lin et al. 2023, https://arxiv.org/abs/2305.08891, §3.4, which undoes the growth of contrast.
    """
    uncond, cond = output.chunk(2)
    guided = uncond + scale * (cond - uncond)
    return rescale_noise_cfg(guided, cond, rescale) if rescale else guided


def _double(tensor: torch.Tensor | None, twice: bool) -> Any:
    """(B, …) -> (2B, …), unconditional branch first."""
    return torch.cat([tensor, tensor]) if twice and tensor is not None else tensor
