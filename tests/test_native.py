"""The CPU kernels by themselves, and how they are compiled; as a strategy test_ops has them."""

from __future__ import annotations

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import merged_inputs, relative_rms

from wemoe_fast import native as native_strategy
from wemoe_fast import plan
from wemoe_fast.activations import lookup
from wemoe_fast.errors import InputError
from wemoe_fast.kernels import ACTIVATIONS, native
from wemoe_fast.ops import merged_linear

pytestmark = pytest.mark.skipif(
    native.why_not(torch.float32, torch.float32) is not None, reason="there is no C compiler here"
)
EXACT = {torch.float32: 2e-6, torch.float64: 1e-14}
HALF = [torch.bfloat16, *([torch.float16] if native.why_not(torch.float16, torch.float16) is None else [])]
# around the columns of a panel, a tile's rows and depth, tokens of a block; every number of samples and of experts that
# is merged at once
SIZES = [
    (1, 1, 1, 1, 0),
    (3, 7, 33, 50, 3),
    (4, 5, 17, 70, 1),
    (9, 50, 64, 96, 8),
    (2, 130, 300, 37, 20),
    (17, 61, 257, 129, 4),
    (6, 2, 40, 20, 6),
]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing compiled yet, and kept in a folder of its own."""
    monkeypatch.setenv("WEMOE_FAST_NATIVE", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path
    native._library.cache_clear()


def operands(B, N, K, J, T, stored=torch.float32, real=torch.float32):
    x, dy = torch.randn(B, N, K).to(stored), torch.randn(B, N, J).to(stored)
    return (
        x,
        dy,
        torch.randn(1 + T, J, K).to(stored),
        torch.randn(B, 1 + T, dtype=real),
        torch.randn(1 + T, J, dtype=real),
    )


def product(x, stack, w, bias, y, lies=False, threads=1, pieces=()):
    """y_b = x_b W_b^T + w_b bias, or x_b W_b; x and stack in as many pieces as there are places to cut them."""
    sums = native.Sums(w, x.shape[1], slice(0, y.shape[2]), threads=threads)
    ends = (0, *pieces, x.shape[2])
    for a, b in itertools.pairwise(ends):
        part = stack[:, a:b] if lies else stack[:, :, a:b]
        sums.add(native.Packed(x[:, :, a:b], w.dtype, stack.shape[0], lies=lies, threads=threads), part, bias)
    sums.store(y)


def assert_exact(x, dy, stack, w, bias):
    """Every kernel against float64, to the rounding of the result."""
    real, stored = w.dtype, x.dtype
    exact = EXACT[real] if stored == real else torch.finfo(stored).eps
    weight = torch.einsum("bt,thd->bhd", w.double(), stack.double())
    y, dx = torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)
    product(x, stack, w, bias, y)
    assert relative_rms(y, x.double() @ weight.mT + (w.double() @ bias.double())[:, None]) <= exact
    product(x, stack, w, None, y)
    assert relative_rms(y, x.double() @ weight.mT) <= exact
    product(dy, stack, w, None, dx, lies=True)
    assert relative_rms(dx, dy.double() @ weight) <= exact
    dw = native.merged_product_dw(dy, x, stack, real, slice(0, dy.shape[2]))
    assert dw.dtype == torch.float64
    expected = torch.einsum("bnh,bnd,thd->bt", dy.double(), x.double(), stack.double())
    assert relative_rms(dw, expected) <= 20 * EXACT[real]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("stored", "real"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), *((dtype, torch.float32) for dtype in HALF)],
    ids=str,
)
def test_every_kernel_is_exact(size, stored, real, poisoned):
    assert_exact(*operands(*size, stored, real))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_stack_of_another_dtype_than_x(dtype):
    x, dy, stack, w, bias = operands(3, 7, 33, 50, 3)
    weight = torch.einsum("bt,thd->bhd", w.double(), stack.double())
    y = dy.to(dtype)
    product(x.to(dtype), stack, w, bias, y)
    expected = x.to(dtype).double() @ weight.mT + (w.double() @ bias.double())[:, None]
    assert relative_rms(y, expected) <= torch.finfo(dtype).eps
    product(x, stack.to(dtype), w, bias, dy)
    weight = torch.einsum("bt,thd->bhd", w.double(), stack.to(dtype).double())
    assert relative_rms(dy, x.double() @ weight.mT + (w.double() @ bias.double())[:, None]) <= EXACT[torch.float32]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_results_are_rounded_as_pytorch_rounds(dtype):
    """Ties to even, the largest numbers, infinities, NaN, and numbers below the smallest normal one."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11]
    numbers = torch.tensor([[*ties, 65519.0, 65520.0, 3.4e38, torch.inf, torch.nan, 1e-7, -0.0]])
    x, y = torch.zeros(1, 1, 3, dtype=dtype), torch.empty(1, 1, numbers.shape[1], dtype=dtype)
    stack = torch.zeros(1, numbers.shape[1], 3, dtype=dtype)
    product(x, stack, torch.ones(1, 1), numbers, y)
    expected = numbers.to(dtype)
    assert torch.equal(y[0].isnan(), expected.isnan())
    assert torch.equal(y[0].nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("real", EXACT, ids=str)
def test_some_columns_are_the_same_as_in_the_whole(real):
    x, dy, stack, w, bias = operands(3, 7, 33, 150, 3, real, real)
    for tokens, J, shift, lies in ((x, 150, bias, False), (dy, 33, None, True)):
        whole = x.new_empty(3, 7, J)
        product(tokens, stack, w, shift, whole, lies)
        for columns in (slice(0, 16), slice(5, 21), slice(16, J), slice(J - 1, J)):
            sums = native.Sums(w, 7, columns)
            sums.add(native.Packed(tokens, real, 4, lies=lies), stack, shift)
            part = whole.new_full((3, 7, J), 7.0)
            sums.store(part[:, :, columns])
            assert torch.equal(part[:, :, columns], whole[:, :, columns])
            assert (part[:, :, : columns.start] == 7).all()
            assert (part[:, :, columns.stop :] == 7).all()


def test_the_gradients_of_some_columns_add_up():
    x, dy, stack, _, _ = operands(3, 7, 33, 150, 3)
    parts = [native.merged_product_dw(dy, x, stack, torch.float32, slice(a, b)) for a, b in ((0, 40), (40, 150))]
    assert relative_rms(sum(parts), native.merged_product_dw(dy, x, stack, torch.float32, slice(0, 150))) < 1e-6


@pytest.mark.parametrize("B", [1, 3, 11])
@pytest.mark.parametrize("T", [2, 8, 60])
def test_added_up_in_pieces(B, T):
    """The same bits, and y is not read."""
    x, dy, stack, w, bias = operands(B, 7, 800, 520, T)
    for tokens, like, shift, lies in ((x, dy, bias, False), (dy, x, None, True)):
        whole, pieces = torch.full_like(like, torch.nan), torch.full_like(like, torch.nan)
        product(tokens, stack, w, shift, whole, lies)
        product(tokens, stack, w, shift, pieces, lies, pieces=(256, 512) if lies else (256, 768))
        assert torch.equal(pieces, whole)


def test_strided_operands():
    x, dy, stack, w, bias = operands(5, 9, 24, 40, 3)
    y, strided = torch.empty_like(dy), torch.zeros(9, 5, 2, 40)
    product(x, stack, w, bias, y)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    product(turned, stack, w, bias, strided[:, :, 1].transpose(0, 1))
    assert torch.equal(strided[:, :, 1].transpose(0, 1), y)
    assert not strided[:, :, 0].any()


@pytest.mark.parametrize("real", EXACT, ids=str)
def test_rows_a_page_apart(real):
    """Between them lies what is not theirs."""
    x, dy, *others = operands(2, 61, 300, 150, 3, real, real)
    pages = [torch.full((2, 61, 1024), torch.nan, dtype=real)[:, :, : t.shape[2]].copy_(t) for t in (x, dy)]
    assert_exact(*pages, *others)


@pytest.mark.parametrize("tokens", [1, 33, 70, 150, 220])
def test_gradients_of_more_tokens_than_are_under_way_at_once(tokens, monkeypatch, poisoned):
    """Some tokens of one sample at a time, or some samples."""
    rows, columns = native.library(torch.float32).outer
    x, dy, stack, w, bias = operands(7, 70, 24, 40, 3)
    monkeypatch.setattr(native, "GRADIENT_BYTES", tokens * (rows + columns) * 4)
    assert_exact(x, dy, stack, w, bias)


def test_what_products_keep_can_be_given_back(monkeypatch):
    """Kept by each thread for itself, as large as the largest yet."""
    monkeypatch.setattr(native, "_memory", native._Memory())
    small, large = operands(1, 3, 20, 30, 2), operands(5, 9, 40, 50, 2)
    found, sizes = [], []
    for x, dy, stack, w, bias in (small, large, small):
        found.append(torch.empty_like(dy))
        product(x, stack, w, bias, found[-1])
        sizes.append(sum(t.nbytes for t in native._memory._kept.values()))
    assert 0 < sizes[0] < sizes[1] == sizes[2]
    assert torch.equal(found[0], found[2])
    with ThreadPoolExecutor(1) as other:
        assert not other.submit(lambda: native._memory._kept).result()
    native.release()
    assert not native._memory._kept
    product(*small[:1], *small[2:], torch.empty_like(small[1]))


@pytest.mark.parametrize(
    ("share", "dtype"),
    [(1, torch.float32), (300_000, torch.float32), (1_000_000, torch.float32), *((60_000, dtype) for dtype in HALF)],
    ids=str,
)
def test_no_more_room_than_there_is(share, dtype, monkeypatch):
    """Samples, tokens, columns and numbers in pieces: the same bits."""
    inputs = merged_inputs(5, 30, 3, d=800, h=1100, dtype=dtype)
    dy = torch.randn(5, 30, 1100).to(dtype)
    wanted = [inputs[name] for name in ("x", "routing_weights")]
    found = []
    for bytes_each in (native_strategy.SHARE, share):
        monkeypatch.setattr(native_strategy, "SHARE", bytes_each)
        y = merged_linear(**inputs, strategy="native")
        with torch.no_grad():
            activated = merged_linear(**inputs, activation="gelu", strategy="native")
        found.append((y, activated, torch.autograd.grad(y, wanted, dy)[0]))
    for whole, pieces in zip(*found, strict=True):
        assert torch.equal(whole, pieces)


@pytest.mark.parametrize("size", [1 << 14, 1 << 16, 1 << 20])
def test_tiles_of_any_size_give_the_same(size, monkeypatch):
    monkeypatch.setattr(native, "TILE_BYTES", size)
    for T, lies in itertools.product((0, 8, 200), (True, False)):
        panels, depth, reach = native.library(torch.float32).tile(1 + T, lies, 3072)
        assert panels >= 1
        assert depth >= native.library(torch.float32).columns
        assert 256 % depth == reach % depth == 0
    assert_exact(*operands(2, 7, 300, 150, 20))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_token_depends_neither_on_the_batch_nor_on_other_tokens(dtype):
    inputs = merged_inputs(11, 70, 4, d=40, h=50, dtype=dtype)
    with torch.no_grad():
        whole = merged_linear(**inputs, strategy="native")
        for b, n in ((0, 70), (5, 13), (10, 1)):
            alone = {name: inputs[name][b : b + 1] for name in ("x", "routing_weights")}
            y = merged_linear(**{**inputs, **alone, "x": alone["x"][:, :n]}, strategy="native")
            assert torch.equal(y[0], whole[b, :n])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_workers_gives_the_same(threads, monkeypatch):
    monkeypatch.setattr(plan, "WORTH_SHARING", 0)
    inputs = merged_inputs(5, 20, 3, d=300, h=500)
    found = []
    for workers in (1, threads):
        monkeypatch.setattr(plan, "worker_count", lambda device, workers=workers: workers)
        found.append(merged_linear(**inputs, strategy="native"))
    assert torch.equal(*found)


@pytest.mark.parametrize("team", ["PyTorch's", "our own"])
@pytest.mark.parametrize("B", [1, 5])
def test_threads_share_out_the_parts(B, team, monkeypatch):
    """More threads than parts, and the other way round: the same bits."""
    if team == "our own":
        monkeypatch.setattr(native, "_team", lambda: None)
    elif native._team() is None:
        pytest.skip("PyTorch's threads are not within reach here")
    x, dy, stack, w, bias = operands(B, 20, 300, 500, 3)
    alone, alone_dx = torch.empty_like(dy), torch.empty_like(x)
    product(x, stack, w, bias, alone)
    product(dy, stack, w, None, alone_dx, lies=True)
    for threads, most in ((2, 32), (3, 500), (4, 96)):
        y, dx = torch.full_like(dy, torch.nan), torch.full_like(x, torch.nan)
        product(x, stack, w, bias, y, threads=threads)
        product(dy, stack, w, None, dx, lies=True, threads=threads)
        assert torch.equal(y, alone)
        assert torch.equal(dx, alone_dx)
        dw = [
            native.merged_product_dw(dy, x, stack, w.dtype, slice(0, 500), most=most, threads=n) for n in (1, threads)
        ]
        assert torch.equal(*dw)
        assert relative_rms(dw[0], torch.einsum("bnh,bnd,thd->bt", dy.double(), x.double(), stack.double())) <= 4e-5


def test_the_team_is_pytorchs():
    """The threads that PyTorch's OpenMP hands out follow PyTorch's number of threads."""
    if native._team() is None:
        pytest.skip("PyTorch's threads are not within reach here")
    found, threads = ctypes.CDLL(None).omp_get_max_threads, torch.get_num_threads()
    try:
        for number in (3, 1):
            torch.set_num_threads(number)
            assert found() == number
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("K", [1, 31, 1024, 1025, 2500])
def test_one_sample_by_itself_is_merged_as_in_a_batch(K):
    """The same bits, along rows shorter and longer than what is merged at once."""
    x, dy, stack, w, bias = operands(2, 70, K, 50, 8)
    both, first = torch.empty_like(dy), torch.empty_like(dy[:1])
    product(x, stack, w, bias, both)
    product(x[:1], stack, w[:1], bias, first)
    assert torch.equal(first[0], both[0])


def activated(numbers, activation):
    """One token of one number: as many columns as there are numbers."""
    J, one = numbers.shape[0], torch.ones(1, 1)
    y = torch.empty(1, 1, J)
    sums = native.Sums(one, 1, slice(0, J))
    sums.add(native.Packed(one.view(1, 1, 1), torch.float32, 1), numbers.view(1, J, 1), None, activation)
    sums.store(y)
    return y.view(J)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_activations_are_as_exact_as_those_of_pytorch(activation, scale):
    """Or exact but for rounding; no number by more than two units in its last place."""
    x, act = scale * torch.randn(100_003), lookup(activation)
    y, exact = activated(x, activation), act(x.double())
    eps = torch.finfo(torch.float32).eps
    assert relative_rms(y, exact) <= max(relative_rms(act(x), exact), eps / 2)
    assert ((y - exact).abs() <= 2 * eps * x.abs()).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_largest_and_the_smallest(activation):
    ends = [0.0, 1e-45, 1e-38, 13.0, 30.0, 87.0, 88.0, 89.0, 103.0, 105.0, 1e4, 1e20, 3.4e38, torch.inf]
    x = torch.tensor([*ends, *(-end for end in ends), torch.nan])
    y, expected = activated(x, activation), lookup(activation)(x)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_activations_in_float64_are_those_of_pytorch():
    inputs = merged_inputs(2, 5, 3, dtype=torch.float64)
    for activation in ACTIVATIONS:
        with torch.no_grad():
            y = merged_linear(**inputs, activation=activation, strategy="native")
            assert relative_rms(y, merged_linear(**inputs, activation=activation, strategy="reference")) <= 1e-14


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh", "mish"])
@pytest.mark.parametrize("size", [1, 1 << 12, 1 << 20])
def test_activated_in_pieces_or_as_a_whole(activation, size, monkeypatch):
    monkeypatch.setattr(native_strategy, "ACTIVATED_BYTES", size)
    monkeypatch.setattr(plan, "NATIVE_ROWS", 32)
    inputs = merged_inputs(3, 10, 2, d=20, h=150)
    with torch.no_grad():
        y = merged_linear(**inputs, activation=activation, strategy="native")
        inputs = {name: tensor.double() for name, tensor in inputs.items()}
        assert relative_rms(y, merged_linear(**inputs, activation=activation, strategy="reference")) <= 1e-6


def test_not_finite_weights_stay_with_their_sample():
    inputs = merged_inputs(3, 4, 2)
    inputs["routing_weights"].data[1, 0] = torch.nan
    with torch.no_grad():
        y = merged_linear(**inputs, strategy="native")
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_not_finite_numbers_stay_with_their_token():
    x, dy, stack, w, bias = operands(2, 7, 33, 50, 3)
    x[1, 2] = dy[1, 2] = torch.inf
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    product(x, stack, w, bias, y)
    product(dy, stack, w, None, dx, lies=True)
    for found in (y, dx):
        finite = found.isfinite()
        assert not finite[1, 2].any()
        assert finite.sum() == finite.numel() - finite.shape[2]


def test_auto_takes_them_and_says_so():
    inputs = merged_inputs(8, 50, 8, d=32, h=64)
    chosen = plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"])
    assert chosen.strategy == "native"
    assert "in cache" in chosen.reason
    alone = plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"][:1])
    assert alone.strategy == "native"
    assert "one merged weight" in alone.reason


def test_many_single_tokens_are_left_to_products_with_every_task_vector():
    for B, N, T, strategy in (
        (8, 1, 8, "native"),
        (9, 1, 8, "factored"),
        (512, 2, 8, "native"),
        (4, 1, 20, "factored"),
    ):
        inputs = merged_inputs(B, N, T)
        assert plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"]).strategy == strategy


def test_one_weight_for_a_batch_is_merged_once(monkeypatch):
    """As for one sample that has all tokens; and its gradients."""
    inputs = merged_inputs(5, 30, 3, d=40, h=50)
    inputs["routing_weights"] = inputs["routing_weights"].detach()[:1].requires_grad_()
    seen = []
    monkeypatch.setattr(native.Sums, "__init__", lambda self, w, *a, init=native.Sums.__init__, **k: (
        seen.append(w.shape[0]), init(self, w, *a, **k)
    )[1])  # fmt: skip
    wanted = [inputs[name] for name in ("x", "routing_weights")]
    found = []
    for strategy in ("native", "reference"):
        y = merged_linear(**inputs, strategy=strategy)
        found.append((y, *torch.autograd.grad(y, wanted, torch.ones_like(y))))
    for ours, expected in zip(*found, strict=True):
        assert ours.shape == expected.shape
        assert relative_rms(ours, expected) <= 2e-6
    assert set(seen) == {1}


def test_16_bit_products_are_left_to_processors_that_have_them(monkeypatch):
    inputs = merged_inputs(8, 50, 8, dtype=torch.bfloat16)
    for fast, strategy in ((True, "chunked"), (False, "native")):
        monkeypatch.setattr(plan, "cpu_has_fast_low_precision", lambda fast=fast: fast)
        assert plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"]).strategy == strategy


def test_narrower_vectors(fresh, monkeypatch):
    """What a processor without AVX is given."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        pytest.skip("this is such a processor")
    usual = native.library(torch.float32).columns
    native._library.cache_clear()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx"))
    assert native.library(torch.float32).columns < usual
    for stored, real in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        for size in SIZES:
            assert_exact(*operands(*size, stored, real))


def test_compiled_once_for_each_dtype(fresh, monkeypatch):
    native.library(torch.float32)
    (made,) = fresh.iterdir()
    assert made.suffix == ".so"
    native._library.cache_clear()
    commands = []
    monkeypatch.setattr(native, "_run", lambda command, run=native._run: commands.append(command) or run(command))
    native.library(torch.float32)
    assert [command[1:] for command in commands] == [["--version"]]
    native.library(torch.float64)
    assert len(list(fresh.iterdir())) == 2


def test_switched_off(monkeypatch):
    native._library.cache_clear()
    monkeypatch.setenv("WEMOE_FAST_NATIVE", "0")
    try:
        inputs = merged_inputs(8, 50, 8)
        assert plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"]).strategy == "chunked"
        with pytest.raises(InputError, match=r"'native': the CPU kernels are switched off .* use 'auto'"):
            merged_linear(**inputs, strategy="native")
    finally:
        native._library.cache_clear()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("SOURCE", "int broken(", "failed: "),
        ("CC", "/nowhere/cc", "no C compiler was found"),
        ("WEMOE_FAST_NATIVE", "/proc/nowhere", "cannot be kept in /proc/nowhere"),
    ],
)
def test_without_them_there_is_a_reason_and_another_strategy(name, value, reason, fresh, monkeypatch):
    if name == "SOURCE":
        source = fresh / "broken.c"
        source.write_text(value)
        monkeypatch.setattr(native, "SOURCE", source)
    else:
        monkeypatch.setenv(name, value)
    if name == "CC":
        monkeypatch.setattr(native.shutil, "which", lambda command: None)
    why = native.why_not(torch.float32, torch.float32)
    assert why is not None
    assert reason in why
    inputs = merged_inputs(8, 50, 8)
    assert plan.choose(inputs["x"], inputs["stack"], inputs["routing_weights"]).strategy == "chunked"
    assert not list(fresh.glob("*.so"))


def test_dtypes_that_do_not_go_together():
    assert native.why_not(torch.float32, torch.float64) == "torch.float64 is not supported beside torch.float32"
    assert native.why_not(torch.float64, torch.float32) == "torch.float32 is not supported beside torch.float64"
    assert native.why_not(torch.int8, torch.float32) == "torch.int8 is not supported beside torch.float32"
