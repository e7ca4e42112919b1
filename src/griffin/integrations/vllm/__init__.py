"""GRIFFIN inside vLLM's engine, per request. vLLM loads this plugin wherever griffin is installed; it does nothing
until an engine's config has the key `griffin`.

    vllm serve MODEL --additional-config '{"griffin": {"density": 0.5}}'

No other package imports `vllm`. `settings` reads the settings, `startup` refuses engines that do not work, `scheduler`
keeps the prefix cache clean and `worker` runs the model: `requests` sorts the rows of a step by request and phase, and
`blocks` computes the FF.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, sometimes more than once."""
    from griffin.integrations.vllm import startup

    startup.install()
