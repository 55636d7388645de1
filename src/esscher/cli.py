"""The command: a thin table of verbs. Nothing heavy is imported before the verb needs it.

Exit status: 0 done; 1 a defect (with its traceback); 2 bad input (one sentence); 3 a proof that was
not reproduced; 4 a sweep or comparison with failed runs; 130 interrupted, and saved.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from esscher import __version__
from esscher.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from esscher.experiment import Experiment

NOT_REPRODUCED, FAILED_RUNS, INTERRUPTED = 3, 4, 130
WIDE_LIST = 120
"""Columns of a terminal from which the catalogue has a column for everything."""


def main() -> None:
    """Entry point of `esscher`."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: Sequence[str]) -> int:
    """Run one command line; the exit status."""
    status, said = _ended(arguments)
    # One of several processes tells the one that started them, which says once what all have to say.
    if "ESSCHER_STATUS_FOLDER" in os.environ:
        from esscher.runtime.launch import leave_status

        leave_status(status, said)
    elif said:
        print(f"esscher: {said}", file=sys.stderr)
    return status


def _ended(arguments: Sequence[str]) -> tuple[int, str]:
    """Exit status, and what there is to complain of."""
    try:
        status = _dispatch(list(arguments))
        sys.stdout.flush()
        return status, ""
    except UserError as error:
        return 2, str(error)
    except KeyboardInterrupt:
        return INTERRUPTED, ""
    except BrokenPipeError:  # The reader (head, less) has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, ""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        _print_usage()
        return 0
    if arguments[0] == "--version":
        print(f"esscher {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise UserError(f"unknown command {verb!r}: {nearest(verb, VERBS)}")
    return VERBS[verb](rest) or 0


def _print_usage() -> None:
    print("usage: esscher COMMAND [options]      (esscher COMMAND --help tells more)\n")
    for verb, function in VERBS.items():
        print(f"  {verb:<8} {(function.__doc__ or '').strip().splitlines()[0]}")
    print(
        "\nStart with: esscher list, or: "
        "esscher run sac --env.id Pendulum-v1 --steps 5000 --method.warmup 500"
    )


def _list(arguments: list[str]) -> int:
    """The catalogue, searched by words if given: esscher list [WORD ...] [--family F]."""
    words = []
    while arguments and not arguments[0].startswith("-"):
        words.append(arguments.pop(0))
    options = _parse(ListOptions, arguments, "esscher list [WORD ...]")
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from esscher.registry import catalogue

    entries = list(catalogue().values())
    if options.family:
        families = {entry.family for entry in entries}
        if options.family not in families:
            hint = nearest(options.family, sorted(families))
            raise UserError(f"unknown family {options.family!r}: {hint}")
        entries = [entry for entry in entries if entry.family == options.family]
    if words:
        scores = {entry.slug: _relevance(entry, words) for entry in entries}
        entries = sorted((e for e in entries if scores[e.slug] > 0), key=lambda e: -scores[e.slug])
        if not entries:
            raise UserError(f"no method matches {' '.join(words)!r}: esscher list shows all")
    for title, baseline in (("Methods", False), ("Baselines", True)):
        chosen = [entry for entry in entries if entry.baseline is baseline]
        if not chosen:
            continue
        console = _console()
        wide = console.width >= WIDE_LIST
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            leading=0 if wide else 1,
        )
        columns = ("name", "family", "what it is for", "paper", "claim")
        for column in columns if wide else ("name", "what it is for"):
            short = column in ("name", "family", "claim")
            table.add_column(column, no_wrap=short, overflow="fold")
        for entry in chosen:
            paper = f"{entry.paper['title']} ({entry.paper['year']})"
            status = "baseline" if baseline else _proof_status(entry.slug)
            if wide:
                table.add_row(entry.slug, entry.family, entry.paper["purpose"], paper, status)
                continue
            # Five columns would leave a dozen characters for a sentence each.
            about = Text(f"{entry.family}, {status}" if not baseline else entry.family, "dim")
            name = Text(entry.slug).append("\n").append(about)
            said = Text(entry.paper["purpose"]).append("\n").append(Text(paper, "dim"))
            table.add_row(name, said)
        console.print(table)
    return 0


def _show(arguments: list[str]) -> int:
    """The card of one method: claim, settings with their sources, recipes, measured proof."""
    slug = _positional(arguments, "esscher show SLUG", "SLUG")
    _parse(NoOptions, arguments, "esscher show SLUG")
    from rich.markdown import Markdown

    from esscher.report.card import method_card

    _console().print(Markdown(method_card(slug, proofs_folder())))
    return 0


