import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from esscher.functional.sequences import (
    sequence_log_prob,
    shifted,
    token_log_probs,
    token_log_probs_and_entropy,
)

NAN = float("nan")
# A bigram model: the state after token s is the s-th unit vector, so that logits are log P[s].
P = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.05, 0.9, 0.05]], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)


def problem(dtype=torch.float64, rows=(4, 7), width=5, vocabulary=11):
    torch.manual_seed(0)
    hidden = torch.randn(*rows, width, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, dtype=torch.float64)
    bias = torch.randn(vocabulary, dtype=torch.float64)
    mask = torch.rand(rows) < 0.6
    targets = torch.randint(vocabulary, rows).masked_fill(~mask, -100)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, targets, mask


def plain(hidden, weight, targets, mask, bias=None, temperature=1.0):
    """The textbook way, which holds all logits."""
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logp = torch.log_softmax(logits / temperature, -1)
    return logp.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)


def test_a_bigram_model_by_hand():
    hidden, targets = EYE[torch.tensor([[0, 1], [2, 0]])], torch.tensor([[2, 0], [1, 1]])
    mask = torch.tensor([[True, True], [True, False]])
    found = token_log_probs(hidden, P.log().T, targets, mask)
    expected = torch.tensor([[0.7, 0.5], [0.9, 1.0]], dtype=torch.float64).log()
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    # Temperature 1/2 squares: .49 / (.01 + .04 + .49), .25 / .375, .81 / (.0025 + .81 + .0025).
    found = token_log_probs(hidden, P.log().T, targets, mask, temperature=0.5)
    expected = torch.tensor([[0.49 / 0.54, 2 / 3], [0.81 / 0.815, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(found.exp(), expected, atol=1e-12, rtol=0)
    # A bias shifts the odds: (.1, .2 e^1, .7) for the first.
    bias = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    found = token_log_probs(hidden, P.log().T, targets, mask, bias=bias)
    assert found[0, 0].exp().item() == pytest.approx(0.7 / (0.8 + 0.2 * math.e), rel=1e-12)


def test_gradient_by_hand_is_one_hot_less_probability():
    weight = P.log().T.clone().requires_grad_()
    bias = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    target, mask = torch.tensor([[2]]), torch.tensor([[True]])
    logp = token_log_probs(EYE[:1, None], weight, target, mask, bias=bias, temperature=2.0)
    (3 * logp).sum().backward()
    p = P[0].sqrt() / P[0].sqrt().sum()
    torch.testing.assert_close(bias.grad, 1.5 * (EYE[2] - p), atol=1e-12, rtol=0)
    torch.testing.assert_close(weight.grad[:, 0], bias.grad, atol=1e-12, rtol=0)
    assert (weight.grad[:, 1:] == 0).all()


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_the_textbook(chunk, temperature, with_bias):
    hidden, weight, bias, targets, mask = problem()
    bias = bias if with_bias else None
    inputs = [x for x in (hidden, weight, bias) if x is not None]
    upstream = torch.randn(mask.shape, dtype=torch.float64)
    options = {"bias": bias, "temperature": temperature}
    found = token_log_probs(hidden, weight, targets, mask, chunk=chunk, **options)
    expected = plain(hidden, weight, targets, mask, **options)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    ours = torch.autograd.grad((found * upstream).sum(), inputs)
    theirs = torch.autograd.grad((expected * upstream).sum(), inputs)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-10)


def test_gradients_are_finite_differences():
    hidden, weight, bias, targets, mask = problem(rows=(2, 3), width=3, vocabulary=5)

    def function(h, w, b):
        return token_log_probs(h, w, targets, mask, bias=b, temperature=0.7, chunk=2)

    assert mask.sum() > 2
    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_rows_may_come_gathered_or_as_a_view():
    hidden, weight, _, targets, mask = problem()
    whole = token_log_probs(hidden[:, :-1], weight, targets[:, 1:], mask[:, 1:])
    every = torch.ones(int(mask[:, 1:].sum()), dtype=torch.bool)
    rows = hidden[:, :-1][mask[:, 1:]]
    gathered = token_log_probs(rows, weight, targets[:, 1:][mask[:, 1:]], every)
    torch.testing.assert_close(gathered, whole[mask[:, 1:]], atol=1e-12, rtol=0)


@pytest.mark.parametrize("junk", [NAN, float("inf")])
def test_what_stands_in_padding_reaches_neither_result_nor_gradient(junk):
    clean, weight, bias, targets, mask = problem()
    hidden = clean.detach().masked_fill(~mask.unsqueeze(-1), junk).requires_grad_()
    results = []
    for states, tokens in ((clean, targets.clamp(min=0)), (hidden, targets)):
        found = token_log_probs_and_entropy(states, weight, tokens, mask, bias=bias, chunk=4)
        # A NaN that comes back to a masked position stays there too.
        upstream = found.logp.detach().masked_fill(~mask, NAN)
        grads = torch.autograd.grad(found.logp, (states, weight, bias), upstream)
        results.append((*found, *grads))
    for one, two in zip(*results, strict=True):
        assert two.isfinite().all()
        assert torch.equal(one, two)
    assert (results[1][0][~mask] == 0).all()
    assert (results[1][1][~mask] == 0).all()
    assert (results[1][2][~mask] == 0).all()


def test_nothing_unmasked_is_worth_zero():
    hidden, weight, bias, targets, mask = problem()
    logp, entropy = token_log_probs_and_entropy(hidden, weight, targets, mask & False, bias=bias)
    logp.sum().backward()
    assert (logp == 0).all() and (entropy == 0).all()
    assert all((x.grad == 0).all() for x in (hidden, weight, bias))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_exactly_the_gradients_asked_for_are_made(wanted):
    hidden, weight, bias, targets, mask = problem()
    for index, leaf in enumerate((hidden, weight, bias)):
        leaf.requires_grad_(index in wanted)
    assert 2 * 6 < mask.sum() <= 3 * 6
    for chunk, chunks in ((1000, 1), (6, 3)):
        products = Shapes()
        logp = token_log_probs(hidden, weight, targets, mask, bias=bias, chunk=chunk)
        with products:
            logp.sum().backward()
        # The logits of all chunks but the last again; hidden and weight take a product each.
        assert products.count("mm") == chunks - 1 + chunks * ((0 in wanted) + (1 in wanted))
    found = [leaf.grad is not None for leaf in (hidden, weight, bias)]
    assert found == [index in wanted for index in range(3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_graph_that_is_kept_gives_its_gradients_again(dtype):
    """The first backward pass writes over the probabilities of the last chunk."""
    hidden, weight, bias, targets, mask = problem(dtype)
    logp = token_log_probs(hidden, weight, targets, mask, bias=bias, chunk=7)
    leaves = hidden, weight, bias
    first, again = (torch.autograd.grad(logp.sum(), leaves, retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(plain(hidden, weight, targets, mask, bias).sum(), leaves)
    close = {"atol": 1e-10, "rtol": 1e-10} if dtype == torch.float64 else {"atol": 0.1, "rtol": 0.1}
    for one, two, three in zip(first, again, expected, strict=True):
        torch.testing.assert_close(one, two, **close)
        torch.testing.assert_close(one, three, **close)


def test_without_gradients_nothing_is_kept():
    hidden, weight, _, targets, mask = problem()
    with torch.no_grad():
        assert token_log_probs(hidden, weight, targets, mask).grad_fn is None
    logp = token_log_probs(hidden.detach(), weight.detach(), targets, mask)
    assert not logp.requires_grad
    with torch.inference_mode():
        fast = token_log_probs(hidden, weight, targets, mask)
    assert torch.equal(fast.clone(), logp)


def test_second_derivatives_are_refused_and_not_wrong():
    hidden, weight, _, targets, mask = problem()
    logp = token_log_probs(hidden, weight, targets, mask)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(logp.sum(), hidden, create_graph=True)


def test_a_near_certain_token_keeps_its_digits_in_float32():
    # log p = -log(1 + 2 e^-12), about -1.2e-5; a float32 near 300 has steps of 3e-5.
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[288.0], [300.0], [288.0]])
    every = torch.ones(1, dtype=torch.bool)
    found = token_log_probs(hidden, weight, torch.tensor([1]), every).item()
    assert found == pytest.approx(-math.log1p(2 * math.exp(-12)), rel=1e-2)
    assert found == plain(hidden, weight, torch.tensor([1]), every).item()


# Entropy


def test_entropy_by_hand_and_without_gradient():
    hidden = EYE[[0, 1, 2]].unsqueeze(0).requires_grad_()
    targets, mask = torch.tensor([[0, 0, 0]]), torch.tensor([[True, True, False]])
    logp, entropy = token_log_probs_and_entropy(hidden, P.log().T, targets, mask)
    expected = [0.1 * math.log(10) + 0.2 * math.log(5) - 0.7 * math.log(0.7), 1.5 * math.log(2)]
    torch.testing.assert_close(entropy[0].tolist(), [*expected, 0.0], atol=1e-12, rtol=0)
    assert torch.equal(logp, token_log_probs(hidden, P.log().T, targets, mask))
    assert logp.requires_grad and not entropy.requires_grad
    # Very hot is uniform, very cold is certain.
    for temperature, limit in ((1e9, math.log(3)), (1e-3, 0.0)):
        found = token_log_probs_and_entropy(
            hidden[:, :1], P.log().T, targets[:, :1], mask[:, :1], temperature=temperature
        )
        assert found.entropy.item() == pytest.approx(limit, abs=1e-9)


def test_impossible_tokens_add_no_entropy_and_get_no_gradient():
    bias = torch.tensor([0.0, 0.0, -float("inf")], dtype=torch.float64)
    weight = P.log().T.clone().requires_grad_()
    targets, mask = torch.tensor([[1]]), torch.tensor([[True]])
    logp, entropy = token_log_probs_and_entropy(EYE[:1, None], weight, targets, mask, bias=bias)
    logp.sum().backward()
    assert logp.exp().item() == pytest.approx(2 / 3)
    assert entropy.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2))
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor([-1 / 3, 1 / 3, 0]).double())


# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_low_precision_is_close_to_float32(dtype, temperature):
    # Both see the same rounded numbers: what differs is the arithmetic.
    low = problem(dtype, rows=(8, 16), width=16, vocabulary=50)
    high = [x.detach().float().requires_grad_() for x in low[:3]]
    targets, mask = low[3:]
    step = torch.finfo(dtype).eps
    results = []
    for hidden, weight, bias in (low[:3], high):
        found = token_log_probs_and_entropy(
            hidden, weight, targets, mask, bias=bias, temperature=temperature, chunk=9
        )
        grads = torch.autograd.grad(found.logp.sum(), (hidden, weight, bias))
        assert [g.dtype for g in grads] == [hidden.dtype] * 3
        results.append((*found, *grads))
    assert results[0][0].dtype == results[0][1].dtype == torch.float32
    for one, two in zip(*results, strict=True):
        assert (one.float() - two).abs().max() < 2 * step * max(10, two.abs().max().item())
        assert (one.float() - two).norm() < 2 * step * two.norm()


def test_the_weights_gradient_is_summed_in_float32_over_chunks():
    hidden, weight, _, targets, _ = problem(torch.bfloat16, rows=(1, 2000), vocabulary=4)
    targets, mask = targets.clamp(min=0), torch.ones(1, 2000, dtype=torch.bool)
    hidden = hidden.detach().abs()  # Terms of one sign, the worst case.
    one = token_log_probs(hidden, weight, targets * 0, mask, chunk=1).sum()
    (found,) = torch.autograd.grad(one, weight)
    exact = weight.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(hidden.double(), exact, targets * 0, mask).sum(), exact)
    assert (found.double() - expected).norm() < 2e-3 * expected.norm()
    # A sum in bfloat16 stops growing when the terms are below its steps.
    p = torch.softmax(hidden[0] @ weight.detach().T, -1)
    terms = (torch.eye(4)[0].bfloat16() - p).unsqueeze(-1) * hidden[0].unsqueeze(1)
    naive = torch.zeros_like(weight)
    for term in terms:
        naive = naive + term
    assert (naive.double() - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_gives_what_casting_gives_with_gradients_in_float32(inside):
    hidden, weight, bias, targets, mask = problem(torch.float32, width=64)
    with torch.autocast("cpu", torch.bfloat16):
        logp = token_log_probs(hidden, weight, targets, mask, bias=bias, chunk=5)
        # Autocast calls float32 states from a norm, and bfloat16 ones, alike.
        mixed = token_log_probs(hidden.bfloat16(), weight, targets, mask, bias=bias, chunk=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        found = torch.autograd.grad(logp.sum(), (hidden, weight, bias))
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    expected = token_log_probs(low[0], low[1], targets, mask, bias=low[2], chunk=5)
    assert torch.equal(logp, expected) and torch.equal(mixed, expected)
    assert logp.dtype == torch.float32
    for one, two in zip(found, torch.autograd.grad(expected.sum(), low), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.bfloat16(), two)  # Only the last rounding differs.
    # Without autocast, a backward pass under it does not change its precision.
    one, two = (token_log_probs(hidden, weight, targets, mask, chunk=5) for _ in range(2))
    outside = torch.autograd.grad(one.sum(), (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(two.sum(), (hidden, weight))
    assert all(torch.equal(one, two) for one, two in zip(found, outside, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        double = token_log_probs(hidden.double(), weight.double(), targets, mask)
    assert double.dtype == torch.float64


# Memory


class Shapes(TorchDispatchMode):
    """Every operation, with the tensors that it returns."""

    def __init__(self):
        super().__init__()
        self.calls, self.kept = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [
            x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)
        ]
        self.calls.append(function.overloadpacket.__name__)
        self.kept += tensors  # Kept alive, so that no memory is used twice.
        return result

    def count(self, end):
        return sum(name.rstrip("_").endswith(end) for name in self.calls)

    def buffers(self, size):
        """Sizes of the distinct pieces of memory of more than `size` elements."""
        sizes = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in self.kept}
        return [n for n in sizes.values() if n > size]


@pytest.mark.parametrize(("dtype", "buffers"), [(torch.float32, [4]), (torch.bfloat16, [2, 4])])
def test_the_vocabulary_is_held_for_one_chunk_and_never_for_all_rows(dtype, buffers):
    n, chunk, vocabulary, width = 120, 10, 500, 2
    hidden, weight, _, targets, _ = problem(dtype, (6, 20), width, vocabulary)
    mask = torch.ones(6, 20, dtype=torch.bool)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    shapes = Shapes()
    with shapes, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logp = token_log_probs(hidden, weight, targets.clamp(min=0), mask, chunk=chunk)
        logp.sum().backward()
    # Saved: the weight itself, a bias, the rows, targets, normalisers, and where the rows are.
    large = [x for x in saved if x.numel() > n * width]
    assert {x.data_ptr() for x in large} <= {weight.data_ptr(), *(b.data_ptr() for b in large[1:2])}
    assert sum(x.numel() for x in large) <= vocabulary * (width + 1)
    assert all(x.numel() < chunk * vocabulary for x in saved)
    # One buffer for the forward and the backward pass, whatever the number of chunks; in low
    # precision a float32 one beside it.
    found = sorted(shapes.buffers(2 * chunk * vocabulary - 1))
    assert found == [size * chunk * vocabulary for size in buffers]


# Shifting


def test_the_state_at_a_position_predicts_the_next_token():
    """Token k is followed by k+1 with probability 0.9, but 4 by the end token 0 with 0.6."""
    follows = torch.full((5, 5), 0.025, dtype=torch.float64)
    follows[torch.arange(4), torch.arange(1, 5)] = 0.9
    follows[4], follows[4, 0] = 0.1, 0.6
    pad = 3
    tokens = torch.tensor([[1, 2, 3, 4, 0], [pad, 3, 4, 0, pad], [2, 3, 4, pad, pad]])
    completion = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    targets, mask = shifted(tokens, completion)
    assert targets.tolist() == [[2, 3, 4, 0], [3, 4, 0, pad], [3, 4, pad, pad]]
    assert mask.tolist() == [[False, True, True, True], [False, True, True, False], [1, 1, 0, 0]]
    hidden = torch.eye(5, dtype=torch.float64)[tokens]
    logp = token_log_probs(hidden[:, :-1], follows.log().T, targets, mask)
    found = sequence_log_prob(logp, mask)
    # The first completion token counts, and so does the end token, of probability 0.6.
    expected = torch.tensor([0.9 * 0.9 * 0.6, 0.9 * 0.6, 0.9 * 0.9], dtype=torch.float64)
    torch.testing.assert_close(found.sum.exp(), expected, atol=1e-12, rtol=0)
    assert found.count.tolist() == [3, 2, 2]
    # The neighbouring mistakes give other numbers.
    for states, wrong in ((hidden[:, 1:], targets), (hidden[:, :-1], tokens[:, :-1])):
        other = token_log_probs(states, follows.log().T, wrong, mask).sum(1)
        assert (other < found.sum - 1).all()


def test_sequence_log_prob_by_hand():
    logp = torch.tensor([[-1.0, -2.0, NAN], [NAN, NAN, NAN], [-0.5, NAN, -4.0]])
    logp.requires_grad_()
    mask = torch.tensor([[True, True, False], [False] * 3, [True, False, True]])
    found = sequence_log_prob(logp, mask)
    assert found.sum.tolist() == [-3.0, 0.0, -4.5]
    assert found.mean.tolist() == [-1.5, 0.0, -2.25]
    assert found.count.tolist() == [2, 0, 2]
    (found.sum + 10 * found.mean).sum().backward()
    assert logp.grad.tolist() == [[6.0, 6.0, 0.0], [0.0] * 3, [6.0, 0.0, 6.0]]


# Against other libraries


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_model_has_the_same_log_probabilities_and_gradients(tied):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    tokens = torch.randint(37, (3, 9))
    place, length = torch.arange(9), torch.tensor([[9], [6], [7]])
    attention, completion = place < length, (place >= 3) & (place < length)
    inputs = {"input_ids": tokens, "attention_mask": attention.long()}

    targets, mask = shifted(tokens, completion)
    hidden = model.model(**inputs).last_hidden_state[:, :-1]
    logp = token_log_probs(hidden, model.lm_head.weight, targets, mask, chunk=4)
    ours = sequence_log_prob(logp, mask).sum

    theirs = []
    for row, logits in enumerate(model(**inputs).logits):
        terms = [logits[i - 1].log_softmax(-1)[tokens[row, i]] for i in range(3, int(length[row]))]
        theirs.append(sum(terms))
    theirs = torch.stack(theirs)
    torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    parameters = list(model.parameters())
    found = torch.autograd.grad((factors * ours).sum(), parameters)
    expected = torch.autograd.grad((factors * theirs).sum(), parameters)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl_has_the_same_log_probabilities_and_entropies(temperature):
    utils = pytest.importorskip("trl.trainer.utils")
    hidden, weight, _, targets, mask = problem(torch.float32, width=32, vocabulary=100)
    targets = targets.clamp(min=0)
    logits = hidden @ weight.T
    found = token_log_probs_and_entropy(hidden, weight, targets, mask, temperature=temperature)
    theirs = utils.selective_log_softmax(logits, targets, temperature=temperature)
    torch.testing.assert_close(found.logp, theirs * mask, atol=1e-6, rtol=1e-6)
    entropy = utils.entropy_from_logits(logits / temperature)
    torch.testing.assert_close(found.entropy, entropy * mask, atol=1e-6, rtol=1e-6)
    ours = torch.autograd.grad(found.logp.sum(), (hidden, weight), retain_graph=True)
    expected = torch.autograd.grad((theirs * mask).sum(), (hidden, weight))
    for one, two in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# Bad input


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be in \(0, inf\), got 0.0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"chunk": 0}, "chunk must be >= 1, got 0"),
        ({"targets": torch.zeros(4, 6).long()}, r"targets must have shape \(4, 7\), got \(4, 6\)"),
        ({"mask": torch.ones(7).bool()}, r"mask must have shape \(4, 7\), got \(7,\)"),
        ({"weight": torch.zeros(11, 4).double()}, r"weight must have shape \(11, 5\)"),
        ({"bias": torch.zeros(10).double()}, r"bias must have shape \(11,\), got \(10,\)"),
        ({"weight": torch.zeros(11, 5)}, "weight must have hidden's dtype torch.float64"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    hidden, weight, bias, targets, mask = problem()
    given = {"hidden": hidden, "weight": weight, "targets": targets, "mask": mask, "bias": bias}
    with pytest.raises(ValueError, match=message):
        token_log_probs(**{**given, **change})
