"""The steps as a notebook calls them, on a model, a tokenizer and rows of the user's own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_several_gpus_without_a_launcher_are_one(monkeypatch, capsys):
    """transformers would deal each batch out to all of them."""
    from lora_ft.training.assemble import use_one_gpu

    class Arguments:
        _n_gpu = 4
        n_gpu = property(lambda self: self._n_gpu)

    assert use_one_gpu(Arguments()).n_gpu == 1
    assert "one of 4 GPUs" in capsys.readouterr().err