def _run(arguments: list[str]) -> int:
    """Train a method on a task: esscher run SLUG[:RECIPE] [options]."""
    target = _positional(arguments, "esscher run SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = _experiment_options(
        target, list(arguments), f"esscher run {target}", RunExtras
    )
    from esscher.runtime.launch import launch_of, start
    from esscher.runtime.run import check_unused, run

    launch = launch_of(experiment)
    if launch is not None:  # What can be said before the processes start is said once, here.
        if options.directory is not None:
            check_unused(options.directory)
        experiment.resolved()
        return start(launch, ["run", target, *arguments])
    return _finish_run(lambda: run(experiment, directory=options.directory))


def _resume(arguments: list[str]) -> int:
    """Continue an interrupted run exactly: esscher resume RUN."""
    folder = Path(_positional(arguments, "esscher resume RUN [--step N]", "RUN"))
    options = _parse(StepOption, list(arguments), "esscher resume RUN")
    from esscher.runtime.launch import launch_of, start
    from esscher.runtime.run import read_experiment, read_result, resume

    launch = launch_of(read_experiment(folder))
    if launch is not None and (read_result(folder) is None or options.step is not None):
        return start(launch, ["resume", str(folder), *arguments])
    return _finish_run(lambda: resume(folder, step=options.step))


def _eval(arguments: list[str]) -> int:
    """Evaluate the policy of a run: esscher eval RUN."""
    folder = Path(_positional(arguments, "esscher eval RUN [options]", "RUN"))
    if _world_of_run(folder) != "control":
        return _eval_model(folder, arguments)
    options = _parse(EvalOptions, arguments, "esscher eval RUN")
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
            f"{_count(options.episodes, 'episode')} "
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


def _eval_model(folder: Path, arguments: list[str]) -> int:
    options = _parse(EvalModelOptions, arguments, "esscher eval RUN")
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
        f"{loaded.step:,}: {evaluation.measure} {evaluation.told} +- {evaluation.spread} over "
        f"{_count(len(evaluation.returns), _judged_by(folder))}"
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


def _judged_by(folder: Path) -> str:
    return {"sets": "population", "robots": "episode"}.get(_world_of_run(folder), "row")


def _sample(arguments: list[str]) -> int:
    """Let the model of a run write or draw: esscher sample RUN --prompt TEXT."""
    folder = Path(_positional(arguments, "esscher sample RUN --prompt TEXT", "RUN"))
    options = _parse(_sample_options(), arguments, "esscher sample RUN")
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
    from esscher.runtime.load import load

    asked: list[dict[str, Any]] = [{"prompt": text} for text in options.prompt]
    asked += [{"label": label} for label in options.label]
    rows = [row for row in asked for _ in range(options.count or 1)]
    painter = load(folder, step=options.step).policy
    if options.compile:
        painter.compiled()
    with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bfloat16"):
        drawn = painter.draw(rows or options.count or 16, seed=options.seed)
    write_samples(drawn, out)
    print(f"drawn: {out} ({_count(len(drawn), 'sample')})")
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
    print(f"drawn: {out} (sample, set_id: {_count(len(names), 'population')})")
    return 0


def _world_of_run(folder: Path) -> str:
    from esscher.runtime.run import read_experiment

    if not (folder / "config.json").exists():
        return "control"  # Whoever opens it will say so.
    return _world(read_experiment(folder).slug)


def _policy_of(loaded: Any, options: Any) -> Any:
    """The run's policy, or the one for the behaviour that was asked for."""
    if options.asked and options.descriptor is None:
        raise UserError("--asked needs --descriptor: what the actor is asked for")
    if options.descriptor is None:
        return loaded.policy
    return loaded.policy_for(options.descriptor, asked=options.asked)


def _prove(arguments: list[str]) -> int:
    """Try a paper's central claim in miniature, with its baselines, over seeds: esscher prove SLUG."""
    slug = _positional(arguments, "esscher prove SLUG [options]", "SLUG")
    options = _parse(ProveOptions, arguments, "esscher prove SLUG")
    from esscher.runtime.prove import prove

    record = prove(
        slug,
        out=options.out,
        work=options.work,
        seeds=options.seeds,
        first_seed=options.first_seed,
        workers=_workers(options.workers, 1),
        claims=options.claims,
    )
    print(f"{slug}: {record['verdict']} ({options.out / slug}.json)")
    return 0 if record["verdict"] == "reproduced" else NOT_REPRODUCED


