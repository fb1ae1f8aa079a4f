"""Hugging Face folders with quantized weights: what is read, what goes back, and what is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight

from expert_parallel.checkpoint.files import CheckpointWriter, open_checkpoint
from expert_parallel.interop import surgery
from expert_parallel.interop.exporting import export_run
from expert_parallel.interop.folder import CONFIG, SINGLE
from expert_parallel.interop.fp8_export import KEPT_SCALES
from expert_parallel.interop.hf_model import HuggingFaceModel
from expert_parallel.interop.importing import import_folder
from expert_parallel.interop.quantization import BlockQuantization, read_quantization
from expert_parallel.moe.context import StepContext
from tests.interop_models import MODELS
from tests.peers import peers_in_float64
from tests.quantized_folders import Tensors, change_config, is_quantized, quantize_fp8, quantize_int4, spread
from tests.test_interop import SHARD, load_ours, make_peer, same_bits, tensors_of, tokens

FORMS = {
    # The blocks divide no matrix of the model, so the last ones are smaller.
    "deepseek_v3": ((7, 9), torch.float32, {}),
    "deepseek_v3 with yarn": ((4, 8), torch.bfloat16, {"scale_fmt": "ue8m0", "modules_to_not_convert": ["lm_head"]}),
    "qwen3_moe with all parts": ((128, 128), torch.float8_e8m0fnu, {"scale_fmt": "ue8m0", "fmt": "float8_e4m3fn"}),
}


@pytest.mark.parametrize("name", FORMS)
@torch.no_grad()
def test_fp8_in_and_out(name: str, tmp_path: Path) -> None:
    """In float64 the model computes what transformers does with the exact weights; from float32, bfloat16 and float64
    every bit of the folder comes back, multi-token prediction too, which the model does not have."""
    theirs, plain = tmp_path / "theirs", tmp_path / "plain"
    block, scale_dtype, config = FORMS[name]
    make_peer(name).save_pretrained(theirs)
    shutil.copytree(theirs, plain)
    if name.startswith("deepseek"):
        mtp = {"eh_proj.weight": torch.ones(16, 32), "enorm.weight": torch.ones(16)}
        tensors = load_file(theirs / SINGLE) | {f"model.layers.3.{leaf}": tensor for leaf, tensor in mtp.items()}
        save_file(tensors, theirs / SINGLE, metadata={"format": "pt"})
    exact = quantize_fp8(theirs, block, scale_dtype, **config)
    save_file(
        {name: w for name, w in exact.items() if "layers.3." not in name}, plain / SINGLE, metadata={"format": "pt"}
    )
    change_config(plain, dtype="float64")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    peer = type(make_peer(name)).from_pretrained(plain, dtype=torch.float64, **eager).eval()
    for dtype in (None, "bfloat16", "float64"):
        run, back, said = tmp_path / f"run_{dtype}", tmp_path / f"back_{dtype}", []
        import_folder(theirs, run, SHARD, said.append, dtype)
        assert re.search(r"^\d+ weights are stored as fp8 \(blocks of \d+ x \d+\) and imported as \w+, ", said[0])
        export_run(run, back, family=None, dtype="fp8", shard_bytes=SHARD, print_message=said.append)
        same_bits(tensors_of(back), tensors_of(theirs))
        assert json.loads((back / CONFIG).read_text()) == json.loads((theirs / CONFIG).read_text())
        count = sum(is_quantized(name) for name in exact)
        assert said[-1] == f"{count} of {count} fp8 weights are as imported, bit for bit"
    with peers_in_float64():
        expected = peer(tokens()).logits
    actual = load_ours(tmp_path / "run_float64", torch.float64)(tokens(), StepContext()).logits
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10 * float(expected.abs().max()))


@torch.no_grad()
def test_transformers_reads_the_same(tmp_path: Path) -> None:
    """transformers itself reads the folder, in float32; all blocks are whole, as it demands."""
    theirs = tmp_path / "theirs"
    make_peer("qwen3_moe").save_pretrained(theirs)
    quantize_fp8(theirs, (2, 2), torch.float32)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    peer = transformers.AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32, **eager).float().eval()
    run = import_folder(theirs, tmp_path / "run", SHARD)
    expected = peer(tokens()).logits
    actual = load_ours(run)(tokens(), StepContext()).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_whole_and_last_blocks(dtype: torch.dtype) -> None:
    """Bit for bit as transformers' two functions, of which one takes whole blocks alone and one rounds scales first."""
    generator = torch.Generator().manual_seed(3)
    for shape, block in (((256, 384), [128, 128]), ((300, 140), [128, 128]), ((5, 7), [2, 3])):
        codes = torch.randn(shape, generator=generator).mul(50).to(torch.float8_e4m3fn)
        size = [-(-rows // of) for rows, of in zip(shape, block, strict=True)]
        scales = torch.rand(size, generator=generator) * 1e-3 + 1e-5
        form = read_quantization({"quantization_config": {"quant_method": "fp8", "weight_block_size": block}})
        assert form is not None
        actual = form.dequantize(codes, scales, dtype)
        assert torch.equal(
            actual, (codes.double() * spread(scales, (block[0], block[1]), codes.shape)).float().to(dtype)
        )
        if dtype == torch.float32:
            assert torch.equal(actual, _dequantize_fp8_weight(codes, scales, block, dtype))
        if shape == (256, 384):
            assert torch.equal(actual, Fp8Dequantize(None)._dequantize_one(codes, scales, dtype))


def test_slices_of_quantized_weights(originals: dict[str, Path]) -> None:
    """What a rank reads of its part is that part of the whole weight, across blocks; bytes are those of the files."""
    for folder in originals.values():
        source = HuggingFaceModel(folder)
        for name, whole in source.weights():
            start = [size // 3 for size in whole.shape]
            shape = [size - 2 * first for size, first in zip(whole.shape, start, strict=True)]
            place = tuple(slice(first, first + size) for first, size in zip(start, shape, strict=True))
            assert torch.equal(source.read_slice(name, start, shape), whole[place]), name
        assert 0 < source.bytes_read <= source.folder.num_bytes


def retrain(run: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    """Writes the next step of a run, in float32, as training does. change: what becomes of a weight."""
    checkpoint = open_checkpoint(run)
    with CheckpointWriter(run / "checkpoints/step_00000001", step=1, config=checkpoint.config) as writer:
        for name in checkpoint.tensors:
            writer.add(name, change(name, checkpoint.read(name).float()))
        writer.finish()


@pytest.mark.parametrize("scale_fmt", ["float", "ue8m0"])
def test_trained_blocks_are_rounded(scale_fmt: str, tmp_path: Path) -> None:
    """Every other block of a run that was trained goes back as it came; these get max / 448, and the error is said."""
    theirs, run, back = tmp_path / "theirs", tmp_path / "run", tmp_path / "back"
    make_peer("deepseek_v3").save_pretrained(theirs)
    quantize_fp8(theirs, (4, 4), torch.float32, scale_fmt=scale_fmt)
    import_folder(theirs, run, SHARD, dtype="bfloat16")
    own, name = "blocks.1.moe.experts.2.w_out", "model.layers.1.mlp.experts.2.down_proj.weight"  # (10, 16), transposed
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    given = []

    def change(found: str, w: Tensor) -> Tensor:
        if found == f"weights/{own}":
            w[4:8, 8:12] = noise
            given.append(w.T.double())
        return w

    retrain(run, change)
    said: list[str] = []
    export_run(run, back, family=None, dtype="fp8", shard_bytes=SHARD, print_message=said.append)
    before, after = tensors_of(theirs), tensors_of(back)
    scale = noise.abs().max() / 448
    if scale_fmt == "ue8m0":
        scale = 2.0 ** scale.log2().ceil()
    rows, columns = slice(8, 12), slice(4, 8)
    assert after[f"{name}_scale_inv"][2, 1] == scale
    rounded = after[name].double() * spread(after[f"{name}_scale_inv"], (4, 4), after[name].shape)
    errors, values = (rounded - given[0])[rows, columns].abs(), given[0][rows, columns].abs()
    assert 0 < errors.max() <= values.max() / 28 * (2 if scale_fmt == "ue8m0" else 1)
    assert said[-1].endswith(
        f"59 of 60 fp8 weights are as imported, bit for bit; the others were rounded: by "
        f"{errors.sum() / values.sum():.2%} of the values' size in the mean, by at most "
        f"{errors.max() / values.max():.2%} of the largest value of a block"
    )
    after[name][rows, columns], after[f"{name}_scale_inv"][2, 1] = (
        before[name][rows, columns],
        before[f"{name}_scale_inv"][2, 1],
    )
    same_bits(after, before)


def test_added_experts_are_quantized_and_values_must_be_finite(tmp_path: Path) -> None:
    """Experts of other numbers than those that were imported have their siblings' format."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    make_peer("deepseek_v3 with yarn").save_pretrained(theirs)
    quantize_fp8(theirs, (128, 128), torch.float32)
    import_folder(theirs, run, SHARD)
    more = surgery.perform_surgery(run, tmp_path / "more", surgery.add(6, [3], 0.0, 0), SHARD)
    export_run(more, tmp_path / "back", family=None, dtype="fp8", shard_bytes=SHARD)
    old, new = (dict(HuggingFaceModel(path).weights()) for path in (theirs, tmp_path / "back"))
    for leaf in ("w_in", "w_out"):
        before, after = old[f"blocks.2.moe.experts.3.{leaf}"], new[f"blocks.2.moe.experts.6.{leaf}"]
        assert (after - before).abs().max() <= before.abs().max() / 28  # steps of codes below 448 are 32
    assert tensors_of(tmp_path / "back")["model.layers.2.mlp.experts.6.up_proj.weight"].dtype == torch.float8_e4m3fn
    retrain(run, lambda name, w: w / 0 if name.endswith("1.attention.out.weight") else w)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj\.weight has a value that is not finite"):
        export_run(run, tmp_path / "odd", family=None, dtype="fp8", shard_bytes=SHARD)
    (run / "huggingface" / KEPT_SCALES).unlink()
    with pytest.raises(ValueError, match=f"--dtype fp8 needs the scales .*{KEPT_SCALES}: choose another dtype"):
        export_run(run, tmp_path / "odd", family=None, dtype="fp8", shard_bytes=SHARD)
    assert not list(tmp_path.glob("*odd*"))


def save_wide(folder: Path) -> None:
    """Saves a DeepSeek-V3 whose experts have columns in multiples of 8."""
    sizes = {**MODELS["deepseek_v3"][1], "moe_intermediate_size": 16}
    transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).save_pretrained(folder)


@torch.no_grad()
def test_int4(tmp_path: Path) -> None:
    """Experts in groups of 4 bits, as Kimi K2 Thinking is released, beside plain matrices; they go back in bfloat16."""
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    save_wide(theirs)
    exact = quantize_int4(theirs, 8)
    import_folder(theirs, run, SHARD)
    export_run(run, tmp_path / "back", family=None, dtype=None, shard_bytes=SHARD)
    back = tensors_of(tmp_path / "back")
    assert {name: tensor.double().equal(exact[name]) for name, tensor in back.items()} == dict.fromkeys(exact, True)
    assert "quantization_config" not in json.loads((tmp_path / "back" / CONFIG).read_text())
    with pytest.raises(ValueError, match="--dtype fp8 needs the scales"):
        export_run(run, tmp_path / "fp8", family=None, dtype="fp8", shard_bytes=SHARD)


def test_int4_by_hand() -> None:
    form = BlockQuantization("int4", "_packed", "_scale", "_shape", (1, 4), "I32")
    codes = torch.tensor([[0x76543210], [0xFEDCBA98 - 2**32]], dtype=torch.int32)  # the lowest four bits come first
    scales = torch.tensor([[0.5, 2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    expected = [[-4.0, -3.5, -3.0, -2.5, -8.0, -6.0, -4.0, -2.0], [0.0, 1.0, 2.0, 3.0, 1.0, 1.25, 1.5, 1.75]]
    assert form.dequantize(codes, scales, torch.bfloat16).tolist() == expected


Q = "model.layers.1.self_attn.o_proj.weight"
E = "model.layers.1.mlp.experts.2.up_proj.weight"


def scale(value: float) -> Callable[[Tensors], Any]:
    """Changes the last scale of a weight."""
    return lambda t: t[f"{Q}_scale_inv"].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (scale(float("nan")), f"{Q}_scale_inv holds the scale nan, it must be from 8e-31 to 1e\\+30"),
        (scale(0.0), f"{Q}_scale_inv holds the scale 0, it must be"),
        (scale(-1e-3), f"{Q}_scale_inv holds the scale -0.001, it must be"),
        (scale(float("inf")), f"{Q}_scale_inv holds the scale inf, it must be"),
        (lambda t: t.pop(f"{Q}_scale_inv"), f"{Q}_scale_inv is missing, which {Q} needs"),
        (lambda t: t.pop(Q), f"{Q} is missing, which {Q}_scale_inv needs"),
        (lambda t: t.update({Q: t[Q].to(torch.bfloat16)}), f"{Q} is BF16, it must be F8_E4M3"),
        (lambda t: t.update({Q: t[Q].to(torch.float8_e5m2)}), f"{Q} is F8_E5M2, it must be F8_E4M3"),
        (
            lambda t: t.update({f"{Q}_scale_inv": t[f"{Q}_scale_inv"].int()}),
            f"{Q}_scale_inv is I32, it must be F32 or BF16 or F16 or F8_E8M0",
        ),
        (
            lambda t: t.update({f"{Q}_scale_inv": t[f"{Q}_scale_inv"].mT.contiguous()}),
            rf"{Q}_scale_inv has shape \[4, 2\], expected \[2, 4\] for fp8 \(blocks of 8 x 6\) of {Q}, which has shape",
        ),
        (lambda t: t.update({Q: t[Q].flatten()}), rf"{Q} has shape \[320\], it must be a matrix"),
        (lambda t: t.update({Q: t[Q][:15].clone()}), rf"{Q} has shape \[15, 20\], expected \[16, 20\]"),
        (lambda t: t.update({f"{Q}_scale": t[f"{Q}_scale_inv"].clone()}), f"{Q}_scale is left over"),
    ],
)
def test_damaged_fp8(originals: dict[str, Path], tmp_path: Path, change: Callable[[Tensors], Any], words: str) -> None:
    damaged(originals["fp8"], tmp_path, change, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t[f"{E}_shape"].fill_(9), rf"{E}_shape is \[9, 9\], expected \[16, 16\]"),
        (lambda t: t.pop(f"{E}_shape"), f"{E}_shape is missing, which {E}_packed needs"),
        (lambda t: t.update({f"{E}_packed": t[f"{E}_packed"].float()}), f"{E}_packed is F32, it must be I32"),
        (lambda t: t.update({E: torch.ones(16, 16)}), f"{E} is stored twice: as it is, and as {E}_packed"),
        (lambda t: t.pop(f"{E}_packed"), f"{E}_packed is missing, which {E}_scale needs"),
    ],
)
def test_damaged_int4(originals: dict[str, Path], tmp_path: Path, change: Callable[[Tensors], Any], words: str) -> None:
    damaged(originals["int4"], tmp_path, change, words)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders to copy and damage, in fp8 and in int4."""
    root = tmp_path_factory.mktemp("quantized")
    for name in ("fp8", "int4"):
        save_wide(root / name)
    quantize_fp8(root / "fp8", (8, 6), torch.float32)
    quantize_int4(root / "int4", 8)
    return {name: root / name for name in ("fp8", "int4")}


def damaged(original: Path, tmp_path: Path, change: Callable[[Tensors], Any], words: str) -> None:
    """An import is refused in one sentence with these words, and leaves nothing behind."""
    theirs = shutil.copytree(original, tmp_path / "theirs")
    tensors = load_file(theirs / SINGLE)
    change(tensors)
    save_file(tensors, theirs / SINGLE)
    with pytest.raises(ValueError, match=words) as error:
        import_folder(theirs, tmp_path / "run", SHARD)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [theirs]


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
ROWS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}


def compressed(weights: Any, form: str = "pack-quantized", **changes: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, **changes}


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq", "quant_method 'gptq', which is not supported: import the weights that were quantized, or save"),
        ({"bits": 4}, "quant_method None, which is not supported"),
        ({"quant_method": ["fp8"]}, r"quant_method \['fp8'\], which is not supported"),
        *(
            ({"quant_method": name}, f"'{name}', which")
            for name in ("gptq", "awq", "bitsandbytes", "modelopt", "mxfp4")
        ),
        ({"quant_method": "fp8"}, "'fp8' with weight_block_size None, which is not supported"),
        ({**FP8, "weight_block_size": [128, 0]}, r"with weight_block_size \[128, 0\]"),
        ({**FP8, "activation_scheme": "static"}, "with activation_scheme 'static'"),
        ({**FP8, "fmt": "e5m2"}, "with fmt 'e5m2'"),
        ({**FP8, "expert_dtype": "fp4"}, "with expert_dtype 'fp4'"),
        ({**FP8, "rotation": [1]}, r"with rotation \[1\]"),
        (compressed(INT4, "nvfp4-pack-quantized"), "'compressed-tensors', format 'nvfp4-pack-quantized' and weights"),
        (
            compressed({**INT4, "num_bits": 8}),
            "format 'pack-quantized' and weights .*num_bits': 8",
        ),
        (compressed({**INT4, "symmetric": False}), "with weights.symmetric False"),
        (compressed({**INT4, "actorder": "group"}), "with weights.actorder 'group'"),
        (compressed(None), "with weights. None"),
        (compressed({**ROWS, "strategy": "tensor"}, "float-quantized"), "format 'float-quantized' and weights"),
        (compressed(INT4, config_groups={}), r"with config_groups \{\}"),
        (compressed(INT4, transform_config={"R1": 1}), r"with transform_config \{'R1': 1\}"),
    ],
)
def test_other_methods(method: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_quantization({"model_type": "deepseek_v3", "quantization_config": method})


def test_forms_of_compressed_tensors() -> None:
    """fp8 with a scale for each row, as GLM-4.5 is released, or for each block, has the arithmetic of fp8."""
    blocks = {**ROWS, "strategy": "block", "block_structure": [128, 64]}
    forms = [read_quantization({"quantization_config": compressed(w, "float-quantized")}) for w in (ROWS, blocks)]
    assert [form and form.block for form in forms] == [(1, None), (128, 64)]
    assert forms[0] is not None
    codes = torch.tensor([[1.5, -448.0, 0.0], [2.0, 0.5, 3.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[0.25], [2.0]], dtype=torch.bfloat16)
    assert forms[0].scale_shape(2, 3) == [2, 1]
    assert forms[0].dequantize(codes, scales, torch.float32).tolist() == [[0.375, -112.0, 0.0], [4.0, 1.0, 6.0]]


def test_dtype_of_an_import(originals: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--dtype is 'float16', it must be one of float64, float32, bfloat16"):
        import_folder(originals["fp8"], tmp_path / "run", SHARD, dtype="float16")
    plain = shutil.copytree(originals["fp8"], tmp_path / "plain")
    change_config(plain, quantization_config=None)
    with pytest.raises(ValueError, match=r"--dtype is 'float32', but .*plain has no weights in fp8 or int4 blocks"):
        import_folder(plain, tmp_path / "run", SHARD, dtype="float32")
    make_peer("deepseek_v3").save_pretrained(tmp_path / "dequantized")
    change_config(tmp_path / "dequantized", quantization_config={**FP8, "weight_block_size": [8, 6]})
    first = HuggingFaceModel(tmp_path / "dequantized").notes[0]
    assert first.startswith("no weight is stored as fp8 (blocks of 8 x 6), though config.json has it"), first
    odd = shutil.copytree(originals["fp8"], tmp_path / "odd")
    change_config(odd, quantization_config={**FP8, "weight_block_size": [8, 6], "scale_fmt": "ue8m0"})
    with pytest.raises(ValueError, match=r"must be a power of two, as scale_fmt 'ue8m0' says; --dtype float32 takes"):
        import_folder(odd, tmp_path / "run", SHARD)
    assert HuggingFaceModel(odd, "float32").folder.dtype(Q) == "F32"
