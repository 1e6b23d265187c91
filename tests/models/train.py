"""Trains dbrx-micro, a small DBRX, on a CPU and exports it as a checkpoint of the published layout.

Usage: `python tests/models/train.py TEXTS OUT --minutes 40`, where TEXTS is the folder that `training_texts.py` wrote. The weights are
saved there every three minutes; after an interrupted run, `--export-only` exports them.

Dimension letters: `B` sequences, `S` tokens of a sequence, `T` = B S tokens, `D` d_model, `H` heads, `F` ffn hidden, `E` experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dbrx_q.checkpoint.layout import dense_tensors
from dbrx_q.config import DbrxConfig

__all__ = ["Dbrx", "main"]

NANO = Path(__file__).parents[1] / "data" / "dbrx-nano"  # gives the files that do not depend on the weights
WEIGHTS = {"prose": 24, "essays": 8, "encyclopedic": 12, "wikitext": 8, "documentation": 14, "code": 20, "mathematics": 7, "languages": 7}
"""Per cent of the sequences drawn from each domain."""
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
V, D, H, KV, LAYERS, E, TOP_K, FFN, CLIP, THETA = 4096, 192, 6, 3, 3, 8, 2, 384, 8, 500_000
PEAK, LAST, WARMUP = 4e-3, 5e-5, 100  # learning rates; steps
BATCH = 4096  # tokens of a step, over all processes
PROCESSES = 2  # of one thread each: on a busy machine they wait for each other less often than two threads do
BALANCE = 0.01  # weight of the load-balancing loss


class Attention(nn.Module):
    """Causal attention with grouped queries and rotated queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.Wqkv = nn.Linear(D, D + 2 * KV * D // H, bias=False)
        self.out_proj = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`x` [B, S, D]; `cos`, `sin` [S, head]."""
        B, S, _ = x.shape
        qkv = self.Wqkv(x).clamp(-CLIP, CLIP).view(B, S, H + 2 * KV, D // H).transpose(1, 2)
        q, k, v = qkv.split((H, KV, KV), dim=1)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (part.repeat_interleave(H // KV, dim=1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(attended.transpose(1, 2).reshape(B, S, D))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Experts(nn.Module):
    """The router and the experts, whose stacked matrices are [E * F, D] as in the checkpoint. Rows are sorted by expert."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, E, bias=False)
        self.w1, self.v1, self.w2 = (nn.Parameter(torch.empty(E * FFN, D)) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `x` [T, D]: the output, the load-balancing loss and the tokens of each expert [E]."""
        with torch.autocast("cpu", enabled=False):
            probabilities = (x.float() @ self.router.weight.T).softmax(-1)
        weights, experts = probabilities.topk(TOP_K, dim=-1)  # [T, TOP_K]
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        tokens = order // TOP_K
        counts = torch.bincount(experts.flatten(), minlength=E)
        matrices = (matrix.view(E, FFN, D).unbind() for matrix in (self.w1, self.v1, self.w2))
        outputs = [
            (F.silu(rows @ w1.T) * (rows @ v1.T)) @ w2 for rows, w1, v1, w2 in zip(x[tokens].split(counts.tolist()), *matrices, strict=True)
        ]
        scaled = torch.cat(outputs) * weights.flatten()[order].unsqueeze(-1).to(outputs[0].dtype)
        out = torch.zeros_like(x, dtype=scaled.dtype).index_add(0, tokens, scaled)
        balance = E * (counts / counts.sum() * probabilities.mean(0)).sum()
        return out, balance, counts


class Block(nn.Module):
    """Attention and experts, each after a norm and added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(D, bias=False) for _ in range(2))
        self.attention, self.experts = Attention(), Experts()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.attention(self.norm_1(x), cos, sin)
        out, balance, counts = self.experts(self.norm_2(x).flatten(0, 1))
        return x + out.view_as(x), balance, counts


class Dbrx(nn.Module):
    """DBRX as `dbrx_q.model` computes it, written for training."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm_f = nn.LayerNorm(D, bias=False)
        self.head = nn.Linear(D, V, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if name.endswith(("out_proj.weight", "w2")) else 0.02)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `ids`, `targets` [B, S]: the mean cross-entropy, the mean load-balancing loss and the tokens of each expert [LAYERS, E]."""
        frequencies = float(THETA) ** (-torch.arange(0, D // H, 2) * H / D)
        angles = torch.arange(ids.shape[1])[:, None] * frequencies.repeat(2)
        cos, sin = angles.cos(), angles.sin()
        if torch.is_autocast_enabled("cpu"):
            cos, sin = cos.bfloat16(), sin.bfloat16()
        x, balances, counts = self.embedding(ids), [], []
        for block in self.blocks:
            x, balance, count = block(x, cos, sin)
            balances.append(balance)
            counts.append(count)
        logits = self.head(self.norm_f(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), targets.flatten()), torch.stack(balances).mean(), torch.stack(counts)

    def by_name(self) -> dict[str, Tensor]:
        """The parameters under the names of the published checkpoint."""
        outside = {"embedding": self.embedding.weight, "norm_f": self.norm_f.weight, "head": self.head.weight}
        named: dict[str, Tensor] = {}
        for tensor in dense_tensors(_config()):
            if tensor.layer < 0:
                named[tensor.name] = outside[tensor.role]
                continue
            block = self.blocks[tensor.layer]
            assert isinstance(block, Block)
            roles: dict[str, Tensor] = {"norm_1": block.norm_1.weight, "norm_2": block.norm_2.weight, "router": block.experts.router.weight}
            roles |= {"Wqkv": block.attention.Wqkv.weight, "out_proj": block.attention.out_proj.weight}
            roles |= {"w1": block.experts.w1, "v1": block.experts.v1, "w2": block.experts.w2}
            named[tensor.name] = roles[tensor.role]
        return named

    @torch.no_grad()
    def load(self, folder: Path) -> Dbrx:
        """This model with the weights of a checkpoint."""
        tensors = load_file(folder / "model.safetensors")
        for name, parameter in self.by_name().items():
            parameter.copy_(tensors[name])
        return self


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(arguments.texts)
    held_out = _token_ids(tokenizer, arguments.texts)[1]
    saved = arguments.texts / "training.pt"
    if not arguments.export_only:
        rendezvous = f"file://{(arguments.texts / 'rendezvous').resolve()}.{os.getpid()}"
        torch.multiprocessing.spawn(train, (rendezvous, arguments.texts, arguments.minutes, saved), nprocs=PROCESSES)
    model = Dbrx()
    model.load_state_dict(torch.load(saved)["model"])
    export(model, tokenizer, arguments.out)
    model.load(arguments.out)  # rounded to bfloat16
    for domain, ids in held_out.items():
        loss, tokens, counts = evaluate(model, ids)
        print(f"held out {domain:14} {tokens:7} tokens, loss {loss:.4f}, perplexity {math.exp(loss):7.2f}, tokens per expert:")
        print("   ", (counts / counts.sum(1, keepdim=True) * E).mul(100).round().int().tolist())


def train(rank: int, rendezvous: str, texts: Path, minutes: float, saved: Path) -> None:
    """One of `PROCESSES` that average their gradients. For `minutes`: two thirds of the time on sequences of 256 tokens, the rest on
    sequences of 1024; the cosine of the learning rate follows the clock.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = Dbrx()
    training = _token_ids(_tokenizer(texts), texts)[0]
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), fused=True)
    draw, step, tokens, mean, last_saved = np.random.default_rng([1, rank]), 0, {256: 0, 1024: 0}, math.nan, 0.0
    expert_tokens = torch.zeros(LAYERS, E)
    dist.barrier()
    start, progress = time.monotonic(), 0.0
    while progress < 1:
        length = 256 if progress < 2 / 3 else 1024
        rate = LAST + (PEAK - LAST) * (1 + math.cos(math.pi * progress)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / WARMUP)
        batch = torch.from_numpy(_batch(training, BATCH // PROCESSES // length, length, draw))
        with torch.autocast("cpu", torch.bfloat16):
            loss, balance, counts = model(batch[:, :-1], batch[:, 1:])
        (loss + BALANCE * balance).backward()
        elapsed = time.monotonic() - start
        shared = torch.cat([*(p.grad.flatten() for p in model.parameters() if p.grad is not None), torch.tensor([elapsed, loss.item()])])
        dist.all_reduce(shared)
        shared /= PROCESSES
        for parameter, gradient in zip(model.parameters(), shared.split([*(p.numel() for p in model.parameters()), 2]), strict=False):
            parameter.grad = gradient.view_as(parameter)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed, mean_loss = shared[-2:].tolist()  # the same on all processes, so that they stop together
        progress = elapsed / (60 * minutes)
        step, tokens[length] = step + 1, tokens[length] + BATCH
        expert_tokens = 0.98 * expert_tokens + counts
        mean = mean_loss if math.isnan(mean) else 0.98 * mean + 0.02 * mean_loss
        if rank == 0 and step % 20 == 0:
            shares = (expert_tokens / expert_tokens.sum(1, keepdim=True) * E).mul(100).round().int().tolist()
            print(f"step {step} {elapsed / 60:.1f} min, loss {mean:.3f}, balance {balance:.3f}, gradient {norm:.2f}, rate {rate:.1e}, "
                  f"tokens {tokens}, {sum(tokens.values()) / elapsed:.0f}/s, experts {shares}", flush=True)  # fmt: skip
        if rank == 0 and (progress >= 1 or elapsed - last_saved > 180):
            last_saved = elapsed
            torch.save({"model": model.state_dict(), "tokens": tokens}, saved.with_suffix(".tmp"))
            os.replace(saved.with_suffix(".tmp"), saved)
    dist.barrier()
    if rank == 0:
        print(f"trained {step} steps, tokens {tokens}")


@torch.no_grad()
def evaluate(model: Dbrx, ids: np.ndarray, context: int = 512, windows: int = 48) -> tuple[float, int, Tensor]:
    """Of the first windows of `context` tokens, cut as `dbrx-q perplexity` cuts them: mean loss in float32, predicted tokens, tokens per
    expert [LAYERS, E].
    """
    losses, counts = [], torch.zeros(LAYERS, E)
    for start in range(0, min(len(ids) - context, windows * context - 1), context):
        window = torch.from_numpy(ids[start : start + context].astype(np.int64))[None]
        loss, _, count = model(window[:, :-1], window[:, 1:])
        losses.append(loss.item())
        counts += count
    return sum(losses) / max(len(losses), 1), len(losses) * (context - 1), counts


def export(model: Dbrx, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """Writes the checkpoint in the layout of the published one."""
    tensors = {name: parameter.detach().bfloat16().contiguous() for name, parameter in model.by_name().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(_config_json(), indent=1) + "\n")
    tokenizer.save(str(out / "tokenizer.json"))
    for name in ("generation_config.json", "tokenizer_config.json"):  # both depend on the ids of the specials alone, which are the same
        shutil.copy(NANO / name, out / name)
    print(f"{(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB in {out}")


def _config_json() -> dict[str, object]:
    config = json.loads((NANO / "config.json").read_text())
    config |= {"d_model": D, "n_heads": H, "n_layers": LAYERS, "max_seq_len": 2048, "vocab_size": V}
    config["attn_config"] |= {"clip_qkv": CLIP, "kv_n_heads": KV, "rope_theta": THETA}
    config["ffn_config"] |= {"ffn_hidden_size": FFN, "moe_num_experts": E, "moe_top_k": TOP_K, "moe_normalize_expert_weights": 1}
    return dict(config)


def _config() -> DbrxConfig:
    return DbrxConfig.from_dict(_config_json())


def _documents(texts: Path) -> Iterator[tuple[str, int, str]]:
    """Domain, number and text of every document."""
    for domain in WEIGHTS:
        with (texts / f"{domain}.jsonl").open() as lines:
            for number, line in enumerate(lines):
                yield domain, number, json.loads(line)["text"]


def _is_held_out(number: int) -> bool:
    return number % 40 == 7


def _tokenizer(texts: Path) -> tokenizers.Tokenizer:
    """Byte-level BPE with the split pattern of cl100k, trained on the training documents, each domain by its weight; kept in `texts`."""
    path = texts / "tokenizer.json"
    if path.exists():
        return tokenizers.Tokenizer.from_file(str(path))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    bytes_of = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_of])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=V - len(SPECIALS), initial_alphabet=alphabet, show_progress=False)
    left = {domain: 60_000 * weight for domain, weight in WEIGHTS.items()}  # characters
    sample, documents = [], list(_documents(texts))
    np.random.default_rng(0).shuffle(documents)
    for domain, number, text in documents:
        if left[domain] > 0 and not _is_held_out(int(number)):
            sample.append(text[: left[domain]][:200_000])
            left[domain] -= len(sample[-1])
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(path))
    return tokenizer


def _token_ids(tokenizer: tokenizers.Tokenizer, texts: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By domain: the tokens of the training documents and those of the held-out ones, every document after `<|endoftext|>`; uint16.
    Kept in `texts`.
    """
    path = texts / "tokens.npz"
    if not path.exists():
        kept: dict[str, list[int]] = {f"{part} {domain}": [] for part in ("training", "held out") for domain in WEIGHTS}
        for domain, number, text in _documents(texts):
            ids = kept[f"{'held out' if _is_held_out(number) else 'training'} {domain}"]
            ids.append(V - len(SPECIALS))
            for start in range(0, len(text), 100_000):
                ids += tokenizer.encode(text[start : start + 100_000], add_special_tokens=False).ids
        for name, ids in kept.items():
            print(f"{name:24} {len(ids) / 1e6:.3f} M tokens")
        np.savez(path, **{name: np.array(ids, dtype=np.uint16) for name, ids in kept.items()})
    arrays = np.load(path)
    training, held_out = ({domain: arrays[f"{part} {domain}"] for domain in WEIGHTS} for part in ("training", "held out"))
    return training, held_out


def _batch(training: dict[str, np.ndarray], count: int, length: int, draw: np.random.Generator) -> np.ndarray:
    """int64 [count, length + 1]: sequences from random places, their domains drawn by `WEIGHTS`."""
    shares = np.array([WEIGHTS[domain] for domain in training], dtype=float)
    domains = draw.choice(list(training), size=count, p=shares / shares.sum())
    starts = [(training[domain], draw.integers(len(training[domain]) - length)) for domain in domains]
    return np.stack([ids[start : start + length + 1] for ids, start in starts]).astype(np.int64)


if __name__ == "__main__":
    main()
