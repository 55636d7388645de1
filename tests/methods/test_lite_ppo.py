"""Lite PPO and its relatives: updates of real Llamas against the formulas taken token by token,
against TRL's trainer, across micro-batches and processes, and where penalties must end up.
"""

import copy
import itertools
import math
import statistics
import threading
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llamas
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.experience.text import Text
from esscher.methods.language import lite_ppo
from esscher.methods.language.lite_ppo import DAPO, DR_GRPO, GRPO, Config, LitePPO
from esscher.runtime import device, optim
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Completions, Prompts, Scored
from llamas import shaken

PAD, END, VOCABULARY, LIMIT = 0, 1, 20, 5
# Three groups of four: prompt, completion, reward (None: it failed). Those without END were cut.
GROUPS = [
    ([2, 3, 4], [([5, 6, END], 1.0), ([7, END], 0.0), ([8, 9, 10, 11, 12], 0.0), ([END], 0.5)]),
    ([9], [([10, END], 1.0), ([11, 12, 13, END], 1.0), ([14, END], 1.0), ([15, 5, END], 1.0)]),
    ([2, 16], [([17, END], 0.0), ([18, 19, 5, 6, 7], 1.0), ([8, END], None), ([9, 3, END], 0.0)]),
]
ROWS = [(p, c, r, g) for g, (p, answers) in enumerate(GROUPS) for c, r in answers]
SETTINGS: dict[str, dict[str, Any]] = {
    "lite ppo": {},
    "grpo": GRPO,
    "dapo": {**DAPO, "dynamic_sampling": True, "overlong_buffer": 3},
    "dr grpo": DR_GRPO,
    "reinforce++": {"mean": "batch", "kl_coefficient": 0.3, "kl_estimator": "k1"},
    "rloo": {"mean": "leave_one_out", "std": "none", "aggregation": "sequence_mean_token_sum"},
    "gspo": {"ratio": "sequence", "aggregation": "sequence_mean_token_mean", "clip_low": 0.1,
             "clip_high": 0.15},
    "filtered": {"overlong_filter": True, "aggregation": "sequence_mean_token_mean"},
    "filtered, by tokens": {"overlong_filter": True, "std": "group"},
    "plain": {"mean": "none", "std": "none", "dual_clip": 1.4, "aggregation": "constant_length"},
    "dual clip, k2": {"dual_clip": 1.3, "kl_coefficient": 0.2, "kl_estimator": "k2"},
    "warm, clipped advantages": {"temperature": 1.7, "advantage_clip": 0.6},
}  # fmt: skip
every = pytest.mark.parametrize("name", SETTINGS)
AGGREGATIONS = ["token_mean", "sequence_mean_token_mean", "sequence_mean_token_sum",
                "constant_length"]  # fmt: skip


def llama(dtype: torch.dtype = torch.float64, vocabulary: int = VOCABULARY) -> Any:
    return llamas.llama(vocabulary, dtype, pad_token_id=PAD, bos_token_id=2, eos_token_id=END)


def method_of(model: Any, rank: int = 0, world: int = 1, **changes: Any) -> LitePPO:
    """Around a model whose policy has already left its reference; one step a batch."""
    policy = LanguageModel(model, end_tokens=(END,), pad_token=PAD)
    settings = {"batch_size": 3, "group_size": 4, "num_minibatches": 1, "max_new_tokens": LIMIT}
    spec = TextSpec(model=policy, tokenizer=None, max_length=64)
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager"))
    runtime.rank, runtime.world = rank, world
    method = LitePPO(Config(**(settings | changes)), spec, runtime)
    torch.manual_seed(1)
    shaken(policy.trained, 0.05)
    return method


def old_log_probs() -> list[list[float]]:
    """Of each token, as the sampler would have told them: near those of the model."""
    model = llama()
    torch.manual_seed(2)
    with torch.no_grad():
        return [(x + 0.3 * torch.randn(len(x))).tolist() for x in map(token_logp(model), ROWS)]


