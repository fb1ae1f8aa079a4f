"""Decides which tensors of a Hugging Face folder its model does not use, as transformers does when it loads the folder.

Checked against transformers 5: it warns of every such tensor, and goes on. Here they are known by name, since any other
surplus tensor may belong to a part of the model that we would leave out.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from expert_parallel.interop.folder import HuggingFaceFolder

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")
# Kinds of tensors that are kept for exports; see set_aside.py.
MTP = "multi-token prediction, which transformers leaves out, too"
UNUSED = "weights of parts that the model does not have, which transformers leaves out, too"
TIED = f"equal to {TABLE}, to which it is tied"
FREQUENCIES = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # older versions of transformers saved them

ROWS = 4096  # rows of a table that are compared at once


def ignored_tensors(
    names: Iterable[str], num_layers: int, num_mtp_layers: int, patterns: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Returns what each tensor is that the model does not use, by name.

    num_mtp_layers: the number of layers of multi-token prediction after the num_layers layers of the model. patterns:
    what further tensors are, by a regular expression of the beginning of their names.
    """
    ignored: dict[str, str] = {}
    for name in names:
        for pattern, kind in (patterns or {}).items():
            if re.match(pattern, name):
                ignored[name] = kind
        layer = LAYER.match(name)
        is_after = layer and num_layers <= int(layer[1]) < num_layers + num_mtp_layers
        if FREQUENCIES.search(name):
            ignored[name] = "rotary frequencies, which follow from config.json"
        elif is_after:
            ignored[name] = MTP
    return ignored


def describe_ignored(ignored: dict[str, str]) -> list[str]:
    """Returns a sentence for each kind of tensors that are set aside."""
    sentences = []
    for kind in dict.fromkeys(ignored.values()):
        names = [name for name, other in ignored.items() if other == kind]
        sentences.append(f"set aside {list_briefly(names)}: {kind}")
    return sentences


def list_briefly(names: Sequence[str]) -> str:
    """Returns, as text, the number of tensors and the first of their names."""
    count = "1 tensor" if len(names) == 1 else f"{len(names):,} tensors"
    return f"{count} ({names[0]}{', ...' if len(names) > 1 else ''})" if names else count


def rows_are_equal(folder: HuggingFaceFolder, name: str, other: str) -> bool:
    """Returns True if two matrices have the same shape and the same values. Memory holds some of their rows."""
    shapes = [folder.shape(matrix) for matrix in (name, other)]
    if len(shapes[0]) != 2 or shapes[0] != shapes[1]:
        return False
    for row in range(0, shapes[0][0], ROWS):
        some, others = (folder.read_rows(matrix, row, row + ROWS) for matrix in (name, other))
        wide = torch.promote_types(some.dtype, others.dtype)  # holds the numbers of both exactly
        if not torch.equal(some.to(wide), others.to(wide)):
            return False
    return True
