"""The launch that an accelerate config file stands for, without launching anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_ft.errors import UserError
from lora_ft.training.distributed import Launch, read_launch


def read_launch_file(path: Path, num_processes: int | None = None) -> Launch:
    """What `accelerate launch --config_file path` would tell the first of its (or `num_processes`) processes.

    accelerate itself turns the file into the variables it would set, and they are read as in a launched process.

    Raises:
        UserError: there is no such file, or accelerate refuses it.
    Source: accelerate 1.15, `commands/launch.py`.
    """
    from accelerate.commands import launch as accelerate_launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
    from yaml import YAMLError

    if not path.is_file():
        raise UserError("--config-file", str(path), "There is no such file.", "See the folder accelerate_configs.")
    try:
        arguments = accelerate_launch.launch_command_parser().parse_args(["--config_file", str(path), "scripts/sft.py"])
        arguments, defaults, _ = accelerate_launch._validate_launch_command(arguments)
        if arguments.use_deepspeed:
            arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            environment = prepare_deepspeed_cmd_env(arguments)[1]
        else:
            environment = prepare_multi_gpu_env(arguments)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, YAMLError) as fault:
        rule = f"accelerate cannot read it: {fault}"
        raise UserError("--config-file", str(path), rule, "Try it with: accelerate launch --config_file") from fault
    processes = num_processes or arguments.num_processes
    launch = read_launch({**environment, "WORLD_SIZE": str(processes)})
    return replace(launch, local_world_size=max(1, processes // arguments.num_machines))
