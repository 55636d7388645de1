"""Adaptive guidance inside pipelines of diffusers: against those alone, and diffusers' own cut-off."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from esscher import images
from esscher.adapters.diffusers import load_diffusion
from esscher.adapters.guided_pipeline import (
    _noise_levels,
    _rows_of,
    adaptive_guidance,
    recorded_guidance,
)
from esscher.errors import UserError
from esscher.experiment import ModelConfig
from esscher.samplers.guidance import adaptive_solve, cut_off, fit_linear, interleaved

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


def test_afterwards_the_pipeline_is_as_before(text: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(text.unet))
    with pytest.raises(RuntimeError, match="on purpose"), adaptive_guidance(text):
        raise RuntimeError("on purpose")
    assert "forward" not in vars(text.unet) and vars(text.unet).keys() == before.keys()
    own = text.unet.forward
    monkeypatch.setattr(text.unet, "forward", own)
    with adaptive_guidance(text):
        drawn(text)
    assert vars(text.unet)["forward"] is own


def test_what_cannot_be_guided_is_refused(text: Any) -> None:
    with pytest.raises(UserError, match="threshold"), adaptive_guidance(text, threshold=1.5):
        pass
    with pytest.raises(UserError, match="no unet"), adaptive_guidance(object()):
        pass
    with (
        adaptive_guidance(text),
        pytest.raises(UserError, match="already"),
        adaptive_guidance(text),
    ):
        pass


@pytest.mark.parametrize("count", [1, 2, 3])
def test_without_guidance_the_call_goes_through(text: Any, count: int) -> None:
    prompts = PROMPTS[:count]
    plain = drawn(text, prompts, guidance_scale=1.0)
    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=1) as counted:
        ours = drawn(text, prompts, guidance_scale=1.0)
        assert counted.evaluations.tolist() == [8] * count and len(counted.cosines) == 8
        drawn(text, prompts)
        assert counted.evaluations.tolist() == [9] * count
    assert torch.equal(ours, plain)


def test_guidance_may_end_in_the_middle_and_not_begin_there(text: Any) -> None:
    callbacks: Any = importlib.import_module("diffusers.callbacks")
    at = callbacks.SDCFGCutoffCallback(cutoff_step_index=2, cutoff_step_ratio=None)
    told = {"callback_on_step_end": at, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = drawn(text, PROMPTS[:1], **told)
    with adaptive_guidance(text, threshold=1.0) as counted:
        ours = drawn(text, PROMPTS[:1], **told)
    assert torch.equal(ours, expected) and counted.evaluations.tolist() == [11]

    def begins(pipeline: Any, *_: Any) -> Any:
        pipeline._guidance_scale = 4.0
        embeds = torch.zeros(2, 16, 16)
        return {"prompt_embeds": embeds}

    told = {"callback_on_step_end": begins, "guidance_scale": 1.0}
    with adaptive_guidance(text), pytest.raises(UserError, match="in the middle"):
        drawn(text, PROMPTS[:1], **told)


def test_a_call_that_does_not_say_whether_it_guides_is_refused(classes: Any) -> None:
    """Two rows of it are two images, whatever their noise."""
    same = [torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)]
    for generator in (None, same):
        with adaptive_guidance(classes), pytest.raises(UserError, match="2 rows in one call"):
            classes([3, 4], guidance_scale=1.0, generator=generator, num_inference_steps=2)


def components(text: Any, **others: Any) -> dict[str, Any]:
    kept = {name: part for name, part in text.components.items() if name != "image_encoder"}
    return {**kept, **others, "requires_safety_checker": False}


def test_pipelines_without_guidance_or_with_two_are_refused(text: Any) -> None:
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    network = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks
    )
    alone = diffusers.DDIMPipeline(network, diffusers.DDIMScheduler())
    with pytest.raises(UserError, match="DDIMPipeline draws without"), adaptive_guidance(alone):
        pass
    edits = diffusers.StableDiffusionInstructPix2PixPipeline(**components(text))
    with pytest.raises(UserError, match="three answers"), adaptive_guidance(edits):
        pass


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("DDIMScheduler", {"prediction_type": "foo"}, "prediction_type 'foo'"),
        ("EDMEulerScheduler", {}, "preconditioning"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "continuous steps"),
        ("IPNDMScheduler", {}, "prediction_type None"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "backwards"),
    ],
)
def test_schedulers_that_are_not_known_are_refused(
    text: Any, monkeypatch: pytest.MonkeyPatch, kind: str, options: Any, match: str
) -> None:
    scheduler = getattr(diffusers, kind)(**options)
    monkeypatch.setattr(text, "scheduler", scheduler)
    with pytest.raises(UserError, match=match), adaptive_guidance(text):
        pass


# ---- every call begins anew


def interrupts(pipeline: Any, step: int, *_: Any) -> Any:
    pipeline._interrupt = pipeline._interrupt or step == 2
    return {}


def fails(_: Any, step: int, *__: Any) -> Any:
    if step == 2:
        raise RuntimeError("on purpose")
    return {}


@pytest.mark.parametrize("stop", [interrupts, fails])
def test_after_a_call_that_was_stopped_the_next_one_is_as_ever(
    text: Any, stop: Callable[..., Any]
) -> None:
    options: dict[str, Any] = {"threshold": -0.999, "min_guided_steps": 1}
    with adaptive_guidance(text, **options) as counted:
        expected = drawn(text)
        assert counted.evaluations.tolist() == [9] * 3
    with adaptive_guidance(text, **options) as counted:
        try:
            drawn(text, callback_on_step_end=stop)
        except RuntimeError as error:
            assert "on purpose" in str(error)
        assert counted.evaluations.tolist() == [4] * 3
        assert torch.equal(drawn(text), expected)
        assert counted.evaluations.tolist() == [9] * 3 and len(counted.cosines) == 8
        drawn(text, PROMPTS[:1])
        assert counted.evaluations.tolist() == [9]


def test_after_a_call_that_was_refused_the_next_one_is_as_ever(text: Any) -> None:
    with adaptive_guidance(text, policy=cut_off(8, 3)) as counted:
        with pytest.raises(UserError, match="policy must be of one entry a step, 5 in all, got 8"):
            text(["a"], num_inference_steps=5, guidance_scale=4.0, output_type="latent")
        drawn(text)
        assert counted.evaluations.tolist() == [11] * 3


def test_loops_of_ones_own_may_take_the_same_timesteps_again(text: Any) -> None:
    scheduler = text.scheduler
    scheduler.set_timesteps(8)
    states = torch.randn(2, 4, 16)

    def loop(last: int) -> None:
        z = torch.randn(1, 4, 8, 8)
        for time in scheduler.timesteps[:last]:
            with torch.no_grad():
                text.unet(torch.cat([z, z]), time, encoder_hidden_states=states)

    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=2) as counted:
        text._guidance_scale = 4.0
        loop(5)
        assert counted.evaluations.tolist() == [7]
        loop(8)
        assert counted.evaluations.tolist() == [10]
        loop(8)
        assert counted.evaluations.tolist() == [10]
        with pytest.raises(UserError, match="the time 626 where its scheduler is at 751"):
            text.unet(torch.zeros(2, 4, 8, 8), scheduler.timesteps[0], encoder_hidden_states=states)
            text.unet(torch.zeros(2, 4, 8, 8), 626, encoder_hidden_states=states)


SHOWN = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kind", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]
)
def test_a_drawing_that_begins_later_has_fewer_steps(
    text: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of 8; of Heun's 15 calls of the network the last 7. A quarter of them, rounded up."""
    scheduler = getattr(diffusers, kind).from_config(text.scheduler.config)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**components(text, scheduler=scheduler))
    pipeline.set_progress_bar_config(disable=True)
    calls = 7 if kind == "HeunDiscreteScheduler" else 4

    def draw() -> torch.Tensor:
        told: dict[str, Any] = {"image": SHOWN, "strength": 0.5}
        return drawn(pipeline, PROMPTS[:2], **told)

    plain, rows = draw(), Rows(pipeline.unet, monkeypatch)
    with adaptive_guidance(pipeline, threshold=1.0) as counted:
        assert torch.equal(draw(), plain)
        assert counted.evaluations.tolist() == [2 * calls] * 2
    rows.counts.clear()
    with adaptive_guidance(pipeline, policy=cut_off(calls, 2), threshold=None) as counted:
        first = draw()
        assert counted.evaluations.tolist() == [calls + 2] * 2
        assert torch.equal(draw(), first)
        assert counted.evaluations.tolist() == [calls + 2] * 2
    assert rows.counts == 2 * ([4] * 2 + [2] * (calls - 2))


