"""`model.generate`, with the arguments and outputs of transformers.

Dimension letters: `B` prompts, `N` sequences of each, `R` = B * N or B * beams, `S` columns of the prompts, `V` vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from dbrx_q.errors import RequestError, UnsupportedError
from dbrx_q.model.generation_config import GenerationConfig, argument_error, default_of, is_foreign
from dbrx_q.model.kv_cache import KVCache
from dbrx_q.model.modeling import DbrxForCausalLM

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

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# Arguments of transformers' generate that are no fields of its configuration, with the values that change nothing here.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "synced_gpus": (None, False),
    "assistant_model": (None,),
    "assistant_tokenizer": (None,),
    "negative_prompt_ids": (None,),
    "negative_prompt_attention_mask": (None,),
    "custom_generate": (None,),
    "trust_remote_code": (None, False, True),
    "position_ids": (None,),
    "cache_position": (None,),
    "labels": (None,),
    "output_router_logits": (None, False),
    "return_dict": (None, True, False),
    "token_type_ids": (None,),
    "logits_to_keep": (None, 1),
}
_INSTEAD = {
    "assistant_model": "prompt_lookup_num_tokens",
    "position_ids": "attention_mask, of which positions follow",
    "cache_position": "past_key_values, of which it follows",
    "labels": "model(..., labels=...)",
    "output_router_logits": "model(..., output_router_logits=True)",
}
_ARGUMENTS = (
    *("input_ids", "attention_mask", "inputs_embeds", "past_key_values", "cache", "generation_config", "logits_processor"),
    *("stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer", "generator", "seed", "kv_format"),
)


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
    if inputs is not None and input_ids is not None:
        raise RequestError("generate() takes inputs or input_ids; found both. Pass one of them")
    if past_key_values is not None and cache is not None:
        raise RequestError("generate() takes past_key_values or cache, two names of one argument; found both. Pass one of them")
    if generator is not None and seed is not None:
        raise RequestError("generate() takes generator or seed; found both. Pass one of them")
    config = _configuration(model, generation_config, options)
    ends = _ends_of(config)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else None
    copies = max(config.num_beams or 1, config.num_return_sequences or 1)
    given_cache = past_key_values if past_key_values is not None else cache
    prompts = read_prompts(
        model,
        config,
        input_ids=inputs if input_ids is None else input_ids,
        attention_mask=attention_mask,
        inputs_embeds=inputs_embeds,
        cache=given_cache,
        pad=pad,
        ends=ends,
        copies=copies,
    )
    max_length = _max_length(model, config, prompts, generation_config, options)
    prompts = prompts.repeated(copies)
    _check_mode(config, prompts, streamer)
    if streamer is not None:
        streamer.put(prompts.ids.cpu())
    padding = None if prompts.mask is None else prompts.mask[:, -prompts.columns :].int().argmax(1) if prompts.columns else None
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
        custom=bool(logits_processor or stopping_criteria),
        processors=processors_of(
            config,
            ends=ends,
            prompt_length=prompts.columns,
            padding=padding,
            max_length=max_length,
            custom=logits_processor or (),
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            copies=copies,
            vocabulary=model.config.vocab_size,
        ),
        stopping=Stopping(
            ends,
            max_length,
            None if config.stop_strings is None else StopStrings(config.stop_strings, tokenizer),
            config.max_time,
            stopping_criteria or (),
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
        hidden = prompts.columns - len(prompt)
        ids, pending, ended = list(prompt), list(prompt), False
        room = self.max_length - prompts.columns
        with decoder_for(self.model, capacities_of(self.model, [prompt], room, self.kv_format), self.kv_format) as decoder:
            while not ended:
                left = room - (len(ids) - len(prompt))
                copied = candidates(ids, count, config.max_matching_ngram_size or 2, self.ends or (), left)
                logits = decoder.extend(0, [*pending, *copied], len(copied) + 1)
                before, accepted = len(ids), []
                for i, row in enumerate(logits):
                    columns = torch.cat((prompts.ids[:, :hidden], torch.tensor([ids], device=prompts.ids.device)), 1)
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
            return GenerateDecoderOnlyOutput(sequences, **record.fields(None)) if config.return_dict_in_generate else sequences

    @contextmanager
    def _decoder(self) -> Iterator[tuple[Steps, dict[int, torch.Tensor]]]:
        """What appends tokens, and the logits that follow the prompts."""
        model, config, prompts = self.model, self.config, self.prompts
        new = self.max_length - prompts.columns
        if self.whole_batch:
            cache, inputs = prompts.cache, prompts.ids[:, -prompts.computed :] if prompts.embeddings is None else prompts.embeddings
            if config.use_cache and cache is None:
                budget, tokens = model.limits.kv_bytes, prompts.longest + new
                cache = KVCache(
                    model.config,
                    len(inputs),
                    tokens,
                    dtype=model.dtype,
                    device=model.transformer.devices,
                    grows=True,  # a later call may go on from it
                    limit=None if budget is None else tokens,
                    format=self.kv_format,
                )
                if budget is not None and cache.nbytes > budget:
                    raise RequestError(
                        f"keys and values must fit the {budget:,} bytes of the model's budget; those of {len(inputs)} sequences with "
                        f"{tokens} tokens take {cache.nbytes:,}. Generate fewer tokens or sequences"
                    )
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


def _configuration(model: DbrxForCausalLM, given: Any, options: Mapping[str, Any]) -> GenerationConfig:
    """The arguments of a call, with the defaults of the model and of transformers."""
    names = [item.name for item in fields(GenerationConfig) if item.name != "others"]
    for name, value in options.items():
        if name in _NEUTRAL:
            if not any(value is neutral for neutral in _NEUTRAL[name]):
                instead = f". Use {_INSTEAD[name]}" if name in _INSTEAD else ""
                raise UnsupportedError(f"generate() does not support {name}; found {type(value).__name__}{instead}")
        elif name not in names and not is_foreign(name):
            raise argument_error(name, [*names, *_ARGUMENTS])
    config = (GenerationConfig() if given is None else GenerationConfig.of(given)).with_defaults(model.generation_config)
    foreign = config.update(**{name: value for name, value in options.items() if name not in _NEUTRAL})
    config.others = {**config.others, **foreign}
    config.complete()
    config.check_supported()
    _warn_unused(config, options)
    return config


def _warn_unused(config: GenerationConfig, options: Mapping[str, Any]) -> None:
    """Warn of arguments that the mode of the call leaves without effect, as transformers does."""
    unused = [] if config.do_sample else [(name, "do_sample=True") for name in _SAMPLING_ONLY]
    unused += [] if config.num_beams != 1 else [(name, "num_beams above 1") for name in ("length_penalty", "early_stopping")]
    if not config.return_dict_in_generate:
        outputs = ("output_scores", "output_logits", "output_hidden_states", "output_attentions")
        unused += [(name, "return_dict_in_generate=True") for name in outputs]
    for name, needed in unused:
        if options.get(name) is not None and options[name] != default_of(name):
            warnings.warn(f"{name}={options[name]!r} has no effect without {needed}", stacklevel=6)


def _ends_of(config: GenerationConfig) -> list[int] | None:
    ends: Any = config.eos_token_id
    if ends is None:
        return None
    if isinstance(ends, torch.Tensor):
        ends = ends.flatten().tolist()
    return [ends] if isinstance(ends, int) else list(ends) or None


def _max_length(model: DbrxForCausalLM, config: GenerationConfig, prompts: PromptBatch, given: Any, options: Mapping[str, Any]) -> int:
    """Columns of a finished sequence."""
    S, context = prompts.columns, model.config.context_length
    before = 0 if prompts.embeddings is None or S else prompts.computed  # embeddings that no column stands for
    stated = [options.get("max_length"), model.generation_config.max_length]
    stated.append(None if given is None else GenerationConfig.of(given).max_length)
    if config.max_new_tokens is not None:
        if config.max_new_tokens < 1:
            raise RequestError(f"max_new_tokens must be at least 1; found {config.max_new_tokens}")
        if options.get("max_length") is not None:
            warnings.warn(f"max_new_tokens={config.max_new_tokens} takes precedence over max_length={config.max_length}", stacklevel=5)
        longest = S + config.max_new_tokens
    elif all(value is None for value in stated):
        warnings.warn("without max_new_tokens or max_length 20 tokens are generated, as in transformers", stacklevel=5)
        longest = min(S + 20, S + context - prompts.longest)
    else:
        longest = (config.max_length or 20) - before
        if longest <= S:
            raise RequestError(
                f"max_length must exceed the {S + before} tokens of the prompts; found {config.max_length}. Raise it or pass max_new_tokens"
            )
    shortest = max((config.min_length or 0) - before, 0)
    if config.min_new_tokens is not None:
        shortest = S + config.min_new_tokens
    config.min_length = shortest
    if shortest > longest:
        raise RequestError(
            f"the shortest length must not exceed the longest; found {shortest} and {longest} tokens with the prompt. Lower "
            f"{'min_length' if config.min_new_tokens is None else 'min_new_tokens'}, or raise max_new_tokens"
        )
    if longest - S > context - prompts.longest:
        room = context - prompts.longest
        warnings.warn(f"the model's context of {context} tokens ends generation after {room} of {longest - S} new tokens", stacklevel=5)
        longest = S + room
    return longest


def _check_mode(config: GenerationConfig, prompts: PromptBatch, streamer: Any) -> None:
    """Refuse combinations that cannot be."""
    beams, count = config.num_beams or 1, config.num_return_sequences or 1
    if beams < 1 or count < 1:
        raise RequestError(f"num_beams and num_return_sequences must be at least 1; found {beams} and {count}")
    if beams > 1 and streamer is not None:
        raise RequestError(f"a streamer needs num_beams=1, since beams are chosen at the end; found num_beams={beams}")
    if beams > 1 and count > beams:
        raise RequestError(f"num_return_sequences must be at most num_beams, {beams}; found {count}")
    if beams == 1 and count > 1 and not config.do_sample:
        raise RequestError(f"greedy decoding gives one sequence; found num_return_sequences={count}. Pass do_sample=True or num_beams")
    if config.early_stopping not in (True, False, "never"):
        raise RequestError(f"early_stopping must be True, False or 'never'; found {config.early_stopping!r}")
    if config.prompt_lookup_num_tokens is not None:
        if config.prompt_lookup_num_tokens < 1:
            raise RequestError(f"prompt_lookup_num_tokens must be at least 1; found {config.prompt_lookup_num_tokens}")
        if len(prompts.ids) != 1 or beams > 1:
            raise RequestError(f"prompt_lookup_num_tokens takes one prompt and num_beams=1; found {len(prompts.ids)} sequences")
        for name, given in (("past_key_values", prompts.cache is not None), ("inputs_embeds", prompts.embeddings is not None)):
            if given:
                raise UnsupportedError(f"prompt_lookup_num_tokens does not work with {name}. Leave one of them out")
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(config, name) and config.return_dict_in_generate:
                raise UnsupportedError(f"prompt_lookup_num_tokens does not work with {name}. Leave one of them out")
        if not config.use_cache:
            raise RequestError("prompt_lookup_num_tokens needs use_cache=True; found False")
