"""Adapters of every kind: attached as asked, float32, seeded, and really trained."""

import pytest
import torch

from lora_ft.errors import UserError
from lora_ft.model.adapter import attach_adapter, count_trainable, load_weights
from lora_ft.model.load import find_base, load_base
from lora_ft.model.profile import profile_model
from lora_ft.sections import ModelSection
from tests.conftest import make_base

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


WHOLE = {
    "head": ({"modules_to_save": ["lm_head"]}, None),
    "embeddings": ({"modules_to_save": ["embed_tokens"]}, None),
    "embeddings nf4": ({"modules_to_save": ["embed_tokens"]}, NF4),
    "norm": ({"modules_to_save": ["norm"]}, None),
    "attention": ({"modules_to_save": ["self_attn"], "target_modules": ["up_proj"]}, None),
    "biases": ({"bias": "all"}, None),
    "biases of lora": ({"bias": "lora_only"}, None),
    "biases nf4": ({"bias": "all"}, NF4),
}


@pytest.fixture(scope="module")
def biased_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("biased"), attention_bias=True, mlp_bias=True)


@pytest.mark.parametrize("case", WHOLE)
def test_what_is_trained_whole_is_float32_on_a_base_of_16_bit(biased_base, tmp_path, case):
    """Forward and backward run without autocast, as answers after training do, and stock PEFT answers alike."""
    from peft import PeftModel

    from lora_ft.export.save import save_adapter

    lora, quantization = WHOLE[case]
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        plain = fresh_base(biased_base, quantization, "bfloat16").eval()(ids).logits.float()
    model = attach_adapter(fresh_base(biased_base, quantization, "bfloat16"), {**LORA, **lora})
    with torch.no_grad():
        assert (model.eval()(ids).logits.float() - plain).norm() < 0.02 * plain.norm()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert any("lora_" not in name for name in before)
    losses = train_steps(model)
    assert losses[-1] < losses[0]
    now = dict(model.named_parameters())
    assert {now[name].dtype for name in before} == {torch.float32}
    assert all(not torch.equal(now[name], p) for name, p in before.items() if "k_proj.bias" not in name)
    save_adapter(model, None, tmp_path / "adapter", base=find_base(str(biased_base)))
    again = PeftModel.from_pretrained(fresh_base(biased_base, quantization, "bfloat16"), tmp_path / "adapter")
    with torch.no_grad():
        ours, theirs = (each.eval()(ids).logits.float() for each in (model, again))
    assert (ours - theirs).norm() < 0.03 * ours.norm()


@pytest.mark.parametrize("case", ["biases", "biases nf4"])
def test_small_updates_of_a_bias_are_not_rounded_away(biased_base, case):
    """bitsandbytes narrows a bias for good when its layer is called with 16 bit."""
    lora, quantization = WHOLE[case]
    model = attach_adapter(fresh_base(biased_base, quantization, "bfloat16"), {**LORA, **lora})
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.fill_(0.1)
    train_steps(model, steps=1, lr=1e-5)
    biases = [p for name, p in model.named_parameters() if name.endswith("v_proj.base_layer.bias")]
    assert biases and all(((p - 0.1).abs() > 5e-6).float().mean() > 0.9 for p in biases)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=str)
def test_casts_change_nothing_under_autocast(biased_base, monkeypatch, lora):
    """Where autocast casts these weights itself, the losses are those of a model without our casts."""
    losses = []
    for name in ("ours", "autocast's"):
        if name != "ours":
            monkeypatch.setattr("lora_ft.model.adapter._bridge_types", lambda *args, **options: None)
            monkeypatch.setattr("lora_ft.model.adapter._CastAtUse", lambda layer, dtypes: layer.forward)
        model = attach_adapter(fresh_base(biased_base, dtype="bfloat16"), {**LORA, **lora})
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):  # or the second step sees the first's weights
            losses.append(train_steps(model))
    assert losses[0] == losses[1]


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "gaussian", "orthogonal"])
def test_starts_that_keep_the_base_as_it_was(tiny_base, start):
    """PiSSA and OLoRA take part of the base's weights into the adapter: together they are still the base."""
    ids = torch.arange(3, 35)[None]
    plain = fresh_base(tiny_base).eval()(ids).logits
    model = attach_adapter(fresh_base(tiny_base), {**LORA, "init_lora_weights": start})
    assert torch.allclose(model.eval()(ids).logits, plain, atol=1e-3)
    losses = train_steps(model)
    assert losses[-1] < losses[0]


EMBEDDINGS_TOO = {"target_modules": ["q_proj", "embed_tokens"]}


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, EMBEDDINGS_TOO], ids=str)
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


