"""Norms and gated MLPs that keep less, against those of transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_ft.model import lora_linear
from lora_ft.model.fused_layers import fused_layers
from lora_ft.model.lora_linear import differentiate_gated, multiply_gated
from lora_ft.model.profile import profile_model

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
CONTIGUOUS = torch.contiguous_format
IDS = torch.arange(3, 27).view(2, 12)


def build(family="llama", dtype=torch.float32, **lora):
    """A model whose norms have weights of their own: ones would hide how they are used."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE), dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.3)
    return get_peft_model(model, LoraConfig(**{**LORA, **lora})).to(dtype).train()


def run(model):
    """The loss, and the gradients as one vector."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters() if p.requires_grad])


def run_fused(model):
    with fused_layers(model) as count:
        return *run(model), count


def compare(model):
    """How many layers went the short way, to the same loss and gradients."""
    loss, gradients = run(model)
    ours, our_gradients, count = run_fused(model)
    assert ours == pytest.approx(loss, rel=1e-6)
    assert (our_gradients - gradients).norm() <= 1e-5 * gradients.norm()
    return count


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", 5 + 2 + 14),  # norms, gated MLPs, LoRA layers
        ("mistral", 5 + 2 + 14),
        ("qwen2", 5 + 2 + 14),
        ("qwen3", 9 + 2 + 14),  # queries and keys have norms too
        ("olmo2", 9 + 2 + 14),
        ("gemma2", 0 + 2 + 14),  # its norms multiply by 1 + w
        ("cohere", 0 + 2 + 14),  # its norms subtract the mean
    ],
)
def test_equal_to_transformers(family, expected):
    model = build(family)
    assert compare(model) == expected
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_in_bfloat16_no_further_from_transformers_than_that_is_from_float32(family):
    exact = run(build(family))[1]
    model = build(family, torch.bfloat16)
    theirs, ours = run(model)[1], run_fused(model)[1]
    assert (ours - theirs).norm() <= (theirs - exact).norm() < 0.5 * exact.norm()


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj"], ["gate_proj", "up_proj"]], ids=str)
def test_a_gated_mlp_of_which_some_layers_have_an_adapter(targets):
    model = build(target_modules=targets)
    assert compare(model) == 5 + 2 + 2 * len(targets)


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.3}, {"use_dora": True}], ids=str)
def test_a_product_that_is_needed_once_more(lora):
    model = build(**lora)
    assert compare(model)


def test_gradient_checkpointing():
    model = build()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert compare(model) == 21


def test_trained_norms_stay_as_they_are():
    model = build(modules_to_save=["norm"])
    gradients = run(model)[1]
    our_gradients, count = run_fused(model)[1:]
    assert count == 21  # the last norm has a frozen copy, which nobody calls
    assert (our_gradients - gradients).norm() <= 1e-5 * gradients.norm()


class Scaled(nn.Module):
    """Has what an RMSNorm has, and computes something else."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(8), requires_grad=False), 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 100 * self.eps)


class Added(nn.Module):
    """Has what a gated MLP has, and adds where that multiplies."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Told(nn.RMSNorm):
    """Wants to be told more."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class Gated(nn.Module):
    """A gated MLP, and what others make of one."""

    def __init__(self, act=nn.functional.silu, limit=None, dropout=0.0, scale=False, width=None):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.act_fn, self.limit, self.dropout, self.width = act, limit, dropout, width
        if scale:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        assert self.width in (None, gate.shape[-1])
        if self.limit is not None:  # as in DeepSeek V4
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        product = self.act_fn(gate) * up * getattr(self, "scale", 1.0)
        return nn.functional.dropout(self.down_proj(product), self.dropout, self.training)  # as in Seed-OSS


LOOKALIKES = {
    "another epsilon": Scaled(),
    "a sum": Added(),
    "a second input": Told(8, eps=1e-6),
    "a mean that is taken out": nn.LayerNorm(8, bias=False),
    "a clamp": Gated(limit=10.0),
    "dropout": Gated(dropout=0.5).eval(),
    "a scale of its own": Gated(scale=True),
    "an activation that is trained": Gated(act=nn.PReLU()),
    "a width that is asserted": Gated(width=8),
}


@pytest.mark.parametrize("module", LOOKALIKES.values(), ids=LOOKALIKES.keys())
def test_modules_that_only_look_alike_stay_as_they_are(module):
    is_trained = isinstance(getattr(module, "act_fn", None), nn.PReLU)
    with fused_layers(module.requires_grad_(is_trained)) as count:
        assert count == 0


def test_what_is_alike_goes_the_short_way():
    module, x = Gated(), torch.randn(2, 3, 8)
    expected = module(x)
    with fused_layers(module) as count:
        assert count == 1 and torch.allclose(module(x), expected, atol=1e-6)
        with fused_layers(module) as inner:
            assert inner == 0
        assert "forward" in module.__dict__


def test_the_norm_of_pytorch():
    module, x = nn.RMSNorm(8, eps=1e-6).requires_grad_(False), torch.randn(3, 8)
    with fused_layers(module) as count:
        assert count == 1
        ours = module(x)
    assert torch.allclose(ours, module(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)], ids=str)
@pytest.mark.parametrize("block", [1, 100, 2**20])
def test_gradients_of_a_gated_product(monkeypatch, shape, block):
    """Whole, row by row, and of tensors that do not lie row after row."""
    monkeypatch.setattr(lora_linear, "BLOCK_ENTRIES", block)
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(shape[::-1]).permute(*range(len(shape))[::-1]).requires_grad_() for _ in range(3))
    expected = torch.nn.functional.gelu(gate) * up
    assert torch.allclose(multiply_gated(torch.nn.functional.gelu, gate.detach(), up.detach()), expected, atol=1e-6)
    found = differentiate_gated(torch.nn.functional.gelu, gate, up, grad.detach().clone(memory_format=CONTIGUOUS))
    for ours, theirs in zip(found, torch.autograd.grad(expected, (gate, up), grad), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_hooks_of_the_last_layer_still_run():
    model, seen = build(), []
    last = model.get_base_model().model.layers[0].mlp.down_proj
    last.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    loss = run(model)[0]
    assert run_fused(model)[0] == pytest.approx(loss, rel=1e-6)
    assert seen == [(2, 12, 48)] * 2


def count_kept(model):
    """Bytes that autograd keeps of a forward pass of the layers, but for weights."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept, alive = 0, []

    def keep(tensor):
        nonlocal kept
        if tensor.untyped_storage().data_ptr() not in own:
            own.add(tensor.untyped_storage().data_ptr())
            kept += tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.get_base_model().model(input_ids=IDS, use_cache=False)
    return kept


def test_the_profile_counts_what_they_keep():
    """But for attention, of which a CPU keeps four bytes a head and token more than the profile counts."""
    model = build()
    plain = count_kept(model)
    with fused_layers(model):
        fused = count_kept(model)
    config = AutoConfig.for_model("llama", **SHAPE)
    profiles = [profile_model(config, "float32", LORA, is_fused=is_fused) for is_fused in (False, True)]
    tokens, layers, heads = IDS.numel(), SHAPE["num_hidden_layers"], SHAPE["num_attention_heads"]
    counted = [(sum(p.layer_bytes) + p.outer_bytes) * tokens + p.fixed_bytes for p in profiles]
    counted = [each + 4 * heads * layers * tokens for each in counted]
    assert counted == pytest.approx([plain, fused], rel=0.02)
    assert plain - fused >= 2 * 4 * SHAPE["intermediate_size"] * layers * tokens  # act(gate) and the product
