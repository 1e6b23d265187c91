"""The DBRX model for inference: `DbrxModel` and, with its head, `DbrxForCausalLM`. Modules are named as in the checkpoint.

Dimension letters: `B` sequences, `S` columns of a padded batch, `T` real tokens of all sequences, `L` columns with those of the cache, `D`
d_model, `V` vocabulary, `H` query heads, `E` experts.

Padding never reaches a layer. A padded batch [B, S] is reduced to its T real tokens, one sequence after the other, and only attention
knows where a sequence begins. Where the mask is 0, outputs are zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dbrx_q.config import DbrxConfig
from dbrx_q.errors import RequestError
from dbrx_q.experts import ExpertStore, ResidentExpertStore
from dbrx_q.kernels.backend import Backend, pick

from .arguments import check_ignored, named_cache, wanted_states, wants_attentions, wants_mapping
from .batch import Batch, ForwardPass, KeptTokens, Recorder
from .generation_config import GenerationConfig
from .implementations import initial_implementation, set_implementation
from .inputs import InputReader
from .kv_cache import KVCache
from .layers import DbrxBlock, DbrxEmbedding, DbrxLayerNorm, DbrxLinear, hooked
from .limits import Limits
from .loss import IGNORED, check_labels, count_kept, kept_columns, kept_mask, load_balancing_loss, next_token_loss
from .outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast, transition_scores
from .pretrained import DbrxPreTrainedModel

__all__ = ["DbrxForCausalLM", "DbrxModel"]

OnBlock = Callable[[torch.Tensor, "torch.Tensor | None"], None]
"""Called after each block with its results, whose sum is the residual stream [T, D]; the second may be None."""


class DbrxModel(DbrxPreTrainedModel):
    """The transformer without its head.

    The constructor initialises weights at random; `from_pretrained` loads a checkpoint.

    Args:
        config: a `DbrxConfig`.

    Attributes:
        expert_store: serves the experts of all layers; None for the experts of the modules themselves.
        limits: the memory that requests may take.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__(config)
        config = self.config
        self.wte = DbrxEmbedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(DbrxBlock(config, layer) for layer in range(config.n_layers))
        self.norm_f = DbrxLayerNorm(config.d_model)
        self.expert_store: ExpertStore | None = None
        self.limits = Limits()
        self._hooks_counted, self._watched = -1, False
        _initialise(self, config.initializer_range)
        set_implementation(self, initial_implementation(config, self.device))
        self.eval()

    @property
    def devices(self) -> list[torch.device]:
        """The device of each layer."""
        return [block.device for block in self.layers()]

    @property
    def attn_implementation(self) -> str:
        """The implementation of attention, one of `dbrx_q.kernels.attention.IMPLEMENTATIONS`."""
        return self.layers()[0].norm_attn_norm.attn.implementation

    @property
    def steps_together(self) -> bool:
        """Whether attention reads the lengths of sequences on the device, so that one captured step serves a batch."""
        triton = all(block.norm_attn_norm.attn.implementation == "triton" for block in self.layers())
        return triton and pick(self.device) is Backend.TRITON

    @property
    def store(self) -> ExpertStore:
        """The expert store; for a model that was not loaded, a store of the modules' own parameters."""
        return self.expert_store or ResidentExpertStore([block.ffn.experts.mlp.weights() for block in self.layers()])

    @property
    def watched(self) -> bool:
        """Whether a hook of the user watches a module of the model."""
        registered = RemovableHandle.next_id  # grows with each hook of any module: while it stays, a model without hooks has none
        if registered != self._hooks_counted:
            self._watched = any(hooked(module) for module in self.modules() if module is not self)
            self._hooks_counted = -1 if self._watched else registered
        return self._watched

    def layers(self) -> list[DbrxBlock]:
        """The blocks in order, typed."""
        return [block for block in self.blocks if isinstance(block, DbrxBlock)]

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        *,
        cache: KVCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        states_to_keep: int | torch.Tensor = 0,
        **ignored: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """Run new tokens through all layers. Arguments, their order and outputs are those of transformers.

        No gradients are computed. Arguments that are None take the configuration's value where it has one. A keyword argument that
        transformers ignores is ignored, with a warning unless a tokenizer gives it; one that resembles a name of these is a TypeError.

        Args:
            input_ids: whole numbers [B, S].
            attention_mask: [B, S], 0 for padding on any side or between tokens; or [B, past + S] with the columns of the cache, where 0
                hides a token in it; or [B or 1, 1 or H, S, past + S] in place of causal attention, a boolean or a number that is added to
                the score. Hidden tokens and 4 dimensions need "sdpa" or "eager" attention. None for no padding.
            position_ids: whole numbers [B, S] or [1, S], the position that rotates each token; None to count columns, padding included,
                from the first call. Without an attention_mask and a cache, a new sequence begins where a position is not the successor of
                the one before.
            past_key_values: the cache with the tokens before these; the new tokens are added to it.
            inputs_embeds: [B, S, D] in the dtype of activations, in place of `input_ids`.
            use_cache: whether to return a cache for later calls.
            output_router_logits: whether to return the logits of every router.
            cache: another name for `past_key_values`.
            output_attentions: whether to return attention weights; only with "eager" attention.
            output_hidden_states: whether to return the residual stream before each block and the output of the last norm; or the indices
                of some of these, which makes the others None.
            return_dict: False to return a tuple of the outputs that are not None.
            cache_position: whole numbers [S]; must count on from the columns of the cache.
            states_to_keep: the columns whose last hidden states are wanted, named as by `logits_to_keep` of `DbrxForCausalLM`; 0 for all.
                Where nothing else asks for all tokens (hidden states, router logits, attention weights, a hook on a module), the last
                layer computes only keys and values of the tokens before a sequence's first wanted column, whose last hidden states are
                zeros. The others keep their values, but may differ in the last digits: a product's digits can depend on its number of
                rows.
            ignored: see above.

        Raises:
            RequestError: inputs of a wrong shape, dtype or value, or more tokens than the context, the cache or the model's budget has room
                for.
            TypeError: an unknown argument that resembles a known one.
            UnsupportedError: what the implementation of attention cannot compute.
        """
        check_ignored(ignored)
        config, cache = self.config, named_cache(past_key_values, cache)
        implementation = self.attn_implementation
        use_cache = config.use_cache if use_cache is None else use_cache
        with_logits = config.output_router_logits if output_router_logits is None else output_router_logits
        wanted = wanted_states(config, output_hidden_states, config.n_layers + 1)
        with_attentions = wants_attentions(config, output_attentions, implementation)
        reader = InputReader(config, self.limits, self.dtype, self.device, implementation)
        inputs, longest = reader.read(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, cache_position, stores=cache is not None or use_cache
        )
        self.limits.check_outputs(config, self.dtype, inputs.shape, inputs.past, len(wanted or ()), with_attentions, with_logits)
        if cache is None and use_cache:
            cache = self._new_cache(inputs.shape[0], longest)
        if cache is not None:
            cache.reserve(longest)
        batch = inputs.batch if inputs.batch.cache is cache else replace(inputs.batch, cache=cache)

        recorder = Recorder(attentions=[] if with_attentions else None)
        states: list[torch.Tensor | None] = []

        def keep(x: torch.Tensor, delta: torch.Tensor | None) -> None:
            assert wanted is not None
            if len(states) < config.n_layers:
                states.append(inputs.padded(x if delta is None else x + delta) if len(states) in wanted else None)

        # Inference mode makes a step of the bundled model 12 % faster, but users cannot save its tensors for backward.
        observed = with_logits or with_attentions or wanted is not None or self.watched
        with nullcontext() if observed else torch.inference_mode():
            x = self.embedded(inputs.tokens)
            if wanted is not None:
                keep(x, None)
            counts = None if observed or (cache is None and implementation == "flash_attention_2") else inputs.kept_counts(states_to_keep)
            x, delta, last = self._run_blocks(x, batch, recorder, None if wanted is None else keep, counts)
        hidden = inputs.padded(self.norm_f.run(x, delta)[1] if len(x) else x, last)
        if wanted is not None:
            states.append(hidden if config.n_layers in wanted else None)
        output = MoeModelOutputWithPast(
            hidden,
            cache,
            None if wanted is None else tuple(states),  # type: ignore[arg-type] # None only where the user asked for some
            inputs.padded_attentions(recorder.attentions, config.n_heads) if recorder.attentions is not None else None,
            tuple(inputs.padded(logits).flatten(0, 1) for logits in recorder.router_logits) if with_logits else None,
        )
        if cache is not None:
            cache.advance(batch.sequences.counts, inputs.padding)
        return output if wants_mapping(config, return_dict) else output.to_tuple()

    def run(self, ids: torch.Tensor, batch: Batch, on_block: OnBlock | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(the last hidden state [T, D], float32 router logits [T, E] of every layer) of the tokens `ids` [T].

        `on_block` is called after each block. It never waits for the device, so that a CUDA graph can capture it. The caller advances
        `batch.cache.lengths`.
        """
        recorder = Recorder()
        x, delta, _ = self._run_blocks(self.embedded(ids), batch, recorder, on_block)
        return self.norm_f.run(x, delta)[1], recorder.router_logits

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T, D] on the device of the first block, for ids [T] or embeddings [T, D]."""
        tokens = tokens.to(self.layers()[0].device)
        x: torch.Tensor = tokens if tokens.is_floating_point() else self.wte(tokens, self.dtype)
        return x

    def _run_blocks(
        self, x: torch.Tensor, batch: Batch, recorder: Recorder, on_block: OnBlock | None, counts: Sequence[int] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """(both results of the last block for embeddings [T, D], the tokens that they have or None for all).

        `counts` says how many last tokens of each sequence need the last block's results; None for all tokens.
        """
        shared = ForwardPass.of(batch.to(x.device), self.config, self.store, recorder)
        delta: torch.Tensor | None = None
        several = self.device != x.device  # layers are on GPUs in order: if the first and the last device are one, there is no other
        for block in self.layers():
            if several and block.device != x.device:  # the layers of the next GPU begin: the residual stream moves, 2 D bytes per token
                device = block.device
                shared = shared.to(device, self.config)
                x, delta = x.to(device), None if delta is None else delta.to(device)
            if counts is not None and block is self.blocks[-1]:
                kept = KeptTokens.of(shared.batch, counts)
                if not any(counts):
                    if batch.cache is not None:
                        block.store(x, delta, shared)
                    return x[:0], None, kept.rows
                shared = replace(shared, kept=kept)
            x, delta = block.run(x, delta, shared)
            if on_block is not None:
                on_block(x, delta)
        return x, delta, None if shared.kept is None else shared.kept.rows

    def _new_cache(self, batch_size: int, tokens: int) -> KVCache:
        """A cache with room for `tokens` tokens in each sequence, which grows as far as the model's budget allows."""
        room, kv_bytes = None, self.limits.kv_bytes
        if kv_bytes is not None:
            room = kv_bytes // max(1, KVCache(self.config, batch_size, 1, dtype=self.dtype, device="meta").nbytes)
            if tokens > room:
                raise RequestError(
                    f"keys and values must fit the {kv_bytes:,} bytes of the model's budget, {room} tokens of {batch_size} sequences; "
                    f"found {tokens}. Load the model with a longer context or a larger batch, or shorten it"
                )
        return KVCache(self.config, batch_size, max(tokens, 1), dtype=self.dtype, device=self.devices, grows=True, limit=room)


class DbrxForCausalLM(DbrxPreTrainedModel):
    """The transformer with its head; `from_pretrained` loads a checkpoint.

        model = DbrxForCausalLM.from_pretrained("dbrx-int4")
        model(**tokenizer("A mixture of experts is", return_tensors="pt")).logits  # [1, S, V]

    Args:
        config: a `DbrxConfig`; weights are initialised at random.

    Attributes:
        eos_token_ids: tokens that end a generation: those of generation_config.json, or of the configuration without that file.
        generation_config: defaults of `generate`: those of generation_config.json, or the end token of the configuration.
    """

    def __init__(self, config: DbrxConfig) -> None:
        super().__init__(config)
        config = self.config
        self.transformer = DbrxModel(config)
        self.lm_head = DbrxLinear(config.d_model, config.vocab_size)
        self.eos_token_ids: tuple[int, ...] = _as_ids(config.eos_token_id)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.decoder: object | None = None  # the `BatchDecoder` that generation on a GPU keeps from one request to the next
        _initialise(self.lm_head, config.initializer_range)
        self.eval()

    @property
    def limits(self) -> Limits:
        """The memory that requests may take."""
        return self.transformer.limits

    @property
    def expert_store(self) -> ExpertStore:
        """Serves the experts of all layers; its `stats()` counts hits, misses and bytes."""
        return self.transformer.store

    def close(self) -> None:
        """Close the files and threads of the expert store. A model whose experts are partly on disk cannot run afterwards."""
        self.transformer.store.close()

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        *,
        cache: KVCache | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | float | None = None,
        shift_labels: torch.Tensor | None = None,
        ignore_index: int = IGNORED,
        **ignored: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of new tokens, and their losses; other arguments and errors as for `DbrxModel.forward`.

        Args:
            labels: whole numbers, one for each column with logits: the tokens of these columns, each predicted by the column before it.
                Their mean cross entropy is the output's `loss`. It leaves out `ignore_index`, and padding by `attention_mask`: labels of
                padding and predictions from padding. With router logits, the load-balancing loss `aux_loss` is added with the weight
                `ffn_config.moe_loss_weight`.
            logits_to_keep: which columns to compute logits for: the number of last ones, 0 for all; or a tensor, whole numbers [P] or
                [B, P] for columns by index, or booleans [B, S]. No memory is taken for the logits of others, and the last layer leaves
                out what only they need (`states_to_keep` of `DbrxModel.forward`).
            num_items_in_batch: what to divide the sum of the labels' cross entropies by; None for their number.
            shift_labels: for each column with logits the token that it predicts, in place of `labels`.
            ignore_index: the label that the loss leaves out.

        Raises:
            RequestError: also for labels or columns that do not fit, and for outputs that exceed the model's budget.
        """
        check_ignored(ignored)
        config = self.config
        with_router = config.output_router_logits if output_router_logits is None else output_router_logits
        given = input_ids if inputs_embeds is None else inputs_embeds
        if isinstance(given, torch.Tensor) and given.ndim >= 2:
            B, S = int(given.shape[0]), int(given.shape[1])
            self.limits.check_logits(config, self.dtype, count_kept(B, S, logits_to_keep))
            if B and S:
                check_labels(labels, shift_labels, B, S, logits_to_keep, config.vocab_size, ignore_index)
        out = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=named_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=with_router,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            cache_position=cache_position,
            states_to_keep=logits_to_keep,
        )
        logits = self.lm_head(kept_columns(out.last_hidden_state, logits_to_keep))
        loss = aux_loss = real = None
        if attention_mask is not None and attention_mask.ndim == 2:
            real = attention_mask[:, -out.last_hidden_state.shape[1] :].bool()
        if labels is not None or shift_labels is not None:
            loss = next_token_loss(
                logits,
                labels,
                shift_labels=shift_labels,
                real=None if real is None else kept_mask(real, logits_to_keep),
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
            )
        if with_router:
            aux_loss = load_balancing_loss(out.router_logits, config.ffn_config.moe_top_k, None if real is None else real.flatten())
            if loss is not None:
                loss = loss + config.ffn_config.moe_loss_weight * aux_loss.to(loss.device)
        output = MoeCausalLMOutputWithPast(loss, aux_loss, logits, out.cache, out.hidden_states, out.attentions, out.router_logits)
        return output if wants_mapping(config, return_dict) else output.to_tuple()

    def generate(
        self,
        inputs: torch.Tensor | Sequence[Sequence[int]] | None = None,
        generation_config: GenerationConfig | Mapping[str, Any] | Any = None,
        logits_processor: Sequence[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
        stopping_criteria: Sequence[Callable[[torch.Tensor, Any], Any]] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Any:
        """Continue prompts, with the arguments, defaults and results of transformers' `generate`.

            inputs = tokenizer("A mixture of experts is", return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=50)
            print(tokenizer.decode(ids[0]))

        A batch has padding on the left, as `attention_mask` says; on another side or between tokens it is skipped. Without a mask, tokens
        that are `pad_token_id` are padding. Without a length 20 tokens are generated.

        Args:
            inputs: token ids [B, S], a tensor or lists; `input_ids` is another name.
            generation_config: a `GenerationConfig`, one of transformers, or a dictionary. Fields that it leaves out have the values of
                `model.generation_config`, then those of transformers.
            logits_processor: called in order with (ids [R, n], scores float32 [R, V]); each returns new scores.
            stopping_criteria: called with (ids [R, n], all scores or None) after each token; True, or True for a sequence, ends it.
            prefix_allowed_tokens_fn: called with (index of the prompt, ids so far); returns the tokens that may follow.
            synced_gpus, assistant_model: must be None.
            streamer: `put` receives the prompt's ids, then each token; then `end` is called.
            options: fields of `GenerationConfig`, and
                attention_mask: [B, S], or with a cache [B, past + S];
                inputs_embeds: [B, S, D] in place of ids; the result has the new tokens only;
                past_key_values, or cache: a `KVCache` to go on from, which holds the first tokens of `inputs`;
                tokenizer: finds `stop_strings`;
                generator, or seed: draws tokens; without both torch's global generator does;
                kv_format: of a new cache, "plain", "int8" or "int4".

        Returns:
            int64 [B * num_return_sequences, n], prompts included, padded with `pad_token_id` after the end; with
            `return_dict_in_generate=True` an output object with the sequences and what is asked for.

        Raises:
            RequestError: arguments out of range or that contradict each other.
            TypeError: an unknown argument; names the nearest one.
            UnsupportedError: an argument of transformers that this version does not have.
        """
        from dbrx_q.generation.model_generate import generate_tokens

        return generate_tokens(
            self,
            inputs,
            generation_config,
            logits_processor,
            stopping_criteria,
            prefix_allowed_tokens_fn,
            streamer,
            synced_gpus=synced_gpus,
            assistant_model=assistant_model,
            **options,
        )

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: Sequence[torch.Tensor] | None,
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """The score of each new token that `generate` chose.

        Args:
            sequences: int64 [N, n] of an output of `generate`.
            scores: of the same output: for each step float32 [R, V].
            beam_indices: of the same output after beam search: int [N, new tokens].
            normalize_logits: return log probabilities; without beams `scores` are logits.

        Returns:
            float32 [N, new tokens]; after the end of a beam 0.

        Raises:
            RequestError: the output has no scores.
        """
        return transition_scores(sequences, scores, beam_indices, normalize_logits)


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else tuple(value)


def _initialise(module: nn.Module, std: float) -> None:
    for parameter in module.parameters():
        if parameter.ndim == 2 and not parameter.is_meta:
            nn.init.normal_(parameter, std=std)
