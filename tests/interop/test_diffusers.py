"""Pipelines of diffusers, read, drawn from and written: against the pipelines themselves."""

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from esscher import images
from esscher.adapters.diffusers import load_diffusion, save_diffusion
from esscher.adapters.pretrained import digest_of
from esscher.distributions.diffusion import DiffusionModel
from esscher.errors import UserError
from esscher.experiment import ModelConfig
from esscher.samplers.solvers import solve

diffusers: Any = importlib.import_module("diffusers")
CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def seeded(make: Any, **options: Any) -> Any:
    """A pipeline with random weights, none of them 0 (some of a DiT's last layers begin there)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = make(**options)
        for part in ("unet", "transformer"):
            if hasattr(pipeline, part):
                for parameter in getattr(pipeline, part).parameters():
                    parameter.data += 0.02 * torch.randn_like(parameter)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One pipeline of each kind."""
    made = {
        "plain": seeded(images.tiny_unet, size=8, width=16, prediction="v_prediction"),
        "classes": seeded(images.tiny_unet, size=8, width=16, channels=1, classes=3),
        "flow": seeded(images.tiny_unet, size=8, width=16, prediction="flow"),
        "dit": seeded(images.tiny_dit, classes=1000),
        "text": seeded(images.tiny_stable_diffusion, width=16),
    }
    root = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in made.items():
        pipeline.save_pretrained(root / name)
    return {name: root / name for name in made}


def opened(folder: Path) -> Any:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(folder: Path, **options: Any) -> DiffusionModel:
    return load_diffusion(ModelConfig(source=str(folder), **options), CPU)


SEEDS = [4, 9]


def generators() -> list[torch.Generator]:
    """For a pipeline: a sample's noise from its own seed, as here."""
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def latents(*shape: int) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=g) for g in generators()])


def drawn(
    model: DiffusionModel, rows: Any, steps: int, scale: float = 1.0, **options: Any
) -> torch.Tensor:
    """Images of the two seeds."""
    condition = None if rows is None else model.encode(rows)
    return model.decode(model.draw(condition, SEEDS, steps=steps, scale=scale, **options))


def assert_alike(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-4, in images most of which is neither black nor white."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ((theirs > 0) & (theirs < 1)).float().mean() > 0.4 and theirs.std() > 0.05


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


# ---- images are those of the pipeline


def ddim_of(folder: Path, **told: Any) -> Any:
    """The pipeline of a folder with DDIM in place of its scheduler."""
    pipeline = opened(folder)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, **told)
    ddim = diffusers.DDIMPipeline(pipeline.unet, scheduler)
    ddim.set_progress_bar_config(disable=True)
    return ddim


@pytest.mark.parametrize("clips", [True, False])
@torch.no_grad()
def test_images_of_a_unet(folders: dict[str, Path], tmp_path: Path, clips: bool) -> None:
    """Clipped estimates go with the noise that the network named, as DDIM's pipeline has it."""
    ddim = ddim_of(folders["plain"], clip_sample=clips, clip_sample_range=0.5)
    ddim.save_pretrained(tmp_path / "model")
    options = {"num_inference_steps": 5, "output_type": "pt", "generator": generators()}
    theirs = ddim(batch_size=2, **options).images
    assert_alike(drawn(load(tmp_path / "model"), None, 5), theirs)


@torch.no_grad()
def test_images_of_a_unet_that_was_made_for_ddpm(folders: dict[str, Path]) -> None:
    """In the steps of DDIM the noise follows from what clipping has left, as in those of DDPM."""
    options = {"num_inference_steps": 5, "output_type": "pt", "generator": generators()}
    ddim = ddim_of(folders["plain"])
    theirs = ddim(batch_size=2, use_clipped_model_output=True, **options).images
    assert_alike(drawn(load(folders["plain"]), None, 5), theirs)


@pytest.mark.parametrize("steps", [1, 5])
@torch.no_grad()
def test_images_from_a_level_without_signal(
    folders: dict[str, Path], tmp_path: Path, steps: int
) -> None:
    ddim = ddim_of(folders["plain"], rescale_betas_zero_snr=True, timestep_spacing="trailing")
    ddim.save_pretrained(tmp_path / "model")
    options = {"num_inference_steps": steps, "output_type": "pt", "generator": generators()}
    theirs = ddim(batch_size=2, **options).images
    model = load(tmp_path / "model")
    assert model.levels(steps)[0] > 1e6
    assert_alike(drawn(model, None, steps), theirs)


