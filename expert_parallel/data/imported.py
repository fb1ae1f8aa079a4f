"""Reads the Hugging Face files in a run's folder that say how prompts of an imported model begin and its texts end."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expert_parallel.data.open import ORIGIN, TOKENIZER_FILE
from expert_parallel.data.reading import read_json

CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"  # of older folders

# Keys of generation_config.json that choose no token here: token ids, which are followed; lengths, since the number of
# tokens is always asked for; caches, outputs and bookkeeping; and details of beams, encoders and assistants.
HARMLESS = frozenset(
    (
        *("eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
        *("max_length", "max_new_tokens", "length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size", "low_memory"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "renormalize_logits", "remove_invalid_values"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
        *("compile_config", "disable_compile", "continuous_batching_config"),
        *("transformers_version", "_from_model_config", "_commit_hash"),
    )
)
# Keys that choose no token if they are 1. If it is null, false, 0 or empty, no key does.
NEUTRAL_AT_1 = frozenset(("repetition_penalty", "num_beams", "num_return_sequences", "guidance_scale", "typical_p"))
# Keys that choose tokens only if these are drawn.
DRAWS = frozenset(("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"))


@dataclass(frozen=True)
class ImportedGeneration:
    """Holds how transformers generates with a model, as its folder's files say.

    end_ids: token ids that end a text. bos_id: the token that begins a text without prompt; None if there is none.
    bos_token, eos_token: tokens that tokenizer_config.json adds before and after a prompt, for a tokenizer.json that
    adds none itself. special_tokens: tokens that tokenizer_config.json names as special. max_positions: the number of
    tokens that the model was made for. settings: the content of generation_config.json.
    """

    end_ids: frozenset[int]
    bos_id: int | None
    bos_token: str | None
    eos_token: str | None
    special_tokens: tuple[str, ...]
    max_positions: int | None
    settings: dict[str, Any]

    def not_followed(self, own: Mapping[str, Any] | None) -> str | None:
        """Returns a sentence on the settings of generation_config.json that are not followed, or None if there are
        none. own: temperature, top_k and top_p that are used instead of the file's; None if no token is drawn."""
        found = []
        for key, value in self.settings.items():
            if key in HARMLESS or (key in DRAWS and own is None):
                continue
            is_same = not value or (key in NEUTRAL_AT_1 and value == 1)
            if own is not None and key in own:
                is_same = value == own[key] or (not value and own[key] is None)
            if not is_same:
                found.append(f"{key} {reprlib.repr(value)}")
        if not found:
            return None
        return f"{GENERATION} sets {', '.join(found)}, which {'is' if len(found) == 1 else 'are'} not followed"


def read_imported_generation(folder: Path) -> ImportedGeneration:
    """Reads a Hugging Face folder. Raises a ValueError of one sentence for files that are damaged, or hold token ids
    and tokens that are none.

    As in transformers, config.json has the token ids only if there is no generation_config.json at all.
    """
    config, tokenizer = _read_json(folder / CONFIG), _read_json(folder / TOKENIZER_CONFIG)
    settings = _read_json(folder / GENERATION)
    ids_file = GENERATION if (folder / GENERATION).is_file() else CONFIG
    ids = settings if ids_file == GENERATION else config
    ends, bos = ids.get("eos_token_id"), ids.get("bos_token_id")
    end_list = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in end_list):
        raise ValueError(f"{folder / ids_file}: eos_token_id is {ends!r}, it must be a token id or a list of token ids")
    if bos is not None and type(bos) is not int:
        raise ValueError(f"{folder / ids_file}: bos_token_id is {bos!r}, it must be a token id")
    longest = config.get("max_position_embeddings")
    return ImportedGeneration(
        end_ids=frozenset(end_list),
        bos_id=bos,
        bos_token=_added_token(folder, tokenizer, "bos"),
        eos_token=_added_token(folder, tokenizer, "eos"),
        special_tokens=_special_tokens(tokenizer),
        max_positions=longest if type(longest) is int else None,
        settings=settings,
    )


def find_imported_generation(run: Path) -> ImportedGeneration | None:
    """Returns what the files of the imported model in a run's folder say.

    Returns None if the run was not imported, or has another tokenizer.json since: then it was trained on other tokens.
    """
    theirs, ours = run / ORIGIN / TOKENIZER_FILE, run / TOKENIZER_FILE
    if not (theirs.is_file() and ours.is_file() and theirs.read_bytes() == ours.read_bytes()):
        return None
    return read_imported_generation(run / ORIGIN)


def _added_token(folder: Path, config: dict[str, Any], which: str) -> str | None:
    """Returns the token that tokenizer_config.json adds to a prompt, or None. which: `bos` (before it) or `eos`."""
    if config.get(f"add_{which}_token") is not True:
        return None
    name = f"{which}_token"
    token = config.get(name) or _read_json(folder / SPECIAL_TOKENS).get(name)
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{folder / TOKENIZER_CONFIG}: {name} is {token!r}, it must be the text of a token")
    return text


def _special_tokens(config: dict[str, Any]) -> tuple[str, ...]:
    """Returns the texts of the tokens that tokenizer_config.json names as special: each `..._token`, and its lists."""
    named = [value for key, value in config.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):  # older and newer name
        named += value if isinstance(value := config.get(key), list) else []
    texts = [token.get("content") if isinstance(token, dict) else token for token in named]
    return tuple(text for text in texts if isinstance(text, str))


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, empty if there is no such file. Raises a ValueError if the file holds none."""
    return read_json(path) if path.is_file() else {}
