"Laws of packing, order, mixture and loader"

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.data.loader import DataConfig, Loader, Validation, make_validation, prefetch
from internlm_nb.data.mixture import BatchSizes, Mixture, SkippedBatches, quotas
from internlm_nb.data.order import Permutation, ShuffledPacks, derive_key
from internlm_nb.data.packing import pack
from internlm_nb.data.synthetic import RUN, STRIDE, SyntheticPacks, synthetic_floor
from internlm_nb.data.tokenfiles import read_tokens, write_tokens

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)

# documents of mixed lengths with negative ids and zeros; shrinking stays readable
DOCUMENTS = st.lists(st.lists(st.integers(-50, 50), max_size=23), min_size=1, max_size=30).filter(
    lambda docs: any(docs)
)
SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 4), st.booleans())
FIELDS = ("input_ids", "labels", "cu_seqlens", "indexes", "type_ids")


def same(a, b):
    return (
        all(getattr(a, name).tolist() == getattr(b, name).tolist() for name in FIELDS)
        and a.lengths == b.lengths
        and a.num_documents == b.num_documents
        and a.num_tokens == b.num_tokens
    )


def reference(documents, seq_len, micro_bsz, windows):
    "The stream and its labels, token by token: (|id|, label or -100, document, first of its document)"
    stream = []
    for d, document in enumerate(documents):
        for i, token in enumerate(document):
            following = document[i + 1] if i + 1 < len(document) else -1
            stream.append([abs(token), following if following >= 0 else -100, d])
    size = seq_len * micro_bsz
    if windows:
        for cut in range(size - 1, len(stream), size):
            stream[cut][1] = -100
    return stream


