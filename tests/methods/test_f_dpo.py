"""f-DPO: its loss and gradient on real Llamas, by hand, slowly, and as TRL takes them."""

import copy
import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llamas
from esscher import Experiment
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.experience.text import Text
from esscher.methods.language.f_dpo import FDPO, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Pairs, Tokens
from llamas import shaken

PAD, END, VOCABULARY = 0, 1, 24
ALPHA = 0.3
# f'(u), each up to a constant of its own.
SLOPES: dict[str, Any] = {
    "reverse_kl": torch.log,
    "forward_kl": lambda u: -1 / u,
    "js": lambda u: torch.log(2 * u / (1 + u)),
    "alpha": lambda u: -(u**-ALPHA) / ALPHA,
}
every = pytest.mark.parametrize("divergence", SLOPES)
# Prompts of several lengths, with a chosen and a rejected completion of several lengths.
PAIRS = [
    ([2, 3, 4], [5, 6, 7, END], [8, END]),
    ([9], [10, END], [11, 12, 13, 14, 15, END]),
    ([2, 16, 17, 18], [19, 20, END], [21, 5, END]),
    ([3, 3], [4, END], [END]),
]


def llama(dtype: torch.dtype = torch.float64, adapters: bool = False) -> Any:
    return llamas.llama(
        VOCABULARY, dtype, adapters, pad_token_id=PAD, bos_token_id=2, eos_token_id=END
    )


def method_of(model: Any, precision: Any = "float32", **changes: Any) -> FDPO:
    """Around a model whose policy has already left its reference."""
    dtype = next(model.parameters()).dtype
    policy = LanguageModel(model, end_tokens=(END,), pad_token=PAD, frozen_dtype=dtype)
    settings = {"alpha": ALPHA, "beta": 0.7, "batch_size": 4, "warmup_updates": 0} | changes
    spec = TextSpec(model=policy, tokenizer=None, max_length=64)
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager", precision=precision))
    method = FDPO(Config(**settings), spec, runtime)
    torch.manual_seed(1)
    shaken(policy.trained, 0.05)
    return method


def batch_of(pairs: Any = PAIRS, left: int = 0, right: int = 0) -> Pairs:
    return llamas.padded_pairs(pairs, PAD, left, right)


def gradient_of(method: FDPO, batch: Pairs) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """What an update reports, and the gradient that it hands to the optimiser."""
    found: list[list[torch.Tensor]] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    told = method.update(batch, 0)
    (gradient,) = found
    return told, gradient


