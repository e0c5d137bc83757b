"""`lora-ft train` for launchers:

accelerate launch --config_file accelerate_configs/ddp.yaml scripts/sft.py RECIPE [section.key=value ...]
"""

import os
import sys

from lora_ft.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    if "RANK" in os.environ:
        # Everything is written by now. One ZeRO-3 rank in thirty dies of SIGABRT while its interpreter takes itself
        # apart (seen with DeepSpeed 0.19.8), and the launcher would call a good run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
