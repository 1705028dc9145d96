"""Modules whose forward method is written with a gate: `register_unit`, and published ones."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.gates import Gate

GatedForward = TypeVar("GatedForward", bound=Callable[..., Any])

_registered: dict[str, Callable[..., Any]] = {}
"""Gated forward methods, by the module and name of the class."""


def register_unit(cls: type[nn.Module] | str) -> Callable[[GatedForward], GatedForward]:
    """A decorator that says how to skip the modules of a class, where `sd.apply` cannot see it.

    The decorated function is the forward method of the class, written with a gate. `sd.apply`
    proves it like any other: with the gate open and with the gate closed it is compared with the
    original, and a closed gate must call no module of the branch.

    Args:
        cls: the class, or "package.module.Class" for a class that is not to be imported for this.
            It also covers derived classes that inherit its forward method.

    Raises:
        ApplyError: when `cls` is neither, or has a function already. A function of the same module
            and name replaces it, so that a cell of a notebook can be run again.

    Examples:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(4, 4)
        ...     def forward(self, x, mask):
        ...         return x + self.linear(x * mask), mask
        >>> @sd.register_unit(Block)
        ... def forward(block, gate, x, mask):
        ...     if not gate.open:
        ...         return x, mask
        ...     return x + gate.scale(block.linear(gate.select(x * mask))), mask
    """
    name = cls if isinstance(cls, str) else full_name(cls)
    is_class = isinstance(cls, type) and issubclass(cls, nn.Module)
    if not (is_class or (isinstance(cls, str) and "." in cls)):
        raise ApplyError(
            f"sd.register_unit({cls!r}): give a class of modules, or 'package.module.Class'"
        )

    def register(forward: GatedForward) -> GatedForward:
        known = _registered.get(name)
        if known is not None and full_name(known) != full_name(forward):
            raise ApplyError(
                f"sd.register_unit({name!r}): {full_name(known)} is registered already, and "
                f"{full_name(forward)} would replace it: keep one of them"
            )
        _registered[name] = forward
        return forward

    return register


def registered(cls: type[nn.Module]) -> Callable[..., Any] | None:
    """The registered forward method of a class; None if there is none."""
    for parent in cls.__mro__:
        if full_name(parent) in _registered:
            return _registered[full_name(parent)]
        if "forward" in vars(parent):
            return None
    return None


def full_name(named: Any) -> str:
    """The module and name of a class or function; its `repr` where it has none."""
    module, name = getattr(named, "__module__", ""), getattr(named, "__qualname__", "")
    return f"{module}.{name}" if name else repr(named)


@register_unit("transformers.models.mt5.modeling_mt5.MT5LayerSelfAttention")
@register_unit("transformers.models.t5.modeling_t5.T5LayerSelfAttention")
def t5_self_attention(
    layer: Any,
    gate: Gate,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """The first layer computes the position bias for all others, so a closed one does too."""
    if not gate.open:
        return (
            hidden_states,
            _bias(layer.SelfAttention, hidden_states, hidden_states, position_bias),
            None,
        )
    out, position_bias, weights = layer.SelfAttention(
        layer.layer_norm(gate.select(hidden_states)),
        mask=gate.select(attention_mask),
        position_bias=position_bias,
        past_key_values=past_key_values,
        **kwargs,
    )
    return hidden_states + gate.scale(layer.dropout(out)), position_bias, weights


@register_unit("transformers.models.mt5.modeling_mt5.MT5LayerCrossAttention")
@register_unit("transformers.models.t5.modeling_t5.T5LayerCrossAttention")
def t5_cross_attention(
    layer: Any,
    gate: Gate,
    hidden_states: Tensor,
    key_value_states: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Any, ...]:
    """As `t5_self_attention`, with keys and values from the encoder."""
    if not gate.open:
        bias = _bias(layer.EncDecAttention, hidden_states, key_value_states, position_bias)
        return hidden_states, bias, None
    out, position_bias, weights = layer.EncDecAttention(
        layer.layer_norm(gate.select(hidden_states)),
        mask=gate.select(attention_mask),
        key_value_states=gate.select(key_value_states),
        position_bias=position_bias,
        past_key_values=past_key_values,
        **kwargs,
    )
    return hidden_states + gate.scale(layer.dropout(out)), position_bias, weights


def _bias(attention: Any, queries: Tensor, keys: Tensor, bias: Tensor | None) -> Tensor:
    """The position bias that an attention layer of T5 returns: [1, heads, queries, keys]."""
    if bias is not None:
        return bias
    lengths = queries.shape[1], keys.shape[1]
    if attention.has_relative_attention_bias:
        return attention.compute_bias(*lengths, device=queries.device)
    return queries.new_zeros(1, attention.n_heads, *lengths)


@register_unit("timm.models.mvitv2.MultiScaleBlock")
def mvitv2_block(
    block: Any, gate: Gate, x: Tensor, feat_size: list[int]
) -> tuple[Tensor, list[int]]:
    """Attention returns the size of its pooled output too, which the next block needs."""
    norm = block.norm1(x) if gate.open or block.shortcut_proj_attn is not None else x
    shortcut = x if block.shortcut_proj_attn is None else block.shortcut_proj_attn(norm)
    x = block._shortcut_pool(shortcut, feat_size)
    if gate.open:
        out, _ = block.attn(gate.select(norm), feat_size)
        x = x + gate.scale(block.drop_path1(out))
    norm = block.norm2(x) if gate.open or block.shortcut_proj_mlp is not None else x
    shortcut = x if block.shortcut_proj_mlp is None else block.shortcut_proj_mlp(norm)
    if gate.open:
        shortcut = shortcut + gate.scale(block.drop_path2(block.mlp(gate.select(norm))))
    return shortcut, _pooled(block.shortcut_pool_attn, feat_size)


def _pooled(pool: nn.MaxPool2d | None, feat_size: list[int]) -> list[int]:
    if pool is None:
        return feat_size
    size: Tensor = pool(torch.empty(1, *feat_size, device="meta"))
    return list(size.shape[1:])