@torch.no_grad()
def test_images_of_a_unet_with_noise_at_every_step(folders: dict[str, Path]) -> None:
    """DDPM's own steps, clipping included."""
    pipeline, draw = opened(folders["plain"]), torch.Generator().manual_seed(4)
    theirs = pipeline(batch_size=1, generator=draw, num_inference_steps=5, output_type="pt").images
    model = load(folders["plain"])
    assert_alike(model.decode(model.draw(None, [4], steps=5, eta=1.0)), theirs)


@torch.no_grad()
def test_images_of_a_flow(folders: dict[str, Path]) -> None:
    pipeline = opened(folders["flow"])
    options = {"num_inference_steps": 5, "output_type": "pt", "generator": generators()}
    theirs = pipeline(batch_size=2, **options).images
    assert_alike(drawn(load(folders["flow"]), None, 5), theirs)


SOLVERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
}
SPACED = [
    ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "linspace"}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True}),
    (
        "DPMSolverMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    ("DDIMScheduler", {"timestep_spacing": "trailing", "set_alpha_to_one": False}),
]


@pytest.mark.parametrize("steps", [2, 8, 20])
@pytest.mark.parametrize(("name", "told"), SPACED, ids=[f"{n} {list(t)}" for n, t in SPACED])
@torch.no_grad()
def test_images_by_schedulers_of_all_spacings(
    folders: dict[str, Path], tmp_path: Path, name: str, told: dict[str, Any], steps: int
) -> None:
    """Against a loop over the scheduler by hand, from its first noise to its last step."""
    if "use_beta_sigmas" in told:
        pytest.importorskip("scipy")
    pipeline, z = opened(folders["plain"]), latents(3, 8, 8)
    kind: Any = getattr(diffusers, name)
    told = {"clip_sample": False, **told}
    scheduler = kind.from_config(pipeline.scheduler.config, **told)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path / "model")
    scheduler.set_timesteps(steps)
    x = z * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        output = pipeline.unet(scheduler.scale_model_input(x, step), step).sample
        x = scheduler.step(output, step, x).prev_sample
    solver: Any = SOLVERS[name]
    model = load(tmp_path / "model")
    ours = model.draw(None, SEEDS, steps=steps, solver=solver)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_of_classes(folders: dict[str, Path]) -> None:
    """No pipeline takes a U-Net's classes, so the loop is written out; class 3 stands for none."""
    pipeline, z = opened(folders["classes"]), noise(3, 1, 8, 8)
    model = load(folders["classes"], kwargs={"null_class": 3})
    start = z * float((1 + model.levels(5)[0] ** 2) ** 0.5)
    condition = model.encode([{"label": n} for n in (0, 1, 2)])
    ours = solve(model.guided(2.5), start, model.levels(5), condition)
    assert pipeline.scheduler.config.clip_sample
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler.set_timesteps(5)
    for t in pipeline.scheduler.timesteps:
        to = pipeline.unet(z, t, torch.tensor([0, 1, 2])).sample
        away = pipeline.unet(z, t, torch.tensor([3, 3, 3])).sample
        output, options = away + 2.5 * (to - away), {"use_clipped_model_output": True}
        z = pipeline.scheduler.step(output, t, z, **options).prev_sample
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@torch.no_grad()
def test_images_of_a_dit(folders: dict[str, Path], scale: float) -> None:
    pipeline = opened(folders["dit"])
    options: dict[str, Any] = {"num_inference_steps": 5, "output_type": "pt"}
    options["generator"] = generators()
    theirs = pipeline([7, 999], guidance_scale=scale, **options).images
    model = load(folders["dit"])
    assert_alike(drawn(model, [{"label": 7}, {"label": 999}], 5, scale), theirs)


