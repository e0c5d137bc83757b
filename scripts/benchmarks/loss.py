"""The loss of 1,024 tokens, a quarter of them supervised: ours, every position, TRL's way, and two matrix products.

Forward and backward to the hidden states; hidden size 512, vocabulary 65,536, a frozen head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.figure import Figure, Options, seconds_of, take_turns
from benchmarks.train import compute_on

TOKENS, HIDDEN, VOCABULARY, SUPERVISED = 1024, 512, 65_536, 256


def measure(options: Options) -> Iterator[Figure]:
    """Milliseconds of each way, medians of turns."""
    ways = {name: timed(way) for name, way in build_ways().items()}
    seconds = take_turns(ways, 3 * options.rounds)
    for name, value in seconds.items():
        yield Figure("loss", name, 1000 * value, "ms")
    yield Figure("loss", "TRL / ours", seconds["TRL"] / seconds["ours"], "×")
    yield Figure("loss", "every position / ours", seconds["every position"] / seconds["ours"], "×")
    yield Figure("loss", "ours / two matrix products", seconds["ours"] / seconds["two matrix products"], "×")


def timed(way: Callable[[], object]) -> Callable[[], float]:
    """Seconds of a way, after one run that warms it up."""
    way()
    return lambda: seconds_of(way)


def build_ways() -> dict[str, Callable[[], object]]:
    """Each way, over the same states and targets."""
    import torch
    from torch import nn
    from trl.trainer.utils import entropy_from_logits

    from lora_ft.training.head import LogitTransform, score_tokens

    device, dtype = compute_on()
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=False, device=device, dtype=dtype).requires_grad_(False)
    states = torch.randn(TOKENS, HIDDEN, device=device, dtype=dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (TOKENS,), device=device)
    chosen = torch.arange(TOKENS, device=device) < SUPERVISED
    masked = labels.masked_fill(~chosen, -100)
    grad = torch.randn(SUPERVISED, VOCABULARY, device=device, dtype=dtype)

    def ours() -> None:
        scores = score_tokens(head, states[chosen], labels[chosen], LogitTransform(VOCABULARY))
        finish(scores.loss.mean())

    def every_position() -> None:
        finish(nn.functional.cross_entropy(head(states).float(), masked))

    def trl() -> None:
        """What `SFTTrainer.compute_loss` does where it has no Triton: the model's loss, then entropy and accuracy."""
        logits = head(states)
        loss = nn.functional.cross_entropy(logits.float(), masked)
        with torch.no_grad():
            (entropy_from_logits(logits[None]) * chosen).sum()
            (logits.argmax(-1) == labels)[chosen].sum()
        finish(loss)

    def products() -> None:
        head(states[:SUPERVISED])
        grad @ head.weight
        synchronize()

    def finish(loss: Any) -> None:
        loss.backward()
        states.grad = None
        synchronize()

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    return {"ours": ours, "TRL": trl, "every position": every_position, "two matrix products": products}