def scored_rows(rows: Any = ROWS, old: Any = None, dtype: Any = torch.float64) -> Scored:
    """As generation and the judge hand them over: prompts end in one column."""
    old = old_log_probs()[: len(rows)] if old is None else old
    before, after = max(len(p) for p, *_ in rows), max(len(c) for _, c, *_ in rows)
    shape = (len(rows), before + after)
    tokens = torch.full(shape, PAD)
    prompt_mask, completion_mask = torch.zeros(2, *shape, dtype=torch.bool)
    logp = torch.zeros(shape, dtype=dtype)
    for k, (prompt, completion, *_) in enumerate(rows):
        start, end = before - len(prompt), before + len(completion)
        tokens[k, start:end] = torch.tensor(prompt + completion)
        prompt_mask[k, start:before], completion_mask[k, before:end] = True, True
        logp[k, before:end] = torch.tensor(old[k], dtype=dtype)
    completions = Completions(
        tokens=tokens,
        prompt_mask=prompt_mask,
        completion_mask=completion_mask,
        logp=logp,
        group=torch.tensor([g for *_, g in rows]),
        finished=torch.tensor([c[-1] == END for _, c, *_ in rows]),
    )
    rewards = [r for _, _, r, _ in rows]
    return Scored(
        completions=completions,
        reward=torch.tensor([r or 0.0 for r in rewards], dtype=dtype),
        valid=torch.tensor([r is not None for r in rewards]),
        parts={},
    )


