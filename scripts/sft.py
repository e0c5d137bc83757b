"""`lora-ft train` for launchers: accelerate launch --config_file accelerate_configs/ddp.yaml scripts/sft.py RECIPE [section.key=value ...]"""

import sys

from lora_ft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
