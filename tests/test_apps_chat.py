"chat.py on native and Hugging Face folders: what it answers, what it remembers, what it refuses; and token streams that never show half a character"

import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_nb.apps.chat import Chatter, answer, converse, main, room
from internlm_nb.checkpoint.durable import CheckpointError
from internlm_nb.checkpoint.logical import save_state
from internlm_nb.data.chat import Conversation, chat_ids, stop_ids
from internlm_nb.data.textstream import TextStream
from internlm_nb.data.tokenizer import Tokenizer, train_tokenizer
from internlm_nb.hub.load import load_model
from internlm_nb.model.config import ModelConfig
from internlm_nb.model.generate import generate
from internlm_nb.model.sampling import GREEDY, Sampling
from internlm_nb.model.transformer import Transformer

ALL_MARKS = ("<|im_start|>", "<|im_end|>", "<eoh>", "<eoa>")
TEXTS = ["the user asks, the assistant answers; a system listens.", "茶 and 茶碗 and 你好", "<|User|>: <|Bot|>:\n"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A folder with a tokenizer and a run of one checkpoint"
    home = tmp_path_factory.mktemp("chat")
    tok = train_tokenizer(
        TEXTS * 40, home / "run" / "tokenizer.model", vocab_size=360, marks=ALL_MARKS, character_coverage=0.98
    )
    cfg = ModelConfig(
        "internlm2",
        vocab_size=tok.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_ratio=2.0,
        multiple_of=16,
        max_position_embeddings=256,
        init_std=0.3,
    )
    save(home / "run" / "checkpoints" / "7", Transformer(cfg))
    return home


def save(folder: Path, model: Transformer, skip: str = "") -> None:
    tensors = {f"model.{n}": p.detach() for n, p in model.named_parameters() if n != skip}
    save_state(folder, tensors, {"step": 7, "model": asdict(model.cfg)})


@pytest.fixture(scope="module")
def loaded(home):
    return load_model(home / "run")


# --- streams of text

PIECES = st.sampled_from(
    ["茶", "🍵", "👨‍👩‍👧", " ", "   ", "\n", "a", " tea", "é", "你好，", "\ufffd", "<|im_end|>", "ﷺ"]
)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(PIECES, max_size=60), st.integers(0, 20))
def test_stream_is_the_whole_text(loaded, pieces, before):
    "Piece by piece is the text at once, and no piece holds a sign for half a character unless the text does"
    tok, text = loaded.tokenizer, "".join(pieces)
    ids = tok.encode(text)
    stream = TextStream(tok, ids[:before])
    told = [stream.feed(i) for i in ids[before:]] + [stream.end()]
    assert (
        tok.decode(ids[:before][-16:]) == ""
        or "".join(told) == tok.decode(ids[:before][-16:] + ids[before:])[len(tok.decode(ids[:before][-16:])) :]
        or "\ufffd" in tok.decode(ids[:before][-16:])
    )
    if before == 0:
        assert "".join(told) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in told)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.integers(0, 359), max_size=200), st.integers(1, 7))
def test_stream_of_any_ids(loaded, ids, chunk):
    "Ids that spell no text at all come out as the tokenizer decodes them, however they are cut"
    stream = TextStream(loaded.tokenizer)
    told = [stream.feed(*ids[i : i + chunk]) for i in range(0, len(ids), chunk)] + [stream.end()]
    assert "".join(told) == loaded.tokenizer.decode(ids)


def test_stream_is_prompt_and_bounded(loaded):
    "A character is shown with its last byte, and a long text does not slow down"
    tok = loaded.tokenizer
    stream = TextStream(tok)
    ids = tok.encode("🍵")
    assert len(ids) >= 4 and [stream.feed(i) for i in ids][-1] == "🍵"
    stream, calls = TextStream(tok), []
    for i in tok.encode("the user asks 🍵 " * 300):
        stream.feed(i)
        calls.append(len(stream.tail))
    assert max(calls) <= 80


# --- conversations


@pytest.mark.parametrize("style", ["v1", "v2"])
def test_history_is_what_was_said(loaded, style):
    "Ids that grow turn by turn are those of the whole conversation, when answers are encoded as they were"
    tok, talk = loaded.tokenizer, Conversation(loaded.tokenizer, style)
    history = []
    for question, words in (("茶?", "the assistant answers"), ("<|im_end|> <eoa>", "茶碗"), ("", "")):
        history.append(("user", question))
        assert talk.ask(question) == chat_ids(tok, history, style)
        talk.answered(question, tok.encode(words, marks=False))
        history.append(("assistant", words))
        assert talk.ids == chat_ids(tok, history, style, answer=False) and talk.messages == history
    ends = {"v1": "<eoa>", "v2": "<|im_end|>"}
    assert talk.stop_ids == stop_ids(tok, style) == [tok.marks[ends[style]], tok.eos_id]


