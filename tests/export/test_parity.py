"""The proof after a merge: sound merges pass it, others do not, and the figures are what they say."""

import json

import pytest
import torch
from tiny_models import ALL, CASES, add_adapter, make_base
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_ft.errors import RunFailed, UserError
from lora_ft.export import prepare_merge
from lora_ft.export.merge import merge_adapter
from lora_ft.export.merge_report import read_report
from lora_ft.export.parity import Parity, compare_logits, compare_with_references, record_references
from lora_ft.export.save import save_adapter
from lora_ft.export.verify import verify_folder
from lora_ft.fingerprint import identify_base
from lora_ft.model.load import use_safe_4bit_kernels

PROMPTS = [[1, 2, 3, 4, 5, 6], [9, 8, 7]]


def quantized(base, dtype, **fields):
    """The base in 4 or 8 bit."""
    config = BitsAndBytesConfig(**fields)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, quantization_config=config)
    use_safe_4bit_kernels(model)
    return model


def test_a_sound_merge_is_proven_in_fresh_processes(plain, tmp_path):
    report = merge_adapter(plain.adapter, tmp_path / "merged")
    assert report.verdict == "equal"
    assert report.compared_in.dtype == "float32"
    assert report.proof.num_prompts == 2
    assert report.proof.num_positions == 18
    assert report.proof.max_logit_difference < 1e-5
    assert report.proof.mean_adapter_effect > 0.05
    assert report.proof.greedy_agreement == report.proof.top_token_agreement == 1.0
    assert read_report(tmp_path / "merged") == report
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "Verdict: equal to base + adapter on 2 prompts" in card
    assert verify_folder(tmp_path / "merged").ok


def test_a_merge_that_is_not_equal_gets_no_name_and_says_why(plain, tmp_path, monkeypatch):
    """What PEFT's users met: the merged model is not the one that was trained, and nobody notices (peft#2321)."""
    find = prepare_merge.find_changes
    monkeypatch.setattr(prepare_merge, "find_changes", lambda skeleton, adapter, weight: find(skeleton, adapter, 0.5))
    with pytest.raises(RunFailed, match="not base \\+ adapter") as failed:
        merge_adapter(plain.adapter, tmp_path / "merged", prompts=PROMPTS)
    assert not (tmp_path / "merged").exists()
    draft = tmp_path / ".merged.merging"
    report = json.loads((draft / "merge_report.json").read_text())
    assert report["verdict"] == "not equal"
    assert report["faults"][0] in str(failed.value)
    assert failed.value.exit_code == 1


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    """An adapter trained on a 4-bit base in fp32, and the live model."""
    folder = tmp_path_factory.mktemp("four_bit")
    base = make_base("llama", folder / "base", torch.bfloat16)
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    tuned = add_adapter(quantized(base, torch.float32, **fields, bnb_4bit_use_double_quant=True), ALL)
    save_adapter(tuned, None, folder / "adapter", base=identify_base(str(base), base), samples=PROMPTS)
    return folder, tuned


def test_onto_quantized_is_the_model_that_was_trained(four_bit, tmp_path):
    """Failure mode 40: unquantised, and within rounding of adapter + the base that was chosen."""
    folder, tuned = four_bit
    report = merge_adapter(folder / "adapter", tmp_path / "quantized", onto="quantized", dtype="float32")
    assert report.training_difference < 1e-4
    merge_adapter(folder / "adapter", tmp_path / "original", dtype="float32", prove=False)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        live = tuned(ids).logits
        apart = {
            onto: (AutoModelForCausalLM.from_pretrained(tmp_path / onto)(ids).logits - live).abs().max().item()
            for onto in ("quantized", "original")
        }
    assert apart["quantized"] < 1e-4
    assert apart["original"] > 1e-2, "4 bits lose that much of a random base"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_quantised_layer_is_taken_as_it_was_held(name, tmp_path):
    """8 bit rounds activations too, so the merged model is near and not equal; GPT-2 is quantised transposed."""
    base = make_base(name, tmp_path / "base", torch.bfloat16)
    tuned = add_adapter(quantized(base, torch.float32, load_in_8bit=True), ALL)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="quantized", dtype="float32", prove=False)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert torch.allclose(merged, tuned(ids).logits, atol=3e-2)


