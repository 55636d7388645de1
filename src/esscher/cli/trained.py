"""What was trained, put to use: esscher eval, esscher sample, esscher export."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from esscher.cli.options import counted, parse, positional, world_of
from esscher.errors import UserError, require


@dataclass
class EvalOptions:
    episodes: int = 10
    """Episodes to run."""
    seed: int = 1
    """Of the episodes' starts."""
    step: int | None = None
    """Checkpoint to judge; by default the newest."""
    env: str | None = None
    """Another environment of the same spaces."""
    stochastic: bool = False
    """Sample actions instead of taking the mode."""
    descriptor: tuple[float, ...] | None = None
    """Of runs that fill an archive: the elite nearest to this behaviour, instead of the best one."""
    asked: bool = False
    """With --descriptor: the actor that is asked for it, instead of the elite."""
    json: bool = False
    """Print one JSON object, for scripts."""


def evaluate_run(arguments: list[str]) -> int:
    """Evaluate the policy of a run: esscher eval RUN."""
    folder = Path(positional(arguments, "esscher eval RUN [options]", "RUN"))
    there = (folder / "config.json").exists()  # --help is answered without a run.
    if there and _world_of_run(folder) != "control":
        return _eval_model(folder, arguments)
    options = parse(EvalOptions, arguments, "esscher eval RUN")
    from esscher.experiment import EvaluationConfig
    from esscher.runtime.evaluate import Evaluator, achieved_by
    from esscher.runtime.load import load

    loaded = load(folder, step=options.step)
    policy = _policy_of(loaded, options)
    stage = loaded.experiment.stages[-1]
    env = stage.env if options.env is None else replace(stage.env, id=options.env)
    task = replace(loaded.experiment, stages=(replace(stage, env=env),)).task
    config = EvaluationConfig(episodes=options.episodes, deterministic=not options.stochastic)
    evaluator, wanted = Evaluator(task, config, options.seed), loaded.policy.spec
    for name in ("obs_shape", "action_shape", "num_actions"):
        here, there = getattr(wanted, name), getattr(evaluator.spec, name)
        if here != there:
            raise UserError(f"{folder} cannot act in {env.id}: {name} is {there}, needs {here}")
    evaluation = evaluator(policy.policy)
    told: dict[str, Any] = evaluation.to_json()
    asked = evaluation.extras.get("evaluations_per_action")
    if asked is not None:
        told["milliseconds_per_step"] = evaluator.milliseconds
    if options.descriptor is not None:
        told["descriptor_mean"] = achieved_by(policy.policy, task, config, options.seed)
    if options.json:
        print(json.dumps(told))
    else:
        low, high = min(evaluation.returns), max(evaluation.returns)
        print(
            f"{loaded.experiment.name} on {env.id}, checkpoint of step {loaded.step:,}: return "
            f"{evaluation.mean:,.1f} +- {evaluation.std:,.1f} over "
            f"{counted(options.episodes, 'episode')} "
            f"({low:,.1f} to {high:,.1f})"
        )
        if "success" in evaluation.extras:
            rate, least, most = (
                evaluation.extras[f"success{end}"] for end in ("", ", low", ", high")
            )
            print(f"success {rate:.3g} ({least:.3g} to {most:.3g})")
        if asked is not None:
            print(
                f"{asked:,.3g} network evaluations an action; "
                f"{evaluator.milliseconds:,.3g} ms a step for all episodes together (--episodes 1: "
                "for one)"
            )
        if options.descriptor is not None:
            found = ", ".join(f"{x:.3g}" for x in told["descriptor_mean"])
            print(f"descriptor: {found} on average")
    return 0


@dataclass
class EvalModelOptions:
    episodes: int = 32
    """Rows or populations to judge, of those held out; of a diffusion model, samples to draw; of a
    robot, episodes of each task."""
    step: int | None = None
    """Checkpoint to judge; by default the newest."""
    stochastic: bool = False
    """Where completions are rewarded: sample them instead of taking the likeliest tokens."""
    tasks: tuple[str, ...] = ()
    """Of a robot: other tasks to judge it in; by default those of its run."""
    json: bool = False
    """Print one JSON object, samples included, for scripts."""