def gradient_of(method: LitePPO, scored: Scored) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What an update reports, and the gradient that it hands to the optimiser."""
    found: list[list[torch.Tensor]] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    told = method.update(scored, 0)
    (gradient,) = found
    return told, gradient


def token_logp(model: Any, temperature: float = 1.0) -> Any:
    """Of the tokens of a completion, without padding, from a full softmax."""

    def of(row: Any) -> torch.Tensor:
        prompt, completion, *_ = row
        tokens = torch.tensor([prompt + completion])
        logp = (model(input_ids=tokens).logits[0] / temperature).log_softmax(-1)
        places = range(len(prompt), tokens.shape[1])
        return torch.stack([logp[place - 1, tokens[0, place]] for place in places])

    return of


# ---- the formulas, token by token


def slow_advantages(cfg: Config, shaped: list[float], kept: list[bool]) -> list[float]:
    advantages = []
    for k, (*_, group) in enumerate(ROWS):
        peers = [j for j, row in enumerate(ROWS) if kept[j] and row[3] == group]
        scope = {"group": peers, "batch": [j for j in range(len(ROWS)) if kept[j]],
                 "leave_one_out": [j for j in peers if j != k]}  # fmt: skip
        if not kept[k]:
            advantages.append(0.0)
            continue
        value = shaped[k]
        if cfg.mean != "none":
            value -= statistics.mean(shaped[j] for j in scope[cfg.mean])
        if cfg.std != "none":
            spread = statistics.stdev(shaped[j] for j in scope[cfg.std])
            value = 0.0 if spread < 1e-12 else value / (spread + cfg.epsilon)
        bound = cfg.advantage_clip or math.inf
        advantages.append(max(-bound, min(bound, value)))
    return advantages


def slowly(cfg: Config, model: Any, reference: Any, old: list[list[float]]) -> torch.Tensor:
    """The loss as the papers write it."""
    with torch.no_grad():
        fixed = list(map(token_logp(reference, cfg.temperature), ROWS))
    shaped = []
    for k, (_, completion, reward, _) in enumerate(ROWS):
        value, length = reward or 0.0, len(completion)
        if cfg.overlong_buffer and length > LIMIT - cfg.overlong_buffer:
            value -= (length - (LIMIT - cfg.overlong_buffer)) / cfg.overlong_buffer
        if cfg.kl_estimator == "k1":
            value -= cfg.kl_coefficient * (sum(old[k]) - float(fixed[k].sum()))
        shaped.append(value)
    kept = []
    for _, _, reward, group in ROWS:
        verdicts = {r for _, _, r, g in ROWS if g == group and r is not None}
        kept.append(reward is not None and (len(verdicts) > 1 or not cfg.dynamic_sampling))
    advantages = slow_advantages(cfg, shaped, kept)
    rows: list[list[torch.Tensor]] = []
    for k, row in enumerate(ROWS):
        if not kept[k] or (cfg.overlong_filter and row[1][-1] != END):
            continue
        logp, terms = token_logp(model, cfg.temperature)(row), []
        difference = logp - torch.tensor(old[k])
        for t in range(len(logp)):
            change = difference.mean() if cfg.ratio == "sequence" else difference[t]
            ratio, value = torch.exp(change), advantages[k]
            if value >= 0:
                term = -value * min(ratio, torch.tensor(1 + cfg.clip_high))
            else:
                term = -value * max(ratio, torch.tensor(1 - cfg.clip_low))
                term = min(term, torch.tensor(-value * (cfg.dual_clip or math.inf)))
            d = fixed[k][t] - logp[t]
            penalty = {"k1": 0.0, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[cfg.kl_estimator]
            terms.append(term + cfg.kl_coefficient * penalty)
        rows.append(terms)
    total = sum(sum(terms) for terms in rows)
    count = len(rows)
    return {
        "token_mean": lambda: total / sum(map(len, rows)),
        "sequence_mean_token_mean": lambda: sum(sum(x) / len(x) for x in rows) / count,
        "sequence_mean_token_sum": lambda: total / count,
        "constant_length": lambda: total / (count * LIMIT),
    }[cfg.aggregation]()


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """To a share of the largest entry of all."""
    largest = max(float(x.abs().max()) for x in theirs)
    assert largest > 1e-4
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).abs().max()) < tolerance * largest


@every
def test_an_update_follows_the_formulas(name: str) -> None:
    base = llama()
    reference, old = copy.deepcopy(base), old_log_probs()
    method = method_of(base, **SETTINGS[name])
    told, ours = gradient_of(method, scored_rows())
    loss = slowly(method.cfg, method.model.model, reference, old)
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-5)
    assert told["loss"].item() == pytest.approx(loss.item(), abs=1e-6)


def test_the_settings_differ() -> None:
    """So that none of the comparisons above could stand for another."""
    old, model = old_log_probs(), llama()
    reference = llama()
    shaken(model.parameters(), 0.05)
    losses = [
        slowly(method_of(llama(), **changes).cfg, model, reference, old).item()
        for changes in SETTINGS.values()
    ]
    gaps = [abs(x - y) for k, x in enumerate(losses) for y in losses[:k]]
    assert min(gaps) > 1e-4


# ---- by hand


def advantages(settings: dict[str, Any], reward: list[float]) -> list[float]:
    """Of two groups of four, all of them judged."""
    method = method_of(llama(), batch_size=2, **settings)
    kept = torch.ones(8, dtype=torch.bool)
    return method.advantages(torch.tensor(reward), torch.arange(8) // 4, kept).tolist()


def test_advantages_by_hand() -> None:
    """Batch std of 4 ones among 8: sqrt(8 * 0.25 / 7) = 0.53452."""
    reward = [1.0, 0, 0, 0, 1, 1, 1, 0]
    assert advantages(GRPO, reward) == pytest.approx(
        [1.5, -0.5, -0.5, -0.5, 0.5, 0.5, 0.5, -1.5], abs=1e-5
    )
    one, three = 0.25 / 0.534522, 0.75 / 0.534522
    assert advantages({}, reward) == pytest.approx(
        [three, -one, -one, -one, one, one, one, -three], abs=1e-5
    )
    assert advantages(DR_GRPO, reward) == pytest.approx([0.75, *[-0.25] * 3, *[0.25] * 3, -0.75])
    # One failure among eight: the batch's deviation is small, and the failing row loud.
    assert advantages({}, [1.0] * 7 + [0.0])[7] == pytest.approx(-0.75 / math.sqrt(0.125), 1e-5)
    assert advantages({"advantage_clip": 2.0}, [1.0] * 7 + [0.0])[7] == -2.0


def test_moments_of_all_rewards_so_far() -> None:
    method = method_of(llama(), mean="running", std="running", epsilon=1e-9)
    seen: list[float] = []
    for shift in (0.0, 2.0, -1.0):
        scored = replace(scored_rows(), reward=scored_rows().reward + shift)
        rollouts, _ = method.rollouts(scored)
        seen += scored.reward[scored.valid].tolist()
        expected = (scored.reward - statistics.mean(seen)) / statistics.stdev(seen)
        expected = expected.masked_fill(~scored.valid, 0.0)
        torch.testing.assert_close(rollouts.advantage, expected, atol=1e-6, rtol=1e-6)
    assert {n: v for n, v in method.state_dict().items() if n.startswith("reward_moments")}


def test_what_it_reports_of_completions() -> None:
    told, _ = gradient_of(method_of(llama(), **GRPO), scored_rows())
    rewards = [r for _, _, r, _ in ROWS if r is not None]
    assert told["reward"].item() == pytest.approx(statistics.mean(rewards))
    assert told["reward_std"].item() == pytest.approx(statistics.stdev(rewards), abs=1e-6)
    assert told["mixed_groups"].item() == pytest.approx(7 / 11)
    assert told["failed_rewards"].item() == pytest.approx(1 / 12)
    assert told["completion_length"].item() == pytest.approx(sum(len(c) for _, c, *_ in ROWS) / 12)
    assert told["finished"].item() == pytest.approx(10 / 12)


def test_what_it_reports_of_tokens() -> None:
    """Means over the tokens that are learned from: those of the failed row are not."""
    base, old = llama(), old_log_probs()
    reference = copy.deepcopy(base)
    method = method_of(base, **GRPO)
    told, _ = gradient_of(method, scored_rows())
    entropy, to_reference, from_sampler, clipped = [], [], [], []
    signs = advantages_of_rows(method)
    for k, row in enumerate(ROWS):
        if row[2] is None:
            continue
        with torch.no_grad():
            logp, fixed = (token_logp(model)(row) for model in (method.model.model, reference))
            full = method.model.model(torch.tensor([row[0] + row[1]])).logits[0].log_softmax(-1)
        full = full[len(row[0]) - 1 : -1]
        entropy += (-(full.exp() * full).sum(-1)).tolist()
        d = fixed - logp
        to_reference += (d.exp() - d - 1).tolist()
        ratio = (logp - torch.tensor(old[k])).exp()
        from_sampler += (ratio - 1 - ratio.log()).tolist()
        clipped += ((signs[k] > 0) & (ratio > 1.2) | (signs[k] < 0) & (ratio < 0.8)).tolist()
    for name, values in (("entropy", entropy), ("kl_to_reference", to_reference),
                         ("kl_from_sampler", from_sampler), ("clip_fraction", clipped)):  # fmt: skip
        assert told[name].item() == pytest.approx(statistics.mean(map(float, values)), abs=1e-6)
    assert 0.05 < told["clip_fraction"].item() < 0.95


def advantages_of_rows(method: LitePPO) -> list[float]:
    return method.rollouts(scored_rows())[0].advantage.tolist()


@pytest.mark.parametrize("name", ["lite ppo", "grpo", "dapo", "dr grpo", "rloo", "filtered"])
def test_what_is_judged_alike_teaches_nothing(name: str) -> None:
    rows = [(p, c, 0.1, g) for p, c, _, g in ROWS]
    changes = SETTINGS[name] | {"kl_coefficient": 0.0, "overlong_buffer": 0}
    told, gradient = gradient_of(method_of(llama(), **changes), scored_rows(rows, old_log_probs()))
    assert all(bool((x == 0).all()) for x in gradient)
    assert told["mixed_groups"] == 0


def test_under_the_batchs_mean_groups_that_are_alike_teach() -> None:
    rows = [(p, c, float(g), g) for p, c, _, g in ROWS]
    for mean, silent in (("group", True), ("batch", False), ("none", False)):
        _, gradient = gradient_of(method_of(llama(), mean=mean), scored_rows(rows, old_log_probs()))
        assert all(bool((x == 0).all()) for x in gradient) == silent


@every
def test_rewards_that_failed_are_no_evidence(name: str) -> None:
    """Nor do the rows change anything else than the shares of failed, finished and length."""
    rows = [(p, c, None, g) for p, c, _, g in ROWS]
    told, gradient = gradient_of(
        method_of(llama(), **SETTINGS[name]), scored_rows(rows, old_log_probs())
    )
    assert all(bool((x == 0).all()) for x in gradient)
    assert all(math.isfinite(value.item()) for value in told.values())
    assert told["failed_rewards"] == 1
    scored, model = scored_rows(), llama()
    other = scored.completions.tokens.clone()
    failed = (~scored.valid).nonzero()[0, 0]
    other[failed, -1:] = 6
    changed = replace(scored, completions=replace(scored.completions, tokens=other))
    changed = replace(changed, reward=scored.reward + 50.0 * ~scored.valid)
    one, two = (
        gradient_of(method_of(copy.deepcopy(model), **SETTINGS[name]), x)[1]
        for x in (scored, changed)
    )
    assert_close(one, two, 1e-9)


# ---- cut into pieces, and spread over processes


@every
def test_micro_batches_change_nothing(name: str) -> None:
    told, whole = gradient_of(method_of(llama(), **SETTINGS[name]), scored_rows())
    for size in (1, 5):
        changes = SETTINGS[name] | {"micro_batch_size": size}
        again, pieces = gradient_of(method_of(llama(), **changes), scored_rows())
        assert_close(pieces, whole, 1e-5)
        for key, value in told.items():
            assert again[key].item() == pytest.approx(value.item(), abs=1e-6), key


@pytest.mark.parametrize("name", [*SETTINGS, "running"])
def test_two_processes_take_the_step_of_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads, and sums that wait for each other."""
    groups = [*GROUPS, GROUPS[0]]
    rows = [(p, c, r, g) for g, (p, answers) in enumerate(groups) for c, r in answers]
    old = old_log_probs() + old_log_probs()[:4]
    settings = SETTINGS.get(name, {"mean": "running", "std": "running"}) | {"batch_size": 4}
    told, whole = gradient_of(method_of(llama(), **settings), scored_rows(rows, old))
    # Prompts of one width, so that the halves are what each process would have generated.
    barrier, shared = threading.Barrier(2), {}

    def summed(tensors: Any) -> None:
        mine = threading.current_thread().name
        shared[mine] = [x.clone() for x in tensors]
        barrier.wait(60)
        both = [sum(parts) for parts in zip(*shared.values(), strict=True)]
        barrier.wait(60)
        for tensor, total in zip(tensors, both, strict=True):
            tensor.copy_(total)

    for module in (lite_ppo, optim, device):
        monkeypatch.setattr(module, "sum_over_processes", summed)
    methods = [method_of(llama(), rank, 2, **settings) for rank in range(2)]
    halves = [[(p, c, r, g % 2) for p, c, r, g in rows if g // 2 == rank] for rank in range(2)]
    found: dict[int, Any] = {}

    def work(rank: int) -> None:
        found[rank] = gradient_of(
            methods[rank], scored_rows(halves[rank], old[8 * rank : 8 * rank + 8])
        )

    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in range(2):
        again, gradient = found[rank]
        assert_close(gradient, whole, 1e-9)
        for key, value in told.items():
            assert again[key].item() == pytest.approx(value.item(), abs=1e-9), key


def test_every_completion_is_learned_from_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(llama(), epochs=3, num_minibatches=4)
    seen: list[list[int]] = []

    def descend(minibatch: Any) -> dict[str, torch.Tensor]:
        seen.append(sorted(minibatch.tokens.tolist()))
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(method, "descend", descend)
    method.update(scored_rows(), 0)
    assert [len(rows) for rows in seen] == [3] * 12
    everything = sorted(scored_rows().completions.tokens.tolist())
    for epoch in range(3):
        assert sorted(itertools.chain(*seen[4 * epoch : 4 * epoch + 4])) == everything
    assert seen[:4] != seen[4:8]


def test_the_second_step_knows_of_the_first() -> None:
    """The old probabilities stay those of the sampler: on the same completions, twice."""
    method = method_of(llama(), epochs=2, learning_rate=1e-2)
    own = [x.tolist() for x in map(token_logp(method.model.model), ROWS)]
    ratios: list[torch.Tensor] = []
    report = method.report

    def spy(logp: Any, entropy: Any, part: Any, num_tokens: Any) -> Any:
        ratios.append((logp - part.old_logp)[part.mask].exp())
        return report(logp, entropy, part, num_tokens)

    method.report = spy  # type: ignore[method-assign]
    method.update(scored_rows(old=own), 0)
    first, second = ratios
    torch.testing.assert_close(first, torch.ones_like(first))
    assert (second - 1).abs().max() > 0.01


# ---- against TRL


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr grpo", "gspo"])
def test_trls_trainer_takes_the_same_step(name: str) -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    rows = [(p, c, 0.3 if r is None else r, g) for p, c, r, g in ROWS]
    settings = {**SETTINGS[name], "epsilon": 1e-4, "overlong_buffer": 0, "dynamic_sampling": False}
    if name == "gspo":
        settings["std"] = "group"
    base = llama()
    reference, scored = copy.deepcopy(base), scored_rows(rows, old_log_probs())
    method = method_of(base, **settings)
    cfg, completions = method.cfg, scored.completions
    _, ours = gradient_of(method, scored)
    begin = max(len(p) for p, *_ in ROWS)

    def of(model: Any) -> torch.Tensor:
        found = torch.zeros(completions.tokens.shape, dtype=torch.float64)[:, begin:].clone()
        told = zip(map(token_logp(model), rows), found, strict=True)
        return torch.stack([torch.cat([x, zeros[len(x) :]]) for x, zeros in told])

    logps = of(method.model.model)
    loss_type = {"dapo": "dapo", "dr grpo": "dr_grpo"}.get(name, "grpo")
    fake = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        tools=None,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        top_entropy_quantile=1.0,
        importance_sampling_level=cfg.ratio,
        beta=cfg.kl_coefficient,
        epsilon_low=cfg.clip_low,
        epsilon_high=cfg.clip_high,
        max_completion_length=LIMIT,
        current_gradient_accumulation_steps=1,
        loss_type=loss_type,
    )
    reward = scored.reward.view(3, 4)
    spread = reward.std(1, keepdim=True) + 1e-4 if cfg.std == "group" else 1.0
    advantage = ((reward - reward.mean(1, keepdim=True)) / spread).flatten()
    mask = completions.completion_mask[:, begin:]
    inputs = {
        "prompt_ids": completions.tokens[:, :begin],
        "prompt_mask": completions.prompt_mask[:, :begin].long(),
        "completion_ids": completions.tokens[:, begin:],
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": completions.logp[:, begin:],
        "ref_per_token_logps": of(reference).detach(),
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(fake, fake.model, inputs)
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-5)


# ---- what is drawn, and by whose probabilities


def prompts() -> Prompts:
    rows = [p for p, _ in GROUPS]
    width = max(map(len, rows))
    tokens = torch.tensor([[PAD] * (width - len(p)) + p for p in rows])
    return Prompts(tokens=tokens, mask=tokens != PAD, row=torch.arange(len(rows)))


def test_completions_of_each_prompt_are_drawn_apart() -> None:
    method = method_of(llama(torch.float32), max_new_tokens=8)
    torch.manual_seed(3)
    found = method.propose(prompts(), 1)
    assert found.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    written = found.tokens.masked_fill(~found.completion_mask, PAD)[:, 3:]
    assert len({tuple(row) for row in written.tolist()}) == 12
    torch.manual_seed(3)
    assert torch.equal(method.propose(prompts(), 2).tokens, found.tokens)
    torch.manual_seed(3)
    other = method_of(llama(torch.float32), 1, 3, max_new_tokens=8)
    torch.manual_seed(3)
    assert not torch.equal(other.propose(prompts(), 1).tokens[:, :4], found.tokens[:, :4])


@pytest.mark.parametrize("at_once", [4, 7, 8])
def test_written_in_pieces_it_is_the_same(at_once: int) -> None:
    whole, pieces = (
        method_of(llama(torch.float32), max_new_tokens=12, generation_batch_size=size)
        for size in (0, at_once)
    )
    torch.manual_seed(3)
    one = whole.propose(prompts(), 1)
    torch.manual_seed(3)
    two = pieces.propose(prompts(), 1)
    for name, value in one.fields().items():
        torch.testing.assert_close(getattr(two, name), value)


@pytest.mark.parametrize("changes", [{"top_k": 6}, {"top_p": 0.8}, {"temperature": 1.4}])
def test_the_first_ratios_are_one_however_it_draws(changes: dict[str, Any]) -> None:
    """What the sampler cut off must not count as a change of the policy."""
    method = method_of(llama(torch.float32), learning_rate=1e-5, **changes)
    completions = method.propose(prompts(), 1)
    scored = Scored(
        completions=completions,
        reward=torch.arange(12.0),
        valid=torch.ones(12, dtype=torch.bool),
        parts={},
    )
    rollouts, _ = method.rollouts(scored)
    expected = []
    for k in range(12):
        asked, wrote = (completions.tokens[k][mask[k]].tolist() for mask in
                        (completions.prompt_mask, completions.completion_mask))  # fmt: skip
        with torch.no_grad():
            expected.append(
                token_logp(method.model.model, changes.get("temperature", 1.0))((asked, wrote))
            )
    found = rollouts.old_logp[completions.completion_mask]
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-4)
    told, _ = gradient_of(method, scored)
    assert abs(told["kl_from_sampler"].item()) < 1e-6 and told["clip_fraction"] == 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_penalties_are_at_rest_at_their_own_optimum(estimator: str) -> None:
    """One token is written, each as often as the policy would, and paid for by its name.

    The optimum of E[r] - c KL(policy, ref) is ref exp(r / c) / Z, which k1 and k2 aim at; that of
    E[r] - c KL(ref, policy), k3's, is c ref / (level - r) with level = c + E[r].
    """
    counts, weight = torch.tensor([1.0, 2, 4, 5, 8, 4], dtype=torch.float64), 0.7
    reward = torch.tensor([0.0, 0.1, -0.1, 0.5, 0.0, 0.2], dtype=torch.float64)
    policy = counts / counts.sum()
    level = weight + (policy * reward).sum()
    tilted = (policy.log() - reward / weight).softmax(0), policy * (level - reward) / weight
    settings = {"std": "none", "kl_coefficient": weight, "kl_estimator": estimator}
    written = torch.arange(6).repeat_interleave(counts.long())
    rows = [([2, 3], [token], float(reward[token]), 0) for token in written.tolist()]
    old = [[float(policy[token].log())] for token in written.tolist()]

    def size_of_gradient(reference: torch.Tensor) -> float:
        method = method_of(
            llama(vocabulary=6), batch_size=1, group_size=24, max_new_tokens=1, **settings
        )
        assert method._reference is not None
        method._reference.load_state_dict(method.model.state_dict(), strict=False)
        prompt = torch.tensor([[2, 3]])
        for model, wanted in ((method.model, policy), (method._reference, reference)):
            with torch.no_grad():
                state = model.model.model(prompt).last_hidden_state[0, -1]
                model.head.weight.copy_(wanted.log()[:, None] * state / state.square().sum())
        _, gradient = gradient_of(method, scored_rows(rows, old))
        return max(float(x.abs().max()) for x in gradient)

    right, wrong = tilted if estimator != "k3" else tilted[::-1]
    assert torch.isclose(right.sum(), torch.ones((), dtype=torch.float64))
    assert size_of_gradient(right) < 1e-5
    assert size_of_gradient(wrong) > 1e-3


