"""`model.generate`, with the arguments and outputs of transformers.

Dimension letters: `B` prompts, `N` sequences of each, `R` = B * N or B * beams, `S` columns of the prompts, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from dbrx_q.config_values import shortened
from dbrx_q.errors import RequestError
from dbrx_q.model.generation_config import GenerationConfig
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM
from dbrx_q.model.overflow import all_finite

from .arguments import callables_of, check_mode, configuration_of, either, end_tokens_of, set_lengths
from .beam_search import Beams, BeamSettings
from .decoding import decoder_for
from .forward_decoder import ForwardDecoder
from .generate import capacities_of
from .inputs import PromptBatch, read_prompts
from .logits_processors import Processor, processors_of
from .outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from .prompt_lookup import candidates
from .stopping import Criterion, Stopping, StopStrings
from .token_loop import Steps, prefill_all, token_steps

__all__ = ["generate_tokens"]


@torch.no_grad()
def generate_tokens(
    model: DbrxForCausalLM,
    inputs: torch.Tensor | Sequence[Sequence[int]] | None = None,
    generation_config: GenerationConfig | Mapping[str, Any] | Any = None,
    logits_processor: Sequence[Processor] | None = None,
    stopping_criteria: Sequence[Criterion] | None = None,
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
    streamer: Any = None,
    *,
    input_ids: torch.Tensor | Sequence[Sequence[int]] | None = None,
    attention_mask: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    past_key_values: KVCache | None = None,
    cache: KVCache | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    kv_format: str = "plain",
    **options: Any,
) -> torch.Tensor | GenerateDecoderOnlyOutput | GenerateBeamDecoderOnlyOutput:
    """What `DbrxForCausalLM.generate` does and documents."""
    input_ids = either("inputs", inputs, "input_ids", input_ids)
    cache = either("past_key_values", past_key_values, "cache", cache)
    either("generator", generator, "seed", seed)
    if seed is not None and not (isinstance(seed, int) and -(1 << 63) <= seed < 1 << 64):
        raise RequestError(f"seed must be a whole number from -2^63 to 2^64 - 1; found {shortened(seed)}")
    custom, criteria = callables_of("logits_processor", logits_processor), callables_of("stopping_criteria", stopping_criteria)
    config = configuration_of(model, generation_config, options)
    ends = end_tokens_of(config)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else None
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    prompts = read_prompts(
        model,
        config,
        input_ids=input_ids,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        cache=cache,
        pad=pad,
        ends=ends,
        copies=copies,
    )
    max_length = set_lengths(model, config, prompts, generation_config, options)
    prompts = prompts.repeated(copies)
    check_mode(config, prompts, streamer)
    if streamer is not None:
        streamer.put(prompts.ids.cpu())
    request = _Request(
        model=model,
        config=config,
        prompts=prompts,
        copies=copies,
        ends=ends,
        pad=pad,
        max_length=max_length,
        kv_format=kv_format,
        generator=torch.Generator().manual_seed(seed) if seed is not None else generator,
        streamer=streamer,
        custom=bool(custom or criteria),
        processors=processors_of(
            config,
            ends=ends,
            prompt_length=prompts.columns,
            padding=prompts.leading_padding,
            max_length=max_length,
            custom=custom,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            copies=copies,
            vocabulary=model.config.vocab_size,
        ),
        stopping=Stopping(
            ends,
            max_length,
            None if config.stop_strings is None else StopStrings(config.stop_strings, tokenizer),
            config.max_time,
            criteria,
        ),
    )
    if config.num_beams != 1:
        return request.search_beams()
    return request.look_up() if config.prompt_lookup_num_tokens is not None else request.continue_rows()


@dataclass
class _Request:
    """A call of `generate` once checked."""

    model: DbrxForCausalLM
    """The model."""
    config: GenerationConfig
    """With its defaults filled in."""
    prompts: PromptBatch
    """With R rows."""
    copies: int
    """Rows of each prompt."""
    ends: list[int] | None
    """Tokens that end a sequence; None for none."""
    pad: int | None
    """Stands after the end of a sequence."""
    max_length: int
    """Columns of a finished sequence."""
    kv_format: str
    """Of a new cache."""
    generator: torch.Generator | None
    """Draws tokens; None for torch's."""
    streamer: Any
    """None for none."""
    custom: bool
    """Whether processors or criteria of the caller see every row, so that finished ones are computed as well, as in transformers."""
    processors: list[Processor]
    """In their order."""
    stopping: Stopping
    """Which sequences have ended."""

    @property
    def whole_batch(self) -> bool:
        """Whether `forward` runs all rows, finished ones as well, as in transformers: for what a `Decoder` does not have."""
        config, prompts = self.config, self.prompts
        return bool(config.return_dict_in_generate) or not config.use_cache or prompts.cache is not None or prompts.embeddings is not None

    def continue_rows(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Greedy decoding and sampling."""
        config, prompts = self.config, self.prompts
        R, S = prompts.ids.shape
        keeps_all = self.custom or self.whole_batch or self.ends is None
        buffer = torch.zeros(R, self.max_length, dtype=torch.int64, device=prompts.ids.device)
        buffer[:, :S] = prompts.ids
        finished = [False] * R
        length = S
        record = _Record(config)

        def choose(logits: Mapping[int, torch.Tensor]) -> dict[int, int]:
            scores = record.add(self._rows(logits), lambda rows: self._process(buffer[:, :length], rows))
            chosen: list[int] = self._draw(scores) if config.do_sample else scores.argmax(-1).tolist()
            if self.ends is not None and self.pad is not None:
                chosen = [self.pad if done else token for done, token in zip(finished, chosen, strict=True)]
            return dict(enumerate(chosen))

        def goes_on(row: int) -> bool:
            return not all(finished) and (keeps_all or not finished[row])

        with self._decoder() as (decoder, first):
            for tokens in token_steps(decoder, first, choose, goes_on):
                chosen = list(tokens.values())
                buffer[:, length] = torch.tensor(chosen, device=buffer.device)
                length += 1
                ended = self.stopping(buffer[:, :length], chosen, record.scores)
                finished[:] = [before or now for before, now in zip(finished, ended, strict=True)]
                if self.streamer is not None:
                    self.streamer.put(torch.tensor(chosen))
            if self.streamer is not None:
                self.streamer.end()
            sequences = buffer[:, :length].clone()
            if not config.return_dict_in_generate:
                return sequences
            assert isinstance(decoder, ForwardDecoder)
            return GenerateDecoderOnlyOutput(sequences, **record.fields(decoder))

    def search_beams(self) -> torch.Tensor | GenerateBeamDecoderOnlyOutput:
        """Beam search, with or without sampling."""
        config = self.config
        beams = config.num_beams or 1
        settings = BeamSettings(
            beams,
            len(self.ends or ()),
            config.early_stopping or False,
            1.0 if config.length_penalty is None else config.length_penalty,
            self._multinomial if config.do_sample else None,
        )
        fill = -1 if self.ends is None else self.pad or self.ends[0]
        search = Beams(self.prompts.ids, self.max_length, fill, settings)
        record = _Record(config)
        with self._decoder() as (decoder, first):

            def choose(logits: Mapping[int, torch.Tensor]) -> dict[int, int]:
                log_probs = record.add(self._rows(logits), lambda rows: self._process(search.ids, rows.log_softmax(-1)))
                sources, tokens = search.advance(log_probs, self._ended(record))
                decoder.reorder(sources)
                return dict(enumerate(tokens))

            for _ in token_steps(decoder, first, choose, lambda i: not search.finished):
                pass
            sequences, scores, rows = search.result(config.num_return_sequences or 1)
            if not config.return_dict_in_generate:
                return sequences
            assert isinstance(decoder, ForwardDecoder)
            kept = record.fields(decoder)
            return GenerateBeamDecoderOnlyOutput(sequences, scores if config.output_scores else None, beam_indices=rows, **kept)

    def look_up(self) -> torch.Tensor | GenerateDecoderOnlyOutput:
        """Prompt lookup: copied tokens are verified several at a time."""
        config, prompts = self.config, self.prompts
        count, record = config.prompt_lookup_num_tokens or 0, _Record(config)
        prompt: list[int] = prompts.ids[0].tolist() if prompts.mask is None else prompts.ids[0][prompts.mask[0]].tolist()
        ids, pending, ended = list(prompt), list(prompt), False
        room = self.max_length - prompts.columns
        with decoder_for(self.model, capacities_of(self.model, [prompt], room, self.kv_format), self.kv_format) as decoder:
            while not ended:
                left = room - (len(ids) - len(prompt))
                copied = candidates(ids, count, config.max_matching_ngram_size or 2, self.ends or (), left)
                logits = decoder.extend(0, [*pending, *copied], len(copied) + 1)
                before, accepted = len(ids), []
                for i, row in enumerate(logits):
                    columns = torch.cat((prompts.ids, prompts.ids.new_tensor([ids[len(prompt) :]])), 1)
                    scores = record.add(row[None].to(columns.device), lambda rows, columns=columns: self._process(columns, rows))  # type: ignore[misc]
                    token = self._draw(scores)[0] if config.do_sample else int(scores.argmax())
                    ids.append(token)
                    accepted.append(token)
                    with_token = torch.cat((columns, torch.tensor([[token]], device=columns.device)), 1)
                    ended = self.stopping(with_token, [token], record.scores)[0]
                    if ended or i == len(copied) or token != copied[i]:
                        break
                if self.streamer is not None:
                    self.streamer.put(torch.tensor([accepted]))
                decoder.crop(0, before + len(accepted) - 1)
                pending = ids[-1:]
            if self.streamer is not None:
                self.streamer.end()
            new = torch.tensor([ids[len(prompt) :]], device=prompts.ids.device)
            sequences = torch.cat((prompts.ids, new), 1)
            if not config.return_dict_in_generate:
                return sequences
            return GenerateDecoderOnlyOutput(sequences, **record.fields(None) | {"cache": self._kept(decoder.cache_of(0))})

    def _kept(self, borrowed: KVCache) -> KVCache | None:
        """A copy of the cache of the only sequence; None with padding, of which that cache has no columns."""
        if self.prompts.mask is not None:
            return None
        tokens = borrowed.lengths[0]
        cache = self._new_cache(1, tokens)
        cache.copy_prefix(borrowed, tokens)
        return cache

    @contextmanager
    def _decoder(self) -> Iterator[tuple[Steps, dict[int, torch.Tensor]]]:
        """What appends tokens, and the logits that follow the prompts."""
        model, config, prompts = self.model, self.config, self.prompts
        new = self.max_length - prompts.columns
        if self.whole_batch:
            cache, inputs = prompts.cache, prompts.ids[:, -prompts.computed :] if prompts.embeddings is None else prompts.embeddings
            if config.use_cache and cache is None:
                cache = self._new_cache(len(inputs), prompts.longest + new)
            mask = None if prompts.mask is None else prompts.mask.long()
            batch = ForwardDecoder(
                model,
                inputs[:, -prompts.computed :],
                mask,
                cache,
                hidden_states=bool(config.output_hidden_states),
                attentions=bool(config.output_attentions),
            )
            yield batch, batch.prefill()
            return
        rows_of = prompts.ids.tolist()
        if prompts.mask is not None:
            masks = prompts.mask.tolist()
            rows_of = [[token for token, real in zip(row, mask, strict=True) if real] for row, mask in zip(rows_of, masks, strict=True)]
        capacities = capacities_of(model, rows_of, new, self.kv_format)
        short = [(i, room - len(row)) for i, (row, room) in enumerate(zip(rows_of, capacities, strict=True)) if room - len(row) < new]
        if short:
            raise RequestError(
                f"the KV cache must have room for {new} new tokens of every sequence; the model's budget leaves {short[0][1]} to sequence "
                f"{short[0][0]}. Generate fewer tokens or sequences, or load the model with a longer context or a larger batch"
            )
        with decoder_for(model, capacities, self.kv_format) as decoder:
            yield decoder, prefill_all(decoder, rows_of[:: self.copies], self.copies)

    def _new_cache(self, sequences: int, tokens: int) -> KVCache:
        """An empty cache with room for `tokens` tokens of each sequence; it grows, since a later call may go on from it."""
        model, budget = self.model, self.model.limits.kv_bytes
        cache = KVCache(
            model.config,
            sequences,
            tokens,
            dtype=model.dtype,
            device=model.transformer.devices,
            grows=True,
            limit=None if budget is None else tokens,
            format=self.kv_format,
        )
        if budget is not None and cache.nbytes > budget:
            raise RequestError(
                f"keys and values must fit the {budget:,} bytes of the model's budget; those of {sequences} sequences with {tokens} tokens "
                f"take {cache.nbytes:,}. Generate fewer tokens or sequences"
            )
        return cache

    def _rows(self, logits: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """float32 [R, V] on the device of the ids; zeros for rows that are not computed any more."""
        R, some = len(self.prompts.ids), next(iter(logits.values()))
        if R == 1:
            return some[None].to(self.prompts.ids.device)
        if len(logits) < R:
            zeros = torch.zeros_like(some)
            return torch.stack([logits.get(i, zeros) for i in range(R)]).to(self.prompts.ids.device)
        return torch.stack(list(logits.values())).to(self.prompts.ids.device)

    def _process(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def _draw(self, scores: torch.Tensor) -> list[int]:
        """A token of each row [R, V], drawn by its scores."""
        tokens: list[int] = self._multinomial(scores.softmax(-1), 1)[:, 0].tolist()
        return tokens

    def _multinomial(self, probabilities: torch.Tensor, count: int) -> torch.Tensor:
        if not all_finite(probabilities):
            raise RequestError(
                "sampling needs finite scores and one token of every sequence that is not banned; found none after the logits processors "
                f"with temperature {self.config.temperature}. Ban fewer tokens, raise the temperature, or check your own processors"
            )
        device = probabilities.device if self.generator is None else self.generator.device
        return torch.multinomial(probabilities.to(device), count, generator=self.generator).to(probabilities.device)

    def _ended(self, record: _Record) -> Callable[[torch.Tensor], torch.Tensor]:
        def ended(sequences: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.stopping(sequences, sequences[:, -1].tolist(), record.scores), device=sequences.device)

        return ended


class _Record:
    """Scores and logits of each step, as far as they are asked for."""

    def __init__(self, config: GenerationConfig) -> None:
        returns = bool(config.return_dict_in_generate)
        self.scores: tuple[torch.Tensor, ...] | None = () if returns and config.output_scores else None
        self._logits: tuple[torch.Tensor, ...] | None = () if returns and config.output_logits else None
        self._states, self._attentions = config.output_hidden_states, config.output_attentions

    def add(self, logits: torch.Tensor, process: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The processed scores of a step."""
        if self._logits is not None:
            self._logits += (logits.clone(),)
        scores = process(logits)
        if self.scores is not None:
            self.scores += (scores.clone() if scores is logits else scores,)
        return scores

    def fields(self, decoder: ForwardDecoder | None) -> dict[str, Any]:
        """Fields of an output."""
        return {
            "scores": self.scores,
            "logits": self._logits,
            "attentions": tuple(decoder.attentions) if decoder is not None and self._attentions else None,
            "hidden_states": tuple(decoder.hidden_states) if decoder is not None and self._states else None,
            "cache": None if decoder is None else decoder.cache,
        }
