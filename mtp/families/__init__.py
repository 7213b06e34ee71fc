"""MTP heads by family: which tensors, which convention, which blocks.

from mtp.families import FAMILIES
print(FAMILIES["qwen3_5_moe"].__doc__)
"""

from .deepseek import DeepSeek, DeepSeek32, Glm4
from .ernie import Ernie
from .family import Family
from .gemma import Gemma4
from .longcat import LongCat
from .mimo import MiMo, MiMoV2
from .nemotron import Nemotron
from .qwen import Qwen, Qwen35
from .step import Step

FAMILIES: dict[str, Family] = {
    "deepseek_v3": DeepSeek(),
    "deepseek_v32": DeepSeek32(),
    "ernie4_5_moe": Ernie(),
    "gemma4": Gemma4(),
    "gemma4_text": Gemma4(),
    "glm4_moe": Glm4(),
    "glm4_moe_lite": DeepSeek(),
    "glm_moe_dsa": DeepSeek32(),
    "longcat_flash": LongCat(),
    "mimo": MiMo(),
    "mimo_v2_flash": MiMoV2(),
    "nemotron_h": Nemotron(),
    "qwen3_5": Qwen35(),
    "qwen3_5_moe": Qwen35(),
    "qwen3_next": Qwen(),
    "step3p5": Step(),
}

__all__ = ["FAMILIES", "Family"]
