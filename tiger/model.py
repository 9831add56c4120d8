"""DualControlNet: the FG-Encoder, the BG-Encoder and their fusion, as one model beside the frozen U-Net."""

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ConfigMixin, ControlNetModel, ModelMixin, UNet2DConditionModel
from torch import nn

from tiger import attention
from tiger.errors import InputError
from tiger.files import read_json, write_json
from tiger.fusion import AttentionalFusion
from tiger.terms import TermFrequencies

Residuals = list[torch.Tensor]  # (B, C_i, h_i, w_i) for each skip connection, then the middle block: 12 + 1 for SD
FREQUENCIES = "term_frequencies.json"


class DualControlNet(ModelMixin, ConfigMixin):
    """Two ControlNets with prompts of their own, and the fusion of their residuals (paper fig. 2).

    On disk: `fg/` and `bg/`, each a plain diffusers `ControlNetModel`, `fusion/`, `config.json` and
    `term_frequencies.json`. Weights are safetensors.
    """

    config_name = "config.json"
    _supports_gradient_checkpointing = True

    def __init__(
        self,
        fg: ControlNetModel,
        bg: ControlNetModel,
        fusion: AttentionalFusion,
        *,
        term_weighting: str = "mult",
        knowledge: str = "thyroid",
        term_frequencies: TermFrequencies | None = None,
    ):
        """knowledge: name or path of the knowledge base whose terms are weighted; kept for inference."""
        super().__init__()
        # Config keys must not be called fg, bg or fusion: diffusers would return them in place of the submodules.
        self.register_to_config(term_weighting=term_weighting, knowledge=knowledge)
        self.fg = fg
        self.bg = bg
        self.fusion = fusion
        self.term_weighting = term_weighting
        self.term_frequencies = term_frequencies or TermFrequencies()
        attention.install(fg, term_weighting)  # processors are not saved with a model

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        term_weighting: str = "mult",
        fusion: str = "aff",
        fusion_gain: float = 1.0,
        vae_scale_factor: int = 8,
        knowledge: str = "thyroid",
    ) -> Self:
        """Both encoders start as copies of the U-Net's encoder; the zero convolutions make the start an identity."""
        fg = control_encoder(unet, vae_scale_factor)
        bg = control_encoder(unet, vae_scale_factor)
        outputs = [*fg.controlnet_down_blocks, fg.controlnet_mid_block]
        channels = [block.out_channels for block in outputs]
        fused = AttentionalFusion(channels, kind=fusion, gain=fusion_gain)
        model = cls(fg, bg, fused, term_weighting=term_weighting, knowledge=knowledge)
        # In float32, whatever the frozen U-Net runs in: this model is trained.
        return model.to(unet.device)  # type: ignore[arg-type]  # diffusers' wrapper hides `self`

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        fg_states: torch.Tensor,
        bg_states: torch.Tensor,
        fg_cond: torch.Tensor | None,
        bg_cond: torch.Tensor | None,
        *,
        term_weights: torch.Tensor | None = None,
        fg_keep: torch.Tensor | None = None,
        bg_keep: torch.Tensor | None = None,
        fg_scale: float = 1.0,
        bg_scale: float = 1.0,
        paths: str = "both",
    ) -> Any:
        """Fused residuals, middle block last.

        sample: noised latents (B, C, h, w). timestep: (B,) or scalar. states: (B, L, D) of each encoder's own prompt.
        cond: (B, 1 or 3, H, W) in [0, 1], mask and Sobel map; None leaves that encoder out for the whole batch.
        term_weights: (B, L), FG-Encoder only. keep: (B,) bool, False leaves the encoder out for that image.
        Where one encoder is left out the result is the other's residuals as they are (W = 1); without both, zeros.
        scale: factor on the encoder's residuals, before fusion.
        paths: where gradients go, besides the fusion. "both" encoders; "fg" or "bg" only (the other runs without a
        graph); "split" returns two lists of equal values, the first for the FG-Encoder, the second for the BG-Encoder.
        """
        kwargs = None if term_weights is None or self.term_weighting == "off" else {"term_weights": term_weights}
        fg = self._encode(self.fg, sample, timestep, fg_states, fg_cond, fg_keep, fg_scale, paths != "bg", kwargs)
        bg = self._encode(self.bg, sample, timestep, bg_states, bg_cond, bg_keep, bg_scale, paths != "fg", None)
        if fg is None or bg is None:
            return _lone(fg, bg, paths)
        both = _both_kept(sample.shape[0], fg_keep, bg_keep, sample.device)
        if paths == "split":
            return self._fuse(fg, _detach(bg), both), self._fuse(_detach(fg), bg, both)
        return self._fuse(fg, bg, both)

    def _encode(
        self,
        net: ControlNetModel,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        cond: torch.Tensor | None,
        keep: torch.Tensor | None,
        scale: float,
        train: bool,
        cross_attention_kwargs: dict[str, torch.Tensor] | None,
    ) -> Residuals | None:
        """Residuals of one encoder, zero for the images it is left out of."""
        if cond is None:
            return None
        if cond.shape[1] == 1:
            cond = cond.expand(-1, 3, -1, -1)  # (B, 1, H, W) -> (B, 3, H, W): ControlNets take RGB
        with torch.set_grad_enabled(train and torch.is_grad_enabled()):
            down, middle = net(
                sample, timestep, states, cond, scale, cross_attention_kwargs=cross_attention_kwargs, return_dict=False
            )
        residuals = [*down, middle]
        if keep is None:
            return residuals
        return [r * keep[:, None, None, None].to(r) for r in residuals]

    def _fuse(self, fg: Residuals, bg: Residuals, both: torch.Tensor | None) -> Residuals:
        """Fusion for the images with both encoders; for the others the plain sum, one side of which is zero."""
        fused = self.fusion(fg, bg)
        if both is None:
            return fused
        return [torch.where(both, x, f + b) for x, f, b in zip(fused, fg, bg, strict=True)]

    @contextlib.contextmanager
    def embedded_conditions(
        self, fg_cond: torch.Tensor | None, bg_cond: torch.Tensor | None
    ) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Embed the conditions once for many steps: inside, `forward` takes the yielded (B, C, h, w) as conditions."""
        embedders = self.fg.controlnet_cond_embedding, self.bg.controlnet_cond_embedding
        conditions = []
        for embedder, cond in zip(embedders, (fg_cond, bg_cond), strict=True):
            conditions.append(None if cond is None else embedder(cond.expand(-1, 3, -1, -1)))
        try:
            for net in (self.fg, self.bg):
                net.register_module("controlnet_cond_embedding", nn.Identity())
            yield conditions[0], conditions[1]
        finally:
            self.fg.controlnet_cond_embedding, self.bg.controlnet_cond_embedding = embedders

    def save_pretrained(self, save_directory: str | os.PathLike, **_: Any) -> None:
        """Write the folder that `from_pretrained` reads. diffusers' other options are ignored."""
        folder = Path(save_directory)
        for name in ("fg", "bg", "fusion"):
            getattr(self, name).save_pretrained(str(folder / name))
        self.save_config(str(folder))
        write_json(folder / FREQUENCIES, dict(sorted(self.term_frequencies.counts.items())))

    @classmethod
    def from_pretrained(  # type: ignore[override]  # two ControlNets and a fusion have no single weights file
        cls, pretrained_model_name_or_path: str | os.PathLike, torch_dtype: torch.dtype | None = None, **_: Any
    ) -> Self:
        """Read a folder that `save_pretrained` wrote, in evaluation mode.

        Raises InputError where a part is missing.
        """
        folder = Path(pretrained_model_name_or_path)
        parts = ("fg/config.json", "bg/config.json", "fusion/config.json", cls.config_name, FREQUENCIES)
        missing = [part for part in parts if not (folder / part).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}: give the controlnet folder that finetune wrote")
        options: dict[str, Any] = {"torch_dtype": torch_dtype, "use_safetensors": True}
        config = read_json(folder / cls.config_name)
        model = cls(
            ControlNetModel.from_pretrained(str(folder / "fg"), **options),
            ControlNetModel.from_pretrained(str(folder / "bg"), **options),
            AttentionalFusion.from_pretrained(str(folder / "fusion"), **options),
            term_weighting=config["term_weighting"],
            knowledge=config["knowledge"],
            term_frequencies=TermFrequencies(read_json(folder / FREQUENCIES)),
        )
        for parameter in model.parameters():
            # A mapped file has its own alignment, which changes sums in their last digits: a resumed run would differ.
            parameter.data = parameter.data.clone()
        return model.eval()


