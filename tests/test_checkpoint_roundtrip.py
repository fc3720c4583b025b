"Any cut of a tensor that was saved loads as any other cut, bit for bit; gaps and overlaps are always found"

import math
import multiprocessing as mp
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from internlm_nb.checkpoint.durable import CheckpointError, sibling
from internlm_nb.checkpoint.logical import gather_state, load_into, load_weights, save_state
from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.checkpoint.regions import Chunk, Region, check_cover, range_boxes, region_boxes, transfer, whole
from internlm_nb.checkpoint.shards import SAFE_NAMES, Shard, checksum, write_shard
from internlm_nb.checkpoint.writer import Writer

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_v1"
LAW = settings(deadline=None, derandomize=True, max_examples=120)
shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


def random_bits(shape, dtype, seed):
    "A tensor of random bit patterns, NaNs and infinities among them; booleans are 0 or 1"
    gen = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=gen, dtype=torch.uint8).bool()
    return (
        torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), generator=gen, dtype=torch.uint8)
        .view(dtype)
        .view(shape)
    )


def bits(tensor):
    "Type, shape and bytes, element by element: equality that NaN, -0.0 and strides cannot blur"
    return (
        tensor.dtype,
        tuple(tensor.shape),
        torch.cat(
            [torch.empty(0, dtype=torch.uint8), *(x.reshape(1).clone().view(torch.uint8) for x in tensor.reshape(-1))]
        ).tolist(),
    )


def cut(data, low, high, most=3):
    "Draw an ordered partition of low:high, empty parts allowed"
    points = sorted(data.draw(st.lists(st.integers(low, high), max_size=most)))
    return list(zip([low, *points], [*points, high]))


def draw_regions(data, shape):
    "Draw regions that cover a shape once: a grid of boxes, some of them cut again into flat ranges"
    boxes = [((), ())]
    for size in shape:
        boxes = [
            ((*o, a), (*n, b - a))
            for o, n in boxes
            for a, b in (cut(data, 0, size, 1) if len(boxes) < 8 else [(0, size)])
        ]
    out = []
    for offsets, sizes in boxes:
        if data.draw(st.booleans()):
            out += [Region(offsets, sizes, a, b) for a, b in cut(data, 0, math.prod(sizes))]
        else:
            out.append(Region(offsets, sizes))
    return out


def draw_region(data, shape):
    "Draw any region of a shape"
    spans = [sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n)))) for n in shape]
    offsets, sizes = tuple(a for a, _ in spans), tuple(b - a for a, b in spans)
    if data.draw(st.booleans()):
        return Region(offsets, sizes)
    a, b = sorted((data.draw(st.integers(0, math.prod(sizes))), data.draw(st.integers(0, math.prod(sizes)))))
    return Region(offsets, sizes, a, b)


def take(tensor, region):
    "The oracle: slice, flatten, slice"
    box = tensor[tuple(slice(o, o + n) for o, n in zip(region.offsets, region.sizes))]
    return box if region.is_box else box.reshape(-1)[region.start : region.stop]


def as_chunk(tensor, region, shape):
    "A chunk for a region"
    return Chunk(
        tensor, shape, offsets=region.offsets, sizes=None if region.is_box else region.sizes, start=region.start
    )


@given(shapes, st.data())
@LAW
def test_a_range_is_at_most_2d_minus_1_contiguous_boxes(shape, data):
    count = math.prod(shape)
    start, stop = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    boxes = range_boxes(shape, start, stop)
    assert len(boxes) <= max(2 * len(shape) - 1, 1)
    ids = torch.arange(count).view(shape)
    got = [i for o, n in boxes for i in ids[tuple(slice(a, a + b) for a, b in zip(o, n))].reshape(-1).tolist()]
    assert got == list(range(start, stop))


@given(shapes, st.data())
@LAW
def test_transfer_copies_exactly_the_overlap(shape, data):
    source, target = draw_region(data, shape), draw_region(data, shape)
    ids = torch.arange(math.prod(shape)).view(shape)
    filled = torch.full(target.shape, -1)
    copied = transfer(take(ids, source).clone(), source, filled, target)
    shared = torch.isin(take(ids, target).contiguous(), take(ids, source).contiguous())
    assert copied == int(shared.sum())
    assert torch.equal(filled, torch.where(shared, take(ids, target), -1))


