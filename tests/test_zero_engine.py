"What the engine does when: order of exchanges, bits with and without overlap, bytes sent and held, checkpoints, planted faults, compilation; FSDP2 and DDP as second opinions"

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_zero_hybrid import COMPOSED, STEPS, cases, make, run_of

from internlm_nb.checkpoint.reader import Checkpoint
from internlm_nb.data.loader import Loader
from internlm_nb.parallel.batch import Batch
from internlm_nb.parallel.mesh import Mesh, make_mesh, single
from internlm_nb.parallel.ranks import run_ranks
from internlm_nb.parallel.record import Recorder
from internlm_nb.run.state import TrainState, init_run, load_run, save_run
from internlm_nb.train.config import ParallelConfig, RunConfig, ZeroConfig
from internlm_nb.train.parallelize import layout_of
from internlm_nb.train.step import train_step
from internlm_nb.zero.hybrid import held_bytes
from internlm_nb.zero.sharding import Sharding, shardings


def batches_of(mesh: Mesh, run: RunConfig, step: int) -> list[Batch]:
    data = mesh.axis("data")
    return [
        Batch.of(p, mesh=mesh)
        for p in Loader(run.data, run.train.seed, run.model.vocab_size).batch(step, data.coord, data.size)
    ]


def go(mesh: Mesh, run: RunConfig, model, opt, steps: range):
    "Some steps: (loss, norm) of each"
    out = []
    for step in steps:
        opt.set_schedule(step, STEPS)
        batches = batches_of(mesh, run, step)
        o = train_step(model, opt, batches, sum(b.num_targets for b in batches), mesh=mesh)
        out.append((o.loss.item(), o.grad_norm.item()))
    return out


# ---- bits


BITS = [Sharding(2, 4, 4)]


@pytest.mark.parametrize(
    "precision,some",
    [("bfloat16", BITS), *(pytest.param(p, shardings(4), marks=pytest.mark.slow) for p in ("float32", "bfloat16"))],
)
def test_overlap_changes_no_bit(precision, some):
    "Launching ahead changes when exchanges happen, and no sum"
    run = run_of(8, precision, recompute=(0.7, "full"))
    kinds: list[dict[str, Any]] = [
        dict(),
        dict(overlap=False),
        dict(reshard="step"),
        dict(reshard="backward", check=True),
        dict(reshard="never", overlap=False),
    ]
    for results in run_ranks(cases, layout_of(run, 4), run, some, kinds):
        for i in range(0, len(results), len(kinds)):
            first = results[i]
            for other in results[i + 1 : i + len(kinds)]:
                assert other[0] == first[0]
                assert all(torch.equal(other[1][n], w) for n, w in first[1].items())


@pytest.mark.slow
def test_bf16_is_close_and_masters_are_fp32():
    "bf16 weights over fp32 masters: the same step as without a sharding, up to the order in which ranks are added"
    run = run_of(4, "bfloat16")
    plain = run_ranks(cases, layout_of(run, 2), run, [Sharding()], [{}])[0][0]
    for results in run_ranks(cases, layout_of(run, 2), run, shardings(2), [{}, dict(grad_dtype="param")]):
        for i, got in enumerate(results):
            for (loss, norm), (loss1, norm1) in zip(plain[0], got[0]):
                assert abs(loss - loss1) <= 2e-3 * loss and abs(norm - norm1) <= (2e-2 if i % 2 else 2e-3) * norm
            assert all(w.dtype == torch.bfloat16 for w in got[1].values())


# ---- what the recorder hears of memory


def heard_of_memory(mesh: Mesh, which: list[tuple[tuple[int, int, int], dict]]) -> None:
    "By owner, at every module and every gradient of two steps: what the storages weigh"
    for factors, options in which:
        run = run_of(4)
        mesh = make_mesh(mesh.layout, recorder=Recorder(events=True))
        model, opt, _ = make(mesh, run, Sharding(*factors), **options)
        engine = opt.engine
        looks: list[int] = []

        def look(*_: Any, engine=engine, recorder=mesh.recorder, looks=looks) -> None:
            weighed = held_bytes(engine)
            told = {owner: recorder.held.get(owner, 0) for owner in weighed}
            assert told == weighed, (told, weighed)
            looks.append(sum(told.values()))

        for module in (model.embedding, *model.blocks, model.head):
            module.register_forward_pre_hook(look)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(look)
        go(mesh, run, model, opt, range(2))
        look()
        recorder = mesh.recorder
        assert recorder is not None and len(looks) > 20
        moments = [
            m
            for shard in engine.shards
            for m in (opt.inner.state[shard.master]["exp_avg"], opt.inner.state[shard.master]["exp_avg_sq"])
        ]
        assert recorder.held["moments"] == sum(m.numel() * m.element_size() for m in moments)
        for owner, now in recorder.held.items():
            changes = [change.bytes for change in recorder.changes if change.owner == owner]
            assert sum(changes) == now and max(itertools.accumulate(changes)) == recorder.most[owner]


