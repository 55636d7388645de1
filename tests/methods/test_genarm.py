"""GenARM: its loss by hand, pair by pair and as TRL has it; what it writes, against full passes."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llamas
from esscher import words
from esscher.adapters.models import save_model
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.experiment import Experiment
from esscher.methods.language import genarm
from esscher.methods.language.genarm import Config, GenARM
from esscher.models import character_tokenizer
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.samplers.decoding import Decoding
from esscher.types import Pairs

PAD, END = 0, 2
TOKENIZER = character_tokenizer("abcdefghijklmnop")
VOCABULARY = len(TOKENIZER)
# Prompts of several lengths, with a chosen and a rejected completion of several lengths.
PAIRS = [
    ([3, 4, 5], [6, 7, 8, END], [9, END]),
    ([10], [11, END], [12, 13, 14, 15, 16, END]),
    ([3, 17, 18, 5], [8, 7, END], [6, 6, END]),
    ([4, 4], [5, END], [END]),
]


def llama(
    seed: int = 0, adapters: bool = False, dtype: torch.dtype = torch.float64, **changes: Any
) -> Any:
    """Random weights, far from uniform, so that mistakes show."""
    import transformers

    options = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": END,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options | changes)).to(dtype)
    shaken(model.parameters(), 0.2, seed)
    if not adapters:
        return model
    import peft

    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora, autocast_adapter_dtype=False)


def shaken(parameters: Any, size: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
            parameter.add_(size * noise)


def wrapped(model: Any) -> LanguageModel:
    return LanguageModel(model, end_tokens=(END,), pad_token=PAD)


def method_of(model: Any, tokenizer: Any = TOKENIZER, **changes: Any) -> GenARM:
    """Around a reward model that has already left the base model."""
    settings = {"beta": 0.7, "batch_size": 4, "warmup_updates": 0} | changes
    spec = TextSpec(model=wrapped(model), tokenizer=tokenizer, max_length=64)
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager"))
    torch.manual_seed(2)  # Of the number that is read off the last token.
    method = GenARM(Config(**settings), spec, runtime)
    shaken(method.policy.trained, 0.1, seed=7)
    return method


def batch_of(pairs: Any = PAIRS, left: int = 0, right: int = 0) -> Pairs:
    return llamas.padded_pairs(pairs, PAD, left, right)


def gradient_of(method: GenARM, batch: Pairs, step: int = 0) -> tuple[dict[str, Any], list[Any]]:
    """What an update reports, and the gradient that it hands to the optimiser."""
    found: list[list[torch.Tensor]] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    told = method.update(batch, step)
    (gradient,) = found
    return told, gradient


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of one completion, without padding, from a full softmax over all positions."""
    tokens = torch.tensor([prompt + completion])
    logp = model(input_ids=tokens).logits[0].log_softmax(-1)
    places = range(len(prompt), len(prompt) + len(completion))
    return torch.stack([logp[place - 1, tokens[0, place]] for place in places]).sum()


def slow_rewards(model: Any) -> torch.Tensor:
    return torch.stack(
        [torch.stack([log_probability(model, p, c) for c in both]) for p, *both in PAIRS]
    )


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """To a share of the largest entry of all."""
    largest = max(float(x.abs().max()) for x in theirs)
    assert largest > 1e-4
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).abs().max()) < tolerance * largest


# ---- the loss


class Stated:
    """A model whose completions have these log-probabilities, token by token."""

    trained: list[torch.Tensor] = []  # noqa: RUF012

    def __init__(self, logp: Sequence[Sequence[float]]):
        self.logp = torch.tensor(logp)

    def log_prob(self, tokens: Any, token_mask: Any, completion_mask: Any) -> torch.Tensor:
        return self.logp