def _sweep(arguments: list[str]) -> int:
    """Many runs of one method, over seeds and settings: esscher sweep SLUG[:RECIPE] --seeds 10."""
    target = _positional(arguments, "esscher sweep SLUG[:RECIPE] [options]", "SLUG")
    experiment, options = _experiment_options(
        target, arguments, f"esscher sweep {target}", SweepExtras
    )
    from esscher.runtime.sweep import grid, sweep

    experiments = grid(experiment, options.grid, _seeds(options.seeds, experiment.seed))
    root = options.directory or Path("runs") / f"sweep_{target.replace(':', '_')}"
    return _sweep_and_report(experiments, root, options, sweep)


def _compare(arguments: list[str]) -> int:
    """Which of these works on my problem? esscher compare SLUG SLUG ... [task options] --seeds 5."""
    slugs = []
    while arguments and not arguments[0].startswith("-"):
        slugs.append(arguments.pop(0))
    kinds = {
        "control": _compare_options,
        "language": _compare_writers_options,
        "diffusion": _compare_painters_options,
    }
    world = _world(slugs[0]) if slugs else "control"
    if world == "robots":
        raise UserError(
            f"{slugs[0]} is the only method for robots that see: esscher sweep {slugs[0]} --data "
            "FOLDER --grid method.head=masked,autoregressive,diffusion,regression compares its heads"
        )
    if world == "sets":
        raise UserError(
            f"{slugs[0]} is the only method about populations: esscher sweep {slugs[0]} --data FILE "
            "--grid method.encoder=residual,kernel_mean compares its encoders"
        )
    kind = kinds[world]()
    if world != "control":
        arguments = _in_full(arguments, {f.name: (f.type,) for f in dataclasses.fields(kind)})
    options = _parse(kind, arguments, "esscher compare SLUG SLUG ...")
    if not slugs:
        raise UserError("compare needs methods: esscher compare sac ppo --env.id Pendulum-v1")
    from esscher.experiment import Stage
    from esscher.runtime.sweep import comparison, sweep

    names = ("env", "model", "text", "image", "data", "steps")
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    footing = {}
    if not options.as_published:
        names = ("hidden", "updates_per_step", "batch_size")
        footing = {name: getattr(options, name) for name in names if hasattr(options, name)}
    experiments = comparison(
        slugs,
        stage=Stage(**given),
        seeds=_seeds(options.seeds, options.seed),
        **footing,
        evaluation=options.evaluation,
        runtime=options.runtime,
        log=options.log,
    )
    task = experiments[0].subject.replace("/", "_").replace(":", "_")
    root = options.directory or Path("runs") / f"compare_{task}"
    return _sweep_and_report(experiments, root, options, sweep)


def _report(arguments: list[str]) -> int:
    """One page from any runs: curves with intervals, ranking, settings: esscher report RUN ..."""
    runs = []
    while arguments and not arguments[0].startswith("-"):
        runs.append(Path(arguments.pop(0)))
    options = _parse(ReportOptions, arguments, "esscher report RUN ...")
    if not runs:
        raise UserError("report needs run folders: esscher report runs/Hopper-v5")
    from esscher.report.page import write_report

    try:
        page = write_report(runs, options.out, title=options.title, figures=options.figures)
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"report: {page}")
    return 0


def _export(arguments: list[str]) -> int:
    """Hand a trained policy to another tool: esscher export RUN --to onnx|transformers|diffusers."""
    usage = "esscher export RUN --to onnx|transformers|diffusers"
    folder = Path(_positional(arguments, usage, "RUN"))
    options = _parse(ExportOptions, arguments, "esscher export RUN")
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
    if options.to not in (None, fitting):
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

        save_diffusion(policy.model, out)
        print(f"exported: {out} (DiffusionPipeline.from_pretrained opens it)")
        return 0
    out = options.out or folder / "policy.onnx"
    try:
        _policy_of(load(folder, step=options.step), options).to_onnx(out)
    except ImportError:
        raise UserError('export to onnx needs: pip install "esscher[export]"') from None
    print(f"exported: {out} (obs float32 [batch, features] -> action)")
    return 0