def log_probability(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Of one completion, without padding, from a full softmax over all positions."""
    tokens = torch.tensor([prompt + completion])
    logp = model(input_ids=tokens).logits[0].log_softmax(-1)
    places = range(len(prompt), len(prompt) + len(completion))
    return torch.stack([logp[place - 1, tokens[0, place]] for place in places]).sum()


def slowly(model: Any, reference: Any, divergence: str, beta: float, smoothing: float = 0.0) -> Any:
    """The mean loss, pair by pair as the paper writes it."""
    losses = []
    for prompt, *answers in PAIRS:
        slopes = []
        for completion in answers:
            with torch.no_grad():
                fixed = log_probability(reference, prompt, completion)
            ratio = torch.exp(log_probability(model, prompt, completion) - fixed)
            slopes.append(SLOPES[divergence](ratio))
        preferred = torch.sigmoid(beta * (slopes[0] - slopes[1]))
        losses.append(
            -(1 - smoothing) * torch.log(preferred) - smoothing * torch.log(1 - preferred)
        )
    return torch.stack(losses).mean()


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """To a share of the largest entry of all."""
    largest = max(float(x.abs().max()) for x in theirs)
    assert largest > 1e-4
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).abs().max()) < tolerance * largest


# ---- by hand


def bigrams(table: list[list[float]]) -> Any:
    """A real Llama of no layers whose next token has these probabilities given the last."""
    import transformers

    size = len(table)
    config = transformers.LlamaConfig(
        vocab_size=size, hidden_size=size, intermediate_size=4, num_hidden_layers=0,
        num_attention_heads=1, rms_norm_eps=0.0, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    with torch.no_grad():
        # A unit vector normalised to mean square 1 is sqrt(size) long.
        model.get_input_embeddings().weight.copy_(torch.eye(size))
        logits = torch.tensor(table, dtype=torch.float64).log()
        model.lm_head.weight.copy_(logits.T / math.sqrt(size))
    return model


@pytest.mark.parametrize(
    ("divergence", "gap"),  # f'(2) - f'(1/2)
    [("reverse_kl", math.log(4)), ("forward_kl", 1.5), ("js", math.log(2)), ("alpha", None)],
)
def test_one_pair_by_hand(divergence: str, gap: float | None) -> None:
    """Chosen: 1/4 -> 1/2, then 1/2 -> 1/2; rejected: 1/2 -> 1/4. So u is 2 and 1/2."""
    gap = (2**ALPHA - 2**-ALPHA) / ALPHA if gap is None else gap
    reference = [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]
    moved = [[0.25, 0.5, 0.25], [0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]
    method = method_of(bigrams(reference), divergence=divergence, beta=0.4, batch_size=1)
    method.model.model.load_state_dict(bigrams(moved).state_dict())
    batch = batch_of([([0], [1, 2], [2])])
    told, _ = gradient_of(method, batch)
    # Llama normalises in float32.
    assert told["loss"].item() == pytest.approx(math.log(1 + math.exp(-0.4 * gap)), rel=1e-6)
    assert told["margin"].item() == pytest.approx(0.4 * gap, rel=1e-6)
    assert told["chosen_log_ratio"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert told["rejected_log_ratio"].item() == pytest.approx(-math.log(2), rel=1e-6)
    assert told["accuracy"].item() == 1
    judged = method.judge(batch)
    assert next(iter(judged)) == "preference_accuracy"
    assert judged["preference_accuracy"].tolist() == [1.0]
    assert judged["margin"].tolist() == pytest.approx([0.4 * gap], rel=1e-6)
    swapped, _ = gradient_of(method, batch_of([([0], [2], [1, 2])]))
    assert swapped["loss"].item() == pytest.approx(math.log(1 + math.exp(0.4 * gap)), rel=1e-6)
    assert swapped["accuracy"].item() == 0


def test_a_tie_counts_as_half() -> None:
    """The end of 3 is as likely as before, whichever answer; the first pair is decided."""
    even = [[0.25, 0.25, 0.5], [0.25, 0.25, 0.5], [1 / 3, 1 / 3, 1 / 3]]
    method = method_of(bigrams(even), batch_size=2)
    method.model.model.load_state_dict(bigrams([[0.25, 0.5, 0.25], *even[1:]]).state_dict())
    batch = batch_of([([0], [1], [2]), ([2], [0], [1])])
    assert method.judge(batch)["preference_accuracy"].tolist() == [1.0, 0.5]
    told, _ = gradient_of(method, batch)
    assert told["accuracy"].item() == pytest.approx(0.75)


@every
def test_an_answer_that_became_impossible_leaves_everything_finite(divergence: str) -> None:
    even, tiny = [[0.25, 0.25, 0.5]] * 3, 1e-90
    method = method_of(bigrams(even), divergence=divergence, beta=1.0, batch_size=1)
    method.model.model.load_state_dict(bigrams([[0.5, tiny, 0.5], *even[1:]]).state_dict())
    told, gradient = gradient_of(method, batch_of([([0], [1], [2])]))
    assert math.isfinite(told["loss"].item()) and told["loss"].item() > 100
    assert all(g.isfinite().all() for g in gradient)
    assert told["accuracy"].item() == 0


def test_it_begins_at_log_2_with_everything_tied() -> None:
    method = method_of(llama())
    method.model.model.load_state_dict(method._reference.model.state_dict())
    told, _ = gradient_of(method, batch_of())
    assert told["loss"].item() == pytest.approx(math.log(2), rel=1e-12)
    assert (told["accuracy"].item(), told["margin"].item()) == (0.5, 0.0)


# ---- against a slow reference, and TRL


@every
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_that_of_the_paper_pair_by_pair(
    divergence: str, adapters: bool, dtype: torch.dtype
) -> None:
    model = llama(dtype, adapters)
    # The reference of adapters: the model that they were put on, built again without them.
    reference = llama(dtype) if adapters else copy.deepcopy(model)
    method = method_of(model, divergence=divergence)
    told, ours = gradient_of(method, batch_of())
    loss = slowly(model, reference, divergence, 0.7)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert abs(told["loss"].item() - loss.item()) < tolerance
    assert abs(loss.item() - math.log(2)) > 0.01  # The policy has left its reference.
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), tolerance)


def trl_loss(model: Any, reference: Any, divergence: str, beta: float) -> torch.Tensor:
    """TRL's own collator, output head, reference pass and loss."""
    trl = pytest.importorskip("trl.trainer.dpo_trainer")
    fused = pytest.importorskip("trl.trainer.utils").add_fused_lm_head
    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    fused(model.get_base_model() if reference is None else model, outputs=outputs)
    if reference is not None:
        fused(reference)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, pair, strict=True)) for pair in PAIRS]
    theirs = {"js": "js_divergence", "alpha": "alpha_divergence"}
    trainer = SimpleNamespace(
        model=model,
        ref_model=reference,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            gather=lambda x: x,
            gather_for_metrics=lambda x: x,
            unwrap_model=lambda x: x,
        ),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        f_divergence_type=theirs.get(divergence, divergence),
        f_alpha_divergence_coef=1 - ALPHA,
        beta=beta,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = trl.DataCollatorForPreference(pad_token_id=PAD)(rows)
    return trl.DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)


