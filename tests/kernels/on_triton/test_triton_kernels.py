"""What is particular to the Triton backend: every configuration, both paths of the read, the work list, addresses.

Runs on a GPU, or on CPU tensors with TRITON_INTERPRET=1: test_triton_without_gpu.py does that where there is no GPU.
"""

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eap_kernels as ek
from eap_kernels import testing
from eap_kernels.triton import configs
from eap_kernels.triton.head_space_scores import Group, expand

DEVICES = [device for impl, device in testing.backends_on_devices() if impl == "triton"]
pytestmark = pytest.mark.skipif(not DEVICES, reason=str(ek.backends()["triton"]))
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "tf32": (torch.float32,),
    "fp32": (torch.float32,),
    "fp64": (torch.float64,),
}


def eps(kind):
    return testing.TF32_EPS if kind == "tf32" else None


def tiles(table):
    """Every entry once; one that stands under both sizes of shared memory as a small one."""
    entries = {(kind, tile): memory for memory in ("large", "small") for kind in DTYPES for tile in table[memory][kind]}
    return [
        pytest.param(memory, kind, tile, id=f"{memory}-{kind}-{tile.rows}x{tile.columns}x{tile.inner}")
        for (kind, tile), memory in entries.items()
    ]


@pytest.fixture(params=DEVICES or ["cpu"], autouse=True)
def on(request):
    with torch.device(request.param):
        yield request.param


@pytest.fixture
def use(monkeypatch, fp32_precision, on):
    """Makes one tile the only choice of an operator."""

    def only(table, memory, kind, tile):
        if on == "cuda" and memory == "large" != configs.memory(torch.device(on)):
            pytest.skip("this device has too little shared memory for the tile")
        monkeypatch.setattr(configs, "memory", lambda device: memory)
        monkeypatch.setitem(table[memory], kind, (tile,))
        fp32_precision("tf32" if kind == "tf32" else "ieee")

    return only


@pytest.mark.parametrize(("memory", "kind", "tile"), tiles(configs.EDGE_SCORES))
def test_every_tile_of_edge_scores(memory, kind, tile, use, on, generator):
    """A little more than one tile in each direction, and two chunks."""
    use(configs.EDGE_SCORES, memory, kind, tile)
    senders, receivers, tokens, features = tile.rows + 3, tile.columns + 5, 8, tile.inner + 1
    reach = torch.randint(0, senders + 1, (receivers,), generator=generator, device="cpu")
    for dtype in DTYPES[kind]:
        delta = testing.random_tensor((senders, tokens, features), dtype, generator, "tokens_first", on)
        grad = testing.random_tensor((receivers, tokens, features), dtype, generator, device=on)
        scores, reference = (ek.edge_scores(delta, grad, reach, impl=impl) for impl in ("triton", "reference"))
        testing.assert_close(scores, reference, testing.edge_scores_oracle(delta, grad, reach), eps(kind))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_long_sums_are_as_exact_as_short_ones(kind, on, monkeypatch, generator):
    """All of it in one chunk. Matrix units round each step towards zero: in one run, a sum of 2^20 products would be
    far outside the tolerance."""
    monkeypatch.setattr(configs, "PROCESSORS", 1)
    tokens, rows = (256, 64) if on == "cuda" else (2, 5)
    delta, grad = (testing.random_tensor((rows, tokens, 4096), kind, generator, device=on) for _ in range(2))
    reach = torch.full((rows,), rows, device="cpu")
    scores, reference = (ek.edge_scores(delta, grad, reach, impl=impl) for impl in ("triton", "reference"))
    testing.assert_close(scores, reference, testing.edge_scores_oracle(delta, grad, reach))


@pytest.mark.parametrize("features", [48, 37])
@pytest.mark.parametrize("kind", DTYPES)
def test_expanded_rows(kind, features, on, fp32_precision):
    """In pieces of 16 bytes and element by element; weights as they are, transposed, shared and absent. A row is
    rounded once, whatever its terms."""
    fp32_precision("tf32" if kind == "tf32" else "ieee")
    tokens, inner, points = 35, 24, 3
    for dtype in DTYPES[kind]:
        normal = partial(torch.randn, dtype=dtype)
        x, transposed = normal(points, tokens, features), normal(2, features, inner).mT
        nodes = [
            ek.Nodes(normal(tokens, 4, inner), normal(2, inner, features), normal(4, points, tokens), x),
            ek.Nodes(normal(tokens, 1, features)),
            ek.Nodes(normal(tokens, 2, inner), transposed, normal(2, points, tokens), x),
        ]
        none = torch.empty(0, dtype=dtype)
        parts = ((g.values, g.weight, g.coefficients, g.normalised) for g in nodes)
        groups = [Group(*(none if part is None else part for part in each)) for each in parts]
        assert all(group.aligned() for group in groups) == (features == 48)
        rows, size = testing.expanded(nodes)
        parts = [expand(groups, some, features, dtype, kind == "tf32") for some in (slice(20), slice(20, None))]
        found = torch.cat(parts, 1)
        assert found.dtype == dtype
        # Each sum of the terms costs half an eps, and so does the one rounding to the rows' dtype.
        sums = (inner + points + 1) * torch.finfo(torch.float64 if kind == "fp64" else torch.float32).eps / 2
        once = eps(kind) or torch.finfo(dtype).eps / 2
        assert ((found.double().cpu() - rows).abs() <= (once + sums) * size).all()


