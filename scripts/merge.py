"""`lora-ft merge` as a script: python scripts/merge.py ADAPTER --out FOLDER"""

import sys

from lora_ft.cli import main

if __name__ == "__main__":
    sys.exit(main(["merge", *sys.argv[1:]]))