def _data(arguments: list[str]) -> int:
    """Make, mix and look at sets of logged steps: esscher data collect|combine|show."""
    if arguments and arguments[0] in ("-h", "--help"):
        print("usage: esscher data WORD [options]      (esscher data WORD --help tells more)\n")
        for word, function in DATA_WORDS.items():
            print(f"  {word:<8} {(function.__doc__ or '').strip().splitlines()[0]}")
        return 0
    if not arguments:
        raise UserError(f"WORD is missing: esscher data {'|'.join(DATA_WORDS)}")
    word, rest = arguments[0], arguments[1:]
    if word not in DATA_WORDS:
        raise UserError(f"data knows no {word!r}: {nearest(word, DATA_WORDS)}")
    return DATA_WORDS[word](rest)


def _data_collect(arguments: list[str]) -> int:
    """Act with a run's policy, or a task's expert, and write it: esscher data collect RUN|TASK."""
    usage = "esscher data collect RUN --out NAME, or: esscher data collect TASK ... --out FOLDER"
    wants_help = arguments[:1] in (["-h"], ["--help"])  # The options are the same for every run.
    if arguments and ":" in arguments[0] and not Path(arguments[0]).exists():
        return _data_demonstrate(arguments)
    folder = Path("RUN" if wants_help else _positional(arguments, usage, "RUN"))
    options = _parse(_collect_options(), arguments, "esscher data collect RUN")
    if options.stochastic and options.deterministic:
        raise UserError("--stochastic and --deterministic exclude each other: leave out one")
    from esscher.runtime.collect import collect

    return _announce(
        lambda: collect(
            folder,
            options.out,
            policy=options.policy,
            episodes=options.episodes,
            step=options.step,
            stochastic=not options.deterministic,
            seed=options.seed,
            reference=options.reference,
            step_limit=options.step_limit,
        ),
        options.out,
    )


def _default_out(tasks: Sequence[str], seen: bool) -> str:
    """Where demonstrations go if nobody says so."""
    if not seen or len(tasks) > 1:
        kind = "a new folder" if seen else "the name of a new Minari set, such as reach/expert-v0"
        raise UserError(f"give --out, {kind}")
    return f"data/{tasks[0].rpartition(':')[2]}"


def _data_demonstrate(arguments: list[str]) -> int:
    """Let experts act: esscher data collect metaworld:TASK ... --images 64 --out FOLDER."""
    tasks = []
    while arguments and not arguments[0].startswith("-"):
        tasks.append(arguments.pop(0))
    options = _parse(_demonstration_options(), arguments, "esscher data collect TASK ...")
    if len(options.images) > 2:
        raise UserError(f"--images takes one number or rows and columns, got {options.images}")
    from esscher.runtime.demonstrate import Plan, demonstrate

    size = (options.images[0], options.images[-1]) if options.images else None
    plan = Plan(
        tasks=tuple(tasks),
        episodes=options.episodes,
        images=size,
        cameras=options.cameras,
        noise=options.noise,
        seed=options.seed,
        keep_failures=options.keep_failures,
        kwargs=options.kwargs,
    )
    try:
        written = demonstrate(plan, options.out or _default_out(tasks, bool(size)))
    except KeyboardInterrupt:
        print(
            "esscher: stopped; what was finished is kept, and the same command goes on",
            file=sys.stderr,
        )
        return INTERRUPTED
    episodes = len(written.lengths)
    data = written.path if size else f"minari:{written.name}"
    print(
        f"{written.name}: {_count(episodes, 'episode')}, {written.steps:,} steps, {written.solved} "
        f"solved their task; {_count(written.dropped, 'failed attempt')} dropped\ndata: {data}"
    )
    return 0


def _data_combine(arguments: list[str]) -> int:
    """Several sets of one task as one: esscher data combine NAME NAME ... --out NAME."""
    names = []
    while arguments and not arguments[0].startswith("-"):
        names.append(arguments.pop(0))
    options = _parse(CombineOptions, arguments, "esscher data combine NAME NAME ...")
    from esscher.runtime.collect import combine

    return _announce(lambda: combine(names, options.out, reference=options.reference), options.out)


