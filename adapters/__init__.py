"""The adapter: base model, LoRA factors, low-rank algebra, files, and the plan beside it."""

import logging

# Where it is installed PEFT imports it, and it warns about an optional kernel on every start.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
