"""Families that mix attention with recurrences: most layers keep a state of constant size."""

from __future__ import annotations

from dataclasses import replace

from servetwin.errors import InputError
from servetwin.model.config import Config
from servetwin.model.families.experts import qwen_mlp
from servetwin.model.families.reading import attention, build, dense_mlp, depth, one_a_layer
from servetwin.model.layers import Architecture, DenseMlp, GatedDeltaNet, Layer, Mamba2, MoE


def qwen3_next(c: Config) -> Architecture:
    """Qwen3-Next and Qwen3.5: three gated-DeltaNet layers for each layer of gated attention."""
    full = attention(c, qk_norm=True, gate=True, head_dim=256)
    linear = GatedDeltaNet(
        c.int("linear_num_key_heads"),
        c.int("linear_num_value_heads"),
        c.int("linear_key_head_dim"),
        c.int("linear_value_head_dim"),
        c.int("linear_conv_kernel_dim"),
    )
    kinds = c.list("layer_types")
    if kinds:
        one_a_layer(c, "layer_types", kinds)
    else:
        every = c.int("full_attention_interval", default=4)
        kinds = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(depth(c))]
    dense = c.int("num_experts", default=0) == 0
    return build(
        c,
        (
            Layer(linear if kind == "linear_attention" else full, dense_mlp(c) if dense else qwen_mlp(c, i))
            for i, kind in enumerate(kinds)
        ),
    )


def nemotron_h(c: Config) -> Architecture:
    """Each layer is one thing, named by a letter: M Mamba2, * attention, - dense MLP, E mixture of experts."""
    parts: dict[str, Layer] = {
        "M": Layer(
            Mamba2(
                c.int("mamba_num_heads"),
                c.int("mamba_head_dim"),
                c.int("n_groups"),
                c.int("ssm_state_size"),
                c.int("conv_kernel"),
                conv_bias=c.flag("use_conv_bias", default=True),
                bias=c.flag("mamba_proj_bias"),
            ),
            None,
            norms=1,
        ),
        "*": Layer(attention(c), None, norms=1),
        "-": Layer(None, DenseMlp(c.int("intermediate_size"), gated=False, bias=c.flag("mlp_bias")), norms=1),
    }
    if c.int("n_routed_experts", default=0):
        parts["E"] = Layer(
            None,
            MoE(
                c.int("n_routed_experts"),
                c.int("num_experts_per_tok"),
                c.int("moe_intermediate_size"),
                shared_inter=c.int("moe_shared_expert_intermediate_size", default=0),
                gated=False,
                router_bias=True,
                latent=c.int("moe_latent_size", default=0),
                groups=c.int("n_group", default=1),
                top_groups=c.int("topk_group", default=1),
            ),
            norms=1,
        )
    words = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    pattern = c.text("hybrid_override_pattern") or "".join(words.get(str(w), "?") for w in c.list("layers_block_type"))
    layers = c.int("num_hidden_layers", default=len(pattern))
    unknown = sorted(set(pattern) - set(parts))
    if unknown or len(pattern) != layers or not pattern:
        raise InputError(
            "must hold one letter a layer",
            where=c.where,
            field="hybrid_override_pattern",
            found=pattern or None,
            allowed=f"{layers} of {' '.join(sorted(parts))}",
        )
    arch = build(c, (parts[letter] for letter in pattern))
    return arch if arch.state_dtype else replace(arch, state_dtype="fp32")  # the default of its configuration class
