"""The libraries are loaded without a compiler and without collections, and nothing of that lasts."""

import json
import os
import subprocess
import sys

LOAD = """
import gc, json, os, sys
from lora_ft.libraries import load_libraries
load_libraries({others})
import torch
loaded = [name for name in ("peft", "bitsandbytes", "datasets", "torch._inductor.compile_fx") if name in sys.modules]
doubled = torch.compile(lambda x: 2 * x, backend="eager")(torch.ones(1)).item()
found = [loaded, gc.isenabled() and not gc.get_freeze_count(), "TORCHDYNAMO_DISABLE" in os.environ, doubled]
print(json.dumps([*found, len(torch._dynamo.utils.compilation_time_metrics)]))
"""


def load(others: str, **settings: str) -> list[object]:
    """What a new process has afterwards: modules, whether garbage is collected, the variable, and a compiled 2 · 1."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD.format(others=others)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | settings,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_no_compiler_is_loaded_and_nothing_is_turned_off_for_good():
    loaded, collects, variable, doubled, compilations = load("'datasets'")
    assert loaded == ["peft", "bitsandbytes", "datasets"]
    assert collects and not variable
    assert doubled == 2.0 and compilations > 0, "torch.compile still compiles"


def test_a_compiler_that_a_user_turned_off_stays_off():
    loaded, _, variable, doubled, compilations = load("", TORCHDYNAMO_DISABLE="1")
    assert loaded == ["peft", "bitsandbytes"] and variable
    assert doubled == 2.0 and compilations == 0


FETCHING = """
import sys
from lora_ft.libraries import load_libraries
load_libraries()
assert "bitsandbytes" in sys.modules
import kernels
print(kernels.__file__)
"""


def test_no_compiled_code_is_fetched_from_the_hub(tmp_path):
    """bitsandbytes asks the package `kernels` for some on CPUs with AVX512-BF16; afterwards it is there for others."""
    package, asked = tmp_path / "kernels" / "__init__.py", tmp_path / "asked"
    package.parent.mkdir()
    package.write_text(f"def get_kernel(*names, **options):\n    open({str(asked)!r}, 'w').close()\n")
    done = subprocess.run(
        [sys.executable, "-c", FETCHING],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(package)
    assert not asked.exists() and "kernels" not in done.stderr