@given(shapes, st.sampled_from(list(SAFE_NAMES)), st.integers(0, 2**31), st.data())
@LAW
def test_any_cut_loads_as_any_other(shape, dtype, seed, data):
    tensor = random_bits(shape, dtype, seed)
    ranks = data.draw(st.integers(1, 4))
    limit = data.draw(st.sampled_from([1, 40, 1 << 30]))  # a file per tensor, a few, one
    with tempfile.TemporaryDirectory() as place:
        writers = [Writer(Path(place) / "1", r, ranks, shard_bytes=limit) for r in range(ranks)]
        for region in draw_regions(data, shape):
            piece = (
                take(tensor, region).clone() if data.draw(st.booleans()) else take(tensor, region)
            )  # not contiguous too
            writers[data.draw(st.integers(0, ranks - 1))].add("w", as_chunk(piece, region, shape))
        for writer in writers:
            writer.write()
        writers[0].commit({"seed": seed})
        checkpoint = Checkpoint(Path(place) / "1")
        checkpoint.verify()
        assert checkpoint.state == {"seed": seed}
        assert bits(checkpoint.read("w")) == bits(tensor)
        for _ in range(3):
            region = draw_region(data, shape)
            want = take(tensor, region)
            if region.is_box:
                assert bits(checkpoint.read_box("w", region.offsets, region.sizes)) == bits(want)
            else:
                assert bits(checkpoint.read_flat("w", region.start, region.stop, region.offsets, region.sizes)) == bits(
                    want
                )
        start, stop = sorted((data.draw(st.integers(0, tensor.numel())), data.draw(st.integers(0, tensor.numel()))))
        assert bits(checkpoint.read_flat("w", start, stop)) == bits(tensor.reshape(-1)[start:stop])


@given(st.lists(st.integers(1, 5), max_size=3).map(tuple), st.data())
@LAW
def test_cover_finds_every_gap_and_every_overlap(shape, data):
    regions = [(r, f"part {i}") for i, r in enumerate(draw_regions(data, shape))]
    check_cover(shape, regions)
    full = [i for i, (r, _) in enumerate(regions) if r.numel]
    hole = data.draw(st.sampled_from(full))
    with pytest.raises(CheckpointError, match="not saved by anybody"):
        check_cover(shape, [p for i, p in enumerate(regions) if i != hole])
    extra = draw_region(data, shape)
    if extra.numel:
        with pytest.raises(CheckpointError, match="saved twice"):
            check_cover(shape, [*regions, (extra, "extra")])


def test_a_gap_is_named_where_it_is():
    with pytest.raises(CheckpointError, match=r"the box at \(1, 2\) of sizes \(1, 1\)"):
        check_cover((3, 4), [(Region((0, 0), (3, 4), 0, 6), "a"), (Region((0, 0), (3, 4), 7, 12), "b")])


def test_cover_of_a_thousand_slices_is_quick():
    "1024 ranks: work must not grow with the square of the pieces; counted, not timed: boxes of a range are linear"
    shape, per = (1024, 96), 96
    check_cover(shape, [(Region((0, 0), shape, r * per, (r + 1) * per), str(r)) for r in range(1024)])
    check_cover(shape, [(Region((r, 0), (1, 96)), str(r)) for r in range(1024)])
    assert len(region_boxes(whole(shape))) == 1


@pytest.mark.parametrize("dtype", list(SAFE_NAMES), ids=lambda d: str(d)[6:])
def test_the_formats_own_library_reads_the_same_bits(dtype, tmp_path):
    tensors = {
        "matrix": random_bits((5, 3), dtype, 1),
        "scalar": random_bits((), dtype, 2),
        "empty": random_bits((0, 2), dtype, 3),
    }
    tensors["transposed"] = tensors["matrix"].T
    facts = write_shard(tmp_path / "a.safetensors", tensors)
    theirs = load_file(tmp_path / "a.safetensors")
    ours = Shard(tmp_path / "a.safetensors", facts["bytes"], facts["header"])
    for key, tensor in tensors.items():
        assert bits(theirs[key]) == bits(ours.tensor(key)) == bits(tensor)
        assert checksum(ours.tensor(key)) == facts["data"][key]


