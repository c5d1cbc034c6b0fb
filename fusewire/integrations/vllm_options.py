"""How fusewire is switched on in vLLM, and its options there."""

from __future__ import annotations

import json
import os
from typing import Any

from fusewire.custom_ops.environment import env_flag
from fusewire.errors import ConfigError
from fusewire.fusion_passes.config import PassConfig, disabled_by_environment

VARIABLE = "FUSEWIRE_VLLM"
OPTIONS, KEY = "fusewire", "fusewire_key"  # in vLLM's additional_config


def read_options(config: Any) -> dict[str, Any] | None:
    """Return the options of a VllmConfig, completed by variables; None if fusewire is off."""
    given = config.additional_config
    if not isinstance(given, dict):
        if os.environ.get(VARIABLE):
            raise ConfigError(
                f"{VARIABLE} is set, but vLLM's additional_config is a {type(given).__name__}, "
                "which cannot hold fusewire's options; fusewire needs a dictionary there"
            )
        return None
    asked = given.get(OPTIONS, _from_environment())
    if asked is None or asked is False or disabled_by_environment():
        return None
    if asked is True:
        asked = {}
    if not isinstance(asked, dict):
        raise ConfigError(f"additional_config[{OPTIONS!r}] is {asked!r}; it must be an object of PassConfig's fields")
    if env_flag("VLLM_BATCH_INVARIANT"):
        asked = {**asked, "batch_invariant": True}
    PassConfig.from_options(asked)  # raises for what cannot be used
    return asked


def _from_environment() -> Any:
    text = os.environ.get(VARIABLE, "").strip()
    if not text.startswith("{"):
        return env_flag(VARIABLE)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{VARIABLE} is neither on (1), nor off (0, unset), nor JSON ({error}); for options "
            "write for example "
            f"""{VARIABLE}='{{"output_in_place": true}}'"""
        ) from None