def test_that_a_drawing_ends_earlier_is_known_where_the_pipeline_says_so(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(text), "denoising_end", 0.5, raising=False)
    with (
        adaptive_guidance(text, policy=cut_off(4, 2)),
        pytest.raises(UserError, match="policy must be of one entry a step, 8 in all"),
    ):
        drawn(text)
    monkeypatch.setattr(type(text), "num_timesteps", 4)
    with adaptive_guidance(text, policy=cut_off(4, 2)) as counted:
        drawn(text, callback_on_step_end=lambda pipe, step, *_: interrupts(pipe, step - 1))
        assert counted.evaluations.tolist() == [6] * 3


# ---- other pipelines


def cut_by_hand(network: Any, guided: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks about all rows, and after some calls says of both halves what it says of the second."""
    whole, calls = network.forward, []

    def forward(*given: Any, **named: Any) -> Any:
        answer = whole(*given, **named)
        calls.append(answer)
        conditional = answer[0].chunk(2)[1]
        both = torch.cat([conditional, conditional])
        return answer if len(calls) <= guided else (both, *answer[1:])

    monkeypatch.setattr(network, "forward", forward)


def test_of_a_controlnet_each_rows_own_residuals_are_picked(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = diffusers.ControlNetModel.from_unet(
        text.unet, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)
    )
    for parameter in control.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    pipeline = diffusers.StableDiffusionControlNetPipeline(**components(text, controlnet=control))
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        return drawn(pipeline, PROMPTS[:2], image=SHOWN, height=16, width=16)

    with monkeypatch.context() as patched:
        cut_by_hand(pipeline.unet, 2, patched)
        expected = draw()
    rows = Rows(pipeline.unet, monkeypatch)
    with adaptive_guidance(pipeline, threshold=None, policy=cut_off(8, 2)) as counted:
        torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-5)
    assert counted.evaluations.tolist() == [10, 10] and rows.counts == [4] * 2 + [2] * 6


def test_rows_are_picked_wherever_they_are() -> None:
    value = torch.arange(4)
    rows = torch.tensor([True, False, False, True])
    told = {"embeds": [value, value[:1]], "pair": (value, {"text": value}), "scale": 0.5}
    picked = _rows_of(told, rows)
    assert picked["embeds"][0].tolist() == [0, 3] and picked["embeds"][1].tolist() == [0]
    assert picked["pair"][0].tolist() == [0, 3] and picked["pair"][1]["text"].tolist() == [0, 3]
    assert isinstance(picked["pair"], tuple) and picked["scale"] == 0.5


def test_what_an_inpainting_network_is_told_beside_the_sample_is_no_noise(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eps = sqrt(abar) v + sqrt(1 - abar) z of the first 4 of 9 channels."""
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel.from_config({**text.unet.config, "in_channels": 9})
    velocities = diffusers.DDIMScheduler.from_config(
        text.scheduler.config, prediction_type="v_prediction"
    )
    parts = components(text, unet=network, scheduler=velocities)
    pipeline = with_weights(diffusers.StableDiffusionInpaintPipeline(**parts))
    whole, expected = network.forward, []

    def forward(z: Any, time: Any, *given: Any, **named: Any) -> Any:
        answer = whole(z, time, *given, **named)
        abar = velocities.alphas_cumprod[int(time)]
        noise = abar.sqrt() * answer[0] + (1 - abar).sqrt() * z[:, :4]
        expected.append(torch.cosine_similarity(*noise.flatten(1).chunk(2)))
        return answer

    monkeypatch.setattr(network, "forward", forward)
    mask = torch.ones(2, 1, 16, 16)
    with adaptive_guidance(pipeline, threshold=1.0) as counted:
        drawn(pipeline, PROMPTS[:2], image=SHOWN, mask_image=mask, height=16, width=16)
    torch.testing.assert_close(torch.stack(counted.cosines), torch.stack(expected))


def test_variances_that_are_learned_are_no_noise(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 8 channels of a network that reads 8 the first 4 are, as in super-resolution."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    monkeypatch.setattr(text, "scheduler", scheduler)
    z, out = torch.randn(1, 8, 4, 4).repeat(2, 1, 1, 1), torch.randn(2, 8, 4, 4)
    monkeypatch.setattr(text.unet, "forward", lambda *_, **__: (out,))
    scheduler.set_timesteps(4)
    text._guidance_scale = 4.0
    with adaptive_guidance(text) as counted:
        text.unet(z, scheduler.timesteps[0])
    first, second = out[:, :4].flatten(1).split(1)
    expected = torch.cosine_similarity(first, second)
    torch.testing.assert_close(counted.cosines[0], expected)


# ---- when samples leave


def test_without_a_number_a_cosine_that_begins_high_says_nothing(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cosines of 1, 1, 1, 0, 1, 1 ...: with a quarter of 8 none has left before it fell."""
    cosines = [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    asked: list[int] = []

    def forward(z: torch.Tensor, *_: Any, **__: Any) -> Any:
        first, second = torch.zeros_like(z[:1]), torch.zeros_like(z[:1])
        first[..., 0], second[..., 1] = 1.0, 1.0
        same = cosines[len(asked)] == 1
        asked.append(len(z))
        both = torch.cat([first, first if same else second])
        return (both[-len(z) :],)

    monkeypatch.setattr(text.unet, "forward", forward)
    with adaptive_guidance(text, threshold=0.9) as counted:
        drawn(text, PROMPTS[:1])
    assert asked == [2] * 5 + [1] * 3 and counted.evaluations.tolist() == [13]
    asked.clear()
    with adaptive_guidance(text, threshold=0.9, min_guided_steps=2) as counted:
        drawn(text, PROMPTS[:1])
    assert asked == [2] * 2 + [1] * 6 and counted.evaluations.tolist() == [10]


# ---- policies, as adaptive_solve has them


PLAIN: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


class BothWays:
    """The same noise and conditions for a pipeline and for a model in the library's coordinates."""

    def __init__(self, pipeline: Any, monkeypatch: pytest.MonkeyPatch, **kind: Any):
        scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **kind)
        monkeypatch.setattr(pipeline, "scheduler", scheduler)
        monkeypatch.setattr(images, "tiny_here", lambda: pipeline, raising=False)
        config = ModelConfig(source="esscher.images:tiny_here")
        self.model = load_diffusion(config, torch.device("cpu"))
        self.pipeline, self.levels = pipeline, self.model.levels(8)
        self.condition: Any = self.model.encode([{"prompt": prompt} for prompt in PROMPTS])

    def noise(self, seed: int) -> torch.Tensor:
        return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(seed))

    def drawn(self, seed: int = 0, **options: Any) -> torch.Tensor:
        return drawn(self.pipeline, latents=self.noise(seed), **options)

    def fit(self) -> Any:
        with recorded_guidance(self.pipeline) as recorded:
            for seed in (1, 2):
                self.drawn(seed)
        assert recorded.paths == 6
        return recorded.fit()

    def fitted(self) -> Any:
        x = torch.cat([self.noise(seed) for seed in (1, 2)]) * self.model.start(self.levels)
        condition = torch.cat([self.condition, self.condition])
        with torch.no_grad():
            return fit_linear(
                self.model.denoiser, x, self.levels, condition, self.model.null, scale=4.0
            )

    def solved(self, **options: Any) -> Any:
        x = self.noise(0) * self.model.start(self.levels)
        with torch.no_grad():
            found = adaptive_solve(
                self.model.denoiser,
                x,
                self.levels,
                self.condition,
                self.model.null,
                scale=4.0,
                **options,
            )
        return found.x * self.model.end(self.levels), found


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_linear_guidance_is_that_of_the_library(
    text: Any, prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = BothWays(text, monkeypatch, prediction_type=prediction)
    plain, linear = ways.drawn(), ways.fit()
    expected, found = ways.solved(threshold=None, linear=ways.fitted())
    torch.testing.assert_close(
        linear.linear.unexplained, ways.fitted().unexplained, rtol=0.02, atol=1e-6
    )
    with adaptive_guidance(text, threshold=None, linear=linear) as counted:
        ours = ways.drawn()
    size = float(expected.abs().max())
    torch.testing.assert_close(ours / size, expected / size, **PLAIN)
    assert counted.evaluations.tolist() == found.evaluations.tolist() == [10] * 3
    assert not torch.allclose(ours / size, plain / size, atol=1e-3)


STEPS: Any = ("guided", 2.0, "unconditional", "conditional", "guided", 6.0, "guided", "guided")


@pytest.mark.parametrize("policy", [interleaved(8), cut_off(8, 5), STEPS])
@pytest.mark.parametrize("guided_at_crossing", [True, False])
def test_policies_are_those_of_the_library(
    text: Any, policy: Any, guided_at_crossing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = BothWays(text, monkeypatch)
    _, whole = ways.solved(threshold=None)
    middle = whole.cosine[4].sort().values
    rule: dict[str, Any] = {
        "threshold": float((middle[1] + middle[2]) / 2),
        "policy": policy,
        "guided_at_crossing": guided_at_crossing,
    }
    expected, found = ways.solved(**rule)
    rows = Rows(text.unet, monkeypatch)
    with adaptive_guidance(text, **rule) as counted:
        ours = ways.drawn()
    torch.testing.assert_close(ours, expected, **PLAIN)
    torch.testing.assert_close(torch.stack(counted.cosines), found.cosine, **PLAIN, equal_nan=True)
    assert counted.evaluations.tolist() == found.evaluations.tolist()
    assert sum(rows.counts) == int(counted.evaluations.sum())


def test_a_fit_is_refused_where_it_does_not_belong(
    text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = BothWays(text, monkeypatch)
    linear = ways.fit()

    def refused(match: str, prompts: Any = PROMPTS, steps: int = 8, **options: Any) -> None:
        asked = {"guidance_scale": 4.0, "output_type": "latent", **options}
        with adaptive_guidance(text, linear=linear), pytest.raises(UserError, match=match):
            text(list(prompts), num_inference_steps=steps, **asked)

    refused("fitted on the noise levels", steps=9)
    refused("with scale 4.0, not 5.0", guidance_scale=5.0)
    refused("another null condition", negative_prompt=["b"] * 3)
    refused("got 3 that differ", negative_prompt=["b", "", "c"])
    refused("not DDIMScheduler .epsilon. and guidance_rescale 0.7: fit it", guidance_rescale=0.7)
    with adaptive_guidance(text, linear=linear):
        ways.drawn(guidance_scale=1.0)
        drawn(text, PROMPTS[:1])
    for kind, match in (("EulerDiscreteScheduler", "not Euler"), ("DDPMScheduler", "adds some")):
        scheduler = getattr(diffusers, kind).from_config(text.scheduler.config)
        monkeypatch.setattr(text, "scheduler", scheduler)
        refused(match)


def test_paths_are_recorded_whole_and_under_guidance_alone(text: Any, classes: Any) -> None:
    with recorded_guidance(text) as recorded:
        with pytest.raises(UserError, match="no path was recorded"):
            recorded.fit()
        drawn(text, callback_on_step_end=interrupts)
        with pytest.raises(UserError, match="no path was recorded"):
            recorded.fit()
        with pytest.raises(UserError, match="does not guide, and"):
            drawn(text, guidance_scale=1.0)
        plain = drawn(text)
        assert recorded.paths == 3
        with pytest.raises(UserError, match="with scale 4.0, not 5.0"):
            drawn(text, guidance_scale=5.0)
    assert torch.equal(plain, drawn(text))
    with recorded_guidance(classes), pytest.raises(UserError, match="tells its network none"):
        classes([3, 4], num_inference_steps=2)


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
    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=2) as counted:
        drawn(text)
    assert counted.evaluations.tolist() == [10] * 3
    noise = diffusers.DDIMScheduler.from_config(whole.config, **zero)
    monkeypatch.setattr(text, "scheduler", noise)
    with adaptive_guidance(text, threshold=-0.999, min_guided_steps=1) as counted:
        drawn(text)
    assert counted.evaluations.tolist() == [9] * 3