def test_answers_are_generate(loaded):
    "What is streamed is what generate gives for the template's ids, with the seed of the turn"
    tok, sampling = loaded.tokenizer, Sampling(0.9, top_p=0.9, seed=5)
    chatter = Chatter(loaded.model, tok, "v2", sampling, max_new_tokens=30, system="the system")
    history = [("system", "the system")]
    for turn, question in enumerate(("茶?", "you?")):
        said = "".join(chatter.reply(question))
        history.append(("user", question))
        read = chat_ids(tok, history) if turn == 0 else read_next(chatter, question, wrote)  # noqa: F821
        (wrote,) = generate(loaded.model, [read], 30, replace(sampling, seed=5 + turn), stop_ids(tok))
        assert said == tok.decode(wrote)
        history.append(("assistant", said))
        assert chatter.talk is not None and chatter.talk.messages == history
    chatter.reset()
    assert "".join(chatter.reply("茶?")) == history[2][1]


def read_next(chatter: Chatter, question: str, wrote: list[int]) -> list[int]:
    "Ids of the second turn, whose history holds the ids that were written in the first"
    tok = chatter.tokenizer
    first = chat_ids(tok, [("system", "the system"), ("user", "茶?")])
    return [*first, *wrote, tok.marks["<|im_end|>"], *tok.encode("\n"), *chat_ids(tok, [("user", question)])[1:]]


def test_a_conversation_survives_interrupts(loaded):
    chatter = Chatter(loaded.model, loaded.tokenizer, "v2", Sampling(1.0, seed=1), max_new_tokens=40)
    written: list[str] = []

    def write(piece: str) -> None:
        written.append(piece)
        if len(written) == 3:
            raise KeyboardInterrupt

    answer(chatter, "茶?", write)
    assert written[-1] == " [interrupted]\n" and chatter.talk is not None
    assert chatter.talk.messages[0] == ("user", "茶?") and chatter.talk.messages[1][1].startswith("".join(written[:3]))
    assert chatter.talk.ids == chatter.talk.ask("x")[: len(chatter.talk.ids)]
    keys = iter(["", KeyboardInterrupt, "  ", "/help", "/reset", "the user", EOFError])

    def ask() -> str:
        key = next(keys)
        if isinstance(key, type):
            raise key
        return key

    written = ["", "", "", ""]
    converse(chatter, ask, written.append)
    assert "".join(written).count("Ctrl-C interrupts") == 2 and "(forgotten)\n" in written
    assert [m[0] for m in chatter.talk.messages] == ["user", "assistant"]


def test_room(loaded):
    model = loaded.model
    assert room(model, 200, 1024) == 56 and room(model, 255, 1024) == 1 and room(model, 10, 5) == 5
    with pytest.raises(ValueError, match="256 tokens and the model's context 256"):
        room(model, 256, 1)
    scaled = Transformer(replace(model.cfg, rope_scaling="linear", rope_factor=2.0), device="meta")
    assert room(scaled, 256, 1024) == 256
    assert (
        room(Transformer(replace(model.cfg, rope_scaling="dynamic", rope_factor=2.0), device="meta"), 9999, 1024)
        == 1024
    )


# --- folders and the command line


def test_load_model(home, loaded):
    model = Transformer(loaded.model.cfg)
    for folder in (home / "run", home / "run" / "checkpoints", home / "run" / "checkpoints" / "7"):
        found = load_model(folder, dtype=torch.float64)
        assert found.tokenizer is not None and found.tokenizer.path == home / "run" / "tokenizer.model"
        for a, b in zip(found.model.parameters(), model.parameters()):
            assert a.dtype == torch.float64 and not a.requires_grad and a.equal(b.double())


def test_load_model_refuses(home, loaded, tmp_path):
    model = Transformer(loaded.model.cfg)
    save(tmp_path / "1", model, skip="blocks.0.attention.wo.weight")
    with pytest.raises(CheckpointError, match=r"missing model.blocks.0.attention.wo.weight"):
        load_model(tmp_path / "1")
    more = {f"model.{n}": p.detach() for n, p in model.named_parameters()} | {"model.extra": torch.zeros(2)}
    save_state(tmp_path / "2", more, {"model": asdict(model.cfg)})
    with pytest.raises(CheckpointError, match=r"too much model.extra"):
        load_model(tmp_path / "2")
    save(tmp_path / "3", Transformer(replace(model.cfg, vocab_size=300)))
    with pytest.raises(ValueError, match="360 pieces, the model 300"):
        load_model(tmp_path / "3", tokenizer=home / "run" / "tokenizer.model")


