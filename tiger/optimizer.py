"""AdamW, with its state in 32 or in 8 bits."""

from typing import Any

import torch

QUANTIZED = "__bnb_optimizer_quant_state__"  # bitsandbytes nests a parameter's 8-bit state under this key


def adamw(
    parameters: list[torch.nn.Parameter], learning_rate: float, weight_decay: float, eight_bit: bool
) -> torch.optim.Optimizer:
    """AdamW over `parameters`, in one kernel for all of them.

    eight_bit: quantized moments, a quarter of the memory (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861), by
    bitsandbytes, which must be installed.
    """
    if not eight_bit:
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()  # bitsandbytes would do so in its first step, state left behind
    return _flat_adamw8bit()(parameters, lr=learning_rate, weight_decay=weight_decay)


def _flat_adamw8bit() -> Any:
    """bitsandbytes' AdamW8bit whose saved state looks like that of torch's own optimizers: tensors by name."""
    import bitsandbytes  # type: ignore[import-not-found]  # optional

    class FlatAdamW8bit(bitsandbytes.optim.AdamW8bit):
        def state_dict(self) -> dict[str, Any]:
            saved = super().state_dict()
            state = {index: values | values.get(QUANTIZED, {}) for index, values in saved["state"].items()}
            for values in state.values():
                values.pop(QUANTIZED, None)
                values["step"] = torch.tensor(values["step"])
            return {"state": state, "param_groups": saved["param_groups"]}

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            state = {index: values | {"step": int(values["step"])} for index, values in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": state}, move_to_device)

    return FlatAdamW8bit