def test_head_space_scores_tile_by_tile(on):
    """Twenty tokens in tiles of seven; test_head_space_scores.py has more where there is a GPU."""
    x = torch.randn(2, 20, 16)
    senders = [ek.Nodes(torch.randn(20, 1, 16)), ek.Nodes(torch.randn(20, 2, 8), torch.randn(2, 8, 16))]
    receivers = [ek.Nodes(torch.randn(20, 2, 8), torch.randn(1, 8, 16), torch.randn(2, 2, 20), x)]
    reach = torch.tensor([1, 3], device="cpu")
    workspace = 7 * (3 + 2) * 16 * 4
    scores = ek.head_space_scores(senders, receivers, reach, impl="triton", workspace=workspace)
    reference = ek.head_space_scores(senders, receivers, reach, impl="reference")
    testing.assert_close(scores, reference, testing.head_space_scores_oracle(senders, receivers, reach))


@pytest.mark.parametrize(("memory", "kind", "tile"), tiles(configs.MASKED_READ))
def test_every_tile_of_masked_read(memory, kind, tile, use, on, monkeypatch, generator):
    use(configs.MASKED_READ, memory, kind, tile)
    check_read(2 * tile.inner + 1, tile.rows + 3, tile.columns + 1, 0.0, kind, on, monkeypatch, generator)


@pytest.mark.parametrize("kind", DTYPES)
def test_sparse_masked_read(kind, on, monkeypatch, generator):
    check_read(9, 5, 1025, math.inf, kind, on, monkeypatch, generator)


def check_read(senders, receivers, features, sparse, kind, on, monkeypatch, generator):
    monkeypatch.setattr(configs, "SPARSE", dict.fromkeys(configs.SPARSE, sparse))
    weights = torch.randn(senders, receivers, generator=generator, device="cpu").to(on)
    kept = weights > 0.5
    share = None if sparse else eps(kind)
    for dtype in DTYPES[kind]:
        delta = testing.random_tensor((senders, 2, features), dtype, generator, "padded", on)
        base = testing.random_tensor((receivers, 2, features), dtype, generator, device=on)
        for mask in {kept.dtype: kept, dtype: (kept * weights).to(dtype), torch.float32: kept * weights}.values():
            y, reference = (ek.masked_read(base, delta, mask, impl=impl) for impl in ("triton", "reference"))
            testing.assert_close(y, reference, testing.masked_read_oracle(base, delta, mask), share)


@pytest.mark.parametrize("path", [0.0, math.inf])
def test_soft_masks_are_not_rounded(path, monkeypatch):
    monkeypatch.setattr(configs, "SPARSE", dict.fromkeys(configs.SPARSE, path))
    mask = torch.tensor([[1 + 2**-20], [-1.0]])
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        delta = torch.ones(2, 1, 16, dtype=dtype)
        y = ek.masked_read(torch.zeros_like(delta[0]), delta, mask, impl="triton")
        assert (y == 2**-20).all()


@pytest.mark.parametrize("path", [0.0, math.inf])
@pytest.mark.parametrize("weight", [1.0, 1 / 3, -0.3])
def test_infinite_values_keep_their_sign(path, weight, monkeypatch):
    """An infinite value must not meet the parts of a split mask with different signs."""
    monkeypatch.setattr(configs, "SPARSE", dict.fromkeys(configs.SPARSE, path))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        delta = torch.full((1, 1, 16), math.inf, dtype=dtype)
        y = ek.masked_read(torch.ones_like(delta[0]), delta, torch.tensor([[weight]]), impl="triton")
        assert (y == math.copysign(math.inf, weight)).all()


