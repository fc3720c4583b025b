"The arithmetic of training: a second opinion, token weights, one norm, loss scale, bad steps, and no waiting"

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from train_runs import TINY, facts, tensors, tiny_run, trainer, with_fields, write_folder

from internlm_nb.data.loader import Loader
from internlm_nb.data.packing import pack
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.transformer import Transformer, recompute
from internlm_nb.observe.metrics import LOG_KEYS, TypeMeter, log_line
from internlm_nb.parallel.batch import Batch
from internlm_nb.run.state import TrainState
from internlm_nb.train.optim import OptimConfig
from internlm_nb.train.parallelize import make_optimizer
from internlm_nb.train.precision import PRECISIONS, LossScale, LossScaleConfig
from internlm_nb.train.schedules import ScheduleConfig, lr_at
from internlm_nb.train.step import evaluate, train_step

pytestmark = pytest.mark.usefixtures("no_plots")
LLAMA = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    mlp_ratio=2.0,
    multiple_of=16,
)


# a second opinion: transformers' Llama, torch's AdamW, torch's clipping, and the formula of the learning rate


def to_llama(model, read):
    "Our parameters, or their gradients, under Llama's names"
    cfg, out = (
        model.cfg,
        {
            "model.embed_tokens.weight": read(model.embedding.weight),
            "model.norm.weight": read(model.head.norm.weight),
            "lm_head.weight": read(model.head.weight),
        },
    )
    for i, block in enumerate(model.blocks):
        at, group = f"model.layers.{i}", cfg.num_heads // cfg.num_kv_heads
        fused = read(block.attention.wqkv.weight).unflatten(0, (cfg.num_kv_heads, group + 2, cfg.head_dim))
        q, k, v = fused[:, :group].flatten(0, 1), fused[:, group], fused[:, group + 1]
        out |= {f"{at}.self_attn.{n}_proj.weight": t.flatten(0, 1) for n, t in (("q", q), ("k", k), ("v", v))}
        out |= {
            f"{at}.self_attn.o_proj.weight": read(block.attention.wo.weight),
            f"{at}.input_layernorm.weight": read(block.attention_norm.weight),
        }
        out[f"{at}.post_attention_layernorm.weight"] = read(block.ffn_norm.weight)
        out |= {
            f"{at}.mlp.{n}_proj.weight": read(getattr(block.feed_forward, w).weight)
            for n, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        }
    return out


def in_float64(hf):
    "transformers computes norms and rotary angles in float32 whatever the weights are: here they are done in float64, by torch's own rms_norm and the definition"
    for module in hf.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(
                x, m.weight.shape, m.weight, m.variance_epsilon
            )
    c = hf.config
    half = c.hidden_size // c.num_attention_heads // 2
    inverse = c.rope_parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)

    def angles(x, position_ids):
        a = (position_ids[..., None].double() * inverse).repeat(1, 1, 2)
        return a.cos(), a.sin()

    hf.model.rotary_emb.forward = angles