def _eval_model(folder: Path, arguments: list[str]) -> int:
    options = parse(EvalModelOptions, arguments, "esscher eval RUN")
    from esscher.experiment import EvaluationConfig
    from esscher.runtime.load import evaluate_model

    config = EvaluationConfig(episodes=options.episodes, deterministic=not options.stochastic)
    if options.tasks and _world_of_run(folder) != "robots":
        raise UserError(f"--tasks says where robots are judged, and {folder} trained none")
    loaded, evaluation = evaluate_model(folder, config, step=options.step, tasks=options.tasks)
    if options.json:
        told = evaluation.to_json() | {"samples": evaluation.samples}
        if evaluation.milliseconds is not None:
            told["milliseconds_per_chunk"] = evaluation.milliseconds
        print(json.dumps(told))
        return 0
    print(
        f"{loaded.experiment.name} on {loaded.experiment.subject}, checkpoint of step "
        f"{loaded.step:,}: {evaluation.measure} {evaluation.told_with_spread} over "
        + _judged(folder, evaluation, options.episodes)
    )
    for name, value in evaluation.extras.items():
        low, high = (evaluation.extras.get(f"{name}, {end}") for end in ("low", "high"))
        if low is not None:
            print(f"  {name}: {value:,.3g} ({low:,.3g} to {high:,.3g})")
        elif not name.endswith((", low", ", high")):
            print(f"  {name.removesuffix('_mean').replace('_', ' ')}: {value:,.4g}")
    if evaluation.milliseconds is not None:
        print(
            f"  {evaluation.milliseconds:,.4g} ms a chunk of actions, for all episodes side by side "
            "(--episodes 1: for one)"
        )
    return 0


def _judged(folder: Path, evaluation: Any, episodes: int) -> str:
    """What an evaluation is over."""
    world = _world_of_run(folder)
    if world == "diffusion":  # A set of samples may be worth one number.
        return counted(episodes, "sample")
    noun = {"sets": "population", "robots": "episode"}.get(world, "row")
    return counted(len(evaluation.returns), noun)


def _sample_options() -> type:
    from esscher.samplers.decoding import Decoding

    @dataclass
    class SampleOptions:
        prompt: tuple[str, ...] = ()
        """What to go on from, or what to draw; several at once."""
        label: tuple[int, ...] = ()
        """What to draw, of diffusion models that draw by a class."""
        chat: bool = False
        """Ask as a user in the tokenizer's chat template."""
        count: int | None = None
        """Completions or samples of each prompt or label, by default 1; of a diffusion model without
        either, of the run's own rows in turn, by default 16; of each population, by default as many as
        it has."""
        seed: int = 0
        """Decides every draw."""
        out: Path | None = None
        """Of a diffusion model, a new folder for PNG images or samples.npy, by default drawn/ in the
        run folder; of populations, a new FILE.npz, by default drawn.npz there."""
        compile: bool = False
        """Of a diffusion model, compile its network first: half a minute or more, and then a quarter
        to a half less time."""
        precision: Literal["float32", "bfloat16"] = "float32"
        """Of a diffusion model's matrix products; bfloat16 pays on processors with instructions for
        it."""
        data: str | None = None
        """Of populations: sets to embed and to draw again, in the form of the run's data; by default
        the run's own."""
        decoding: Decoding = field(default_factory=Decoding)
        step: int | None = None
        """Checkpoint; by default the newest."""
        json: bool = False
        """Print JSON objects, one a line."""

    return SampleOptions


def sample_run(arguments: list[str]) -> int:
    """Let the model of a run write or draw: esscher sample RUN [--prompt TEXT | --label N]."""
    usage = "esscher sample RUN [--prompt TEXT | --label N] [options]"
    folder = Path(positional(arguments, usage, "RUN"))
    options = parse(_sample_options(), arguments, "esscher sample RUN")
    if options.count is not None:
        require("--count", options.count, options.count >= 1, ">= 1")
    world = _world_of_run(folder)
    if world == "diffusion":
        return _draw(folder, options)
    if world == "sets":
        return _draw_populations(folder, options)
    if world != "language":
        what = "a controller" if world == "control" else "a robot's policy"
        raise UserError(f"{folder} trained {what}: esscher eval {folder} plays episodes with it")
    from esscher.runtime.load import load

    count = options.count or 1
    prompts: list[Any] = list(options.prompt) * count
    if not prompts:
        raise UserError("sample needs something to go on from: --prompt TEXT")
    if options.chat:
        prompts = [[{"role": "user", "content": text}] for text in prompts]
    written = load(folder, step=options.step).policy.complete(
        prompts, seed=options.seed, decoding=options.decoding
    )
    for prompt, completion in zip(list(options.prompt) * count, written, strict=True):
        told = {"prompt": prompt, "completion": completion}
        print(json.dumps(told) if options.json else f"{prompt}{completion}\n")
    return 0


def _draw(folder: Path, options: Any) -> int:
    out = options.out or folder / "drawn"
    if out.exists():
        raise UserError(f"{out} exists: choose another --out")
    if options.prompt and options.label:
        raise UserError("--prompt and --label exclude each other: a model draws by one of them")
    import torch

    from esscher.report.pictures import write_samples
    from esscher.runtime.device import MISSING_COMPILER, compiler_available, warn_of_slow_bfloat16
    from esscher.runtime.load import load

    if options.compile and not compiler_available("cpu"):
        raise UserError(f"--compile: {MISSING_COMPILER}; install one, or leave --compile out")
    if options.precision == "bfloat16":
        warn_of_slow_bfloat16("--precision")
    asked: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    asked += [{"label": label} for label in options.label]
    rows = [row for row in asked for _ in range(options.count or 1)]
    painter = load(folder, step=options.step).policy
    if options.compile:
        painter.compiled()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
        drawn = painter.draw(rows or options.count or 16, seed=options.seed)
    write_samples(drawn, out)
    told = [
        f"{name.replace('_', ' ')} {float(said.double().mean()):.4g}"
        for name, said in painter.told.items()
    ]
    print(f"drawn: {out} ({', '.join([counted(len(drawn), 'sample'), *told])})")
    return 0


