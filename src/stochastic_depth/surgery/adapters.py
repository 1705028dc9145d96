"""Units that say how they are skipped: `register_unit`, and published blocks that need it."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stochastic_depth.errors import ApplyError
from stochastic_depth.gates import Gate

GatedForward = TypeVar("GatedForward", bound=Callable[..., Any])

_registered: dict[str, Callable[..., Any]] = {}
"""Gated forward methods, by the module and name of the class."""


def register_unit(kind: type[nn.Module] | str) -> Callable[[GatedForward], GatedForward]:
    """Say how the modules of a class are skipped, where `sd.apply` cannot see it: a decorator.

    The function is the class's forward method, written with a gate. `sd.apply` holds it against the
    original as it does all others: open, closed, and nothing of the branch run.

    Args:
        kind: the class, or "package.module.Class" of one that is not to be imported for this. The
            classes derived from it that do not have a forward method of their own are meant too.

    Raises:
        ApplyError: when the class has one already.

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
    name = kind if isinstance(kind, str) else _name(kind)

    def register(forward: GatedForward) -> GatedForward:
        if name in _registered:
            raise ApplyError(
                f"sd.register_unit({name!r}): registered already, by {_registered[name]}"
            )
        _registered[name] = forward
        return forward

    return register


def registered(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """The gated forward method of a class, if it has one."""
    for parent in kind.__mro__:
        if _name(parent) in _registered:
            return _registered[_name(parent)]
        if "forward" in vars(parent):
            return None
    return None


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


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
    """As self-attention."""
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
    """What an attention layer of T5 gives as position bias: [1, heads, queries, keys]."""
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
    """Attention gives the size of its pooled output, which the next block must know."""
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