@torch.no_grad()
def test_images_of_a_transformer_without_an_autoencoder(tmp_path: Path) -> None:
    """Against a loop by hand over the scheduler; after training too, as it was saved."""
    made = seeded(images.tiny_pixel_dit, classes=1000, prediction="v_prediction")
    made.save_pretrained(tmp_path / "begun")
    model, z = load(tmp_path / "begun"), latents(1, 8, 8)
    assert model.shape == (1, 8, 8) and model.null.tolist() == [1000]  # type: ignore[union-attr]
    rows = [{"label": 7}, {"label": 999}]
    with torch.enable_grad():
        loss = model.denoiser(z, torch.ones(2), model.encode(rows)).square().mean()
        torch.optim.SGD(model.trained, 0.1).zero_grad()
        loss.backward()
        torch.optim.SGD(model.trained, 0.1).step()
    save_diffusion(model, tmp_path / "model")
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path / "model", vae=None)
    scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    x = z
    for step in scheduler.timesteps:
        output = pipeline.transformer(x, step.expand(2), torch.tensor([7, 999])).sample
        x = scheduler.step(output, step, x, use_clipped_model_output=True).prev_sample
    again = load(tmp_path / "model")
    assert_alike(drawn(again, rows, 5), (x / 2 + 0.5).clamp(0, 1))
    assert digest_of(again) == digest_of(model) != digest_of(load(tmp_path / "begun"))


SCHEDULERS = [
    ("DDIMScheduler", 1.0),
    ("DDIMScheduler", 6.0),
    ("EulerDiscreteScheduler", 3.0),
    ("DPMSolverMultistepScheduler", 3.0),
]


@pytest.mark.parametrize(("scheduler", "scale"), SCHEDULERS)
@torch.no_grad()
def test_images_of_prompts(
    folders: dict[str, Path], tmp_path: Path, scheduler: str, scale: float
) -> None:
    pipeline = opened(folders["text"])
    kind: Any = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    prompts, z = ["a red cat", "two dogs, that run and run and run"], latents(4, 8, 8)
    theirs = pipeline(
        prompts, latents=z, num_inference_steps=5, guidance_scale=scale, output_type="pt"
    ).images
    model = load(tmp_path / "model")
    solver: Any = SOLVERS[scheduler]
    rows = [{"prompt": prompt} for prompt in prompts]
    assert_alike(drawn(model, rows, 5, scale, solver=solver), theirs)


def test_prompts_are_encoded_as_the_pipeline_does_it(folders: dict[str, Path]) -> None:
    """Once each, whatever the order; what is too long is cut."""
    pipeline, model = opened(folders["text"]), load(folders["text"])
    prompts = ["b", "a cat " * 20, "b", ""]
    theirs, empty = pipeline.encode_prompt(prompts, CPU, 1, True)
    ours: Any = model.encode([{"prompt": prompt} for prompt in prompts])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(model.null, empty[:1])
    assert not ours.requires_grad and model.columns == ("prompt",)


# ---- other schedulers


def test_a_pndm_scheduler_has_the_levels_of_ddim(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = opened(folders["text"])
    expected = load(folders["text"]).levels(10)
    pipeline.scheduler = diffusers.PNDMScheduler.from_config(
        pipeline.scheduler.config, skip_prk_steps=True
    )
    pipeline.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(load(tmp_path / "model").levels(10), expected)


@pytest.mark.parametrize(
    ("kind", "changes", "clip"),
    [
        (diffusers.DDPMScheduler, {}, 1.0),
        (diffusers.DDIMScheduler, {"clip_sample_range": 2.5}, 2.5),
        (diffusers.DDIMScheduler, {"clip_sample": False}, None),
        # It keeps what the scheduler before it was told, and does not clip.
        (diffusers.EulerDiscreteScheduler, {}, None),
    ],
)
def test_estimates_are_clipped_where_the_scheduler_clips(
    folders: dict[str, Path], tmp_path: Path, kind: Any, changes: dict[str, Any], clip: float | None
) -> None:
    pipeline = opened(folders["plain"])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    pipeline.save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.clip == model.frozen().clip == model.averaged().clip == clip
    far, level = 100 * noise(1, 3, 8, 8), torch.full((1,), 0.5)
    said, drawn_by = model.denoiser(far, level), model.guided(1.0)(far, level)
    bound = torch.inf if clip is None else clip
    torch.testing.assert_close(drawn_by, said.clamp(-bound, bound))
    assert clip is None or said.abs().max() > clip, "what the model learns by is not clipped"


def test_the_digits_of_proofs_are_not_clipped(tmp_path: Path) -> None:
    """The record of adaptive_guidance compares what the network itself says."""
    images.digits_unet(updates=1).save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").clip is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps_offset": 1000}, "steps_offset"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "epsilon"}, "rescale_betas_zero_snr"),
        ({"prediction_type": "odd"}, "prediction_type 'odd'"),
        ({"beta_end": 1.5}, "betas"),
        ({"trained_betas": [0.5, 1.0]}, "no signal"),
        ({"thresholding": True}, "set thresholding to false"),
    ],
)
def test_schedulers_that_cannot_be_used(
    folders: dict[str, Path], tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    pipeline = opened(folders["plain"])
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=says):
        load(tmp_path / "model").levels(10)