def _data_show(arguments: list[str]) -> int:
    """Size, returns, lengths and ends, checked against a task if given: esscher data show SOURCE."""
    wants_help = arguments[:1] in (["-h"], ["--help"])
    usage = "esscher data show SOURCE [--env.id ID]"
    source = "" if wants_help else _positional(arguments, usage, "SOURCE")
    options = _parse(DataShowOptions, arguments, "esscher data show SOURCE")
    from rich import box
    from rich.table import Table

    from esscher.adapters.data import describe, load_dataset
    from esscher.adapters.lerobot import describe_scenes, is_lerobot, read_scenes

    if is_lerobot(source):
        scenes = read_scenes(source)
        table = Table(
            title=scenes.name, title_justify="left", box=box.SIMPLE_HEAD, show_header=False
        )
        for label, value in describe_scenes(scenes).items():
            table.add_row(label, value)
        _console().print(table)
        return 0

    spec = None
    if options.env.id is not None:
        from esscher.adapters.gymnasium import Environments
        from esscher.experiment import EnvConfig

        envs = Environments(EnvConfig(id=options.env.id, kwargs=options.env.kwargs), seed=0)
        spec = envs.spec
        envs.close()
    data = load_dataset(source, spec)
    table = Table(title=data.name, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    for label, value in describe(data).items():
        table.add_row(label, value)
    fits = "not checked (--env.id ID does)" if spec is None else f"fits {options.env.id}"
    table.add_row("task", fits)
    _console().print(table)
    return 0


DATA_WORDS: dict[str, Callable[[list[str]], int]] = {
    "collect": _data_collect,
    "combine": _data_combine,
    "show": _data_show,
}


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "list": _list,
    "show": _show,
    "run": _run,
    "resume": _resume,
    "eval": _eval,
    "sample": _sample,
    "prove": _prove,
    "sweep": _sweep,
    "compare": _compare,
    "report": _report,
    "export": _export,
    "data": _data,
}


# Options of the verbs. Plain dataclasses: tyro makes the flags and the help from them.


@dataclass
class NoOptions:
    pass


@dataclass
class ListOptions:
    family: str | None = None
    """Only this family."""


@dataclass
class StepOption:
    step: int | None = None
    """Checkpoint to start from; by default the newest."""


@dataclass
class RunExtras:
    directory: Path | None = None
    """Run folder, which must not exist yet; by default a fresh one under runs/."""


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


@dataclass
class ExportOptions:
    to: Literal["onnx", "transformers", "diffusers"] | None = None
    """Format: onnx, of controllers; transformers and diffusers, of language and diffusion models, with
    adapters merged in. By default whichever fits the run."""
    out: Path | None = None
    """File or folder; by default policy.onnx or exported/ in the run folder."""
    step: int | None = None
    """Checkpoint; by default the newest."""
    descriptor: tuple[float, ...] | None = None
    """Of runs that fill an archive: the elite nearest to this behaviour, instead of the best one."""
    asked: bool = False
    """With --descriptor: the actor that is asked for it, instead of the elite."""


@dataclass
class CombineOptions:
    out: str
    """Name of the new Minari set, such as hopper/medium-expert-v0."""
    reference: tuple[float, float] | None = None
    """Returns that count as 0 and as 100 in normalised scores; by default what the sets state."""


@dataclass
class DataTask:
    id: str | None = None
    """Task that the data must fit; by default they are shown as they are."""
    kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Passed to the environment."""


@dataclass
class DataShowOptions:
    env: DataTask = field(default_factory=DataTask)


@dataclass
class ReportOptions:
    out: Path = Path("report.html")
    """The page. Curves and rankings are written beside it as CSV, the curves as PNG too."""
    title: str | None = None
    """Heading of the page."""
    figures: bool = True
    """Write each figure as PNG, with its numbers as CSV, into a folder named after the page
    (report_figures), whose other PNG and CSV files are removed."""


@dataclass
class ProveOptions:
    out: Path = Path("proofs")
    """Where the record and the figure go."""
    work: Path | None = None
    """Keep the runs here (and resume them); by default they go to a temporary folder."""
    seeds: int | None = None
    """Seeds of each arm; by default what the proof asks for."""
    first_seed: int = 0
    """Where the seeds start: take another one to check a record with fresh seeds."""
    workers: int = 0
    """Runs at a time; 0: one a processor."""
    claims: tuple[str, ...] = ()
    """Only the claims with these names (nothing is then written to --out)."""


@dataclass
class SweepExtras:
    seeds: int = 5
    """Number of seeds, counted from --seed."""
    grid: tuple[str, ...] = ()
    """Settings to combine: --grid method.tau=0.005,0.01 method.discount=0.98,0.99."""
    directory: Path | None = None
    """Folder of the runs; the same command again resumes what is unfinished."""
    engine: Literal["ray", "processes"] = "ray"
    """Ray (this machine or a cluster), or plain processes of this machine."""
    address: str | None = None
    """Of a Ray cluster; by default one is started on this machine."""
    workers: int = 0
    """Runs at a time; 0: processors divided by threads a run."""
    retries: int = 1
    """How often a failed run is resumed."""


def _demonstration_options() -> type:
    from tyro.conf import FlagCreatePairsOff

    @dataclass
    class DemonstrationOptions:
        out: str = ""
        """With --images a new folder, in the layout of LeRobot, by default data/TASK of one task; else
        the name of a new Minari set, such as reach/expert-v0. The same command goes on where it was
        stopped."""
        episodes: int = 50
        """Of each task."""
        images: tuple[int, ...] = ()
        """Size of the images, or rows and columns; without it only states are collected, and then those
        of the objects and the goal as well."""
        cameras: tuple[str, ...] = ()
        """Which, by default the task's own."""
        noise: float = 0.0
        """Standard deviation of what is added to the expert's actions, in a box of [-1, 1]; the set
        holds the expert's own actions."""
        seed: int = 1
        """Of the episodes' starts and of the noise."""
        keep_failures: FlagCreatePairsOff[bool] = False
        """Keep episodes that did not solve the task as well."""
        kwargs: dict[str, int | float | bool | str] = field(default_factory=dict)
        """Passed to the tasks: --kwargs max_steps 150."""

    return DemonstrationOptions


