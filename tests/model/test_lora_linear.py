"""The short way through a LoRA layer against PEFT's own."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ft.model import lora_linear
from lora_ft.model.adapter import attach_adapter
from lora_ft.model.load import find_base, load_base
from lora_ft.model.lora_linear import fused_lora
from lora_ft.sections import ModelSection

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
IDS = torch.arange(3, 27).view(2, 12)


def load(tiny_base, dtype="float32", quantization=None, **lora):
    section = ModelSection(base=str(tiny_base), dtype=dtype, attn_implementation="sdpa")
    if quantization:
        quantization = {**quantization, "bnb_4bit_compute_dtype": dtype}
    return attach_adapter(load_base(find_base(section.base), section, quantization), {**LORA, **lora}).train()


def run(model, autocast=False):
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def compare(model, tolerance, autocast=False):
    loss, gradients = run(model, autocast)
    with fused_lora(model) as count:
        ours, our_gradients = run(model, autocast)
    assert run(model, autocast)[0] == loss  # PEFT's forward is back
    assert ours == pytest.approx(loss, rel=tolerance)
    assert all(gradient.dtype == torch.float32 and gradient.any() for gradient in our_gradients.values())
    whole, our_whole = (torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, our_gradients))
    assert (our_whole - whole).norm() <= 10 * tolerance * whole.norm()
    return count


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, NF4], ids=["plain", "nf4"])
@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}], ids=str)
def test_equal_to_peft(tiny_base, monkeypatch, quantization, dtype, keep, lora):
    """In bfloat16, where processors round sums in their own order, no further from PEFT's than that is from float32."""
    monkeypatch.setattr(lora_linear, "can_keep_unpacked", lambda num_bytes, checkpointing: keep)
    model = load(tiny_base, dtype, quantization, **lora)
    if dtype == "float32":
        assert compare(model, 1e-6) == 14  # seven matrices in each of two layers
        return
    exact = join(run(load(tiny_base, "float32", quantization, **lora))[1])
    theirs = join(run(model, autocast=True)[1])
    with fused_lora(model) as count:
        ours = join(run(model, autocast=True)[1])
    assert count == 14 and (ours - theirs).norm() <= (theirs - exact).norm() < 0.5 * exact.norm()


def join(gradients):
    """All of them as one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_stay_packed_where_memory_is_scarce(tiny_base, monkeypatch, checkpointing):
    unpacked, unpack = [], lora_linear.LoraForward._unpack
    monkeypatch.setattr(lora_linear.LoraForward, "_unpack", lambda self: unpacked.append(self) or unpack(self))
    model = load(tiny_base, "float32", NF4)
    with fused_lora(model, checkpointing):
        assert len(unpacked) == (0 if checkpointing else 14)
        run(model)
    assert len(unpacked) == (25 if checkpointing else 14)  # twice, but where no gradient goes on: the first q, k and v


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_unpacked_weights_are_counted_in_the_type_they_are_unpacked_to(tiny_base, monkeypatch, dtype, size):
    counted = []
    monkeypatch.setattr(lora_linear, "can_keep_unpacked", lambda num_bytes, checkpointing: counted.append(num_bytes))
    model = load(tiny_base, dtype, NF4)
    with fused_lora(model):
        layers = [layer.get_base_layer() for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert counted == [size * sum(layer.in_features * layer.out_features for layer in layers)]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 0), (2, 3)], ids=str)
def test_any_number_of_tokens_in_any_shape(tiny_base, shape):
    layer = load(tiny_base).get_base_model().model.layers[0].mlp.down_proj
    x = torch.randn(*shape, layer.in_features, requires_grad=True)
    expected = layer(x)
    theirs = torch.autograd.grad(expected.sum(), x)[0]
    with fused_lora(layer) as count:
        ours = layer(x)
        assert count == 1 and ours.shape == expected.shape
        assert torch.allclose(torch.autograd.grad(ours.sum(), x)[0], theirs, atol=1e-5)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_what_comes_out_may_be_changed_in_place(tiny_base):
    """OLMo clamps its queries so."""
    layer, gradients = load(tiny_base).get_base_model().model.layers[0].self_attn.q_proj, []
    for context in (nullcontext(), fused_lora(layer)):
        with context:
            x = torch.ones(2, 3, layer.in_features, requires_grad=True)
            layer(x).clamp_(min=0).sum().backward()
            gradients.append(x.grad)
    assert torch.allclose(*gradients, atol=1e-6) and gradients[0].any()


def test_a_layer_that_cannot_be_unpacked_leaves_all_as_they_were(tiny_base, monkeypatch):
    calls, model = [], load(tiny_base, "float32", NF4)

    def fail(self):
        calls.append(self)
        if len(calls) == 5:
            raise MemoryError

    monkeypatch.setattr(lora_linear.LoraForward, "_unpack", fail)
    with pytest.raises(MemoryError), fused_lora(model):
        pass
    assert not any("forward" in module.__dict__ for module in model.modules() if isinstance(module, LoraLayer))


def test_dropout_is_the_same_for_the_same_seed(tiny_base):
    assert compare(load(tiny_base, lora_dropout=0.3), 1e-6) == 14


def test_gradient_checkpointing(tiny_base):
    model = load(tiny_base)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert compare(model, 1e-6) == 14


@pytest.mark.parametrize(
    "lora",
    [{"use_dora": True}, {"bias": "lora_only", "lora_bias": True}, {"target_modules": ["embed_tokens"]}],
    ids=str,
)
def test_other_layers_keep_the_forward_of_peft(tiny_base, lora):
    assert compare(load(tiny_base, **lora), 1e-6) == 0


def test_a_bias_of_the_base():
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=64, attention_bias=True, mlp_bias=True))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    assert compare(get_peft_model(model, LoraConfig(**LORA)), 1e-6) == 7


def test_switched_off_and_merged_adapters_go_the_way_of_peft(tiny_base):
    model = load(tiny_base).eval()
    with torch.no_grad(), fused_lora(model):
        tuned = model(IDS).logits
        with model.disable_adapter():
            base = model(IDS).logits
        model.merge_adapter()
        merged = model(IDS).logits
        model.unmerge_adapter()
    assert not torch.allclose(base, tuned, atol=1e-3)
    assert torch.allclose(merged, tuned, atol=1e-4)