def test_a_scheduler_of_another_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = opened(folders["plain"])
    pipeline.scheduler = diffusers.EDMEulerScheduler()
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="EDMEulerScheduler"):
        load(tmp_path / "model")


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_there_are(folders: dict[str, Path], steps: int) -> None:
    with pytest.raises(UserError, match=r"\[1, 1000\]"):
        load(folders["plain"]).levels(steps)


# ---- conditions


def test_rows_that_say_nothing_the_model_knows(folders: dict[str, Path]) -> None:
    dit, text, plain = (ready(folders[name]) for name in ("dit", "text", "plain"))
    for label in (1001, -1, 2.0, True, None, "cat"):
        with pytest.raises(UserError, match="row 1: label"):
            dit.encode([{"label": 0}, {"label": label}])
    for prompt in (None, 3):
        with pytest.raises(UserError, match="row 0: prompt"):
            text.encode([{"prompt": prompt}])
    assert dit.columns == ("label",) and plain.columns == () and plain.encode([{}]) is None
    with pytest.raises(UserError, match="draws by label"):
        dit.draw(None, [1], steps=2)
    with pytest.raises(UserError, match="without conditions"):
        plain.draw(torch.zeros(1), [1], steps=2)
    with pytest.raises(UserError, match="scale must be 1, which is no guidance, got"):
        plain.draw(None, [1], steps=2, scale=2.0)


def test_classes_by_name() -> None:
    pipeline = seeded(images.tiny_dit)
    pipeline.labels = {"white shark": 2, "umbrella": 7}
    model = of_pipeline(pipeline)
    condition: Any = model.encode([{"label": "umbrella"}, {"label": 2}, {"label": 10}])
    assert condition.tolist() == [7, 2, 10] and model.null.tolist() == [10]  # type: ignore[union-attr]
    with pytest.raises(UserError, match="did you mean umbrella"):
        model.encode([{"label": "umbrela"}])