def _collect_options() -> type:
    from tyro.conf import FlagCreatePairsOff

    @dataclass
    class CollectOptions:
        out: str
        """Name of the Minari set to write, such as hopper/medium-v0; it must not exist yet."""
        policy: Literal["agent", "random", "replay"] = "agent"
        """agent: the run's policy; random: uniform actions; replay: the steps that the run's replay
        holds."""
        episodes: int | None = None
        """Episodes to run, 100 by default; a replay is written whole."""
        step: int | None = None
        """Checkpoint to read, by default the newest; an earlier one is a weaker policy."""
        stochastic: FlagCreatePairsOff[bool] = False
        """Sample the agent's actions, as is done unless --deterministic is given."""
        deterministic: FlagCreatePairsOff[bool] = False
        """Take the mode of the agent's policy instead."""
        seed: int = 1
        """Of the episodes' starts and of all sampling."""
        reference: tuple[float, float] | None = None
        """Returns that count as 0 and as 100 in normalised scores."""
        step_limit: int = 10_000
        """Steps after which an episode is cut in a task that has no limit of its own."""

    return CollectOptions


@dataclass(kw_only=True)
class ManyRuns:
    """What all comparisons share."""

    seeds: int = 3
    """Number of seeds, counted from --seed."""
    seed: int = 0
    """First seed."""
    as_published: bool = False
    """Keep each method's own settings where they are made equal otherwise."""
    directory: Path | None = None
    """Folder of the runs; the same command again resumes what is unfinished."""
    engine: Literal["processes", "ray"] = "processes"
    """Plain processes of this machine, or Ray."""
    address: str | None = None
    """Of a Ray cluster."""
    workers: int = 0
    """Runs at a time; 0: processors divided by threads a run."""
    retries: int = 1
    """How often a failed run is resumed."""


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
        """Of a diffusion model, compile its network first: half a minute or more, and then a sixth
        to a quarter less time."""
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


def _compare_options() -> type:
    from esscher.experiment import EnvConfig, EvaluationConfig, LogConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        env: EnvConfig = field(default_factory=EnvConfig)
        """The task."""
        data: str | None = None
        """Logged steps for the methods among them that read any."""
        steps: int = 100_000
        """Environment steps of each run; updates, where a method learns from data alone."""
        hidden: tuple[int, ...] = (256, 256)
        """Hidden layers of every network of every method."""
        updates_per_step: float = 1.0
        """Updates per environment step of every off-policy method."""
        evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=LogConfig)

    return CompareOptions


def _compare_writers_options() -> type:
    from esscher.experiment import EvaluationConfig, LogConfig, ModelConfig, TextConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        model: ModelConfig = field(default_factory=ModelConfig)
        """What every method begins with."""
        text: TextConfig = field(default_factory=TextConfig)
        data: str | None = None
        """Rows of text."""
        steps: int = 1_000
        """Updates, or iterations of writing and learning."""
        batch_size: int = 32
        """Rows an update of every method."""
        evaluation: EvaluationConfig = field(
            default_factory=lambda: EvaluationConfig(every=100, episodes=32)
        )
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=lambda: LogConfig(every=10))

    return CompareOptions


