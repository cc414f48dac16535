"""Arrow: in every layer a router picks adapters token by token (arXiv 2405.11157), as PEFT has it.

What it does cannot be said as compositions, so it answers on a base model of its own, beside the engine's: that takes the
memory of the base model and all adapters once more, and no more than `ROOM` for what a layer computes. Every layer computes
all adapters for every token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from peft import ArrowConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.arrow import create_arrow_model

from lorafleet.adapters import StoredAdapter, adapter_shape
from lorafleet.composition.peft_format import read_config
from lorafleet.config import Settings
from lorafleet.engine import OptionScore
from lorafleet.engine.text import TextStream
from lorafleet.errors import AdapterError
from lorafleet.models import load_base_model, load_tokenizer
from lorafleet.prompts import declared_stops, encode_answer, encode_prompt, end_tokens

ADAPTERS_A_TOKEN = 3
ROUTER = "arrow_router"
ROOM = 2**29
"""Bytes of what a layer's adapters give, before they are added up."""
PASS_TOKENS = 4096


@dataclass(frozen=True)
class _Asked:
    """A prompt, or a prompt and one of its options; `answer` counts the option's tokens."""

    place: int
    tokens: list[int]
    answer: int = 0


class ArrowModel:
    """The base model with adapters of which each token takes three.

    Args:
        adapters: all of one rank, on the same layers.

    Raises:
        AdapterError: they are not.
    """

    def __init__(self, settings: Settings, adapters: Sequence[StoredAdapter]) -> None:
        _check_alike(adapters)
        base = load_base_model(settings.models)
        self._tokenizer = load_tokenizer(settings.models)
        self._ends = sorted(end_tokens(self._tokenizer, base))
        self._stops = declared_stops(base)
        self._most_prompt_tokens = min(settings.generation.max_prompt_tokens, settings.generation.longest - 1)
        self._device = base.device
        # As the engine, in the number format of the base model. The seed is that of the singular vectors' iteration.
        self._model: Any = create_arrow_model(
            base,
            [str(adapter.folder) for adapter in adapters],
            ArrowConfig(top_k=min(ADAPTERS_A_TOKEN, len(adapters)), rng_seed=0),
            autocast_adapter_dtype=False,
            torch_device=str(self._device),
        ).eval()
        self._places = {adapter.task: place for place, adapter in enumerate(adapters)}
        layers: list[Any] = [module for module in self._model.modules() if isinstance(module, LoraLayer)]
        self._routers: list[tuple[Any, torch.Tensor]] = []
        for layer in layers:
            router = layer.lora_arrow[ROUTER]
            router.build_prototypes(layer.lora_A, layer.lora_B)
            self._routers.append((router, router.prototypes))
        widest = max(layer.out_features for layer in layers)
        self._pass_tokens = min(PASS_TOKENS, ROOM // (len(adapters) * widest * base.dtype.itemsize))

    def take(self, tasks: Sequence[str]) -> None:
        """Route over the adapters of these tasks alone, from now on."""
        places = [self._places[task] for task in tasks]
        for router, prototypes in self._routers:
            router.prototypes = prototypes[places]
            router.task_adapter_names = [f"task_{place}" for place in places]
            router.top_k = min(ADAPTERS_A_TOKEN, len(places))

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[tuple[OptionScore, ...]]:
        """The log-likelihood of each option of each prompt."""
        asked: list[_Asked] = []
        said: list[tuple[int, str]] = []
        for place, (prompt, choices) in enumerate(zip(prompts, options, strict=True)):
            tokens = encode_prompt(self._tokenizer, prompt, self._most_prompt_tokens)
            for choice in choices:
                answer = encode_answer(self._tokenizer, choice)
                asked.append(_Asked(len(said), tokens + answer, len(answer)))
                said.append((place, choice))
        totals = [0.0] * len(said)
        for batch in self._batches(asked):
            for one, total in zip(batch, self._likelihoods(batch), strict=True):
                totals[one.place] = total
        found: list[list[OptionScore]] = [[] for _ in prompts]
        for (place, choice), one, total in zip(said, asked, totals, strict=True):
            found[place].append(OptionScore(choice, total, one.answer, len(choice.encode())))
        return [tuple(scores) for scores in found]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """The likeliest continuation of each prompt, to the end of its line."""
        asked = [
            _Asked(place, encode_prompt(self._tokenizer, prompt, self._most_prompt_tokens))
            for place, prompt in enumerate(prompts)
        ]
        texts = [""] * len(prompts)
        for batch in self._batches(asked):
            tokens, mask = self._padded(batch)
            grown = self._model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=self._ends,
                pad_token_id=self._ends[0],
                tokenizer=self._tokenizer,
            )
            for one, new in zip(batch, grown[:, tokens.shape[1] :].tolist(), strict=True):
                texts[one.place] = self._text(new)
        return texts

    def _text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, up to where it ends."""
        stream = TextStream(self._tokenizer, ("\n", *self._stops))
        for token in takewhile(lambda token: token not in self._ends, tokens):
            stream.add(token)
            if stream.stopped:
                break
        stream.end()
        return stream.text

    def _likelihoods(self, batch: Sequence[_Asked]) -> list[float]:
        tokens, mask = self._padded(batch)
        longest = max(one.answer for one in batch)
        places = (mask.cumsum(dim=1) - 1).clamp(min=0)
        # What foretells the answers: they end where the rows end, for these are padded in front.
        logits = self._model(
            input_ids=tokens, attention_mask=mask, position_ids=places, use_cache=False, logits_to_keep=longest + 1
        ).logits[:, :-1]
        wanted = tokens[:, -longest:]
        each = torch.log_softmax(logits.float(), dim=-1).gather(2, wanted[..., None])[..., 0]
        totals: list[float] = [float(row[longest - one.answer :].sum()) for one, row in zip(batch, each.cpu(), strict=True)]
        return totals

    def _padded(self, batch: Sequence[_Asked]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and mask, int64 [rows, longest], padded in front."""
        longest = max(len(one.tokens) for one in batch)
        tokens = torch.tensor([[self._ends[0]] * (longest - len(one.tokens)) + one.tokens for one in batch])
        mask = torch.tensor([[0] * (longest - len(one.tokens)) + [1] * len(one.tokens) for one in batch])
        return tokens.to(self._device), mask.to(self._device)

    def _batches(self, asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Rows of like length together, so that a pass has at most so many tokens, padding counted; one row at least."""
        batch: list[_Asked] = []
        for one in sorted(asked, key=lambda one: len(one.tokens), reverse=True):
            if batch and len(batch[0].tokens) * (len(batch) + 1) > self._pass_tokens:
                yield batch
                batch = []
            batch.append(one)
        if batch:
            yield batch


def _check_alike(adapters: Sequence[StoredAdapter]) -> None:
    for adapter in adapters:
        # PEFT, which loads them, runs these as regular expressions, whatever time that takes.
        config = read_config(adapter.folder, adapter.task)
        if config.alpha_pattern or config.rank_pattern or isinstance(config.target_modules, str):
            raise AdapterError(
                f"arrow takes no patterns, adapter {adapter.task} has some (alpha_pattern, rank_pattern, target_modules)",
                "List the modules by their names, or leave arrow out",
            )
    shapes = {adapter.task: adapter_shape(adapter) for adapter in adapters}
    known = {(shape.rank, shape.modules): task for task, shape in shapes.items()}
    if len(known) > 1:
        (rank, modules), (other_rank, other_modules), *_ = known
        one, other, *_ = known.values()
        raise AdapterError(
            f"arrow needs adapters of one rank on the same layers: {one} has rank {rank} on {', '.join(modules)}, "
            f"{other} rank {other_rank} on {', '.join(other_modules)}",
            "Train them alike, or leave arrow out",
        )