def test_the_sparse_path_reads_kept_edges_only(monkeypatch):
    monkeypatch.setattr(configs, "SPARSE", dict.fromkeys(configs.SPARSE, math.inf))
    delta = torch.ones(3, 2, 4)
    delta[1] = math.nan
    mask = torch.tensor([[True, True], [True, False], [False, True]])
    y = ek.masked_read(delta[0], delta, mask, impl="triton")
    assert y[0].isnan().all()
    assert (y[1] == 3).all()


def small_integers(generator, *shape):
    """Every sum of their products is exact, in whatever order."""
    return torch.randint(-2, 3, shape, generator=generator, device="cpu").to(torch.get_default_device(), torch.float32)


def far_apart(x, dim):
    """x [2, 2, 2] where one step in `dim` is more than 2^31 elements. Only the pages that are touched take memory."""
    stride = {0: (2**31 + 16, 2, 1), 1: (2, 2**31 + 16, 1), 2: (2, 1, 2**31 + 16)}[dim]
    return torch.empty(2**31 + 32, dtype=x.dtype).as_strided(x.shape, stride).copy_(x)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["delta", "grad", "out"])
def test_scores_of_tensors_beyond_two_to_the_31_elements(name, dim, generator):
    args = {name: small_integers(generator, 2, 2, 2) for name in ("delta", "grad", "out")}
    rest = {"reach": torch.tensor([1, 2], device="cpu"), "segments": torch.tensor([1, 0], device="cpu")}
    expected = ek.edge_scores(**{**args, "out": args["out"].clone()}, **rest, impl="reference")
    args[name] = far_apart(args[name], dim)
    assert torch.equal(ek.edge_scores(**args, **rest, impl="triton"), expected)


@pytest.mark.parametrize("path", [0.0, math.inf])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("name", ["base", "delta"])
def test_reads_of_tensors_beyond_two_to_the_31_elements(name, dim, path, monkeypatch, generator):
    monkeypatch.setattr(configs, "SPARSE", dict.fromkeys(configs.SPARSE, path))
    args = {name: small_integers(generator, 2, 2, 2) for name in ("base", "delta")}
    mask = torch.tensor([[True, False], [True, True]])
    expected = ek.masked_read(**args, mask=mask, impl="reference")
    args[name] = far_apart(args[name], dim)
    assert torch.equal(ek.masked_read(**args, mask=mask, impl="triton"), expected)


def test_many_segments_go_through_a_small_workspace(monkeypatch, generator):
    from eap_kernels.triton import edge_scores

    delta, grad = small_integers(generator, 5, 40, 3), small_integers(generator, 7, 40, 3)
    reach = torch.tensor([0, 5, 2, 3, 1, 5, 4], device="cpu")
    segments = torch.randint(0, 12, (40,), generator=generator, device="cpu")
    expected = ek.edge_scores(delta, grad, reach, segments=segments, impl="reference")
    monkeypatch.setattr(edge_scores, "WORKSPACE", 200_000)
    edge_scores.schedule.cache_clear()
    assert torch.equal(ek.edge_scores(delta, grad, reach, segments=segments, impl="triton"), expected)
    edge_scores.schedule.cache_clear()


@given(
    reach=st.lists(st.integers(0, 90), max_size=70),
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    blocks=st.integers(1, 40),
    limit=st.sampled_from([1, 10**5, 10**9]),
)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_work_list_is_the_staircase_once(monkeypatch, reach, lengths, blocks, limit):
    """Every entry lies in one tile, every tile holds an entry; every step in one chunk, every chunk in one segment."""
    from eap_kernels.triton import edge_scores

    tile = configs.Tile(16, 8, 32, 4, 3, 1.0)
    depths = sorted(depth for depth in reach if depth)
    padded = [0] * (-len(depths) % tile.columns) + depths
    work = edge_scores._tiles(depths, tile)
    assert len(set(work)) == len(work)
    entries = {(u // tile.rows, j // tile.columns) for j, depth in enumerate(padded) for u in range(depth)}
    assert set(work) == entries

    monkeypatch.setattr(edge_scores, "WORKSPACE", limit)
    bytes_of_a_chunk = 4 * tile.rows * tile.columns * max(1, len(work))
    launches = edge_scores._launches(dict(enumerate(lengths)), blocks, max(1, len(work)), bytes_of_a_chunk, tile)
    step, numbers = 0, []
    for chunks, segments in launches:
        assert len(segments) == 1 or len(chunks) * bytes_of_a_chunk <= limit
        assert [first for _, first, _ in segments] == [0, *(last for _, _, last in segments[:-1])]
        for number, first, last in segments:
            numbers.append(number)
            for begin, end in chunks[first:last]:
                assert begin == step < end
                step = end
            assert step == sum(lengths[: number + 1]) * blocks
    assert numbers == list(range(len(lengths)))