def test_the_recorder_hears_of_memory():
    run_ranks(heard_of_memory, layout_of(run_of(4), 1), [((1, 1, 1), {})])
    which = [((1, 1, 2), {}), ((1, 2, 2), dict(overlap=False)), ((2, 2, 2), {}), ((2, 2, 2), dict(reshard="step"))]
    run_ranks(heard_of_memory, layout_of(run_of(4), 2), which)


# ---- order


def stories(*which: tuple[tuple[int, int, int], bool, str]):
    return [story(*case) for case in which]


def story(factors: tuple[int, int, int], overlap: bool, reshard: str):
    "What happened in a second step: launches, waits, and the modules' own marks"
    run = run_of(4)
    mesh = make_mesh(layout_of(run, 4), recorder=Recorder(events=True))
    model, opt, _ = make(mesh, run, Sharding(*factors), overlap=overlap, reshard=reshard)
    go(mesh, run, model, opt, range(1))
    marks: list[tuple[int, str]] = []
    assert mesh.recorder is not None
    events = mesh.recorder.events
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: marks.append((len(events), f"forward {i}")))
        block.ffn_norm.weight.register_hook(lambda _, i=i: marks.append((len(events), f"backward {i}")))  # type: ignore[union-attr]
    mesh.recorder.reset()
    go(mesh, run, model, opt, range(1, 2))
    line = [(e.kind, e.call.axis, e.call.purpose, e.call.payload_bytes) for e in events]
    return line, marks


def updated_parameters_come_just_in_time(line, marks):
    "ZeRO-1: the gather of an update is launched in the next step, one unit ahead of its use"
    at = {what: n for n, what in marks}
    for axis in ("optim", "grad"):
        launched = [
            i
            for i, (kind, a, purpose, _) in enumerate(line)
            if (kind, a, purpose) == ("launch", axis, "updated parameters")
        ]
        assert len(launched) == 5 and all(
            i < line.index(("launch", "copies", "summed gradients", 0))
            if ("launch", "copies", "summed gradients", 0) in line
            else True
            for i in launched
        )
        assert launched[3] > at["forward 0"] - 3 and launched[4] > at["forward 0"]  # not all at the beginning
    done = [
        i
        for i, (kind, a, purpose, _) in enumerate(line)
        if (kind, a, purpose) == ("wait", "grad", "updated parameters")
    ]
    assert [sum(i < at[f"forward {n}"] for i in done) for n in range(3)] == [2, 3, 4]


def test_order_of_events():
    "The next unit's gather is under way before this unit computes, in forward and in backward; a reduction is waited for after another unit's backward began"
    (line, marks), (line1, _), late = run_ranks(
        stories, 4, ((4, 4, 4), True, "forward"), ((4, 4, 4), False, "forward"), ((1, 2, 4), True, "forward")
    )[0]
    updated_parameters_come_just_in_time(*late)
    at = {what: n for n, what in marks}
    gathers = [i for i, (kind, axis, purpose, _) in enumerate(line) if kind == "launch" and purpose == "parameters"]
    # forward: embedding, block 0, block 1, block 2, head; backward: block 2, 1, 0 (the head keeps, the embedding asks for none)
    assert len(gathers) == 8
    for i in range(3):
        assert gathers[i + 2] < at[f"forward {i}"] + 1, "the next unit's gather was launched before this one computed"
        waited = [j for j, (kind, _, purpose, _) in enumerate(line) if kind == "wait" and purpose == "parameters"]
        assert sum(j < at[f"forward {i}"] for j in waited) == i + 2  # its own and earlier ones only
    assert (
        gathers[6] < at["backward 2"] and gathers[7] < at["backward 1"]
    )  # block 1's before block 2 computes, block 0's before block 1
    sent = [i for i, (kind, _, purpose, _) in enumerate(line) if kind == "launch" and purpose == "gradients"]
    waits = [i for i, (kind, _, purpose, _) in enumerate(line) if kind == "wait" and purpose == "gradients"]
    assert len(sent) == len(waits) == 5  # head, block 2, 1, 0, embedding
    assert (
        waits[0] >= at["backward 2"] and waits[1] >= at["backward 1"] and waits[2] >= at["backward 0"]
    )  # one unit later
    assert sent[0] < at["backward 2"]
    pending = 0
    for kind, *_ in line1:  # without overlap nothing is under way while anything else is
        pending += 1 if kind == "launch" else -1
        assert pending <= 2  # the loss is summed behind the collecting of gradients, in the step itself


