"""Supervised fine-tuning: its loss by hand and as transformers takes it, and what it moves."""

import math
from typing import Any

import pytest
import torch

import llamas
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.experience.text import Text
from esscher.methods.language import sft
from esscher.methods.language.sft import SFT, Config
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Demonstrations, Tokens

PAD, END, VOCABULARY = 0, 1, 24
ROWS = [
    ([2, 3, 4], [5, 6, 7, 8, END]),
    ([9], [10, END]),
    ([2, 11, 12, 13], [END]),
    ([3, 3], [4, 14, 15, END]),
]


def llama(dtype: torch.dtype = torch.float64, adapters: bool = False, tied: bool = False) -> Any:
    return llamas.llama(VOCABULARY, dtype, adapters, tie_word_embeddings=tied)


def method_of(model: Any, precision: Any = "float32", **changes: Any) -> SFT:
    policy = LanguageModel(model, end_tokens=(END,), pad_token=PAD)
    spec = TextSpec(model=policy, tokenizer=None, max_length=64)
    runtime = Runtime(RuntimeConfig(device="cpu", threads=1, graph="eager", precision=precision))
    return SFT(Config(**({"batch_size": 4} | changes)), spec, runtime)


def batch_of(rows: Any = ROWS, left: int = 0, right: int = 0) -> Demonstrations:
    """Padded to the longest and beyond."""
    width = max(len(p) + len(c) for p, c in rows) + left + right
    tokens = torch.full((len(rows), width), PAD)
    token_mask, completion_mask = (torch.zeros(len(rows), width, dtype=torch.bool) for _ in "ab")
    for k, (prompt, completion) in enumerate(rows):
        start, end = left + len(prompt), left + len(prompt) + len(completion)
        tokens[k, left:end] = torch.tensor(prompt + completion)
        token_mask[k, left:end], completion_mask[k, start:end] = True, True
    return Demonstrations(
        tokens=tokens,
        token_mask=token_mask,
        completion_mask=completion_mask,
        row=torch.arange(len(rows)),
    )


def gradient_of(method: SFT, batch: Demonstrations) -> tuple[float, list[torch.Tensor]]:
    """The loss that an update reports, and the gradient that it hands to the optimiser."""
    found: list[list[torch.Tensor]] = []
    method.opt.apply = found.append  # type: ignore[method-assign]
    told = method.update(batch, 0)
    (gradient,) = found
    return told["loss"].item(), gradient


def assert_close(ours: Any, theirs: Any, tolerance: float) -> None:
    """To a share of the largest entry of all."""
    largest = max(float(x.abs().max()) for x in theirs)
    assert largest > 1e-4
    for one, two in zip(ours, theirs, strict=True):
        assert float((one - two).abs().max()) < tolerance * largest


