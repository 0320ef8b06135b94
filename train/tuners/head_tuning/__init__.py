"""Scale and offset on chosen heads, as a PEFT tuner.

On the input of the attention output projection, for each chosen head h of layer l:

    z[l, h] <- (1 + g2[l, h] * a[l, h]) * z[l, h] + g1[l, h] * v[l, h]        a, v in R^head_dim (a may be one number)

`a` alone is LoFiT's first stage, `v` alone its second (Yin et al. 2024, section 3). The gates g are 1 unless the
adapter asks for them; then they are HardConcrete, one pair per head, and choose the heads while `a` and `v` are tuned
(JoLA, Lai et al. 2025): in training mode drawn anew at every forward pass, otherwise without noise. The output of a
layer's MLP can get an offset of its own:

    M[l] <- M[l] + w[l]                                                        w in R^d_model

`a`, `v` and `w` start at zero, so a fresh adapter changes nothing. Everything else is frozen. Importing this package
makes the type known to PEFT, so `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM` and `load_adapter` work.
"""

from __future__ import annotations

from ..base import HeadPeftType, register_tuner
from .config import SCALES, HeadTuningConfig
from .gates import GatedHead, l0, open_heads
from .layer import HeadTuningLayer, MlpOffsetLayer, TunedProjection
from .model import HeadTuningModel

__all__ = [
    "SCALES",
    "GatedHead",
    "HeadTuningConfig",
    "HeadTuningLayer",
    "HeadTuningModel",
    "MlpOffsetLayer",
    "TunedProjection",
    "l0",
    "open_heads",
]

register_tuner(HeadPeftType.HEAD_TUNING, HeadTuningConfig, HeadTuningModel)
