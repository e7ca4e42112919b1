"""One engine in a process of its own: `python engine.py JOB.json FOUND.json`.

A job: `arguments` of `LLM`, and `rounds`, each a list of requests [prompt's tokens, extra_args or None, max_tokens].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SETTINGS = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "disable_log_stats": False}


def main() -> None:
    from vllm import LLM, SamplingParams

    job = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(**{**SETTINGS, **job["arguments"]})
    engine, found = llm.llm_engine, []
    pruned = "additional_config" in job["arguments"]
    for number, requests in enumerate(job["rounds"]):
        for index, (tokens, extra, most) in enumerate(requests):
            params = SamplingParams(temperature=0, max_tokens=most, extra_args=extra, ignore_eos=True)
            engine.add_request(f"r{number}-{index}", {"prompt_token_ids": tokens}, params)
        own: list[dict[str, Any]] = [{} for _ in requests]
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.partition("-")[2].split("-")[0])
                own[index]["tokens"] = list(output.outputs[0].token_ids)
                own[index]["cached"] = output.num_cached_tokens
            if pruned and any("experts" not in entry for entry in own):
                ranks = engine.collective_rpc("griffin_experts")
                for name in ranks[0]:
                    if name.startswith(f"r{number}-") and ranks[0][name]:
                        index = int(name.partition("-")[2].split("-")[0])
                        own[index].setdefault("experts", [rank[name] for rank in ranks])
            if all(len(entry.get("tokens", ())) > 3 for entry in own):
                pruned = False  # what has not been seen by now is not pruned
        pruned = "additional_config" in job["arguments"]
        found.append(own)
    report = engine.collective_rpc("griffin_report") if pruned else []
    preemptions = sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    refused = ""
    if pruned:
        try:
            engine.add_request("bad", "x", SamplingParams(extra_args={"griffin_density": 7}))
        except ValueError as error:
            refused = str(error)
    answer = {"rounds": found, "report": report, "refused": refused, "preemptions": preemptions}
    Path(sys.argv[2]).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
