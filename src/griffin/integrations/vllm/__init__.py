"""GRIFFIN inside vLLM's engine, per request. A plugin of vLLM: installed with griffin, idle until it is asked for.

    vllm serve MODEL --additional-config '{"griffin": {"density": 0.5}}'

The only room that imports `vllm`. `settings` reads what is asked for, `startup` refuses what does not work, `scheduler`
keeps the prefix cache clean, `worker` computes: `requests` knows the phase of every row of a step, `blocks` the FF.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of the group `vllm.general_plugins`; vLLM calls it in every process, sometimes more than once."""
    from griffin.integrations.vllm import startup

    startup.install()
