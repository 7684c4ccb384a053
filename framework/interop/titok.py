"""TiTok's checkpoints and One-D-Piece's, which have the same layout, as tokenizers of this framework.

A class token and the positions that are added to constant vectors are folded into the ``registers`` and tables of
positions, and images in [0, 1] into the weights of the first and the last layer, since ``PixelSpace`` has [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from framework.interop.convolutional import RULES, maskgit_decoder_node
from framework.interop.official import Imported, OfficialError, count, renamed

TRANSFORMER_RULES = [
    (r"\.ln_pre\.", ".transformer.input_norm."),
    (r"\.ln_post\.", ".transformer.norm."),
    (r"\.transformer\.(\d+)\.", r".transformer.blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.attn\.in_proj_", ".attention.qkv."),
    (r"\.attn\.out_proj\.", ".attention.out."),
    (r"\.mlp\.c_fc\.", ".mlp.up."),
    (r"\.mlp\.c_proj\.", ".mlp.down."),
    (r"^encoder\.patch_embed\.", "encoder.patch_embedding."),
    (r"^encoder\.conv_out\.", "encoder.to_latents."),
    (r"^decoder\.decoder_embed\.", "decoder.token_embedding."),
    (r"^decoder\.latent_token_positional_embedding$", "decoder.token_positions"),
    (r"^decoder\.conv_out\.", "decoder.head.smooth."),
    (r"^quantize\.embedding\.weight$", "quantizer.codebook"),
]
# Convolutions of single positions, or of patches that do not overlap.
MATRICES = [f"{n}.weight" for n in ("encoder.patch_embed", "encoder.conv_out", "decoder.ffn.0", "decoder.ffn.2")]


def import_titok(
    state: Mapping[str, Tensor], num_heads: int | None = None, normalize: bool | None = None
) -> Imported:
    """A tokenizer that decodes to pixels, or, of two stages, to codes of the VQGAN decoder that is part of it.

    Args:
        state: by official names.
        num_heads: of encoder and decoder, which no tensor tells; heads of 64 channels, as in all released models,
            unless given.
        normalize: whether latents and codes are of unit length, which no tensor tells either; unless given, as in the
            released models: in those of two stages, but not in those of a single one.
    """
    two_stages = "decoder.ffn.2.weight" in state
    ffn = ["decoder.head.hidden", "decoder.head.to_patch"] if two_stages else ["decoder.head.to_patch"]
    heads = [(rf"^decoder\.ffn\.{2 * number}", name) for number, name in enumerate(ffn)]
    if two_stages and "pixel_quantize.embedding.weight" not in state:
        raise OfficialError("this is TiTok's first stage only: it has no pixel_quantize and pixel_decoder")
    pixels = {name.removeprefix("pixel_"): value for name, value in state.items() if name.startswith("pixel_")}
    rest = {name: value for name, value in state.items() if not name.startswith("pixel_")}
    weights, dropped = renamed(_folded(rest, two_stages), [*TRANSFORMER_RULES, *heads])
    weights |= {f"output_space.{name}": value for name, value in renamed(pixels, RULES)[0].items()}

    patch_size, dim = state["encoder.patch_embed.weight"].shape[-1], len(state["encoder.conv_out.weight"])
    quantizer: dict[str, Any] = {"name": "GaussianBottleneck", "dim": dim // 2}
    if "quantizer.codebook" in weights:
        quantizer = {"name": "VectorQuantizer", "num_codes": len(weights["quantizer.codebook"]), "dim": dim}
        quantizer |= {"standardize": False, "normalize": two_stages if normalize is None else normalize}
        quantizer |= {"ema": None, "kmeans_iterations": None, "restart_dead": False}
    encoder = {"name": "SuffixTokenViT", "num_tokens": len(state["latent_tokens"]), "patch_size": patch_size}
    encoder |= {"readout": "interleaved" if two_stages else "own", **_transformer(state, "encoder", num_heads)}
    head = {"name": "ProxyCodeHead"} if two_stages else {"name": "PixelShuffleHead", "smooth": True}
    node = {
        "name": "Tokenizer",
        "input_space": {"name": "PixelSpace"},
        "encoder": encoder,
        "quantizer": quantizer,
        "masking": {"name": "FullLength"},
        "decoder": {"name": "MaskTokenViT", "head": head, **_transformer(state, "decoder", num_heads)},
    }
    if two_stages:
        node["output_space"] = maskgit_decoder_node(pixels)
    positions = len(state["encoder.positional_embedding"]) - 1
    return Imported("tokenizer", node, weights, dropped, image_size=round(positions**0.5) * patch_size)


def _folded(state: Mapping[str, Tensor], two_stages: bool) -> dict[str, Tensor]:
    """The tensors in this framework's forms, still under official names where one official tensor became one."""
    folded = {name: value.flatten(1) if name in MATRICES else value for name, value in state.items()}
    for side in ("encoder", "decoder"):
        positions = folded.pop(f"{side}.positional_embedding")
        folded[f"{side}.transformer.registers"] = folded.pop(f"{side}.class_embedding") + positions[:1]
        folded[f"{side}.patch_positions"] = positions[1:]
    positions = folded.pop("encoder.latent_token_positional_embedding")
    folded["encoder.latent_tokens"] = folded.pop("latent_tokens") + positions
    folded["decoder.mask_token"] = folded["decoder.mask_token"].flatten()
    # The encoder reads x = (v + 1) / 2 from values v in [-1, 1], and the decoder gives v = 2 x - 1.
    folded["encoder.patch_embed.weight"] = first = folded["encoder.patch_embed.weight"] / 2
    folded["encoder.patch_embed.bias"] = folded["encoder.patch_embed.bias"] + first.sum(1)
    if not two_stages:
        folded["decoder.conv_out.weight"] = folded["decoder.conv_out.weight"] * 2
        folded["decoder.conv_out.bias"] = folded["decoder.conv_out.bias"] * 2 - 1
    return folded


def _transformer(state: Mapping[str, Tensor], side: str, num_heads: int | None) -> dict[str, Any]:
    width = state[f"{side}.positional_embedding"].shape[1]
    depth = count(state, rf"{side}\.transformer\.(\d+)\.")
    blocks = {"input_norm": True, "registers": 1}
    return {"width": width, "depth": depth, "num_heads": num_heads or max(width // 64, 1), "blocks": blocks}