@pytest.mark.parametrize("double", [True, False], ids=["double", "single"])
def test_a_base_that_is_stored_in_4_bit_is_unpacked(double, tmp_path):
    """Such bases are popular on the Hub; the merged model is in 16 or 32 bit, and what was trained."""
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    fields = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    quantized(base, torch.float32, **fields, bnb_4bit_use_double_quant=double).save_pretrained(tmp_path / "packed")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    use_safe_4bit_kernels(model)
    tuned = add_adapter(model, ALL)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base("packed", tmp_path / "packed"))
    with pytest.raises(UserError, match="Merge with --onto quantized"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", prove=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto="quantized", prove=double)
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        assert torch.allclose(merged, tuned(ids).logits, atol=1e-4)
    assert verify_folder(tmp_path / "merged", quick=True).ok


def test_onto_quantized_needs_a_quantised_training(plain, tmp_path):
    with pytest.raises(UserError, match="trained on a quantised base"):
        merge_adapter(plain.adapter, tmp_path / "merged", onto="quantized", prove=False)


def test_the_reference_and_the_comparison_agree_with_a_plain_computation(plain):
    references = record_references(plain.model, PROMPTS)
    same = compare_with_references(plain.model, references)
    assert same.max_logit_difference == same.mean_kl_divergence == 0.0
    with plain.model.disable_adapter():
        bare = compare_with_references(plain.model, references)
    assert bare.mean_logit_difference == pytest.approx(bare.mean_adapter_effect, rel=0.2)
    assert bare.faults("float32")


def test_figures_of_two_logits():
    """KL of two coins, 0.5 against 0.25: 0.5 ln 2 + 0.5 ln(2/3) = 0.1438 nats."""
    reference = torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1]]))
    other = torch.log(torch.tensor([[0.25, 0.75], [0.9, 0.1]]))
    found = compare_logits(reference, other)
    assert found.sum_kl_divergence == pytest.approx(0.1438, abs=1e-4)
    assert found.num_same_tokens == 1
    assert found.positions == 2
    assert found.max_logit_difference == pytest.approx(0.6931, abs=1e-4)


def figures(**changes) -> Parity:
    """A proof that holds, with some figures changed."""
    good = {
        "num_prompts": 1,
        "num_positions": 8,
        "max_logit": 10.0,
        "max_logit_difference": 1e-4,
        "mean_logit_difference": 1e-5,
        "mean_adapter_effect": 1.0,
        "mean_kl_divergence": 0.0,
        "top_token_agreement": 1.0,
        "greedy_agreement": 1.0,
    }
    return Parity(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "dtype", "holds"),
    [
        ({}, "float32", True),
        ({"max_logit_difference": 0.1}, "float32", False),
        ({"max_logit_difference": 0.1}, "bfloat16", True),
        ({"max_logit_difference": float("nan")}, "bfloat16", False),
        ({"mean_logit_difference": 0.01, "mean_adapter_effect": 0.012}, "bfloat16", False),
    ],
    ids=["equal", "apart in fp32", "rounded to bf16", "not a number", "learnt less than rounding takes"],
)
def test_what_a_proof_must_show(changes, dtype, holds):
    assert (figures(**changes).faults(dtype) == []) == holds


def test_an_effect_lost_in_rounding_is_no_proof(tmp_path):
    """An adapter that moves weights by less than bf16 can say: merged into bf16 it is gone, into fp32 it is there."""
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = add_adapter(model, CASES["lora"].lora, noise=1e-4)
    save_adapter(tuned, None, tmp_path / "adapter", base=identify_base(str(base), base))
    references = record_references(tuned, PROMPTS)
    faults = {}
    for dtype in ("bfloat16", "float32"):
        merge_adapter(tmp_path / "adapter", tmp_path / dtype, dtype=dtype, prove=False)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=torch.float32)
        faults[dtype] = compare_with_references(merged, references).faults(dtype)
    assert "rounding to bfloat16 takes too much" in faults["bfloat16"][0]
    assert faults["float32"] == []
