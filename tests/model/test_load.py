"""Bases found, identified and read in every width; unreadable ones refused in one sentence."""

import json
import shutil

import pytest
import torch

from lora_ft.errors import UserError
from lora_ft.model.load import find_base, load_base, load_tokenizer
from lora_ft.sections import ModelSection
from tests.conftest import make_base

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}


@pytest.fixture(scope="module")
def gentle_base(tmp_path_factory):
    """A base with weights as small as they are before training, so that rounding shows only once."""
    return make_base(tmp_path_factory.mktemp("gentle"), initializer_range=0.02)


def section(folder, dtype="float32") -> ModelSection:
    return ModelSection(base=str(folder), dtype=dtype, attn_implementation="sdpa")


def test_layers_are_left_alone_by_patterns_and_heads_anyway(gentle_base):
    from bitsandbytes.nn import Linear4bit

    chosen = section(gentle_base)
    model = load_base(find_base(chosen.base), chosen, {**NF4, "llm_int8_skip_modules": ["score", "model.layers.0.*"]})
    kept = [any(isinstance(module, Linear4bit) for module in layer.modules()) for layer in model.model.layers]
    assert kept == [False, True]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"llm_int8_enable_fp32_cpu_offload": True}, "No layer of this base would be quantised"),
        ({"llm_int8_skip_modules": ["q_projj", "k_proj"]}, "q_projj"),
    ],
)
@pytest.mark.parametrize("width", [NF4, INT8], ids=["nf4", "int8"])
def test_quantisation_that_would_not_happen_is_refused(gentle_base, width, more, said):
    """transformers leaves alone what lies on a CPU, where it was told to offload to one."""
    chosen = section(gentle_base)
    with pytest.raises(UserError, match=said):
        load_base(find_base(chosen.base), chosen, {**width, **more})


@pytest.mark.parametrize("quantization", [NF4, FP4, INT8, None], ids=["nf4", "fp4", "int8", "plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_width_answers_like_the_original(gentle_base, quantization, dtype):
    """Linear layers are of the width asked for, all else of `dtype`, and the logits stay near those of 32 bit."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    chosen = section(gentle_base, dtype)
    model = load_base(find_base(chosen.base), chosen, quantization)
    kinds = {NF4["load_in_4bit"]: Linear4bit}
    expected = Linear8bitLt if quantization is INT8 else kinds[True] if quantization else torch.nn.Linear
    assert type(model.model.layers[0].mlp.up_proj) is expected
    assert type(model.lm_head) is torch.nn.Linear, "the head stays floating point"
    assert model.model.embed_tokens.weight.dtype is getattr(torch, dtype)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    plain = load_base(find_base(str(gentle_base)), section(gentle_base))
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        logits, wanted = model.eval()(ids).logits.float(), plain.eval()(ids).logits
    assert torch.nn.functional.cosine_similarity(logits.flatten(), wanted.flatten(), dim=0) > 0.97


def test_evaluation_leaves_4bit_weights_alone(tiny_base):
    """Failure mode 33: with bitsandbytes' own setting the second gradient has a cosine of about 0.3 to the first."""
    from peft import LoraConfig, get_peft_model

    chosen = section(tiny_base, "bfloat16")
    model = load_base(find_base(chosen.base), chosen, NF4)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    ids = torch.arange(3, 35)[None]

    def gradients() -> torch.Tensor:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])

    before = gradients()
    packed = {name: p.data.clone() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert packed
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert all(torch.equal(dict(model.named_parameters())[name], data) for name, data in packed.items())
    assert torch.nn.functional.cosine_similarity(before, gradients(), dim=0) > 0.999


def test_4bit_layer_whose_width_is_no_multiple_of_32(tmp_path):
    base = make_base(tmp_path / "odd", intermediate_size=72)
    chosen = section(base, "bfloat16")
    model = load_base(find_base(chosen.base), chosen, NF4)
    with torch.no_grad():
        assert model.eval()(torch.arange(3, 35)[None]).logits.isfinite().all()


def test_identity_tells_two_bases_of_one_shape_apart(tiny_base, tmp_path):
    from safetensors.torch import load_file, save_file

    first = find_base(str(tiny_base))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_base, copy)
    assert find_base(str(copy)).fingerprint == first.fingerprint
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert find_base(str(copy)).fingerprint != first.fingerprint


def remove_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remove_config(folder):
    (folder / "config.json").unlink()


def break_config(folder):
    (folder / "config.json").write_text("{")


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def drop_a_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def rename_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonesuch"}))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_weights, "no safetensors weights; pickled .bin files can run code"),
        (remove_config, "has no config.json"),
        (break_config, "is not JSON"),
        (cut_weights, ""),
        (drop_a_weight, "1 weights of the architecture are not in its files, model.norm.weight first"),
        (rename_architecture, "nonesuch"),
    ],
)
def test_unreadable_base_is_one_sentence(tiny_base, tmp_path, damage, expected):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        load_base(find_base(str(folder)), section(folder))
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("name", ["no-such-org/no-such-model", "nowhere", "builtin:nothing", "./missing/folder"])
def test_base_that_is_not_there(name):
    with pytest.raises(UserError, match=r"(?s)is no folder here|Neither a folder|Nothing of that name"):
        find_base(str(name))


def test_tokenizer_without_pad_token_shares_the_end_token(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder, section(folder))
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"


def test_tokenizer_that_cannot_be_read(tiny_base, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer cannot be read"):
        load_tokenizer(folder, section(folder))
