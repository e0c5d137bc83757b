"""Documents that share a row: as if each stood alone, at the cost of each alone."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_ft.model import machine
from lora_ft.training import attention, documents
from lora_ft.training.attention import DOCUMENTS, document_attention, keeps_documents_apart
from lora_ft.training.documents import DocumentMask, Run

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"]
KINDS = {
    "llama": {},
    "llama one key head": {"num_key_value_heads": 1},
    "llama no groups": {"num_key_value_heads": 4},
    "mistral window": {"sliding_window": 3},
    "gemma3_text window": {"head_dim": 16, "sliding_window": 4, "layer_types": SLIDING},
    "cohere2 window": {"sliding_window": 4, "layer_types": SLIDING},
    "llama4_text chunks": {
        "attention_chunk_size": 4,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "head_dim": 16,
    },
    "granite": {},
    "phi3": {},
}
ROWS = {
    "one row": ((7, 3, 1, 9),),
    "equal lengths": ((4, 4, 4, 4),),
    "several rows": ((7, 3, 10), (5, 5, 5, 5)),
    "padded": ((7, 3, 10), (4, 2)),
}


def build_model(kind="llama", dtype=torch.float32, **settings):
    config = AutoConfig.for_model(kind.split()[0], **{**SHAPE, **KINDS[kind], **settings})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return model


def pack(rows):
    """Documents of these lengths, row by row: input_ids, position_ids that restart, labels; padding at position 0."""
    width = max(map(sum, rows))
    places = [[place for length in row for place in range(length)] for row in rows]
    positions = torch.tensor([row + [0] * (width - len(row)) for row in places])
    torch.manual_seed(3)
    ids = torch.randint(3, 320, positions.shape)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}


def run(model, batch):
    """Logits where something is supervised, and all gradients as one vector."""
    model.zero_grad()
    outputs = model(**batch, use_cache=False)
    outputs.loss.backward()
    gradient = torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
    return outputs.logits.detach()[batch["labels"] != -100].float(), gradient


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_the_dense_mask(kind, rows):
    model, batch = build_model(kind), pack(ROWS[rows])
    logits, gradient = run(model, batch)
    with document_attention(model):
        assert model.config._attn_implementation == DOCUMENTS
        ours, our_gradient = run(model, batch)
    assert model.config._attn_implementation == "sdpa"
    assert (ours - logits).abs().max() < 1e-5 * max(1.0, logits.abs().max())
    assert (our_gradient - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("kind", ["llama", "llama one key head", "llama no groups"])
@pytest.mark.parametrize("lengths", [(7, 3, 1, 9), (300, 40, 128, 129)], ids=["short", "several blocks"])
def test_matrix_products_in_bfloat16(kind, lengths):
    """No further from float32 than PyTorch's fused kernel in bfloat16 is, within a factor for chance."""
    batch, errors = pack((lengths,)), {}
    exact, exact_gradient = run(build_model(kind), batch)
    for name, way in (("fused", nullcontext), ("ours", document_attention)):
        model = build_model(kind, torch.bfloat16)
        with way(model):
            logits, gradient = run(model, batch)
        errors[name] = ((logits - exact).norm() / exact.norm(), (gradient - exact_gradient).norm())
    assert errors["ours"][0] < 1.3 * errors["fused"][0] and errors["ours"][1] < 1.3 * errors["fused"][1]


@pytest.mark.parametrize("kind", ["llama", "mistral window"])
def test_matrix_products_are_exact_in_float32(kind, monkeypatch):
    monkeypatch.setattr(attention, "prefers_matmul_attention", lambda device, dtype: True)
    monkeypatch.setattr(machine, "ROUND_TO", 4)
    monkeypatch.setattr(documents, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(documents, "CALL_PAIRS", 16)
    test_equal_to_the_dense_mask(kind, "several rows")


def test_documents_of_about_one_length_are_multiplied_together():
    lengths = (300, 290, 1, 40, 290, 33, 1)
    layout = DocumentMask(tuple(Run(1, length) for length in lengths), torch.device("cpu")).layout
    found = [(batch.first, batch.count, batch.length, list(batch.blocks)) for batch in layout.batches]
    assert found == [(0, 3, 320, [(0, 160), (160, 320)]), (960, 2, 64, [(0, 64)])]
    states = torch.randn(sum(lengths), 2, 4)
    stacked = layout.stack(states)
    assert stacked.shape == (960 + 128, 2, 4) and torch.equal(stacked[320:610], states[300:590])
    assert stacked[300:320].abs().max() == 0
    back = layout.unstack(stacked)
    alone = torch.tensor([590, sum(lengths) - 1])
    assert torch.equal(back, states.index_fill(0, alone, 0)) and back[alone].abs().max() == 0


def test_a_batch_of_documents_is_no_larger_than_it_may_be():
    lengths = [1000] * 3 + [545] * 3 + [512] * 5
    layout = DocumentMask(tuple(Run(1, length) for length in lengths), torch.device("cpu")).layout
    found = [(batch.count, batch.length) for batch in layout.batches]
    assert found == [(1, 1024)] * 3 + [(3, 576), (4, 512), (1, 512)]


def test_rows_of_single_tokens_attend_to_nothing():
    layout = DocumentMask((Run(3, 1),), torch.device("cpu")).layout
    states = torch.ones(3, 2, 4, dtype=torch.bfloat16, requires_grad=True)
    attended = attention._MatmulAttention.apply(states, states, states, layout, 0.5)
    attended.sum().backward()
    assert layout.batches == () and not attended.any() and not states.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_neither_sees_nor_is_seen(dtype):
    """Failure mode 14: other tokens in A leave B bit-equal, and B alone scores the same."""
    model = build_model(dtype=dtype)
    batch = {name: tensor for name, tensor in pack(((7, 5),)).items() if name != "labels"}
    other = {**batch, "input_ids": torch.cat([batch["input_ids"][:, :7] + 1, batch["input_ids"][:, 7:]], dim=1)}
    alone = {name: tensor[:, 7:] for name, tensor in batch.items()}
    with torch.no_grad(), document_attention(model):
        behind, behind_other, by_itself = (model(**inputs, use_cache=False).logits for inputs in (batch, other, alone))
    assert torch.equal(behind[:, 7:], behind_other[:, 7:])
    assert not torch.equal(behind[:, :7], behind_other[:, :7])
    assert torch.allclose(behind[:, 7:], by_itself, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_no_dense_mask_is_made(monkeypatch):
    model, seen = build_model(), []
    monkeypatch.setattr(documents, "sdpa_mask", lambda **options: pytest.fail("a dense mask"))
    attend = attention.attend_documents

    def watch(module, query, key, value, mask, *args, **kwargs):
        seen.append(mask)
        return attend(module, query, key, value, mask, *args, **kwargs)

    monkeypatch.setattr(attention, "attend_documents", watch)
    with document_attention(model):
        model(**pack(((4, 4, 3),)), use_cache=False)
    assert [type(mask) for mask in seen] == [DocumentMask] * 2
    assert [(run.count, run.length) for run in seen[0].runs] == [(2, 4), (1, 3)]


def test_padded_batches_and_generation_go_on_as_before():
    model = build_model()
    ids = pack(((9,), (9,)))["input_ids"]
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])

    def both():
        answer = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        return model(ids, attention_mask=mask).logits, answer

    logits, answer = both()
    with document_attention(model):
        ours, our_answer = both()
    assert torch.allclose(ours, logits, atol=1e-5) and torch.equal(our_answer, answer)