def control_encoder(unet: UNet2DConditionModel, vae_scale_factor: int = 8) -> ControlNetModel:
    """A float32 ControlNet on the CPU, copied from the U-Net's encoder and middle block.

    `ControlNetModel.from_unet` drops `addition_embed_type_num_heads` and takes the VAE's factor to be 8, so the
    configuration is built here: every option that both classes know.
    """
    known = inspect.signature(ControlNetModel.__init__).parameters
    config = {name: value for name, value in unet.config.items() if name in known}
    # One convolution at full size, then one with stride 2 for each halving by the VAE: ControlNet's (16, 32, 96, 256)
    # for a factor of 8. A base narrower than Stable Diffusion gets half of each, and no more than its own width, or
    # these convolutions on whole images would take most of a step.
    stages = int(math.log2(vae_scale_factor)) + 1
    widths = ((16, 32, 96) + (256,) * stages)[:stages]
    widest = unet.config["block_out_channels"][0]
    config["conditioning_embedding_out_channels"] = [
        width if widest >= 320 else min(width // 2, widest) for width in widths
    ]
    net = ControlNetModel(**config)
    # torch's own initial weights shrink the condition to nothing on its way through these layers, and control would set
    # in late. SiLU halves small values: with a gain of 2 the condition keeps its size. The last layer stays zero.
    embedding: Any = net.controlnet_cond_embedding
    for layer in (embedding.conv_in, *embedding.blocks):
        nn.init.normal_(layer.weight, std=2 / math.sqrt(layer.weight[0].numel()))
        nn.init.zeros_(layer.bias)
    names = net.state_dict().keys()
    net.load_state_dict({k: v for k, v in unet.state_dict().items() if k in names}, strict=False)
    return net


def compile_blocks(network: UNet2DConditionModel | ControlNetModel) -> None:
    """Compile in place the blocks that the network repeats: regional compilation, minutes sooner than the whole.

    Names and values of the weights stay as they are. Frozen and trained copies at each width are compiled apart, on
    first use.
    """
    from torch._dynamo import config as dynamo  # a second to import
    from torch._functorch import config as functorch

    dynamo.recompile_limit = max(dynamo.recompile_limit, 128)
    functorch.donated_buffer = False  # separate_surrogate goes back through the U-Net twice
    network._repeated_blocks = ["ResnetBlock2D", "BasicTransformerBlock"]  # type: ignore[assignment]  # ControlNets name none
    network.compile_repeated_blocks(dynamic=False)


def unet_with_residuals(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    states: torch.Tensor,
    residuals: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    """One U-Net pass with the residuals added to its skip connections and middle block: (B, C, h, w).

    diffusers adds them after the encoder has run, so the frozen encoder leaves no autograd graph. What is given is
    brought to the U-Net's own precision.
    """
    dtype = unet.conv_in.weight.dtype
    sample, states = sample.to(dtype), states.to(dtype)
    if residuals is None:
        return unet(sample, timestep, encoder_hidden_states=states).sample
    residuals = [residual.to(dtype) for residual in residuals]
    return unet(
        sample,
        timestep,
        encoder_hidden_states=states,
        down_block_additional_residuals=tuple(residuals[:-1]),
        mid_block_additional_residual=residuals[-1],
    ).sample


def separate_surrogate(
    for_fg: Residuals,
    for_bg: Residuals,
    decode: Callable[[Residuals], torch.Tensor],
    losses: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    loss_scale: float | torch.Tensor = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scalar whose gradient is that of `L_FG` in the FG-Encoder, of `L_BG` in the BG-Encoder, of both in the fusion.

    for_fg, for_bg: `forward(…, paths="split")`. decode: residuals -> prediction, one frozen U-Net pass. losses:
    prediction -> (L_FG, L_BG). loss_scale: the fp16 gradient scaler's factor, or half-precision gradients through the
    U-Net may underflow; it cancels out. Returns the surrogate (its value means nothing) and the two losses, detached.
    """
    leaves = [residual.detach().requires_grad_() for residual in for_fg]
    l_fg, l_bg = losses(decode(leaves))
    g_fg = torch.autograd.grad(l_fg * loss_scale, leaves, retain_graph=True)
    g_bg = torch.autograd.grad(l_bg * loss_scale, leaves)
    products = [_dot(r, g) for r, g in zip([*for_fg, *for_bg], [*g_fg, *g_bg], strict=True)]
    return torch.stack(products).sum() / loss_scale, l_fg.detach(), l_bg.detach()


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of products, in float32 at least."""
    dtype = torch.promote_types(a.dtype, torch.float32)
    return (a.to(dtype) * b.to(dtype)).sum()


def _detach(residuals: Residuals) -> Residuals:
    return [residual.detach() for residual in residuals]


def _lone(fg: Residuals | None, bg: Residuals | None, paths: str) -> Any:
    """The result when one encoder is left out for the whole batch."""
    alone = fg if fg is not None else bg
    if alone is None:
        raise ValueError("both conditions are None: run the U-Net without control instead")
    if paths != "split":
        return alone
    return (alone, _detach(alone)) if bg is None else (_detach(alone), alone)


def _both_kept(
    batch_size: int, fg_keep: torch.Tensor | None, bg_keep: torch.Tensor | None, device: torch.device
) -> torch.Tensor | None:
    """(B, 1, 1, 1) bool, True where neither encoder is left out; None where that is the whole batch by default."""
    if fg_keep is None and bg_keep is None:
        return None
    both = torch.ones(batch_size, dtype=torch.bool, device=device)
    for keep in (fg_keep, bg_keep):
        if keep is not None:
            both = both & keep.bool().to(device)
    return both[:, None, None, None]