def _compare_painters_options() -> type:
    from esscher.experiment import EvaluationConfig, ImageConfig, LogConfig, ModelConfig
    from esscher.runtime.device import RuntimeConfig

    @dataclass(kw_only=True)
    class CompareOptions(ManyRuns):
        model: ModelConfig = field(default_factory=ModelConfig)
        """What every method begins with."""
        image: ImageConfig = field(default_factory=ImageConfig)
        data: str | None = None
        """Rows to draw."""
        steps: int = 100
        """Iterations of drawing and learning."""
        batch_size: int = 32
        """Rows an iteration of every method."""
        evaluation: EvaluationConfig = field(
            default_factory=lambda: EvaluationConfig(every=10, episodes=32)
        )
        runtime: RuntimeConfig = field(default_factory=lambda: RuntimeConfig(threads=1))
        log: LogConfig = field(default_factory=lambda: LogConfig(every=1))

    return CompareOptions


STAGE_PARTS = {
    "control": ("env",),
    "language": ("model", "text"),
    "diffusion": ("model", "image"),
    "sets": ("sets",),
    "robots": ("model", "robot"),
}
DATA_HELP = {
    "control": "Logged steps to learn from: minari:NAME, FILE.hdf5 (D4RL), FOLDER of .npz, or "
    "module:function.",
    "language": "Rows of text: FILE.jsonl, FILE.parquet, a FOLDER saved by datasets, a Hugging Face "
    "name, or module:function.",
    "diffusion": "Rows with a prompt or label each to draw: FILE.jsonl, FILE.parquet, a FOLDER saved "
    "by datasets, a Hugging Face name or module:function; real samples, where a method learns from "
    "those: besides, a FOLDER of images or FILE.npz.",
    "sets": "Samples of populations, a row each, with a column set_id: FILE.parquet, FILE.csv, "
    "FILE.npz, a FOLDER saved by datasets or of images, or module:function (see docs/data.md).",
    "robots": "Demonstrations with images: a FOLDER in LeRobot's layout, or module:function.",
}
STEPS_HELP = {
    "control": "Environment steps, counted over all parallel copies.",
    "language": "Updates, or iterations of writing and learning.",
    "diffusion": "Updates, or iterations of drawing and learning.",
    "sets": "Updates.",
    "robots": "Updates.",
}


def _world(slug: str) -> str:
    from esscher.registry import load_method

    return load_method(slug).world


def _experiment_options(
    target: str, arguments: list[str], program: str, extras: type
) -> tuple["Experiment", Any]:
    """Flags for every field of an experiment, with the recipe's values as defaults."""
    from esscher.experiment import Experiment, Stage
    from esscher.registry import load_method, load_module, recipes

    slug, _, recipe = target.partition(":")
    module = load_module(slug)
    if recipe:
        known = recipes(slug)
        if recipe not in known:
            raise UserError(f"{slug} has no recipe {recipe!r}: {nearest(recipe, known)}")
        default = known[recipe]()
    else:
        default = Experiment.of(module.Config())
    stage = default.stages[-1]
    world = load_method(slug).world
    parts = STAGE_PARTS[world]
    values = {
        **{part: (type(getattr(stage, part)), getattr(stage, part)) for part in parts},
        "data": (str | None, stage.data),
        "steps": (int, stage.steps),
        "seed": (int, default.seed),
        "method": (module.Config, default.method),
        **{
            name: (type(getattr(default, name)), getattr(default, name))
            for name in ("evaluation", "checkpoint", "runtime", "log")
        },
        "label": (str | None, default.label),
    }
    helps = {
        "data": DATA_HELP[world],
        "steps": STEPS_HELP[world],
        "seed": "Decides every random number of the run.",
        "label": "Name in reports, for telling variants apart.",
    }
    import tyro

    fields = [
        (
            name,
            Annotated[kind, tyro.conf.arg(help=helps[name])] if name in helps else kind,
            field(default_factory=lambda value=value: value),
        )
        for name, (kind, value) in values.items()
    ]
    options_type = dataclasses.make_dataclass("Options", fields, bases=(extras,), kw_only=True)
    options_type.__doc__ = module.PAPER.title + ". " + module.PAPER.purpose
    options = _parse(options_type, _in_full(arguments, values), program)
    given = {part: getattr(options, part) for part in parts}
    experiment = Experiment(
        method=options.method,
        stages=(
            *default.stages[:-1],
            Stage(**given, data=options.data, steps=options.steps),
        ),
        seed=options.seed,
        evaluation=options.evaluation,
        checkpoint=options.checkpoint,
        runtime=options.runtime,
        log=options.log,
        label=options.label,
    )
    return experiment, options