def plain_loop(model, run, steps):
    "The same run with other people's code: documents one by one, one loss a step, losses and norms of each step and the last weights"
    from transformers import LlamaConfig, LlamaForCausalLM

    c, o = model.cfg, run.optim
    hf = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.ffn_size, num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads, rms_norm_eps=c.norm_eps, max_position_embeddings=c.max_position_embeddings, attn_implementation="sdpa",
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
    )).to(model.embedding.weight.dtype)  # fmt: skip
    hf.load_state_dict({n: t.clone() for n, t in to_llama(model, lambda p: p.detach()).items()})
    if model.embedding.weight.dtype == torch.float64:
        in_float64(hf)
    adam = torch.optim.AdamW(
        hf.parameters(),
        lr=o.lr,
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        weight_decay=o.weight_decay,
        foreach=False,
        fused=False,
    )
    loader, out = Loader(run.data, run.train.seed, c.vocab_size), []
    total, warm, init = run.train.steps, int(run.train.steps * o.schedule.warmup_ratio), o.schedule.init_steps
    for e in range(steps):
        if e < init:
            lr = 0.0
        elif e < init + warm:
            lr = o.lr * (e - init + 1) / warm
        else:
            lr = (
                o.schedule.min_lr
                + (o.lr - o.schedule.min_lr) * (1 + math.cos(math.pi * (e - init - warm) / (total - init - warm))) / 2
            )
        adam.param_groups[0]["lr"] = lr
        adam.zero_grad()
        loss_sum, targets = 0.0, 0
        for p in loader.batch(e):
            for ids, labels in zip(p.input_ids.split(p.lengths), p.labels.split(p.lengths)):
                if (labels != -100).any():
                    logits = hf(input_ids=ids[None], use_cache=False).logits[0]
                    loss_sum = loss_sum + torch.nn.functional.cross_entropy(
                        logits, labels, ignore_index=-100, reduction="sum"
                    )
                    targets += int((labels != -100).sum())
        (loss_sum / targets).backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), o.clip)
        adam.step()
        out.append((loss_sum.item() / targets, norm.item(), lr))
    return out, dict(hf.named_parameters())


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_second_opinion(precision, tmp_path):
    "Six steps of the trainer are six steps of a plain loop over transformers, on real files with tokens that are no targets"
    run = tiny_run(
        LLAMA, data_train_folder=(str(write_folder(tmp_path / "tokens")),), data_micro_num=3, train_steps=6, train_precision=precision, optim_clip=0.5, optim_weight_decay=0.1,
        schedule=ScheduleConfig(warmup_ratio=0.34, init_steps=1, min_lr=1e-4), optim_lr=3e-3 if precision == "float64" else 3e-4,
    )  # fmt: skip
    t = trainer(run, tmp_path / "run")
    want, weights = plain_loop(t.model, run, 6)
    t.fit()
    got = facts(tmp_path / "run")
    # float64: rounding alone. float32: the laws' bounds (Adam divides rounding noise by tiny gradients)
    rel, close = (1e-10, 1e-10) if precision == "float64" else (1e-5, 1e-5)
    for r, (loss, norm, lr) in zip(got, want, strict=True):
        assert (
            r["loss"] == pytest.approx(loss, rel=rel)
            and r["grad_norm"] == pytest.approx(norm, rel=rel)
            and r["lr"] == pytest.approx(lr, rel=1e-12, abs=0)
        )
    assert max(r["grad_norm"] for r in got) > 0.5  # the clip was at work
    for name, tensor in to_llama(t.model, lambda p: p.detach()).items():
        assert (tensor - weights[name]).abs().max() <= close, name
    assert len({p.num_targets for e in range(6) for p in t.loader.batch(e)}) > 3  # packs of unequal weight


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.data())
def test_any_cut_into_micro_batches_is_one_step(data):
    "The same documents, however they are cut into packs, give the same loss, norm and weights (law 3): float64, rounding alone"
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    docs = [
        torch.randint(1, 97, (n,), generator=g) * (1 if i % 3 else -1)
        for i, n in enumerate(data.draw(st.lists(st.integers(2, 12), min_size=4, max_size=9)))
    ]
    docs.append(torch.arange(1, 9))  # one that surely has targets
    borders = sorted(data.draw(st.sets(st.integers(1, len(docs) - 1), max_size=4)))
    groups = [docs[a:b] for a, b in zip([0, *borders], [*borders, len(docs)])]
    results = []
    for cut in ([docs], groups):
        packs = [next(pack([d.tolist() for d in group], 12, len(group))) for group in cut]
        model = Transformer(replace(TINY, num_layers=1), dtype=torch.float64)
        torch.nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
        opt = make_optimizer(model, OptimConfig(lr=1e-2, clip=0.3), PRECISIONS["float64"])
        opt.set_schedule(0, 1)
        meter = TypeMeter(["x"])
        out = train_step(model, opt, [Batch.of(p) for p in packs], sum(p.num_targets for p in packs), meter)
        results.append((out.loss, out.grad_norm, *[p.detach() for p in model.parameters()]))
        assert meter.read()["loss"] == pytest.approx(out.loss.item(), rel=1e-12)
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-10


def test_batch_without_targets_is_no_zero_by_zero():
    "A micro-batch of context alone changes nothing, and a step of nothing else has loss 0 and a finite norm"
    packs = [next(pack([[-5, -6, -7, -8]], 4, 1)), next(pack([[5, 6, 7, 8]], 4, 1))]
    for chosen in (packs, packs[:1]):
        model = Transformer(TINY)
        opt = make_optimizer(model, OptimConfig())
        out = train_step(model, opt, [Batch.of(p) for p in chosen], sum(p.num_targets for p in chosen))
        assert torch.isfinite(out.loss) and torch.isfinite(out.grad_norm) and not out.skipped
    assert out.loss == 0 and out.grad_norm == 0


