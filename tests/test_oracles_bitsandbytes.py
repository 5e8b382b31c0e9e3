"""NF4, FP4 and double quantization against bitsandbytes' CPU backend, byte for byte."""

from __future__ import annotations

import pytest
import torch

from quantlib.formats import get_format
from quantlib.formats.codebook import FP4_VALUES, NF4_VALUES
from quantlib.formats.scales import DYNAMIC_MAP
from quantlib.testing import assert_same_bits, random_weight

from .cases import DTYPES

functional = pytest.importorskip(
    "bitsandbytes.functional", reason="the oracle bitsandbytes is not installed (pip install quantlib-kernels[oracles])"
)


def quantized(spec: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    fmt = get_format(spec)
    scales = fmt.fit(weight)
    return {"codes": fmt.encode(weight, scales), **scales}


def swap_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """bitsandbytes puts the first element of a pair into the high nibble, we into the low one."""
    return (packed >> 4) | (packed << 4)


def assert_decodes_as_bitsandbytes(decoded: torch.Tensor, packed: torch.Tensor, state: object) -> None:
    """Bit by bit, but for the sign of FP4's zeros: code 8 is +0 in bitsandbytes' table and on its AVX-512 path, as with us,
    and -0 on its paths for other CPUs. Adding zero folds -0 and changes no other value."""
    expected = functional.dequantize_4bit(packed, state)
    if state.quant_type == "fp4":  # type: ignore[attr-defined]
        decoded, expected = decoded + 0.0, expected + 0.0
    assert_same_bits(decoded, expected)


def adversarial(dtype: torch.dtype) -> torch.Tensor:
    """[96, 512]: trained-like, with zero rows, zero blocks, constants, ties of the code book, subnormals and huge values."""
    weight = random_weight(96, 512, torch.float32, seed=3)
    weight[0] = 0
    weight[1, 64:128] = 0
    weight[2] = 0.03
    weight[3] = -0.03
    for row, values in ((4, NF4_VALUES), (5, FP4_VALUES)):
        entries = torch.tensor(values).sort().values
        middle = (entries[:-1] + entries[1:]) / 2
        ties = torch.cat([middle, entries, middle.neg()])[:63]
        weight[row] = torch.nn.functional.pad(ties, (0, 64 - len(ties)), value=1.0).repeat(8)
        weight[row, 63::64] = 1.0
    smallest = torch.finfo(dtype).smallest_normal
    weight[6] = torch.linspace(-smallest, smallest, 512)
    weight[7] = torch.linspace(-3e4, 3e4, 512)
    weight[8, ::2] = -0.0
    if dtype != torch.float16:
        weight[9] = torch.linspace(-1e-39, 1e-39, 512)
        weight[10] = 1e-41
    return weight.to(dtype)


def test_value_tables_are_those_of_bitsandbytes() -> None:
    for name, values in (("nf4", NF4_VALUES), ("fp4", FP4_VALUES)):
        theirs = functional.get_4bit_type(name, device="cpu")
        assert_same_bits(torch.tensor(values), theirs)
    assert_same_bits(torch.tensor(DYNAMIC_MAP.entries), functional.create_dynamic_map())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["nf4", "fp4"])
@pytest.mark.parametrize(
    "make", [adversarial, lambda dtype: random_weight(257, 576, dtype, seed=1)], ids=["adversarial", "random"]
)
def test_codes_and_absmax_equal_bitsandbytes(spec: str, dtype: torch.dtype, make: object) -> None:
    weight = make(dtype)  # type: ignore[operator]
    parts = quantized(spec, weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=spec)
    assert_same_bits(parts["scales"].view(-1), state.absmax)
    assert_same_bits(swap_nibbles(parts["codes"]).view(-1, 1), packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(257, 576), (16, 64), (1024, 256)], ids=str)
def test_double_quantization_equals_bitsandbytes(spec: str, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = random_weight(*shape, dtype, seed=2)
    weight[1] = 0
    parts = quantized(f"{spec}-dq", weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=spec, compress_statistics=True)
    assert_same_bits(parts["scale_offset"], state.offset)
    assert_same_bits(parts["scale_absmax"], state.state2.absmax)
    assert_same_bits(parts["scales"].view(-1), state.absmax)
    assert_same_bits(swap_nibbles(parts["codes"]).view(-1, 1), packed)
    decoded = get_format(f"{spec}-dq").decode(parts, *shape, dtype=dtype)
    assert_decodes_as_bitsandbytes(decoded, packed, state)


@pytest.mark.parametrize("spec", ["nf4", "fp4"])
def test_double_quantization_of_equal_scales_stores_code_zero_as_bitsandbytes_does(spec: str) -> None:
    weight = torch.full((8, 256), 0.25)
    parts = quantized(f"{spec}-dq", weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=spec, compress_statistics=True)
    assert_same_bits(parts["scales"].view(-1), state.absmax)
    assert_same_bits(swap_nibbles(parts["codes"]).view(-1, 1), packed)
    assert torch.equal(get_format(f"{spec}-dq").decode(parts, 8, 256), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["nf4", "fp4"])
def test_decoding_equals_bitsandbytes_in_every_dtype(spec: str, dtype: torch.dtype) -> None:
    weight = random_weight(64, 512, dtype, seed=4)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=spec)
    decoded = get_format(spec).decode(quantized(spec, weight), 64, 512, dtype=dtype)
    assert_decodes_as_bitsandbytes(decoded, packed, state)


@pytest.mark.parametrize("spec", ["nf4", "fp4"])
@pytest.mark.parametrize("numel", [65, 1001, 64 * 7 + 63, 33])
def test_a_flattened_tensor_with_a_tail_equals_bitsandbytes(spec: str, numel: int) -> None:
    """Whole blocks are equal byte for byte. In the tail block bitsandbytes divides by absmax instead of multiplying by its
    reciprocal; codes there may differ next to a boundary alone (none of these does). The last, unpaired nibble is the code of
    a padding zero."""
    weight = random_weight(1, numel, seed=5)
    parts = quantized(spec, weight)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=spec)
    assert_same_bits(parts["scales"].view(-1), state.absmax)
    ours = swap_nibbles(parts["codes"]).view(-1)
    assert_same_bits(ours[: len(packed)], packed.view(-1))
    zero = {"nf4": 7, "fp4": 0}[spec]
    assert ours[len(packed) :].tolist() == [zero * 17] * (len(ours) - len(packed))


def test_a_tail_of_zeros_decodes_to_zero_though_bitsandbytes_stores_an_epsilon_for_it() -> None:
    weight = torch.zeros(1, 70)
    weight[0, :64] = 0.5
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    parts = quantized("nf4", weight)
    assert parts["scales"].tolist() == [[0.5, 0.0]]
    assert state.absmax.tolist()[1] == pytest.approx(1e-38)
    assert torch.equal(get_format("nf4").decode(parts, 1, 70), functional.dequantize_4bit(packed, state))
