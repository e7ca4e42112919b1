"""Checks every engine's config and every request, and gives engines that ask for GRIFFIN its worker and scheduler.

Two methods of vLLM's classes are wrapped when vLLM loads the plugin. Elsewhere griffin changes objects, never classes;
here there is no other way in. vLLM lets users name a worker class and a scheduler class, but the additional config
selects neither, and vLLM has no hook that sees an engine's config before it is used, or a request before it reaches the
engine, where an exception would stop all requests. The wrappers keep no state: each reads the config of the engine that
calls it. So they change nothing for an engine without the key `griffin`, and engines in one process do not meet.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import vllm
from vllm.config import CompilationMode

from griffin.config import GriffinConfig
from griffin.integrations.vllm import settings
from griffin.native import library

VERSIONS = ((0, 32), (0, 33))
"""The lowest version that was tested, and the lowest above it that was not."""

_WORKER = "griffin.integrations.vllm.worker.GriffinWorker"
_WORKERS = ("vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
_SCHEDULERS = "griffin.integrations.vllm.scheduler"

SPLITS = "griffin::vllm_ff"
"""The FF blocks' operator (see `operator`), as vLLM names operators at which it splits a compiled model."""


def install() -> None:
    """Wrap the methods that make an engine's config and that take a request. Calling it again does nothing."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    _wrap(EngineArgs, "create_engine_config", _configured)
    _wrap(InputProcessor, "process_inputs", _checked)


def _wrap(owner: Any, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if hasattr(original, "_griffin"):  # wrapped already
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(original, self, *args, **kwargs)

    wrapped._griffin = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _configured(original: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
    vllm_config = original(arguments, *args, **kwargs)
    config = settings.of(vllm_config)
    if config is not None:
        check(vllm_config, config)
        vllm_config.parallel_config.worker_cls = _WORKER
        _split_at_ff(vllm_config.compilation_config)
        name = "GriffinAsyncScheduler" if vllm_config.scheduler_config.async_scheduling else "GriffinScheduler"
        vllm_config.scheduler_config.scheduler_cls = f"{_SCHEDULERS}.{name}"
    return vllm_config


def _split_at_ff(compilation: Any) -> None:
    """Cut the graphs of a compiled model at its FF blocks, where vLLM cuts them at its attention layers."""
    splits = compilation.splitting_ops
    if compilation.mode == CompilationMode.VLLM_COMPILE and splits and SPLITS not in splits:
        compilation.splitting_ops = [*splits, SPLITS]


def _checked(original: Any, processor: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kw: Any) -> Any:
    """Refuse a wrong request before it reaches the engine, where an exception would stop all requests."""
    config = settings.of(processor.vllm_config)
    if config is not None:
        settings.of_request(params, config)
        if kw.get("resumable"):
            raise ValueError("GRIFFIN cannot follow a session whose prompt grows; send the whole prompt as a request")
    return original(processor, request_id, prompt, params, *args, **kw)


def check(vllm_config: Any, config: GriffinConfig) -> None:
    """Refuse an engine in which GRIFFIN would give wrong results.

    Args:
        vllm_config: vLLM's config of the engine.
        config: the engine's settings for GRIFFIN.

    Raises:
        ValueError: with all reasons.
    """
    if reasons := _why_not(vllm_config, config):
        raise ValueError(f"GRIFFIN cannot run in this engine: {'; '.join(reasons)}")


def _why_not(vllm_config: Any, config: GriffinConfig) -> list[str]:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    graphs = vllm_config.compilation_config.cudagraph_mode
    scheduler_cls = vllm_config.scheduler_config.scheduler_cls
    cpu = vllm_config.device_config.device_type == "cpu"
    version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    low, high = (".".join(map(str, bound)) for bound in VERSIONS)
    missing = library.why_not()
    rules = [
        (
            not VERSIONS[0] <= version < VERSIONS[1],
            f"vLLM is {vllm.__version__}, tested are versions from {low} to below {high}",
        ),
        (
            vllm_config.speculative_config is not None,
            "with speculative decoding the prompt's last step already holds draft tokens, before there are experts",
        ),
        (vllm_config.lora_config is not None, "LoRA changes FF weights per request"),
        (
            model.quantization is not None,
            f"the FF is quantised ({model.quantization}), which the plugin cannot read; load plain weights",
        ),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism is not handled; use tensor parallelism"),
        (getattr(parallel, "enable_dbo", False), "dual batch overlap splits a step, so that rows lose their requests"),
        (vllm_config.kv_transfer_config is not None, "a KV connector would hand on what a pruned FF has computed"),
        (model.runner_type != "generate", f"the model does not generate (runner {model.runner_type})"),
        (getattr(model, "is_encoder_decoder", False), "GRIFFIN prunes decoder-only models"),
        (
            graphs.has_full_cudagraphs() and not graphs.has_piecewise_cudagraphs(),
            f"CUDA graphs of the whole model alone ({graphs.name}) would keep one step's experts: pass "
            '--compilation-config \'{"cudagraph_mode": "FULL_AND_PIECEWISE"}\'',
        ),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism cuts a prompt's rows among the ranks",
        ),
        (
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "with fast prefill (kv_sharing_fast_prefill) some layers see a part of a step's rows",
        ),
        (
            parallel.worker_cls not in (*_WORKERS, _WORKER),
            f"its worker is {parallel.worker_cls}; expected one of vLLM's own for CPU or CUDA",
        ),
        (scheduler_cls is not None, f"its scheduler is {scheduler_cls}, not vLLM's own"),
        (config.backend == "native" and not cpu, "backend is native, which runs on the CPU"),
        (config.backend == "triton", "backend is triton, which the plugin does not have: leave it at auto"),
        (config.backend == "native" and missing is not None, f"backend is native, but {missing}"),
    ]
    return [reason for applies, reason in rules if applies]
