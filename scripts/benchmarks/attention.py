"""Attention over 2,048 tokens that are sixteen documents: each apart, and all under a dense mask.

Forward and backward of one layer: 8 heads of 64 entries, 4 of them with keys of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.figure import Figure, Options, take_turns
from benchmarks.loss import timed
from benchmarks.train import compute_on

DOCUMENTS, LENGTH, HEADS, KEY_HEADS, ENTRIES = 16, 128, 8, 4, 64


def measure(options: Options) -> Iterator[Figure]:
    """Milliseconds of both ways, their ratio, and how far apart their results are in float32."""
    device, dtype = compute_on()
    seconds = take_turns({name: timed(way) for name, way in build_ways(device, dtype).items()}, 3 * options.rounds)
    for name, value in seconds.items():
        yield Figure("attention", name, 1000 * value, "ms")
    ratio = seconds["one dense mask"] / seconds["documents apart"]
    yield Figure("attention", "one dense mask / documents apart", ratio, "×", at_least=3)
    import torch

    ways = build_ways(device, torch.float32)
    pairs = zip(*(way() for way in ways.values()), strict=True)
    outputs, *gradients = [(one - other).abs().max().item() for one, other in pairs]
    yield Figure("attention", "largest difference of outputs, float32", outputs, "", at_most=1e-5)
    yield Figure("attention", "largest difference of gradients, float32", max(gradients), "", at_most=1e-5)


def build_ways(device: str, dtype: Any) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Both ways; each gives the output and the gradients of queries, keys and values."""
    import torch
    from torch import nn

    from lora_ft.training.attention import attend_documents
    from lora_ft.training.documents import DocumentMask, Run

    torch.manual_seed(0)
    tokens = DOCUMENTS * LENGTH
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    states = [torch.randn(1, n, tokens, ENTRIES, device=device, dtype=dtype).requires_grad_() for n in heads]
    grad = torch.randn(1, tokens, HEADS, ENTRIES, device=device, dtype=dtype)
    number = torch.arange(tokens, device=device) // LENGTH
    dense = ((number[:, None] == number) & torch.ones(tokens, tokens, device=device, dtype=torch.bool).tril())[
        None, None
    ]
    apart = DocumentMask((Run(DOCUMENTS, LENGTH, None),), torch.device(device))

    def finish(output: Any) -> tuple[Any, ...]:
        gradients = torch.autograd.grad(output, states, grad)
        if device == "cuda":
            torch.cuda.synchronize()
        return (output.detach(), *gradients)

    def documents() -> tuple[Any, ...]:
        return finish(attend_documents(nn.Identity(), states[0], states[1], states[2], apart)[0])

    def masked() -> tuple[Any, ...]:
        attended = nn.functional.scaled_dot_product_attention(*states, attn_mask=dense, enable_gqa=True)
        return finish(attended.transpose(1, 2))

    return {"documents apart": documents, "one dense mask": masked}
