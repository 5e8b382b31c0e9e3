"""The emulator's Hopper part: barriers and their copies, the 128-byte swizzle, products of warpgroups."""

from __future__ import annotations

import platform
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.simt.build import build
from tests.simt.memory import SimtError, allowed, block_order

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator's fibers are written for x86-64")

PROBES = Path(__file__).parent / "simt" / "probes90.cpp"
DTYPES = {"half": torch.float16, "bf16": torch.bfloat16}
ORDERS = ["forward", "reverse", "random"]


@pytest.fixture(scope="module")
def probes() -> ModuleType:
    return build("simt_probes90", [PROBES])


# ----------------------------------------------------------------------------------------------------------------------- copies


def swizzled(offset: int) -> int:
    """Where the 128-byte swizzle puts a byte: bits 4..6 are xor-ed with bits 7..9."""
    return offset ^ (offset >> 7 & 7) << 4


@pytest.mark.parametrize("corner", [(0, 0), (3, 8), (-2, -16), (60, 40), (100, 0), (0, 100)])
@pytest.mark.parametrize(("swizzle", "box"), [(True, (16, 64)), (False, (16, 64)), (False, (5, 8)), (False, (256, 16))])
def test_a_tensor_copy_brings_its_box_and_zeros(
    probes: ModuleType, swizzle: bool, box: tuple[int, int], corner: tuple[int, int]
) -> None:
    matrix = torch.arange(1, 64 * 96 + 1, dtype=torch.int16).view(64, 96)[:, :88]
    out = torch.zeros(box[0] * box[1], dtype=torch.int16)
    with allowed(probes, {"matrix": matrix}, {"out": out}):
        tensor_map = probes.map_of(matrix.data_ptr(), 64, 88, 192, 2, *box, swizzle)
        probes.tensor_copy(tensor_map, corner[1], corner[0], out.data_ptr())
    for row in range(box[0]):
        for column in range(box[1]):
            r, c = corner[0] + row, corner[1] + column
            expected = matrix[r, c].item() if 0 <= r < 64 and 0 <= c < 88 else 0
            place = (row * box[1] + column) * 2
            assert out[(swizzled(place) if swizzle else place) // 2] == expected


def test_a_tensor_copy_stays_inside_known_memory(probes: ModuleType) -> None:
    matrix = torch.zeros(64, 64, dtype=torch.int16)
    out = torch.zeros(16 * 64, dtype=torch.int16)
    with allowed(probes, {"matrix": matrix[:20]}, {"out": out}), pytest.raises(SimtError, match="past the start of matrix"):
        probes.tensor_copy(probes.map_of(matrix.data_ptr(), 64, 64, 128, 2, 16, 64, True), 0, 16, out.data_ptr())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((8, 64, 100, 2, 8, 64, True), "multiple of 16 bytes apart"),
        ((8, 64, 112, 2, 8, 64, True), "must not overlap"),
        ((8, 64, 128, 2, 300, 64, True), "1 to 256"),
        ((8, 64, 128, 2, 8, 32, True), "rows of 128 bytes"),
        ((8, 64, 128, 2, 8, 4, False), "multiple of 16 bytes"),
        ((8, 64, 128, 3, 8, 64, True), "1, 2 or 4 bytes"),
    ],
)
def test_impossible_tensor_maps_are_refused(probes: ModuleType, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        probes.map_of(0x10000, *shape)


def test_bulk_copies(probes: ModuleType) -> None:
    source = torch.arange(256, dtype=torch.int32)
    target = torch.zeros_like(source)
    with allowed(probes, {"source": source}, {"target": target}):
        probes.bulk_copy(source.data_ptr(), target.data_ptr(), 1024)
        assert torch.equal(source, target)
        with pytest.raises(SimtError, match="multiple of 16 bytes"):
            probes.bulk_copy(source.data_ptr(), target.data_ptr(), 24)
        with pytest.raises(SimtError, match="misaligned"):
            probes.bulk_copy(source.data_ptr() + 4, target.data_ptr(), 64)
        with pytest.raises(SimtError, match="1008 bytes past the start of source"):
            probes.bulk_copy(source.data_ptr() + 1008, target.data_ptr(), 32)


@pytest.mark.parametrize("order", ORDERS)
def test_who_waits_for_one_barrier_has_not_waited_for_another(probes: ModuleType, order: str) -> None:
    source = torch.arange(32, dtype=torch.int32)
    target = torch.zeros_like(source)
    with allowed(probes, {"source": source}, {"target": target}), block_order(probes, order):
        probes.two_barriers(True, source.data_ptr(), target.data_ptr())
        assert torch.equal(source, target)
        with pytest.raises(SimtError, match="bulk copy"):
            probes.two_barriers(False, source.data_ptr(), target.data_ptr())


def test_groups_of_warps_meet_by_number(probes: ModuleType) -> None:
    out = torch.zeros(64, dtype=torch.int32)
    with allowed(probes, {}, {"out": out}):
        probes.groups(64, out.data_ptr())
        assert torch.equal(out, 63 - torch.arange(64, dtype=torch.int32))
        with pytest.raises(SimtError, match=r"race: read|nobody wrote"):
            probes.groups(0, out.data_ptr())
        with pytest.raises(SimtError, match=r"race: read|nobody wrote"):
            probes.groups(32, out.data_ptr())
        with pytest.raises(SimtError, match="deadlock"):
            probes.groups(96, out.data_ptr())


# --------------------------------------------------------------------------------------------------------------------- products
# The formulae of the PTX manual, "Register fragments for wgmma.mma_async.m64nNk16": thread t of the warpgroup, register i.


def a_place(t: int, i: int) -> tuple[int, int]:
    row = 16 * (t // 32) + t % 32 // 4 + (8 if i // 2 % 2 else 0)
    return row, t % 4 * 2 + i % 2 + (8 if i >= 4 else 0)


def d_place(t: int, i: int) -> tuple[int, int]:
    row = 16 * (t // 32) + t % 32 // 4 + (8 if i // 2 % 2 else 0)
    return row, i // 4 * 8 + t % 4 * 2 + i % 2


def gather(matrix: torch.Tensor, place: object, count: int) -> torch.Tensor:
    """[128, count]: what each thread of a warpgroup holds of a matrix of 64 rows."""
    assert callable(place)
    places = torch.tensor([[place(t, i) for i in range(count)] for t in range(128)])
    return matrix[places[..., 0], places[..., 1]].contiguous()


def a_words(w: torch.Tensor) -> torch.Tensor:
    """[M, K] -> [K / 16, M / 64 * 128, 4] words: the A registers of M / 64 warpgroups, step by step."""
    groups = [[gather(part, a_place, 8) for part in step.split(64, 0)] for step in w.split(16, 1)]
    return torch.stack([torch.cat(step) for step in groups]).view(torch.int32)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize("steps", [1, 4])
def test_wgmma_multiplies_by_the_manuals_fragments(probes: ModuleType, kind: str, n: int, steps: int) -> None:
    generator = torch.Generator().manual_seed(n)
    w, x, c = (torch.randint(-9, 10, shape, generator=generator).float() for shape in ((64, 64), (n, 64), (64, n)))
    w = w[:, : 16 * steps]
    a, b = a_words(w.to(DTYPES[kind])), x.to(DTYPES[kind])
    d = gather(c, d_place, n // 2)
    with allowed(probes, {"a": a, "b": b}, {"d": d}):
        tensor_map = probes.map_of(b.data_ptr(), n, 64, 128, 2, n, 64, True)
        probes.wgmma(kind == "half", n, tensor_map, a.data_ptr(), d.data_ptr(), steps)
    assert torch.equal(d, gather(w @ x[:, : 16 * steps].T + c, d_place, n // 2))


def e4m3_product(
    probes: ModuleType, w: torch.Tensor, x: torch.Tensor, c: torch.Tensor, steps: int = 4, add: bool = True, mistake: str = ""
) -> torch.Tensor:
    """c, or nothing, + w x^T of the first columns of w [64, 128] and x [N, 128] in the order of the accumulators."""
    n = len(x)
    a, b = w.to(torch.float8_e4m3fn).view(torch.uint8), x.to(torch.float8_e4m3fn).view(torch.uint8)
    d = gather(c, d_place, n // 2)
    with allowed(probes, {"a": a, "b": b}, {"d": d}):
        maps = [probes.map_of(each.data_ptr(), len(each), 128, 128, 1, len(each), 128, True) for each in (a, b)]
        probes.wgmma_e4m3(n, *maps, d.data_ptr(), steps, add, mistake)
    return d


def e4m3_matrices(n: int) -> list[torch.Tensor]:
    """w [64, 128], x [n, 128] and c [64, n]: of whole numbers, whose sums 13 bits hold."""
    generator = torch.Generator().manual_seed(n)
    return [torch.randint(-4, 5, shape, generator=generator).float() for shape in ((64, 128), (n, 128), (64, n))]


@pytest.mark.parametrize("n", [16, 32, 64, 128])
@pytest.mark.parametrize("steps", [1, 3, 4])
@pytest.mark.parametrize("add", [True, False])
def test_wgmma_multiplies_e4m3_from_shared_memory(probes: ModuleType, n: int, steps: int, add: bool) -> None:
    """The accumulators lie as for 16-bit numbers ("wgmma.mma_async.m64nNk32": D)."""
    w, x, c = e4m3_matrices(n)
    expected = w[:, : 32 * steps] @ x[:, : 32 * steps].T + (c if add else 0)
    assert torch.equal(e4m3_product(probes, w, x, c, steps, add), gather(expected, d_place, n // 2))


def test_wgmma_knows_every_number_of_e4m3(probes: ModuleType) -> None:
    """Subnormal numbers, both zeros and NaN, each times one."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for half in codes.split(128):
        w, x = torch.zeros(64, 128), torch.zeros(128, 128)
        x[:, 0], w[:, 0] = half, 1.0
        found = e4m3_product(probes, w, x, torch.zeros(64, 128), add=False)
        assert torch.equal(found.nan_to_num(7.0), gather(half.expand(64, 128).nan_to_num(7.0), d_place, 64))


def test_sums_of_e4m3_keep_13_bits_after_the_point(probes: ModuleType) -> None:
    """Of 2^13 + 1/2, and of that with the sign turned; a sum of 16-bit numbers keeps 23."""
    w, x, c = torch.zeros(64, 128), torch.zeros(16, 128), torch.full((64, 16), 2.0**13)
    w[:, 0], x[:, 0] = 0.5, 1.0
    assert (e4m3_product(probes, w, x, c) == 2.0**13).all()
    assert (e4m3_product(probes, -w, x, -c) == -(2.0**13)).all()
    assert (e4m3_product(probes, 2 * w, x, c) == 2.0**13 + 1).all()


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("no wait for the copies", "bulk copy"),
        ("A overwritten", "race: write|the A of the wgmma .* was overwritten"),
        ("descriptors differ", "descriptors differ"),
    ],
)
def test_mistakes_with_operands_in_shared_memory_are_found(probes: ModuleType, mistake: str, words: str) -> None:
    with pytest.raises(SimtError, match=words):
        e4m3_product(probes, *e4m3_matrices(16), mistake=mistake)


@pytest.mark.parametrize("by_copy", [False, True])
def test_wgmma_sees_ordinary_stores_by_fence_and_barrier(probes: ModuleType, by_copy: bool) -> None:
    ones = torch.ones(16, 64, dtype=torch.float16)
    y = torch.zeros(128, 8)
    with allowed(probes, {"ones": ones}, {"y": y}):
        probes.stored_b(True, True, by_copy, ones.data_ptr(), y.data_ptr())
        assert (y == 16).all()
        with pytest.raises(SimtError, match="without a fence_proxy_async"):
            probes.stored_b(False, True, by_copy, ones.data_ptr(), y.data_ptr())
        with pytest.raises(SimtError, match="race: read"):
            probes.stored_b(True, False, by_copy, ones.data_ptr(), y.data_ptr())


def test_sums_are_there_when_their_group_has_been_waited_for(probes: ModuleType) -> None:
    ones = torch.ones(16, 64, dtype=torch.float16)
    y = torch.zeros(128, 8)
    with allowed(probes, {"ones": ones}, {"y": y}):
        probes.two_groups(True, ones.data_ptr(), y.data_ptr())
        assert (y == 32).all()
        probes.two_groups(False, ones.data_ptr(), y.data_ptr())
        assert y.isnan().all()


# --------------------------------------------------------------------------------------------------------------------- pipeline

MISTAKES = {
    "no init fence": "no barrier_init_fence",
    "no sync after init": "no sync_threads in between|no barrier was prepared",
    "no wait for empty": "in flight|race: write|arrival too many",
    "too many bytes": "(?s)deadlock.*4112 bytes announced, 4096 under way",
    "too few bytes": "for which 4080 were announced",
    "no wait for full": "bulk copy|nobody wrote",
    "wrong parity": "bulk copy|nobody wrote|deadlock",
    "no wgmma_fence": "without a wgmma_fence",
    "A written after the fence": "written after the wgmma_fence",
    "A written before the wait": "A registers .* written, or ended, before its wgmma_wait",
    "one warp missing": "divergent warp|deadlock|never come",
    "no wgmma_commit": "sums of .* touched|overwritten|in flight|bulk copy|without wgmma_wait|without a wgmma_fence",
    "no wgmma_wait": "without wgmma_wait|in flight|bulk copy",
    "sums touched": "sums of .* touched",
    "released before the wait": "race: write|in flight|bulk copy",
    "two arrivals": "one arrival too many|race: write|in flight|bulk copy|deadlock",
    "touches a barrier": "belongs to a barrier",
}


def run_pipeline(probes: ModuleType, mistake: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    w, x = (torch.randint(-4, 5, (rows, 512), generator=generator).half() for rows in (128, 32))
    a = a_words(w)
    y = torch.zeros(256, 16)
    with allowed(probes, {"w": a, "x": x}, {"y": y}):
        tensor_map = probes.map_of(x.data_ptr(), 32, 512, 1024, 2, 32, 64, True)
        probes.pipeline(tensor_map, a.data_ptr(), y.data_ptr(), 512, mistake)
    product = w.float() @ x.float().T
    return y, torch.cat([gather(part, d_place, 16) for part in product.split(64)])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("seed", range(3))
def test_a_producer_and_two_consumers_multiply(probes: ModuleType, order: str, seed: int) -> None:
    with block_order(probes, order, seed):
        found, expected = run_pipeline(probes, "")
    assert torch.equal(found, expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_pipeline_is_found(probes: ModuleType, mistake: str, order: str) -> None:
    with block_order(probes, order), pytest.raises(SimtError, match=MISTAKES[mistake]):
        run_pipeline(probes, mistake)
