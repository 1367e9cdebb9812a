"""Does `--stop-when-overfit` stop in time? python benchmarks/stopping.py

Learns one subject of the benchmark with Infusion, with a full fine-tune and with a LoRA at rates that overfit, looks every so often without
stopping, and has the judge read how often the photos' background and place come back at each look, beside the base's own rate.
Writes stopping.json: what the looks say, where training would have been stopped and what kept by them, and what is true.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from infusion.base import load_base
from infusion.bench.figures import leak
from infusion.bench.grid import jobs, load_grid
from infusion.bench.subjects import case, requests
from infusion.bench.trial import Words, measure
from infusion.judged import photo_embedding, stacked
from infusion.lesson import prepare_lesson
from infusion.methods import METHODS
from infusion.steering import SteerConfig, steered
from infusion.world.judge import load_judge

# Infusion at all timesteps, as published: below its default limit nothing is pulled.
SETTINGS = {
    "infusion": {"learning_rate": 0.02, "max_timestep": 1000},
    "dreambooth": {"learning_rate": 1e-3},
    "dreambooth-lora": {"learning_rate": 3e-3},
}


def watched(name: str, number: int, steps: int, every: int) -> dict:
    """One method's looks, each with the true leaks of the state that it looked at."""
    pipe, judge = load_base(device="cpu"), load_judge()
    grid = {"subjects": number + 1, "points": [steps], "methods": {name: SETTINGS[name]}}
    job = jobs(load_grid(None, grid))[number]
    chosen = case(job.split, job.subjects_seed, number, **job.modality)
    lesson = prepare_lesson(pipe, chosen.photos(), chosen.subject.kind, "subject")
    asked, truth = requests(chosen, job.split), photo_embedding(judge.read(stacked(lesson.pictures)))
    record = {"job": asdict(job), "requests": [asdict(r) for r in asked], "trained": chosen.trained}
    floor = measure(pipe, judge, Words(f"a {lesson.word}"), job, lesson, asked, truth, 0)
    learn, config = METHODS[name]
    states = learn(pipe, lesson, config(**job.settings, steps=steps, batch=job.batch, seed=job.seed))
    looks = []
    for now in steered(pipe, states, lesson, SteerConfig(every=every, stop=False)):
        if now.checkup:
            point = measure(pipe, judge, now.state.adapter, job, lesson, asked, truth, now.state.step)
            found = {n: leak(record, point, floor, n) for n in ("background", "position")}
            leaks = {n: {"here": f.custom.value, "base": f.base.value, "n": f.base.n} for n, f in found.items() if f}
            like = sum(r["like_subject"] for r in point["readings"]) / len(point["readings"])
            above = {n: r.above for n, r in now.checkup.repeats.items()}
            looks.append({"step": now.state.step, "above": above, "likeness": like, "leaks": leaks})
            print(name, looks[-1], flush=True)
    return {"method": name, **SETTINGS[name], "subject": number, **outcome(looks, SteerConfig().limit), "looks": looks}


def outcome(looks: list[dict], limit: float) -> dict:
    """What `steering.steered` would have done at these looks: the step at which it stops, None for never, and the one that it keeps: the last
    within the limit, that of the stop where none was."""
    kept, before = None, set()
    for look in looks:
        beyond = {name for name, above in look["above"].items() if above > limit}
        if beyond & before:
            return {"stops": look["step"], "keeps": kept or look["step"]}
        kept, before = kept if beyond else look["step"], beyond
    return {"stops": None, "keeps": looks[-1]["step"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subject", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument(
        "--method", action="append", choices=list(SETTINGS), help="may be given several times; all without"
    )
    parser.add_argument("--out", type=Path, default=Path("stopping.json"))
    args = parser.parse_args()
    found = [watched(name, args.subject, args.steps, args.every) for name in args.method or SETTINGS]
    args.out.write_text(json.dumps(found, indent=1) + "\n")
