"""A chat that prints, turn by turn, what of its prompt was reused, and why not more.

    python examples/serve_turns.py                    # a tiny random model on this machine, three turns of its own
    python examples/serve_turns.py --chat             # type the turns yourself, as numbers of tokens or as text
    python examples/serve_turns.py --model PATH --device cuda --interval 512 --memory 8192

The model is any hybrid that transformers loads from PATH; a random one speaks in numbers. Needs the extra
`transformers`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from ssmcache import GpuCacheTierConfig, HostMemory, KVCacheManager
from ssmcache.integrations.transformers import HybridRunner, NotResumableError, Prefilled, cache_config

TINY = transformers.Qwen3_5TextConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16,
)  # fmt: skip


class Speech:
    """Text to tokens and back; without a tokenizer a byte is a token, and tokens are printed as numbers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def tokens(self, text: str) -> list[int]:
        if self._tokenizer is None:
            return list(text.encode())
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens)) if self._tokenizer is None else str(self._tokenizer.decode(tokens))


def why(run: Prefilled, interval: int) -> str:
    """What kept the rest of a prompt from being reused."""
    if run.shortage is not None:
        short = run.shortage
        return f"no room ({short.reason}: {short.needed} slots needed, {short.free} free): ran without the cache"
    assert run.match is not None
    tree, attention, usable = run.match
    if usable == 0 and tree == 0:
        return "nothing of it was seen before"
    if attention < tree:
        return f"{tree} tokens are known, the KV of {tree - attention} was evicted"
    if usable < attention - attention % interval:
        return f"the KV of {attention} tokens is there, but no state to go on from after {usable}"
    if usable < attention:
        return f"the KV of {attention} tokens is there, states only every {interval}"
    return "all that is known of it"


def turns(args: argparse.Namespace, speech: Speech) -> Iterator[list[int]]:
    """The tokens of each turn's question."""
    if not args.chat:
        generator = torch.Generator().manual_seed(1)
        for length in (180, 40, 40):
            yield torch.randint(3, 256, (length,), generator=generator).tolist()
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        if line.strip():
            yield speech.tokens(line)


def serve(args: argparse.Namespace) -> None:
    on_gpu = args.device.startswith("cuda")
    model, tokenizer = load(args, torch.bfloat16 if on_gpu else torch.float32)
    tiers = [GpuCacheTierConfig(args.memory << 20)]
    config = cache_config(model, tokens_per_block=args.block, cache_tiers=tiers, ssm_reuse_interval=args.interval)
    manager = KVCacheManager(config, memory_on(model.device))
    runner = HybridRunner(model, manager, max_tokens=args.max_tokens, commit_decoded=True)
    speech, conversation = Speech(tokenizer), []
    for number, question in enumerate(turns(args, speech), start=1):
        conversation += question
        if len(conversation) + args.answer > args.max_tokens:
            print(f"the conversation is longer than --max-tokens {args.max_tokens}: it ends here")
            break
        start = time.perf_counter()
        run = runner.prefill(conversation)
        (first,) = runner.decode(run, 1)
        seconds = time.perf_counter() - start
        answer = [first, *runner.decode(run, args.answer - 1)]
        computed = len(conversation) - run.num_reused_tokens
        print(f"turn {number}: {len(conversation)} tokens, {run.num_reused_tokens} reused, {computed} computed")
        print(f"  why: {why(run, args.interval)}")
        print(f"  first token after {seconds * 1e3:.1f} ms")
        print(f"  {speech.text(answer)}")
        conversation += answer
        runner.close(run)
    stats = manager.stats()
    print(f"snapshots: {stats.snapshots_taken} taken, {stats.snapshots_reused} reused")
    print(f"copied: {stats.copied_bytes:,} bytes")
    manager.shutdown()


def load(args: argparse.Namespace, dtype: torch.dtype) -> tuple[Any, Any]:
    if args.model is None:
        torch.manual_seed(0)
        with torch.device(args.device):
            return transformers.AutoModelForCausalLM.from_config(TINY, dtype=dtype).eval(), None
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(args.model)


def memory_on(device: torch.device) -> Any:
    if device.type != "cuda":
        return HostMemory()
    from ssmcache.memory.cuda import CudaMemory

    return CudaMemory(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH", help="a checkpoint; a tiny random model without")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--chat", action="store_true", help="read the turns from the terminal")
    parser.add_argument("--block", type=int, default=16, help="tokens per block")
    parser.add_argument("--interval", type=int, default=64, help="tokens between states that are kept")
    parser.add_argument("--memory", type=int, default=64, help="for the cache, in MiB")
    parser.add_argument("--answer", type=int, default=24, help="tokens of an answer")
    parser.add_argument("--max-tokens", type=int, default=4096, help="of the conversation")
    transformers.logging.set_verbosity_error()
    try:
        serve(parser.parse_args())
    except (NotResumableError, ValueError, OSError) as error:
        print(f"serve_turns: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
