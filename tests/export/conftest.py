"""One tuned model that most tests of this folder share, and copies of its adapter to be spoilt."""

import shutil

import pytest
import torch
from tiny_models import CASES, make_tuned


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small only wait for a second thread; new processes inherit the setting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tiny_base):
    """A LoRA on all linear layers of a Llama, with a tokenizer."""
    from transformers import AutoTokenizer

    return make_tuned(CASES["lora"], tmp_path_factory.mktemp("plain"), AutoTokenizer.from_pretrained(tiny_base))


@pytest.fixture
def copied(plain, tmp_path):
    """A copy of its adapter."""
    return shutil.copytree(plain.adapter, tmp_path / "adapter")