# ---- checkpoints


def save_and_go(mesh: Mesh, run: RunConfig, sharding: Sharding | None, folder: str):
    model, opt, _ = make(mesh, run, sharding)
    go(mesh, run, model, opt, range(2))
    save_run(folder, model, opt, TrainState(step=2), run, mesh=mesh)
    return go(mesh, run, model, opt, range(2, 4))


def load_and_go(mesh: Mesh, run: RunConfig, which: list[Sharding | None], folder: str, cast: bool = False):
    out = []
    for s in which:
        model, opt, _ = make(mesh, run, s, **(dict(check=True) if s else {}))
        load_run(Checkpoint(folder), model, opt, cast)
        out.append(go(mesh, run, model, opt, range(2, 4)))
        mesh.check_waited()
        opt.engine.remove()
    return out


@pytest.mark.parametrize(
    "precision,options",
    [
        ("bfloat16", {}),
        ("float64", dict(optim=dict(frozen=("embedding.*", "blocks.1.attention_norm.weight")))),
        pytest.param("float64", {}, marks=pytest.mark.slow),
    ],
)
def test_any_sharding_loads_what_any_saved(tmp_path, precision, options):
    run = run_of(4, precision, **options)
    tolerance = 1e-10 if precision == "float64" else 1e-3
    want = run_ranks(save_and_go, layout_of(run, 4), run, Sharding(2, 2, 4), str(tmp_path / "4"))[0]
    alone = save_and_go(single(), run, None, str(tmp_path / "1"))
    names = Checkpoint(tmp_path / "4").names
    assert sorted(names) == sorted(Checkpoint(tmp_path / "1").names)
    for folder, world in (("4", 2), ("1", 4)):
        for results in run_ranks(
            load_and_go,
            layout_of(run, world),
            run,
            [Sharding(1, world, world), None] if world == 2 else [Sharding(2, 2, 4)],
            str(tmp_path / folder),
        ):
            for got in results:
                for (loss, norm), (loss1, norm1), (loss2, _) in zip(want, got, alone):
                    assert (
                        abs(loss1 - loss) <= tolerance * loss
                        and abs(norm1 - norm) <= 10 * tolerance * norm
                        and abs(loss2 - loss) <= tolerance * loss
                    )
    if precision == "float64":
        for n in names:  # element by element what one process saves
            assert (
                Checkpoint(tmp_path / "4").read(n).double() - Checkpoint(tmp_path / "1").read(n).double()
            ).abs().max() <= 1e-10, n


def test_weights_alone_and_other_layouts(tmp_path):
    "A checkpoint of two pipeline stages with tied weights, over other axes and factors; and as initial weights"
    run = run_of(4, tie_embeddings=True, num_layers=4)
    staged = replace(run, parallel=ParallelConfig(pipeline=2))
    want = run_ranks(save_and_go, layout_of(staged, 4), staged, Sharding(2, 2, 2), str(tmp_path / "a"))[0]
    tensor = replace(run, parallel=ParallelConfig(tensor=2, mode="msp"))
    for got in run_ranks(load_and_go, layout_of(tensor, 4), tensor, [Sharding(1, 2, 2)], str(tmp_path / "a")):
        for (loss, norm), (loss1, norm1) in zip(want, got[0]):
            assert abs(loss1 - loss) <= 1e-10 * loss and abs(norm1 - norm) <= 1e-10 * norm
    model, opt, _ = make(single(), run, Sharding())
    init_run(Checkpoint(tmp_path / "a"), model, opt)
    assert all(torch.equal(p, Checkpoint(tmp_path / "a").read(f"model.{n}")) for n, p in model.named_parameters())


