"""Guided decoding: by hand, against full passes without a cache, and against enumeration."""

import itertools
import math
from typing import Any

import pytest
import torch

from esscher.distributions.autoregressive import LanguageModel
from esscher.errors import UserError
from esscher.samplers.decoding import Decoding
from esscher.samplers.generation import complete
from esscher.samplers.guided import best_of, product, reranked, write
from esscher.types import Completions

PAD, END = 0, 1


class Remembered:
    """A cache that holds which rows it is of."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.rows = self.rows.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rows = self.rows[indices]


class Table:
    """A bigram model: the probabilities of the next token given the last."""

    end_tokens, pad_token, context_length = (END,), PAD, None

    def __init__(self, table: Any, **changes: Any):
        self.logits = torch.tensor(table).log()
        self.vocabulary, self.sizes = self.logits.shape[1], []
        for name, value in changes.items():
            setattr(self, name, value)

    def next_logits(self, tokens: Any, mask: Any, cache: Any = None) -> Any:
        before = tokens[:, :0] if cache is None else cache.rows
        self.sizes.append(len(tokens))
        seen = torch.cat([before, tokens], 1)
        assert seen.shape == mask.shape, "the cache must follow the rows"
        return self.logits[tokens[:, -1]] + 7.0, Remembered(seen)


def always(*p: float, **changes: Any) -> Table:
    """The same distribution after every token."""
    return Table([list(p)] * max(len(p), 3), **changes)


def llama(seed: int, vocabulary: int = 12, width: int = 16, layers: int = 2) -> LanguageModel:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=PAD, bos_token_id=2, eos_token_id=END,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
        model.lm_head.weight.mul_(0.5)
    return LanguageModel(model, end_tokens=(END,), pad_token=PAD)


def prompts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


def probabilities(rule: Any, tokens: list[list[int]]) -> torch.Tensor:
    logits, _ = rule(*prompts(tokens), None)
    return logits.softmax(-1)


def one_at_a_time(drawn: Completions, row: int) -> Any:
    """Prompt and completion of a row, as lists."""
    return (drawn.tokens[row][m[row]].tolist() for m in (drawn.prompt_mask, drawn.completion_mask))


# ---- products by hand


def test_two_models_by_hand() -> None:
    """Base times the square of the reward: 0.5 * 0.04, 0.3 * 0.04, 0.2 * 0.36."""
    rule = product(always(0.5, 0.3, 0.2), [always(0.2, 0.2, 0.6)], [2.0])
    expected = torch.tensor([[0.02, 0.012, 0.072]]) / 0.104
    torch.testing.assert_close(probabilities(rule, [[2]]), expected)


def test_several_rewards_by_hand() -> None:
    rewards = [always(0.25, 0.25, 0.5), always(0.16, 0.36, 0.48)]
    rule = product(always(0.2, 0.4, 0.4), rewards, [1.0, 0.5])
    expected = torch.tensor([[0.2 * 0.25 * 0.4, 0.4 * 0.25 * 0.6, 0.4 * 0.5 * 0.48**0.5]])
    torch.testing.assert_close(probabilities(rule, [[2]]), expected / expected.sum())


def test_no_temperature_is_hidden_in_the_weights() -> None:
    """A reward equal to the base at weight 1 squares it; the temperature then divides the sum."""
    p = torch.tensor([0.1, 0.3, 0.6])
    rule = product(always(*p.tolist()), [always(*p.tolist())], [1.0])
    torch.testing.assert_close(probabilities(rule, [[2]])[0], p**2 / (p**2).sum())
    where = (rule, [always(*p.tolist())], *prompts([[2]]), [5])
    warm = write(*where, Decoding(max_new_tokens=1, temperature=2.0))
    chosen = warm.tokens[0, 1]
    assert warm.logp[0, 1].item() == pytest.approx(p[chosen].log().item(), rel=1e-5)


def test_the_product_is_normalised_at_every_token_and_not_over_sequences() -> None:
    """Base even; the reward is sure of what follows 2, and of nothing else.

    Squared, the reward's tokens after 2 sum to 0.66, after others to 1/3. Over whole sequences of two
    tokens 2 would come first with probability 0.66 / (0.66 + 2/3) = 0.497; token by token with 1/3.
    """
    base, reward = always(1 / 3, 1 / 3, 1 / 3), Table([[1 / 3] * 3, [1 / 3] * 3, [0.8, 0.1, 0.1]])
    rule = product(base, [reward], [2.0])
    torch.testing.assert_close(probabilities(rule, [[0]]), torch.full((1, 3), 1 / 3))
    after = torch.tensor([[0.64, 0.01, 0.01]]) / 0.66
    torch.testing.assert_close(probabilities(rule, [[0, 2]]), after)


# ---- what is left out


class Untouchable(Table):
    def next_logits(self, tokens: Any, mask: Any, cache: Any = None) -> Any:
        raise AssertionError("a model of weight 0 must not be asked")


def test_weight_0_is_the_base_alone() -> None:
    base, where = llama(0), prompts([[5, 6, 7], [9]])
    decoding = Decoding(max_new_tokens=8, temperature=0.8, top_k=6)
    alone = base.generate(*where, [3, 4], decoding)
    never = Untouchable([[0.0, 1.0]])
    guided = write(product(base, [never], [0.0]), [base], *where, [3, 4], decoding)
    assert torch.equal(alone.tokens, guided.tokens)
    torch.testing.assert_close(alone.logp, guided.logp)


def test_what_one_model_forbids_is_forbidden() -> None:
    rule = product(always(0.5, 0.25, 0.25), [always(0.0, 0.5, 0.5)], [0.1])
    assert probabilities(rule, [[2]])[0].tolist() == pytest.approx([0, 0.5, 0.5])
    rule = product(always(0.5, 0.0, 0.5), [always(0.0, 0.5, 0.5)], [0.0])
    assert probabilities(rule, [[2]])[0].tolist() == pytest.approx([0.5, 0, 0.5])


def test_tokens_that_are_not_shared_are_cut_before_the_softmax() -> None:
    base, larger = always(0.5, 0.3, 0.2), always(0.1, 0.1, 0.2, 0.6)
    expected = torch.tensor([[0.05, 0.03, 0.04]]) / 0.12
    torch.testing.assert_close(probabilities(product(base, [larger], [1.0]), [[2]]), expected)
    two = product(base, [larger], [1.0], vocabulary=2)
    torch.testing.assert_close(probabilities(two, [[2]]), torch.tensor([[0.625, 0.375]]))
    with pytest.raises(UserError, match="token 3, and the models share only the first 3"):
        probabilities(product(base, [larger], [1.0]), [[3]])


# ---- against full passes


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_new_tokens=9),
        Decoding(max_new_tokens=9, temperature=0.7, top_k=6, top_p=0.8),
    ],
)
def test_log_probabilities_are_those_of_the_draws(decoding: Decoding) -> None:
    """Three models of different sizes, prompts of different lengths, rows that end early."""
    from transformers.generation import logits_process as warpers

    models, weights = [llama(0), llama(1, width=32), llama(2, layers=1)], (1.0, 0.8, 0.4)
    rule = product(models[0], models[1:], weights[1:])
    drawn = write(rule, models, *prompts([[5, 6, 7], [9], [3, 4]]), range(12), decoding)
    assert drawn.finished.any() and len(set(drawn.completion_mask.sum(-1).tolist())) > 2
    assert drawn.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row in range(12):
        prompt, completion = one_at_a_time(drawn, row)
        whole = torch.tensor([prompt + completion])
        total = sum(
            w * m.model(input_ids=whole).logits[0].log_softmax(-1)
            for w, m in zip(weights, models, strict=True)
        )
        for place, token in enumerate(completion, len(prompt)):
            scores = total[place - 1 : place] / decoding.temperature
            if decoding.top_k:
                scores = warpers.TopKLogitsWarper(decoding.top_k)(None, scores)
                scores = warpers.TopPLogitsWarper(decoding.top_p)(None, scores)
            expected = scores.log_softmax(-1)[0, token]
            found = drawn.logp[row][drawn.completion_mask[row]][place - len(prompt)]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert (completion[-1] == END) == bool(drawn.finished[row])
        assert END not in completion[:-1]
    assert (drawn.logp[~drawn.completion_mask] == 0).all()


def test_a_completion_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    models = [llama(0), llama(1)]
    rule, decoding = product(models[0], models[1:], [1.0]), Decoding(max_new_tokens=12)
    together = write(rule, models, *prompts([[5, 6, 7], [9], [3]]), [7, 8, 17, 18, 1, 2], decoding)
    alone = write(rule, models, *prompts([[9]]), [18], decoding)
    kept = together.completion_mask[3]
    assert torch.equal(together.tokens[3][kept], alone.tokens[0][alone.completion_mask[0]])


def test_passes_of_every_model_shrink_as_rows_end() -> None:
    base, reward = (Table([[0.1, 0.4, 0.5]] * 3) for _ in range(2))
    rule = product(base, [reward], [0.5])
    drawn = write(rule, [base, reward], *prompts([[2]]), range(40), Decoding(max_new_tokens=6))
    lengths = drawn.completion_mask.sum(-1)
    going = [int((lengths > place).sum()) for place in range(1, int(lengths.max()))]
    assert base.sizes == reward.sizes and base.sizes[0] == 1
    pairs = zip(base.sizes[1:], going, strict=True)
    assert all(left <= size <= left / 0.75 for size, left in pairs)
    assert len(set(base.sizes[1:])) > 2


def test_sequences_are_drawn_with_their_probabilities() -> None:
    """Vocabulary 4, length 3, all sequences, against the products of tables."""
    draw = torch.Generator().manual_seed(0)
    tables = [torch.rand(4, 4, generator=draw).add(0.1) for _ in range(2)]
    tables = [table / table.sum(-1, keepdim=True) for table in tables]
    base, reward = (Table(table.tolist()) for table in tables)
    count = 6_000
    drawn = write(
        product(base, [reward], [1.5]), [base], *prompts([[2]]), range(count),
        Decoding(max_new_tokens=3),
    )  # fmt: skip
    found: dict[tuple[int, ...], int] = {}
    for row in range(count):
        _, completion = one_at_a_time(drawn, row)
        found[tuple(completion)] = found.get(tuple(completion), 0) + 1
    exact: dict[tuple[int, ...], float] = {}
    for sequence in itertools.product(range(4), repeat=3):
        if END in sequence[:-1]:
            sequence = sequence[: sequence.index(END) + 1]
        p = 1.0
        for last, token in itertools.pairwise((2, *sequence)):
            joint = tables[0][last] * tables[1][last] ** 1.5
            p *= float(joint[token] / joint.sum())
        exact[sequence] = p
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    assert found.keys() <= exact.keys()
    for sequence, p in exact.items():
        share = found.get(sequence, 0) / count
        assert abs(share - p) < 4.5 * (p * (1 - p) / count) ** 0.5 + 1e-4, sequence


# ---- whose limits hold


def test_every_models_end_and_context_count() -> None:
    base = always(0.2, 0.0, 0.8, context_length=20)
    reward = always(0.2, 0.0, 0.8, end_tokens=(2,), context_length=5)
    rule, models = product(base, [reward], [1.0]), [base, reward]
    drawn = write(rule, models, *prompts([[0]]), range(20), Decoding(max_new_tokens=4))
    assert drawn.finished.any()
    for row in range(20):
        _, completion = one_at_a_time(drawn, row)
        assert 2 not in completion[:-1]
    with pytest.raises(UserError, match="context of 5"):
        write(rule, models, *prompts([[0, 0]]), [0], Decoding(max_new_tokens=4))


def test_bad_weights_are_refused() -> None:
    base, reward = always(0.5, 0.5), always(0.5, 0.5)
    for weights in ([-1.0], [math.nan], [math.inf], [], [1.0, 1.0]):
        with pytest.raises(UserError, match="weights must be"):
            product(base, [reward], weights)
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="weight must be >= 0"):
            reranked(base, lambda tokens, mask: tokens[:, 0].float(), weight)
    with pytest.raises(UserError, match="candidates must be >= 1, got 0"):
        reranked(base, lambda tokens, mask: tokens[:, 0].float(), 1.0, candidates=0)


# ---- ARGS


def test_candidates_by_hand() -> None:
    """Of 0.5, 0.3, 0.15, 0.05 two are judged: 0.5 e^0 and 0.3 e^(2 * 0.5)."""
    rewards = torch.tensor([0.0, 0.5, 9.0, 9.0])
    texts = []

    def reward(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        texts.append((tokens.tolist(), mask.tolist()))
        return rewards[tokens[:, -1]]

    rule = reranked(always(0.5, 0.3, 0.15, 0.05), reward, 2.0, candidates=2)
    p = probabilities(rule, [[3, 2], [2]])
    total = 0.5 + 0.3 * math.e
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.3 * math.e, 0.0, 0.0]] * 2) / total)
    ((tokens, mask),) = texts
    assert tokens == [[3, 2, 0], [3, 2, 1], [PAD, 2, 0], [PAD, 2, 1]]
    assert mask == [[True] * 3] * 2 + [[False, True, True]] * 2


def test_every_unfinished_text_is_judged_whole() -> None:
    """The reward looks at all tokens of a row; rows end, and the texts must follow them."""

    def reward(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        places = mask.cumsum(-1) * mask
        return 0.1 * (tokens * places).sum(-1).remainder(7).float()

    base = llama(0)
    rule = reranked(base, reward, 1.3, candidates=5)
    drawn = write(rule, [base], *prompts([[5, 6, 7], [9]]), range(10), Decoding(max_new_tokens=8))
    assert drawn.finished.any() and not drawn.finished.all()
    for row in range(10):
        prompt, completion = one_at_a_time(drawn, row)
        with torch.no_grad():
            logits = base.model(input_ids=torch.tensor([prompt + completion])).logits
        logp = logits[0].log_softmax(-1)
        for place, token in enumerate(completion, len(prompt)):
            text = (prompt + completion)[:place]
            scores = {}
            for candidate in logp[place - 1].topk(5).indices.tolist():
                judged = sum(k * t for k, t in enumerate([*text, candidate], 1)) % 7 * 0.1
                scores[candidate] = float(logp[place - 1, candidate]) + 1.3 * judged
            expected = scores[token] - math.log(sum(map(math.exp, scores.values())))
            found = drawn.logp[row][drawn.completion_mask[row]][place - len(prompt)].item()
            assert found == pytest.approx(expected, abs=1e-4)


def test_weight_0_of_candidates_is_the_base_alone() -> None:
    def never(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    rule = reranked(always(0.5, 0.3, 0.2), never, 0.0, candidates=1)
    assert probabilities(rule, [[2]])[0].tolist() == pytest.approx([0.5, 0.3, 0.2])


# ---- best of n


def test_the_best_of_every_group_is_kept() -> None:
    base = Table([[0.1, 0.4, 0.5]] * 3)
    drawn = complete(
        base.next_logits, *prompts([[2], [2, 2]]), range(12), Decoding(max_new_tokens=4),
        end_tokens=(END,), pad_token=PAD, context_length=None,
    )  # fmt: skip
    reward = torch.tensor([0.0, 3, 1, 2, 2, 0, 5, 5, 4, -2, -1, -3])
    kept = best_of(3, drawn, lambda completions: reward)
    for place, row in enumerate([1, 3, 6, 10]):
        assert torch.equal(kept.tokens[place], drawn.tokens[row])
        assert torch.equal(kept.logp[place], drawn.logp[row])
        assert kept.finished[place] == drawn.finished[row]
    assert kept.group.tolist() == [0, 0, 1, 1]
    with pytest.raises(UserError, match="count must divide the 12 completions, got 5"):
        best_of(5, drawn, lambda completions: reward)