def test_the_null_class_of_a_unet_is_kept_with_it(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["classes"], kwargs={"null_class": 3})
    save_diffusion(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.null.tolist() == [3]  # type: ignore[union-attr]
    again.guided(2.0)
    with pytest.raises(UserError, match=r"label must be in \[0, 3\)"):
        again.encode([{"label": 4}])
    # diffusers opens it all the same, and what is said by hand counts more.
    assert opened(tmp_path / "model").unet.config.num_class_embeds == 4
    assert load(tmp_path / "model", kwargs={"null_class": 0}).null.tolist() == [0]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("classes", {"null_class": 4}, "4 classes"),
        ("plain", {"null_class": 0}, "0 classes"),
        ("classes", {"null": 3}, "null_class alone"),
        ("dit", {"null_class": 3}, "takes none"),
        ("classes", {"null_class": 1.5}, "whole number"),
    ],
)
def test_null_classes_that_cannot_be(
    folders: dict[str, Path], name: str, kwargs: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        load(folders[name], kwargs=kwargs)


# ---- what is trained, and what is drawn


def of_pipeline(pipeline: Any, **options: Any) -> DiffusionModel:
    """As a function of the user's own."""
    global given
    given = pipeline
    return load_diffusion(ModelConfig(source=f"{__name__}:return_given", **options), CPU)


given: Any = None


def return_given() -> Any:
    return given


READ: dict[Path, Any] = {}


def ready(folder: Path, **options: Any) -> DiffusionModel:
    """As `load`, with the folder read once for all tests."""
    if folder not in READ:
        READ[folder] = opened(folder)
    return of_pipeline(copy.deepcopy(READ[folder]), **options)


def step_once(model: DiffusionModel, rows: Any = None) -> None:
    """Move everything that is trained."""
    condition = None if rows is None else model.encode(rows)
    for _ in range(2):  # The second half of an adapter begins at 0 and hides the first.
        loss = model.denoiser(noise(1, *model.shape), torch.ones(1), condition).square().sum()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.trained:
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad.sign()


@pytest.mark.parametrize("name", ["plain", "dit", "text"])
def test_only_the_network_is_trained_and_saved(folders: dict[str, Path], name: str) -> None:
    model = ready(folders[name])
    inner = {id(p) for p in model.denoiser.parameters()}
    assert {id(p) for p in model.trained} == inner
    assert len(model.trained) < len(list(model.parameters())) or name == "plain"
    state = model.state_dict()
    assert all(key.startswith("denoiser.network.inner.") for key in state)
    fresh = ready(folders[name])
    step_once(model, {"dit": [{"label": 3}], "text": [{"prompt": "a"}]}.get(name))
    fresh.load_state_dict(model.state_dict())
    assert digest_of(fresh) == digest_of(model) != digest_of(ready(folders[name]))
    with pytest.raises(ValueError, match="does not fit"):
        fresh.load_state_dict({})


def test_nothing_is_dropped_at_random_while_training(folders: dict[str, Path]) -> None:
    """A DiT in training mode would drop one label in ten."""
    model, x = ready(folders["dit"]).train(), noise(1, 4, 8, 8).expand(64, -1, -1, -1)
    label = torch.full((64,), 5)
    found = model.denoiser(x, torch.ones(64), label)
    torch.testing.assert_close(found, found[:1].expand_as(found), rtol=1e-4, atol=1e-5)


def test_a_sample_depends_on_its_own_seed(folders: dict[str, Path]) -> None:
    model = ready(folders["dit"])
    condition: Any = model.encode([{"label": n} for n in (1, 2, 3)])
    options: dict[str, Any] = {"steps": 4, "scale": 2.0, "eta": 1.0}
    together = model.draw(condition, [5, 6, 7], **options)
    alone = model.draw(condition[1:2], [6], **options)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_network_through_images(folders: dict[str, Path]) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = ready(folders["text"], gradient_checkpointing=checkpointed)
        x0 = model.denoiser(noise(1, 4, 8, 8), torch.ones(1), model.encode([{"prompt": "a cat"}]))
        model.decode(x0).sum().backward()
        gradients.append([p.grad for p in model.trained if p.grad is not None])
        assert all(p.grad is None for p in model._decode.parameters())  # type: ignore[union-attr]
    assert gradients[0] and any(bool((g != 0).any()) for g in gradients[0])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_frozen_has_the_precision_asked_for(folders: dict[str, Path], dtype: Any) -> None:
    model = ready(folders["text"], dtype=dtype, lora_rank=2)
    assert {p.dtype for p in model.trained} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    assert frozen == {getattr(torch, dtype)}
    condition = model.encode([{"prompt": "a"}])
    images_of = model.decode(model.draw(condition, [1], steps=2, scale=2.0))
    assert images_of.dtype == torch.float32 and bool(images_of.isfinite().all())
    whole = ready(folders["plain"], dtype=dtype)
    reference = whole.frozen()
    assert {p.dtype for p in reference.parameters()} == {getattr(torch, dtype)}
    assert reference.denoiser.sigmas.dtype == torch.float64


# ---- references


def test_a_frozen_copy_stays_as_it_was(folders: dict[str, Path]) -> None:
    model = ready(folders["plain"])
    x, sigma = noise(2, 3, 8, 8), torch.tensor([0.5, 2.0])
    before = model.denoiser(x, sigma).detach()
    reference = model.frozen()
    step_once(model)
    torch.testing.assert_close(reference.denoiser(x, sigma), before)
    assert not torch.allclose(model.denoiser(x, sigma), before, atol=1e-2)
    assert reference.trained == [] and reference.device == model.device


@pytest.mark.parametrize("name", ["plain", "dit", "text"])
def test_a_reference_with_adapters_shares_the_weights(folders: dict[str, Path], name: str) -> None:
    rows = {"dit": [{"label": 3}], "text": [{"prompt": "a"}]}.get(name)
    base, model = ready(folders[name]), ready(folders[name], lora_rank=2)
    reference = model.frozen()
    condition = None if rows is None else model.encode(rows)
    told = (noise(1, *model.shape), torch.ones(1), condition)
    step_once(model, rows)
    torch.testing.assert_close(reference.denoiser(*told), base.denoiser(*told).detach())
    changed = model.denoiser(*told)
    assert not torch.allclose(changed, base.denoiser(*told), atol=1e-3) and changed.requires_grad
    assert reference.trained == [] and not reference.denoiser(*told).requires_grad
    shared = {id(p) for p in model.parameters()}
    assert {id(p) for p in reference.parameters()} == shared
    state = model.state_dict()
    assert state and all("lora" in key for key in state)
    assert {id(p) for p in model.trained} == {
        id(p) for key, p in model.named_parameters() if "lora" in key
    }


def test_adapters_are_on_attention_alone(folders: dict[str, Path]) -> None:
    model = ready(folders["text"], lora_rank=3, lora_alpha=6.0)
    places = {key.rsplit(".lora_", 1)[0].rsplit("attn", 1)[1][2:] for key in model.state_dict()}
    assert places == {"to_q", "to_k", "to_v", "to_out.0"}


def test_adapters_without_attention() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
        norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    with pytest.raises(UserError, match="no attention"):
        of_pipeline(diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()), lora_rank=2)


