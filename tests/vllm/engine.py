"""Runs vLLM in a process of its own: `python engine.py JOBS.json RESULTS.json`. Each job is one model, loaded in turn.

A process is one setting of the environment (plugin on or off, profiling or not), so tests start one for each. vLLM 0.32
cannot build a second engine in a process that had one, so each job gets a fork of one process that has only imported.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def record() -> profile:
    return profile(activities=[ProfilerActivity.CPU])


def scopes(recorded: profile) -> list[str]:
    return [event.name for event in recorded.events() if " g=" in event.name]


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt

    log: list[str] = []
    # a filter, as vLLM clears the handlers of its loggers when it configures them
    logging.getLogger("vllm.w4a16").addFilter(lambda record: log.append(record.getMessage()) or True)
    settings = {"max_model_len": 256, "max_num_seqs": 4, "seed": 0, "disable_log_stats": True, **job["engine"]}
    found: dict[str, Any] = {"outputs": [], "scopes": []}
    llm = None
    try:
        # CUDA graphs are captured here; what is replayed later runs no Python and has no ranges
        with record() if job["profile"] and torch.version.cuda else nullcontext() as start:
            llm = LLM(job["model"], **settings)
        found["captured"] = scopes(start) if start else []
        sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=5, ignore_eos=True)
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
        if job["profile"]:
            with record() as answering:
                outputs = llm.generate(prompts, sampling, use_tqdm=False)
            found["scopes"] = scopes(answering)
        else:
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
        for output in outputs:
            choice = output.outputs[0]
            logprobs = [{str(token): value.logprob for token, value in step.items()} for step in choice.logprobs or ()]
            found["outputs"].append({"tokens": list(choice.token_ids), "logprobs": logprobs})
    except Exception:
        found["error"] = traceback.format_exc()
    if llm is not None:
        llm.llm_engine.engine_core.shutdown()  # or its workers outlive this process
    return {**found, "log": log}


def main() -> None:
    import vllm  # noqa: F401, before the fork

    jobs, results = (Path(argument) for argument in sys.argv[1:3])
    done = {}
    for name, job in json.loads(jobs.read_text()).items():
        answer = results.with_suffix(".part")
        child = os.fork()
        if not child:
            answer.write_text(json.dumps(run(job)))
            os._exit(0)
        os.waitpid(child, 0)
        done[name] = json.loads(answer.read_text())
        answer.unlink()
        results.write_text(json.dumps(done))  # a job that dies leaves what was done before it


if __name__ == "__main__":
    main()