@pytest.mark.parametrize("name", ["msp", "expert", "expert-msp"])
def test_parts_of_parameters_are_saved_once(tmp_path, name):
    "With tensor or expert parallelism and a sharding at once: every tensor has one writer, and one process goes on from them"
    run, _ = COMPOSED[name]
    want = run_ranks(save_and_go, layout_of(run, 4), run, Sharding(1, 2, 2), str(tmp_path / "a"))[0]
    alone = replace(run, parallel=ParallelConfig())
    for (loss, norm), (loss1, norm1) in zip(want, load_and_go(single(), alone, [None], str(tmp_path / "a"))[0]):
        assert abs(loss1 - loss) <= 1e-10 * loss and abs(norm1 - norm) <= 1e-10 * norm


# ---- planted faults


FAULTS = {
    "no publish": "a gather is missing",
    "freed too early": "not finite",
    "no gather in backward": "not finite",
    "round lost": "never arrived, or a buffer was not given back",
    "update unsaid": "was not called after the last change",
}


def planted(run: RunConfig):
    "Runs in check mode, with something left out of each: what was said"
    from internlm_nb.zero import unit
    from internlm_nb.zero.reduce import Accumulator
    from internlm_nb.zero.unit import FlatUnit, ZeroError
    from internlm_nb.zero.units import Gathers

    enter, close, said = Gathers._enter, Accumulator._close, {}
    faults: dict[str, tuple[Any, str, Any]] = {
        "no publish": (
            unit,
            "_due",
            lambda self: (
                [lambda: unit._gather(self, "unsharded", "param_shard", self.axes.param)]
                if not self.is_unsharded
                else []
            ),
        ),
        "freed too early": (
            Gathers,
            "_enter",
            lambda self, stop, following: (enter(self, stop, following), stop.reshard())[0],
        ),
        "no gather in backward": (Gathers, "_back", lambda self, stop, before, told, grad: None),
        "round lost": (
            Accumulator,
            "_close",
            lambda self: (close(self), iter(()))[1] if self.name == "blocks.1" else close(self),
        ),
        "update unsaid": (FlatUnit, "master_updated", lambda self: None),
    }
    for fault, (owner, method, wrong) in faults.items():
        mesh = make_mesh(layout_of(run, 4))
        model, opt, _ = make(mesh, run, Sharding(2, 2, 4), check=True)
        go(mesh, run, model, opt, range(1))
        right = getattr(owner, method)
        setattr(owner, method, wrong)
        try:
            go(mesh, run, model, opt, range(1, 3))
            said[fault] = "nothing"
        except ZeroError as error:
            said[fault] = str(error)
        setattr(owner, method, right)
    return said


@pytest.mark.filterwarnings("ignore:.*was dropped without wait")
def test_check_mode_notices():
    for said in run_ranks(planted, 4, run_of(4, "bfloat16")):
        for fault, message in FAULTS.items():
            assert message in said[fault], (fault, said[fault])


def test_faults_are_the_users_too():
    run = run_of(2)
    opt = make(single(), run, Sharding())[1]
    opt.zero_grad(3)
    with pytest.raises(RuntimeError, match="got no gradient: it takes no part in the loss"):
        opt.collect()
    with pytest.raises(ValueError, match="give 1 or more, or freeze it"):
        opt.zero_grad({"embedding.weight": 1})
    with pytest.raises(ValueError, match="choose one of forward, backward, step, never"):
        make(single(), run, Sharding(), reshard="often")
    with pytest.raises(ValueError, match="does not divide"):
        make(single(), run, Sharding(1, 1, 3))


# ---- compilation


def compiled(mesh: Mesh, run: RunConfig):
    out = []
    for build in (lambda mesh, run: make(mesh, run, Sharding(2, 2, 2), check=True), make_compiled):
        model, opt, _ = build(mesh, run)
        out.append(go(mesh, run, model, opt, range(2)))
    return out


def make_compiled(mesh: Mesh, run: RunConfig):
    from internlm_nb.train.parallelize import build_model, make_optimizer
    from internlm_nb.train.precision import PRECISIONS

    model, placements = build_model(run, mesh)
    for block in model.blocks:
        block.attention.attend = torch.compiler.disable(block.attention.attend)  # type: ignore[union-attr]
        block.compile(backend="aot_eager")
    opt = make_optimizer(model, run.optim, PRECISIONS["float64"], mesh, ZeroConfig(2, 2, 2, check=True), placements)
    return model, opt, placements


def test_hooks_stay_outside_of_a_compiled_block():
    run = run_of(4, recompute=(0.4, "full"))
    for eager, compiled_ in run_ranks(compiled, layout_of(run, 2), run):
        for (loss, norm), (loss1, norm1) in zip(eager, compiled_):
            assert abs(loss - loss1) <= 1e-10 * loss and abs(norm - norm1) <= 1e-10 * norm
