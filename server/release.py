"""The release: a PEFT adapter folder and a model card that says what is promised, and what not."""

from __future__ import annotations

from pathlib import Path

from adapters.adapter import Adapter
from server.release_card import ReleaseFacts, write_model_card


def release(adapter: Adapter, facts: ReleaseFacts, folder: Path) -> Path:
    """Write adapter and card into ``folder``; ``PeftModel.from_pretrained`` loads it as it is."""
    adapter.save(folder, facts.base_model)
    write_model_card(folder, facts)
    return folder
