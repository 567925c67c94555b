"""A whole MoA: every MoA layer and the subject prompt (what the U-Net needs), and the image encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..address import ATTENTIONS, Address, BlockShape, Layer, attention_weights, block_shapes
from ..routing.trace import TIMESTEPS
from .image_encoder import CLIP_VIT_L, ImageEncoder
from .moa_layer import MixingLayer, MoALayer
from .subject_prompt import SubjectPrompt


@dataclass(frozen=True)
class MoAConfig:
    """What a MoA must fit and how it is built; stored in its file."""

    base: str
    """Base family it was trained on, as shown to the user: `SD 1.5`."""
    blocks: dict[Address, BlockShape]
    """Transformer blocks of the U-Net, in the order of the forward pass."""
    heads: int = 8
    """Attention heads of the U-Net; SD 1.x has the same number in every layer."""
    router_hidden: int = 64
    """Hidden width of every router."""
    image_encoder: dict[str, Any] = field(default_factory=lambda: dict(CLIP_VIT_L))
    """Arguments of transformers' CLIPVisionConfig."""
    timesteps: int = TIMESTEPS
    """It was trained on the timesteps below this, and acts on no others (the paper's: 800). Older files do not say."""
    layers: tuple[Layer, ...] = ()
    """Attention layers that hold an expert, in the order of the forward pass; none named: all do, as in the paper."""

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("blocks is empty: a U-Net without attention has no place for a MoA")
        every = tuple((address, attention) for address in self.blocks for attention in ATTENTIONS)
        unknown = [f"{address}.{attention}" for address, attention in self.layers if (address, attention) not in every]
        if unknown:
            raise ValueError(f"layers names {', '.join(unknown)}, which this U-Net has not")
        object.__setattr__(self, "layers", tuple(layer for layer in every if layer in self.layers) or every)
        if not self.prompted:
            raise ValueError("layers names no cross-attention (attn2): nothing would read the subjects")
        for name in ("heads", "router_hidden", "timesteps"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number above 0")
        if any(shape.dim % self.heads for shape in self.blocks.values()):
            raise ValueError(f"heads is {self.heads}, which does not divide the widths of the blocks")
        if self.timesteps > TIMESTEPS:
            raise ValueError(f"timesteps is {self.timesteps}, the diffusion has {TIMESTEPS}")
        missing = {"image_size", "projection_dim"} - self.image_encoder.keys()
        if missing:
            raise ValueError(f"image_encoder lacks {', '.join(sorted(missing))}")

    @classmethod
    def for_unet(cls, state_dict: Mapping[str, Any], base: str = "SD 1.5", **others: Any) -> MoAConfig:
        """The configuration that fits the U-Net with these weights (LDM or diffusers names)."""
        return cls(base, block_shapes(state_dict), **others)

    @property
    def prompted(self) -> list[Address]:
        """Blocks whose expert reads the subject prompt."""
        return [address for address, attention in self.layers if attention == "attn2"]

    @property
    def is_whole(self) -> bool:
        """Whether every attention layer holds an expert."""
        return len(self.layers) == len(ATTENTIONS) * len(self.blocks)

    @property
    def text_dim(self) -> int:
        return next(iter(self.blocks.values())).context_dim

    @property
    def feature_dim(self) -> int:
        return self.image_encoder["projection_dim"]

    def to_json(self) -> dict[str, Any]:
        fields = vars(self) | {"blocks": {str(a): [s.dim, s.context_dim] for a, s in self.blocks.items()}}
        layers = fields.pop("layers")
        return fields if self.is_whole else fields | {"layers": [f"{a}.{attention}" for a, attention in layers]}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> MoAConfig:
        """Raises KeyError, TypeError or ValueError where the fields are not those of a MoAConfig."""
        blocks = {Address.parse(a): BlockShape(*shape) for a, shape in fields["blocks"].items()}
        named = [name.rpartition(".") for name in fields.get("layers", ())]
        layers = tuple((Address.parse(address), attention) for address, _, attention in named)
        return cls(**{**fields, "blocks": blocks, "layers": layers})


class Mixture(nn.Module):
    """All MoA layers and the subject prompt. `operations` and `factory` (dtype, device) come from the host."""

    def __init__(self, config: MoAConfig, operations: Any = nn, layer: type[MixingLayer] = MoALayer, **factory: Any):
        super().__init__()
        self.config = config
        self.attentions = frozenset(attention for _, attention in config.layers)
        """The kinds of attention that hold any expert."""
        self.layers = nn.ModuleDict()
        self._at: dict[Layer, MixingLayer] = {}
        for address, attention in config.layers:
            shape = config.blocks[address]
            context_dim = None if attention == "attn1" else shape.context_dim
            made = layer(shape.dim, context_dim, config.heads, config.router_hidden, operations, **factory)
            self._at[address, attention] = self.layers[self.layer_name(address, attention)] = made
        self.subject_prompt = SubjectPrompt(
            config.feature_dim, config.text_dim, len(config.prompted), operations, **factory
        )

    @staticmethod
    def layer_name(address: Address, attention: str) -> str:
        """`input_1_0_attn2`: a module's name must not hold dots."""
        return f"{address}.{attention}".replace(".", "_")

    def layer(self, address: Address, attention: str) -> MixingLayer | None:
        """None where the prior is alone."""
        return self._at.get((address, attention))


class MoA(nn.Module):
    """`mixture` goes beside the U-Net, `image_encoder` makes subjects; one file holds both."""

    def __init__(self, config: MoAConfig, operations: Any = nn, **factory: Any):
        super().__init__()
        self.config = config
        self.mixture = Mixture(config, operations, **factory)
        self.image_encoder = ImageEncoder(config.image_encoder)

    @classmethod
    def from_prior(cls, state_dict: Mapping[str, Tensor], config: MoAConfig | None = None) -> MoA:
        """A fresh MoA that changes nothing yet, for the U-Net with these weights (LDM or diffusers names).

        Every expert is a copy of its prior, every router neutral, the subject prompt the identity; the
        image encoder has random weights. Raises ValueError when the weights do not fit the config.
        """
        config = config or MoAConfig.for_unet(state_dict)
        found = block_shapes(state_dict)
        if found != config.blocks:
            raise ValueError(
                f"the config is for a U-Net of {len(config.blocks)} transformer blocks, the weights are of one with "
                f"{len(found)} or of other widths: use MoAConfig.for_unet(state_dict)"
            )
        moa = cls(config)
        priors = attention_weights(state_dict)
        for address, attention in config.layers:
            layer, prefix = moa.mixture.layer(address, attention), f"{attention}."
            prior = {k.removeprefix(prefix): w for k, w in priors[address].items() if k.startswith(prefix)}
            layer.expert.load_state_dict(prior)
            layer.router.make_neutral()
        moa.mixture.subject_prompt.make_identity()
        return moa

    def with_experts_in(self, layers: Collection[Layer]) -> MoA:
        """The same with experts in these of its layers alone; weights are shared with it.

        Raises ValueError for layers without cross-attention, or that hold no expert here.
        """
        absent = [
            f"{address}.{attention}" for address, attention in layers if (address, attention) not in self.config.layers
        ]
        if absent or not layers:
            raise ValueError(f"experts can be kept where there are some; {', '.join(absent) or 'no layer was named'}")
        with torch.device("meta"):
            kept = MoA(replace(self.config, layers=tuple(layers)))
        weights = {name: weight for name, weight in self.state_dict().items() if name in kept.state_dict()}
        columns = [self.config.prompted.index(address) for address in kept.config.prompted]
        name = "mixture.subject_prompt.position.weight"
        weights[name] = SubjectPrompt.for_layers(weights[name], columns)
        kept.load_state_dict(weights, assign=True)
        kept.image_encoder.fill_position_ids()
        return kept.train(self.training)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Prepared references [P, 3, size, size] of one subject -> its feature [F], their mean."""
        return self.image_encoder(pixels).mean(dim=0)