# ---- what it moves


def test_only_the_policy_moves() -> None:
    method = method_of(llama(), **GRPO, learning_rate=1e-3)
    assert method._reference is not None
    before = [p.clone() for p in method._reference.parameters()]
    own = [p.detach().clone() for p in method.model.parameters()]
    _, gradient = gradient_of(method_of(llama(), **GRPO), scored_rows())
    assert all(bool((x != 0).any()) for x in gradient)
    method.update(scored_rows(), 0)
    moved = [not torch.equal(x, y) for x, y in zip(own, method.model.parameters(), strict=True)]
    frozen = zip(before, method._reference.parameters(), strict=True)
    assert all(moved) and all(torch.equal(x, y) for x, y in frozen)
    assert method_of(llama())._reference is None


def test_adapters_alone_move_and_the_reference_is_without_them() -> None:
    import peft

    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    plain = llama()
    adapted = peft.get_peft_model(copy.deepcopy(plain), lora, autocast_adapter_dtype=False)
    method = method_of(adapted, **GRPO)
    rollouts, _ = method.rollouts(scored_rows())
    with torch.no_grad():
        expected = torch.cat([x for x in map(token_logp(plain), ROWS)])
    mask = scored_rows().completions.completion_mask
    torch.testing.assert_close(rollouts.ref_logp[mask], expected, rtol=1e-6, atol=1e-6)
    _, gradient = gradient_of(method, scored_rows())
    names = [n for n, p in method.model.named_parameters() if p.requires_grad]
    assert len(gradient) == len(names) and all("lora" in name for name in names)
    loss = slowly(method.cfg, adapted, plain, old_log_probs())
    assert_close(gradient, torch.autograd.grad(loss, method.model.trained), 1e-6)