def test_a_file_of_another_writer_is_read_even_unaligned(tmp_path):
    from safetensors.torch import save_file

    tensors = {"a": torch.tensor([1], dtype=torch.uint8), "b": torch.arange(3.0)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    shard = Shard(tmp_path / "theirs.safetensors")
    assert list(shard.entries) and all(torch.equal(shard.tensor(k), v) for k, v in tensors.items())
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}'
    )
    (tmp_path / "odd.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + b"\x07" + torch.tensor([2.5]).numpy().tobytes()
    )
    assert Shard(tmp_path / "odd.safetensors").tensor("b").item() == 2.5


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_pytorchs_distributed_checkpoint_reads_and_writes_the_same_shards(tmp_path):
    "DCP through its safetensors storage as a second opinion, in both directions"
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    tensors = {"model.a": random_bits((6, 4), torch.float32, 1).nan_to_num(), "model.b": torch.arange(5).bfloat16()}
    dcp.save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(tmp_path / "dcp")), no_dist=True)
    theirs = {k: v for p in (tmp_path / "dcp").glob("*.safetensors") for k, v in load_file(p).items()}
    save_state(tmp_path / "ours", tensors)
    for name, tensor in tensors.items():
        assert bits(theirs[name]) == bits(Checkpoint(tmp_path / "ours").read(name)) == bits(tensor)
    back = {name: torch.zeros_like(t) for name, t in tensors.items()}
    dcp.load(back, storage_reader=HuggingFaceStorageReader(str(tmp_path / "ours")), no_dist=True)
    assert all(bits(back[name]) == bits(tensor) for name, tensor in tensors.items())


