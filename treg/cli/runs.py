"""A training run in its folder: whose it is, whether it is finished, where it goes on."""

import json
from pathlib import Path
from typing import Any

from treg.files import last_checkpoint, replacing
from treg.rewards.annotate import process_state


def finished(out: Path) -> bool:
    """Whether the run in out was trained to its end and saved: its state is what is saved last."""
    file = out / "trainer_state.json"
    if not file.exists() or last_checkpoint(out) is None:
        return False
    state = json.loads(file.read_text())
    return state["global_step"] >= state["max_steps"]


def claim_run(out: Path, settings: dict[str, Any]) -> None:
    """Keep the settings of a run beside it; a folder that holds checkpoints of other settings is
    refused.
    """
    settings = json.loads(json.dumps(settings, default=str))
    file = out / "treg_run.json"
    before = json.loads(file.read_text()) if file.exists() else None
    if before is not None and last_checkpoint(out) is not None:
        for name in settings.keys() & before.keys():
            if settings[name] != before[name]:
                raise ValueError(
                    f"{name}: {out} holds a run with {before[name]!r}, now it is "
                    f"{settings[name]!r}; give another output_dir, or remove that one"
                )
    if process_state().is_main_process and before != settings:
        out.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
    process_state().wait_for_everyone()
