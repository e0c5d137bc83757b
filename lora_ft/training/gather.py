"""The adapter's weights as one whole, whatever holds pieces of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def gather_adapter(trainer: Any) -> dict[str, Tensor] | None:
    """The trained parameters by name, on the CPU of the first rank; None where every rank holds them whole.

    Every rank must call this. Saving what a ZeRO-3 rank holds by itself writes tensors of size zero (trl#4416).
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if any(hasattr(parameter, "ds_id") for parameter in trained.values()):
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: parameter.detach().to("cpu", copy=True) for name, parameter in trained.items()}
    if any(hasattr(parameter, "full_tensor") for parameter in trained.values()):  # FSDP2's DTensor
        return {name: parameter.full_tensor().detach().to("cpu", copy=True) for name, parameter in trained.items()}
    return None
