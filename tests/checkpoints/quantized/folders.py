"""Quantized folders packed by hand, one number at a time, and the weights that they stand for.

The packing follows the readers of other programs: `dequantize_weight` of GPTQModel,
`dequantize_gemm` of AutoAWQ, `dequantize_4bit` of bitsandbytes and `weight_dequant` of DeepSeek-V3.
"""

import json

import torch
from safetensors.torch import load_file, save_file

from tests.helpers import random_model, tiny_args
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.quantize import formats

_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
NF4 = torch.tensor(formats.NF4)  # bitsandbytes has the same: test_peers.py
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 24], "activation_scheme": "dynamic"}


def words(rows, bits, order=range(8)):
    """Pack every 32 / bits rows of integers [m, n] into one row of words [m bits / 32, n]."""
    per_word = 32 // bits
    out = torch.zeros(-(-len(rows) // per_word), rows.size(1), dtype=torch.int64)
    for word in range(len(out)):
        for place in range(per_word):
            source = word * per_word + (order[place] if bits == 4 else place)
            if source < len(rows):
                out[word] |= rows[source].long() << bits * place
    return torch.where(out >= 1 << 31, out - (1 << 32), out).int()


def draw(shape, high, seed):
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def gptq(shape, seed, bits=4, group=16, version=1, symmetric=False, shuffled=False):
    """Tensors of a module, and its weight [out, in]."""
    outputs, inputs = shape
    group = group if group > 0 else inputs
    codes = draw((inputs, outputs), 1 << bits, seed)
    zeros = draw((inputs // group, outputs), (1 << bits) - 1, seed) + 1
    if symmetric:
        zeros[:] = 1 << bits - 1
    scales = (draw(zeros.shape, 200, seed) / 1000 + 0.01).half()
    group_of = torch.arange(inputs) // group
    if shuffled:
        group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
    weight = torch.stack(
        [
            (codes[i] - zeros[g]).float() * scales[g].float()
            for i, g in enumerate(group_of.tolist())
        ],
        1,
    )
    stored = zeros - int(version == 1)
    return {
        "qweight": words(codes, bits),
        "qzeros": words(stored.T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": group_of.int(),
    }, weight


def awq(shape, seed, group=16):
    outputs, inputs = shape
    codes = draw((inputs, outputs), 16, seed)
    zeros = draw((inputs // group, outputs), 16, seed + 1)
    scales = (draw(zeros.shape, 200, seed) / 1000 + 0.01).half()
    each = [one.repeat_interleave(group, 0).float() for one in (zeros, scales)]
    tensors = {
        "qweight": words(codes.T, 4, _AWQ).T.contiguous(),
        "qzeros": words(zeros.T, 4, _AWQ).T.contiguous(),
        "scales": scales,
    }
    return tensors, ((codes - each[0]) * each[1]).T


def bitsandbytes(shape, seed, block=64, nested=False):
    outputs, inputs = shape
    codes = draw((outputs * inputs,), 16, seed)
    blocks = -(-len(codes) // block)
    absmax = draw((blocks,), 200, seed) / 100 + 0.1
    state = {"quant_type": "nf4", "blocksize": block, "dtype": "float16", "shape": list(shape)}
    extra = {}
    if nested:
        table, small = torch.linspace(-1, 1, 256), draw((blocks,), 256, seed).byte()
        factors = torch.rand(-(-blocks // 4), generator=torch.Generator().manual_seed(seed))
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 1.5}
        extra = {"weight.nested_absmax": factors, "weight.nested_quant_map": table}
        absmax = [table[code] * factors[i // 4] + 1.5 for i, code in enumerate(small.tolist())]
        absmax = torch.stack(absmax)
    weight = [NF4[code] * absmax[i // block] for i, code in enumerate(codes.tolist())]
    pairs = [16 * a + b for a, b in codes.view(-1, 2).tolist()]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": torch.tensor(pairs, dtype=torch.uint8).view(-1, 1),
        "weight.absmax": small if nested else absmax,
        "weight.quant_map": NF4.clone(),
        "weight.quant_state.bitsandbytes__nf4": text,
        **extra,
    }, torch.stack(weight).view(shape)


def float8(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 16), -(-shape[1] // 24), generator=generator) + 0.1
    weight = torch.empty(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            weight[row, column] = codes[row, column].float() * scales[row // 16, column // 24]
    return {"weight": codes, "weight_scale_inv": scales}, weight


def config_of(bits=4, group=16, version=1, symmetric=False, shuffled=False, **others):
    layout = "gptq" if version == 1 else "gptq_v2"
    stated = {"bits": bits, "group_size": group, "checkpoint_format": layout}
    return {"quant_method": "gptq", **stated, "sym": symmetric, "desc_act": shuffled, **others}


def write(folder, config, pack):
    """Write a small Llama of which every projection is packed; return our names and weights."""
    args = tiny_args(hidden_dim=64, rope_layout="halves", tie_embeddings=True)
    save(random_model(args), folder, "hf", dtype="float16")
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for index, key in enumerate(sorted(key for key in tensors if "proj" in key)):
        packed, expected[key] = pack(tuple(tensors.pop(key).shape), index)
        tensors |= {key.removesuffix("weight") + name: one for name, one in packed.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, "quantization_config": config}))
    return expected


def dense_weights(folder, **options):
    """Return the weights of projections by their names in files."""
    names = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
    model, out = load(folder, **options), {}
    for i, block in enumerate(model.layers):
        for letter, name in names.items():
            out[f"model.layers.{i}.self_attn.{letter}_proj.weight"] = getattr(block.attention, name)
        for theirs, name in (("gate", "w_gate"), ("up", "w_value"), ("down", "w_out")):
            leaf = getattr(block.feed_forward, name)
            out[f"model.layers.{i}.mlp.{theirs}_proj.weight"] = leaf
    return {key: leaf.weight for key, leaf in out.items()}, model
