"""Configurations of tiny models, one per MoE family of mlx-lm.

As their `config.json` spells them: hidden size 64, 2-5 layers with every kind
of layer the family has, 8-16 experts of which 1-4 are chosen, 320 tokens.
Inner sizes are multiples of 64, so that every quantization fits.

    PYTHONPATH=tests python -c "from families import CONFIGS; print(*sorted(CONFIGS))"
"""

from __future__ import annotations

from .attention import ATTENTION, DENSE_ATTENTION
from .latent import LATENT
from .parts import Config
from .recurrent import DENSE_RECURRENT, RECURRENT

CONFIGS: dict[str, Config] = ATTENTION | LATENT | RECURRENT
DENSE: dict[str, Config] = DENSE_ATTENTION | DENSE_RECURRENT  # no experts, but an MTP head
METAL_ONLY = {"muse_spark"}  # its kernels have no other form in mlx-lm