def test_loss_by_hand_weighs_tokens_and_not_rows() -> None:
    """A real Llama of no layers is a table of bigrams: 1/2, 1/4, 1/2, 1/4 and then 1/3."""
    import transformers

    table = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25], [1 / 3] * 3], dtype=torch.float64)
    config = transformers.LlamaConfig(
        vocab_size=3, hidden_size=3, intermediate_size=4, num_hidden_layers=0,
        num_attention_heads=1, rms_norm_eps=0.0, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).double()
    with torch.no_grad():
        # A unit vector normalised to mean square 1 is sqrt(3) long.
        model.get_input_embeddings().weight.copy_(torch.eye(3))
        model.lm_head.weight.copy_(table.log().T / math.sqrt(3))
    method = method_of(model, batch_size=2)
    batch = batch_of([([0], [1, 2]), ([2], [0])])
    loss, _ = gradient_of(method, batch)
    # Tokens: 1/2, 1/4 and 1/3; Llama normalises in float32.
    assert loss == pytest.approx(math.log(24) / 3, rel=1e-6)
    judged = method.judge(batch)
    assert list(judged) == ["log_likelihood_per_token"]
    expected = [-math.log(8) / 2, -math.log(3)]
    assert judged["log_likelihood_per_token"].tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradient_are_those_of_transformers(adapters: bool, tied: bool) -> None:
    """transformers: the mean over all labels of the batch that are not -100."""
    model, batch = llama(adapters=adapters, tied=tied), batch_of()
    method = method_of(model)
    loss, ours = gradient_of(method, batch)
    labels = batch.tokens.masked_fill(~batch.completion_mask, -100)
    theirs = model(input_ids=batch.tokens, attention_mask=batch.token_mask.long(), labels=labels)
    # Its cross-entropy is taken in float32.
    assert loss == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert_close(ours, torch.autograd.grad(theirs.loss, method.model.trained), 1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_equal_the_full_batch(size: int) -> None:
    loss, whole = gradient_of(method_of(llama()), batch_of())
    cut_loss, parts = gradient_of(method_of(llama(), micro_batch_size=size), batch_of())
    assert cut_loss == pytest.approx(loss, rel=1e-9)
    assert_close(parts, whole, 1e-9)


@pytest.mark.parametrize(("left", "right"), [(0, 5), (4, 0), (3, 2)])
def test_padding_does_not_matter(left: int, right: int) -> None:
    loss, tight = gradient_of(method_of(llama()), batch_of())
    padded_loss, padded = gradient_of(method_of(llama()), batch_of(left=left, right=right))
    assert padded_loss == pytest.approx(loss, rel=1e-9)
    assert_close(padded, tight, 1e-9)


def test_processes_share_the_count_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process has 20 tokens: the gradients of both add up to that of all 32."""
    loss, alone = gradient_of(method_of(llama()), batch_of())
    monkeypatch.setattr(sft, "sum_over_processes", lambda tensors: tensors[0].add_(20))
    shared_loss, shared = gradient_of(method_of(llama()), batch_of())
    assert shared_loss == pytest.approx(loss)
    # The backward pass of Llama's norms is in float32.
    assert_close(shared, [g * 12 / 32 for g in alone], 1e-6)


@pytest.mark.filterwarnings("ignore:runtime.precision")
def test_bfloat16_gives_the_same_gradient_but_for_rounding() -> None:
    _, exact = gradient_of(method_of(llama(torch.float32)), batch_of())
    _, rough = gradient_of(method_of(llama(torch.float32), "bfloat16"), batch_of())
    assert all(g.dtype == torch.float32 for g in rough)
    one, two = (torch.cat([g.flatten() for g in gradient]) for gradient in (exact, rough))
    assert 1e-5 < (one - two).norm() / one.norm() < 0.05  # Some rounding there must be.


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_trained_moves_until_the_rows_are_known(adapters: bool) -> None:
    model = llama(torch.float32, adapters)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = method_of(model, learning_rate=2e-2)
    losses = [method.update(batch_of(), step)["loss"].item() for step in range(60)]
    assert losses[0] > 2 and losses[-1] < losses[0] / 4
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (adapters and "lora_" not in name), name
        assert parameter.grad is None


def test_the_step_warms_up_and_the_gradient_is_clipped() -> None:
    method = method_of(llama(), learning_rate=1e-3, warmup_updates=4, max_grad_norm=1e-3)
    rates, norms = llamas.rates_and_norms(method, batch_of(), 6)
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    assert norms == pytest.approx([1e-3] * 6, rel=1e-2)


def test_weights_decay_apart_from_their_gradient() -> None:
    """The first step of AdamW is its step size against the gradient's sign, and the decay."""
    model = llama()
    start = [p.detach().clone() for p in model.parameters()]
    _, gradient = gradient_of(method_of(llama()), batch_of())
    method = method_of(model, learning_rate=1e-2, weight_decay=0.5, max_grad_norm=1e9)
    method.update(batch_of(), 0)
    for parameter, before, g in zip(model.parameters(), start, gradient, strict=True):
        expected = before * (1 - 1e-2 * 0.5) - 1e-2 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-7, atol=1e-9)


def test_batches_hold_rows_as_they_were_given() -> None:
    text = Text(name="rows", train=[Tokens(*r) for r in ROWS], held_out=(), pad_token=PAD)
    (found,) = method_of(llama()).experience(text).batches(1)
    for row, tokens, mask in zip(found.row, found.tokens, found.completion_mask, strict=True):
        assert tokens[mask].tolist() == ROWS[int(row)][1]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup_updates", -1),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("batch_size", 0),
        ("micro_batch_size", -1),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, value: float) -> None:
    with pytest.raises(UserError, match=f"^{setting} must be .*, got {value}$"):
        Config(**{setting: value})