def _in_full(arguments: list[str], values: dict[str, Any]) -> list[str]:
    """Short options as long ones: --model X is --model.source X, --beta is --method.beta."""
    groups = {
        name: {f.name for f in dataclasses.fields(values[name][0])}
        for name in ("method", "text", "image", "sets", "robot", "model")
        if name in values
    }
    full = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag[2:].replace("-", "_")
        owners = [group for group, names in groups.items() if name in names]
        if flag == "--model" and "model" in groups:
            flag = "--model.source"
        elif (
            flag.startswith("--")
            and name not in values
            and name != "directory"
            and len(owners) == 1
        ):
            flag = f"--{owners[0]}.{flag[2:]}"
        full.append(flag + equals + value)
    return full


def _parse(options: Any, arguments: list[str], program: str) -> Any:
    import tyro

    return tyro.cli(options, args=arguments, prog=program)


def _positional(arguments: list[str], usage: str, name: str) -> str:
    if arguments and not arguments[0].startswith("-"):
        return arguments.pop(0)
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}\n\n(options depend on {name}: give it before --help)")
        sys.exit(0)
    raise UserError(f"{name} is missing: {usage}")


def _announce(write: Callable[[], Any], name: str) -> int:
    try:
        written = write()
    except KeyboardInterrupt:
        print(f"esscher: stopped; nothing was written under {name}", file=sys.stderr)
        return INTERRUPTED
    from statistics import fmean, pstdev

    returns = written.returns
    print(
        f"{written.name}: {_count(len(returns), 'episode')}, {written.steps:,} steps, return "
        f"{fmean(returns):,.1f} +- {pstdev(returns):,.1f} ({min(returns):,.1f} to "
        f"{max(returns):,.1f})\nset: {written.path}\ndata: minari:{written.name}"
    )
    return 0


def _finish_run(start: Callable[[], Any]) -> int:
    from esscher.runtime.device import process_rank
    from esscher.runtime.run import Interrupted

    try:
        result = start()
    except Interrupted as stopped:
        if process_rank()[0] == 0:
            print(f"esscher: {stopped}", file=sys.stderr)
        return INTERRUPTED
    from esscher.report.page import write_report

    if process_rank()[0] > 0:
        return 0
    page = write_report([result.directory], result.directory / "report.html")
    evaluation = result.evaluation
    model = result.directory / "model"
    print(
        f"{result.slug}: {evaluation.measure} {evaluation.told} +- {evaluation.spread} after "
        f"{result.steps:,} steps and {result.seconds:,.0f} s\nrun: {result.directory}"
        + (f"\nmodel: {model}" if model.exists() else "")
        + f"\nreport: {page}"
    )
    return 0


def _sweep_and_report(
    experiments: list["Experiment"], root: Path, options: Any, start: Callable[..., Any]
) -> int:
    from esscher.report.page import write_report

    threads = experiments[0].runtime.threads or 1
    outcomes = start(
        experiments,
        root,
        workers=_workers(options.workers, threads),
        engine=options.engine,
        address=options.address,
        retries=options.retries,
    )
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        print(f"failed: {outcome.folder}: {outcome.error}", file=sys.stderr)
    if len(failed) < len(outcomes):
        page = write_report([root], root / "report.html")
        print(f"report: {page}")
    return FAILED_RUNS if failed else 0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _workers(asked: int, threads: int) -> int:
    from esscher.runtime.device import available_processors

    return asked or max(1, available_processors() // threads)


def _seeds(count: int, first: int) -> range:
    if count < 1:
        raise UserError(f"--seeds must be >= 1, got {count}")
    return range(first, first + count)


def proofs_folder() -> Path:
    """Where proof records are looked for: here, or in the checkout that this package lies in."""
    here, checkout = Path("proofs"), Path(__file__).parents[2] / "proofs"
    return here if here.is_dir() else checkout


def _proof_status(slug: str) -> str:
    path = proofs_folder() / f"{slug}.json"
    if not path.exists():
        return "not tried"
    from esscher.files import read_record

    return str(read_record(path)["verdict"])


def _relevance(entry: Any, words: Sequence[str]) -> int:
    """Words found in the name count most, then purpose, title and claim."""
    weights = {"purpose": 3, "title": 2, "claim": 1}
    score = 0
    for word in (word.lower() for word in words):
        found = 5 * (word in entry.slug) + 3 * (word in entry.family)
        found += sum(w for name, w in weights.items() if word in str(entry.paper[name]).lower())
        if not found:
            return 0
        score += found
    return score


def _console() -> "Console":
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # Its own way ends the process with status 1.

    return Plain()


if __name__ == "__main__":
    main()
