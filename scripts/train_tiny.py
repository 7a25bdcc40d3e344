"""Train one of the two small models under models/ on the running interpreter's standard library, CPU only.

python scripts/train_tiny.py --arch qwen3 --out models/tiny-qwen3 --steps 1350 --minutes 31
"""

import argparse
import copy
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

END = "<|endoftext|>"  # before every module, so it is also what generation from nothing starts with
VOCAB = 1024
SHORT, LONG = 256, 1024  # window lengths: the last quarter of training is on long ones
HELD_OUT = ("bisect", "colorsys", "glob", "graphlib", "heapq", "sched", "shelve", "string", "textwrap")
# encodings and pydoc_data are tables, config-* and _sysconfigdata* name the paths of the machine that built Python
SKIPPED = ("test", "tests", "idlelib", "site-packages", "encodings", "pydoc_data")
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")

# Every K of every Linear is a multiple of 128: hidden 256, heads * head_dim 256, intermediate 768 or 128.
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
DENSE = {"num_hidden_layers": 4, "intermediate_size": 768}
MOE = {
    "num_hidden_layers": 3,
    "intermediate_size": 768,  # unused: every layer is sparse
    "moe_intermediate_size": 128,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.01,
}


def read_corpus() -> tuple[list[str], list[str]]:
    """The modules to train on and those held out, each in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    train: list[str] = []
    held_out: list[str] = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if set(parts) & set(SKIPPED) or parts[0].startswith(SKIPPED_PREFIXES):
            continue
        is_held_out = len(parts) == 1 and path.stem in HELD_OUT
        text = path.read_bytes().decode("utf-8", errors="ignore")
        (held_out if is_held_out else train).append(text)
    assert len(held_out) == len(HELD_OUT), "this interpreter lacks a held-out module"
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=COMMON["max_position_embeddings"]
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return torch.cat([torch.tensor(tokenizer.encode(END + text, verbose=False)) for text in texts])


def build(arch: str, end_id: int) -> PreTrainedModel:
    ends = {"eos_token_id": end_id, "pad_token_id": end_id}
    if arch == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**COMMON, **DENSE, **ends))
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **MOE, **ends))
    model.set_experts_implementation("eager")  # a step takes 0.47 s, 0.51 with grouped_mm, 20 with batched_mm
    return model


class Muon(torch.optim.Optimizer):
    """Momentum, then the nearest orthogonal matrix.

    torch.optim.Muon iterates in bf16, 60 times slower than fp32 on a CPU without bf16 units, and refuses stacked
    experts.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                if p.ndim == 3:  # gate and up share a tensor but are two matrices
                    update = update.view(-1, min(p.shape[1], MOE["moe_intermediate_size"]), p.shape[2])
                scale = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                p.add_(orthogonal(update).reshape(p.shape), alpha=-group["lr"] * scale)


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps; the coefficients are those of torch.optim.Muon."""
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if transposed else x


def batches(ids: torch.Tensor, length: int, tokens: int) -> Iterator[torch.Tensor]:
    """Batches of shuffled windows that cover the corpus once per epoch, from a new offset each time."""
    while True:
        offset = int(torch.randint(length, ()))
        count = (len(ids) - offset) // length
        windows = ids[offset : offset + count * length].view(count, length)
        for index in torch.randperm(count).split(tokens // length):
            yield windows[index]


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    staging = out.with_name(out.name + ".part")  # files are replaced whole: a reader never sees half of one
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    out.mkdir(parents=True, exist_ok=True)
    for path in staging.iterdir():
        path.chmod(0o644)
        path.replace(out / path.name)
    staging.rmdir()


def train(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: torch.Tensor, args: argparse.Namespace
) -> None:
    hidden = dict(model.model.layers.named_parameters())
    matrices = [p for name, p in hidden.items() if p.ndim >= 2 and not name.endswith("mlp.gate.weight")]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    # three minutes of qwen3 end at a held-out perplexity of 69 with these two, 141 with AdamW alone at 0.003
    optimizers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0)]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    short, long = (batches(ids, length, args.tokens) for length in (SHORT, LONG))
    router = {"output_router_logits": True} if args.arch == "qwen3_moe" else {}
    start, done = time.monotonic(), 0
    for step in range(args.steps):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes)  # a slow machine trains on less, never unannealed
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * progress))
        batch = next(short if progress < 0.75 else long)
        loss = model(batch, labels=batch, **router).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        if step % 50 == 0:
            print(f"step {step} of {args.steps}, {minutes:.1f} min, loss {loss.item():.3f}", flush=True)
        if done % 300 == 0:
            save(model, tokenizer, args.out)
    print(f"trained {done} steps in {(time.monotonic() - start) / 60:.1f} min")


@torch.no_grad()
def negative_log_likelihood(model: PreTrainedModel, ids: torch.Tensor, length: int) -> float:
    """In nats, of every token but the first, each once; windows of `length` do not see each other."""
    total = 0.0
    for begin in range(0, len(ids) - 1, length):
        window = ids[begin : begin + length + 1]
        logits = model(window[None, :-1]).logits[0].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=("qwen3", "qwen3_moe"), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a folder; heldout.txt goes beside it")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="bounds training; fewer steps if it bites")
    parser.add_argument("--tokens", type=int, default=2048, help="per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    texts, held_out = read_corpus()
    tokenizer = train_tokenizer(texts)
    ids, held_out_ids = encode(tokenizer, texts), encode(tokenizer, held_out)
    model = build(args.arch, tokenizer.eos_token_id)
    print(f"{len(ids)} training tokens, {len(held_out_ids)} held out, {model.num_parameters()} parameters", flush=True)
    train(model, tokenizer, ids, args)

    save(model, tokenizer, args.out)
    (args.out.parent / "heldout.txt").write_text("".join(END + text for text in held_out), encoding="utf-8")

    model.to(torch.bfloat16).to(torch.float32).eval()  # what was saved, rounding included
    size = sum(len(text.encode()) for text in held_out)
    for length in (SHORT, LONG):
        nll = negative_log_likelihood(model, held_out_ids, length)
        perplexity, bits = math.exp(nll / (len(held_out_ids) - 1)), nll / math.log(2) / size
        print(f"held out, windows of {length}: perplexity {perplexity:.3f}, {bits:.3f} bits per byte")
    prompt = tokenizer("def read_lines(path", return_tensors="pt").input_ids
    print(tokenizer.decode(model.generate(prompt, max_new_tokens=80, do_sample=False)[0]))


if __name__ == "__main__":
    main()
