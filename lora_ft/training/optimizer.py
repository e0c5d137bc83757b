"""LoRA+ for any trainer of transformers: the optimizer of the arguments, with a rate of its own for every B."""

from __future__ import annotations

from typing import Any


def create_loraplus(trainer: Any, ratio: float) -> Any:
    """The optimizer that the trainer's arguments name, with the learning rate of every B multiplied by `ratio`.

    Source: Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models".
    """
    from peft.optimizers import create_loraplus_optimizer

    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    return create_loraplus_optimizer(
        model=trainer.model,
        optimizer_cls=kind,
        lr=options.pop("lr"),
        loraplus_lr_ratio=ratio,
        loraplus_lr_embedding=trainer.args.learning_rate,  # PEFT's own is 1e-6, whatever the rate of the others
        loraplus_weight_decay=trainer.args.weight_decay,
        **options,
    )
