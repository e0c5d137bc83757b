"""A launch read from an accelerate config file is the one that accelerate would make of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from lora_ft.errors import UserError
from lora_ft.model.machine import Machine
from lora_ft.model.memory import Hardware
from lora_ft.training.distributed import Launch, describe_hardware
from lora_ft.training.launch_file import read_launch_file

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"
GIB = 2**30
GPU = Machine("cuda:0", "a GPU", 24 * GIB, True, "")


@pytest.mark.parametrize(
    ("name", "sharding", "devices", "offload"),
    [
        ("single_gpu", "none", 1, ()),
        ("ddp", "none", 2, ()),
        ("zero2", "zero2", 2, ()),
        ("zero3", "zero3", 2, ()),
        ("zero3_offload", "zero3", 2, ("optimizer", "parameters")),
        ("fsdp2_qlora", "fsdp", 2, ()),
        ("multi_node", "none", 16, ()),
        ("cpu_zero3", "zero3", 2, ()),
    ],
)
def test_what_each_config_shards(name, sharding, devices, offload):
    launch = read_launch_file(CONFIGS / f"{name}.yaml")
    assert describe_hardware(GPU, launch) == Hardware("cuda", 24 * GIB, devices, sharding, offload)


def test_the_processes_of_a_cpu_share_its_memory_machine_by_machine():
    cpu = replace(GPU, device="cpu")
    assert describe_hardware(cpu, read_launch_file(CONFIGS / "cpu_ddp.yaml")).memory_bytes == 12 * GIB
    assert describe_hardware(cpu, read_launch_file(CONFIGS / "cpu_ddp.yaml", 4)).memory_bytes == 6 * GIB
    assert read_launch_file(CONFIGS / "multi_node.yaml").local_world_size == 8
    assert describe_hardware(cpu, Launch("single")).memory_bytes == 24 * GIB


@pytest.mark.parametrize("text", [None, "distributed_type: [", "just words", "compute_environment: ELSEWHERE"])
def test_what_is_no_config_is_refused(tmp_path, text):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read_launch_file(path)
    assert error.value.faults[0].place == "--config-file"
