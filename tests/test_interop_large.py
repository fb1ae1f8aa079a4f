"""A random folder of 2 GB like DeepSeek-V3's, in fp8 and with multi-token prediction, in and out in bounded memory."""

import ctypes
import gc
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from expert_parallel.interop.folder import CONFIG, INDEX
from tests.test_interop_command import done

MIB = 2**20
SHARD = 256 * MIB
WIDTH, LAYERS, EXPERTS, HIDDEN, HEADS, VOCABULARY = 2048, 5, 64, 1024, 16, 32_000
DENSE = 5120  # as DeepSeek-V3's in proportion: the embedding is larger than gate and up beside their concatenation
NOPE, ROPE, VALUE, QUERY_RANK, KV_RANK = 128, 64, 128, 768, 512
CONFIG_JSON = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": DENSE,
    "moe_intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 1,
    "kv_lora_rank": KV_RANK,
    "q_lora_rank": QUERY_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": VALUE,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names of the released folder, with these sizes; those of quantized weights end in `_proj.weight` or so."""
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for layer in range(LAYERS + 1):
        here = f"model.layers.{layer}"
        yield from ((f"{here}.{name}_layernorm.weight", (WIDTH,)) for name in ("input", "post_attention"))
        attention = {
            "q_a_proj": (QUERY_RANK, WIDTH),
            "q_a_layernorm": (QUERY_RANK,),
            "q_b_proj": (HEADS * (NOPE + ROPE), QUERY_RANK),
            "kv_a_proj_with_mqa": (KV_RANK + ROPE, WIDTH),  # 4.5 blocks of rows
            "kv_a_layernorm": (KV_RANK,),
            "kv_b_proj": (HEADS * (NOPE + VALUE), KV_RANK),
            "o_proj": (WIDTH, HEADS * VALUE),
        }
        yield from ((f"{here}.self_attn.{name}.weight", shape) for name, shape in attention.items())
        networks = {f"experts.{expert}.": HIDDEN for expert in range(EXPERTS)} | {"shared_experts.": HIDDEN}
        for name, hidden in (networks if layer else {"": DENSE}).items():
            yield f"{here}.mlp.{name}gate_proj.weight", (hidden, WIDTH)
            yield f"{here}.mlp.{name}up_proj.weight", (hidden, WIDTH)
            yield f"{here}.mlp.{name}down_proj.weight", (WIDTH, hidden)
        if layer:
            yield f"{here}.mlp.gate.weight", (EXPERTS, WIDTH)
            yield f"{here}.mlp.gate.e_score_correction_bias", (EXPERTS,)
        if layer == LAYERS:
            yield from ((f"{here}.{name}.weight", (WIDTH,)) for name in ("enorm", "hnorm", "shared_head.norm"))
            yield f"{here}.eh_proj.weight", (WIDTH, 2 * WIDTH)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def stored(name: str, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Random tensors of the files: codes and scales, or bfloat16."""
    if "_proj" not in name or "eh_proj" in name:
        dtype = torch.float32 if name.endswith("bias") else torch.bfloat16
        return {name: torch.empty(shape, dtype=dtype).normal_(0.0, 0.02, generator=generator)}
    codes = torch.randint(0, 255, shape, generator=generator, dtype=torch.uint8)
    codes[codes == 127] = 126  # 127 and 255 are no numbers
    scales = torch.rand([-(-size // 128) for size in shape], generator=generator) * 1e-4 + 1e-6
    return {name: codes.view(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def write_folder(folder: Path) -> int:
    """Writes the folder in files of about SHARD bytes. Returns its bytes."""
    folder.mkdir()
    generator, shard, places, total = torch.Generator().manual_seed(0), {}, {}, 0
    for name, shape in [*shapes(), ("", ())]:
        if not name or sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            file = f"model-{len(set(places.values())):05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            total += sum(tensor.nbytes for tensor in shard.values())
            shard = {}
        if name:
            shard |= stored(name, shape, generator)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}))
    (folder / CONFIG).write_text(json.dumps(CONFIG_JSON))
    return total


class PeakMemory:
    """Measures by how much the anonymous memory of the process grows, in bytes. Pages of mapped files are not counted:
    the system takes them back when it needs memory."""

    def __enter__(self) -> Self:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # or memory that was freed before would be used again, and not be counted
        self.start = self.peak = anonymous()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def _sample(self) -> None:
        while not self.done.is_set():
            self.peak = max(self.peak, anonymous())
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def growth(self) -> int:
        return self.peak - self.start


def anonymous() -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


def opened(folder: Path) -> Iterator[tuple[str, Tensor]]:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    for name, file in sorted(places.items()):
        with safe_open(folder / file, "pt") as tensors:
            yield name, tensors.get_tensor(name)


def growth(*arguments: str | float) -> int:
    """How much memory a command takes, in a process of its own, whose heap has no holes of earlier work."""
    with PeakMemory() as memory:
        done(*arguments)
    return memory.growth


@pytest.mark.full
def test_two_gigabytes_in_bounded_memory(tmp_path: Path) -> None:
    """One shard and one tensor, the largest, above what the process has at the start, and with the copies in layers of
    multi-token prediction two of them; and every bit comes back."""
    total = write_folder(tmp_path / "theirs")
    assert total > 2_000 * MIB
    shard, largest = ("--shard-gb", SHARD / 2**30), VOCABULARY * WIDTH * 2
    theirs, run, back = (str(tmp_path / name) for name in ("theirs", "run", "back"))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as fresh:
        importing = fresh.submit(growth, "convert", "import", theirs, run, "--dtype", "bfloat16", *shard).result()
        exporting = fresh.submit(growth, "convert", "export", run, back, "--dtype", "fp8", *shard).result()
    grown = {"import": importing // MIB, "export": exporting // MIB, "shard": SHARD // MIB, "tensor": largest // MIB}
    print(f"{total / 1e9:.2f} GB; MiB above the start: {grown}")
    found = dict(opened(tmp_path / "back"))  # mapped
    for name, expected in opened(tmp_path / "theirs"):
        actual = found.pop(name)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), name
    assert set(found) <= {f"model.layers.{LAYERS}.{copy}.weight" for copy in ("embed_tokens", "shared_head.head")}
    assert importing <= SHARD + largest, grown
    assert exporting <= SHARD + 2 * largest, grown  # copies of embedding and head follow one another
