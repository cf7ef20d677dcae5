"""Runs a hybrid model over the pages and slots of a manager, one sequence at a time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ssmcache.integrations.transformers_attention import Attention, attention_of
from ssmcache.integrations.transformers_cache import Cache, DynamicCache, cache_argument
from ssmcache.integrations.transformers_pools import Layout, ModelPools, Tensors
from ssmcache.integrations.transformers_sequence import Prefilled, TokenSequence, token_array
from ssmcache.integrations.transformers_shapes import ModelShapes
from ssmcache.keys import Int64Array, ReuseScope
from ssmcache.layout import LayerGroupKind
from ssmcache.manager import KVCacheManager
from ssmcache.pools import SlotArray
from ssmcache.sequence import KVCache
from ssmcache.sequence_pages import KVCacheStatus

_DEFAULT_SCOPE = ReuseScope()


class SequenceRunner:
    """The mechanism of `HybridRunner`, which also checks the model."""

    def __init__(
        self,
        model: Any,
        manager: KVCacheManager,
        shapes: ModelShapes,
        *,
        max_tokens: int,
        attention: Attention = "lower_right",
        commit_decoded: bool = False,
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: expected a positive integer, got {max_tokens!r}")
        if model.training:
            raise ValueError("model: expected one in evaluation mode, got one in training: call model.eval()")
        self.model = model
        self.manager = manager
        self.max_tokens = max_tokens
        self._attention = attention
        self._commit_decoded = commit_decoded
        self._device: torch.device = model.device
        self._layout = Layout(shapes, manager)
        self._pools = ModelPools(self._layout, manager, self._device)
        self._scratch = Tensors(self._layout, max_tokens, self._device, with_states=False)
        layers = DynamicCache(config=model.config).layers  # those of layers that keep nothing stay
        cache = Cache(layers=[self._pools.layers[index] or layer for index, layer in enumerate(layers)])
        self._cache = {cache_argument(model): cache}
        self._bound: Prefilled | None = None
        kinds = (LayerGroupKind.ATTENTION, LayerGroupKind.WINDOW)
        self._has_pages = [group.kind in kinds for group in manager.groups]
        states = [index for index, group in enumerate(manager.groups) if group.kind is LayerGroupKind.SSM]
        self._state_group = states[0] if states else None

    # -- a request ---------------------------------------------------------------------------------------------------

    def prefill(
        self,
        tokens: TokenSequence,
        *,
        reuse: bool = True,
        cuts: Iterable[int] | None = None,
        scope: ReuseScope = _DEFAULT_SCOPE,
    ) -> Prefilled:
        """Compute a prompt, but for what is reused; full blocks and snapshots of it are offered for reuse.

        Args:
            tokens: [n] ids, 1..max_tokens of them.
            reuse: False: neither read the cache nor write to it, in memory of its own.
            cuts: positions at which passes end; None: where the manager wants snapshots. A run with the same cuts and
                without reuse has the same logits, bit for bit.
            scope: whose cache it is.

        With no room in the cache (`resume` or `resize` is False) it runs without, and `shortage` says why.
        Errors: ValueError for no tokens or too many.
        """
        prompt = token_array(tokens)
        run = self.open(prompt, reuse=reuse, scope=scope)
        self.extend(run, prompt[run.num_tokens :], cuts=cuts)
        return run

    def decode(self, run: Prefilled, num_tokens: int) -> list[int]:
        """Continue greedily: the most likely token after those computed, and so on. All that are returned are computed.

        Decoded tokens are private unless the runner was made with `commit_decoded`.
        Errors: ValueError beyond max_tokens, or for a sequence that is closed or has no logits.
        """
        decoded = []
        for _ in range(num_tokens):
            if run.logits is None:
                raise ValueError("decode: expected a sequence with logits, got one before its first pass, or closed")
            token = int(run.logits.argmax())
            self.extend(run, [token], cuts=(), commit=self._commit_decoded)
            decoded.append(token)
        return decoded

    def suspend(self, run: Prefilled) -> None:
        """Let what the sequence has move to the tiers below while others compute. The next pass brings it back."""
        if run.kv is not None and run.kv.status is KVCacheStatus.ACTIVE:
            self._unbind(run)
            run.kv.suspend()

    def close(self, run: Prefilled) -> None:
        """Leave; what was committed stays for reuse. Idempotent."""
        self._unbind(run)
        if run.kv is not None:
            run.kv.close()
        run.kv = run.own = run.logits = None

    # -- its parts ---------------------------------------------------------------------------------------------------

    def open(
        self,
        tokens: TokenSequence,
        *,
        reuse: bool = True,
        scope: ReuseScope = _DEFAULT_SCOPE,
    ) -> Prefilled:
        """A sequence for a prompt, with what is reused of it and nothing computed; see `prefill`."""
        prompt = token_array(tokens)
        self._check_length(prompt.size)
        run = Prefilled(self.max_tokens)
        if reuse:
            kv = self.manager.create_kv_cache(prompt[:-1], scope)
            if kv.resume() and kv.resize(prompt.size):
                run.kv, run.match = kv, kv.reuse_match
                run.num_tokens = run.num_reused_tokens = kv.num_committed_tokens
                run.buffer[: run.num_tokens] = prompt[: run.num_tokens]
                run.stops = list(self._wanted_cuts(0, run.num_tokens))
                return run
            run.match, run.shortage = kv.reuse_match, kv.shortage
            kv.close()
        run.own = self._own_tensors()
        return run

    def extend(
        self,
        run: Prefilled,
        tokens: TokenSequence,
        *,
        cuts: Iterable[int] | None = None,
        commit: bool = True,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Compute the next tokens of an open sequence, in passes that end at the cuts.

        Returns logits: [1, vocabulary] of the last token, or [n, vocabulary] of all. If the model raises, the sequence
        is closed.
        """
        more = token_array(tokens)
        start, end = run.num_tokens, run.num_tokens + more.size
        if run.kv is None and run.own is None:
            raise ValueError("extend: expected an open sequence, got one that is closed")
        self._check_length(end)
        wanted = self._wanted_cuts(start, end) if cuts is None else sorted({cut for cut in cuts if start < cut < end})
        stops = dict.fromkeys((*wanted, end))
        try:
            logits = [self._pass(run, more[run.num_tokens - start :], stop, commit, all_logits) for stop in stops]
        except BaseException:  # its states may be half written
            self.close(run)
            raise
        return torch.cat(logits) if all_logits else logits[-1]

    def live_states(self, run: Prefilled) -> list[torch.Tensor]:
        """The states that the next pass of a sequence starts from. Not copies."""
        self._bind(run)
        return list(self._states_of(run).values())

    # -- passes ------------------------------------------------------------------------------------------------------

    def _pass(self, run: Prefilled, tokens: Int64Array, end: int, commit: bool, all_logits: bool) -> torch.Tensor:
        """Compute the first of these tokens, up to position `end`."""
        start = run.num_tokens
        tokens = tokens[: end - start]
        self._make_room(run, end, commit)
        self._bind(run)
        logits = self._forward(tokens, start, all_logits)
        run.buffer[start:end] = tokens
        run.num_tokens, run.logits = end, logits[-1]
        run.stops.append(end)
        if run.kv is not None:
            # shared pages are not written again: other sequences may be reading them
            first = max(start, run.kv.num_attention_tokens) // self._layout.tokens_per_block
            self._pools.write(self._tables(run.kv, end), first, self._scratch)
            if commit:
                run.kv.commit(run.buffer[run.kv.num_committed_tokens : end])
        return logits

    def _forward(self, tokens: Int64Array, start: int, all_logits: bool) -> torch.Tensor:
        input_ids = torch.from_numpy(tokens.copy()).to(self._device)[None]
        position_ids = torch.arange(start, start + tokens.size, device=self._device)[None]
        with torch.inference_mode(), attention_of(self.model.config, self._attention):
            out = self.model(
                input_ids=input_ids,
                position_ids=position_ids,  # some models count from 0 again without
                use_cache=True,
                logits_to_keep=0 if all_logits else 1,
                **self._cache,
            )
        logits: torch.Tensor = out.logits[0]
        return logits

    def _make_room(self, run: Prefilled, num_tokens: int, commit: bool) -> None:
        """Room for so many tokens, in the cache if there is any."""
        if run.kv is None:
            return
        if run.kv.status is not KVCacheStatus.ACTIVE and not run.kv.resume():
            self._compute_again(run)
            return
        history = run.kv.history_length if commit else max(run.kv.history_length, run.num_tokens)
        block = self._layout.tokens_per_block
        if num_tokens > run.kv.capacity and not run.kv.resize(-(-num_tokens // block) * block, history):
            self._leave_cache(run)

    def _leave_cache(self, run: Prefilled) -> None:
        """Go on in memory of its own, with what is in the pages and the slot now."""
        assert run.kv is not None
        own = self._own_tensors()
        self._bind(run)
        for place, scratch in self._scratch.kv.items():
            own.kv[place][: run.num_tokens].copy_(scratch[: run.num_tokens])
        for place, state in self._states_of(run).items():
            own.states[place].copy_(state)
        self._replace(run, own)

    def _compute_again(self, run: Prefilled) -> None:
        """Go on in memory of its own, where what a suspended sequence had cannot be brought back: the same passes."""
        tokens, stops = run.tokens.copy(), run.stops
        self._replace(run, self._own_tensors())
        run.num_tokens, run.num_reused_tokens, run.stops = 0, 0, []
        if tokens.size:
            self.extend(run, tokens, cuts=stops)

    def _replace(self, run: Prefilled, own: Tensors) -> None:
        assert run.kv is not None
        run.shortage = run.kv.shortage
        self._unbind(run)
        run.kv.close()
        run.kv, run.own = None, own

    # -- what the layers are bound to --------------------------------------------------------------------------------

    def _bind(self, run: Prefilled) -> None:
        moved = self._pools.refresh()
        if self._bound is run and not moved:
            return
        if run.kv is not None:
            self._pools.gather(self._tables(run.kv, run.num_tokens), self._scratch)
        self._pools.bind(self._scratch if run.own is None else run.own, self._states_of(run), run.num_tokens)
        self._bound = run

    def _unbind(self, run: Prefilled) -> None:
        if self._bound is run:
            self._bound = None

    def _states_of(self, run: Prefilled) -> dict[tuple[int, int], torch.Tensor]:
        if run.own is not None:
            return run.own.states
        if self._state_group is None or run.kv is None:
            return {}
        return self._pools.states_of(run.kv.ssm_slot(self._state_group))

    def _tables(self, kv: KVCache, num_tokens: int) -> list[SlotArray | None]:
        num_blocks = -(-num_tokens // self._layout.tokens_per_block)
        return [
            kv.page_indices(group)[:num_blocks] if has_pages else None
            for group, has_pages in enumerate(self._has_pages)
        ]

    def _own_tensors(self) -> Tensors:
        return Tensors(self._layout, self.max_tokens, self._device, with_states=True)

    def _wanted_cuts(self, start: int, end: int) -> range:
        if self._state_group is None:
            return range(0)
        return self.manager.admission.points(start, end, end)

    def _check_length(self, num_tokens: int) -> None:
        if not 1 <= num_tokens <= self.max_tokens:
            raise ValueError(f"tokens: expected 1..{self.max_tokens} (max_tokens), got {num_tokens}")
