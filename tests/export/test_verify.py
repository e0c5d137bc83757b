"""A folder that verifies is what it says; every way of spoiling one is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CASES, CONFIGS, add_adapter, make_base, make_tuned
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_ft.cli import main
from lora_ft.errors import UserError
from lora_ft.export.merge import merge_adapter
from lora_ft.export.save import save_adapter
from lora_ft.export.verify import verify_folder
from lora_ft.fingerprint import hash_file, hash_tensors, identify_base


def faults(report) -> list[str]:
    """Names of the findings that do not hold."""
    return [finding.name for finding in report.findings if not finding.ok]


def rewrite(folder, change) -> None:
    """The adapter's tensors changed, and the manifest made to agree, as a careful forger would."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    manifest = json.loads((folder / "lora_ft.json").read_text())
    manifest["tensors"] = hash_tensors(folder / "adapter_model.safetensors")
    (folder / "lora_ft.json").write_text(json.dumps(manifest))


def test_a_4bit_adapter_answers_in_a_fresh_process_as_it_did_live(tmp_path):
    """Failure modes 30, 33 and 39: the base is quantised again the same way, and no logit moves."""
    base = make_base("llama", tmp_path / "base", torch.bfloat16)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, quantization_config=quantization)
    tuned = add_adapter(model, CASES["lora"].lora)
    samples = [[1, 2, 3, 4, 5], [9, 8, 7]]
    save_adapter(tuned, None, tmp_path / "run" / "adapter", base=identify_base(str(base), base), samples=samples)
    report = verify_folder(tmp_path / "run")
    assert report.ok
    names = [finding.name for finding in report.findings]
    assert names == ["run", "files", "values", "base", "keys", "vllm", "samples"]
    assert "within 0.0e+00" in report.findings[-1].detail


def test_a_classifier_answers_in_a_fresh_process_with_the_head_it_was_trained_with(tmp_path):
    """Failure mode 30: a head that was not saved would be made up anew."""
    tuned = make_tuned(CASES["classifier"], tmp_path)
    report = verify_folder(tuned.adapter)
    assert report.ok
    assert "within 0.0e+00" in report.findings[-1].detail


def test_answers_that_changed_are_found(copied):
    """Bytes, keys and shapes agree; only the recorded answers tell that one layer was scaled."""

    def scale(tensors):
        return {key: value * 3 if "layers.1.mlp.down_proj.lora_B" in key else value for key, value in tensors.items()}

    rewrite(copied, scale)
    assert verify_folder(copied, quick=True).ok
    assert faults(verify_folder(copied)) == ["samples"]


def test_a_changed_byte_is_found(copied):
    data = bytearray((copied / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (copied / "adapter_model.safetensors").write_bytes(data)
    (copied / "tokenizer.json").write_text("{}")
    (copied / "chat_template.jinja").unlink()
    report = verify_folder(copied, quick=True)
    assert faults(report) == ["files"]
    for name in (
        "adapter_model.safetensors has changed",
        "tokenizer.json has changed",
        "chat_template.jinja is missing",
    ):
        assert name in report.findings[0].detail


def test_a_truncated_file_is_found(copied):
    data = (copied / "adapter_model.safetensors").read_bytes()
    (copied / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    report = verify_folder(copied, quick=True)
    assert faults(report) == ["files"]
    assert "cut short" in report.findings[0].detail


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda tensors: dict(list(tensors.items())[1:]), "1 missing"),
        (lambda tensors: {**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 64)}, "1 unexpected"),
        (lambda tensors: {key.replace("q_proj", "query"): value for key, value in tensors.items()}, "4 missing"),
        (lambda tensors: {key: torch.cat([value, value]) for key, value in tensors.items()}, "28 of another shape"),
    ],
    ids=["missing", "extra", "renamed", "misshapen"],
)
def test_keys_are_strict_both_ways(copied, change, detail):
    """Failure mode 39: PEFT loads all of these with a warning at most."""
    rewrite(copied, change)
    report = verify_folder(copied, quick=True)
    assert faults(report) == ["keys"]
    assert detail in next(finding.detail for finding in report.findings if not finding.ok)


@pytest.mark.parametrize(("factor", "detail"), [(float("inf"), "finite"), (0.0, "changes nothing")])
def test_values_must_be_finite_and_do_something(copied, factor, detail):
    rewrite(copied, lambda tensors: {k: v * factor if "lora_B" in k else v for k, v in tensors.items()})
    report = verify_folder(copied, quick=True)
    assert faults(report) == ["values"]
    assert detail in next(finding.detail for finding in report.findings if not finding.ok)


def test_another_base_is_found_though_its_shapes_fit(copied, tmp_path):
    """Failure mode 41."""
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path / "other")
    report = verify_folder(copied, quick=True, base=str(tmp_path / "other"))
    assert faults(report) == ["base"]