@every
@pytest.mark.parametrize("adapters", [False, True])
def test_loss_and_gradient_are_those_of_trl(divergence: str, adapters: bool) -> None:
    model = llama(torch.float32, adapters)
    reference = None if adapters else copy.deepcopy(model)
    method = method_of(model, divergence=divergence)
    told, ours = gradient_of(method, batch_of())
    loss = trl_loss(model, reference, divergence, 0.7)
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_is_a_share_of_pairs_the_wrong_way_round(smoothing: float) -> None:
    model = llama()
    reference = copy.deepcopy(model)
    method = method_of(model, divergence="js", label_smoothing=smoothing)
    told, ours = gradient_of(method, batch_of())
    loss = slowly(model, reference, "js", 0.7, smoothing)
    assert told["loss"].item() == pytest.approx(loss.item(), rel=1e-9)
    assert_close(ours, torch.autograd.grad(loss, method.model.trained), 1e-9)


# ---- what must not matter


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("adapters", [False, True])
def test_micro_batches_equal_the_full_batch(size: int, adapters: bool) -> None:
    whole_told, whole = gradient_of(method_of(llama(adapters=adapters)), batch_of())
    method = method_of(llama(adapters=adapters), micro_batch_size=size)
    told, parts = gradient_of(method, batch_of())
    assert told.keys() == whole_told.keys()
    for name, value in told.items():
        assert value.item() == pytest.approx(whole_told[name].item(), rel=1e-9), name
    assert_close(parts, whole, 1e-9)


@pytest.mark.parametrize(("left", "right"), [(0, 5), (4, 0), (3, 2)])
def test_padding_does_not_matter(left: int, right: int) -> None:
    told, tight = gradient_of(method_of(llama()), batch_of())
    padded_told, padded = gradient_of(method_of(llama()), batch_of(left=left, right=right))
    assert padded_told["loss"].item() == pytest.approx(told["loss"].item(), rel=1e-9)
    assert_close(padded, tight, 1e-9)


@pytest.mark.parametrize("adapters", [False, True])
def test_gradient_checkpointing_does_not_matter(adapters: bool) -> None:
    _, plain = gradient_of(method_of(llama(adapters=adapters)), batch_of())
    model = llama(adapters=adapters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    method = method_of(model)
    passes: list[int] = []
    causal = model.get_base_model() if adapters else model
    causal.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    _, checkpointed = gradient_of(method, batch_of())
    # Forward, again for the gradient, and once for a reference that shares these layers.
    assert len(passes) == 2 + adapters
    assert_close(checkpointed, plain, 1e-9)


@pytest.mark.filterwarnings("ignore:runtime.precision")
@every
def test_bfloat16_gives_the_same_gradient_but_for_rounding(divergence: str) -> None:
    _, exact = gradient_of(method_of(llama(torch.float32), divergence=divergence), batch_of())
    method = method_of(llama(torch.float32), "bfloat16", divergence=divergence)
    told, rough = gradient_of(method, batch_of())
    assert told["loss"].dtype == torch.float32 and all(g.dtype == torch.float32 for g in rough)
    one, two = (torch.cat([g.flatten() for g in gradient]) for gradient in (exact, rough))
    error = (one - two).norm() / one.norm()
    assert 1e-5 < error < 0.05  # Some rounding there must be.


# ---- what moves


def parameters_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("adapters", [False, True])
def test_the_policy_moves_and_its_reference_does_not(adapters: bool) -> None:
    method = method_of(llama(adapters=adapters), learning_rate=1e-2)
    frozen = parameters_of(method._reference.model)
    before, batch = parameters_of(method.model.model), batch_of()
    masks = [x.flatten(0, 1) for x in (batch.tokens, batch.token_mask, batch.completion_mask)]
    judgement = method._reference.log_prob(*masks)
    for step in range(3):
        method.update(batch, step)
    assert torch.equal(method._reference.log_prob(*masks), judgement)
    trained = {name for name, p in method.model.model.named_parameters() if p.requires_grad}
    assert trained == {name for name in before if not adapters or "lora_" in name}
    for name, parameter in method.model.model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]) == (name not in trained), name
    for name, parameter in method._reference.model.named_parameters():
        # With adapters the weights are shared, and what is trained is switched off.
        assert adapters or (not parameter.requires_grad and torch.equal(parameter, frozen[name]))
    held = {name.removeprefix("model.") for name in method.state_dict() if "opt." not in name}
    assert {name.removeprefix("model.") for name in held} == trained


