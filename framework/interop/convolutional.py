"""Checkpoints of convolutional autoencoders: LDM's (VA-VAE, SD-VAE), taming transformers' and MaskGIT's VQGAN.

LDM's layout is that of the authors' own code. SD-VAE in the layout of diffusers has other names, and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from framework.interop.official import Imported, count, renamed

RESOLUTION = 256
"""Of the released models. Which levels attend is in the names, so another number would describe the same network."""

RULES = [
    (r"\.(block|attn)\.(\d+)\.", r".\1_\2."),
    (r"(attn_\d+)\.proj_out\.", r"\1.out."),
    (r"(attn_\d+)\.q\.", r"\1.query."),
    (r"(attn_\d+)\.k\.", r"\1.key."),
    (r"(attn_\d+)\.v\.", r"\1.value."),
    (r"\.mid\.(\d+)\.", r".mid.block_\1."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.(down|up)sample\.conv\.", r".\1sample."),
    (r"\.upsample_conv\.", ".upsample."),
    (r"^quant_conv\.", "encoder.quant_conv."),
    (r"^post_quant_conv\.", "decoder.post_quant_conv."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
]


def import_ldm(state: Mapping[str, Tensor]) -> Imported:
    """LDM's autoencoder. VA-VAE's file of latents' statistics, ``mean`` and ``std``, may be given with it."""
    rules = [*RULES, (r"^(mean|std)$", r"statistics.\1")]
    weights, dropped = renamed(state, rules, ["loss.", "foundation_model.", "linear_proj."])
    weights |= {name: value.flatten() for name, value in weights.items() if name.startswith("statistics.")}
    node = {"name": "AutoencoderKL", **_shape(state), **_attention(state)}
    node["latent_channels"] = state["decoder.conv_in.weight"].shape[1]
    return Imported("tokenizer.input_space", node, weights, dropped)


def import_taming_vqgan(state: Mapping[str, Tensor]) -> Imported:
    """Taming transformers' VQGAN."""
    weights, dropped = renamed(state, RULES, ["loss."])
    node = {"name": "TamingVQGAN", **_shape(state), **_attention(state), **_codebook(state)}
    return Imported("tokenizer.input_space", node, weights, dropped)


def import_maskgit_vqgan(state: Mapping[str, Tensor]) -> Imported:
    """MaskGIT's VQGAN, as TiTok has converted it."""
    weights, dropped = renamed(state, RULES)
    node = {"name": "MaskGITVQGAN", **_shape(state), **_codebook(state)}
    return Imported("tokenizer.output_space", node, weights, dropped)


def maskgit_decoder_node(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The node of a MaskGIT VQGAN of which there is only the decoder; nothing else depends on the first width."""
    shape = _shape(state, "decoder.up", "decoder.up.0.block.0.conv1.weight")
    return {"name": "MaskGITVQGAN", **shape, **_codebook(state), "encodes": False}


def _shape(
    state: Mapping[str, Tensor], stages: str = "encoder.down", first: str = "encoder.conv_in.weight"
) -> dict[str, Any]:
    width = len(state[first])
    levels = range(count(state, rf"{stages}\.(\d+)\."))
    widths = [len(state[f"{stages}.{level}.block.0.conv1.weight"]) for level in levels]
    blocks = count(state, rf"{stages}\.0\.block\.(\d+)\.")
    return {"width": width, "multipliers": [channels // width for channels in widths], "num_res_blocks": blocks}


def _attention(state: Mapping[str, Tensor]) -> dict[str, Any]:
    levels = range(count(state, r"encoder\.down\.(\d+)\."))
    sides = [RESOLUTION >> level for level in levels if f"encoder.down.{level}.attn.0.norm.weight" in state]
    return {"attention_resolutions": sides, "resolution": RESOLUTION}


def _codebook(state: Mapping[str, Tensor]) -> dict[str, Any]:
    num_codes, dim = state["quantize.embedding.weight"].shape
    return {"num_codes": num_codes, "dim": dim}