def test_pickled_weights_are_not_opened(copied):
    """Failure mode 49: a pickle beside intact weights is not looked at; one in their place is refused."""
    (copied / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert verify_folder(copied, quick=True).ok
    (copied / "adapter_model.safetensors").unlink()
    assert faults(verify_folder(copied, quick=True)) == ["files"]


def test_what_is_none_of_the_three_is_refused(tmp_path):
    with pytest.raises(UserError, match="an adapter, a run"):
        verify_folder(tmp_path)


@pytest.fixture
def merged(plain, tmp_path):
    """A merged folder, without proof."""
    merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    return tmp_path / "merged"


def test_a_merged_folder_verifies(merged):
    report = verify_folder(merged)
    assert report.ok
    assert [finding.name for finding in report.findings] == ["keys", "proof", "files", "values", "samples"]


def test_a_changed_weight_of_a_merged_model_is_found(merged):
    data = bytearray((merged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (merged / "model.safetensors").write_bytes(data)
    report = verify_folder(merged)
    assert faults(report) == ["files"]
    assert verify_folder(merged, quick=True).ok, "quick does not read the weights"


def test_a_missing_weight_of_a_merged_model_is_found(merged):
    weights = load_file(merged / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    report = verify_folder(merged, quick=True)
    assert faults(report) == ["keys"]
    assert "up_proj" in report.findings[0].detail


def test_values_of_a_merged_model_must_be_finite(merged):
    weights = load_file(merged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    assert set(faults(verify_folder(merged))) == {"files", "values"}


def test_a_run_is_verified_with_its_merged_model(plain, merged):
    shutil.copytree(plain.adapter, merged.parent / "adapter")
    report = verify_folder(merged.parent, quick=True)
    assert report.ok
    assert {"keys", "merged keys", "merged proof"} <= {finding.name for finding in report.findings}
    assert report.to_json()["ok"] is True


def test_companion_files_are_held_against_their_hashes(merged):
    assert hash_file(merged / "tokenizer.json")
    (merged / "config.json").write_text((merged / "config.json").read_text() + "\n")
    assert faults(verify_folder(merged, quick=True)) == ["files"]


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_misshapen_weight_of_a_merged_model_is_found(merged, name):
    weights = load_file(merged / "model.safetensors")
    weights[name] = weights[name][:8].contiguous()
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    report = verify_folder(merged, quick=True)
    assert faults(report) == ["keys"]
    assert f"of another shape: {name}" in report.findings[0].detail


def test_a_misshapen_expert_of_a_merged_model_is_found(tmp_path):
    """Several tensors of the file are one parameter; their rows are counted together."""
    tuned = make_tuned(CASES["mixtral_experts"], tmp_path)
    merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    assert verify_folder(tmp_path / "merged", quick=True).ok
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts.2.w3.weight"))
    weights[name] = weights[name][:8].contiguous()
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    report = verify_folder(tmp_path / "merged", quick=True)
    assert "of another shape" in report.findings[0].detail and "experts" in report.findings[0].detail


def test_a_run_that_has_not_finished_is_not_said_to_be_as_it_was_saved(plain, tmp_path, capsys):
    shutil.copytree(plain.adapter, tmp_path / "adapter")
    (tmp_path / "run.json").write_text(json.dumps({"state": "training"}))
    finding = verify_folder(tmp_path, quick=True).findings[0]
    assert (finding.name, finding.ok, finding.is_checked) == ("run", True, False)
    assert main(["verify", str(tmp_path), "--quick"]) == 0
    assert "?     run: it has not finished" in capsys.readouterr().out
    (tmp_path / "run.json").write_text(json.dumps({"state": "finished"}))
    assert faults(verify_folder(tmp_path, quick=True)) == ["run"]


DAMAGE = ["{", "[1]", "{}", b"\xff\xfe", '{"weight_map": [1]}', '{"peft_type": "LORA", "r": {"a": []}, "files": 1}']


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "adapter/adapter_config.json",
        "adapter/lora_ft.json",
        "adapter/adapter_model.safetensors",
        "merged/config.json",
        "merged/merge_report.json",
        "merged/model.safetensors.index.json",
        "merged/model.safetensors",
    ],
)
def test_damaged_files_are_named(plain, merged, capsys, name, damage):
    """No traceback, whatever stands in a file, and never a good word for it."""
    run = merged.parent
    shutil.copytree(plain.adapter, run / "adapter")
    if "index" in name:
        (merged / "model.safetensors").unlink()
    (run / name).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert main(["verify", str(run), "--quick"]) in {1, 2}
    said = capsys.readouterr()
    assert "FAIL" in said.out or Path(name).name in said.err
