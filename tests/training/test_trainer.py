"""What the trainer promises: float32 adapters, every announced step, gradients under checkpointing, silence."""

import math

import datasets
import pytest
import torch

from lora_ft.errors import UserError
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import ModelSection
from lora_ft.training import lasting
from lora_ft.training.trainer import build_arguments, build_trainer, train_model

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUIET = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "logging_steps": 1, "seed": 7}


@pytest.fixture
def section(tiny_base):
    return ModelSection(base=str(tiny_base), dtype="float32", attn_implementation="sdpa")


@pytest.fixture
def tokenizer(section):
    return load_tokenizer(find_base(section.base).folder, section)


def make_model(section, quantization=None, **lora):
    return attach_adapter(load_base(find_base(section.base), section, quantization), {**LORA, **lora})


def make_rows(count=10, length=12) -> datasets.Dataset:
    """Rows of different lengths, the second half of each supervised."""
    rows = []
    for index in range(count):
        ids = [(3 + index * 7 + position * 5) % 300 + 3 for position in range(length - index % 3)]
        rows.append({"input_ids": ids, "labels": [-100] * (len(ids) // 2) + ids[len(ids) // 2 :]})
    return datasets.Dataset.from_list(rows)


def make_trainer(section, tokenizer, tmp_path, model=None, rows=None, **training):
    arguments = build_arguments({**QUIET, **training}, tmp_path)
    return build_trainer(
        model or make_model(section), tokenizer, make_rows() if rows is None else rows, None, arguments, quiet=True
    )


@pytest.mark.parametrize(
    ("batch", "accumulation", "epochs", "steps"), [(4, 1, 2, 6), (2, 4, 1, 2), (3, 2, 3, 6), (8, 1, 1, 2), (1, 3, 1, 4)]
)
def test_announced_steps_are_executed_and_the_rate_ends_at_zero(
    section, tokenizer, tmp_path, batch, accumulation, epochs, steps
):
    """Failure mode 27; steps = epochs x ceil(ceil(10 rows / batch) / accumulation)."""
    trainer = make_trainer(
        section,
        tokenizer,
        tmp_path,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        lr_scheduler_type="linear",
    )
    trainer.train()
    assert steps == epochs * math.ceil(math.ceil(10 / batch) / accumulation)
    assert trainer.state.global_step == trainer.state.max_steps == steps
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "nf4"])
def test_gradient_checkpointing_reaches_every_adapter(section, tokenizer, tmp_path, quantization, reentrant):
    """Failure mode 29."""
    model = make_model(section, quantization)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    make_trainer(section, tokenizer, tmp_path, model, max_steps=3, **options).train()
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert factors and all(p.any() for p in factors.values())


def test_adapter_of_a_quantised_base_stays_float32_and_unrounded(section, tokenizer, tmp_path):
    """Failure mode 24: trl rounds these weights to bfloat16 when the trainer is built."""
    model = make_model(section, NF4)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(section, tokenizer, tmp_path, model, max_steps=3, learning_rate=1e-5)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(after[name], p) and after[name].dtype is torch.float32 for name, p in before.items())
    trainer.train()
    changed = sum(int((after[n] != p).sum()) for n, p in before.items() if "lora_A" in n)
    assert changed > 0.9 * sum(p.numel() for n, p in before.items() if "lora_A" in n)


def test_loss_does_not_depend_on_how_the_batch_is_split(section, tokenizer, tmp_path):
    """Failure mode 19: 8x1, 1x8 and 2x4 give equal losses, though rows have different numbers of supervised tokens."""
    losses = []
    for batch, accumulation in [(8, 1), (1, 8), (2, 4)]:
        trainer = make_trainer(
            section,
            tokenizer,
            tmp_path,
            rows=make_rows(24),
            max_steps=3,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-2,
            train_sampling_strategy="sequential",
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[2] == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize("way", ["short", "no measured gain", "zero3"])
def test_layers_go_the_short_way_while_training_where_it_pays(section, tokenizer, tmp_path, monkeypatch, way):
    """Not under ZeRO-3: only a layer's own call gathers weights there."""
    if way != "short":
        name = {"zero3": "is_deepspeed_zero3_enabled", "no measured gain": "prefers_fused_layers"}[way]
        monkeypatch.setattr(lasting, name, lambda *_: way == "zero3")
    trainer, seen = make_trainer(section, tokenizer, tmp_path, max_steps=1), []
    swapped = lambda: sum("forward" in module.__dict__ for module in trainer.model.modules())  # noqa: E731
    monkeypatch.setattr(trainer, "_measure", lambda *_: seen.append(swapped()))
    before = swapped()
    trainer.train()
    assert seen == [before + (14 + 5 + 2 if way == "short" else 0)]
    assert swapped() == before


def test_loraplus_trains_b_faster(section, tokenizer, tmp_path):
    """The two factors of an embedding at the recipe's own rate; PEFT's default for them is 1e-6."""
    arguments = build_arguments({**QUIET, "max_steps": 1, "learning_rate": 1e-3}, tmp_path)
    model = make_model(section, target_modules=["q_proj", "embed_tokens"])
    trainer = build_trainer(model, tokenizer, make_rows(), None, arguments, loraplus_ratio=16.0, quiet=True)
    trainer.create_optimizer()
    rates = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    assert {rate for name, rate in rates.items() if "lora_A" in name} == {1e-3}
    assert {rate for name, rate in rates.items() if "lora_B" in name} == {1.6e-2}
    assert {rate for name, rate in rates.items() if "lora_embedding" in name} == {1e-3}


def test_nothing_is_sent(section, tokenizer, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as upstream

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(upstream, "send_telemetry", lambda **report: pytest.fail(f"sent {report}"))
    make_trainer(section, tokenizer, tmp_path)


def test_nothing_to_train_on(section, tokenizer, tmp_path):
    with pytest.raises(UserError, match="No row is left for training"):
        make_trainer(section, tokenizer, tmp_path, rows=make_rows().select([]))


@pytest.mark.parametrize(
    "training", [{"optim": "no_such"}, {"lr_scheduler_type": "no_such"}, {"eval_strategy": "never"}]
)
def test_what_trl_refuses_is_a_user_error(tmp_path, training):
    with pytest.raises(UserError, match="refuses these values"):
        build_arguments({**QUIET, **training}, tmp_path)


def test_training_from_a_notebook(section, tokenizer, tmp_path):
    trainer = train_model(make_model(section), tokenizer, make_rows(), tmp_path / "out", max_steps=2, use_cpu=True)
    assert trainer.state.global_step == 2
