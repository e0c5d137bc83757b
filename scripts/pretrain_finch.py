"""Pre-trains Finch, the embedded encoder-decoder: a small T5 that answers a question with words of the page beside it.

    python scripts/pretrain_finch.py --out lora_ft/builtin/models/finch

It reads the pages of `finch_corpus.py`, those with few facts first. Some heads of the decoder are taught where to look:
at the place of the page where the next token of the answer stands. A run that is cut off goes on where its last state
was saved.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from finch_corpus import Reading, readings
from pretrain_wren import learning_rate_at, save, write_provenance
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

PAD, END = "<pad>", "</s>"
IGNORE_INDEX = -100
BLOCK_STEPS = 50
"""Steps between two saved states; each block draws its own text, so that a run may be cut off and go on the same."""
BEFORE_HEAD, BEHIND_HEAD, SAME_HEAD = 0, 1, 2
HEAD_START = 7.0
"""Attention score that a head starts with for what it is aimed at; e⁷ outweighs a page of other places."""
NUM_POINTING_HEADS = 3
"""Heads of the decoder's last layer that are taught to look at the answer."""
FULL_DIFFICULTY = 0.3
"""Share of the training after which pages hold as many facts as they ever do."""
TOKENIZER_SEED_OFFSET = 1_000_003
"""The tokenizer is trained on other text than the model, from the same generator."""
EPSILON = 1e-6
Batch = dict[str, torch.Tensor]
Pair = tuple[list[int], list[int], list[int]]
"""Tokens that are read, tokens that are answered, and where in the first the second start."""


def render(reading: Reading) -> str:
    """What the encoder reads; the same words that a row with question, context and answer becomes for tuning."""
    return f"question: {reading.question}\ncontext: {reading.context}\nanswer:\n"


def train_tokenizer(vocab_size: int, seed: int, num_texts: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own; an end mark is added to each text.

    Each text begins with a space, which decoding takes away: an answer has the tokens that it has within its page.
    """
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Prepend(" ")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((render(reading) for reading in itertools.islice(readings(seed, 1.0), num_texts)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, bpe.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, model_max_length=512)


def build_model(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """A fresh T5 of the asked size, in fp32."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=arguments.width,
        d_kv=arguments.width // arguments.heads,
        d_ff=arguments.inner_width,
        num_layers=arguments.encoder_layers,
        num_decoder_layers=arguments.decoder_layers,
        num_heads=arguments.heads,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(arguments.seed)
    model = T5ForConditionalGeneration(config)
    model.set_attn_implementation("eager")  # it alone gives the attention, which the pointing heads are taught by
    aim_heads(model)
    return model


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[Reading], num_tokens: int, rng: random.Random
) -> Iterator[Batch]:
    """Batches of about `num_tokens` read tokens, in rows of similar length, so that little is padded."""
    while True:
        pairs = sorted(tokenize(tokenizer, list(itertools.islice(stream, 512))), key=lambda pair: len(pair[0]))
        groups: list[list[Pair]] = [[]]
        for pair in pairs:
            if (len(groups[-1]) + 1) * len(pair[0]) > num_tokens:
                groups.append([])
            groups[-1].append(pair)
        rng.shuffle(groups)
        for group in groups:
            yield to_tensors(group, tokenizer.pad_token_id)


def tokenize(tokenizer: PreTrainedTokenizerFast, chunk: list[Reading]) -> list[Pair]:
    """What is read, what is answered, and where in it each answer starts."""
    sources = tokenizer([render(reading) for reading in chunk])["input_ids"]
    targets = tokenizer([reading.answer for reading in chunk])["input_ids"]
    questions = tokenizer([f"question: {reading.question}\n" for reading in chunk])["input_ids"]
    starts = [
        find_answer(source, target[:-1], len(question) - 1)
        for source, target, question in zip(sources, targets, questions, strict=True)
    ]
    return list(zip(sources, targets, starts, strict=True))


def find_answer(source: list[int], answer: list[int], begin: int) -> list[int]:
    """Every place of `source`, from `begin` on, where the tokens of the answer start."""
    return [i for i in range(begin, len(source) - len(answer) + 1) if source[i : i + len(answer)] == answer]


