"""Lists the families of Hugging Face models that are read and written, by `model_type`.

A new family is an entry of FAMILIES in one of the files of this folder.
"""

from expert_parallel.interop.families import (
    deepseek,
    deepseek_v2,
    dots,
    ernie,
    exaone,
    glm,
    gpt_oss,
    granite,
    hunyuan,
    hy3,
    llama,
    llama4,
    mellum,
    mimo,
    minimax,
    mistral,
    mixtral,
    phi,
    qwen2_moe,
    qwen_moe,
)
from expert_parallel.interop.family import Family

FAMILIES: dict[str, Family] = {
    **llama.FAMILIES,
    **mixtral.FAMILIES,
    **qwen_moe.FAMILIES,
    **deepseek.FAMILIES,
    **gpt_oss.FAMILIES,
    **glm.FAMILIES,
    **minimax.FAMILIES,
    **dots.FAMILIES,
    **hy3.FAMILIES,
    **granite.FAMILIES,
    **ernie.FAMILIES,
    **hunyuan.FAMILIES,
    **mistral.FAMILIES,
    **exaone.FAMILIES,
    **mellum.FAMILIES,
    **mimo.FAMILIES,
    **llama4.FAMILIES,
    **qwen2_moe.FAMILIES,
    **deepseek_v2.FAMILIES,
    **phi.FAMILIES,
}