@SETTINGS
@given(DOCUMENTS, SHAPES)
def test_every_token_once_with_its_label(documents, shape):
    "Packs in a row are the stream: each token once, in order, with the next token as its label"
    seq_len, micro_bsz, windows = shape
    size = seq_len * micro_bsz
    packs = list(pack(documents, seq_len, micro_bsz, windows, type_ids=[d % 3 for d in range(len(documents))]))
    stream = reference(documents, seq_len, micro_bsz, windows)
    assert len(packs) == -(-len(stream) // size)
    at = 0
    for p in packs:
        here = stream[at : at + size]
        fill = size - len(here)
        assert p.num_tokens == len(here)
        assert p.input_ids.tolist() == [t[0] for t in here] + [0] * fill
        assert p.labels.tolist() == [t[1] for t in here] + [-100] * fill
        assert p.type_ids.tolist() == [t[2] % 3 for t in here] + [0] * fill
        assert p.num_targets == sum(t[1] != -100 for t in here)
        at += size
    assert at >= len(stream)


@SETTINGS
@given(DOCUMENTS, SHAPES)
def test_borders(documents, shape):
    "Segments cover the pack, are at most seq_len long, and (unless windows) never hold two documents; positions restart at each"
    seq_len, micro_bsz, windows = shape
    stream = reference(documents, seq_len, micro_bsz, windows)
    size = seq_len * micro_bsz
    for n, p in enumerate(pack(documents, seq_len, micro_bsz, windows)):
        borders = p.cu_seqlens.tolist()
        assert (
            p.cu_seqlens.dtype.is_signed
            and str(p.cu_seqlens.dtype) == "torch.int32"
            and all(str(getattr(p, f).dtype) == "torch.int64" for f in FIELDS if f != "cu_seqlens")
        )
        assert borders[0] == 0 and borders[-1] == size and list(p.lengths) == np.diff(borders).tolist()
        assert 0 < min(p.lengths) and max(p.lengths) <= seq_len and p.max_seqlen == max(p.lengths)
        assert p.indexes.tolist() == [i for length in p.lengths for i in range(length)]
        owners = [t[2] for t in stream[n * size : (n + 1) * size]]
        if windows:
            assert borders == list(range(0, size + 1, seq_len))
            runs = 1 + sum(a != b for a, b in pairwise(owners))
            assert p.num_documents == runs
        else:
            for low, high in pairwise(borders):
                assert len(set(owners[low:high])) <= 1
            # no border without a reason: a document's end, a full segment, or the beginning of padding
            for low, high in pairwise(borders):
                if high < len(owners) and owners[high - 1] == owners[high]:
                    assert high - low == seq_len
            assert p.num_documents == sum(low < len(owners) for low in borders[:-1])
            assert p.largest_length == max(
                min(high, len(owners)) - low for low, high in pairwise(borders) if low < len(owners)
            )


def test_worked_example():
    documents = [
        [2323, 442, 252, 341],
        [233, 3442, 322, 31, 2514, 49731, 51],
        [4326, 427, 465, 22, 314, 9725, 346, 1343],
        [24, 2562, 5, 25, 356],
    ]
    first, second = pack(documents, 8, 2)
    assert first.input_ids.tolist() == [
        2323,
        442,
        252,
        341,
        233,
        3442,
        322,
        31,
        2514,
        49731,
        51,
        4326,
        427,
        465,
        22,
        314,
    ]
    assert first.labels.tolist() == [442, 252, 341, -100, 3442, 322, 31, 2514, 49731, 51, -100, 427, 465, 22, 314, 9725]
    assert first.cu_seqlens.tolist() == [0, 4, 11, 16]
    assert first.indexes.tolist() == [*range(4), *range(7), *range(5)]
    assert second.input_ids.tolist() == [9725, 346, 1343, 24, 2562, 5, 25, 356] + [0] * 8
    assert second.labels.tolist() == [346, 1343, -100, 2562, 5, 25, 356, -100] + [-100] * 8
    assert second.cu_seqlens.tolist() == [0, 3, 8, 16]
    assert (first.num_tokens, second.num_tokens, first.num_documents, second.num_documents) == (16, 8, 3, 2)


@SETTINGS
@given(st.integers(1, 5000), st.integers(0, 2**63))
def test_permutation_is_a_bijection(size, key):
    order = Permutation(size, key)
    everything = order(np.arange(size))
    assert np.array_equal(np.sort(everything), np.arange(size))
    some = np.arange(0, size, 7)[::-1]
    assert np.array_equal(order(some), everything[some])  # any positions, in any order


def test_permutation_of_a_huge_set_is_one_to_one_and_spread():
    order = Permutation(10**12 + 7, derive_key(4))
    seen = order(np.arange(100_000) + 5 * 10**11)
    assert seen.min() >= 0 and seen.max() < 10**12 + 7 and len(np.unique(seen)) == 100_000
    # mean of uniform draws: standard error is 0.289 / sqrt(1e5) = 0.0009 of the range
    assert abs(seen.mean() / 1e12 - 0.5) < 0.004


def write_folder(root, seed, count, longest=40, kinds=("cn", "en")):
    rng = np.random.default_rng(seed)
    for kind in kinds:
        write_tokens(root / kind / "a.bin", [rng.integers(-59, 60, rng.integers(0, longest)) for _ in range(count)])
    return root


@pytest.mark.parametrize("min_length", [0, 9])
def test_random_access_equals_streaming(tmp_path, monkeypatch, min_length):
    "Jumping to pack i gives what streaming the shuffled documents gives, for several blocks, epochs and shapes, asked in any order"
    import internlm_nb.data.order as order_module

    monkeypatch.setattr(order_module, "_BLOCK", 16)
    docs = read_tokens(write_folder(tmp_path, 0, 45), min_length=min_length)
    rng = np.random.default_rng(1)
    for seq_len, micro_bsz, windows in ((8, 2, False), (5, 3, True), (64, 1, False), (3, 1, False), (500, 20, False)):
        packs = ShuffledPacks(docs, 3, seq_len, micro_bsz, windows)
        expected = []
        for epoch in range(2):
            order = packs.order(epoch)(np.arange(len(docs)))
            streamed = list(
                pack([docs[int(i)] for i in order], seq_len, micro_bsz, windows, type_ids=docs.type_of(order))
            )
            assert len(streamed) == packs.packs_per_epoch
            here = range(epoch * len(streamed), (epoch + 1) * len(streamed))
            assert {packs.cut(i)[0] for i in here} == {epoch}
            cuts = [packs.cut(i)[1] for i in here]
            assert (
                sorted(cuts) == list(range(len(streamed))) and cuts[-1] == len(streamed) - 1
            )  # each once; the padded one last
            expected += [streamed[cut] for cut in cuts]
        assert [packs.tokens_before(i) for i in range(len(expected) + 1)] == np.cumsum(
            [0] + [p.num_tokens for p in expected]
        ).tolist()
        for i in rng.permutation(len(expected)):
            assert same(packs[int(i)], expected[int(i)])
        if packs.packs_per_epoch > 3:
            assert not same(packs[0], packs[packs.packs_per_epoch])  # the next epoch has another order


def test_no_document_is_lost_in_an_epoch(tmp_path):
    docs = read_tokens(write_folder(tmp_path, 2, 60))
    packs = ShuffledPacks(docs, 0, 16, 2)
    seen = np.concatenate([packs[i].input_ids.numpy()[: packs[i].num_tokens] for i in range(packs.packs_per_epoch)])
    assert np.array_equal(np.sort(seen), np.sort(np.concatenate([abs(d) for d in docs])))


@SETTINGS
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(0, 999), st.integers(0, 5000))
def test_mixture_counts(weights, seed, index):
    "The closed-form count equals counting the picks, and each block holds the quotas"
    mixture = Mixture(weights, seed)
    assert sum(mixture.quotas) == 1024 and min(mixture.quotas) >= 1
    before, after = mixture.before(index), mixture.before(index + 1)
    picked = mixture.pick(index)
    assert [b + (j == picked) for j, b in enumerate(before)] == after and sum(before) == index
    assert mixture.before(3072) == [3 * q for q in mixture.quotas]
    shares = np.asarray(weights) / sum(weights)
    # one each is given first, so a share may be off by the number of sources and the rounding
    assert (abs(np.asarray(mixture.quotas) / 1024 - shares) <= (len(weights) + 1) / 1024).all()