# ---- saving


@pytest.mark.parametrize(
    ("name", "rank"), [("flow", 0), ("plain", 2), ("dit", 2), ("text", 0), ("text", 2)]
)
@torch.no_grad()
def test_what_is_saved_opens_and_is_the_same(
    folders: dict[str, Path], tmp_path: Path, name: str, rank: int
) -> None:
    rows = {"dit": [{"label": 3}], "text": [{"prompt": "a cat"}]}.get(name)
    model = load(folders[name], lora_rank=rank)
    with torch.enable_grad():
        step_once(model, rows)
    (tmp_path / "model" / "left").mkdir(parents=True)
    assert save_diffusion(model, tmp_path / "model") == tmp_path / "model"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (tmp_path / "model" / "left").exists()
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]
    pipeline = opened(tmp_path / "model")
    assert type(pipeline) is type(opened(folders[name]))
    assert type(pipeline.scheduler) is type(model.pipeline.scheduler)
    again = load(tmp_path / "model")
    condition = None if rows is None else model.encode(rows)
    told = (noise(1, *model.shape), torch.ones(1), condition)
    torch.testing.assert_close(again.denoiser(*told), model.denoiser(*told), rtol=1e-4, atol=1e-4)
    # Saving leaves the model as it was: still in training, adapters in place.
    assert len(model.trained) == len(load(folders[name], lora_rank=rank).trained)
    if not rank:
        assert digest_of(again) == digest_of(model)


@torch.no_grad()
def test_adapters_alone_open_in_the_pipeline(folders: dict[str, Path], tmp_path: Path) -> None:
    model = load(folders["text"], lora_rank=2, lora_alpha=5.0)
    with torch.enable_grad():
        step_once(model, [{"prompt": "a cat"}])
    save_diffusion(model, tmp_path / "adapters", adapters_only=True)
    files = [path.name for path in (tmp_path / "adapters").iterdir()]
    assert files == ["pytorch_lora_weights.safetensors"]
    pipeline = opened(folders["text"])
    x, condition = noise(1, 4, 8, 8), model.encode([{"prompt": "a dog"}])
    before = pipeline.unet(x, 300, condition).sample
    pipeline.load_lora_weights(tmp_path / "adapters")
    after = pipeline.unet(x, 300, condition).sample
    ours = model.denoiser.network(x, torch.tensor([300.0]), condition)
    torch.testing.assert_close(ours, after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)
    with pytest.raises(UserError, match="adapters alone"):
        load(tmp_path / "adapters")