# ---- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be >= 2 for mean group, std batch"),
        ({"group_size": 1, "mean": "none", "std": "group"}, "group_size must be >= 2"),
        ({"group_size": 1, "mean": "leave_one_out", "std": "none"}, "group_size must be >= 2"),
        ({"group_size": 1, "mean": "none", "dynamic_sampling": True}, "group_size must be >= 2"),
        ({"group_size": 1, "batch_size": 1, "mean": "batch"}, "batch_size must be >= 2"),
        ({"num_minibatches": 5}, r"num_minibatches must be a divisor of the 12 completions"),
        ({"clip_low": 1.0}, r"clip_low must be in \(0, 1\), got 1.0"),
        ({"dual_clip": 1.0}, "dual_clip must be None or > 1"),
        ({"advantage_clip": 0.0}, "advantage_clip must be None or > 0"),
        ({"overlong_buffer": 6}, "overlong_buffer must be <= max_new_tokens 5, got 6"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"generation_batch_size": 3}, "generation_batch_size must be 0 or >= group_size"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        method_of(llama(), **changes)


def test_groups_of_one_are_fine_where_nothing_is_asked_of_them() -> None:
    for mean, std in (("none", "none"), ("batch", "batch"), ("running", "running")):
        Config(group_size=1, mean=mean, std=std)  # type: ignore[arg-type]


