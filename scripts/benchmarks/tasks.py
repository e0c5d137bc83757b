"""Bases of random weights and real rows to train them on, in the forms that each system reads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
RATE, BATCH = 2e-4, 4
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Task:
    """A base and rows to train it on."""

    model_type: str
    """Architecture."""
    shape: dict[str, int | bool]
    """Its config."""
    num_rows: int
    """The first rows of the data."""


TASKS = {
    "58M": Task(
        "llama",
        {
            "vocab_size": 32_000,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        160,
    ),
    "0.63B": Task(
        "qwen2",
        {
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": False,
        },
        16,
    ),
}


def build_task(task: Task, folder: Path, data: Path) -> None:
    """A random base, a tokenizer trained on the rows, the rows in the forms the systems read, and a recipe."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    examples = [(row["instruction"], row["output"]) for row in json.loads((data / "gsm8k_train.json").read_text())]
    tokenizer = train_tokenizer(examples, int(task.shape["vocab_size"]))
    rows, counts = [], {"tokens": 0, "supervised": 0}
    for question, answer in examples[: task.num_rows]:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
        rows.append({"messages": messages, "ids": ids, "prompt_length": len(prompt)})
        counts["tokens"] += len(ids)
        counts["supervised"] += len(ids) - len(prompt)
    torch.manual_seed(0)
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(task.model_type, **task.shape, **special, max_position_embeddings=2048)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "counts.json").write_text(json.dumps(counts))
    (folder / "tokens.json").write_text(json.dumps([[row["ids"], row["prompt_length"]] for row in rows]))
    write_lines(folder / "ours" / "rows.jsonl", [{"messages": row["messages"]} for row in rows])
    spoken = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
    write_lines(folder / "trl" / "rows.jsonl", spoken)
    (folder / "recipe.yaml").write_text(json.dumps(recipe_of(folder)))  # JSON is YAML


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_tokenizer(examples: list[tuple[str, str]], vocabulary: int) -> Any:
    """A byte-level BPE of the rows' own text, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocabulary, 32_000),
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((f"{question} {answer}" for question, answer in examples), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def recipe_of(folder: Path) -> dict[str, Any]:
    """Our recipe of the task: nothing is chosen but what TRL is told too."""
    return {
        "output_dir": str(folder / "ours" / "run"),
        "model": {"base": str(folder / "base")},
        "quantization": NF4,
        "lora": LORA,
        "data": {
            "sources": [{"path": str(folder / "ours" / "rows.jsonl"), "split": "train"}],
            "max_length": 1024,
            "cache_dir": str(folder / "ours" / "cache"),
        },
        "training": {
            "learning_rate": RATE,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
        },
        "evaluation": {"generate": 0},
    }
