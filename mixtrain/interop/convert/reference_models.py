"""One model twice, layer by layer: transformers' own from Hugging Face's files, Megatron-Core's from a checkpoint.

Rule: each side is loaded and run by its own code, and neither knows the table that converts. Hugging Face's layer is
made by from_pretrained from the names in its files; Megatron-Core's is filled by the places of its own sharded tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import transformers

from mixtrain.checkpoint.tensor_reader import TensorReader
from mixtrain.config import tensor_schema
from mixtrain.config.plan import derive, resolve
from mixtrain.config.schema import Config
from mixtrain.engine import model, shards
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import UserError
from mixtrain.interop.convert import settings
from mixtrain.interop.convert.source import Source, read

SHOWN = 300  # characters of what transformers says
T = TypeVar("T")
FEW = 8  # sizes of what a model of one layer has beside it, and a model of no layer in it


class Output(NamedTuple):
    """What a layer gives: hidden states [sequence, token, hidden], and which experts each token goes to."""

    hidden: torch.Tensor
    chosen: torch.Tensor  # bool [sequence * token, expert], sequence by sequence


def plain(source: Source) -> dict[str, Any]:
    """config.json without the dtype, which is another here, and with null where transformers 5 does not take it."""
    values = {
        name: value for name, value in source.values.items() if name not in ("dtype", "torch_dtype")
    }
    if values.get("num_key_value_heads", ...) is None:
        values["num_key_value_heads"] = source.facts["model.num_query_groups"]
    return copy.deepcopy(values)


class HuggingFace:
    """transformers' model of a directory."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        source = read(directory)
        self.dtype = dtype
        self.stored = source.tensors
        self.directory = directory
        self.kind = getattr(
            transformers, settings.ARCHITECTURES[source.values["model_type"]].class_name
        )
        self.config = self._of_transformers(lambda: self.kind.config_class.from_dict(plain(source)))
        self.config._attn_implementation = "eager"
        ends = [name for name in self.stored if not name.startswith("model.layers.")]
        self.ends = self._model(0, {name: self._tensor(name) for name in ends})

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        return stored.part(0, stored.nbytes // stored.dtype.itemsize).view(stored.shape)

    def _model(
        self, layers: int, tensors: dict[str, torch.Tensor], **sizes: int
    ) -> torch.nn.Module:
        """A model of so many layers, loaded as transformers loads it."""
        config = copy.deepcopy(self.config)
        for name, value in (sizes | {"num_hidden_layers": layers}).items():
            setattr(config, name, value)
        found = self._of_transformers(
            lambda: self.kind.from_pretrained(
                None, config=config, state_dict=tensors, dtype=self.dtype
            )
        )
        return found.eval()

    def _of_transformers(self, call: Callable[[], T]) -> T:
        """What transformers makes of the files; what it raises is theirs to cause, and a UserError."""
        try:
            return call()
        except Exception as error:
            words = " ".join(str(error).split())
            raise UserError(
                f"{self.directory}: transformers {transformers.__version__} does not load it:"
                f" {type(error).__name__}: {words[:SHOWN]}"
            ) from error

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.ends.model.embed_tokens(tokens)

    @torch.no_grad()
    def layer(self, number: int, hidden: torch.Tensor) -> Output:
        """What layer `number` makes of hidden states [sequence, token, hidden]."""
        prefix = f"model.layers.{number}."
        width = self.config.hidden_size
        tensors = {
            name.replace(prefix, "model.layers.0."): self._tensor(name)
            for name in self.stored
            if name.startswith(prefix)
        }
        few = torch.zeros(FEW, width)
        tensors |= {
            "model.embed_tokens.weight": few,
            "lm_head.weight": few,
            "model.norm.weight": torch.ones(width),
        }
        one = self._model(1, tensors, vocab_size=FEW, pad_token_id=None)
        one.model.norm = torch.nn.Identity()
        found: list[torch.Tensor] = []
        one.model.layers[0].mlp.gate.register_forward_hook(
            lambda module, given, output: found.append(output)
        )
        after = one.model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits, _, chosen = found[0]
        return Output(after, torch.zeros_like(logits, dtype=torch.bool).scatter(1, chosen, True))

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.ends.lm_head(self.ends.model.norm(hidden)).float()


# of a tensor's key, layer and expert, and itself
Change = Callable[[str, tuple[int, ...], torch.Tensor], torch.Tensor]


class Megatron:
    """The Megatron-Core model of a checkpoint, on this rank."""

    def __init__(
        self, config: Config, parts: TensorReader, ranks: Ranks, change: Change | None = None
    ):
        self.parts = parts
        self.change = change
        few = {"num_layers": 1, "moe_ffn_hidden_size": 2 * FEW, "ffn_hidden_size": 2 * FEW}
        self.ends = self._model(config, ranks, **few)
        self.one = self._model(config, ranks, num_layers=1, vocab_size=FEW)
        self._fill(self.ends, lambda key: not key.startswith(tensor_schema.LAYER), 0)
        self.found: dict[str, object] = {}
        layer = shards.unwrap(self.one).decoder.layers[0]
        for name, module in (("hidden", layer), ("router", layer.mlp.router)):
            module.register_forward_hook(
                lambda module, given, output, name=name: self.found.__setitem__(name, output)
            )  # fmt: skip

    def _model(self, config: Config, ranks: Ranks, **sizes: int) -> torch.nn.Module:
        config = replace(config, model=replace(config.model, **sizes))
        (chunk,) = model.build(derive(resolve(config)), ranks.device)
        return chunk.eval()

    @torch.no_grad()
    def _fill(self, chunk: torch.nn.Module, wanted: Callable[[str], bool], layer: int) -> None:
        for shard in shards.shards(chunk):
            if not wanted(shard.key):
                continue
            numbers = (layer, *shard.numbers[1:]) if shard.numbers else ()
            data = self.parts.at(shard.key, numbers)
            if self.change:
                data = self.change(shard.key, numbers, data)
            shard.data.copy_(data[shard.cut])

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return shards.unwrap(self.ends).embedding(tokens, positions).transpose(0, 1)

    @torch.no_grad()
    def layer(self, number: int, hidden: torch.Tensor) -> Output:
        """What layer `number` makes of hidden states [sequence, token, hidden]."""
        self._fill(self.one, lambda key: key.startswith(tensor_schema.LAYER), number)
        sequences, tokens, _ = hidden.shape
        none = torch.zeros(sequences, tokens, dtype=torch.long)
        positions = torch.arange(tokens).expand(sequences, -1)
        self.one(
            none, positions, attention_mask=None, decoder_input=hidden.transpose(0, 1).contiguous()
        )
        output = self.found["hidden"]
        after = (output[0] if isinstance(output, tuple) else output).transpose(0, 1)
        routing = self.found["router"][1].bool()  # [token * sequence, expert]
        routing = routing.view(tokens, sequences, -1).transpose(0, 1).flatten(0, 1)
        return Output(after, routing)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Their last part, [sequence, token, vocabulary]."""
        ends = shards.unwrap(self.ends)
        normed = ends.decoder.final_layernorm(hidden.transpose(0, 1).contiguous())
        tied = (
            ends.shared_embedding_or_output_weight()
            if ends.share_embeddings_and_output_weights
            else None
        )
        return ends.output_layer(normed, weight=tied)[0].transpose(0, 1).float()