def test_first_loss_is_ln_vocab(tmp_path):
    "Weights of the v1 initialisation know nothing: ln(vocab), where ln(103168) is 11.544"
    run = tiny_run(replace(TINY, vocab_size=20_000, hidden_size=64), train_steps=1)
    t = trainer(run, tmp_path / "a")
    t.fit()
    assert facts(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(20_000), abs=0.05)
    assert math.log(103168) == pytest.approx(11.544, abs=5e-4)


# fp16: the loss scale's way, and steps that undo themselves


def reference_scale(cfg, overflows):
    "The rule in words: x2 after growth_interval clean steps in a row, x1/2 at each overflow once there have been `hysteresis` of them since it last grew"
    scale, clean, seen, out = cfg.init, 0, 0, []
    for bad in overflows:
        if bad:
            clean, seen = 0, seen + 1
            if seen >= cfg.hysteresis:
                scale = max(scale * cfg.backoff, cfg.min)
        else:
            clean += 1
            if clean == cfg.growth_interval:
                scale, clean, seen = min(scale * cfg.growth, cfg.max), 0, 0
        out.append(scale)
    return out


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_loss_scale_trajectory(overflows, hysteresis, interval):
    cfg = LossScaleConfig(init=64.0, growth_interval=interval, hysteresis=hysteresis, min=4.0, max=256.0)
    scale, got = LossScale(cfg), []
    for bad in overflows:
        scale.update(torch.tensor(float(bad)))
        got.append(scale.scale.item())
    assert got == reference_scale(cfg, overflows)


def states(t) -> dict[str, torch.Tensor]:
    "Masters, moments and step counts"
    return {name: part.tensor for name, part in t.optimizer.named_parts().items()}


def test_overflow_skips_the_step_and_only_that(tmp_path):
    "A scale that overflows: nothing changes but the step number and the scale; the schedule goes on, tokens are not counted; then it trains"
    scale = LossScaleConfig(init=2.0**24, max=2.0**24, growth_interval=4, hysteresis=2)
    run = tiny_run(
        train_precision="float16", train_steps=14, train_loss_scale=scale, checkpoint_every=1, checkpoint_keep_last=0
    )
    t = trainer(run, tmp_path / "a")
    t.model.head.weight.data *= 30  # larger gradients: 2^24 is surely too much
    before = {n: x.clone() for n, x in states(t).items()}
    t.fit(1)
    assert all(torch.equal(before[n], x) for n, x in states(t).items())
    assert all(not x.any() for n, x in states(t).items() if n.startswith(("exp_avg", "adam_step")))
    t.fit()
    records = facts(tmp_path / "a")
    bad = [b["inf_nan_skip_batches"] - a for a, b in zip([0, *[r["inf_nan_skip_batches"] for r in records]], records)]
    assert bad[0] == 1 and 0 in bad
    assert [r["loss_scale"] for r in records[1:]] == reference_scale(scale, bad)[:-1]
    assert records[-1]["num_consumed_tokens"] == sum(r["tokens"] for r, b in zip(records, bad) if not b)
    assert [r["lr"] for r in records] == [lr_at(e, run.optim.lr, 14, run.optim.schedule) for e in range(14)]
    last = tensors(tmp_path / "a", 14)
    assert last["adam_step.head.weight"] == bad.count(0)
    assert all(math.isfinite(r["loss"]) for r in records)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_one_bad_gradient_costs_one_step(precision, tmp_path):
    "Not-a-number in one gradient: the step changes no weight and no moment, the next ones train"
    t = trainer(tiny_run(train_precision=precision, train_steps=4), tmp_path / "a")
    t.fit(1)
    kept = {n: x.clone() for n, x in states(t).items()}
    handle = t.model.head.weight.register_hook(lambda g: g * torch.nan)
    t.fit(1)
    handle.remove()
    assert all(torch.equal(kept[n], x) for n, x in states(t).items())
    t.fit()
    records = facts(tmp_path / "a")
    assert records[1]["grad_norm"] is None and records[-1]["inf_nan_skip_batches"] == 1  # null: JSON has no NaN
    assert t.state == TrainState(
        4, sum(r["tokens"] for i, r in enumerate(records) if i != 1), t.state.num_consumed_samples, 1, 0
    )
    assert states(t)["adam_step.head.weight"] == 3