@pytest.mark.parametrize(("saved", "wanted"), [("pissa", True), (True, "pissa"), ("pissa", "olora")])
def test_weights_of_a_rewritten_base_start_no_other_adapter(tiny_base, tmp_path, saved, wanted):
    """They are a difference to weights that the other base does not have; the shapes fit."""
    other = attach_adapter(fresh_base(tiny_base), {**LORA, "init_lora_weights": saved})
    other.save_pretrained(tmp_path)
    model = attach_adapter(fresh_base(tiny_base), {**LORA, "init_lora_weights": wanted})
    with pytest.raises(UserError, match="init_lora_weights"):
        load_weights(model, tmp_path)
    load_weights(attach_adapter(fresh_base(tiny_base), {**LORA, "init_lora_weights": saved}), tmp_path)


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
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}}, NF4, "lora.loftq_config"),
        ({"runtime_config": {"ephemeral_gpu_offload": True}}, None, "lora.runtime_config"),
        ({"alora_invocation_tokens": [3, 7]}, None, "lora.alora_invocation_tokens"),
        ({"eva_config": {"rho": 2.0}}, None, "lora.eva_config"),
        ({"trainable_token_indices": [5, 320, -1]}, None, "lora.trainable_token_indices: 320, -1"),
        ({"trainable_token_indices": {"lm_head": [5000]}}, None, "lora.trainable_token_indices.lm_head: 5000"),
    ],
)
def test_refusals(tiny_base, lora, quantization, expected):
    with pytest.raises(UserError) as caught:
        attach_adapter(fresh_base(tiny_base, quantization), {**LORA, **lora})
    assert expected in str(caught.value)


IDLE = {
    "target_modules": ["q_proj", "k_proj", "query"],
    "modules_to_save": ["nonexistent", "norm"],
    "layers_to_transform": [0, 7],
    "bias": "all",
    "exclude_modules": ["no_such_layer", "k_proj"],
    "rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 3},
    "alpha_pattern": {"up_proj": 2},
}


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")
def test_names_that_match_nothing_are_refused_together(tiny_base):
    """PEFT trains on without them: k_proj is excluded, and the first rank is the one that holds."""
    with pytest.raises(UserError) as caught:
        attach_adapter(fresh_base(tiny_base), {"r": 4, **IDLE})
    assert [(fault.place, fault.value) for fault in caught.value.faults] == [
        ("lora.target_modules", "k_proj"),
        ("lora.target_modules", "query"),
        ("lora.exclude_modules", "no_such_layer"),
        ("lora.modules_to_save", "nonexistent"),
        ("lora.layers_to_transform", 7),
        ("lora.rank_pattern", "layers.0.self_attn.q_proj"),
        ("lora.alpha_pattern", "up_proj"),
        ("lora.bias", "all"),
    ]
    with pytest.raises(UserError, match="exclude_modules"):
        attach_adapter(fresh_base(tiny_base), {**LORA, "exclude_modules": ".*no_such_layer"})


def test_names_that_match_are_not(tiny_base):
    lora = {**LORA, "exclude_modules": ".*k_proj", "rank_pattern": {".*[.]0[.].*proj": 2}, "modules_to_save": ["head"]}
    attach_adapter(fresh_base(tiny_base), lora)
    attach_adapter(fresh_base(tiny_base), {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": 1})


def test_a_classifier_has_one_head_of_those_that_peft_names():
    from transformers import LlamaConfig, LlamaForSequenceClassification

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForSequenceClassification(LlamaConfig(**shape, vocab_size=64))
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["classifier", "score"]}
    tuned = attach_adapter(model, lora, task="classification")
    assert any("score" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)


def test_experts_go_by_the_names_they_had_before_they_were_fused():
    """PEFT makes gate_up_proj of them, and a rank pattern of its own."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(**shape, head_dim=16, moe_intermediate_size=16, num_experts=2, vocab_size=64)
    lora = {"r": 2, "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    model = attach_adapter(Qwen3MoeForCausalLM(config), lora)
    assert any("experts" in name for name, p in model.named_parameters() if p.requires_grad)


def test_a_recipe_keeps_its_lists(tiny_base):
    """PEFT adds the heads of a classifier to the list that it is given."""
    section, lora = ModelSection(base=str(tiny_base), dtype="float32"), {**LORA, "modules_to_save": ["norm"]}
    model = load_base(find_base(section.base), section, task="classification", labels=("a", "b"))
    attach_adapter(model, lora, task="classification")
    assert lora["modules_to_save"] == ["norm"]


def test_adapter_folder_without_safetensors(tiny_base, tmp_path):
    """Failure mode 49: a pickled adapter is never opened."""
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="pickled adapters can run code"):
        attach_adapter(fresh_base(tiny_base), None, adapter=str(tmp_path))


@pytest.mark.filterwarnings("ignore:`corda_config` specified")
def test_settings_of_a_start_are_known_before_a_weight_is_read():
    """The plan's model has no weights to start from, but is told by what start it would be."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    lora = {"r": 2, "target_modules": "all-linear"}
    for start in ("loftq", "pissa"):
        profile_model(config, "float32", {**lora, "init_lora_weights": start})
    profile_model(config, "float32", {**lora, "init_lora_weights": "corda", "corda_config": {"verbose": True}})
    for setting in ({"corda_config": {"verbose": True}}, {"init_lora_weights": "eva"}):
        with pytest.raises(UserError, match=r"lora\.(corda_config|init_lora_weights)"):
            profile_model(config, "float32", {**lora, **setting})
