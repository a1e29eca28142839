"""Files from anywhere either work or give one clear error: bounded here, at length with benchmarks.mutations."""

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from wemoe_fast.benchmarks import mutations
from wemoe_fast.benchmarks.mutations import TARGETS, Bench

pytest.importorskip("transformers")

BOUNDED = settings(
    max_examples=35,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def bench(request, tmp_path_factory):
    return Bench(TARGETS[request.param], tmp_path_factory.mktemp("mutations"))


@pytest.mark.parametrize("bench", list(TARGETS), indirect=True)
@BOUNDED
@given(seed=st.integers(0, 2**32))
def test_mutated_files_work_or_are_refused_in_one_message(bench, seed):
    assert bench.case(seed)[0] in ("worked", "refused")


@pytest.mark.parametrize("bench", ["weights of an expert"], indirect=True)
def test_a_header_truncated_anywhere_is_refused(bench):
    [name] = bench.target.files
    data = bench.originals[name]
    header = 8 + int.from_bytes(data[:8], "little")
    for length in [*range(0, header, header // 9), header - 1, header, header + 1, len(data) - 1]:
        outcome, message = bench.read(name, data[:length])
        assert outcome == "refused"
        assert "damaged" in message


@pytest.mark.parametrize("bench", ["weights of the base"], indirect=True)
@BOUNDED
@given(header=st.binary(max_size=200), size=st.integers(0, 2**64 - 1))
@example(header=b"{}", size=2)
@example(header=b"", size=2**60)
def test_arbitrary_bytes_are_no_checkpoint(bench, header, size):
    [name] = bench.target.files
    assert bench.read(name, size.to_bytes(8, "little") + header)[0] == "refused"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "I64"]) | JSON,
        "shape": st.lists(st.sampled_from([0, 1, 16, 2**40, 2**62]), max_size=5) | JSON,
        "data_offsets": st.lists(st.sampled_from([0, 4, 64, 2**40, 2**62]), min_size=2, max_size=2) | JSON,
    }
)


@pytest.mark.parametrize("bench", ["weights of the base"], indirect=True)
@BOUNDED
@given(content=st.dictionaries(st.text(max_size=8), ENTRY, max_size=4) | JSON)
def test_arbitrary_headers_are_no_checkpoint(bench, content):
    [name] = bench.target.files
    header = mutations.json.dumps(content).encode()
    assert bench.read(name, len(header).to_bytes(8, "little") + header + bytes(64))[0] == "refused"


def test_what_hangs_or_breaks_is_reported(tmp_path, monkeypatch):
    def broken(folder):
        if (folder / "x").read_bytes() != b"fine":
            raise KeyError("x")

    def hanging(folder):
        while (folder / "x").read_bytes() != b"fine":
            pass

    for name, read in (("broken", broken), ("hanging", hanging)):
        monkeypatch.setitem(TARGETS, name, mutations.Target(lambda f: (f / "x").write_bytes(b"fine"), ("x",), read))
    failures = mutations.run(["broken"], 2)["broken"].failures
    assert len(failures) == 2
    assert "KeyError" in failures[0]
    monkeypatch.setattr(mutations, "SECONDS", 0.1)
    failures = mutations.run(["hanging"], 2)["hanging"].failures
    assert len(failures) == 2
    assert "HangError" in failures[0]
