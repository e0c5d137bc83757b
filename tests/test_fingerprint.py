"""Hashes tell things apart that differ and only those; folders appear whole or not at all."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_ft.errors import UserError
from lora_ft.fingerprint import (
    SAMPLE_BYTES,
    fingerprint_base,
    hash_folder,
    hash_json,
    hash_tensors,
    identify_base,
    list_weight_files,
    read_safetensors_header,
    sample_offsets,
    whole_folder,
)


@pytest.fixture
def base(tmp_path):
    """A folder that looks like a base, with a weight of 64 KB."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text('{"hidden_size": 64, "transformers_version": "5.0"}')
    save_file({"a": torch.zeros(128, 128), "b": torch.ones(7)}, folder / "model.safetensors")
    return folder


def test_a_fine_tune_of_one_matrix_has_another_fingerprint(base):
    before = fingerprint_base(base)
    tensors = load_file(base / "model.safetensors")
    tensors["a"] += 1e-3
    save_file(tensors, base / "model.safetensors")
    assert fingerprint_base(base) != before


def test_another_config_is_another_base_but_a_resave_is_not(base):
    before = fingerprint_base(base)
    (base / "config.json").write_text('{"transformers_version": "5.1", "hidden_size": 64, "_name_or_path": "x"}')
    assert fingerprint_base(base) == before
    (base / "config.json").write_text('{"hidden_size": 64, "rope_theta": 1}')
    assert fingerprint_base(base) != before


def test_how_tensors_are_spread_over_files_does_not_matter(base):
    before = fingerprint_base(base)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    weight_map = {}
    for name, tensor in tensors.items():
        save_file({name: tensor}, base / f"model-{name}.safetensors")
        weight_map[name] = f"model-{name}.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert fingerprint_base(base) == before
    assert len(list_weight_files(base)) == 2


def test_weights_that_nobody_loads_do_not_count(base):
    before = fingerprint_base(base)
    save_file({"a": torch.ones(1)}, base / "consolidated.safetensors")
    assert fingerprint_base(base) == before


def test_little_of_a_large_weight_is_read(base, monkeypatch):
    """Five samples a tensor: the cost does not grow with the weights."""
    assert sample_offsets(100 * SAMPLE_BYTES) == [0, 101376, 202752, 304128, 405504]
    assert sample_offsets(10) == [0]


def test_pickled_or_missing_weights_are_refused(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors is missing"):
        identify_base("base", base)


def test_a_truncated_file_is_an_error_of_its_own(base):
    data = (base / "model.safetensors").read_bytes()
    for length in (4, 20, len(data) - 1):
        (base / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(UserError, match="cut short"):
            read_safetensors_header(base / "model.safetensors")


def test_tensors_hash_alike_whatever_their_order_and_metadata(tmp_path):
    one, other = torch.arange(6.0), torch.arange(4.0)
    save_file({"x": one, "y": other}, tmp_path / "1.safetensors")
    save_file({"y": other, "x": one}, tmp_path / "2.safetensors", metadata={"format": "pt"})
    save_file({"x": one.view(2, 3), "y": other}, tmp_path / "3.safetensors")
    assert hash_tensors(tmp_path / "1.safetensors") == hash_tensors(tmp_path / "2.safetensors")
    assert hash_tensors(tmp_path / "1.safetensors") != hash_tensors(tmp_path / "3.safetensors")


def test_json_hashes_alike_whatever_the_order_of_keys():
    assert hash_json({"a": 1, "b": [1, 2]}) == hash_json({"b": [1, 2], "a": 1})
    assert hash_json([1, 2]) != hash_json([2, 1])


def test_a_name_that_others_can_load(base):
    assert identify_base("org/base", base, "0123").loadable_name == "org/base"
    assert identify_base("builtin:wren", base).loadable_name == str(base)


def test_a_folder_appears_whole_and_replaces_an_older_one(tmp_path):
    target = tmp_path / "deep" / "target"
    for text in ("old", "new"):
        with whole_folder(target) as draft:
            (draft / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "old"
    assert (target / "file").read_text() == "new"
    assert hash_folder(target).keys() == {"file"}
    assert os.listdir(target.parent) == ["target"]


def test_a_folder_that_fails_leaves_the_older_one(tmp_path):
    with whole_folder(tmp_path / "target") as draft:
        (draft / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "target") as draft:
        (draft / "file").write_text("new")
        raise KeyboardInterrupt
    assert (tmp_path / "target" / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["target"]


def test_the_single_file_counts_where_an_index_lies_beside_it(tmp_path):
    """As in transformers: an index of an earlier save would lead to other weights than those that are read."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "old.safetensors"}}')
    assert list_weight_files(tmp_path) == [tmp_path / "model.safetensors"]
