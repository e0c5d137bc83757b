"""The streaming merge: little memory, any order, and no trace of a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CASES, add_adapter, make_tuned
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_ft.errors import UserError
from lora_ft.export import stream
from lora_ft.export.merge import merge_adapter
from lora_ft.export.save import save_adapter
from lora_ft.fingerprint import identify_base


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A base of several shards whose weights are merged in several pieces each."""
    folder = tmp_path_factory.mktemp("larger")
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1000, num_hidden_layers=2, num_attention_heads=8, vocab_size=1001
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder / "base", max_shard_size="2MB"
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    lora = {"target_modules": ["q_proj", "down_proj", "up_proj", "lm_head", "embed_tokens"], "r": 7}
    tuned = add_adapter(model, lora)
    save_adapter(tuned, None, folder / "adapter", base=identify_base(str(folder / "base"), folder / "base"))
    return folder, tuned


def test_weights_merged_in_pieces_equal_those_merged_whole(larger, tmp_path):
    """1001 rows are no multiple of anything; PEFT's whole-weight merge in fp32 is the reference, byte for byte."""
    folder, tuned = larger
    merge_adapter(folder / "adapter", tmp_path / "merged", prove=False)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    held = {
        name: tensor for file in set(index.values()) for name, tensor in load_file(tmp_path / "merged" / file).items()
    }
    expected = tuned.merge_and_unload().state_dict()
    assert held.keys() == expected.keys()
    assert [name for name in held if not torch.equal(held[name], expected[name].to(torch.bfloat16))] == []


def test_pieces_cover_a_tensor_once_and_are_never_slivers(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BLOCK_ELEMENTS", 64 * 64)
    seen = []
    split = stream.split_tensor
    monkeypatch.setattr(
        stream, "split_tensor", lambda tensor: seen.append((tensor, list(split(tensor)))) or split(tensor)
    )
    merge_adapter(plain.adapter, tmp_path / "merged", prove=False)
    for tensor, pieces in seen:
        rows = tensor.source.shape[0]
        assert [piece.block.start for piece in pieces] == [0, *(piece.block.stop for piece in pieces[:-1])]
        assert pieces[-1].block.stop == rows
        assert all(piece.block.stop - piece.block.start >= min(rows, stream.TILE_ROWS) for piece in pieces)
    assert any(len(pieces) > 1 for _, pieces in seen)


def test_an_interrupted_merge_goes_on_where_it_stood(larger, tmp_path, monkeypatch):
    folder, _ = larger
    out = tmp_path / "merged"
    written, write = [], stream.write_tensor

    def fail_after_five(tensor, *arguments):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(tensor.name)
        return write(tensor, *arguments)

    monkeypatch.setattr(stream, "write_tensor", fail_after_five)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(folder / "adapter", out, prove=False)
    assert not out.exists()
    again = []
    monkeypatch.setattr(stream, "write_tensor", lambda tensor, *rest: again.append(tensor.name) or write(tensor, *rest))
    report = merge_adapter(folder / "adapter", out, prove=False)
    assert len(written) == 5
    assert set(again) == report.tensors.keys() - set(written)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_another_merge_left_behind_is_not_used(larger, plain, tmp_path, monkeypatch):
    folder, _ = larger
    out = tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr(stream, "write_tensor", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            merge_adapter(folder / "adapter", out, prove=False)
    merge_adapter(plain.adapter, out, prove=False)
    assert {path.name for path in out.glob("*.safetensors")} == {"model.safetensors"}


def test_a_torn_journal_is_read_to_its_last_whole_line(tmp_path):
    (tmp_path / stream.JOURNAL_NAME).write_text('["one", "aa"]\n["two", "bb"]\n["thr')
    assert stream.Journal(tmp_path).done == {"one": "aa", "two": "bb"}
    assert stream.Journal(tmp_path).path.read_text().endswith('"bb"]\n')


def test_two_merges_into_one_folder_do_not_meet(plain, tmp_path):
    from lora_ft.export.merge import lock_merge

    with lock_merge(tmp_path / "merged"), pytest.raises(UserError, match="Another process"):
        merge_adapter(plain.adapter, tmp_path / "merged", prove=False)


def test_killed_at_any_moment_a_merge_leaves_nothing_or_all(larger, tmp_path):
    """SIGKILL at 50 random moments: each time the folder is absent, or byte for byte that of an undisturbed merge."""
    folder, _ = larger
    server = Path(__file__).with_name("kill_server.py")
    command = [sys.executable, str(server), str(folder / "adapter"), str(tmp_path / "merged"), "0", "50"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    first, *states, last = result.stdout.split()
    assert len(states) == 50
    assert set(states) <= {"absent", first}
    assert "absent" in states, "some kills must come before the end to mean anything"
    assert last == first


def test_expert_stacks_are_merged_matrix_by_matrix(tmp_path):
    """A stack of experts in one tensor is never held whole."""
    tuned = make_tuned(CASES["gpt_oss_experts"], tmp_path)
    sizes, merge_piece = [], stream.merge_piece

    def measured(value, tensor, block):
        sizes.append((tensor.name, value.numel(), block.expert))
        return merge_piece(value, tensor, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "merge_piece", measured)
        merge_adapter(tuned.adapter, tmp_path / "merged", prove=False)
    experts = [(size, expert) for name, size, expert in sizes if name.endswith("experts.down_proj")]
    assert {expert for _, expert in experts} == {0, 1, 2, 3}
    assert {size for size, _ in experts} == {128 * 64}