def test_adapters_alone_where_there_are_none(folders: dict[str, Path], tmp_path: Path) -> None:
    for model in (load(folders["plain"]), load(folders["dit"], lora_rank=2), own("mixture")):
        with pytest.raises(UserError, match="save the whole model"):
            save_diffusion(model, tmp_path / "model", adapters_only=True)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folders["plain"])
    save_diffusion(model, tmp_path / "model")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(type(model.pipeline), "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_diffusion(model, tmp_path / "model")
    assert digest_of(load(tmp_path / "model")) == digest_of(model)


# ---- sources that cannot be used


def test_folders_that_cannot_be_read(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)
    import shutil

    shutil.copytree(folders["plain"], tmp_path / "pickled")
    weights = tmp_path / "pickled" / "unet"
    torch.save(opened(folders["plain"]).unet.state_dict(), weights / "diffusion_pytorch_model.bin")
    (weights / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "pickled")
    for class_name in ("StableDiffusionXLPipeline", ["my_code", "MyPipeline"]):
        index = tmp_path / "pickled" / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": class_name}))
        with pytest.raises(UserError, match="only these are read"):
            load(tmp_path / "pickled")


def test_networks_that_ask_for_more() -> None:
    pipeline = seeded(images.tiny_unet, size=8)
    pipeline.unet.register_to_config(class_embed_type="timestep")
    with pytest.raises(UserError, match="class_embed_type"):
        of_pipeline(pipeline)
    pipeline = seeded(images.tiny_unet, size=8)
    pipeline.unet.register_to_config(in_channels=7)
    with pytest.raises(UserError, match="7 channels"):
        of_pipeline(pipeline)


# ---- models of the user's own


def own(name: str, **kwargs: Any) -> DiffusionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ModelConfig(source=f"esscher.images:{name}", kwargs=kwargs)
        return load_diffusion(config, CPU)


def halved(x: torch.Tensor, sigma: torch.Tensor, condition: Any = None) -> torch.Tensor:
    """The exact denoiser of N(0, 1) at level 1."""
    return x / (1 + sigma.view(-1, 1) ** 2)


halved.shape = (3,)  # type: ignore[attr-defined]


def test_a_denoiser_of_ones_own() -> None:
    model = load_diffusion(ModelConfig(source=f"{__name__}:give_halved"), CPU)
    levels = model.levels(10)
    assert (len(levels), levels[0], levels[-1]) == (11, 80, 0)
    assert levels[-2] == pytest.approx(0.002)
    found = model.draw(None, list(range(2_000)), steps=40, solver="heun")
    assert found.shape == (2_000, 3) and found.std().item() == pytest.approx(1, abs=0.04)
    assert model.levels(1).tolist() == [80, 0]
    with pytest.raises(UserError, match="steps"):
        model.levels(0)


def give_halved() -> Any:
    return halved


@pytest.mark.parametrize("options", [{"lora_rank": 2}, {"gradient_checkpointing": True}])
def test_what_a_module_of_ones_own_has_to_do_itself(options: Any) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        load_diffusion(ModelConfig(source="esscher.images:mixture", **options), CPU)


def test_what_is_no_model() -> None:
    with pytest.raises(UserError, match="must return"):
        of_pipeline(3)


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.usefixtures("unchecked")
@torch.no_grad()
def test_compiled_it_draws_the_same(final: bool) -> None:
    """And what is learned afterwards shows, where the weights were not said to be final."""
    model, compiled = own("mixture"), own("mixture").compiled(final=final)
    for change in (0.1,) if final else (0.1, 0.5):
        for each in (model, compiled):
            each.denoiser.network[-1].bias += change
        found, expected = (each.draw(None, [1, 2, 3], steps=5) for each in (compiled, model))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_mixture_knows_its_classes_before_training(tmp_path: Path) -> None:
    """Means on a circle of radius 1, std 0.1: 500 draws of class 2 of 8 lie around (0, 1)."""
    model = own("mixture", classes=True)
    label = model.encode([{"label": 2}] * 500)
    drawn_ = model.draw(label, list(range(500)), steps=25, solver="dpmpp_2m")
    torch.testing.assert_close(drawn_.mean(0), torch.tensor([0.0, 1.0]), rtol=0, atol=0.025)
    assert drawn_.std(0).tolist() == pytest.approx([0.1, 0.1], abs=0.012)
    with pytest.raises(UserError, match="label"):
        model.encode([{"label": 8}])
    everything = model.draw(model.encode([{"label": -1}] * 800), list(range(800)), steps=25)
    assert everything.norm(dim=-1).mean().item() == pytest.approx(1.0, abs=0.03)
    assert everything.mean(0).norm().item() < 0.1
    step_once(model, [{"label": 1}])
    fresh = own("mixture", classes=True)
    fresh.load_state_dict(model.state_dict())
    assert digest_of(fresh) == digest_of(model)
    save_diffusion(model, tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]
    from safetensors.torch import load_file

    module = own("mixture", classes=True).denoiser
    asked = (torch.full((1, 2), 0.3), torch.ones(1), torch.tensor([1]))
    assert not torch.equal(module(*asked), model.denoiser(*asked))
    module.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    assert torch.equal(module(*asked), model.denoiser(*asked))
