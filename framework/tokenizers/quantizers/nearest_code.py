"""The nearest code of each latent, exact and fast on a CPU.

Shapes: m latents, K codes, d channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

BLOCK = 32
SCORES_IN_CACHE = 1 << 17  # half a MiB
SCORES_ON_A_DEVICE = 1 << 26


@torch.no_grad()
def nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Latents ``(m, d)`` and a codebook ``(K, d)`` -> the nearest code in squared distance, ``(m,)`` int64.

    The nearest code e of a latent z has the highest z.e - |e|^2 / 2, one product of matrices whose last column holds
    -|e|^2 / 2. It is taken in chunks of latents, so that K scores of each never leave the cache. Torch's argmax is
    slow on a CPU, so the plain maxima of blocks of codes come first, and argmax reads only these and one block.

    All is float32, also under autocast; codes whose distances differ by its rounding only may be taken for each other.
    Of equal codes the first is taken. A latent that is not finite gets some code.
    """
    with torch.autocast(latents.device.type, enabled=False):
        latents, codebook = latents.float(), codebook.float()
        num_codes = len(codebook)
        table = torch.cat([codebook, -codebook.square().sum(1, keepdim=True) / 2], dim=1)
        table = F.pad(table, (0, 0, 0, -num_codes % BLOCK))
        table[num_codes:, -1] = -torch.inf
        # With the codes of a block far apart, the maxima of all blocks are maxima of whole rows, which is fast.
        table = rearrange(table, "(blocks k) d -> d (k blocks)", k=BLOCK).contiguous()
        at_once = SCORES_IN_CACHE if latents.device.type == "cpu" else SCORES_ON_A_DEVICE
        latents = F.pad(latents, (0, 1), value=1.0)
        codes = [_best(part @ table) for part in latents.split(max(at_once // table.shape[1], 1))]
        return torch.cat(codes).clamp(max=num_codes - 1)  # where latents are not finite, padding can win


def _best(scores: Tensor) -> Tensor:
    """Scores ``(m, BLOCK * blocks)``, the codes of a block ``blocks`` apart -> the first of the highest, ``(m,)``."""
    scores = rearrange(scores, "m (k blocks) -> m k blocks", k=BLOCK)
    block = scores.amax(1).argmax(1)
    within = scores.take_along_dim(block[:, None, None], dim=2).squeeze(2).argmax(1)
    return block * BLOCK + within
