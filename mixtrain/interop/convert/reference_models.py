"""Run one model layer by layer: with transformers and, from a checkpoint, with Megatron-Core.

Rule: each side is loaded and run by its own code and does not use tensor_mapping.py.
from_pretrained builds Hugging Face's layer from the names in its files; the sharded tensors of
Megatron-Core's model say which slice of the checkpoint each of them takes.
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
from mixtrain.config.families import FAMILIES
from mixtrain.config.plan import derive, resolve
from mixtrain.config.schema import Config
from mixtrain.engine import model, shards
from mixtrain.engine.process_groups import Ranks
from mixtrain.errors import UserError
from mixtrain.interop.convert.hf_checkpoint import HfCheckpoint, flat, read

SHOWN = 300  # characters of an error of transformers
T = TypeVar("T")
DTYPE_KEYS = ("dtype", "torch_dtype")
FEW = 8  # size of the parts of a model that are not used, to save memory


class LayerOutput(NamedTuple):
    """What a layer returns."""

    hidden: torch.Tensor  # [sequence, token, hidden]
    routing: torch.Tensor  # bool [sequence * token, expert]: the experts that a token goes to


def config_for_transformers(source: HfCheckpoint) -> dict[str, Any]:
    """Return config.json without its dtype, and without a null that transformers 5 refuses."""
    values = {key: value for key, value in source.config_json.items() if key not in DTYPE_KEYS}
    if values.get("num_key_value_heads", ...) is None:
        values["num_key_value_heads"] = source.overrides["model.num_query_groups"]
    return copy.deepcopy(values)


class HuggingFaceLayers:
    """The transformers model of a directory, one layer in memory at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype):
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        source = read(directory)
        self.directory = directory
        self.dtype = dtype
        self.stored = source.tensors
        family = FAMILIES[source.config_json["model_type"]]
        self.model_class = getattr(transformers, family.class_name)
        self.config = self._call_transformers(
            lambda: self.model_class.config_class.from_dict(config_for_transformers(source))
        )
        self.config._attn_implementation = "eager"
        # embedding, final norm, output layer
        outer = [name for name in self.stored if not name.startswith("model.layers.")]
        self.outer_model = self._load(0, {name: self._tensor(name) for name in outer})

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self.stored[name]
        return flat(stored).view(stored.shape)

    def _load(
        self, num_layers: int, tensors: dict[str, torch.Tensor], **config_values: int
    ) -> torch.nn.Module:
        """Return a model of `num_layers` layers, loaded by from_pretrained."""
        config = copy.deepcopy(self.config)
        for name, value in (config_values | {"num_hidden_layers": num_layers}).items():
            setattr(config, name, value)
        model = self._call_transformers(
            lambda: self.model_class.from_pretrained(
                None, config=config, state_dict=tensors, dtype=self.dtype
            )
        )
        return model.eval()

    def _call_transformers(self, call: Callable[[], T]) -> T:
        """Call transformers; any exception is caused by the files and becomes a UserError."""
        try:
            return call()
        except Exception as error:
            message = " ".join(str(error).split())
            raise UserError(
                f"{self.directory}: transformers {transformers.__version__} does not load it:"
                f" {type(error).__name__}: {message[:SHOWN]}"
            ) from error

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.outer_model.model.embed_tokens(tokens)

    @torch.no_grad()
    def run_layer(self, number: int, hidden: torch.Tensor) -> LayerOutput:
        """Run layer `number` on hidden states [sequence, token, hidden]."""
        prefix = f"model.layers.{number}."
        hidden_size = self.config.hidden_size
        tensors = {
            name.replace(prefix, "model.layers.0."): self._tensor(name)
            for name in self.stored
            if name.startswith(prefix)
        }
        unused = torch.zeros(FEW, hidden_size)
        tensors |= {
            "model.embed_tokens.weight": unused,
            "lm_head.weight": unused,
            "model.norm.weight": torch.ones(hidden_size),
        }
        model = self._load(1, tensors, vocab_size=FEW, pad_token_id=None).model
        model.norm = torch.nn.Identity()
        router_outputs: list[tuple[torch.Tensor, ...]] = []
        model.layers[0].mlp.gate.register_forward_hook(
            lambda module, inputs, output: router_outputs.append(output)
        )
        after = model(inputs_embeds=hidden, use_cache=False).last_hidden_state
        logits, _, experts = router_outputs[0]
        routing = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts, True)
        return LayerOutput(after, routing)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 [sequence, token, vocabulary]."""
        return self.outer_model.lm_head(self.outer_model.model.norm(hidden)).float()


# (key, (layer, expert), tensor) -> tensor
Transform = Callable[[str, tuple[int, ...], torch.Tensor], torch.Tensor]


class MegatronLayers:
    """The Megatron-Core model of a checkpoint on this rank, one layer in memory at a time.

    `transform` changes each tensor that is read: it makes a damaged model on purpose.
    """

    def __init__(
        self, config: Config, parts: TensorReader, ranks: Ranks, transform: Transform | None = None
    ):
        self.parts = parts
        self.transform = transform
        small = {"num_layers": 1, "moe_ffn_hidden_size": 2 * FEW, "ffn_hidden_size": 2 * FEW}
        # embedding, final norm, output layer
        self.outer_model = self._build(config, ranks, **small)
        self.layer_model = self._build(config, ranks, num_layers=1, vocab_size=FEW)
        self._fill(self.outer_model, lambda key: not key.startswith(tensor_schema.LAYER), 0)
        self.outputs: dict[str, object] = {}
        layer = shards.unwrap(self.layer_model).decoder.layers[0]
        self._record("layer", layer)
        self._record("router", layer.mlp.router)

    def _record(self, name: str, module: torch.nn.Module) -> None:
        """Keep the module's output of the last forward pass."""
        module.register_forward_hook(
            lambda module, inputs, output: self.outputs.__setitem__(name, output)
        )

    def _build(self, config: Config, ranks: Ranks, **model_values: int) -> torch.nn.Module:
        config = replace(config, model=replace(config.model, **model_values))
        (chunk,) = model.build(derive(resolve(config)), ranks.device)
        return chunk.eval()

    @torch.no_grad()
    def _fill(self, chunk: torch.nn.Module, wanted: Callable[[str], bool], layer: int) -> None:
        """Copy layer `layer` of the checkpoint's tensors whose key is wanted into the model."""
        for shard in shards.shards(chunk):
            if not wanted(shard.key):
                continue
            numbers = (layer, *shard.numbers[1:]) if shard.numbers else ()
            data = self.parts.at(shard.key, numbers)
            if self.transform:
                data = self.transform(shard.key, numbers, data)
            shard.data.copy_(data[shard.slices])

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return shards.unwrap(self.outer_model).embedding(tokens, positions).transpose(0, 1)

    @torch.no_grad()
    def run_layer(self, number: int, hidden: torch.Tensor) -> LayerOutput:
        """Run layer `number` on hidden states [sequence, token, hidden]."""
        self._fill(self.layer_model, lambda key: key.startswith(tensor_schema.LAYER), number)
        sequences, tokens, _ = hidden.shape
        unused_ids = torch.zeros(sequences, tokens, dtype=torch.long)
        positions = torch.arange(tokens).expand(sequences, -1)
        # Megatron-Core's activations are [token, sequence, hidden]
        decoder_input = hidden.transpose(0, 1).contiguous()
        self.layer_model(unused_ids, positions, attention_mask=None, decoder_input=decoder_input)
        output = self.outputs["layer"]
        after = (output[0] if isinstance(output, tuple) else output).transpose(0, 1)
        routing = self.outputs["router"][1].bool()  # [token * sequence, expert]
        routing = routing.view(tokens, sequences, -1).transpose(0, 1).flatten(0, 1)
        return LayerOutput(after, routing)

    @torch.no_grad()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return fp32 [sequence, token, vocabulary]."""
        outer = shards.unwrap(self.outer_model)
        normed = outer.decoder.final_layernorm(hidden.transpose(0, 1).contiguous())
        tied_weight = None
        if outer.share_embeddings_and_output_weights:
            tied_weight = outer.shared_embedding_or_output_weight()
        return outer.output_layer(normed, weight=tied_weight)[0].transpose(0, 1).float()