def _draw_populations(folder: Path, options: Any) -> int:
    """Samples of populations in a file, or of the run's own, each from its vector."""
    out = options.out or folder / "drawn.npz"
    if out.suffix != ".npz" or out.exists():
        raise UserError(f"--out must name a new FILE.npz, got {out}")
    if options.prompt or options.label:
        raise UserError("--prompt and --label are of models that draw by them: give --data FILE")
    from esscher.runtime.sets import redraw

    names = redraw(
        folder, out, data=options.data, count=options.count, seed=options.seed, step=options.step
    )
    print(f"drawn: {out} (sample, set_id: {counted(len(names), 'population')})")
    return 0


@dataclass
class ExportOptions:
    to: Literal["onnx", "transformers", "diffusers", "adapters"] | None = None
    """Format: onnx, of controllers; transformers and diffusers, of language and diffusion models, with
    adapters merged in; adapters, of a diffusion model with some, for load_lora_weights of its base. By
    default whichever fits the run."""
    out: Path | None = None
    """File or folder; by default policy.onnx or exported/ in the run folder."""
    step: int | None = None
    """Checkpoint; by default the newest."""
    descriptor: tuple[float, ...] | None = None
    """Of runs that fill an archive: the elite nearest to this behaviour, instead of the best one."""
    asked: bool = False
    """With --descriptor: the actor that is asked for it, instead of the elite."""


def export_run(arguments: list[str]) -> int:
    """Hand a trained policy on: esscher export RUN --to onnx|transformers|diffusers|adapters."""
    usage = "esscher export RUN --to onnx|transformers|diffusers|adapters"
    folder = Path(positional(arguments, usage, "RUN"))
    options = parse(ExportOptions, arguments, "esscher export RUN")
    from esscher.runtime.load import load

    world = _world_of_run(folder)
    if world == "robots":
        raise UserError(
            f"{folder} trained a robot's policy: esscher.load({str(folder)!r}).policy acts, and "
            f"{folder}/model holds what it sees with"
        )
    if world == "sets":
        raise UserError(
            f"{folder} embeds populations: {folder}/embeddings.csv lists their vectors, and "
            f"esscher.load({str(folder)!r}).policy embeds others"
        )
    kind, fitting = {
        "control": ("controller", "onnx"),
        "language": ("language model", "transformers"),
        "diffusion": ("diffusion model", "diffusers"),
    }[world]
    adapters_only = options.to == "adapters" and world == "diffusion"
    if options.to not in (None, fitting) and not adapters_only:
        raise UserError(f"{folder} trained a {kind}: --to {fitting}")
    if world != "control":
        out = options.out or folder / "exported"
        if out.exists():
            raise UserError(f"{out} exists: choose another --out")
        policy = load(folder, step=options.step).policy
        if world == "language":
            from esscher.adapters.models import save_model

            save_model(policy.policy, policy.tokenizer, out, merged=True)
            print(f"exported: {out} (AutoModelForCausalLM.from_pretrained opens it)")
            return 0
        from esscher.adapters.diffusers import save_diffusion

        save_diffusion(policy.model, out, adapters_only=adapters_only)
        opener = "DiffusionPipeline.from_pretrained opens it"
        if policy.model.pipeline is None:
            opener = "load_state_dict of your module takes model.safetensors"
        elif adapters_only:
            opener = "load_lora_weights of the pipeline that it was trained from takes it"
        print(f"exported: {out} ({opener})")
        return 0
    out = options.out or folder / "policy.onnx"
    try:
        _policy_of(load(folder, step=options.step), options).to_onnx(out)
    except ImportError:
        raise UserError('export to onnx needs: pip install "esscher[export]"') from None
    print(f"exported: {out} (obs float32 [batch, features] -> action)")
    return 0


def _world_of_run(folder: Path) -> str:
    from esscher.runtime.run import read_experiment

    return world_of(read_experiment(folder).slug)


def _policy_of(loaded: Any, options: Any) -> Any:
    """The run's policy, or the one for the behaviour that was asked for."""
    if options.asked and options.descriptor is None:
        raise UserError("--asked needs --descriptor: what the actor is asked for")
    if options.descriptor is None:
        return loaded.policy
    return loaded.policy_for(options.descriptor, asked=options.asked)