def test_quotas_of_equal_shares():
    assert quotas([1, 1]) == [512, 512] and quotas([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    for bad in ([], [0, 1], [-1, 2], [float("nan")], [float("inf"), 1]):
        with pytest.raises(ValueError, match="positive"):
            quotas(bad)


@SETTINGS
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9), st.integers(1, 9))
def test_rampup_sums(batch, start, increment, every):
    if start > batch or (increment == 0 and start < batch):
        with pytest.raises(ValueError, match="rampup"):
            BatchSizes(batch, f"{start} {increment} {every}")
        return
    sizes = BatchSizes(batch, f"{start} {increment} {every}")
    listed = [min(start + increment * (t // every), batch) for t in range(400)]
    assert [sizes.size(t) for t in range(400)] == listed
    assert [sizes.first(t) for t in range(401)] == np.cumsum([0, *listed]).tolist()
    assert set(listed) <= set(sizes.sizes())


def test_rampup_check_values():
    for batch, text, expected in (
        (4, "1 1 4", [1, 1, 1, 1, 2, 2, 2, 2]),
        (4, "", [4] * 8),
        (8, "2 2 2", [2, 2, 4, 4, 6, 6, 8, 8]),
    ):
        assert [BatchSizes(batch, text).size(t) for t in range(8)] == expected


@SETTINGS
@given(st.sets(st.integers(0, 40), max_size=20), st.integers(0, 50))
def test_skipped_batches(left_out, steps):
    text = ",".join(map(str, sorted(left_out)))
    skipped = SkippedBatches(text)
    kept = [b for b in range(200) if b not in left_out]
    assert [skipped.batch(t) for t in range(60)] == kept[:60]
    assert [b for low, high in skipped.spans_before(steps) for b in range(low, high)] == kept[:steps]


@pytest.mark.parametrize("rampup, skip", [("", ""), ("2 2 3", "1,4-5"), ("4 4 2", "0")])
def test_loader_is_a_function_of_the_step(tmp_path, rampup, skip):
    "Any number of ranks, any first step, any order of asking: the same batch; tokens seen as counted"
    web, books = write_folder(tmp_path / "web", 0, 30), write_folder(tmp_path / "books", 1, 12, kinds=("en", "fr"))
    config = DataConfig(
        train_folder=(f"{web}=0.6", f"{books}=0.4"),
        seq_len=16,
        micro_bsz=2,
        micro_num=8,
        rampup=rampup,
        skip_batches=skip,
    )
    loader = Loader(config, seed=5, vocab_size=60)
    assert loader.types == ["cn", "en", "fr"]
    history = [loader.batch(step) for step in range(25)]
    assert [len(b) for b in history] == [loader.batch_size(step) for step in range(25)]
    seen = dict.fromkeys(loader.sources, 0)
    for step in range(25):
        assert loader.tokens_seen(step) == seen
        for p in history[step]:
            seen[loader.sources[p.source]] += p.num_tokens
    for step in (24, 3, 11, 0):
        fresh = Loader(config, seed=5, vocab_size=60)
        for ranks in (1, 2) + ((4,) if rampup != "2 2 3" else ()):
            shares = [fresh.batch(step, coord, ranks) for coord in range(ranks)]
            assert all(same(shares[i % ranks][i // ranks], p) for i, p in enumerate(history[step]))
            assert sum(map(len, shares)) == len(history[step])
    resumed = Loader(config, seed=5, vocab_size=60).iterate(start=7, stop=12)
    assert all(
        same(a, b)
        for batch, expected in zip(resumed, history[7:12], strict=True)
        for a, b in zip(batch, expected, strict=True)
    )


def test_type_ids_are_of_all_folders_together(tmp_path):
    write_tokens(tmp_path / "x" / "code" / "a.bin", [[11] * 5])
    write_tokens(tmp_path / "y" / "cn" / "a.bin", [[22] * 5])
    loader = Loader(DataConfig(train_folder=(str(tmp_path / "x"), str(tmp_path / "y")), seq_len=5, micro_num=2), 0, 30)
    assert loader.types == ["cn", "code"]
    for step in range(4):
        for p in loader.batch(step):
            assert set(p.type_ids.tolist()) == {1 if p.input_ids[0] == 11 else 0}


def test_ranks_must_divide(tmp_path):
    loader = Loader(DataConfig(seq_len=8, micro_num=6), 0, 50)
    with pytest.raises(
        ValueError, match=r"data\.micro_num: a batch of 6 packs cannot be shared evenly by 4 data ranks"
    ):
        loader.batch(0, 0, 4)
    with pytest.raises(ValueError, match=r"data\.rampup '1 1 1': a batch of 1 packs"):
        Loader(DataConfig(seq_len=8, micro_num=6, rampup="1 1 1"), 0, 50).check_ranks(2)
    with pytest.raises(ValueError, match="coord 3"):
        loader.batch(0, 3, 3)


def test_validation_covers_each_document_once_under_every_layout(tmp_path):
    root = write_folder(tmp_path, 7, 21)
    docs = read_tokens(root)
    for ranks in (1, 2, 3, 5, 50):
        held_out = Validation(DataConfig(valid_folder=str(root), seq_len=16, micro_bsz=2), 60)
        shares = [list(held_out.batch(coord, ranks)) for coord in range(ranks)]
        assert len({len(s) for s in shares}) == 1
        packs = [p for group in zip(*shares) for p in group]
        seen = np.concatenate([p.input_ids.numpy()[: p.num_tokens] for p in packs])
        assert np.array_equal(np.sort(seen), np.sort(np.concatenate([abs(d) for d in docs])))
        assert all(p.num_targets == 0 and p.num_tokens == 0 for p in packs[held_out.packs :])
        if ranks == 1:
            alone = packs
        assert all(same(a, b) for a, b in zip(packs, alone))
    limited = Validation(DataConfig(valid_folder=str(root), seq_len=16, micro_bsz=2, valid_packs=3), 60)
    assert all(same(a, b) for a, b in zip(limited.batch(), alone[:3], strict=True))


def test_prefetch_hands_errors_over_and_ends():
    def failing():
        yield 1
        raise OSError("the disk is gone")

    for ahead in (0, 1, 5):
        items = prefetch(failing(), ahead)
        assert next(items) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            next(items)
        assert list(prefetch(iter(range(20)), ahead)) == list(range(20))


def test_prefetch_thread_stops_with_its_consumer():
    import threading

    def endless():
        while True:
            yield 0

    before = threading.active_count()
    items = prefetch(endless(), 2)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_config_says_what_is_wrong(tmp_path):
    for bad in (
        {"seq_len": 0},
        {"micro_num": 0},
        {"min_length": -1},
        {"valid_micro_bsz": 0},
        {"synthetic_shortest": 0},
        {"rampup": "a b c"},
        {"skip_batches": "5-1"},
        {"train_folder": ("a=1", "b")},
        {"train_folder": ("a=0",)},
    ):
        with pytest.raises(ValueError, match="|".join(name.replace("_", "[-_]") for name in bad)):
            DataConfig(**bad)
    (tmp_path / "odd=1").mkdir()
    assert DataConfig(train_folder=(str(tmp_path / "odd=1"),)).train_folder == (str(tmp_path / "odd=1"),)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a token file"):
        Loader(DataConfig(train_folder=("nowhere",)), 0, 10)


def test_command_line_takes_a_folder():
    tyro = pytest.importorskip("tyro")
    config = tyro.cli(
        DataConfig,
        args=[
            "--train-folder",
            "web=0.7",
            "books=0.3",
            "--seq-len",
            "64",
            "--rampup",
            "4 4 100",
            "--no-pack-sample-into-one",
        ],
    )
    assert (
        config.train_folder == ("web=0.7", "books=0.3")
        and config.rampup == "4 4 100"
        and tyro.cli(DataConfig, args=["--train-folder", "one"]).train_folder == ("one",)
    )


# --- synthetic data ---------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.integers(8, 300), st.integers(0, 99), SHAPES, st.integers(0, 10**9), st.integers(1, 20))
def test_synthetic_packs(vocab_size, seed, shape, index, shortest):
    "Full packs of valid ids, a function of (seed, index) alone; a run's next id follows from the last"
    seq_len, micro_bsz, windows = shape
    packs = SyntheticPacks(vocab_size, seed, seq_len, micro_bsz, windows, shortest)
    p = packs[index]
    assert same(p, SyntheticPacks(vocab_size, seed, seq_len, micro_bsz, windows, shortest)[index])
    assert p.num_tokens == seq_len * micro_bsz == packs.tokens_before(1)
    assert 3 <= int(p.input_ids.min()) and int(p.input_ids.max()) < vocab_size
    assert max(p.lengths) <= seq_len


def test_synthetic_documents_have_the_lengths_asked_for():
    packs = SyntheticPacks(100, 0, 512, 4, shortest=20, longest=50)
    lengths = np.concatenate([np.array(packs[i].lengths)[:-1] for i in range(50)])  # the last of a pack is cut
    assert lengths.min() == 20 and lengths.max() == 50
    assert not same(packs[0], packs[1]) and not same(
        packs[0], SyntheticPacks(100, 1, 512, 4, shortest=20, longest=50)[0]
    )
    for bad in ({"vocab_size": 7}, {"shortest": 0}):
        with pytest.raises(ValueError):
            SyntheticPacks(**{"vocab_size": 100, "seed": 0, "seq_len": 8, "micro_bsz": 1, **bad})


def test_synthetic_floor():
    "The floor is the entropy of the process: a model that knows the rule reaches it"
    vocab_size, q = 50, 1 / RUN
    packs = SyntheticPacks(vocab_size, 0, 256, 16, shortest=200)
    nats, count = 0.0, 0
    for i in range(40):
        ids, labels = packs[i].input_ids.numpy(), packs[i].labels.numpy()
        known = labels >= 0
        hit = ((ids - 3 + STRIDE) % (vocab_size - 3) + 3 == labels)[known]
        chance = np.where(hit, (1 - q) + q / (vocab_size - 3), q / (vocab_size - 3))
        nats, count = nats - np.log(chance).sum(), count + len(hit)
    # 160 000 targets, deviation of a single one about 1.3 nats: four standard errors are 0.013; the accidental hits of the formula's remark are 0.002
    assert abs(nats / count - synthetic_floor(vocab_size)) < 0.02


def test_a_pack_moves():
    p = next(pack([[1, 2, 3]], 4, 1))
    moved = p.to("cpu", non_blocking=True)
    assert same(p, moved) and moved.lengths is p.lengths


def test_synthetic_validation_and_none():
    config = DataConfig(seq_len=16, micro_num=2, valid_packs=3)
    held_out = make_validation(config, 50)
    assert held_out is not None and len(list(held_out.batch())) == 3 and held_out.types == ["synthetic"]
    train = Loader(config, 0, 50)
    assert not any(same(p, q) for p in held_out.batch() for q in train.batch(0))
    assert make_validation(DataConfig(train_folder=("x",)), 50) is None
    steps = train.iterate(start=4)
    assert same(next(steps)[0], train.batch(4)[0])
    steps.close()  # type: ignore[attr-defined]
