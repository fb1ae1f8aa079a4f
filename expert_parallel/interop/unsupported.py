"""Lists the sparse families of transformers that are not imported, and the part of each that is missing here."""

from expert_parallel.interop.hf_config import Tree, short

INDEXER = "its sparse attention, in which an indexer selects the keys, is"
LINEAR = "its linear attention (a gated delta rule) is"
MAMBA = "its Mamba blocks are"
GATED = "the gate on the output of its attention is"
MROPE = "its rotary positions of three axes are"
ENCODER = "its encoder is"

# model_type -> what is missing, a subject with its verb: the sentence ends with "not here".
UNSUPPORTED: dict[str, str] = {
    "afmoe": GATED,
    "aria_text": "the map of its tensors is",
    "axk2": INDEXER,
    "bailing_hybrid": LINEAR,
    "beam": GATED,
    "cohere2_moe": "its blocks of attention beside experts are",
    "dbrx": "the clipping of its queries, keys and values is",
    "deepseek_ocr2_text": "the map of its tensors is",
    "deepseek_v32": INDEXER,
    "deepseek_v4": "its compressed attention and its hyper-connections are",
    "diffusion_gemma_text": "its diffusion over blocks of tokens is",
    "doge": "its dynamic mask attention is",
    "dots3_note_text": INDEXER,
    "dots3_note_vision_encoder": "its model of images is",
    "ernie4_5_vl_moe_text": MROPE,
    "flint": "the map of its tensors is",
    "gemma4_text": "its dense network beside the experts of a block is",
    "glm4v_moe_text": MROPE,
    "glm5_next_text": LINEAR,
    "glm_moe_dsa": INDEXER,
    "granitemoe_swa": "its base of rotary positions for each block is",
    "granitemoehybrid": MAMBA,
    "hy_v4": INDEXER,
    "inkling2_text": "its short convolutions are",
    "inkling_text": "its short convolutions are",
    "jamba": MAMBA,
    "jetmoe": "its mixture of attention heads is",
    "kimi_linear": LINEAR,
    "kolibri1": "its selection bias, which is added to logits and not to scores, is",
    "laguna": GATED,
    "lfm2_moe": "its short convolutions are",
    "longcat_flash": "its blocks of two attentions around the experts are",
    "minimax": "its lightning attention is",
    "minimax_m3_vl_text": INDEXER,
    "mistral_large4_text": INDEXER,
    "muse_spark_text": "the gate on its residual stream is",
    "nemotron_h": MAMBA,
    "nllb-moe": ENCODER,
    "openai_privacy_filter": "its attention to later tokens is",
    "qwen3_5_moe_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen3_omni_moe_talker_text": MROPE,
    "qwen3_omni_moe_text": MROPE,
    "qwen3_vl_moe_text": MROPE,
    "qwen4_exp_text": LINEAR,
    "step3p5": "its number of heads for each block is",
    "switch_transformers": ENCODER,  # its MoE layers are: switch_layers.py
    "unlimited_ocr_text": "the map of its tensors is",
    "vitpose_backbone": "its model of images is",
    "zaya": "its compressed convolutional attention is",
}


def describe_unsupported(config: Tree, families: list[str]) -> str:
    """Returns a sentence on a config.json of a family that is not imported: the part that is missing or, for a model of
    images or sound, the model of text within it. families: the names of those that are imported."""
    kind, text = config.get("model_type"), config.get("text_config")
    found = f"model_type is {short(kind)}"
    if isinstance(text, dict):
        inner = text.get("model_type")
        if inner in families:
            return (
                f"{found}, a model that also reads images or sound: save its model of text ({inner}) alone (in "
                "transformers: AutoModelForCausalLM.from_pretrained, then save_pretrained), then import that"
            )
        if isinstance(inner, str) and inner in UNSUPPORTED:
            return f"{found}, a model that also reads images or sound; of its model of text ({inner}), {missing(inner)}"
    if isinstance(kind, str) and kind in UNSUPPORTED:
        return f"{found}: {missing(kind)}"
    return f"{found}, it must be one of {', '.join(families)}"


def missing(kind: str) -> str:
    """Returns the clause that says which part of a family is missing, such as `its Mamba blocks are not here`."""
    return f"{UNSUPPORTED[kind]} not here"


def family_rows(families: list[str]) -> list[tuple[str, str]]:
    """Returns the name of each family and its state: those that are imported, then the others with what is missing."""
    imported = [(name, "imported and exported") for name in sorted(families)]
    return [*imported, *((name, f"not imported: {missing(name)}") for name in sorted(UNSUPPORTED))]