@every
def test_an_update_raises_the_chosen_and_lowers_the_rejected(divergence: str) -> None:
    method = method_of(llama(), divergence=divergence, learning_rate=1e-3)
    before = method.judge(batch_of())
    for step in range(5):
        method.update(batch_of(), step)
    after = method.judge(batch_of())
    assert (after["margin"] > before["margin"]).all()
    assert after["chosen_log_ratio"].mean() > before["chosen_log_ratio"].mean()
    assert after["rejected_log_ratio"].mean() < before["rejected_log_ratio"].mean()


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_two_steps_of_each_optimiser_by_hand(optimizer: str) -> None:
    method = method_of(llama(), optimizer=optimizer, learning_rate=1e-3, max_grad_norm=1e9)
    gradients: list[Any] = []
    step = method.opt._fused_step
    method.opt._fused_step = lambda g: (gradients.append([x.clone() for x in g]), step(g))  # type: ignore[method-assign,assign,return-value]
    start = [p.detach().clone() for p in method.model.trained]
    method.update(batch_of(), 0)
    method.update(batch_of(), 1)
    first, decay = (0.9, 0.999) if optimizer == "adamw" else (0.0, 0.99)
    for k, begun in enumerate(start):
        mean, square = torch.zeros_like(begun), torch.zeros_like(begun)
        expected = begun.clone()
        for count, gradient in enumerate(gradients, 1):
            mean = first * mean + (1 - first) * gradient[k]
            square = decay * square + (1 - decay) * gradient[k] ** 2
            root = (square / (1 - decay**count)).sqrt() + 1e-8
            expected -= 1e-3 * mean / (1 - first**count) / root
        torch.testing.assert_close(method.model.trained[k].detach(), expected, rtol=1e-7, atol=1e-9)


def test_the_step_warms_up_and_the_gradient_is_clipped() -> None:
    method = method_of(llama(), learning_rate=1e-3, warmup_updates=4, max_grad_norm=1e-3)
    rates, norms = llamas.rates_and_norms(method, batch_of(), 6)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)


# ---- settings and rows


def test_batches_hold_rows_as_they_were_given() -> None:
    rows = [(Tokens(p, chosen), Tokens(p, rejected)) for p, chosen, rejected in PAIRS]
    text = Text(name="pairs", train=rows, held_out=(), pad_token=PAD)
    (found,) = method_of(llama()).experience(text).batches(1)
    for row, tokens, mask in zip(found.row, found.tokens, found.completion_mask, strict=True):
        _, chosen, rejected = PAIRS[int(row)]
        assert (tokens[0][mask[0]].tolist(), tokens[1][mask[1]].tolist()) == (chosen, rejected)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("alpha", 0.0),
        ("alpha", 1.0),
        ("alpha", math.nan),
        ("beta", 0.0),
        ("beta", -0.1),
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("learning_rate", 0.0),
        ("warmup_updates", -1),
        ("max_grad_norm", 0.0),
        ("batch_size", 0),
        ("micro_batch_size", -1),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{setting} must be .*, got {value}$"):
        Config(**{setting: value})


@pytest.mark.parametrize("divergence", ["total_variation", "pearson_chi2", "kl"])
def test_divergences_whose_optimum_is_not_determined_are_refused(divergence: Any) -> None:
    with pytest.raises(UserError, match=f"method.divergence .*reverse_kl.*{divergence}"):
        Experiment.of(Config(divergence=divergence))