def test_gradient_checkpointing_changes_nothing():
    model, batch = build_model().train(), pack(((7, 3, 10),))
    with document_attention(model):
        _, gradient = run(model, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert torch.allclose(run(model, batch)[1], gradient, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_drops(dtype):
    """Two passes differ, and their mean over many comes near the attention without dropout."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 4, 6, 8, dtype=dtype) for _ in range(3))
    mask = DocumentMask((Run(1, 4), Run(1, 2)), torch.device("cpu"))
    module = torch.nn.Module()
    exact = attention.attend_documents(module, query, key, value, mask)[0].float()
    passes = [attention.attend_documents(module, query, key, value, mask, dropout=0.5)[0].float() for _ in range(400)]
    assert not torch.equal(passes[0], passes[1])
    assert (torch.stack(passes).mean(0) - exact).abs().max() < 0.4 < (passes[0] - exact).abs().max()


def test_what_it_cannot_do_is_refused():
    states = torch.randn(1, 2, 4, 8)
    mask = DocumentMask((Run(2, 2),), torch.device("cpu"))
    with pytest.raises(ValueError, match="softcap"):
        attention.attend_documents(torch.nn.Module(), states, states, states, mask, softcap=30.0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "falcon", "opt", "bloom", "mamba"])
def test_shards_are_judged_as_the_whole_is(kind):
    """Weights that lie elsewhere cannot be tried; falcon, OPT and bloom take no notice of positions."""
    shape = {"vocab_size": 320, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0}
    others = {"opt": {"word_embed_proj_dim": 64, "ffn_dim": 96}, "gemma2": {"head_dim": 16}}
    config = AutoConfig.for_model(kind, **shape, **others.get(kind, {}))
    whole = AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        sharded = AutoModelForCausalLM.from_config(config)
    assert keeps_documents_apart(sharded) == keeps_documents_apart(whole) == (kind in ("llama", "gpt2", "gemma2"))


def test_a_window_repeats_keys_where_grouped_ones_have_no_fused_kernel(monkeypatch):
    """CUDA falls back to keeping the scores of all pairs for a mask over grouped keys."""
    seen = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **options: seen.append((k.shape[1], options["enable_gqa"])) or fused(q, k, v, **options),
    )
    query, key = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    window = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril().triu(-2)
    for mask, expected in ((window, (4, False)), (None, (2, True))):
        run = DocumentMask((Run(1, 6, mask),), torch.device("cpu"))
        attention.attend_documents(torch.nn.Module(), query, key, key, run)
        assert seen.pop() == expected


def test_other_ways_to_attend_are_left_alone():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE), attn_implementation="eager")
    with document_attention(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]},
        {"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]},
    ],
    ids=["repeated", "trained whole"],
)
def test_layers_that_peft_copies_attend_by_document_too(lora):
    """Each copy has a copy of the config, which the model's own does not reach."""
    tuned = get_peft_model(build_model(), LoraConfig(task_type="CAUSAL_LM", **lora)).eval()
    model, batch = tuned.get_base_model(), pack(ROWS["one row"])
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
        with document_attention(model):
            assert {config._attn_implementation for config in configs} == {DOCUMENTS}
            ours = model(**batch, use_cache=False).logits
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    assert torch.allclose(ours, logits, atol=1e-4)


def test_the_name_does_not_leak_into_saved_configs(tmp_path):
    """A merged model must load where this package is not installed."""
    model = build_model()
    with document_attention(model):
        model.config.save_pretrained(tmp_path)
    assert DOCUMENTS not in (tmp_path / "config.json").read_text()