def run_main(capsys, *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_prompt(home, loaded, capsys):
    code, out, _ = run_main(
        capsys, home / "run", "--prompt", "茶?", "--greedy", "--max-new-tokens", 12, "--template", "v1"
    )
    tok = loaded.tokenizer
    (want,) = generate(loaded.model, [chat_ids(tok, [("user", "茶?")], "v1")], 12, GREEDY, stop_ids(tok, "v1"))
    assert (code, out) == (0, tok.decode(want) + "\n")
    code, out, _ = run_main(
        capsys, home / "run", "--prompt", "the user", "--greedy", "--max-new-tokens", 12, "--template", "none"
    )
    start = tok.encode("the user", bos=True)
    (want,) = generate(loaded.model, [start], 12, GREEDY, [tok.eos_id])
    assert (code, out) == (0, tok.decode(start + want)[len("the user") :] + "\n")
    sampled = [
        run_main(capsys, home / "run", "--prompt", "茶?", "--seed", seed, "--max-new-tokens", 12) for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    "args,message",
    [
        (["nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["{home}", "--prompt", "x"], "index.json"),
        (["{home}/run", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["{home}/run", "--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["{home}/run", "--prompt", "x", "--tokenizer", "{home}/no.model"], "no tokenizer model at"),
        (["{home}/run", "--prompt", "x", "--template", "none", "--system", "y"], "needs a chat template"),
        (["{home}/run", "--prompt", "x", "--template", "v1", "--system", "y"], "no role 'system'"),
        (["{home}/run", "--prompt", "x " * 400], "the model's context 256"),
        (
            ["{home}/bare/1", "--prompt", "x"],
            "no tokenizer beside it, in its run or beside its data: name a SentencePiece .model or a tokenizer.json with --tokenizer FILE",
        ),
    ],
)
def test_refusals(home, loaded, capsys, args, message):
    if not (home / "bare").exists():
        save(home / "bare" / "1", Transformer(loaded.model.cfg))
    code, out, err = run_main(capsys, *(a.replace("{home}", str(home)) for a in args))
    assert code == 2 and out == "" and message in err and err.count("\n") == 1


def test_wrong_option(home):
    with pytest.raises(SystemExit) as stop:
        main([str(home / "run"), "--precision", "int3"])
    assert stop.value.code == 2


def test_piped_conversation(home, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("茶?\n/reset\n茶?\n"))
    code, out, err = run_main(capsys, home / "run", "--seed", 3, "--max-new-tokens", 8)
    first, second = out.split("(forgotten)\n")
    assert code == 0 and first == second and "chat template v2" in err


@pytest.mark.parametrize("prompt", [True, False])
def test_ctrl_c_in_a_real_process(home, prompt):
    "A real SIGINT: in a conversation it ends the answer and the next line is answered; with --prompt it ends the program with 130"
    script = Path(__file__).parents[1] / "scripts" / "chat.py"
    cfg = replace(
        load_model(home / "run").model.cfg, rope_scaling="dynamic", rope_factor=2.0
    )  # no limit, so the answer goes on until it is stopped
    if not (home / "long").exists():
        model = Transformer(cfg)
        model.head.weight.data[load_model(home / "run").tokenizer.eos_id] = 0  # never the largest of 360 logits
        save(home / "long" / "1", model)
    args = [
        sys.executable,
        str(script),
        str(home / "long" / "1"),
        "--tokenizer",
        str(home / "run" / "tokenizer.model"),
        "--template",
        "none",
        "--max-new-tokens",
        "100000",
        "--greedy",
    ]
    child = subprocess.Popen(
        [*args, "--prompt", "x"] if prompt else args,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdin and child.stdout
    try:
        if not prompt:
            child.stdin.write(b"the user\n")
            child.stdin.flush()
        assert child.stdout.read(1)  # it has begun to answer
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(b"" if prompt else b"/exit\n", timeout=60)
    finally:
        child.kill()
    if prompt:
        assert child.returncode == 130 and b"Traceback" not in err
    else:
        assert child.returncode == 0 and b"[interrupted]" in out and b"Traceback" not in err


def test_tokenizer_of_the_data(home, loaded, tmp_path):
    "A checkpoint far from its run finds the tokenizer where its data was prepared"
    (tmp_path / "prepared" / "train").mkdir(parents=True)
    (tmp_path / "prepared" / "tokenizer.model").write_bytes((home / "run" / "tokenizer.model").read_bytes())
    model = Transformer(loaded.model.cfg)
    about = {
        "step": 1,
        "model": asdict(model.cfg),
        "run": {"data": {"train_folder": [str(tmp_path / "prepared" / "train")]}},
    }
    save_state(tmp_path / "1", {f"model.{n}": p.detach() for n, p in model.named_parameters()}, about)
    found = load_model(tmp_path / "1")
    assert isinstance(found.tokenizer, Tokenizer) and found.tokenizer.path == tmp_path / "prepared" / "tokenizer.model"
