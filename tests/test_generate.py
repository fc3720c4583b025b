"Greedy tokens, beam search and penalties equal transformers' with the same weights; sampling has the distribution it says, and rows of a batch do not touch each other"

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_transformers import CASES, ours, to_llama
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internlm_nb.model.beam import beam_search
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.generate import generate, stream
from internlm_nb.model.sampling import Sampling, choose, penalise, probabilities, seen_tokens
from internlm_nb.model.transformer import Transformer

PROMPTS = [[1, 5, 9, 33, 2, 17, 8], [3], [40, 41, 42], [96, 0, 7, 7, 7]]
EOS = 11


@pytest.fixture(scope="module")
def pair():
    "Our model and transformers' with the same weights, float64 so that near ties cannot decide"
    cfg = CASES["internlm2"]
    model = ours(cfg, torch.float64)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=cfg.ffn_size, num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads, num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=256, rms_norm_eps=cfg.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base}, tie_word_embeddings=False, attention_bias=False,
        )
    ).to(torch.float64)  # fmt: skip
    theirs.load_state_dict(to_llama(model))
    theirs.model.rotary_emb.inv_freq = 1.0 / cfg.rope_base ** (
        torch.arange(0, cfg.head_dim, 2, dtype=torch.float64) / cfg.head_dim
    )
    return model, theirs.eval()


def cut(ids: list[int], stop: int = EOS) -> list[int]:
    return ids[: ids.index(stop)] if stop in ids else ids


def run_theirs(theirs, prompt, n, **options):
    out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=n, do_sample=False, eos_token_id=EOS, pad_token_id=0,
                          return_dict_in_generate=True, output_scores=True, **options)  # fmt: skip
    return out, [row[len(prompt) :].tolist() for row in out.sequences]


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_greedy_equals_transformers(pair, penalty):
    model, theirs = pair
    got = generate(model, PROMPTS, 24, Sampling(temperature=0, repetition_penalty=penalty), stop_ids=[EOS])
    for prompt, mine in zip(PROMPTS, got):
        _, (want,) = run_theirs(theirs, prompt, 24, repetition_penalty=penalty)
        assert mine == cut(want)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("beams,penalty", [(2, 1.0), (4, 1.0), (5, 1.2)])
def test_beam_search_equals_transformers(pair, beams, penalty, length_penalty, early):
    model, theirs = pair
    stop = EOS
    got = beam_search(model, PROMPTS, 12, beams, length_penalty, early, penalty, stop_ids=[stop])
    for prompt, texts in zip(PROMPTS, got):
        out, want = run_theirs(
            theirs,
            prompt,
            12,
            num_beams=beams,
            num_return_sequences=beams,
            length_penalty=length_penalty,
            early_stopping=early,
            repetition_penalty=penalty,
        )
        assert [t.tokens for t in texts] == [cut(w) for w in want]
        # theirs are summed in float32
        torch.testing.assert_close(torch.tensor([t.score for t in texts]), out.sequences_scores, rtol=2e-6, atol=2e-6)
        assert all(t.stopped == (stop in w) for t, w in zip(texts, want))


def test_beam_search_ends_texts(pair):
    "The comparison above means little unless texts end early in it; several stop tokens make that certain"
    model, theirs = pair
    stops = list(range(0, 97, 6))
    got = beam_search(model, PROMPTS, 20, 3, stop_ids=stops)
    ended = 0
    for prompt, texts in zip(PROMPTS, got):
        out = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=20, do_sample=False, eos_token_id=stops, pad_token_id=0,
                              num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True)  # fmt: skip
        for text, row, score in zip(texts, out.sequences, out.sequences_scores):
            want = row[len(prompt) :].tolist()
            end = next((i for i, t in enumerate(want) if t in stops), len(want))
            assert text.tokens == want[:end] and abs(text.score - score.item()) < 2e-6
            ended += text.stopped
    assert ended >= 6


def test_beam_search_alone_and_in_a_batch(pair):
    model, _ = pair
    for prompt, texts in zip(PROMPTS, beam_search(model, PROMPTS, 10, 3, stop_ids=[EOS, 5])):
        (alone,) = beam_search(model, [prompt], 10, 3, stop_ids=[EOS, 5])
        assert [t.tokens for t in alone] == [t.tokens for t in texts]
        assert all(abs(a.score - b.score) < 1e-12 for a, b in zip(alone, texts))


