"""transformers' tensor parallelism on two gloo processes: the logits and tokens of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_rms

import w4a16
from models import RECIPES, VOCAB, make_checkpoint

RANKS, NEW, TIMEOUT_S = 2, 4, 120
# column and row shards, zero points, a channel's scale that both ranks keep, biases (qwen2), experts
CASES = {"qwen3": "ct-asym", "qwen2": "gptq", "llama": "ct-channel", "qwen3_moe": "awq"}
# half of 128 columns is two groups of 32, half of 96 is one and a half
SPLITS, UNEVEN = 128, 96
REFUSED = {"act-order": "columns of one group lie all over the input", "uneven": "on boundaries of 32 columns"}

# imports once and forks a process for each rank: importing takes most of the time
LAUNCH = """
import json, os, sys, torch
from pathlib import Path
from transformers.distributed import DistributedConfig
import transformers.models.auto.modeling_auto
import w4a16, w4a16.plugins.transformers

def run(work):
    torch.set_num_threads(1)
    ids, found = torch.tensor(json.loads((work / "ids").read_text())), {}
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        try:
            model = w4a16.load(str(folder), distributed_config=DistributedConfig(tp_size=2))
            with torch.no_grad():
                logits = model(ids).logits
                tokens = model.generate(ids, max_new_tokens=4, do_sample=False)
            rows = model.model.layers[0].self_attn.q_proj.n
            found[folder.name] = {"logits": logits, "tokens": tokens.tolist(), "rows": rows}
        except w4a16.Unsupported as error:
            found[folder.name] = str(error)
    torch.save(found, work / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()

ranks = []
for rank in range(2):
    child = os.fork()
    if not child:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        run(Path(sys.argv[1]))
        sys.stdout.flush()
        os._exit(0)
    ranks.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in ranks))
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tp")
    for arch, recipe in CASES.items():
        make_checkpoint(arch, RECIPES[recipe], folder / arch, intermediate_size=SPLITS)
    make_checkpoint("qwen3", RECIPES["gptq-desc-act"], folder / "act-order", intermediate_size=SPLITS)
    make_checkpoint("qwen3", RECIPES["ct-asym"], folder / "uneven", intermediate_size=UNEVEN)
    (folder / "ids").write_text(json.dumps(torch.randint(3, VOCAB, (2, 9)).tolist()))
    return folder


@pytest.fixture(scope="module")
def ranks(work: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(RANKS)}
    env = {**os.environ, **shared, "OMP_NUM_THREADS": "1"}
    log = work / "log"
    with log.open("w") as out:
        command = [sys.executable, "-c", LAUNCH, str(work)]
        done = subprocess.run(command, env=env, stdout=out, stderr=out, timeout=TIMEOUT_S, check=False)
    assert not done.returncode, log.read_text()[-3000:]
    return [torch.load(work / f"rank-{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("arch", CASES)
def test_two_ranks_are_one_process(arch: str, ranks: list[dict[str, Any]], work: Path) -> None:
    model = w4a16.load(str(work / arch))
    ids = torch.tensor(json.loads((work / "ids").read_text()))
    with torch.no_grad():
        wanted = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False).tolist()
    for rank in ranks:
        found = rank[arch]
        assert relative_rms(found["logits"], wanted) < 1e-5  # a sum in another order
        assert found["tokens"] == tokens
        assert RANKS * found["rows"] == model.model.layers[0].self_attn.q_proj.n


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_split_says_so(name: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert REFUSED[name] in rank[name]
        assert rank[name].startswith("model.layers.0.")
