"""The data floor is light: recipe checks and `--help` must not wait for torch."""

import subprocess
import sys
from pathlib import Path

import lora_ft.data

ROOMS = sorted(path.stem for path in Path(lora_ft.data.__file__).parent.glob("*.py") if path.stem != "__init__")


def test_only_the_collator_loads_torch():
    light = [room for room in ROOMS if room != "collate"]
    code = f"import sys\nfor room in {light}: __import__('lora_ft.data.' + room)\n"
    code += "print([name for name in ('torch', 'transformers', 'datasets', 'trl') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
