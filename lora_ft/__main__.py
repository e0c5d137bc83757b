"""`python -m lora_ft` is `lora-ft`."""

import sys

from lora_ft.cli import main

sys.exit(main())