def by_hand(**changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Chosen -1 - 2, rejected -0.5 - 1.5 - 3 nats: the reward is -3 against -5."""
    method = method_of(llama(), beta=0.4, batch_size=1, **changes)
    method.model = Stated([[0.0, -1.0, -2.0, 0.0], [0.0, -0.5, -1.5, -3.0]])  # type: ignore
    reward = method._both_rewards(batch_of([([5], [6, END], [7, 8, END])]))
    told = method.judge(batch_of([([5], [6, END], [7, 8, END])]))
    return method.preference_terms(reward).item(), told


def test_one_pair_by_hand() -> None:
    """Margin 0.4 * 2 = 0.8: sums, though the shorter answer would lose by its mean (-1.5, -5/3)."""
    loss, told = by_hand()
    assert loss == pytest.approx(math.log(1 + math.exp(-0.8)), rel=1e-6)
    assert next(iter(told)) == "preference_accuracy" and told["preference_accuracy"].tolist() == [1]
    assert told["margin"].tolist() == pytest.approx([0.8])
    assert told["chosen_reward"].tolist() == [-3] and told["rejected_reward"].tolist() == [-5]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target_margin": 0.3}, math.log(1 + math.exp(-0.5))),
        (
            {"label_smoothing": 0.2},
            0.8 * math.log(1 + math.exp(-0.8)) + 0.2 * math.log(1 + math.exp(0.8)),
        ),
        ({"loss": "hinge"}, 0.2),
    ],
)
def test_the_authors_switches_by_hand(changes: dict[str, Any], expected: float) -> None:
    assert by_hand(**changes)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_is_that_of_the_paper_pair_by_pair(adapters: bool) -> None:
    method = method_of(llama(adapters=adapters))
    told, ours = gradient_of(method, batch_of())
    chosen, rejected = slow_rewards(method.model.model).unbind(1)
    loss = -torch.log(torch.sigmoid(0.7 * (chosen - rejected))).mean()
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert told["accuracy"].item() == ((chosen > rejected).double().mean()).item()
    assert abs(loss.item() - math.log(2)) > 0.05
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-5)


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({}, {}),
        ({"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
        ({"target_margin": 0.5}, {"loss_type": "simpo", "simpo_gamma": 0.5}),
        ({"loss": "hinge"}, {"loss_type": "hinge"}),
    ],
)
def test_it_is_trls_reference_free_loss(changes: Any, theirs: Any) -> None:
    """CPO without its likelihood term; SimPO's gamma, on sums."""
    trainer = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    settings = {"alpha": 0.0, "beta": 0.7, "loss_type": "sigmoid", "label_smoothing": 0.0,
                "simpo_gamma": 0.0, "accelerator": SimpleNamespace(device="cpu")} | theirs  # fmt: skip
    method = method_of(llama(), **changes)
    told, ours = gradient_of(method, batch_of())
    chosen, rejected = slow_rewards(method.model.model).unbind(1)
    loss = trainer.cpo_loss(SimpleNamespace(**settings), chosen, rejected)[0].mean()
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-5)


def test_the_base_model_has_no_part_in_the_loss() -> None:
    """What tells it from DPO."""
    method = method_of(llama())
    before = gradient_of(method, batch_of())
    shaken(method._base.model.parameters(), 1.0, seed=3)
    after = gradient_of(method, batch_of())
    assert before[0]["loss"] == after[0]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("reward", ["autoregressive", "trajectory"])
def test_micro_batches_and_padding_change_nothing(reward: Any) -> None:
    told, whole = gradient_of(method_of(llama(dtype=torch.float32), reward=reward), batch_of())
    for size, left, right in ((1, 0, 0), (3, 0, 0), (0, 2, 3)):
        method = method_of(llama(dtype=torch.float32), reward=reward, micro_batch_size=size)
        again, parts = gradient_of(method, batch_of(left=left, right=right))
        assert again["loss"].item() == pytest.approx(told["loss"].item(), rel=1e-5)
        assert_close(parts, whole, 1e-4)


