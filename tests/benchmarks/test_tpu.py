"""Passes of programs that the TPU compiler makes: known ones of Flax, and the benchmark's."""

import os

import pytest

pytest.importorskip("libtpu", reason="libtpu, which compiles for TPUs, is not installed")
pytestmark = pytest.mark.optimized


def test_passes_of_flax_alone():
    """Forward reads twice and writes once; backward reads x and dy twice and writes dx once."""
    from benchmarks import peers, tpu

    forward, both = tpu.operation_passes(peers.FLAX, "rms", (16384, 4096), "v5e:2x2x1")
    assert forward == pytest.approx(3, abs=0.01) and both == pytest.approx(7, abs=0.01)


def test_add_and_norm_returns_both():
    from benchmarks import peers, tpu

    forward, _ = tpu.compile_operation(peers.FLAX, "add rms", (512, 256), "v5e:2x2x1")
    (y, total), state = forward.out_info
    assert y.shape == total.shape == (512, 256) and state == {}


@pytest.mark.seconds(90, "it compiles in processes of their own")
def test_the_quick_form():
    from benchmarks import report, running, tpu

    found = running.run("tpu", tpu.plan(quick=True), "quick")
    peers = [peer.name for peer in tpu.PEERS]
    assert [row["peer"] for row in found["blocks"]] == peers
    assert [row["peer"] for row in found["alone"]] == [p for p in peers for _ in range(2)]
    for row in found["alone"]:
        # Small enough to stay on chip between its kernels: read once, written once.
        assert row["passes"] >= 2 and row["kernels"]
    for row in found["blocks"]:
        assert row["layers"] == 4 and row["passes"] > 0 < row["without"]["passes"]
        extra = (row["passes"] - row["without"]["passes"]) / 4
        assert row["extra passes"] == pytest.approx(extra, abs=0.01)
    assert len(report.tables(found)) == 3


def test_a_compiler_that_crashes_takes_only_itself_down():
    from benchmarks import tpu

    assert tpu.in_subprocess(os._exit, 1) is None
    assert tpu.in_subprocess(os.getpid) not in (None, os.getpid())
    with pytest.raises(ZeroDivisionError):
        tpu.in_subprocess(divmod, 1, 0)
