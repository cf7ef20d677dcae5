"""Whether a model goes on exactly from a restored cache: tests on the live model, with controls that must fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ssmcache.config import BatchDesc, GpuCacheTierConfig, KVCacheDesc, KVCacheManagerConfig
from ssmcache.integrations.transformers_attention import Attention
from ssmcache.integrations.transformers_cache import DynamicCache, cache_argument
from ssmcache.integrations.transformers_memory import manager_with_room
from ssmcache.integrations.transformers_runner import SequenceRunner
from ssmcache.integrations.transformers_shapes import REFUSALS, ModelShapes, NotResumableError, probe
from ssmcache.manager import KVCacheManager

BLOCK_TOKENS = 16
INTERVAL = 64
PROMPT_TOKENS = 2 * INTERVAL + 33
NUM_DECODED = 8
_ROOM = BatchDesc((KVCacheDesc(PROMPT_TOKENS + NUM_DECODED + BLOCK_TOKENS),) * 3)
_ROUNDED_SHARE = 0.9  # of positions that are judged in 16-bit dtypes
_NEAR = 4  # positions after a cut at which a wrong state shows most
_POISON = 0xFF  # NaN in every dtype


@dataclass(frozen=True, slots=True)
class Resumability:
    """What the checks of a model found. Errors are the largest differences of logits at any position after a cut.

    Attributes:
        model: its class.
        dtype: its name.
        placement_error: reused against computed anew, with the same cuts; 0 if all bits are equal.
        cut_error: computed in pieces against one pass of the model alone.
        cut_bound: what that may be.
        cut_share: share of the positions after a cut that are within the bound.
        token_share: share of greedily decoded tokens that are those of the model alone.
        control_errors: (control, what a wrong state of its kind makes of the logits); empty without states.
        failures: what failed, one line each; empty for a model that can be resumed.
    """

    model: str
    dtype: str
    placement_error: float
    cut_error: float
    cut_bound: float
    cut_share: float
    token_share: float
    control_errors: tuple[tuple[str, float], ...]
    failures: tuple[str, ...]

    @property
    def is_resumable(self) -> bool:
        return not self.failures

    def require(self) -> None:
        """Errors: NotResumableError that names what failed."""
        if self.failures:
            raise NotResumableError(
                f"{self.model}: expected a model that can be resumed, but {'; '.join(self.failures)}"
            )


def check_resumable(
    model: Any, *, bound: float | None = None, attention: Attention = "lower_right", seed: int = 0
) -> Resumability:
    """Compare a model over a small cache of its own, full of NaN before, with the model alone, on random tokens.

    - *placement-identical*: with the same cuts, reused and computed anew have the same logits, bit for bit, at every
      position after the cut, and decode the same tokens.
    - *cut-identical*: computed in pieces, each position after a cut is within a bound of one pass of the model alone.
      In 16-bit dtypes experts may flip, so nine tenths must be, and three quarters right after the cuts.
    - *token-identical*: the greedy tokens are those of the model alone; in 16-bit dtypes only the share is reported.
    - controls: a state of zeros, of another sequence, or of the boundary before must be beyond the bound, or the
      model's state matters too little to be checked.

    Args:
        bound: of cut-identity; None: 0.001 standard deviations of the logits, 0.125 in 16-bit dtypes, or, if that is
            more, three times what passes of other lengths change (in 16-bit dtypes at nine tenths of the positions).
    Cost: some 40 passes over at most 322 tokens, and 100 over one.
    Errors: NotResumableError for a model that takes no cache.
    """
    shapes = probe(model)
    with _small_manager(model, shapes) as manager:
        runner = SequenceRunner(
            model, manager, shapes, max_tokens=PROMPT_TOKENS + NUM_DECODED + BLOCK_TOKENS, attention=attention
        )
        return _Check(runner, bound, seed).result()


@contextmanager
def _small_manager(model: Any, shapes: ModelShapes) -> Iterator[KVCacheManager]:
    """Its pools are full of NaN."""
    layers = tuple(shapes.cache_layers(BLOCK_TOKENS, None))

    def config(quota: int) -> KVCacheManagerConfig:
        tiers = (GpuCacheTierConfig(quota),)
        return KVCacheManagerConfig(BLOCK_TOKENS, layers, tiers, ssm_reuse_interval=INTERVAL, typical_step=_ROOM)

    with manager_with_room(model, _ROOM, 2, config) as manager:
        for group in manager.groups:
            manager.memory.view(group.pool)[:] = _POISON
        yield manager


class _Check:
    """One run of all checks."""

    def __init__(self, runner: SequenceRunner, bound: float | None, seed: int) -> None:
        self._runner = runner
        self._model = runner.model
        self._given_bound = bound
        self._is_exact = self._model.dtype in (torch.float32, torch.float64)
        self._has_states = runner.manager.config.has_ssm
        self._failures: list[str] = []
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(seed)
        self._prompt, self._other = torch.randint(vocabulary, (2, PROMPT_TOKENS), generator=generator)
        self._other = torch.where(self._other == self._prompt, (self._prompt + 1) % vocabulary, self._other)

    def result(self) -> Resumability:
        alone = self._alone(self._prompt)
        bound = self._bound(alone)
        logits, states, _ = self._in_pieces(self._prompt)
        placement_error = self._placement()
        errors = _errors(logits, alone)[INTERVAL:]
        share = self._judge_cuts(errors, bound)
        token_share = self._judge_tokens(self._fork(2 * INTERVAL))
        controls = self._controls(logits, states)
        weak = [name for name, error in controls if not error > bound]
        if weak:
            self._failures.append(f"controls: a state that is wrong ({', '.join(weak)}) makes no difference")
        reason = REFUSALS.get(self._model.config.model_type)
        if self._failures and reason is not None:
            self._failures.append(f"which is known of this family: {reason}")
        return Resumability(
            type(self._model).__name__, str(self._model.dtype).removeprefix("torch."), placement_error,
            float(errors.max()), bound, share, token_share, controls, tuple(self._failures),
        )  # fmt: skip

    def _fork(self, num_tokens: int) -> torch.Tensor:
        """A prompt that leaves the first one after so many tokens."""
        return torch.cat((self._prompt[:num_tokens], self._other[num_tokens:]))

    def _alone(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [n, vocabulary] of one pass without this package's cache and attention."""
        with torch.inference_mode():
            positions = torch.arange(tokens.numel(), device=self._model.device)[None]
            out = self._model(input_ids=tokens[None].to(self._model.device), position_ids=positions, use_cache=False)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _bound(self, alone: torch.Tensor) -> float:
        if self._given_bound is not None:
            return self._given_bound
        deviation, noise = float(alone.std()), self._noise(alone)
        if self._is_exact:
            return max(1e-3 * deviation, 3 * float(noise.max()))
        return max(0.125 * deviation, 3 * float(noise.quantile(_ROUNDED_SHARE)))

    def _noise(self, alone: torch.Tensor) -> torch.Tensor:
        """Errors of positions in passes of other lengths: those of the pieces, and a longer one.

        Libraries choose kernels, and with them the order of sums, by the number of tokens in a pass. No pass here goes
        on from a state, so a model that is wrong about those has no more of it.
        """
        pieces = [self._prompt[:INTERVAL], self._prompt[: PROMPT_TOKENS - 2 * INTERVAL]]
        passes = [self._alone(tokens) for tokens in (*pieces, torch.cat((self._prompt, self._other)))]
        return torch.cat([_errors(got[:PROMPT_TOKENS], alone[: len(got)]) for got in passes])

    def _in_pieces(self, tokens: torch.Tensor) -> tuple[torch.Tensor, list[list[torch.Tensor]], list[int]]:
        """Outside the cache: logits [n, vocabulary], the states at each boundary, and what is decoded then."""
        run = self._runner.open(tokens, reuse=False)
        logits, states = [], []
        for start in range(0, PROMPT_TOKENS, INTERVAL):
            logits.append(self._runner.extend(run, tokens[start : start + INTERVAL].numpy(), all_logits=True))
            states.append([state.clone() for state in self._runner.live_states(run)])
        decoded = self._runner.decode(run, NUM_DECODED)
        self._runner.close(run)
        return torch.cat(logits), states, decoded

    def _placement(self) -> float:
        """The largest difference that the cache makes: while it is filled, and when both boundaries are reused."""
        forks = [2 * INTERVAL, INTERVAL]
        if self._has_states:  # between two, there is KV that is not computed again but no state
            forks.insert(1, INTERVAL + 2 * BLOCK_TOKENS)
        cases = [(self._prompt, 0), (self._other, 0)]
        cases += [(self._fork(position), position - position % INTERVAL) for position in forks]
        error = 0.0
        for prompt, reused in cases:
            expected, _, expected_tokens = self._in_pieces(prompt)
            run = self._runner.open(prompt)
            start = run.num_reused_tokens
            if start != reused:
                self._failures.append(f"placement-identical: {start} tokens reused, not {reused}")
            boundaries = range(INTERVAL, PROMPT_TOKENS, INTERVAL)
            got = self._runner.extend(run, prompt[start:].numpy(), cuts=boundaries, all_logits=True)
            error = max(error, float(_errors(got, expected[start:]).max()))
            if self._runner.decode(run, NUM_DECODED) != expected_tokens:
                self._failures.append(f"placement-identical: other tokens decoded after {start} reused ones")
            self._runner.close(run)
        if error != 0:
            self._failures.append(f"placement-identical: logits differ by {error:.3g} with the same cuts, not 0")
        return error

    def _judge_cuts(self, errors: torch.Tensor, bound: float) -> float:
        """The share of positions within the bound. `errors`: of all positions after the first cut."""
        is_within = (errors <= bound).float()
        share = float(is_within.mean())
        near_share = float(torch.cat((is_within[:_NEAR], is_within[INTERVAL : INTERVAL + _NEAR])).mean())
        is_hard = self._is_exact or self._given_bound is not None
        enough, near_enough = (1.0, 1.0) if is_hard else (_ROUNDED_SHARE, 0.75)
        if share < enough or near_share < near_enough:
            self._failures.append(
                f"cut-identical: {float(errors.max()):.3g} from one pass, expected at most {bound:.3g} "
                f"({share:.0%} of the positions are, right after a cut {near_share:.0%})"
            )
        return share

    def _judge_tokens(self, prompt: torch.Tensor) -> float:
        """The share of tokens decoded after a reused prompt that are those of the model alone."""
        run = self._runner.prefill(prompt)
        tokens = self._runner.decode(run, NUM_DECODED)
        self._runner.close(run)
        expected = _greedy(self._model, prompt, NUM_DECODED)
        share = sum(map(int.__eq__, tokens, expected)) / NUM_DECODED
        if self._is_exact and share < 1:
            self._failures.append(f"token-identical: {share:.0%} of the greedy tokens are those of the model alone")
        return share

    def _controls(self, logits: torch.Tensor, states: list[list[torch.Tensor]]) -> tuple[tuple[str, float], ...]:
        """What a wrong state at the last boundary makes of the logits after it."""
        if not self._has_states:
            return ()
        zeros = [torch.zeros_like(state) for state in states[1]]
        _, other_states, _ = self._in_pieces(self._other)
        kinds = {"zeros": zeros, "another sequence": other_states[1], "the boundary before": states[0]}
        return tuple((name, self._error_with(wrong, logits)) for name, wrong in kinds.items())

    def _error_with(self, states: list[torch.Tensor], logits: torch.Tensor) -> float:
        run = self._runner.open(self._prompt)
        start = run.num_reused_tokens
        for live, wrong in zip(self._runner.live_states(run), states, strict=True):
            live.copy_(wrong)
        got = self._runner.extend(run, self._prompt[start:].numpy(), commit=False, all_logits=True)
        self._runner.close(run)
        return float(_errors(got, logits[start:]).max())


def _greedy(model: Any, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    """Greedy tokens of a model alone, with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    tokens, position, decoded = prompt[None].to(model.device), 0, []
    with torch.inference_mode():
        for _ in range(num_tokens):
            positions = torch.arange(position, position + tokens.shape[1], device=model.device)[None]
            out = model(input_ids=tokens, position_ids=positions, logits_to_keep=1, **{cache_argument(model): cache})
            position += tokens.shape[1]
            tokens = out.logits[:, -1].argmax(-1, keepdim=True)
            decoded.append(int(tokens))
    return decoded


def _errors(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """[n], the largest difference of logits at each position; infinite where one is not a number."""
    difference = (got.float() - expected.float()).abs().amax(-1)
    return difference.nan_to_num(nan=torch.inf)
