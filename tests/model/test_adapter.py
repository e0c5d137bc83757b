"""Adapters of every kind: attached as asked, float32, seeded, and really trained."""

import pytest
import torch

from lora_ft.errors import UserError
from lora_ft.model.adapter import attach_adapter, count_trainable
from lora_ft.model.load import find_base, load_base
from lora_ft.sections import ModelSection

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
KINDS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
    "bias": {"bias": "lora_only", "lora_bias": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "last layer": {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
}


def fresh_base(folder, quantization=None, dtype="float32"):
    section = ModelSection(base=str(folder), dtype=dtype, attn_implementation="sdpa")
    return load_base(find_base(section.base), section, quantization)


def train_steps(model, steps=3, lr=1e-2) -> list[float]:
    ids = torch.arange(3, 35)[None].repeat(2, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_leaves_the_base(tiny_base, kind, quantization):
    model = attach_adapter(fresh_base(tiny_base, quantization), {**LORA, **KINDS[kind]})
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert count_trainable(model) == sum(p.numel() for p in trained.values()) > 0
    assert {p.dtype for p in trained.values()} == {torch.float32}
    losses = train_steps(model)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    assert all(not torch.equal(now[name], p) for name, p in trained.items())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_starts_that_keep_the_base_as_it_was(tiny_base, start):
    """PiSSA and OLoRA take part of the base's weights into the adapter: together they are still the base."""
    ids = torch.arange(3, 35)[None]
    plain = fresh_base(tiny_base).eval()(ids).logits
    model = attach_adapter(fresh_base(tiny_base), {**LORA, "init_lora_weights": start})
    assert torch.allclose(model.eval()(ids).logits, plain, atol=1e-3)
    losses = train_steps(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}], ids=str)
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_saved_adapter_fits_the_original_base(tiny_base, tmp_path, start, lora):
    """what is saved of one whose start took weights out of its base gives its logits on the base as it is on disk."""
    from peft import PeftModel

    from lora_ft.export.save import save_adapter

    ids = torch.arange(3, 35)[None]
    model = attach_adapter(fresh_base(tiny_base), {**LORA, **lora, "init_lora_weights": start})
    train_steps(model)
    save_adapter(model, None, tmp_path / "adapter", base=find_base(str(tiny_base)))
    again = PeftModel.from_pretrained(fresh_base(tiny_base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again.eval()(ids).logits, model.eval()(ids).logits, atol=1e-4)


def test_loftq_makes_up_for_quantisation(tiny_base):
    """The logits of a 4-bit base with LoftQ lie nearer the original's than those of the 4-bit base alone."""
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted = fresh_base(tiny_base).eval()(ids).logits
        quantised = fresh_base(tiny_base, NF4).eval()(ids).logits
        lora = {**LORA, "r": 16, "init_lora_weights": "loftq"}
        loftq = attach_adapter(fresh_base(tiny_base, NF4), lora, base_folder=tiny_base).eval()(ids).logits
    assert (loftq - wanted).norm() < 0.95 * (quantised - wanted).norm()


def test_seed_decides_the_adapter_whatever_ran_before(tiny_base):
    """Failure mode 26."""

    def first_weights(seed):
        torch.rand(int(torch.randint(1, 50, ())))
        model = attach_adapter(fresh_base(tiny_base), LORA, seed=seed)
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_adapter_from_disk_goes_on_training(tiny_base, tmp_path):
    """Failure mode 28."""
    model = attach_adapter(fresh_base(tiny_base), LORA)
    train_steps(model)
    model.save_pretrained(tmp_path / "adapter")
    again = attach_adapter(fresh_base(tiny_base), None, adapter=str(tmp_path / "adapter"))
    assert count_trainable(again) == count_trainable(model)
    before = {name: p.detach().clone() for name, p in again.named_parameters() if p.requires_grad}
    assert before
    train_steps(again)
    now = dict(again.named_parameters())
    assert all(not torch.equal(now[name], p) for name, p in before.items())


def test_small_learning_rate_is_not_rounded_away(tiny_base):
    """Failure mode 24: in bfloat16, two steps at 1e-5 changed 2% of lora_A. B starts at zero, so A moves later."""
    model = attach_adapter(fresh_base(tiny_base, NF4, "bfloat16"), LORA)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_A" in n}
    with torch.autocast("cpu", torch.bfloat16):
        train_steps(model, steps=3, lr=1e-5)
    now = dict(model.named_parameters())
    changed = sum(int((now[n] != p).sum()) for n, p in before.items())
    assert changed > 0.9 * sum(p.numel() for p in before.values())


@pytest.mark.parametrize(
    ("lora", "quantization", "expected"),
    [
        ({"target_modules": ["no_such_layer"]}, None, "PEFT cannot attach this adapter"),
        ({"init_lora_weights": "pissa"}, NF4, "quantised ones cannot be decomposed"),
        ({"init_lora_weights": "loftq"}, None, "the base is not quantised"),
        ({"init_lora_weights": "eva"}, None, "EVA needs a pass over the data"),
    ],
)
def test_refusals(tiny_base, lora, quantization, expected):
    with pytest.raises(UserError) as caught:
        attach_adapter(fresh_base(tiny_base, quantization), {**LORA, **lora})
    assert expected in str(caught.value)


def test_adapter_folder_without_safetensors(tiny_base, tmp_path):
    """Failure mode 49: a pickled adapter is never opened."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pickled adapters can run code"):
        attach_adapter(fresh_base(tiny_base), None, adapter=str(tmp_path))