def test_updates_raise_the_margin() -> None:
    method = method_of(llama(dtype=torch.float32), learning_rate=1e-2)
    margins = [method.update(batch_of(), step)["margin"].item() for step in range(30)]
    assert margins[-1] > margins[0] + 1 and margins[-1] > 1
    assert method.judge(batch_of())["preference_accuracy"].tolist() == [1.0] * 4


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("reward", ["autoregressive", "trajectory"])
def test_what_a_step_moves(adapters: bool, reward: Any) -> None:
    method = method_of(
        llama(adapters=adapters, dtype=torch.float32), reward=reward, learning_rate=1e-2
    )
    names = {n for n, p in method.model.model.named_parameters() if p.requires_grad}
    assert not adapters or all("lora" in name for name in names)
    before = {n: p.clone() for n, p in method.model.model.named_parameters()}
    fixed = {n: p.clone() for n, p in method._base.model.named_parameters()}
    head = None if method.head is None else method.head.weight.clone()
    assert (head is None) == (reward == "autoregressive")
    method.update(batch_of(), 0)
    moved = {n for n, p in method.model.model.named_parameters() if not torch.equal(p, before[n])}
    if reward == "trajectory":  # The language model's own output says nothing any more.
        names -= {n for n in names if "lm_head" in n}
        assert head is not None and not torch.equal(method.head.weight, head)  # type: ignore
    # AdamW's decay moves the output matrix as well where it is trained.
    assert names <= moved and all("lm_head" in n for n in moved - names)
    if not adapters:
        assert all(torch.equal(p, fixed[n]) for n, p in method._base.model.named_parameters())


def test_the_step_warms_up_and_falls_along_half_a_cosine() -> None:
    method = method_of(
        llama(), learning_rate=8e-3, warmup_updates=4, decay_updates=12, micro_batch_size=0
    )
    found = []
    for step in (0, 1, 3, 4, 6, 8, 10, 12, 20):
        gradient_of(method, batch_of(), step)
        found.append(method.opt.learning_rate)
    quarter = (1 + 0.5**0.5) / 2
    expected = [0.25, 0.5, 1, 1, quarter, 0.5, 1 - quarter, 0, 0]
    assert found == pytest.approx([8e-3 * x for x in expected], abs=1e-12)
    steady = method_of(llama(), learning_rate=8e-3, warmup_updates=4)
    gradient_of(steady, batch_of(), 1_000)
    assert steady.opt.learning_rate == 8e-3


# ---- the number off the last token