def test_several_processes_save_and_others_load(tmp_path):
    "Three real processes write 3 x 12 of 36 elements, four read 9 each"
    row = torch.randn(36, generator=torch.Generator().manual_seed(0))
    fork = mp.get_context("fork")
    barrier, failed = fork.Barrier(3), fork.Queue()

    def run(rank):
        try:
            part = Chunk(row[12 * rank : 12 * rank + 12], (4, 9), start=12 * rank)
            save_state(
                tmp_path / "1",
                {"master.w": part},
                {"step": 1} if rank == 0 else None,
                rank=rank,
                ranks=3,
                barrier=lambda: barrier.wait(30),
            )
            assert Checkpoint(tmp_path / "1").state["step"] == 1  # it stands when save_state returns, on every rank
        except BaseException as error:
            failed.put(repr(error))
            raise

    processes = [fork.Process(target=run, args=(r,)) for r in range(3)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert [p.exitcode for p in processes] == [0, 0, 0], failed.get(timeout=1)
    parts = [torch.empty(9) for _ in range(4)]
    for r, part in enumerate(parts):
        load_into({"master.w": Chunk(part, (4, 9), start=9 * r)}, Checkpoint(tmp_path / "1"))
    assert torch.equal(torch.cat(parts), row)


def test_many_ranks_need_a_barrier(tmp_path):
    with pytest.raises(ValueError, match="need a barrier"):
        save_state(tmp_path / "1", {}, rank=0, ranks=2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Writer(tmp_path / "1", 2, 2)
    with pytest.raises(ValueError, match="rank 0 commits"):
        Writer(tmp_path / "1", 1, 2).commit()


def test_ranks_that_disagree_are_named(tmp_path):
    for parts, message in (
        ([torch.zeros(2), torch.zeros(2).bfloat16()], "w: rank 1 has bfloat16"),
        ([torch.zeros(2), torch.zeros(2)], "w: saved twice"),
    ):
        writers = [Writer(tmp_path / "1", r, 2) for r in range(2)]
        for writer, part in zip(writers, parts):
            writer.add("w", part)
            writer.write()
        with pytest.raises(CheckpointError, match=message):
            writers[0].commit()
    stale = Writer(tmp_path / "1", 1, 3)  # as of a job with another number of ranks
    stale.write()
    first = Writer(tmp_path / "1", 0, 2)
    first.write()
    with pytest.raises(CheckpointError, match="one of 3 ranks"):
        first.commit()
    assert not (tmp_path / "1").exists() and not sibling(tmp_path / "1", "saving").exists()


def test_what_a_killed_save_left_does_not_get_into_the_next(tmp_path):
    killed = [Writer(tmp_path / "1", r, 3) for r in range(3)]
    for writer in killed:
        writer.add(f"old{writer.rank}", torch.ones(9))
        writer.write()
    save_state(tmp_path / "1", {"new": torch.zeros(2)})
    assert Checkpoint(tmp_path / "1").names == ["new"]
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == ["index.json", "rank-00000-00000.safetensors"]


def test_a_rank_that_has_not_written_is_not_replaced_by_its_former_self(tmp_path):
    "The same save was killed before: rank 1's fragment of then must not count for now"
    for writer in [Writer(tmp_path / "1", r, 2) for r in range(2)]:
        writer.add(f"w{writer.rank}", torch.ones(9))
        writer.write()
    again = [Writer(tmp_path / "1", r, 2) for r in range(2)]
    again[0].write()
    with pytest.raises(CheckpointError, match="rank 1 of 2 has not written its part"):
        again[0].commit()


def test_shards_keep_their_size(tmp_path):
    tensors = {f"w{i}": torch.full((10,), float(i)) for i in range(7)} | {"large": torch.zeros(100)}
    save_state(tmp_path / "1", tensors, shard_bytes=100)  # two and a half of the small ones
    files = sorted((tmp_path / "1").glob("*.safetensors"))
    assert [len(load_file(f)) for f in files] == [2, 2, 2, 1, 1]
    load_into({name: torch.empty_like(t) for name, t in tensors.items()}, Checkpoint(tmp_path / "1"))


def test_one_tensor_in_several_parts_of_one_rank(tmp_path):
    "A fused projection whose q, k and v rows lie apart: one rank holds several boxes of one logical tensor"
    tensor = torch.arange(24.0).view(6, 4)
    parts = [Chunk(tensor[i : i + 2], (6, 4), offsets=(i, 0)) for i in (4, 0, 2)]
    save_state(tmp_path / "1", {"w": parts})
    out = [torch.empty(2, 4) for _ in range(3)]
    load_into({"w": [Chunk(t, (6, 4), offsets=(i, 0)) for t, i in zip(out, (0, 2, 4))]}, Checkpoint(tmp_path / "1"))
    assert torch.equal(torch.cat(out), tensor)


def test_buffers_go_along_and_what_is_not_persistent_does_not(tmp_path):
    model = torch.nn.BatchNorm1d(3)
    model.register_buffer("cache", torch.ones(2), persistent=False)
    assert set(gather_state(model)) == {
        f"model.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }
    model(torch.randn(4, 3))
    save_state(tmp_path / "1", {**gather_state(model), "exp_avg.weight": torch.ones(3)})
    fresh = torch.nn.BatchNorm1d(3)
    assert load_weights(fresh, Checkpoint(tmp_path / "1")) == []  # the optimizer's names are not the model's business
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values()))


def test_a_load_that_fails_changes_nothing(tmp_path):
    save_state(tmp_path / "1", {"a": torch.ones(3), "b": torch.ones(2), "d": torch.ones(1)})
    mine = {"a": torch.zeros(3), "b": torch.zeros(4), "c": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_into(mine, Checkpoint(tmp_path / "1"))
    assert all(
        word in str(error.value)
        for word in ("not in the checkpoint: c", "only in the checkpoint: d", "b: has shape (2,)")
    )
    assert not any(t.any() for t in mine.values())
    for wrong in (
        {"b": torch.zeros(4), "d": torch.zeros(1)},
        {"b": torch.zeros(2), "d": torch.zeros(1, dtype=torch.int64)},
    ):
        mine = {"a": torch.zeros(3), **wrong}  # the first tensor alone would fit
        with pytest.raises(CheckpointError, match="does not fit"):
            load_into(mine, Checkpoint(tmp_path / "1"))
        assert not any(t.any() for t in mine.values())


def test_what_cannot_be_saved_is_refused(tmp_path):
    writer = Writer(tmp_path / "1")
    with pytest.raises(CheckpointError, match="complex64 cannot be saved"):
        writer.add("w", torch.zeros(2, dtype=torch.complex64))
    writer.add("w", torch.zeros(2))
    with pytest.raises(CheckpointError, match="added twice"):
        writer.add("w", torch.zeros(2))
    with pytest.raises(CheckpointError, match="added as"):
        writer.add("w", torch.zeros(3))
    with pytest.raises(CheckpointError, match="JSON"):
        save_state(tmp_path / "2", {}, {"rng": torch.zeros(1)})
    assert not (tmp_path / "2").exists()


def test_version_1_stays_readable():
    "A checkpoint written on the day of the format; its bits are given by a formula. Never write it anew: a new version gets a folder of its own"
    checkpoint = Checkpoint(FIXTURE)
    checkpoint.verify()
    assert checkpoint.version == 1 and checkpoint.state == {
        "step": 100,
        "tokens": 12800,
        "data": {"epoch": 0, "skipped": []},
        "note": "版本一",
    }
    assert torch.equal(checkpoint.read("model.embed.weight"), (torch.arange(24.0).view(6, 4) / 8).bfloat16())
    assert torch.equal(checkpoint.read("master.embed.weight"), torch.arange(24.0).view(6, 4) / 8)
    assert torch.equal(checkpoint.read("exp_avg.embed.weight"), -torch.arange(24.0).view(6, 4))
    assert torch.equal(checkpoint.read("scaler.scale"), torch.tensor(65536.0))
    assert torch.equal(checkpoint.read("mask"), torch.tensor([True, False])) and checkpoint.read("nothing").shape == (
        0,
        3,
    )


def write_fixture(folder):
    "How the version-1 fixture was made: two ranks, boxes, flat slices, and flat slices of a box"
    grid = torch.arange(24.0).view(6, 4)
    writers = [Writer(folder, r, 2) for r in range(2)]
    for r, w in enumerate(writers):
        w.add("model.embed.weight", Chunk((grid / 8).bfloat16()[3 * r : 3 * r + 3], (6, 4), offsets=(3 * r, 0)))
        w.add(
            "master.embed.weight",
            Chunk((grid / 8).reshape(-1)[:13] if r == 0 else (grid / 8).reshape(-1)[13:], (6, 4), start=13 * r),
        )
        columns = -grid[:, 2 * r : 2 * r + 2].reshape(-1)
        for a, b in ((0, 5), (5, 12)):
            w.add("exp_avg.embed.weight", Chunk(columns[a:b], (6, 4), offsets=(0, 2 * r), sizes=(6, 2), start=a))
    writers[0].add("scaler.scale", torch.tensor(65536.0))
    writers[0].add("mask", torch.tensor([True, False]))
    writers[1].add("nothing", torch.zeros(0, 3, dtype=torch.int64))
    for w in writers:
        w.write()
    writers[0].commit({"step": 100, "tokens": 12800, "data": {"epoch": 0, "skipped": []}, "note": "版本一"})


def test_regions_and_chunks_that_make_no_sense():
    one, two = torch.zeros(4), torch.zeros(2, 2)
    for make, message in (
        (lambda: Region((0,), (1, 2)), "not a region"),
        (lambda: Region((-1,), (2,)), "not a region"),
        (lambda: Region((0,), (2,), 1), "not a region"),
        (lambda: Region((0,), (2,), 1, 3), "outside of a box of 2"),
        (lambda: Chunk(two, (2, 2), sizes=(1, 2)), "sizes are for flat ranges"),
        (lambda: Chunk(two, (2, 2), start=0), "one-dimensional"),
        (lambda: Chunk(one, (2, 4), offsets=(1, 0), start=0), "needs the box's sizes"),
        (lambda: Chunk(one, (2, 4), start=5), "outside of a box of 8"),
        (lambda: Chunk(two, (3, 2), offsets=(2, 0)), "lies outside"),
        (lambda: Chunk(two, (2, 2, 2)), "lies outside"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(CheckpointError, match=r"part 0: .* lies outside"):
        check_cover((2,), [(Region((1,), (2,)), "part 0")])
