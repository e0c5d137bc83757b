"""What all tests share: no network, no telemetry, and a base small enough to train in a second."""

import os
import subprocess
from collections.abc import Callable

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side, and threads that wait for a core spin
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # nothing is compiled here; its import takes long

from pathlib import Path

import pytest

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the battery is full red green blue light blinks what does it mean when how many one two three user assistant"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Prepared data and quantised weights of tests go where tests go."""
    os.environ["LORA_FT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def make_tokenizer():
    """A byte-level BPE tokenizer with a ChatML template, trained on a handful of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [WORDS] * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def make_base(folder: Path, **settings) -> Path:
    """A random Llama of 64 hidden units and two layers, saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    LlamaForCausalLM(LlamaConfig(**{**shape, **settings})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def lora_ft(capsys) -> Callable[..., subprocess.CompletedProcess]:
    """The command in this process, where all is imported; gives what `subprocess.run` would of one of its own."""

    def run(*words) -> subprocess.CompletedProcess:
        from lora_ft.cli import main

        capsys.readouterr()
        code = main([*map(str, words)])
        return subprocess.CompletedProcess(words, code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that read it are skipped where it is absent."""
    folder = Path(os.environ.get("LORA_FT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}")
    return folder


@pytest.fixture(scope="session")
def chat_rows() -> list[dict]:
    """Forty short conversations."""
    colours, counts = ["red", "green", "blue", "white"], ["one", "two", "three", "four", "five"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"what does it mean when the {colour} light blinks {count} {times}?"},
                {"role": "assistant", "content": f"the battery is {colour} {count}"},
            ]
        }
        for colour in colours
        for count in counts
        for times in ("times", "times now")
    ]


@pytest.fixture
def recipe_file(tmp_path, tiny_base, chat_rows):
    """A function that writes a recipe over the tiny base, with sections replaced, and returns its path."""
    return recipe_writer(tmp_path, tiny_base, chat_rows)


def recipe_writer(folder: Path, base: Path, rows: list[dict]):
    """What `recipe_file` gives, for fixtures that last longer than one test."""
    import json

    import yaml

    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(**sections) -> Path:
        recipe = {
            "output_dir": str(folder / "run"),
            "model": {"base": str(base), "dtype": "float32"},
            "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "data": {"sources": [{"path": str(data)}], "max_length": 96, "split": {"validation": 0.1, "test": 0.1}},
            "training": {
                "max_steps": 3,
                "per_device_train_batch_size": 4,
                "learning_rate": 5e-3,
                "logging_steps": 1,
                "save_strategy": "no",
                "eval_strategy": "no",
            },
            "evaluation": {"generate": 2, "max_new_tokens": 4},
        }
        for name, section in sections.items():
            if section is None:
                recipe.pop(name)
            elif isinstance(section, dict) and isinstance(recipe.get(name), dict):
                recipe[name] = {**recipe[name], **section}
            else:
                recipe[name] = section
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
