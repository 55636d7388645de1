"""A language model as a distribution: scores and completions of real transformers classes."""

import itertools
from typing import Any

import pytest
import torch

from esscher.distributions.autoregressive import LanguageModel
from esscher.errors import UserError
from esscher.samplers import Decoding

PAD, END = 0, 1


def tiny(kind: str, vocabulary: int = 32, **changes: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    shared = {"vocab_size": vocabulary, "max_position_embeddings": 64}
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_positions=64, n_embd=32, n_layer=2, n_head=4, **changes
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "qwen2":
        config = transformers.Qwen2Config(**width, **heads, **shared, **changes)
        model = transformers.Qwen2ForCausalLM(config)
    else:
        config = transformers.LlamaConfig(**width, **heads, **shared, **changes)
        model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():  # Far from uniform, so that mistakes show.
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def wrapped(kind: str = "llama", vocabulary: int = 32, **changes: Any) -> LanguageModel:
    return LanguageModel(tiny(kind, vocabulary, **changes), end_tokens=(END,), pad_token=PAD)


def batch(lengths: list[tuple[int, int]], vocabulary: int = 32) -> tuple[torch.Tensor, ...]:
    """Random tokens of (prompt, completion) lengths, padded on the right."""
    width = max(p + c for p, c in lengths)
    tokens = torch.randint(2, vocabulary, (len(lengths), width))
    place = torch.arange(width)
    prompt = torch.tensor([[p] for p, _ in lengths])
    whole = torch.tensor([[p + c] for p, c in lengths])
    mask = place < whole
    return tokens.masked_fill(~mask, PAD), mask, mask & (place >= prompt)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_scores_are_the_models_own(kind: str) -> None:
    policy = wrapped(kind)
    tokens, mask, completion = batch([(3, 4), (5, 1), (1, 8)])
    logp = policy.log_prob(tokens, mask, completion)
    for row in range(len(tokens)):  # One at a time, without padding.
        length = int(mask[row].sum())
        alone = policy.model(input_ids=tokens[row : row + 1, :length]).logits.log_softmax(-1)[0]
        for place in range(tokens.shape[1]):
            scored = bool(completion[row, place])
            expected = alone[place - 1, tokens[row, place]] if scored else torch.tensor(0.0)
            torch.testing.assert_close(logp[row, place], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padding_on_the_left_changes_nothing(kind: str) -> None:
    policy = wrapped(kind)
    tokens, mask, completion = batch([(3, 4)])
    shift = torch.nn.functional.pad
    there = policy.log_prob(tokens, mask, completion).sum()
    moved = policy.log_prob(*(shift(x, (5, 0)) for x in (tokens, mask, completion))).sum()
    torch.testing.assert_close(there, moved, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_models_own_loss() -> None:
    policy = wrapped("llama", tie_word_embeddings=True)
    tokens, mask, completion = batch([(3, 4), (2, 2)])
    parameters = list(policy.parameters())
    ours = torch.autograd.grad(policy.log_prob(tokens, mask, completion).sum(), parameters)
    labels = tokens.masked_fill(~completion, -100)
    count = completion.sum()
    loss = policy.model(input_ids=tokens, attention_mask=mask.long(), labels=labels).loss
    theirs = torch.autograd.grad(-loss * count, parameters)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def prompts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_the_likeliest_tokens_are_those_of_transformers(kind: str) -> None:
    policy = wrapped(kind)
    tokens, mask = prompts([[5, 6, 7], [9], [3, 4]])
    ours = policy.generate(tokens, mask, [0, 1, 2], Decoding(max_new_tokens=12, temperature=0.0))
    theirs = policy.model.generate(
        tokens,
        attention_mask=mask.long(),
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    assert torch.equal(ours.tokens, theirs)


def test_sequences_are_drawn_with_their_probabilities() -> None:
    """Vocabulary 4, length 3: all sequences against their exact probabilities."""
    policy = wrapped(vocabulary=4)
    with torch.no_grad():
        policy.head.weight.mul_(0.2)
    tokens, mask = prompts([[2, 3]])
    count = 6_000
    drawn = policy.generate(tokens, mask, range(count), Decoding(max_new_tokens=3))
    found: dict[tuple[int, ...], int] = {}
    for row, kept in zip(drawn.tokens, drawn.completion_mask, strict=True):
        key = tuple(row[kept].tolist())
        found[key] = found.get(key, 0) + 1
    exact: dict[tuple[int, ...], float] = {}
    for sequence in itertools.product(range(4), repeat=3):
        if END in sequence[:-1]:
            sequence = sequence[: sequence.index(END) + 1]
        whole = torch.tensor([[2, 3, *sequence]])
        scored = torch.tensor([[False, False] + [True] * len(sequence)])
        logp = policy.log_prob(whole, torch.ones_like(scored), scored).sum()
        exact[sequence] = logp.exp().item()
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    assert found.keys() <= exact.keys()
    for sequence, p in exact.items():
        share = found.get(sequence, 0) / count
        assert abs(share - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 1e-4, sequence


@pytest.mark.parametrize(
    "decoding",
    [Decoding(max_new_tokens=9), Decoding(max_new_tokens=9, temperature=0.7, top_k=9, top_p=0.8)],
)
def test_log_probabilities_are_those_of_the_draws(decoding: Decoding) -> None:
    policy = wrapped()
    tokens, mask = prompts([[5, 6, 7], [9]])
    drawn = policy.generate(tokens, mask, range(8), decoding)
    attended = drawn.prompt_mask | drawn.completion_mask
    logits = policy.model(**policy._inputs(drawn.tokens, attended)).logits / decoding.temperature
    from transformers.generation import logits_process as warpers

    for row, place in drawn.completion_mask.nonzero().tolist():
        scores = logits[row, place - 1 : place]
        if decoding.top_k:
            scores = warpers.TopKLogitsWarper(decoding.top_k)(None, scores)
            scores = warpers.TopPLogitsWarper(decoding.top_p)(None, scores)
        expected = scores.log_softmax(-1)[0, drawn.tokens[row, place]]
        torch.testing.assert_close(drawn.logp[row, place], expected, rtol=1e-4, atol=1e-4)
    assert (drawn.logp[~drawn.completion_mask] == 0).all()
    if decoding.temperature == 1:
        scored = policy.log_prob(drawn.tokens, attended, drawn.completion_mask)
        torch.testing.assert_close(scored, drawn.logp, rtol=1e-4, atol=1e-4)


def test_a_completion_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    policy = wrapped()
    tokens, mask = prompts([[5, 6, 7], [9], [3, 4]])
    decoding = Decoding(max_new_tokens=20)
    together = policy.generate(tokens, mask, [10, 11, 20, 21, 30, 31], decoding)
    alone = policy.generate(*prompts([[9]]), [21], decoding)
    kept = together.completion_mask[3]
    assert torch.equal(together.tokens[3][kept], alone.tokens[0][alone.completion_mask[0]])
    again = policy.generate(tokens, mask, [10, 11, 20, 21, 30, 31], decoding)
    assert torch.equal(together.tokens, again.tokens)
    other = policy.generate(tokens, mask, [0, 1, 2, 3, 4, 5], decoding)
    assert not torch.equal(together.tokens[:, 3:6], other.tokens[:, 3:6])
    assert together.group.tolist() == [0, 0, 1, 1, 2, 2]


def test_rows_end_at_their_end_token() -> None:
    policy = wrapped(vocabulary=6)
    tokens, mask = prompts([[5, 4, 3], [2]])
    drawn = policy.generate(tokens, mask, range(40), Decoding(max_new_tokens=10))
    lengths = drawn.completion_mask.sum(-1)
    assert len(set(lengths.tolist())) > 3
    for row, kept, finished in zip(
        drawn.tokens, drawn.completion_mask, drawn.finished, strict=True
    ):
        completion = row[kept]
        assert (completion[-1] == END) == bool(finished)
        assert END not in completion[:-1].tolist()
        assert len(completion) == 10 or finished
        assert (row[3:][~kept[3:]] == PAD).all()


def test_forward_passes_shrink_as_rows_end() -> None:
    policy = wrapped(vocabulary=6)
    sizes = []
    step = policy._step
    policy._step = lambda tokens, *rest: sizes.append(len(tokens)) or step(tokens, *rest)  # type: ignore[method-assign]
    drawn = policy.generate(*prompts([[5, 4]]), range(30), Decoding(max_new_tokens=10))
    lengths = drawn.completion_mask.sum(-1)
    assert sizes[0] == 1, "a prompt is read once, however many completions it gets"
    for position, size in enumerate(sizes[1:], 1):
        going = 30 - int(((lengths <= position) & drawn.finished).sum())
        assert going <= size <= going / 0.75
    assert len(set(sizes[1:])) > 2


def test_dropout_is_off_in_training() -> None:
    policy = wrapped("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    tokens, mask, completion = batch([(3, 4)])
    assert torch.equal(*(policy.log_prob(tokens, mask, completion) for _ in range(2)))


def test_adapters_are_scored_and_their_output_matrix_is_found() -> None:
    import peft

    model = tiny("llama")
    tokens, mask, completion = batch([(3, 4)])
    before = LanguageModel(model, end_tokens=(END,), pad_token=PAD).log_prob(
        tokens, mask, completion
    )
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    policy = LanguageModel(peft.get_peft_model(model, config), end_tokens=(END,), pad_token=PAD)
    adapted = policy.log_prob(tokens, mask, completion)
    assert (adapted - before).abs().max() > 1e-3
    logits = policy.model(input_ids=tokens).logits.log_softmax(-1)
    expected = logits[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)[completion[:, 1:]]
    torch.testing.assert_close(adapted[completion], expected, rtol=1e-4, atol=1e-4)
    with policy.model.disable_adapter():
        torch.testing.assert_close(policy.log_prob(tokens, mask, completion), before)


def test_what_does_not_fit_is_refused() -> None:
    policy = wrapped()
    tokens, mask = prompts([[5] * 60])
    with pytest.raises(UserError, match="context of 64"):
        policy.generate(tokens, mask, [0], Decoding(max_new_tokens=5))
    with pytest.raises(UserError, match="multiple of the 2 prompts, got 3"):
        policy.generate(*prompts([[5], [6]]), [0, 1, 2], Decoding())
    with pytest.raises(UserError, match="prompt 1 is empty"):
        policy.generate(*prompts([[5], []]), [0, 1], Decoding(max_new_tokens=5))


def test_logits_that_are_changed_after_the_output_matrix_are_refused() -> None:
    import transformers

    config = transformers.CohereConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, logit_scale=0.25, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = transformers.CohereForCausalLM(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    with pytest.raises(UserError, match="Cohere.*changes its logits"):
        LanguageModel(model, end_tokens=(END,), pad_token=PAD)
