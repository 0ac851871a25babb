"""A training step on TPU pods: the benchmark, and its committed results in the README."""

import importlib.util

import pytest

# Of ResNet-50: the stem, then in each stage three layers a block, and a shortcut's.
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
CHANNELS = 64 + sum(blocks * 6 * width + 4 * width for width, blocks in STAGES)
LAYERS = 1 + sum(blocks * 3 + 1 for _, blocks in STAGES)


def one_collective_each_way(row, layers, channels):
    assert row["layers"] == layers and row["other"] == []
    for way in ("forward", "backward"):
        reduces, arrays, size = row[way]
        # XLA may merge two layers' into one, never split one. Two float32 numbers a channel.
        assert 0 < reduces <= layers <= arrays <= 2 * layers, (row, way)
        # Backward two layers that meet in a sum have one gradient, and may share its sum.
        most = 2 * 4 * channels
        assert size == most if way == "forward" else most / 2 < size <= most, (row, way)


@pytest.mark.seconds(90, "it compiles for 256 chips")
@pytest.mark.optimized
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs: not installed"
)
def test_the_quick_form_finds_one_collective_each_way():
    from benchmarks import running, scaling
    from benchmarks.report import programs, speed

    found = running.run("scaling", scaling.plan(quick=True), "quick")
    block, stem = found["samples"]
    assert (block["program"], stem["program"]) == ("jit", "shard_map")
    assert block["devices"] == stem["devices"] == 256
    one_collective_each_way(block, layers=5, channels=8 + 6 * 8 + 4 * 8)
    one_collective_each_way(stem, layers=1, channels=8)
    table = programs.devices(found)
    assert [line[2:4] for line in table.rows] == [("v5e", "256")] * 2
    assert len(found["growth"]) == 2 * 3
    assert speed.growth(found).rows[0][:3] == ("LayerNorm", "rows", "64 to 128")


@pytest.fixture(scope="module")
def committed(from_the_repository):
    from benchmarks import records

    return records.read("scaling")


def test_the_committed_steps_have_one_collective_each_way(committed):
    topologies = {row["topology"] for row in committed["samples"]}
    assert topologies >= {"v5e:16x16", "v6e:16x16", "v5p:8x8x8", "tpu7x:2x2x1"}
    for row in committed["samples"]:
        if row["norm"] == "batch":
            one_collective_each_way(row, LAYERS, CHANNELS)
        else:
            # An example's statistics need no other example, so only gradients are summed.
            assert row["forward"] == row["backward"] == [0, 0, 0], row
            assert row["other"] == [] and row["in branches"] == [0, 0], row


def test_nothing_that_a_device_does_grows_with_their_number(committed):
    rows = {}
    for row in committed["samples"]:
        key = row["network"], row["norm"], row["program"], row["topology"].partition(":")[0]
        rows.setdefault(key, []).append(row)
    pairs = [pair for pair in rows.values() if len(pair) == 2]
    assert {pair[0]["network"] for pair in pairs} == {"ResNet-50", "transformer"}
    for small, large in pairs:
        assert large["devices"] >= 64 * small["devices"]
        for same in ("forward", "backward", "gradients", "other"):
            assert small[same] == large[same], (small, large)
        for cost in ("hbm bytes", "temp bytes"):
            # The compiler decides for each size what stays on chip. So a few percent are no growth.
            assert large[cost] <= 1.03 * small[cost], (small, large)