# what may not change the computation


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_recomputation_changes_no_bit(precision, tmp_path):
    base = tiny_run(train_steps=3, checkpoint_every=0, train_precision=precision)
    trainer(base, tmp_path / "none").fit()
    for i, (share, policy) in enumerate(
        [(1.0, "full"), (0.5, "full"), (1.0, "selective"), (0.7, "selective")][: 4 if precision == "bfloat16" else 2]
    ):
        trainer(with_fields(base, train_recompute=share, train_recompute_policy=policy), tmp_path / str(i)).fit()
        assert facts(tmp_path / "none") == facts(tmp_path / str(i))
        a, b = tensors(tmp_path / "none", 3), tensors(tmp_path / str(i), 3)
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_observing_changes_no_bit(tmp_path, monkeypatch):
    "Validation, reading ahead, profiling, plots and saving do not touch the training"
    base = tiny_run(train_steps=4, checkpoint_every=0, data_train_folder=(str(write_folder(tmp_path / "t")),))
    trainer(base, tmp_path / "plain").fit()
    watched = with_fields(
        base, train_valid_every=1, data_valid_folder=str(write_folder(tmp_path / "v", seed=5)), data_prefetch=3, train_profile_steps="1-2", train_profile_memory=True,
        log_plots_every=2, checkpoint_every=1, checkpoint_snapshot_every=1,
    )  # fmt: skip
    monkeypatch.undo()  # with plots
    trainer(watched, tmp_path / "watched").fit()
    assert facts(tmp_path / "plain") == facts(tmp_path / "watched")
    a, b = tensors(tmp_path / "plain", 4), tensors(tmp_path / "watched", 4)
    assert all(torch.equal(a[n], b[n]) for n in a)
    names = {p.name for p in (tmp_path / "watched" / "profile").iterdir()}
    assert names == {"steps_1-2.trace.json", "steps_1-2.txt"} and (tmp_path / "watched" / "plots").is_dir()


def test_validation_does_not_depend_on_the_training_batch(tmp_path):
    "The same held-out figures at step 0 under any micro_bsz and micro_num, when valid_micro_bsz is fixed; each held-out token once"
    folder = str(write_folder(tmp_path / "v", seed=5))
    base = tiny_run(
        train_steps=1,
        train_valid_every=1,
        data_valid_folder=folder,
        data_valid_packs=0,
        data_valid_micro_bsz=3,
        data_train_folder=(str(write_folder(tmp_path / "t")),),
    )
    seen = []
    for i, (bsz, num) in enumerate([(1, 1), (2, 3), (4, 2)]):
        trainer(with_fields(base, data_micro_bsz=bsz, data_micro_num=num), tmp_path / str(i)).fit()
        seen.append(facts(tmp_path / str(i), "validation.jsonl")[0])
    assert seen[0] == seen[1] == seen[2]
    assert seen[0]["valid_tokens"] == seen[0]["valid_tokens/en"] + seen[0]["valid_tokens/cn"]
    assert seen[0]["valid_perplexity"] == pytest.approx(math.exp(seen[0]["valid_loss"]), rel=1e-12)


def test_label_smoothing_trains_but_does_not_measure(tmp_path):
    "The training loss is the smoothed one; validation and the figures by type are plain cross entropy"
    run = tiny_run(train_steps=1, train_valid_every=1, train_label_smoothing=0.3)
    trainer(run, tmp_path / "smooth").fit()
    trainer(with_fields(run, train_label_smoothing=0.0), tmp_path / "plain").fit()
    smooth, plain = facts(tmp_path / "smooth")[0], facts(tmp_path / "plain")[0]
    assert smooth["loss"] != plain["loss"] and smooth["loss/synthetic"] == pytest.approx(
        plain["loss/synthetic"], rel=1e-6
    )
    assert facts(tmp_path / "smooth", "validation.jsonl")[0] == facts(tmp_path / "plain", "validation.jsonl")[0]