def test_a_trajectory_reward_is_read_off_the_last_token() -> None:
    method = method_of(llama(dtype=torch.float32), reward="trajectory")
    rewards = method._both_rewards(batch_of(left=1, right=2))
    assert method.head is not None
    for pair, (prompt, *answers) in enumerate(PAIRS):
        for side, answer in enumerate(answers):
            tokens = torch.tensor([prompt + answer])
            states = method.model.model(input_ids=tokens, output_hidden_states=True).hidden_states
            expected = states[-1][0, -1] @ method.head.weight[0]
            torch.testing.assert_close(rewards[pair, side], expected, rtol=1e-4, atol=1e-5)
    told, _ = gradient_of(method, batch_of())
    chosen, rejected = rewards.unbind(1)
    expected = torch.log(1 + torch.exp(-0.7 * (chosen - rejected))).mean()
    assert told["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


# ---- what is learnt


def test_the_reward_learns_the_log_odds_of_preferences() -> None:
    """P(a over b) is 3/4, P(b over c) 3/4, P(a over c) 9/10: beta log pi differs by log 3 each."""
    method = method_of(
        llama(dtype=torch.float32), beta=0.5, batch_size=60, learning_rate=1e-2, weight_decay=0.0
    )
    a, b, c = ([token, END] for token in (6, 7, 8))
    rows = [([3], x, y) for x, y, many in ((a, b, 15), (b, c, 15), (a, c, 18)) for _ in range(many)]
    rows += [([3], y, x) for x, y, many in ((a, b, 5), (b, c, 5), (a, c, 2)) for _ in range(many)]
    batch = batch_of(rows)
    for step in range(120):
        method.update(batch, step)
    with torch.no_grad():
        reward = [0.5 * log_probability(method.model.model, [3], x).item() for x in (a, b, c)]
    assert reward[0] - reward[1] == pytest.approx(math.log(3), abs=0.05)
    assert reward[1] - reward[2] == pytest.approx(math.log(3), abs=0.05)


# ---- what it writes


def prompts(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask


WHERE = prompts([[3, 4, 5], [6]])
FEW = Decoding(max_new_tokens=6)


def assert_written_by(drawn: Any, models: Sequence[Any], weights: Sequence[float]) -> None:
    """Every token's log-probability is that of the product, from full passes without padding."""
    count = 0
    for row in range(len(drawn.tokens)):
        prompt = drawn.tokens[row][drawn.prompt_mask[row]].tolist()
        completion = drawn.tokens[row][drawn.completion_mask[row]].tolist()
        tokens = torch.tensor([prompt + completion])
        with torch.no_grad():
            total = sum(
                w * m(input_ids=tokens).logits[0].log_softmax(-1)
                for m, w in zip(models, weights, strict=True)
            )
        logp = total.log_softmax(-1)
        found = drawn.logp[row][drawn.completion_mask[row]].tolist()
        for place, token in enumerate(completion, len(prompt)):
            expected = logp[place - 1, token].item()
            assert found[place - len(prompt)] == pytest.approx(expected, abs=2e-4)
            count += 1
    assert count >= 8


@pytest.mark.parametrize("adapters", [False, True])
def test_it_guides_the_model_that_training_began_with(adapters: bool) -> None:
    """Though the reward model, which shares weights with it, has been trained."""
    began = llama(dtype=torch.float32)
    method = method_of(
        llama(adapters=adapters, dtype=torch.float32), weight=1.7, learning_rate=1e-2
    )
    for step in range(3):
        method.update(batch_of(), step)
    assert method.model.model.training or not adapters
    drawn = method.write(*WHERE, [1, 2, 3, 4], FEW)
    assert_written_by(drawn, [began, method.model.model], [1.0, 1.7])
    other = method.write(*WHERE, [1, 2, 3, 4], FEW, weights=[0.4])
    assert_written_by(other, [began, method.model.model], [1.0, 0.4])
    alone = method.write(*WHERE, [1, 2, 3, 4], FEW, weights=[0.0])
    assert torch.equal(alone.tokens, wrapped(began).generate(*WHERE, [1, 2, 3, 4], FEW).tokens)


def test_beta_of_training_is_no_part_of_decoding() -> None:
    drawn = [
        method_of(llama(dtype=torch.float32), beta=beta).write(*WHERE, [1, 2], FEW)
        for beta in (0.1, 5.0)
    ]
    torch.testing.assert_close(drawn[0].logp, drawn[1].logp)


def saved(model: Any, folder: Path, tokenizer: Any = TOKENIZER) -> str:
    return str(save_model(wrapped(model), tokenizer, folder))


def test_a_small_reward_guides_a_larger_base_together_with_others(tmp_path: Path) -> None:
    large = llama(1, hidden_size=32, num_hidden_layers=3, dtype=torch.float32)
    second = llama(2, dtype=torch.float32)
    method = method_of(
        llama(dtype=torch.float32),
        base=saved(large, tmp_path / "large"),
        others=(saved(second, tmp_path / "second"),),
        other_weights=(0.6,),
        weight=0.9,
    )
    drawn = method.write(*WHERE, [1, 2, 3, 4], FEW)
    assert_written_by(drawn, [large, method.model.model, second], [1.0, 0.9, 0.6])
    drawn = method.write(*WHERE, [1, 2, 3, 4], FEW, weights=(0.0, 1.2))
    assert_written_by(drawn, [large, second], [1.0, 1.2])
    with pytest.raises(UserError, match="weights must be 2 numbers, got"):
        method.write(*WHERE, [1, 2], FEW, weights=[1.0])


def test_another_reward_may_be_a_folder_of_adapters(tmp_path: Path) -> None:
    import peft

    began = saved(llama(dtype=torch.float32), tmp_path / "began")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(began)
    lora = peft.LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    folder = saved(adapted, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").exists()
    method = method_of(llama(3, dtype=torch.float32), others=(folder,), other_weights=(1.0,))
    drawn = method.write(*WHERE, [1, 2, 3, 4], FEW, weights=(0.0, 1.0))
    assert_written_by(drawn, [llama(3, dtype=torch.float32), adapted], [1.0, 1.0])


def test_models_must_share_their_tokens(tmp_path: Path) -> None:
    permuted = character_tokenizer("ponmlkjihgfedcba")
    folder = saved(llama(dtype=torch.float32), tmp_path / "other", permuted)
    with pytest.raises(UserError, match=r"base model .*other has other tokens .*its own tokenizer"):
        method_of(llama(dtype=torch.float32), base=folder)
    with pytest.raises(UserError, match=r"other reward model .*other has other tokens"):
        method_of(llama(dtype=torch.float32), others=(folder,), other_weights=(1.0,))
    with pytest.raises(UserError, match="base esscher.models:no_such cannot|base 'esscher.models"):
        method_of(llama(dtype=torch.float32), base="esscher.models:no_such")
    with pytest.raises(UserError, match="base .*nowhere: there is no such folder"):
        method_of(llama(dtype=torch.float32), base=str(tmp_path / "nowhere"))


def test_a_reward_model_may_know_further_tokens(tmp_path: Path) -> None:
    """They are cut off before the softmax, and can not be drawn; not the other way round."""
    fewer = character_tokenizer("abcdefgh")
    small = llama(1, vocab_size=len(fewer), dtype=torch.float32)
    method = method_of(llama(dtype=torch.float32), base=saved(small, tmp_path / "small", fewer))
    where = prompts([[3, 4], [5]])
    drawn = method.write(*where, range(20), FEW)
    assert int(drawn.tokens.max()) < len(fewer)
    row, kept = drawn.tokens[0], drawn.completion_mask[0]
    prompt, completion = row[drawn.prompt_mask[0]].tolist(), row[kept].tolist()
    with torch.no_grad():
        both = [
            m(input_ids=torch.tensor([prompt + completion])).logits[0, :, : len(fewer)]
            for m in (small, method.model.model)
        ]
    logp = (both[0] + both[1]).log_softmax(-1)[len(prompt) - 1, completion[0]]
    assert drawn.logp[0][kept][0].item() == pytest.approx(logp.item(), abs=1e-4)
    with pytest.raises(UserError, match="a prompt holds token 15"):
        method.write(*prompts([[15]]), [0], FEW)
    larger = saved(llama(dtype=torch.float32), tmp_path / "larger")
    with pytest.raises(UserError, match="has other tokens than it should share"):
        method_of(small, tokenizer=fewer, base=larger)


def test_padding_rows_of_a_model_are_never_drawn() -> None:
    method = method_of(llama(vocab_size=64, dtype=torch.float32))
    drawn = method.write(*WHERE, range(40), FEW)
    assert int(drawn.tokens.max()) < VOCABULARY
    assert drawn.tokens[:, 3:].unique().numel() > 10


def test_a_trajectory_reward_guides_as_in_args() -> None:
    """The candidates of a token are scored with the reward of the text that each would make."""
    method = method_of(
        llama(dtype=torch.float32),
        reward="trajectory",
        weight=2.0,
        candidates=5,
        learning_rate=1e-2,
    )
    for step in range(3):
        method.update(batch_of(), step)
    drawn = method.write(*WHERE, [1, 2, 3, 4], FEW)
    base, trained, head = llama(dtype=torch.float32), method.model.model, method.head
    assert head is not None
    for row in range(4):
        prompt = drawn.tokens[row][drawn.prompt_mask[row]].tolist()
        completion = drawn.tokens[row][drawn.completion_mask[row]].tolist()
        with torch.no_grad():
            logp = base(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            best, tokens = logp.topk(5)
            texts = torch.tensor([[*prompt, token] for token in tokens.tolist()])
            states = trained(input_ids=texts, output_hidden_states=True).hidden_states[-1][:, -1]
            score = best + 2.0 * states @ head.weight[0]
        expected = score.log_softmax(-1)[tokens.tolist().index(completion[0])].item()
        found = drawn.logp[row][drawn.completion_mask[row]][0].item()
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("reward", ["autoregressive", "trajectory"])
def test_the_best_of_several_answers_is_kept(reward: Any) -> None:
    """With more candidates the reward can only rise; the base model writes all of them."""
    began = llama(dtype=torch.float32)
    found = []
    for count in (1, 2, 4, 16):
        method = method_of(
            llama(dtype=torch.float32), reward=reward, guidance="answer", candidates=count
        )
        drawn = method.write(*WHERE, [1, 2, 3, 4], FEW)
        assert_written_by(drawn, [began], [1.0])
        assert drawn.group.tolist() == [0, 0, 1, 1]
        with torch.no_grad():
            if reward == "trajectory":
                scores = method._trajectory_reward(drawn.tokens, drawn.token_mask)
            else:
                masks = (drawn.prompt_mask, drawn.completion_mask)
                texts = [[drawn.tokens[k][m[k]].tolist() for m in masks] for k in range(4)]
                scores = torch.stack([log_probability(method.model.model, *t) for t in texts])
        found.append(scores)
    for less, more in itertools.pairwise(found):
        assert (more >= less - 1e-4).all()
    assert (found[-1] > found[0] + 0.1).any()


def test_writing_leaves_the_mode_of_training_alone() -> None:
    method = method_of(llama(dtype=torch.float32))
    for training in (True, False):
        method.model.train(training)
        method.write(*WHERE, [1, 2], FEW)
        assert method.model.training == method.model.model.training == training


# ---- settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"beta": 0.0}, "beta must be > 0"),
        ({"weight": -0.1}, "weight must be >= 0"),
        ({"weight": math.nan}, "weight must be >= 0"),
        ({"target_margin": -0.1}, "target_margin must be >= 0"),
        ({"target_margin": 0.1, "loss": "hinge"}, "target_margin must be 0 with the hinge loss"),
        ({"label_smoothing": 0.1, "loss": "hinge"}, "label_smoothing must be 0 with the hinge"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"decay_updates": 100}, "decay_updates must be 0 or > warmup_updates, got 100"),
        ({"candidates": 0}, "candidates must be >= 1"),
        ({"others": ("a",)}, "others and other_weights must be equally many, got 1 and 0"),
        ({"other_weights": (1.0,)}, "others and other_weights must be equally many, got 0 and 1"),
        ({"others": ("a",), "other_weights": (-1.0,)}, "other_weights must be >= 0"),
        (
            {"others": ("a",), "other_weights": (1.0,), "reward": "trajectory"},
            "others must be empty unless tokens are guided",
        ),
        (
            {"others": ("a",), "other_weights": (1.0,), "guidance": "answer"},
            "others must be empty unless tokens are guided",
        ),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Config(**changes)


def test_folders_are_named_by_their_whole_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "second").mkdir()
    monkeypatch.chdir(tmp_path)
    cfg = Config(base="large", others=("second", "org/third"), other_weights=(1.0, 1.0))
    experiment = Experiment.of(
        cfg, model="esscher.models:tiny_llama", data="esscher.datasets:sums_compared"
    )
    found = experiment.resolved().method
    assert found.base == str(tmp_path / "large")
    assert found.others == (str(tmp_path / "second"), "org/third")
    assert experiment.resolved().resolved() == experiment.resolved()


# ---- the language of the proof


def test_every_word_is_told_with_its_probability() -> None:
    speaker = words.speaker(seed=4)
    told, letters = words.log_probs(speaker.next_logits), words.all_words()
    assert letters.shape == (1024, 5) and len(set(map(tuple, letters.tolist()))) == 1024
    assert told.exp().sum().item() == pytest.approx(1, abs=1e-9)
    tokens = torch.cat([words.prompt().expand(1024, 1), letters, torch.full((1024, 1), END)], 1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    scored = mask.clone()
    scored[:, 0] = False
    with torch.no_grad():
        logp = speaker.log_prob(tokens, mask, scored)
    torch.testing.assert_close(logp.sum(-1).double(), told, rtol=1e-4, atol=1e-4)
    assert logp[:, -1].abs().max() < 1e-6, "a word of five letters is over"
    assert -(told.exp() * told).sum() > 4, "the language has many words"
    drawn = speaker.generate(words.prompt(), mask[:1, :1], range(200), Decoding(max_new_tokens=8))
    assert (drawn.completion_mask.sum(-1) == 6).all() and drawn.finished.all()
    assert set(drawn.tokens[:, 1:6].unique().tolist()) == {3, 4, 5, 6}


def test_rewards_of_words_by_hand() -> None:
    letters = ["".join("abcd"[k - 3] for k in word) for word in words.all_words().tolist()]
    total, rising = words.REWARDS[""](), words.rising()
    for word, expected_rising, expected in (
        ("abcda", 3, 3 + 1 - 1.5), ("abcdd", 3, 3), ("ddddd", 0, 1), ("aabca", 2, 2 - 1.5 + 1),
        ("dcbad", 1, 2), ("abaab", 2, 0.5),
    ):  # fmt: skip
        assert rising[letters.index(word)] == expected_rising
        assert total[letters.index(word)] == pytest.approx(expected)
    assert (words.rising() + words.closing() - total).abs().max() == 0


def test_preferences_between_words_follow_their_rewards() -> None:
    """The better word is chosen as often as sigma(difference) says, in bins of the difference."""
    rows = words.compared_1()  # type: ignore[attr-defined]
    assert len(rows) == 6_400 and rows is words.compared_1()  # type: ignore[attr-defined]
    letters = ["".join("abcd"[k - 3] for k in word) for word in words.all_words().tolist()]
    place = {word: k for k, word in enumerate(letters)}
    for ending, reward in words.REWARDS.items():
        value = reward()
        bins: dict[float, list[float]] = {}
        for row in rows:
            chosen, rejected = row[f"chosen{ending}"], row[f"rejected{ending}"]
            assert chosen != rejected and {chosen, rejected} == {row["chosen"], row["rejected"]}
            gap = float(value[place[chosen]] - value[place[rejected]])
            bins.setdefault(abs(gap), []).append(float(gap > 0))
        for gap, right in bins.items():
            p, many = 1 / (1 + math.exp(-gap)), len(right)
            if gap > 0 and many > 30:
                assert abs(sum(right) / many - p) < 4 * (p * (1 - p) / many) ** 0.5
    assert words.compared_2() != rows  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        words.compared_x  # type: ignore[attr-defined]  # noqa: B018


# ---- the proof's own arithmetic


def test_no_distribution_is_above_the_optimum_at_its_distance() -> None:
    base = words.log_probs(words.speaker(seed=5).next_logits)
    reward = words.REWARDS[""]()
    exact = genarm._placed("", genarm._optimum(base, 0.5), base)
    assert exact["reward"] == pytest.approx(exact["optimum"], abs=1e-6)
    p = base.exp() * torch.exp(reward / 0.5)
    p /= p.sum()
    assert exact["reward"] == pytest.approx(float((p * reward).sum()))
    assert exact["distance"] == pytest.approx(float((p * (p.log() - base)).sum()))
    noise = torch.randn(1024, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = genarm._placed("", (base + reward + noise).log_softmax(0), base)
    assert other["reward"] < other["optimum"] - 0.01


def test_the_best_of_several_words_has_the_probability_of_the_best() -> None:
    """Of 2 words out of 3: the best of them is it unless both draws missed it."""
    base = torch.full((1024,), -1e3, dtype=torch.float64)
    base[:3] = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    order = torch.arange(1024.0)
    method: Any = SimpleNamespace(
        model=SimpleNamespace(end_tokens=(END,)), _trajectory_reward=lambda text, mask: order
    )
    found = genarm._best_of_exactly(2, method, base)[:3].exp()
    torch.testing.assert_close(found, torch.tensor([0.25, 0.64 - 0.25, 0.36]).double())


def figures() -> dict[str, dict[str, list[float]]]:
    """As good as they could be."""
    arm: dict[str, list[float]] = {"base: reward": [0.0], "large, base: reward": [0.0]}
    for weight in genarm.WEIGHTS:
        name = f"weight {weight:g}: "
        arm |= {f"{name}reward": [weight], f"{name}distance": [weight], f"{name}optimum": [weight]}
    arm |= {"large, weight 1: reward": [1.0], "large, weight 1: optimum": [1.0],
            "large, optimum: reward": [1.2]}  # fmt: skip
    args = {"base: reward": [0.0]}
    for weight in genarm.ARGS_WEIGHTS:
        args |= {f"weight {weight:g}: reward": [0.4 * weight]}
        args |= {f"weight {weight:g}: distance": [0.5 * weight]}
    coin = {"base: reward": [0.0], "weight 1: reward": [0.1]}
    return {"genarm": arm, "args": args, "dpo": {"reward": [1.2]}, "coin": coin}


@pytest.mark.parametrize(
    ("arm", "name", "value", "failing"),
    [
        ("args", "weight 2: reward", 1.01, "over ARGS"),
        ("dpo", "reward", 1.31, "distance from DPO"),
        ("dpo", "reward", 0.69, "distance from DPO"),
        ("genarm", "weight 0.5: reward", 0.2, "weight 0.25 to 0.5"),
        ("genarm", "weight 2: optimum", 1.9, "over the optimum, weight 2"),
        ("genarm", "large, weight 1: reward", 0.5, "gain of a larger"),
        ("coin", "weight 1: reward", 0.6, "gain by a coin"),
        (None, "", 0.0, None),
    ],
)
def test_each_check_can_fail(arm: str | None, name: str, value: float, failing: Any) -> None:
    told = copy.deepcopy(figures())
    if arm is not None:
        told[arm][name] = [value]
    failed = [check.name for check in genarm._judge_guided(told) if not check.passed]
    assert failed == [] if failing is None else (failed and failed[0].startswith(failing))


def test_mixed_rewards_must_rise_with_their_own_weight() -> None:
    told = {
        f"{part} at {a:g}, {b:g}": [3 * own - other, own]
        for a in genarm.MIXED
        for b in genarm.MIXED
        for part, own, other in (("rising", a, b), ("closing", b, a))
    }
    checks = genarm._judge_mixed({"rising": told, "closing": {}})
    assert len(checks) == 2 * 2 * 3 * 2 and all(check.passed for check in checks)
    told["closing at 0.5, 1"] = [told["closing at 0.5, 0.5"][0] - 0.1, 1.0]
    failed = [c.name for c in genarm._judge_mixed({"rising": told, "closing": {}}) if not c.passed]
    assert failed == ["closing, 0.5, 0.5 to 0.5, 1, seed 0"]


def test_arms_differ_in_what_the_claim_compares() -> None:
    claims = {claim.name: claim for claim in genarm.proof().claims}
    arms = {name: make(1) for name, make in claims["guided decoding"].arms.items()}
    data = {arm.stages[-1].data for arm in arms.values()}
    assert data == {"esscher.words:compared_1"}
    columns = {name: arm.stages[-1].text.columns["chosen"] for name, arm in arms.items()}
    assert columns == {
        "genarm": "chosen", "args": "chosen", "dpo": "chosen", "coin": "chosen_random",
    }  # fmt: skip
    assert arms["args"].method == replace(
        arms["genarm"].method, reward="trajectory", beta=1.0, candidates=4
    )
    assert arms["coin"].method == arms["genarm"].method
    assert arms["dpo"].slug == "f_dpo" and arms["dpo"].method.divergence == "reverse_kl"
