"""The parts of generation that need no ranks: choosing a token, texts and their ends, what is
repeated of a log.
"""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixtrain.data.tokenizer import train_bpe
from mixtrain.interop.generate.log_relay import PREFIX, LogRelay
from mixtrain.interop.generate.rank import Progress
from mixtrain.interop.generate.request import Sampling
from mixtrain.interop.generate.sample import choose_token, random_stream, truncated_softmax
from mixtrain.interop.generate.tokenization import PromptTokenizer

LOGITS = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3


@pytest.mark.parametrize(
    "top_k, top_p", [(None, None), (1, None), (5, None), (None, 0.3), (None, 0.9), (7, 0.6)]
)
def test_the_probabilities_are_those_of_transformers(top_k, top_p):
    there = TemperatureLogitsWarper(0.7)(None, LOGITS[None].clone())
    there = TopKLogitsWarper(top_k)(None, there) if top_k else there
    there = TopPLogitsWarper(top_p)(None, there) if top_p else there
    torch.testing.assert_close(
        truncated_softmax(LOGITS / 0.7, top_k, top_p), there[0].softmax(0), rtol=1e-12, atol=0
    )


def test_tokens_are_drawn_as_often_as_they_are_likely():
    sampling = Sampling(1.5, top_k=6, top_p=0.95)
    generator = random_stream(0, 0)
    draws = 4000
    counts = torch.zeros(40)
    for _ in range(draws):
        counts[choose_token(LOGITS, sampling, generator)] += 1
    likely = truncated_softmax(LOGITS / 1.5, 6, 0.95)
    assert counts[likely == 0].sum() == 0
    deviation = (likely * (1 - likely) / draws).sqrt()
    assert ((counts / draws - likely).abs() <= 4 * deviation).all()


def test_rounding_changes_no_token_even_where_two_are_as_good_as_equal():
    likeliest = LOGITS.clone()
    likeliest[[3, 30]] = LOGITS.max() + 1
    one = likeliest.clone()
    other = likeliest.clone()
    one[3], other[30] = one[3] + 1e-7, other[30] + 1e-7
    for sampling in (Sampling(1.0), Sampling(1.0, top_p=0.95)):
        streams = random_stream(7, 0), random_stream(7, 0)
        for _ in range(300):
            assert choose_token(one, sampling, streams[0]) == choose_token(
                other, sampling, streams[1]
            )


def test_a_prompt_has_its_own_stream_and_a_seed_gives_it_again():
    drawn = {(seed, prompt): choose_many(seed, prompt) for seed in (0, 1) for prompt in (0, 1)}
    assert len({tuple(tokens) for tokens in drawn.values()}) == 4
    assert choose_many(1, 1) == drawn[1, 1]


def choose_many(seed: int, prompt: int) -> list[int]:
    generator = random_stream(seed, prompt)
    return [choose_token(LOGITS, Sampling(2.0), generator) for _ in range(20)]


def test_at_temperature_0_the_likeliest_is_taken():
    assert choose_token(LOGITS, Sampling(), random_stream(0, 0)) == LOGITS.argmax()


def test_a_stop_text_is_seen_though_a_character_of_it_is_several_tokens(tmp_path):
    train_bpe(iter(["nothing of this kind"]), 270, tmp_path)
    text = PromptTokenizer(str(tmp_path), ["é–"])
    tokens = text.encode("abc é–def", chat=False)
    seen = [number for number in range(1, len(tokens) + 1) if text.has_stop_text(tokens[:number])]
    assert len("é–".encode()) == 5 and seen[0] == len(text.encode("abc é–", chat=False))
    assert text.continuation(text.encode("x", chat=False), tokens) == "abc "
    assert not PromptTokenizer(str(tmp_path), []).has_stop_text(tokens)


def test_a_word_keeps_the_space_before_it_and_a_prompt_its_first_token(tmp_path):
    """With a tokenizer of the kind that Mixtral has: words begin with a space, and <s> is put
    before a text.
    """
    words = {
        token: number
        for number, token in enumerate(["<s>", "</s>", "▁Paris", "▁is", "▁a", "▁city", "</"])
    }
    made = Tokenizer(models.WordLevel(words, unk_token="</"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    text = PromptTokenizer(str(tmp_path), ["city"])
    prompt = text.encode("Paris is", chat=False)
    assert prompt == [0, 2, 3] and text.end_tokens() == {1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 6]}')
    assert text.end_tokens() == {1, 6}
    assert text.continuation(prompt, [4, 1]) == " a"
    assert (
        text.continuation(prompt, [4, 5, 2]) == " a "
        and text.has_stop_text([4, 5])
        and not text.has_stop_text([4])
    )


def test_the_terminal_is_told_the_lines_that_are_for_it_once_each(tmp_path, capfd):
    log = tmp_path / "rank_0.log"
    with LogRelay(log):
        log.write_text(f"a warning\n{PREFIX}loading\n{PREFIX}half a li")
        with open(log, "a") as file:
            file.write(f"ne\nTraceback\n{PREFIX}done\n")
    assert capfd.readouterr().err.splitlines() == [
        f"{PREFIX}loading",
        f"{PREFIX}half a line",
        f"{PREFIX}done",
    ]


def test_progress_is_said_every_few_seconds_and_at_the_end(monkeypatch):
    now = [100.0]
    said = []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = Progress(3, said.append)
    for _ in range(5):
        now[0] += 0.9
        progress.on_pass(3, 2)
    progress.end(1)
    assert said == [
        "9 tokens, 3.3 tokens/s; 2 unfinished",
        "3 prompts with 1 token continued with 15 in 4.50 s: 3.3 tokens/s, the first after 0.90 s",
    ]