def test_tf32_on_a_cpu_is_close_to_float32(tmp_path):
    before = torch.get_float32_matmul_precision()
    for precision in ("float32", "tf32"):
        trainer(tiny_run(train_steps=3, train_precision=precision), tmp_path / precision).fit()
    assert torch.get_float32_matmul_precision() == before  # the run leaves no trace in the process
    for a, b in zip(facts(tmp_path / "float32"), facts(tmp_path / "tf32"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_run_is_close_to_the_plain_one(backend, tmp_path, monkeypatch):
    "With validation in between. Fused kernels round otherwise: float32 bounds of the laws"
    torch.compiler.reset()
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **kw: real(self, backend=backend, **kw))
    for compiled in (False, True):
        trainer(
            tiny_run(train_steps=3, train_compile=compiled, train_valid_every=2, optim_lr=3e-4),
            tmp_path / str(compiled),
        ).fit()
    for name in ("metrics.jsonl", "validation.jsonl"):
        for a, b in zip(facts(tmp_path / "False", name), facts(tmp_path / "True", name), strict=True):
            key = "loss" if "loss" in a else "valid_loss"
            assert a[key] == pytest.approx(b[key], rel=1e-5)


def test_record_and_line_have_the_keys(tmp_path):
    "metrics.jsonl: what the contract names, each step once; the log line: the keys that users' scripts read, in order"
    folder = (str(write_folder(tmp_path / "t")),)
    trainer(tiny_run(train_steps=3, data_train_folder=folder), tmp_path / "a").fit()
    records = facts(tmp_path / "a")
    from internlm_nb.observe.sinks import read_metrics

    for i, r in enumerate(read_metrics(tmp_path / "a")):
        assert {
            "step",
            "loss",
            "grad_norm",
            "lr",
            "tokens",
            "tgs",
            "tflops",
            "mfu",
            "mfu_causal",
            "hfu",
            "tgs_10",
            "tgs_50",
            "tgs_mean",
        } <= r.keys()
        assert r["step"] == i and r["tgs"] > 0 and r["tflops"] > 0 and r["fwd_bwd_time"] > 0
        assert {f"{k}/{t}" for k in ("loss", "accuracy", "perplexity", "tokens") for t in ("en", "cn")} <= r.keys()
        line = log_line(r)
        assert [w.split("=")[0] for w in line.replace(" (tokens/gpu/second)", "").split()][: len(LOG_KEYS)] == [
            k.split(" ")[0] for k in LOG_KEYS
        ]
        # the mean over all targets is the token-weighted mean of the types
        weights = {t: r.get(f"tokens/{t}", 0) for t in ("en", "cn")}
        assert r["loss"] == pytest.approx(
            sum(r[f"loss/{t}"] * w for t, w in weights.items()) / sum(weights.values()), rel=1e-6
        )
    assert records[-1]["num_consumed_tokens"] == sum(r["tokens"] for r in records)


# law 9


@pytest.mark.parametrize(
    "precision, policy",
    [
        *(("bfloat16", p) for p in ("none", "full", "selective")),
        *((p, "none") for p in ("float16", "float32", "float64")),
    ],
)
def test_the_step_runs_without_values(precision, policy):
    "Under fake tensors every .item() would raise: forward, recomputation, loss, meter, clip, update, loss scale and schedule ask the host for nothing"
    packs = list(pack([list(range(1, 20)), list(range(5, 30))], 16, 2))
    p = PRECISIONS[precision]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        model = Transformer(TINY, dtype=p.param)
        if policy != "none":
            recompute(model, 1.0, policy)
        opt = make_optimizer(
            model,
            OptimConfig(beta2_c=0.8, own_lr=("head.*=1e-5",)),
            p,
            loss_scale=LossScale(LossScaleConfig(), enabled=p.loss_scale),
        )
        meter = TypeMeter(["a", "b"])
        for step in range(2):
            batches = []
            for k in packs:
                b = Batch.of(
                    replace(
                        k,
                        **{
                            n: mode.from_tensor(getattr(k, n))
                            for n in ("input_ids", "labels", "cu_seqlens", "indexes", "type_ids")
                        },
                    )
                )
                batches.append(b)
            opt.set_schedule(step, 10)
            out = train_step(model, opt, batches, sum(k.num_targets for k in packs), meter)
    with pytest.raises(Exception, match="_local_scalar_dense"):
        with mode:
            out.loss.item()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_the_step_never_waits_for_the_gpu(precision, policy):
    "PyTorch itself raises where the host would wait for the device"
    packs = list(pack([list(range(1, 20)), list(range(5, 30))], 16, 2))
    p, device = PRECISIONS[precision], torch.device("cuda")
    model = Transformer(TINY, device=device, dtype=p.param)
    if policy != "none":
        recompute(model, 1.0, policy)
    opt = make_optimizer(
        model, OptimConfig(beta2_c=0.8), p, loss_scale=LossScale(LossScaleConfig(), device, enabled=p.loss_scale)
    )
    meter = TypeMeter(["a", "b"], device)
    for step in range(3):
        batches = [Batch.of(k, device) for k in packs]
        opt.set_schedule(step, 10)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step sets libraries up
        try:
            train_step(model, opt, batches, sum(k.num_targets for k in packs), meter)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(meter.read()["loss"])


def test_evaluate_leaves_the_model_as_it_was():
    model = Transformer(TINY).train()
    got = evaluate(model, pack([[1, 2, 3, 4]], 4, 1), ["x"])
    assert model.training and got["tokens"] == 3 and all(p.grad is None for p in model.parameters())
