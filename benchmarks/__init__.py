"""Speed and memory, as ratios within one process; never part of the tests."""

import os

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS"):  # read on import
    os.environ.setdefault(_name, "1")