def test_more_beams_than_words():
    "A vocabulary smaller than the number of candidates that are looked at"
    cfg = ModelConfig(
        "llama",
        vocab_size=3,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        mlp_ratio=2.0,
        multiple_of=8,
        init_std=0.5,
    )
    model = Transformer(cfg, dtype=torch.float64)
    (texts,) = beam_search(model, [[1]], 2, beams=9, stop_ids=[])
    assert len(texts) == 9 and len({tuple(t.tokens) for t in texts}) == 9  # all there are
    assert abs(sum(math.exp(t.score * 2) for t in texts) - 1) < 1e-12


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.floats(0.1, 3.0),
    st.integers(0, 60),
    st.floats(0.01, 1.0),
    st.floats(0.5, 2.0),
    st.booleans(),
)
def test_distribution_equals_transformers(seed, temperature, top_k, top_p, penalty, ties):
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    if ties:
        logits = logits.round()
    prompts = [[1, 2, 2, 3], [4, 4, 4, 4], [0, 49, 7, 1]]
    chain = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    # a tie at the border of top_p is theirs to cut by sorting order, which nobody promises: compare it without ties only
    if not ties:
        chain.append(TopPLogitsWarper(top_p))
    want = chain(torch.tensor(prompts), logits.clone()).softmax(-1)
    sampling = Sampling(temperature, top_k, 1.0 if ties else top_p, penalty)
    p, order = probabilities(penalise(logits, seen_tokens(prompts, 50), [penalty] * 3), sampling)
    torch.testing.assert_close(torch.zeros_like(want).scatter(1, order, p), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0), Sampling(0.6), Sampling(1.4, top_k=6), Sampling(1.0, top_p=0.7), Sampling(0.9, 8, 0.9)]
)
def test_draws_follow_the_distribution(sampling):
    "Chi-square of 20 000 draws against the exact probabilities, below its 99.9 % quantile; fixed seed"
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    n = 20_000
    drawn = choose(logits.expand(n, -1), sampling, range(n), 0).bincount(minlength=12).double()
    p, order = probabilities(logits, sampling)
    expected = n * torch.zeros(12).scatter(0, order[0], p[0]).double()
    assert drawn[expected == 0].sum() == 0
    live = expected > 0
    chi = ((drawn - expected)[live] ** 2 / expected[live]).sum().item()
    freedom = int(live.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert chi < quantile, (chi, quantile)


def test_draws_of_steps_are_independent():
    "Pairs of two following draws: chi-square over the 16 combinations"
    logits, n = torch.zeros(1, 4), 16_000
    first, second = (choose(logits.expand(n, -1), Sampling(seed=4), range(n), step) for step in (0, 1))
    counts = (first * 4 + second).bincount(minlength=16).double()
    assert ((counts - n / 16) ** 2 / (n / 16)).sum() < 37.7  # 99.9 % quantile for 15 degrees of freedom


def test_first_token_is_sampled():
    "A known fault elsewhere: the first new token was the likeliest one, whatever was asked for"
    cfg = ModelConfig(
        "llama", vocab_size=32, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, mlp_ratio=2.0, multiple_of=8
    )
    model = Transformer(cfg)  # nearly uniform
    first = {generate(model, [[1]], 1, Sampling(seed=seed))[0][0] for seed in range(200)}
    assert len(first) > 24


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=40), min_size=1, max_size=5), st.integers(0, 1000))
def test_a_batch_gives_what_each_gets_alone(pair, prompts, seed):
    "With settings of its own, each prompt of a batch is as if it were alone: greedy, sampled and penalised beside each other"
    model, _ = pair
    kinds = [
        Sampling(0),
        Sampling(1.0, seed=seed),
        Sampling(0.8, 20, 0.9, 1.2, seed=seed),
        Sampling(0, repetition_penalty=1.5),
        Sampling(1.5, top_p=0.5, seed=seed + 1),
    ]
    each = kinds[: len(prompts)]
    together = generate(model, prompts, 8, each, stop_ids=[EOS, 20])
    for prompt, sampling, text in zip(prompts, each, together):
        assert [text] == generate(model, [prompt], 8, sampling, stop_ids=[EOS, 20])


def test_rows_keep_their_draws_when_others_change(pair):
    model, _ = pair
    sampling = Sampling(1.2, seed=9)
    full = generate(model, PROMPTS, 10, sampling)
    assert full[0] == generate(model, PROMPTS[:1], 10, sampling)[0]
    assert full[:2] == generate(model, [PROMPTS[0], PROMPTS[1], [8, 8]], 10, sampling)[:2]
    assert full != generate(model, PROMPTS, 10, Sampling(1.2, seed=10))


def test_stream_is_generate_step_by_step(pair):
    model, _ = pair
    steps = list(stream(model, PROMPTS, 10, Sampling(1.2, seed=9), stop_ids=[EOS, 5, 6]))
    rows = [[step[row] for step in steps if row in step] for row in range(len(PROMPTS))]
    assert rows == generate(model, PROMPTS, 10, Sampling(1.2, seed=9), stop_ids=[EOS, 5, 6])
    assert all(step for step in steps)


@pytest.mark.parametrize("name", ["dynamic", "linear", "internlm"])
def test_cached_equals_uncached(name):
    "Greedy by the loop and greedy by whole passes, across the border of dynamic scaling"
    model = ours(CASES[name], torch.float64)
    prompts = [list(range(28)), [5, 6, 7]]
    for prompt, text in zip(prompts, generate(model, prompts, 10)):
        grown = list(prompt)
        for token in text:
            assert token == int(model(torch.tensor(grown))[-1].argmax())
            grown.append(token)


def test_nothing_to_do(pair):
    model, _ = pair
    assert generate(model, [], 5) == [] and generate(model, PROMPTS, 0) == [[]] * 4 and beam_search(model, [], 5) == []
    with pytest.raises(ValueError, match="2 samplings for 1 prompts"):
        generate(model, [[1]], 3, [Sampling(), Sampling()])
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        beam_search(model, [[1], []], 3)
