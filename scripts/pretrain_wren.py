"""Pre-trains Wren, the embedded base model: a small Llama with its own tokenizer, on the text of `wren_corpus.py`.

    python scripts/pretrain_wren.py --out lora_ft/builtin/models/wren

Weights and optimizer states are fp32, matrix products bf16 (autocast), the saved weights bf16. The same seed on the
same machine and number of threads gives the same weights.
"""

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from wren_corpus import Document, documents

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TOKENIZER_SEED_OFFSET = 1_000_003
"""The tokenizer is trained on other documents than the model, from the same generator."""


def train_tokenizer(vocab_size: int, num_documents: int, seed: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, with the ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = itertools.islice(documents(seed + TOKENIZER_SEED_OFFSET), num_documents)
    bpe.train_from_iterator((plain_text(document) for document in sample), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, extra_special_tokens=[START], model_max_length=max_length
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def plain_text(document: Document) -> str:
    """The document's words without any chat marks, for the tokenizer's statistics."""
    return document.text or "\n".join(message["content"] for message in document.messages)


def render(document: Document) -> str:
    """The document as the model reads it: a dialogue in ChatML, plain text with an end mark.

    The same marks as CHAT_TEMPLATE, written out because Jinja is ten times slower; a test compares the two.
    """
    if not document.messages:
        return document.text + END
    return "".join(f"{START}{message['role']}\n{message['content']}{END}\n" for message in document.messages)


def rows_of_tokens(
    tokenizer: PreTrainedTokenizerFast, seed: int, row_length: int, known_products: int
) -> Iterator[list[int]]:
    """Rows of exactly `row_length` tokens. Each starts with a whole document; the one that overflows is cut."""
    stream = documents(seed, known_products)
    row: list[int] = []
    while True:
        texts = [render(document) for document in itertools.islice(stream, 256)]
        for ids in tokenizer(texts)["input_ids"]:
            row += ids
            if len(row) >= row_length:
                yield row[:row_length]
                row = []


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama of the asked size, in fp32."""
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.hidden_size // 64),
        max_position_embeddings=arguments.context_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(config)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to a twentieth of the peak."""
    warmup = max(1, int(steps * 0.03))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def build_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms.

    Muon needs about half of AdamW's steps to the same loss here.
    Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    inside = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    is_inside = {id(weight) for weight in inside}
    outside = [weight for weight in model.parameters() if id(weight) not in is_inside]
    return [
        torch.optim.Muon(inside, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=peak, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def pretrain(model: LlamaForCausalLM, rows: Iterator[list[int]], arguments: argparse.Namespace) -> float:
    """Trains the model in place and returns the mean loss, in nats a token, of the last twentieth of the steps."""
    optimizers = build_optimizers(model, arguments.learning_rate)
    losses: list[float] = []
    started = time.monotonic()
    for step in range(arguments.steps):
        batch = torch.tensor(list(itertools.islice(rows, arguments.batch_rows)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate_at(step, arguments.steps, arguments.learning_rate)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == arguments.steps:
            recent = losses[-50:]
            print(
                f"step {step + 1}  loss {sum(recent) / len(recent):.3f}  {time.monotonic() - started:.0f} s", flush=True
            )
    tail = losses[-max(1, len(losses) // 20) :]
    return sum(tail) / len(tail)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, **generation: int) -> None:
    """A folder that stock transformers loads: bf16 weights, tokenizer, template, generation settings."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **generation
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def write_provenance(out: Path, script: str, options: Mapping[str, Any], what: str, **figures: float) -> None:
    """provenance.json beside the weights: how they were made, with which options, and what came out."""
    provenance = {
        "what": what,
        "license": "Apache-2.0",
        "script": f"scripts/{script}",
        "command": f"python scripts/{script} "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items()),
        "seed": options["seed"],
        **figures,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lora_ft/builtin/models/wren"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows a step")
    parser.add_argument("--row-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context-length", type=int, default=1024)
    parser.add_argument("--known-products", type=int, default=12, help="products whose values the model may remember")
    parser.add_argument("--tokenizer-documents", type=int, default=20000)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    tokenizer = train_tokenizer(
        arguments.vocab_size, arguments.tokenizer_documents, arguments.seed, arguments.context_length
    )
    model = build_model(arguments, tokenizer)
    rows = rows_of_tokens(tokenizer, arguments.seed, arguments.row_length, arguments.known_products)
    final_loss = pretrain(model, rows, arguments)
    save(model, tokenizer, arguments.out)
    write_provenance(
        arguments.out,
        "pretrain_wren.py",
        {name: value for name, value in vars(arguments).items() if name != "out"},
        "Wren, a small Llama pre-trained on generated text; it knows no fact about the Halden 3",
        parameters=model.num_parameters(),
        tokens_seen=arguments.steps * arguments.batch_rows * arguments.row_length,
        final_loss=round(final_loss, 4),
        minutes=round((time.monotonic() - started) / 60, 1),
    )


if __name__ == "__main__":
    main()
