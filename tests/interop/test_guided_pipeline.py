"""Adaptive guidance inside pipelines of diffusers: against those alone, and diffusers' own cut-off."""

import importlib
import math
from typing import Any

import pytest
import torch

from esscher import images
from esscher.adapters.guided_pipeline import _noise_levels, adaptive_guidance
from esscher.errors import UserError

diffusers: Any = importlib.import_module("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def with_weights(pipeline: Any) -> Any:
    """None of them 0, as some of a DiT's are at first."""
    pipeline.set_progress_bar_config(disable=True)
    for part in ("unet", "transformer"):
        if hasattr(pipeline, part):
            for parameter in getattr(pipeline, part).eval().parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
    return pipeline


@pytest.fixture(scope="module")
def text() -> Any:
    torch.manual_seed(0)
    return with_weights(images.tiny_stable_diffusion(width=16))


@pytest.fixture(scope="module")
def classes() -> Any:
    torch.manual_seed(0)
    return with_weights(images.tiny_dit(classes=1000))


class Rows:
    """How many rows a network was really asked about, call by call."""

    def __init__(self, network: Any, monkeypatch: pytest.MonkeyPatch):
        self.counts: list[int] = []
        whole = network.forward

        def forward(*given: Any, **named: Any) -> Any:
            self.counts.append(len(given[0] if given else named["hidden_states"]))
            return whole(*given, **named)

        monkeypatch.setattr(network, "forward", forward)


PROMPTS = ("a cat", "two dogs", "x")


def drawn(pipeline: Any, prompts: Any = PROMPTS, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    asked: dict[str, Any] = {"output_type": "latent", "guidance_scale": 4.0, **options}
    return pipeline(list(prompts), num_inference_steps=8, generator=generator, **asked).images


def test_with_a_threshold_out_of_reach_nothing_changes(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, rows = drawn(text), Rows(text.unet, monkeypatch)
    with adaptive_guidance(text, threshold=1.0) as counted:
        ours = drawn(text)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert rows.counts == [6] * 8 and counted.evaluations.tolist() == [16, 16, 16]
    assert len(counted.cosines) == 8


def test_at_a_threshold_always_reached_it_is_the_cut_off_of_diffusers(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    callbacks: Any = importlib.import_module("diffusers.callbacks")
    at = callbacks.SDCFGCutoffCallback(cutoff_step_index=2, cutoff_step_ratio=None)
    told = {"callback_on_step_end": at, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    one = PROMPTS[:1]  # Theirs takes no more.
    expected, rows = drawn(text, one, **told), Rows(text.unet, monkeypatch)
    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=3) as counted:
        ours = drawn(text, one)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert rows.counts == [2] * 3 + [1] * 5
    assert counted.evaluations.tolist() == [11]
    assert not torch.allclose(expected, drawn(text, one), atol=1e-3)


def test_each_sample_leaves_on_its_own_and_for_good(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with adaptive_guidance(text, threshold=1.0) as counted:
        drawn(text)
    cosines = torch.stack(counted.cosines)
    # The second step's cosines, of which one sample reaches the threshold.
    middle = cosines[1].sort().values
    rows = Rows(text.unet, monkeypatch)
    with adaptive_guidance(
        text, threshold=float((middle[1] + middle[2]) / 2), min_guided_steps=2
    ) as counted:
        drawn(text)
    assert rows.counts[:2] == [6, 6] and rows.counts[2] in (3, 4, 5)
    assert sorted(rows.counts, reverse=True) == rows.counts
    assert int(counted.evaluations.sum()) == sum(rows.counts)
    best = int(cosines[1].argmax())
    assert all(math.isnan(float(later[best])) for later in counted.cosines[2:])


def test_the_class_pipeline_puts_its_halves_the_other_way_round(
    classes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw() -> Any:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            classes(
                [3, 4],
                guidance_scale=4.0,
                generator=generator,
                num_inference_steps=8,
                output_type="np",
            ).images
        )

    classes.scheduler = diffusers.EulerDiscreteScheduler.from_config(classes.scheduler.config)
    plain, rows = draw(), Rows(classes.transformer, monkeypatch)
    with adaptive_guidance(classes, threshold=1.0):
        torch.testing.assert_close(draw(), plain, rtol=1e-4, atol=1e-5)
    with adaptive_guidance(classes, threshold=-0.999, min_guided_steps=0) as counted:
        alone = draw()
    assert rows.counts == [4] * 8 + [4] + [2] * 7
    assert counted.evaluations.tolist() == [9, 9]
    assert not torch.allclose(alone, plain, atol=1e-4)


def test_velocities_are_compared_as_noise(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eps = sqrt(abar) v + sqrt(1 - abar) z, of all that the network was asked and answered."""
    kind = {"prediction_type": "v_prediction"}
    whole, plain = text.scheduler, text.unet.forward
    expected: list[torch.Tensor] = []

    def forward(z: Any, time: Any, *given: Any, **named: Any) -> Any:
        answer = plain(z, time, *given, **named)
        abar = text.scheduler.alphas_cumprod[int(time)]
        noise = abar.sqrt() * answer[0] + (1 - abar).sqrt() * z
        conditional, unconditional = noise.flatten(1).chunk(2)
        expected.append(torch.cosine_similarity(conditional, unconditional))
        return answer

    monkeypatch.setattr(text.unet, "forward", forward)
    monkeypatch.setattr(
        text, "scheduler", diffusers.DDIMScheduler.from_config(whole.config, **kind)
    )
    with adaptive_guidance(text, threshold=1.0) as counted:
        drawn(text)
    assert len(expected) == 8
    torch.testing.assert_close(torch.stack(counted.cosines), torch.stack(expected))


def test_levels_of_a_flow_are_those_of_its_scheduler() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    kind, levels = _noise_levels(scheduler)
    share = scheduler.sigmas[1:-1].double()
    assert kind == "flow_prediction" and float(levels[-1]) == 0
    assert float(levels[0]) == pytest.approx(1e6, rel=1e-3), "noise alone"
    torch.testing.assert_close(levels[1:-1], share / (1 - share), rtol=1e-4, atol=0)


def test_afterwards_the_pipeline_is_as_before(text: Any) -> None:
    before = text.unet.forward
    with pytest.raises(RuntimeError, match="on purpose"), adaptive_guidance(text):
        raise RuntimeError("on purpose")
    assert text.unet.forward == before


def test_what_cannot_be_guided_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match="threshold"), adaptive_guidance(text, threshold=1.5):
        pass
    with pytest.raises(UserError, match="no unet"), adaptive_guidance(object()):
        pass
    with adaptive_guidance(text), pytest.raises(UserError, match="guidance_scale above 1"):
        drawn(text, guidance_scale=1.0)


def test_where_there_is_no_signal_none_may_leave(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Velocities say the noise alone there; answers that are the noise are still compared."""
    whole = text.scheduler
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    velocities = diffusers.DDIMScheduler.from_config(
        whole.config, prediction_type="v_prediction", **zero
    )
    monkeypatch.setattr(text, "scheduler", velocities)
    with (
        adaptive_guidance(text, min_guided_steps=1),
        pytest.raises(UserError, match="min_guided_steps must be >= 2, or None, .* got 1"),
    ):
        drawn(text)
    with adaptive_guidance(text, threshold=-0.999) as counted:
        drawn(text)
    assert counted.evaluations.tolist() == [10] * 3
    noise = diffusers.DDIMScheduler.from_config(whole.config, **zero)
    monkeypatch.setattr(text, "scheduler", noise)
    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=1) as counted:
        drawn(text)
    assert counted.evaluations.tolist() == [9] * 3