def test_processes_share_prompts_equally() -> None:
    with pytest.raises(UserError, match="batch_size must be a multiple of the 2 processes"):
        method_of(llama(), 0, 2)
    with pytest.raises(
        UserError, match="num_minibatches must be a divisor of a process's 4 rows, got 8"
    ):
        method_of(llama(), 0, 2, batch_size=2, num_minibatches=8)


def test_fewer_prompts_than_a_batch_are_refused() -> None:
    text = Text(name="few.jsonl", train=[[2, 3]] * 2, held_out=(), pad_token=PAD)
    with pytest.raises(UserError, match="batch_size 3 exceeds the 2 rows of few.jsonl"):
        method_of(llama()).experience(text)


# ---- the proof


def test_the_task_is_what_the_notes_say() -> None:
    rows = lite_ppo.remainders()
    assert len({row["prompt"] for row in rows}) == 300
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWX"
    for row in rows:
        a, b = (letters.index(letter) for letter in row["prompt"])
        assert row["answer"] == str((7 * a + 3 * b) % 100)


def test_the_verdict_follows_the_figures() -> None:
    names = ("grpo", "dapo", "lite ppo", "lite ppo by completion", "batch")
    good = {name: {"pass@1": [0.70, 0.71], "pass@8": [0.9, 0.9]} for name in names}
    good["batch"]["pass@8"] = [0.89, 0.88]
    assert all(check.passed for check in lite_ppo._judge_digits(good))
    for arm, figure, value in (
        ("lite ppo", "pass@1", 0.69),
        ("batch", "pass@8", 0.9),
        ("grpo", "pass@1", 0.64),
    ):
        bad = copy.deepcopy(good)
        bad[arm][figure][1] = value
        failed = [check.name for check in lite_ppo._judge_digits(bad) if not check.passed]
        assert len(failed) == 1 and failed[0].endswith("seed 1")


def test_recipes_differ_as_the_papers_do() -> None:
    grpo, dapo, dr_grpo, paper = (
        getattr(lite_ppo, name)().method for name in ("grpo", "dapo", "dr_grpo", "paper")
    )
    assert (paper.mean, paper.std, paper.aggregation) == ("group", "batch", "token_mean")
    assert (grpo.mean, grpo.std, grpo.aggregation) == ("group", "group", "sequence_mean_token_mean")
    assert grpo.kl_coefficient > 0 == paper.kl_coefficient == dapo.kl_coefficient
    assert (dapo.std, dapo.aggregation, dapo.dynamic_sampling) == ("group", "token_mean", True)
    assert dapo.clip_high > dapo.clip_low and dapo.overlong_buffer > 0
    assert (dr_grpo.std, dr_grpo.aggregation) == ("none", "constant_length")
