"""The steps as a notebook calls them, on a model, a tokenizer and rows of the user's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import lora_ft


@pytest.fixture
def parts(tiny_base):
    """Model and tokenizer, as transformers reads them."""
    return AutoModelForCausalLM.from_pretrained(tiny_base), AutoTokenizer.from_pretrained(tiny_base)


def test_the_readmes_three_lines(parts, chat_rows, tmp_path):
    my_model, tokenizer = parts
    rows = lora_ft.prepare_dataset(chat_rows, tokenizer)
    model = lora_ft.attach_adapter(my_model, {"r": 16, "target_modules": "all-linear"})
    trainer = lora_ft.train_model(model, tokenizer, rows, tmp_path / "out", num_train_epochs=1)
    assert trainer.state.global_step == 5
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_model_without_an_adapter_is_refused(parts, chat_rows, tmp_path):
    my_model, tokenizer = parts
    rows = lora_ft.prepare_dataset(chat_rows, tokenizer)
    with pytest.raises(lora_ft.UserError, match="attach_adapter"):
        lora_ft.train_model(my_model, tokenizer, rows, tmp_path / "out")


@pytest.fixture
def packed_parts(tiny_base):
    """A model in 4 bit that somebody else loaded, as on a CPU with AVX512-BF16, its 4-bit layers, and a tokenizer."""
    from bitsandbytes.nn import Linear4bit

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=config)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    return model, layers, AutoTokenizer.from_pretrained(tiny_base)


def test_weights_in_4_bit_that_somebody_else_loaded_stay_what_they_are(packed_parts, chat_rows, tmp_path):
    """Failure mode 33: a forward pass without gradients, of which a training makes several, would repack them."""
    my_model, layers, tokenizer = packed_parts
    before = [layer.weight.data.clone() for layer in layers]
    rows = lora_ft.prepare_dataset(chat_rows, tokenizer)
    model = lora_ft.attach_adapter(my_model, {"r": 4, "target_modules": "all-linear"})
    lora_ft.train_model(model, tokenizer, rows, tmp_path / "out", num_train_epochs=1)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 35)[None])
    assert before and all(torch.equal(data, layer.weight.data) for data, layer in zip(before, layers, strict=True))


def test_weights_in_4_bit_that_were_repacked_before_are_refused(packed_parts):
    """Their scales were rounded then; what is trained on them could not be told to be so by a reload."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    my_model, layers, _ = packed_parts
    weight = layers[3].weight
    weight.data, _ = _convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    with pytest.raises(lora_ft.UserError, match=r"self_attn\.o_proj\n.*Load it again"):
        lora_ft.attach_adapter(my_model, {"r": 4, "target_modules": "all-linear"})


def test_several_gpus_without_a_launcher_are_one(monkeypatch, capsys):
    """transformers would deal each batch out to all of them."""
    from lora_ft.training.assemble import use_one_gpu

    class Arguments:
        _n_gpu = 4
        n_gpu = property(lambda self: self._n_gpu)

    assert use_one_gpu(Arguments()).n_gpu == 1
    assert "one of 4 GPUs" in capsys.readouterr().err
