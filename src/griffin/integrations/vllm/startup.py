"""What happens when an engine is configured: refuse what does not work, and name the classes that do the rest."""

from __future__ import annotations

import functools
import re
from typing import Any

import vllm

from griffin.config import GriffinConfig
from griffin.integrations.vllm import settings
from griffin.native import library

VERSIONS = ((0, 32), (0, 33))
"""First version that was tested, and first that was not."""

_WORKER = "griffin.integrations.vllm.worker.GriffinWorker"
_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
_SCHEDULERS = "griffin.integrations.vllm.scheduler"


def install() -> None:
    """Let engine configs and requests pass by here. Both do nothing more where the key `griffin` is absent."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(EngineArgs, "create_engine_config", _configured)
    _wrap(InputProcessor, "process_inputs", _checked)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if hasattr(original, "_griffin"):  # registered before
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped._griffin = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _configured(original: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    found = original(arguments, *args, **kwargs)
    config = settings.of(found)
    if config is not None:
        check(found, config)
        found.parallel_config.worker_cls = _WORKER
        name = "GriffinAsyncScheduler" if found.scheduler_config.async_scheduling else "GriffinScheduler"
        found.scheduler_config.scheduler_cls = f"{_SCHEDULERS}.{name}"
    return found


def _checked(original: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any) -> Any:
    """Refuse a request before it reaches the engine, which would stop at an error."""
    config = settings.of(processor.vllm_config)
    if config is not None:
        settings.of_request(params, config)
        if kw.get("resumable"):
            raise ValueError("GRIFFIN cannot follow a session whose prompt grows; send the whole prompt as a request")
    return original(processor, request_id, prompt, params, *args, **kw)


def check(found: Any, config: GriffinConfig) -> None:
    """Refuse an engine that GRIFFIN would not be right in.

    Args:
        found: vLLM's config.
        config: what was asked for.

    Raises:
        ValueError: with all reasons.
    """
    reasons = list(_reasons(found, config))
    if reasons:
        raise ValueError(f"GRIFFIN cannot run in this engine: {'; '.join(reasons)}")


def _reasons(found: Any, config: GriffinConfig) -> list[str]:
    parallel, scheduler, model = found.parallel_config, found.scheduler_config, found.model_config
    cpu = found.device_config.device_type == "cpu"
    version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    low, high = (".".join(map(str, own)) for own in VERSIONS)
    missing = library.available()
    rules = [
        (
            not VERSIONS[0] <= version < VERSIONS[1],
            f"vLLM is {vllm.__version__}, tested are versions from {low} to below {high}",
        ),
        (
            found.use_v2_model_runner,
            "it has the V2 model runner, which forgets preempted requests: set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        (
            found.speculative_config is not None,
            "with speculative decoding the prompt's last step already holds draft tokens, before there are experts",
        ),
        (found.lora_config is not None, "LoRA changes FF weights per request"),
        (
            model.quantization is not None,
            f"the FF is quantised ({model.quantization}), which the plugin cannot read; load plain weights",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not handled; use tensor parallelism"),
        (getattr(parallel, "enable_dbo", False), "dual batch overlap splits a step, so that rows lose their requests"),
        (found.kv_transfer_config is not None, "a KV connector would hand on what a pruned FF has computed"),
        (model.runner_type != "generate", f"the model does not generate (runner {model.runner_type})"),
        (getattr(model, "is_encoder_decoder", False), "GRIFFIN prunes decoder-only models"),
        (not cpu and not model.enforce_eager, "CUDA graphs would keep one step's experts: pass --enforce-eager"),
        (
            parallel.worker_cls not in (*_WORKERS, _WORKER),
            f"its worker is {parallel.worker_cls}; expected one of vLLM's own for CPU or CUDA",
        ),
        (scheduler.scheduler_cls is not None, f"its scheduler is {scheduler.scheduler_cls}, not vLLM's own"),
        (config.backend == "native" and not cpu, "backend is native, which runs on the CPU"),
        (config.backend == "native" and missing is not None, f"backend is native, but {missing}"),
    ]
    return [reason for applies, reason in rules if applies]