def to_tensors(pairs: list[Pair], pad_token_id: int) -> Batch:
    """Padded tensors; padded places of the answer are not learned. `places` [rows, answer, source] holds where the page
    has the token of the answer."""
    source = pad_sequence([torch.tensor(ids) for ids, _, _ in pairs], True, pad_token_id)
    labels = pad_sequence([torch.tensor(ids) for _, ids, _ in pairs], True, IGNORE_INDEX)
    places = torch.zeros(*labels.shape, source.shape[1])
    for row, (_, ids, starts) in enumerate(pairs):
        for start, offset in itertools.product(starts, range(len(ids) - 1)):
            places[row, offset, start + offset] = 1
    return {
        "input_ids": source,
        "attention_mask": (source != pad_token_id).long(),
        "labels": labels,
        "places": places,
    }


def pointing_loss(attention: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """How far the pointing heads look past the answer, in nats a token.

    Args:
        attention: of the decoder's last layer to what was read [rows, heads, answer, source].
        places: where the page has the token of the answer [rows, answer, source].
    """
    found = (attention[:, :NUM_POINTING_HEADS].mean(1) * places).sum(-1)
    return -(found[places.any(-1)] + EPSILON).log().mean()


def aim_heads(model: T5ForConditionalGeneration) -> None:
    """Starts some heads on what reading needs: the token before, the token behind, and the same token elsewhere.

    To copy, a place must know its neighbour; to find, it must know that the question holds the same word. A T5 of this
    size does not come upon either in a few thousand steps, as its distances all weigh the same at first.
    """
    encoder, decoder = model.encoder.block[0].layer[0].SelfAttention, model.decoder.block[0].layer[0].SelfAttention
    before, behind = 1, encoder.relative_attention_num_buckets // 2 + 1
    with torch.no_grad():
        for bias in (encoder.relative_attention_bias.weight, decoder.relative_attention_bias.weight):
            bias[before, BEFORE_HEAD] = HEAD_START
        encoder.relative_attention_bias.weight[behind, BEHIND_HEAD] = HEAD_START
        encoder.relative_attention_bias.weight[0, SAME_HEAD] = -HEAD_START  # every token is the same as itself
        width = model.config.d_kv
        rows = slice(SAME_HEAD * width, (SAME_HEAD + 1) * width)
        for block in model.encoder.block:
            attention = block.layer[0].SelfAttention
            shared = torch.nn.init.orthogonal_(torch.empty(width, model.config.d_model)) * (HEAD_START / width) ** 0.5
            attention.q.weight[rows], attention.k.weight[rows] = shared, shared


def orthogonalise(
    update: torch.Tensor, coefficients: tuple[float, float, float], num_steps: int, eps: float
) -> torch.Tensor:
    """Muon's Newton-Schulz iteration in fp32: PyTorch's own is in bf16, which takes five times as long on most CPUs."""
    a, b, c = coefficients
    x = update.T if update.shape[0] > update.shape[1] else update
    x = x / x.norm().clamp(min=eps)
    for _ in range(num_steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if update.shape[0] > update.shape[1] else x


def build_optimizers(model: T5ForConditionalGeneration, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding, the distances and the norms.

    T5 does not divide attention scores by the root of a head's width; its queries are that much smaller instead, and so
    must their steps be.
    """
    groups: dict[str, list[torch.nn.Parameter]] = {"queries": [], "inside": [], "distances": [], "outside": []}
    for name, weight in model.named_parameters():
        is_inside = weight.ndim == 2 and ".block." in name
        kind = "distances" if "relative" in name else "queries" if name.endswith(".q.weight") else "inside"
        groups[kind if is_inside else "outside"].append(weight)
    muon = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    adam = {"weight_decay": 0.0, "betas": (0.9, 0.95), "fused": True}
    return [
        torch.optim.Muon(groups["queries"], lr=peak / model.config.d_kv**0.5, **muon),
        torch.optim.Muon(groups["inside"], lr=peak, **muon),
        torch.optim.AdamW(groups["distances"], lr=peak * 10, **adam),
        torch.optim.AdamW(groups["outside"], lr=peak, **adam),
    ]


def train_block(
    model: T5ForConditionalGeneration,
    optimizers: list[torch.optim.Optimizer],
    data: Iterator[Batch],
    first_step: int,
    arguments: argparse.Namespace,
) -> tuple[float, float]:
    """Trains for one block of steps; returns the mean loss in nats a token, and the share of answers wholly right."""
    losses, shares = [], []
    for step in range(first_step, first_step + BLOCK_STEPS):
        batch = next(data)
        places = batch.pop("places")
        output = model(**batch, output_attentions=True)
        (output.loss + pointing_loss(output.cross_attentions[-1], places)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            group["lr"] = learning_rate_at(step, arguments.steps, group.setdefault("peak", group["lr"]))
            optimizer.step()
            optimizer.zero_grad()
        is_right = (output.logits.argmax(-1) == batch["labels"]) | (batch["labels"] == IGNORE_INDEX)
        losses.append(output.loss.item())
        shares.append(is_right.all(1).float().mean().item())
    return sum(losses) / len(losses), sum(shares) / len(shares)


def save_state(state: dict[str, Any], path: Path) -> None:
    """The state of a run in one file, which is whole or the one before."""
    draft = path.with_suffix(".partial")
    torch.save(state, draft)
    draft.replace(path)


def pretrain(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace
) -> dict[str, float]:
    """Trains the model in place, block by block, going on where a run of the same settings was cut off."""
    torch.optim._muon._zeropower_via_newtonschulz = orthogonalise
    optimizers = build_optimizers(model, arguments.learning_rate)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if arguments.state is not None and arguments.state.exists():
        state = torch.load(arguments.state, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    while state["step"] < (arguments.stop_at or arguments.steps):
        started = time.monotonic()
        difficulty = min(1.0, state["step"] / arguments.steps / FULL_DIFFICULTY)
        stream = readings(f"{arguments.seed}/{state['step']}", difficulty)
        data = batches(tokenizer, stream, arguments.batch_tokens, random.Random(state["step"]))
        loss, exact = train_block(model, optimizers, data, state["step"], arguments)
        seconds = state["seconds"] + time.monotonic() - started
        state = {
            "step": state["step"] + BLOCK_STEPS,
            "seconds": seconds,
            "loss": loss,
            "exact": exact,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        if arguments.state is not None:
            save_state(state, arguments.state)
        print(f"step {state['step']}  loss {loss:.3f}  wholly right {exact:.1%}  {seconds:.0f} s", flush=True)
    return {name: state[name] for name in ("loss", "exact", "seconds")}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lora_ft/builtin/models/finch"))
    parser.add_argument("--state", type=Path, help="file that a run which is cut off goes on from")
    parser.add_argument("--stop-at", type=int, help="step after which this run ends, to be gone on with")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens read in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner-width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--encoder-layers", type=int, default=4)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--tokenizer-texts", type=int, default=6_000)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    seed = arguments.seed + TOKENIZER_SEED_OFFSET
    tokenizer = train_tokenizer(arguments.vocab_size, seed, arguments.tokenizer_texts)
    model = build_model(arguments, tokenizer)
    figures = pretrain(model, tokenizer, arguments)
    if arguments.stop_at is None:
        save(model, tokenizer, arguments.out, decoder_start_token_id=tokenizer.pad_token_id)
        write_provenance(
            arguments.out,
            "pretrain_finch.py",
            {name: value for name, value in vars(arguments).items() if name not in ("out", "state", "stop_at")},
            "Finch, a small T5 pre-trained to answer questions about generated pages, none of them about Halden",
            parameters=model.num_parameters(),
            tokens=arguments.steps * arguments.batch_tokens,
            final_loss=round(figures["loss"], 4),
            wholly_right=round(figures["exact"], 4),
            minutes=round(figures["seconds"] / 60, 1),
        )


if __name__ == "__main__":
    main()
