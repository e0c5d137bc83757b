"""Quantise once: the second start reads what the first one made, and nothing else."""

import json
import multiprocessing
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from lora_ft.fingerprint import identify_base
from lora_ft.model import quant_cache
from lora_ft.model.quant_cache import clear_cached, list_cached, load_quantised
from tests.conftest import make_base

OPTIONS = {"dtype": torch.float32, "device_map": {"": "cpu"}, "local_files_only": True, "attn_implementation": "sdpa"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "cache"))
    return make_base(tmp_path / "base")


def load(folder, name="a base", options=OPTIONS, **quantization):
    config = BitsAndBytesConfig(**{**NF4, **quantization})
    model, info = load_quantised(AutoModelForCausalLM, identify_base(name, folder), config, options)
    assert not info["missing_keys"]
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def quantisations(monkeypatch):
    """A list with one entry for every time a base is quantised."""
    done, store = [], quant_cache._store
    monkeypatch.setattr(quant_cache, "_store", lambda *arguments: (done.append(1), store(*arguments)))
    return done


def test_the_second_start_reads_what_the_first_made(base, quantisations):
    first, second = load(base), load(base)
    assert len(quantisations) == 1
    assert is_equal(state(first), state(second))
    ids = torch.arange(3, 20)[None]
    assert torch.equal(first.eval()(ids).logits, second.eval()(ids).logits)
    assert second.config._name_or_path == second.name_or_path == str(base)
    assert second.is_loaded_in_4bit and second.generation_config.to_dict() == first.generation_config.to_dict()


@pytest.mark.parametrize(
    "change",
    [
        {"bnb_4bit_quant_type": "fp4"},
        {"bnb_4bit_use_double_quant": False},
        {"bnb_4bit_compute_dtype": "bfloat16"},
        {"bnb_4bit_quant_storage": "bfloat16"},  # whose bytes read as NaN here and there
    ],
    ids=str,
)
def test_another_quantisation_is_another_entry(base, quantisations, change):
    load(base)
    load(base, **change)
    assert len(quantisations) == len(list_cached()) == 2


def test_other_weights_are_another_entry(base, quantisations):
    load(base)
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1  # one bit, where the fingerprint's samples need not look
    path.write_bytes(data)
    load(base)
    assert len(quantisations) == 2


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "entry"])
def test_damage_is_found_and_mended(base, quantisations, damage):
    before = state(load(base))
    (cached,) = list_cached()
    weights, entry = cached.folder / "model.safetensors", cached.folder / "entry.json"
    if damage == "bit":
        data = bytearray(weights.read_bytes())
        data[len(data) // 2] ^= 8
        weights.write_bytes(data)
    elif damage == "short":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "gone":
        weights.unlink()
    else:
        entry.write_text("{")
    assert is_equal(state(load(base)), before)
    assert len(quantisations) == 2
    load(base)
    assert len(quantisations) == 2


def test_nothing_half_written_is_left_or_found(base, monkeypatch, quantisations):
    """The disk fills up, or the process dies, while weights are written."""
    monkeypatch.setattr(quant_cache, "_checksums", lambda folder: (_ for _ in ()).throw(OSError("disk full")))
    load(base)
    assert list_cached() == () and not list(quant_cache.find_cache().glob("*.partial"))
    monkeypatch.undo()


@pytest.mark.parametrize("part", ["weight", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_what_does_not_read_back_as_it_was_made_is_not_kept(base, monkeypatch, part):
    """Training on it, and proving an adapter with it, would agree with each other and with no one else."""
    made = state(load(base))
    clear_cached()
    save = PreTrainedModel.save_pretrained

    def save_badly(model, folder):
        save(model, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"model.layers.0.self_attn.q_proj.{part}"].view(torch.uint8).view(-1)[-1] ^= 1
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_badly)
    assert is_equal(state(load(base)), made)
    assert list_cached() == () and not list(quant_cache.find_cache().glob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_is_done_without(base, monkeypatch, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.setenv("LORA_FT_CACHE", str(tmp_path / "locked" / "cache"))
    assert load(base).is_loaded_in_4bit


def test_a_full_disk_is_left_alone(base, monkeypatch):
    monkeypatch.setattr(quant_cache, "SPARE_BYTES", 2**60)
    assert load(base).is_loaded_in_4bit and list_cached() == ()


def _load_in_process(folder, queue):
    torch.set_num_threads(1)
    model = load(folder)
    queue.put({name: tensor.double().sum().item() for name, tensor in model.state_dict().items()})


def test_two_processes_at_once(base):
    """Both get the model, one of them makes it."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_load_in_process, args=(base, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert sums[0] == sums[1] and len(list_cached()) == 1


def test_show_and_clear(base):
    load(base, name="org/one")
    load(base, name="org/two", bnb_4bit_quant_type="fp4")
    assert [cached.base for cached in list_cached()] == ["org/two", "org/one"]
    assert all(cached.num_bytes > 10_000 and cached.quantization["load_in_4bit"] for cached in list_cached())
    json.dumps([cached.to_json() for cached in list_cached()])
    assert [cached.base for cached in clear_cached("org/one")] == ["org/one"]
    assert [cached.base for cached in list_cached()] == ["org/two"]
    clear_cached()
    assert list_cached() == () and {path.suffix for path in quant_cache.find_cache().iterdir()} <= {".lock"}


def test_what_is_being_written_is_not_cleared(base):
    load(base)
    (entry,) = list_cached()
    draft = entry.folder.with_name(f".{entry.folder.name}.1.partial")
    draft.mkdir()
    with quant_cache._lock(entry.folder):
        assert clear_cached() == () and draft.exists()
    assert clear_cached() == (entry,) and not draft.exists()


def test_a_damaged_entry_is_shown_and_cleared(base):
    load(base)
    (list_cached()[0].folder / quant_cache.ENTRY).write_text("")
    assert [cached.base for cached in list_cached()] == ["(damaged)"]
    assert len(clear_cached()) == 1 and list_cached() == ()


@pytest.mark.parametrize("part", ["lock", "weights"])
def test_a_disk_that_takes_nothing_more_is_done_without(base, monkeypatch, part):
    """A folder that is there and read-only, and a disk that is full, of which safetensors has an error of its own."""
    from safetensors import SafetensorError

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system") if part == "lock" else SafetensorError("No space left on device")

    if part == "lock":
        monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    else:
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    assert load(base) is not None and list_cached() == ()


def test_what_is_not_cached(base, quantisations, tmp_path):
    """8-bit weights, bases that are quantised already, and bases with code of their own."""
    load(base, load_in_4bit=False, load_in_8bit=True)
    load(base, options={**OPTIONS, "trust_remote_code": True})
    assert quantisations == []
    load(base)
    shutil.copytree(list_cached()[0].folder, tmp_path / "quantised")  # what others publish as a 4-bit base
    load(tmp_path / "quantised")
    assert quantisations == [1]
